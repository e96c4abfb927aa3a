"""The command `quantize`: what it is about, once for all ranks; then one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llama4q.errors import UserError
from llama4q.ranks import Ranks, join

from .goal import (
    Engine,
    default_context,
    engine_options,
    goal_of,
    no_schemes,
    range_told,
    told,
)
from .jobs import drawn_tokens, job_of, run_report, shapes, told_what_stands
from .measuring import evaluation_options, questions_of
from .passes import Original, chosen_tokens, measured
from .shared import GPU, as_text, budget_for, nbytes, tell

if TYPE_CHECKING:
    import torch

    from calibrate.budget import Choice, Goal
    from calibrate.data import CalibrationSet
    from calibrate.plan import Pace, Plan
    from calibrate.run import Outcome
    from evals.questions import Questions
    from llama4q.config import ModelConfig
    from llama4q.gpus import Device
    from llama4q.memory import Serving
    from llama4q.recipe import Recipe
    from llama4q.source import Source

RECIPE = "int4"  # where none is named


@click.command()
@click.argument("source", required=False)
@click.argument("destination", required=False, type=click.Path(path_type=Path))
@click.option(
    "--recipe", "-r", metavar="NAME|FILE",
    help="A shipped recipe (int4, int4-g64, int4-g32, int4-fp8, mixed, fp8, int8, int3, bnb-nf4, "
    f"bnb-int8) or a TOML file.  [default: {RECIPE}]",
)  # fmt: skip
@click.option(
    "--fit", "goal", metavar="GPU|SIZE",
    help="Choose the precision of each part of each layer so that the model fits this GPU, or "
    "memory as 80GB, at --context, and loses least. What --recipe names, if given, stays so.",
)  # fmt: skip
@click.option(
    "--context", type=click.IntRange(1),
    help="Tokens of one request, for --fit and the fit line.  [default: 131072, or all that the "
    "model knows]",
)  # fmt: skip
@click.option(
    "--calibration", "-c", metavar="TEXT",
    help="Text to calibrate on: a .txt, .jsonl or .parquet file, a folder, or a Hub data set as "
    "owner/name:config@split#column; or a mix with shares of the tokens and lengths, as "
    "a.txt:0.6,b.jsonl:0.4x8192. Default: the recipe's, the text that comes with llama4q.",
)  # fmt: skip
@click.option("--samples", type=click.IntRange(1), help="Calibration sequences.  [default: 128]")
@click.option("--length", type=click.IntRange(2), help="Tokens a sequence.  [default: 2048]")
@click.option("--seed", type=click.IntRange(0), help="Which sequences are drawn.  [default: 0]")
@click.option(
    "--candidates", type=click.IntRange(1), metavar="TIMES",
    help="Draw so many times the samples, let the original read them all once, and calibrate on "
    "those that reach the experts best.  [default: 1]",
)  # fmt: skip
@click.option(
    "--method", type=click.Choice(["gptq", "rtn"]),
    help="How INT codes are found; rtn rounds to nearest, to compare with.  [default: gptq]",
)  # fmt: skip
@click.option(
    "--memory", metavar="HOST[,GPU]",
    help="What the run may use of this machine, as in 16GB or 16GB,70GB. With little of it hidden "
    "states lie in files; the result is the same.  [default: nine tenths of what is free]",
)  # fmt: skip
@click.option(
    "--stream", is_flag=True,
    help="Fetch the shards of a Hub id as they are needed, and drop them when they are read: the "
    "disk holds the result and a few of them.",
)  # fmt: skip
@click.option("--plan", "only_plan", is_flag=True, help="Say what the run will take, and stop.")
@click.option(
    "--gpu",
    metavar="GPU|SIZE",
    help="The device of the fit line.  [default: --fit's, or h100-80gb]",
)
@engine_options
@evaluation_options
def quantize(
    source: str | None,
    destination: Path | None,
    recipe: str | None,
    goal: str | None,
    context: int | None,
    calibration: str | None,
    samples: int | None,
    length: int | None,
    seed: int | None,
    candidates: int | None,
    method: str | None,
    memory: str | None,
    stream: bool,
    only_plan: bool,
    gpu: str | None,
    engine: Engine,
    dtype: str,
    device: str | None,
    as_json: bool,
    **measured_on: Any,
) -> None:
    """Quantize SOURCE into the folder DESTINATION and report what it cost.

    One expert of one decoder layer is in memory at a time. A run that was stopped goes on where it
    was when the command is repeated; --plan tells beforehand what it takes. Without SOURCE the
    pocket model that comes with llama4q is taken; without DESTINATION the folder is named after
    source and recipe.

    \b
    llama4q quantize meta-llama/Llama-4-Scout-17B-16E-Instruct scout-int4 --recipe int4
    llama4q quantize meta-llama/Llama-4-Scout-17B-16E-Instruct scout --fit h200-141gb
    llama4q quantize pocket out --samples 64 --length 1024

    Up to 8 processes share the work when torchrun starts them, on one machine or on several that
    see the same folders. The result has the same bytes, and a run that was stopped may go on with
    another number of them. Each gets its part of the memory; name how many threads each may use:

    \b
    OMP_NUM_THREADS=16 torchrun --nproc-per-node 4 $(which llama4q) quantize SOURCE DEST
    """
    from calibrate.beforehand import refuse_early
    from calibrate.budget import choose, least
    from calibrate.mix import parse_mix
    from calibrate.plan import check_memory
    from calibrate.progress import Bar, Silence
    from calibrate.run import quantize as run
    from evals.card import markdown
    from evals.evaluation import Evaluation
    from evals.html.page import page
    from evals.report import render
    from llama4q.config import read_config
    from llama4q.device import use_device
    from llama4q.gpus import device_of
    from llama4q.hub import POCKET, resolve, resolve_remote
    from llama4q.machine import keep_freed_memory
    from llama4q.recipe import adjusted, check_schemes, load_recipe
    from llama4q.tokens import load_tokenizer

    ranks = join()
    if stream and ranks.count > 1:
        raise UserError(
            f"--stream with {ranks.count} processes: shards go when one has read them; "
            f"run 'llama4q pull' first and leave out --stream"
        )
    for what, asked in ((f"--candidates {candidates}", (candidates or 1) > 1), ("--fit", goal)):
        if stream and asked:
            raise UserError(
                f"--stream with {what}: choosing reads all layers once more; "
                f"run 'llama4q pull' first and leave out --stream"
            )
    where = use_device(device, ranks.neighbour)
    budget = budget_for(memory, where, ranks)

    def prepared() -> Prepared:
        """What the run is about, once for all ranks."""
        if source is None:
            click.echo(
                "No SOURCE named: quantizing the pocket Llama 4 that comes with llama4q.", err=True
            )
        chosen = adjusted(
            load_recipe(recipe) if recipe else no_schemes() if goal else load_recipe(RECIPE),
            text=calibration, samples=samples, length=length, seed=seed, candidates=candidates,
            method=method, kv_cache=engine.kv,
        )  # fmt: skip
        target = device_of(gpu or goal or GPU)
        check_schemes(chosen)  # all before anything is downloaded
        settings = chosen.calibration
        mix = parse_mix(settings.text)
        name = source or POCKET
        wanted = None
        if goal:
            wanted = goal_of(resolve_remote(name), device_of(goal), context, engine, chosen)
            chosen = least(wanted)
        original = resolve_remote(name) if stream or only_plan else resolve(name, tell)
        config = read_config(original.folder)
        folder = destination or Path(f"{Path(original.name).name}-{chosen.name}")
        lengths = [portion.length or settings.length for portion in mix]
        refuse_early(original.folder, folder, chosen, config, lengths)
        tokenizer = load_tokenizer(original.folder)
        drawn = drawn_tokens(settings, tokenizer)
        questions = questions_of(tokenizer, config, **measured_on)
        plan = _plan(original, config, chosen, drawn, questions, ranks)
        serving = engine.serving(context or default_context(config), chosen.kv_cache)
        return Prepared(
            chosen, wanted, original, config, folder, drawn, questions, plan, target, serving
        )

    about = ranks.from_first(prepared)
    original, config, folder = about.source, about.config, about.folder
    if only_plan:
        if ranks.first:
            pace = _pace(original, folder, about.recipe, dtype, where)
            click.echo("\n".join(about.plan.lines(budget, pace)))
            if about.goal is not None:
                click.echo(range_told(about.goal))
            if stream:
                click.echo(_streaming(original, config))
        return
    held = check_memory(about.plan, budget, memory is not None)
    if stream and ranks.first:
        tell(_streaming(original, config))
    keep_freed_memory()

    def settled() -> tuple[CalibrationSet, Recipe, Plan, Choice | None]:
        """What is decided by the original's own hidden states, once for all ranks."""
        read = Original(original, config, folder, dtype, where, held)
        drawn = chosen_tokens(read, about.drawn, about.recipe.calibration)
        if about.goal is None:
            return drawn, about.recipe, about.plan, None
        choice = choose(about.goal, measured(read, about.goal, drawn.tokens[0]))
        tell(told(choice))
        plan = _plan(original, config, choice.recipe, drawn, about.questions, ranks)
        return drawn, choice.recipe, plan, choice

    drawn, chosen, plan, choice = ranks.from_first(settled)
    held = check_memory(plan, budget, memory is not None)
    job = job_of(original, folder, chosen, drawn, dtype, where)

    def report(outcome: Outcome) -> Mapping[str, Any]:
        return run_report(job, drawn, config, about.device, about.serving, outcome, choice)

    def pages(report: Mapping[str, Any]) -> dict[str, bytes]:
        return {"report.html": page(report).encode(), "evaluation.md": markdown(report).encode()}

    shown = Bar(plan.expected()) if ranks.first else Silence()
    observer = Evaluation(config, about.questions, ranks)
    with shown as bar, told_what_stands(folder, config.num_layers):
        finished = run(job, observer, bar, report, held, ranks, pages)
    ranks.leave()
    if not ranks.first:
        return
    shown_to = f"\n{render(finished)}\nWritten to {folder}/, to look at as {folder / 'report.html'}"
    click.echo(as_text(finished) if as_json else shown_to)
    covered = finished["calibration"]["coverage"]
    if covered is not None and covered["warning"]:
        click.echo(f"Warning: {covered['warning']}", err=True)


@dataclass(frozen=True)
class Prepared:
    """What a run is about, as far as that can be told before anything is computed."""

    recipe: Recipe  # with a goal, the smallest mix
    goal: Goal | None
    source: Source
    config: ModelConfig
    folder: Path
    drawn: CalibrationSet
    questions: Questions
    plan: Plan
    device: Device  # of the fit line, as are these:
    serving: Serving


def _plan(
    source: Source,
    config: ModelConfig,
    recipe: Recipe,
    drawn: CalibrationSet,
    questions: Questions,
    ranks: Ranks,
) -> Plan:
    """What the run will take, with all sequences that will travel through the layers."""
    from calibrate.plan import plan_for
    from calibrate.work import Texts
    from evals import retrieval

    texts = Texts(
        shapes(drawn.tokens),
        shapes([questions.windows]),
        shapes(retrieval.batches(questions.prompts)),
    )
    return plan_for(source.checkpoint(), config, recipe, texts, ranks.count)


def _pace(
    source: Source, destination: Path, recipe: Recipe, dtype: str, device: torch.device
) -> Pace:
    """How fast this machine is, measured in a few seconds."""
    from calibrate.plan import measure_searches, pace
    from calibrate.run import DTYPES
    from llama4q.machine import measure_rates
    from llama4q.schemes import SCHEMES

    click.echo("Measuring this machine ...", err=True)
    existing = next(path for path in destination.absolute().parents if path.exists())
    shard = next(iter(sorted(source.folder.glob("*.safetensors"))), None)
    searched = next((one for one in recipe.schemes.values() if one.calibrates), SCHEMES["int4"])
    rates = measure_rates(shard, existing, device)
    return pace(rates, measure_searches(searched, recipe.solver, device), DTYPES[dtype])


def _streaming(source: Source, config: ModelConfig) -> str:
    """What a streamed run has on the disk."""
    from calibrate.beforehand import reading_order

    held = source.held(reading_order(config, source.checkpoint().names()))
    if not held:
        return f"{source.name}: all of it is on this machine, nothing is fetched"
    return (
        f"{source.name}: {nbytes(source) / 1e9:.2f} GB are fetched as they are needed, at most "
        f"{held / 1e9:.2f} GB of them are on the disk at a time"
    )
