"""The commands `verify` and `reproduce`: is it whole, and does it come out again."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llama4q.ranks import ALONE

from .jobs import drawn_tokens, job_of, run_report, shapes, told_what_stands
from .passes import Original, chosen_tokens
from .shared import as_text, budget_for, tell

if TYPE_CHECKING:
    from calibrate.run import Outcome


@click.command()
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
        click.echo(as_text({"checked": {one.what: one.count for one in checked}}))
        return
    for one in checked:
        click.echo(f"{one.what:15}{one.count:8,}  {one.how}")
    click.echo("OK")


@click.command()
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
    from llama4q.gpus import device_of
    from llama4q.hub import resolve
    from llama4q.machine import keep_freed_memory
    from llama4q.memory import Serving
    from llama4q.tokens import load_tokenizer

    finished = resolve(checkpoint, tell)
    before = recorded(finished.checkpoint())
    where = use_device(device or before.device)
    torch.set_num_threads(before.threads)
    original = resolve(source or before.source, tell)
    config, recipe = read_config(original.folder), before.recipe
    folder = into or Path(f"{finished.folder.absolute().name}-again")
    drawn = drawn_tokens(recipe.calibration, load_tokenizer(original.folder))
    plan = plan_for(original.checkpoint(), config, recipe, Texts(shapes(drawn.tokens)))
    held = check_memory(plan, budget_for(memory, where, ALONE), memory is not None)
    keep_freed_memory()
    read = Original(original, config, folder, before.dtype, where, held)
    drawn = chosen_tokens(read, drawn, recipe.calibration)
    check_tokens_alike(before, drawn.digest)
    job = job_of(original, folder, recipe, drawn, before.dtype, where)

    def report(outcome: Outcome) -> Mapping[str, Any]:
        fit = before.report["fit"]
        served = Serving(fit["context"])
        return run_report(job, drawn, config, device_of(fit["device"]), served, outcome)

    with Bar(plan.expected()) as bar, told_what_stands(folder, config.num_layers):
        again = run(job, Unobserved(), bar, report, held)
    found = result(finished.checkpoint(), before, job, again)
    click.echo(as_text(found.to_json()) if as_json else render(found))
    sys.exit(0 if found.same else 1)
