"""The commands `inspect` and `fit`: what a checkpoint is, and which GPUs hold it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from .shared import GPU, as_text

if TYPE_CHECKING:
    pass


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
    click.echo(as_text(found.to_json()) if as_json else found.render())
    sys.exit(0 if found.plan.fits else 1)
