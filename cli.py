"""The command line: parse, one call, print. Heavy imports happen inside the commands."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from llama4q import __version__
from llama4q.errors import UserError
from llama4q.ranks import ALONE, Ranks, join, leave_at_once, speaker
from llama4q.stopping import Stopped, stoppable

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from calibrate.data import CalibrationSet
    from calibrate.plan import Pace, Plan
    from calibrate.run import Job, Outcome
    from calibrate.work import Texts
    from evals.figures import Report
    from evals.model_card import Subject
    from evals.questions import Questions
    from llama4q.checkpoint import TensorInfo
    from llama4q.config import ModelConfig
    from llama4q.hidden import Spool
    from llama4q.machine import Budget
    from llama4q.recipe import Calibration, Recipe
    from llama4q.source import Source

Command = TypeVar("Command", bound=Callable[..., Any])

FIT_CONTEXT = 131072  # tokens; the context that a report's fit line speaks of
GPU = "h100-80gb"
BASE_MODEL = "The original's Hub id, where it was quantized from a folder."
UNITS = {
    "bytes": "of all tensors",
    "tokens": "calibration tokens that reached an expert or a weight",
    "share": "of the calibration tokens, as asked for, 0 to 1",
    "needed": "calibration tokens, as many as an expert's widest matrix has inputs",
    "error": "share of the wanted output's energy, on calibration tokens held out of the solver",
    "rounding_error": "the same for plain rounding",
    "hidden_error": "|x - y|^2 / |x|^2 of the hidden states after the layer",
    "shrinkage": "share of the Hessian of all tokens, or of the diagonal, 0 to 1",
    "damping": "of the Hessian's mean diagonal",
    "correction": "share taken of the correction for what earlier layers damaged, 0 to 1",
    "seconds": "wall time",
}


class Commands(click.Group):
    """Shows a user's mistake as one line with exit code 1 (`check`: 2), and a signal with what a
    shell expects; anything else keeps its traceback."""

    def main(self, *args: Any, **more: Any) -> Any:
        try:
            return super().main(*args, **more)
        except SystemExit as end:
            leave_at_once(end)
            raise

    def invoke(self, context: click.Context) -> Any:
        try:
            with stoppable():
                _check_temporary_folder()
                return super().invoke(context)
        except UserError as error:
            click.echo(f"Error: {speaker()}{error}", err=True)
            code = 2 if context.invoked_subcommand == "check" else 1  # there 1 is an answer
        except Stopped as stop:
            [advice] = getattr(stop, "__notes__", ["repeat the command to start again"])
            click.echo(f"\n{speaker()}Stopped by {stop.signal.name}: {advice}.", err=True)
            code = 128 + stop.signal
        raise SystemExit(code)


def _check_temporary_folder() -> None:
    """torch and datasets write to it when they are imported."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UserError(
            f"{error.strerror}; free some space there, or set TMPDIR to a folder that has some"
        ) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="llama4q")
def main() -> None:
    """Quantize Llama 4 expert by expert on a small host, and measure what it cost.

    \b
    llama4q inspect SOURCE              what it is and where its bytes are
    llama4q pull HUB_ID                 download it, and check every byte
    llama4q quantize SOURCE DEST        write a quantized checkpoint with its evidence
    llama4q fit DEST --gpu h100-80gb    will it fit, and up to which context
    llama4q eval DEST --against SOURCE  measure the loss of any checkpoint
    llama4q lm-eval --model llama4q ... lm-evaluation-harness on a streamed checkpoint
    llama4q check DEST/report.json      a verdict for CI: exit code 0 to 3
    llama4q verify DEST                 is it whole, unharmed and fit to be served
    llama4q reproduce DEST              make it again: the same bytes?
    llama4q card DEST                   its model card
    llama4q push DEST REPO              publish it on the Hub, as its licence demands

    SOURCE is a folder, a Hub id such as meta-llama/Llama-4-Scout-17B-16E-Instruct[@revision], or
    'pocket', a small trained Llama 4 that comes with llama4q.
    """


def evaluation_options(command: Command) -> Command:
    """The options that say what both models are measured on."""
    for option in reversed(
        (
            click.option(
                "--eval-text", metavar="TEXT", help="Text to measure on; one, as in --calibration."
            ),
            click.option(
                "--eval-windows",
                default=16,
                show_default=True,
                type=click.IntRange(1),
                help="Windows of that text.",
            ),
            click.option(
                "--eval-length",
                default=2048,
                show_default=True,
                type=click.IntRange(2),
                help="Tokens a window.",
            ),
            click.option(
                "--eval-stride",
                type=click.IntRange(1),
                help="Tokens from one window to the next; fewer than a window's: they overlap, and "
                "every token is scored with more before it.  [default: no overlap]",
            ),
            click.option(
                "--tasks",
                default="needle",
                show_default=True,
                help="Retrieval tasks: needle, RULER's by name, or ruler for all of them.",
            ),
            click.option(
                "--lengths",
                default="1024,4096",
                show_default=True,
                help="Lengths of the prompts in tokens, as 4k,8k or 4k..1M by doubling; '' for "
                "none.",
            ),
            click.option(
                "--depths",
                default="0,0.25,0.5,0.75,1",
                show_default=True,
                help="Where that stands which is asked for; 0 is the text's start, 1 its end.",
            ),
            click.option(
                "--prompts",
                default=2,
                show_default=True,
                type=click.IntRange(1),
                help="For each task, length and depth.",
            ),
            click.option(
                "--qa",
                metavar="FILE",
                type=click.Path(path_type=Path, dir_okay=False),
                help="A JSON file in SQuAD form, for the task qa.",
            ),
            click.option(
                "--dtype",
                type=click.Choice(["bfloat16", "float32"]),
                default="bfloat16",
                show_default=True,
                help="Arithmetic: bfloat16 as engines serve, float32 to compare methods.",
            ),
            click.option(
                "--device",
                metavar="NAME",
                help="Where to compute: cpu, cuda, or one of several GPUs as cuda:1.  "
                "[default: the GPU where there is one]",
            ),
            click.option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
        )
    ):
        command = option(command)
    return command


@main.command()
@click.argument("source", default="pocket")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(source: str, as_json: bool) -> None:
    """Show the architecture of SOURCE and where its bytes are. Reads headers, no tensor."""
    from llama4q.hub import resolve_remote
    from llama4q.inspect import inspect_checkpoint, render_summary

    summary = inspect_checkpoint(resolve_remote(source))
    click.echo(_json(summary.to_json()) if as_json else render_summary(summary))


@main.command()
@click.argument("source", required=False)
@click.argument("destination", required=False, type=click.Path(path_type=Path))
@click.option(
    "--recipe", "-r", default="int4", show_default=True, metavar="NAME|FILE",
    help="A shipped recipe (int4, int4-g64, int4-g32, int4-fp8, mixed, fp8, int8, int3, bnb-nf4, "
    "bnb-int8) or a TOML file.",
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
@click.option("--gpu", default=GPU, show_default=True, help="The device of the fit line.")
@evaluation_options
def quantize(
    source: str | None,
    destination: Path | None,
    recipe: str,
    calibration: str | None,
    samples: int | None,
    length: int | None,
    seed: int | None,
    candidates: int | None,
    method: str | None,
    memory: str | None,
    stream: bool,
    only_plan: bool,
    gpu: str,
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
    llama4q quantize pocket out --samples 64 --length 1024

    Up to 8 processes share the work when torchrun starts them, on one machine or on several that
    see the same folders. The result has the same bytes, and a run that was stopped may go on with
    another number of them. Each gets its part of the memory; name how many threads each may use:

    \b
    OMP_NUM_THREADS=16 torchrun --nproc-per-node 4 $(which llama4q) quantize SOURCE DEST
    """
    from calibrate.mix import parse_mix
    from calibrate.plan import check_memory, plan_for
    from calibrate.progress import Bar, Silence
    from calibrate.run import quantize as run
    from calibrate.run import refuse_early
    from evals.card import markdown
    from evals.evaluation import Evaluation
    from evals.html.page import page
    from evals.report import render
    from llama4q.config import read_config
    from llama4q.device import use_device
    from llama4q.gpus import find_device
    from llama4q.hub import POCKET, resolve, resolve_remote
    from llama4q.machine import keep_freed_memory
    from llama4q.recipe import adjusted, check_schemes, load_recipe
    from llama4q.text import load_tokenizer

    ranks = join()
    if stream and ranks.count > 1:
        raise UserError(
            f"--stream with {ranks.count} processes: shards go when one has read them; "
            f"run 'llama4q pull' first and leave out --stream"
        )
    if stream and (candidates or 1) > 1:
        raise UserError(
            f"--stream with --candidates {candidates}: choosing text reads all layers once more; "
            f"run 'llama4q pull' first and leave out --stream"
        )
    where = use_device(device, ranks.neighbour)
    budget = _budget(memory, where, ranks)

    def prepared() -> tuple[Recipe, Source, ModelConfig, Path, CalibrationSet, Questions, Plan]:
        """What the run is about, once for all ranks."""
        if source is None:
            click.echo(
                "No SOURCE named: quantizing the pocket Llama 4 that comes with llama4q.", err=True
            )
        chosen = adjusted(
            load_recipe(recipe),
            text=calibration, samples=samples, length=length, seed=seed, candidates=candidates,
            method=method,
        )  # fmt: skip
        find_device(gpu)
        check_schemes(chosen)  # both before anything is downloaded
        settings = chosen.calibration
        mix = parse_mix(settings.text)
        name = source or POCKET
        original = resolve_remote(name) if stream or only_plan else resolve(name, _tell)
        config = read_config(original.folder)
        folder = destination or Path(f"{Path(original.name).name}-{chosen.name}")
        lengths = [portion.length or settings.length for portion in mix]
        refuse_early(original.folder, folder, chosen, config, lengths)
        tokenizer = load_tokenizer(original.folder)
        drawn = _drawn(settings, tokenizer)
        questions = _questions(tokenizer, config, **measured_on)
        texts = _texts(drawn, questions)
        plan = plan_for(original.checkpoint(), config, chosen, texts, ranks.count)
        return chosen, original, config, folder, drawn, questions, plan

    chosen, original, config, folder, drawn, questions, plan = ranks.from_first(prepared)
    settings = chosen.calibration
    if only_plan:
        if ranks.first:
            pace = _pace(original, folder, chosen, dtype, where)
            click.echo("\n".join(plan.lines(budget, pace)))
            if stream:
                click.echo(_streaming(original, config))
        return
    held = check_memory(plan, budget, memory is not None)
    if stream and ranks.first:
        _tell(_streaming(original, config))
    keep_freed_memory()
    drawn = ranks.from_first(lambda: _chosen(drawn, settings, original, dtype, where))
    job = _job(original, folder, chosen, drawn, dtype, where)

    def report(outcome: Outcome) -> Mapping[str, Any]:
        return _run_report(job, drawn, config, gpu, outcome)

    def pages(report: Mapping[str, Any]) -> dict[str, bytes]:
        return {"report.html": page(report).encode(), "evaluation.md": markdown(report).encode()}

    shown = Bar(plan.expected()) if ranks.first else Silence()
    with shown as bar, _told_what_stands(folder, config.num_layers):
        finished = run(job, Evaluation(config, questions, ranks), bar, report, held, ranks, pages)
    ranks.leave()
    if not ranks.first:
        return
    told = f"\n{render(finished)}\nWritten to {folder}/, to look at as {folder / 'report.html'}"
    click.echo(_json(finished) if as_json else told)
    covered = finished["calibration"]["coverage"]
    if covered is not None and covered["warning"]:
        click.echo(f"Warning: {covered['warning']}", err=True)


def _tell(line: str) -> None:
    click.echo(line, err=True)


def _budget(memory: str | None, device: torch.device, ranks: Ranks) -> Budget:
    """What this process may use: as named, else nine tenths of what is free. The host's memory is
    shared evenly by the processes on it."""
    from llama4q.machine import Budget, device_memory, free_memory, parse_memory

    named = parse_memory(memory) if memory else Budget(free_memory() * 9 // 10)
    host = named.host // ranks.neighbours
    if device.type == "cpu":
        if named.device is not None:
            raise UserError(
                f"memory {memory!r}: gives some of a GPU to a run on the CPU; name the host's alone"
            )
        return Budget(host)
    return Budget(host, named.device or device_memory(device) * 9 // 10)


def _texts(drawn: CalibrationSet, questions: Questions) -> Texts:
    """All sequences that will travel through the layers."""
    from calibrate.work import Texts
    from evals import retrieval

    return Texts(
        _shapes(drawn.tokens),
        _shapes([questions.windows]),
        _shapes(retrieval.batches(questions.prompts)),
    )


def _shapes(batches: Iterable[torch.Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple((batch.shape[0], batch.shape[1]) for batch in batches)


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


@contextlib.contextmanager
def _told_what_stands(folder: Path, layers: int) -> Iterator[None]:
    """Adds to `Stopped` how much of a quantize run is written and how it goes on."""
    from calibrate.run import layers_written
    from llama4q.manifest import MANIFEST

    try:
        yield
    except Stopped as stop:
        written = layers_written(folder)
        if (folder / MANIFEST).exists():
            stop.add_note(f"{folder} is finished")
        elif written == layers:
            stop.add_note(f"all {layers} layers are written; repeat the command to finish")
        else:
            stop.add_note(
                f"{written} of {layers} layers are written; "
                f"repeat the command, it goes on at layer {written}"
            )
        raise


def _drawn(settings: Calibration, tokenizer: PreTrainedTokenizerBase) -> CalibrationSet:
    """Calibration tokens as named, candidates among them."""
    from calibrate.data import calibration_tokens
    from calibrate.mix import parse_mix

    return calibration_tokens(
        parse_mix(settings.text), tokenizer,
        samples=settings.samples * settings.candidates, length=settings.length, seed=settings.seed,
    )  # fmt: skip


def _job(
    source: Source,
    folder: Path,
    recipe: Recipe,
    drawn: CalibrationSet,
    dtype: str,
    device: torch.device,
) -> Job:
    """What a run depends on."""
    from calibrate.run import DTYPES, Job

    return Job(source, folder, recipe, drawn.tokens, drawn.digest, DTYPES[dtype], device)


def _run_report(
    job: Job, drawn: CalibrationSet, config: ModelConfig, gpu: str, outcome: Outcome
) -> dict[str, Any]:
    """The report of a finished run."""
    from calibrate.coverage import coverage
    from calibrate.kernel import description
    from llama4q import products
    from llama4q.checkpoint import PartReader
    from llama4q.inspect import component_bytes
    from llama4q.machine import properties

    settings = job.recipe.calibration
    written = PartReader(job.destination, list(outcome.files))
    return {
        **_provenance(job.source, config),
        "quantized": {
            "name": str(job.destination),
            "bytes": outcome.quantized_bytes,
            "components": component_bytes(config, written.infos),
        },
        "recipe": job.recipe.to_json(),
        "calibration": {
            "source": settings.text,
            "samples": settings.samples,
            "length": settings.length,
            "seed": settings.seed,
            "candidates": settings.candidates,
            "tokens": sum(batch.numel() for batch in drawn.tokens),
            "digest": drawn.digest,
            "mix": [part.to_json() for part in drawn.drawn],
            "coverage": coverage(job.recipe, config, outcome.layers),
        },
        "machine": properties(job.device),
        "kernel": description(job.recipe.solver.beams, job.device),
        "products": products.description(job.device),
        "dtype": str(job.dtype).removeprefix("torch."),
        "units": UNITS,
        "layers": outcome.layers,
        "rescues": outcome.rescues,
        "evidence": outcome.evidence,
        "fit": _fit(config, written.infos, gpu),
        "verified": outcome.checked,
        "files": outcome.files,
        "seconds": {"total": outcome.seconds},
    }


def _chosen(
    drawn: CalibrationSet,
    settings: Calibration,
    source: Source,
    dtype: str,
    device: torch.device,
) -> CalibrationSet:
    """The sequences that cover the experts best, where more were drawn than are wanted."""
    from llama4q.config import read_config

    config = read_config(source.folder)
    if settings.candidates == 1 or not config.moe_layers:
        return drawn
    from tqdm import tqdm

    from calibrate.choose import best_covering, expert_counts
    from calibrate.data import kept
    from calibrate.run import DTYPES
    from llama4q.weights import LayerReader

    if len(drawn.drawn) > 1:
        raise UserError(
            f"--candidates {settings.candidates} with a mix of {len(drawn.drawn)} texts would "
            f"change their shares; name one text, or leave out --candidates"
        )
    reader = LayerReader(source.checkpoint(device), config, DTYPES[dtype])
    with tqdm(total=config.num_layers, desc="choosing calibration text", unit="layer") as bar:

        def layer_done() -> None:
            bar.update()

        counts = expert_counts(reader, drawn.tokens[0], layer_done)
    return kept(drawn, best_covering(counts, settings.samples))


def _streaming(source: Source, config: ModelConfig) -> str:
    """What a streamed run has on the disk."""
    from calibrate.run import reading_order

    held = source.held(reading_order(config, source.checkpoint().names()))
    if not held:
        return f"{source.name}: all of it is on this machine, nothing is fetched"
    return (
        f"{source.name}: {_nbytes(source) / 1e9:.2f} GB are fetched as they are needed, at most "
        f"{held / 1e9:.2f} GB of them are on the disk at a time"
    )


@main.command("eval")
@click.argument("quantized")
@click.option("--against", required=True, metavar="SOURCE", help="The original; folder or Hub id.")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Also write the report here."
)
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), help="Also write it as a page."
)
@click.option(
    "--memory", metavar="SIZE",
    help="What the run may use of the host, as in 16GB. What hidden states need beyond that lies "
    "in temporary files (TMPDIR).  [default: nine tenths of what is free]",
)  # fmt: skip
@evaluation_options
def evaluate(
    quantized: str,
    against: str,
    out: Path | None,
    html: Path | None,
    memory: str | None,
    dtype: str,
    device: str | None,
    as_json: bool,
    **measured_on: Any,
) -> None:
    """Compare the checkpoint QUANTIZED with the original, layer by layer in one pass.

    Perplexity of both, divergence, routing agreement and retrieval, on the same tokens.
    Neither model is ever in memory as a whole.
    """
    from tqdm import tqdm

    from calibrate.run import DTYPES
    from evals.evaluation import compare
    from evals.html.page import page
    from evals.report import render
    from llama4q.config import read_config
    from llama4q.device import use_device
    from llama4q.hub import resolve
    from llama4q.inspect import component_bytes
    from llama4q.text import check_same_tokens, load_tokenizer
    from llama4q.weights import LayerReader
    from llama4q.writer import to_json, write_atomically, writing

    where = use_device(device)
    original, other = resolve(against, _tell), resolve(quantized, _tell)
    configs = [read_config(side.folder) for side in (original, other)]  # refuses early
    readers = [
        LayerReader(side.checkpoint(where), config, DTYPES[dtype])
        for side, config in zip((original, other), configs, strict=True)
    ]
    check_same_tokens(original.folder, other.folder)
    questions = _questions(load_tokenizer(original.folder), configs[0], **measured_on)
    spool = _spool(configs[0], questions, memory, where)
    layers = readers[0].config.num_layers
    with tqdm(total=layers, unit="layer", dynamic_ncols=True, disable=None) as bar:
        evidence = compare(readers[0], readers[1], questions, bar.update, spool)
    report = {
        **_provenance(original, configs[0]),
        "quantized": {
            "name": other.name,
            "bytes": _nbytes(other),
            "components": component_bytes(configs[1], readers[1].checkpoint.infos),
        },
        "dtype": dtype,
        "evidence": evidence,
    }
    for path, content in ((out, to_json(report)), (html, page(report).encode())):
        if path is not None:
            with writing(path):
                write_atomically(path, content)
    click.echo(_json(report) if as_json else render(report))


@main.command()
@click.argument("source", metavar="HUB_ID")
def pull(source: str) -> None:
    """Download HUB_ID into the Hub's cache: what a checkpoint needs of it, and no more.

    Every file is held to the digest that the Hub has of it, also those that were there; wrong bytes
    are fetched again once. A download that was cut goes on when the command is repeated. Prints the
    folder. Other commands download by themselves; they check what they fetch.

    \b
    llama4q pull meta-llama/Llama-4-Scout-17B-16E-Instruct
    """
    from llama4q.hub import pull as run

    found = run(source, _tell)
    _tell(f"{found.name} at {found.revision}: {_nbytes(found) / 1e9:.2f} GB of tensors, all right")
    click.echo(found.folder)


@main.command("lm-eval", context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def harness(arguments: tuple[str, ...]) -> None:
    """The command line of lm-evaluation-harness, with the model `llama4q` in it.

    Log-likelihood tasks on a checkpoint of any size, streamed from its files. Needs the extra
    [harness]. Its own help: llama4q lm-eval -- --help

    \b
    llama4q lm-eval --model llama4q --model_args pretrained=scout-int4 --tasks arc_challenge
    """
    try:
        from lm_eval.__main__ import cli_evaluate

        import evals.harness  # noqa: F401 - registers the model
    except ImportError as error:
        raise UserError(
            f"lm-evaluation-harness is not here ({error}); pip install 'llama4q[harness]'"
        ) from None
    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()


def _spool(
    config: ModelConfig, questions: Questions, memory: str | None, device: torch.device
) -> Spool:
    """Where an evaluation's hidden states lie, in what all else leaves of the memory."""
    from evals.footprint import held
    from llama4q.hidden import Spool

    budget, needed = _budget(memory, device, ALONE), held(config, questions)
    if needed > budget.host:
        limit = "--memory gives it" if memory else "no more is free than"
        raise UserError(
            f"memory: the evaluation needs {needed / 1e9:.1f} GB beside hidden states, and {limit} "
            f"{budget.host / 1e9:.1f} GB; free some, or choose shorter windows and prompts"
        )
    return Spool(budget.host - needed, device=device)


@main.command()
@click.argument("checkpoint")
@click.option(
    "--recipe", "-r", metavar="NAME|FILE",
    help="CHECKPOINT is an original: plan what this recipe would make of it.",
)  # fmt: skip
@click.option("--gpu", default=GPU, show_default=True, help="A known device.")
@click.option("--gpu-memory", metavar="SIZE", help="Of any other device, as 80GB or 80GiB.")
@click.option(
    "--gpus", "cards", default=1, show_default=True, help="How many of them, tensor parallel."
)
@click.option("--context", default=8192, show_default=True, help="Tokens of one request.")
@click.option("--concurrency", default=1, show_default=True, help="Such requests at once.")
@click.option(
    "--kv", type=click.Choice(["bf16", "fp8"]),
    help="How the engine stores keys and values.  [default: as the checkpoint says, else bf16]",
)  # fmt: skip
@click.option("--batched-tokens", type=int, help="Of one step.  [default: vLLM's on that device]")
@click.option("--utilization", type=float, help="Share of the device's memory.  [default: 0.92]")
@click.option("--positions", type=int, help="Of the rotary table.  [default: the model's own]")
@click.option("--block-size", "block_tokens", type=int, help="Tokens of a block.  [default: 16]")
@click.option("--no-hybrid", is_flag=True, help="Chunked layers keep all tokens, too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def fit(
    checkpoint: str,
    recipe: str | None,
    gpu: str,
    gpu_memory: str | None,
    kv: str | None,
    no_hybrid: bool,
    as_json: bool,
    **engine: Any,
) -> None:
    """Say whether CHECKPOINT fits GPUs at a context, the largest one that does, and how to serve.

    Weights are counted from the files as vLLM holds them, or predicted with --recipe; the KV cache
    is laid out as by vLLM. Where it does not fit, it says what would do. Exit code 0 when it fits,
    1 when it does not.

    \b
    llama4q fit scout-int4 --gpu h100-80gb --context 16384
    llama4q fit meta-llama/Llama-4-Scout-17B-16E-Instruct --recipe int4 --concurrency 4 --kv fp8
    """
    from llama4q.fit import answer, opened, stored_kv_dtype
    from llama4q.gpus import Device, find_device, memory_bytes
    from llama4q.kv_cache import KVDtype
    from llama4q.memory import Serving

    device = Device(gpu_memory, memory_bytes(gpu_memory)) if gpu_memory else find_device(gpu)
    source = opened(checkpoint)
    named = {key: value for key, value in engine.items() if value is not None}
    kv_dtype = KVDtype(kv) if kv else stored_kv_dtype(source)
    found = answer(
        source, recipe, device, Serving(kv_dtype=kv_dtype, hybrid=not no_hybrid, **named)
    )
    click.echo(_json(found.to_json()) if as_json else found.render())
    sys.exit(0 if found.plan.fits else 1)


def _show_policy(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from evals.policy import default_policy

        click.echo(default_policy(), nl=False)
        context.exit()


@main.command()
@click.argument("report", type=click.Path(path_type=Path))
@click.option(
    "--policy", type=click.Path(path_type=Path),
    help="A TOML file that says which figures are limited, and how.  [default: --show-policy]",
)  # fmt: skip
@click.option(
    "--baseline", type=click.Path(path_type=Path),
    help="An earlier report on the same tokens, for the policy's limits that are relative to it.",
)  # fmt: skip
@click.option(
    "--limit", "changes", multiple=True, metavar="LINE",
    help="Puts a line of the policy differently, as likelihood.kl_mean.max=0.03; may be repeated.",
)  # fmt: skip
@click.option("--junit", type=click.Path(path_type=Path), help="Also write JUnit XML here.")
@click.option(
    "--markdown", type=click.Path(path_type=Path),
    help="Also write Markdown here; it is added to GitHub's job summary in any case.",
)  # fmt: skip
@click.option(
    "--show-policy", is_flag=True, is_eager=True, expose_value=False, callback=_show_policy,
    help="Print the default policy, to start one's own from, and stop.",
)  # fmt: skip
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False),
    help="Also write the report as a page, with this verdict.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(
    report: Path,
    policy: Path | None,
    baseline: Path | None,
    changes: tuple[str, ...],
    junit: Path | None,
    markdown: Path | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Hold REPORT against a policy, and against the BASELINE that it is named.

    Exit code 0 when every limit holds, 1 when a figure is beyond its limit at 95 %, 2 for wrong
    use, 3 when nothing is beyond, but a figure is missing or from too small a sample.
    """
    import os

    from evals import verdict as words
    from evals.gate import check as judge
    from evals.gate import load_report
    from evals.html.page import page
    from evals.policy import load_policy
    from evals.report import render_verdict

    limits, held = load_policy(policy, changes), load_report(report)
    verdict = judge(held, limits, load_report(baseline) if baseline else None)
    if junit is not None:
        _write(junit, words.junit(verdict))
    if markdown is not None:
        _write(markdown, words.markdown(verdict))
    if html is not None:
        _write(html, page(held, verdict))
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        _write(Path(summary), words.markdown(verdict), "a")
    click.echo(_json(words.to_json(verdict)) if as_json else render_verdict(verdict))
    sys.exit(verdict.answer.value)


@main.command()
@click.argument("checkpoint")
@click.option(
    "--against", metavar="SOURCE",
    help="The original: a folder, a Hub id or 'pocket'. Every weight is compared with it.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(checkpoint: str, against: str | None, as_json: bool) -> None:
    """Read all of CHECKPOINT, which llama4q has written, and say whether it is as it must be.

    Every file's size and SHA-256 as in manifest.json; every tensor's name, shape and dtype; scales;
    quantization_config and side files as engines need them. With the original at hand also
    that untouched tensors have its bits, and that all others stand for its weights.
    """
    from tqdm import tqdm

    from llama4q.custody import bytes_to_read, check_custody
    from llama4q.hub import resolve

    folder = resolve(checkpoint).folder
    source = resolve(against).folder if against else None
    total = bytes_to_read(folder, source)
    with tqdm(total=total, unit="B", unit_scale=True, dynamic_ncols=True, disable=None) as bar:
        checked = list(check_custody(folder, source, bar.update))
    if as_json:
        click.echo(_json({"checked": {one.what: one.count for one in checked}}))
        return
    for one in checked:
        click.echo(f"{one.what:15}{one.count:8,}  {one.how}")
    click.echo("OK")


@main.command()
@click.argument("checkpoint")
@click.option(
    "--source", metavar="SOURCE",
    help="Where the original is now, when it has moved.  [default: as recorded]",
)  # fmt: skip
@click.option(
    "--into", metavar="FOLDER", type=click.Path(path_type=Path),
    help="Where to make it again.  [default: CHECKPOINT's name and -again, in this folder]",
)  # fmt: skip
@click.option(
    "--memory", metavar="HOST[,GPU]",
    help="What the run may use of this machine, as in quantize.  [default: nine tenths of what is "
    "free]",
)  # fmt: skip
@click.option("--device", metavar="NAME", help="Where to compute.  [default: as recorded]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def reproduce(
    checkpoint: str,
    source: str | None,
    into: Path | None,
    memory: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Quantize again as the report of CHECKPOINT says, and compare the results.

    The same machine type and versions give the same bytes: exit code 0. Otherwise the weights that
    differ are named, with the largest difference and what is not as it was: exit code 1. Nothing
    is measured on the way. A run that was stopped goes on when the command is repeated.
    """
    import torch

    from calibrate.plan import check_memory, plan_for
    from calibrate.progress import Bar
    from calibrate.reproduce import Unobserved, check_tokens_alike, recorded, render, result
    from calibrate.run import quantize as run
    from calibrate.work import Texts
    from llama4q.config import read_config
    from llama4q.device import use_device
    from llama4q.hub import resolve
    from llama4q.machine import keep_freed_memory
    from llama4q.text import load_tokenizer

    finished = resolve(checkpoint, _tell)
    before = recorded(finished.checkpoint())
    where = use_device(device or before.device)
    torch.set_num_threads(before.threads)
    original = resolve(source or before.source, _tell)
    config, recipe = read_config(original.folder), before.recipe
    folder = into or Path(f"{finished.folder.absolute().name}-again")
    drawn = _drawn(recipe.calibration, load_tokenizer(original.folder))
    plan = plan_for(original.checkpoint(), config, recipe, Texts(_shapes(drawn.tokens)))
    held = check_memory(plan, _budget(memory, where, ALONE), memory is not None)
    keep_freed_memory()
    drawn = _chosen(drawn, recipe.calibration, original, before.dtype, where)
    check_tokens_alike(before, drawn.digest)
    job = _job(original, folder, recipe, drawn, before.dtype, where)

    def report(outcome: Outcome) -> Mapping[str, Any]:
        return _run_report(job, drawn, config, before.report["fit"]["device"], outcome)

    with Bar(plan.expected()) as bar, _told_what_stands(folder, config.num_layers):
        again = run(job, Unobserved(), bar, report, held)
    found = result(finished.checkpoint(), before, job, again)
    click.echo(_json(found.to_json()) if as_json else render(found))
    sys.exit(0 if found.same else 1)


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--repo", metavar="OWNER/NAME", help="The repository that it will be in.")
@click.option("--base-model", metavar="OWNER/NAME", help=BASE_MODEL)
def card(checkpoint: Path, repo: str | None, base_model: str | None) -> None:
    """Print the model card of the folder CHECKPOINT, a README.md, made from its report.

    \b
    llama4q card scout-int4 --repo me/Llama-4-Scout-17B-16E-Instruct-int4 > scout-int4/README.md
    """
    from evals.model_card import model_card

    report, subject = _subject(checkpoint, repo, base_model)
    click.echo(model_card(report, subject), nl=False)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="When it is created, show it to nobody else.")
@click.option(
    "--revision", metavar="BRANCH", help="Where to; created when needed.  [default: main]"
)
@click.option("--create-pr", is_flag=True, help="Propose the commit to REPO instead of making it.")
@click.option("--dry-run", is_flag=True, help="Check everything here, and send nothing.")
@click.option(
    "--accept-license", is_flag=True,
    help="You have read the Llama 4 Community License in FOLDER, and agree to it.",
)  # fmt: skip
@click.option("--base-model", metavar="OWNER/NAME", help=BASE_MODEL)
def push(
    folder: Path,
    repo: str,
    private: bool,
    revision: str | None,
    create_pr: bool,
    dry_run: bool,
    accept_license: bool,
    base_model: str | None,
) -> None:
    """Publish the checkpoint in FOLDER as REPO on the Hub, as its licence demands.

    Prints every duty of the licence with its state, and stops when one is missing. README.md is
    made from the report where there is none. All of it is one commit; a push that was cut changed
    nothing, and goes on when the command is repeated.

    \b
    llama4q push scout-int4 me/Llama-4-Scout-17B-16E-Instruct-int4 --dry-run
    """
    from evals.model_card import model_card
    from llama4q.licence import Card, Publication, State, duties, licence_files
    from llama4q.publish import Order, check_token, list_too, publish, read_card, sent

    order = Order(folder, repo, private, revision, create_pr)
    list_too(folder, licence_files(folder))  # those that its publisher has added
    report, subject = _subject(folder, repo, base_model)
    there = read_card(folder)
    shown = Card(model_card(report, subject), there=False) if there is None else Card(there)
    owed = duties(
        Publication(
            folder, repo, subject.licence, subject.base_model, subject.multimodal, shown,
            accept_license,
        )
    )  # fmt: skip
    for duty in owed:
        click.echo(f"{duty.state:<16} {duty.name:<21} {duty.what}")
    missing = [duty for duty in owed if duty.state is State.MISSING]
    for duty in missing:
        click.echo(f"Error: {duty.name}: {duty.todo}", err=True)
    if missing:
        sys.exit(1)
    files = _checked(folder)
    if dry_run:
        click.echo(f"Nothing was sent: {len(sent(files))} files would go to {repo}.")
        return
    check_token()
    click.echo(publish(order, files, shown.text, _tell))


def _subject(folder: Path, repo: str | None, base_model: str | None) -> tuple[Report, Subject]:
    """What a card of the checkpoint in `folder` is made from."""
    from evals.gate import load_report
    from evals.model_card import Subject
    from llama4q.config import read_config
    from llama4q.licence import base_model_of, licence_of

    report = load_report(folder / "report.json")
    source = report.get("source") or {}
    return report, Subject(
        repo,
        licence_of(source, folder),
        base_model_of(source, base_model),
        read_config(folder).has_vision,
    )


def _checked(folder: Path) -> dict[str, str]:
    """The SHA-256 of its files, each as it was written."""
    from tqdm import tqdm

    from llama4q.manifest import check_manifest, read_manifest

    total = sum(entry.size for entry in read_manifest(folder).values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="checking", disable=None) as bar:
        return check_manifest(folder, bar.update)


def _write(path: Path, text: str, mode: str = "w") -> None:
    try:
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); name another file"
        ) from None


def _questions(
    tokenizer: PreTrainedTokenizerBase,
    config: ModelConfig,
    eval_text: str | None,
    eval_windows: int,
    eval_length: int,
    eval_stride: int | None,
    tasks: str,
    lengths: str,
    depths: str,
    prompts: int,
    qa: Path | None,
) -> Questions:
    """What both models are measured on, from the evaluation options."""
    from evals.answering import read_documents
    from evals.evaluation import refuse_long
    from evals.questions import ask
    from evals.tasks import Ladder, parse_depths, parse_lengths, parse_tasks

    ladder = Ladder(
        parse_lengths(lengths), parse_depths(depths), prompts, parse_tasks(tasks, qa is not None)
    )
    refuse_long(config, [eval_length, *ladder.lengths])  # before they are made
    return ask(
        tokenizer, eval_text, eval_windows, eval_length, ladder, eval_stride,
        config.chunk_size, read_documents(qa) if qa else None,
    )  # fmt: skip


def _fit(config: ModelConfig, tensors: Mapping[str, TensorInfo], gpu: str) -> dict[str, Any]:
    """The report's fit line for a checkpoint of these tensors."""
    from llama4q.gpus import find_device
    from llama4q.memory import Serving, make_plan
    from llama4q.shards import sharded

    device = find_device(gpu)
    serving = Serving(min(FIT_CONTEXT, config.max_positions))
    plan = make_plan(config, sharded(config, tensors), device, serving)
    return {
        "device": device.name,
        "context": serving.context,
        "fits": plan.fits,
        "largest_context": plan.largest_context,
        "total_bytes": plan.total_bytes,
        "usable_bytes": plan.usable_bytes,
        "weight_bytes": plan.weight_bytes,
        "kv_bytes": plan.kv_bytes,
        "reserved_bytes": plan.position_bytes + plan.workspace_bytes + plan.overhead_bytes,
    }


def _provenance(source: Source, config: ModelConfig) -> dict[str, Any]:
    """What made a report, and when."""
    import datetime
    from importlib.metadata import PackageNotFoundError, version

    from evals.gate import SCHEMA
    from llama4q.inspect import component_bytes
    from llama4q.licence import described

    versions = {}
    for name in (
        "torch", "transformers", "compressed-tensors", "safetensors", "datasets", "bitsandbytes",
    ):  # fmt: skip
        with contextlib.suppress(PackageNotFoundError):  # bitsandbytes is an extra
            versions[name] = version(name)
    return {
        "schema": SCHEMA,
        "llama4q": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["llama4q", *sys.argv[1:]]),
        "source": {
            "name": source.name,
            "revision": source.revision,
            "bytes": _nbytes(source),
            "components": component_bytes(config, source.checkpoint().infos),
            "metadata": described(source.folder),
        },
        "versions": versions,
    }


def _nbytes(source: Source) -> int:
    """Bytes of all tensors of a checkpoint."""
    return source.checkpoint().nbytes


def _json(value: Any) -> str:
    return json.dumps(value, indent=2)
