"""How an evaluation grows with the length of its text: time by kind of layer, and memory.

    python -m benchmarks.long_context ORIGINAL QUANTIZED [--lengths 8192,32768,131072]
        [--memory 18GB]

Both are best made from benchmarks/make_giant.py `--model scout --layers 2 --first-layer 2`, a local
layer and a global one, and `llama4q quantize`. For each length both models read one window of
random tokens in a process of its own. Prints a Markdown table: seconds of each layer for a thousand
tokens, seconds of the predictions, and the peak of resident memory.
"""

from __future__ import annotations

import itertools
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import click
import torch

from evals.evaluation import compare
from evals.footprint import held
from evals.questions import Questions
from llama4q.checkpoint import Checkpoint
from llama4q.config import read_config
from llama4q.hidden import Spool
from llama4q.machine import parse_memory
from llama4q.weights import LayerReader

RUN = "from benchmarks.long_context import measured; measured()"


def measured() -> None:
    """One length, in this process; what was found goes to stdout as JSON."""
    original, quantized, length, memory = sys.argv[1:]
    config = read_config(Path(original))
    readers = [
        LayerReader(Checkpoint(Path(folder)), read_config(Path(folder)), torch.bfloat16)
        for folder in (original, quantized)
    ]
    generator = torch.Generator().manual_seed(0)
    window = torch.randint(0, 2_000, (1, int(length)), generator=generator)
    questions = Questions(window, "", [], 0, lambda ids: " ".join(map(str, ids)))
    spool = Spool(parse_memory(memory).host - held(config, questions))
    moments = [time.perf_counter()]
    compare(readers[0], readers[1], questions, lambda: moments.append(time.perf_counter()), spool)
    moments.append(time.perf_counter())
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    taken = [after - before for before, after in itertools.pairwise(moments)]
    print(json.dumps({"seconds": taken, "peak": peak, "spilled": spool.spilled}))


@click.command()
@click.argument("original", type=click.Path(exists=True, path_type=Path))
@click.argument("quantized", type=click.Path(exists=True, path_type=Path))
@click.option("--lengths", default="8192,32768,131072", show_default=True)
@click.option("--memory", default="18GB", show_default=True)
def main(original: Path, quantized: Path, lengths: str, memory: str) -> None:
    """Measure one length after the other, and print the table."""
    config = read_config(original)
    kinds = [
        "local" if index in config.chunked_layers else "global"
        for index in range(config.num_layers)
    ]
    columns = [f"layer {index}, {kind}, s / 1,000 tokens" for index, kind in enumerate(kinds)]
    print(f"| tokens | {' | '.join(columns)} | predictions, s | in all, s | peak | in files |")
    print("|" + "---|" * (len(columns) + 5))
    for length in (int(part) for part in lengths.split(",")):
        found = json.loads(
            subprocess.run(
                [sys.executable, "-c", RUN, str(original), str(quantized), str(length), memory],
                check=True, stdout=subprocess.PIPE,
            ).stdout
        )  # fmt: skip
        *layers, predictions = found["seconds"]
        each = " | ".join(f"{1000 * seconds / length:.2f}" for seconds in layers)
        print(
            f"| {length:,} | {each} | {predictions:.0f} | {sum(found['seconds']):.0f} "
            f"| {found['peak'] / 1e9:.1f} GB | {found['spilled'] / 1e9:.1f} GB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
