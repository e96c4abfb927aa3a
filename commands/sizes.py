"""The commands `inspect` and `fit`: what a checkpoint is, and which GPUs hold it."""

from __future__ import annotations

import sys

import click

from .goal import Engine, engine_options
from .shared import GPU, as_text


@click.command()
@click.argument("source", default="pocket")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(source: str, as_json: bool) -> None:
    """Show the architecture of SOURCE and where its bytes are. Reads headers, no tensor."""
    from llama4q.hub import resolve_remote
    from llama4q.inspect import inspect_checkpoint, render_summary

    summary = inspect_checkpoint(resolve_remote(source))
    click.echo(as_text(summary.to_json()) if as_json else render_summary(summary))


@click.command()
@click.argument("checkpoint")
@click.option(
    "--recipe", "-r", metavar="NAME|FILE",
    help="CHECKPOINT is an original: plan what this recipe would make of it.",
)  # fmt: skip
@click.option("--gpu", default=GPU, show_default=True, help="A known device.")
@click.option("--gpu-memory", metavar="SIZE", help="Of any other device, as 80GB or 80GiB.")
@click.option("--context", default=8192, show_default=True, help="Tokens of one request.")
@engine_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def fit(
    checkpoint: str,
    recipe: str | None,
    gpu: str,
    gpu_memory: str | None,
    context: int,
    engine: Engine,
    as_json: bool,
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

    device = Device(gpu_memory, memory_bytes(gpu_memory)) if gpu_memory else find_device(gpu)
    source = opened(checkpoint)
    serving = engine.serving(context, stored_kv_dtype(source, recipe))
    found = answer(source, recipe, device, serving)
    click.echo(as_text(found.to_json()) if as_json else found.render())
    sys.exit(0 if found.plan.fits else 1)
