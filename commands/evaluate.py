"""The commands `eval` and `lm-eval`: what a checkpoint lost, or how it does on tasks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llama4q.errors import UserError

from .measuring import evaluation_options, questions_of, spool_for
from .shared import as_text, nbytes, provenance, tell

if TYPE_CHECKING:
    pass


@click.command("eval")
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
    from llama4q.tokens import check_same_tokens, load_tokenizer
    from llama4q.weights import LayerReader
    from llama4q.writer import to_json, write_atomically, writing

    where = use_device(device)
    original, other = resolve(against, tell), resolve(quantized, tell)
    configs = [read_config(side.folder) for side in (original, other)]  # refuses early
    readers = [
        LayerReader(side.checkpoint(where), config, DTYPES[dtype])
        for side, config in zip((original, other), configs, strict=True)
    ]
    check_same_tokens(original.folder, other.folder)
    questions = questions_of(load_tokenizer(original.folder), configs[0], **measured_on)
    spool = spool_for(configs[0], questions, memory, where)
    layers = readers[0].config.num_layers
    with tqdm(total=layers, unit="layer", dynamic_ncols=True, disable=None) as bar:
        evidence = compare(readers[0], readers[1], questions, bar.update, spool)
    report = {
        **provenance(original, configs[0]),
        "quantized": {
            "name": other.name,
            "bytes": nbytes(other),
            "components": component_bytes(configs[1], readers[1].checkpoint.infos),
        },
        "dtype": dtype,
        "evidence": evidence,
    }
    for path, content in ((out, to_json(report)), (html, page(report).encode())):
        if path is not None:
            with writing(path):
                write_atomically(path, content)
    click.echo(as_text(report) if as_json else render(report))


@click.command("lm-eval", context_settings={"ignore_unknown_options": True})
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
