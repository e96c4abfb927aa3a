"""What calibration text buys: divergence against the tokens, their length and their mix.

    python -m benchmarks.calibration [SOURCE] [--other FILE] [--mix TEXT ...] [--rows 8x512,...]

Quantizes SOURCE (default: the pocket model) once for each mix, size and seed, and measures the KL
on two fixed texts in the same run, in float32: A is the shipped text's held-out part, B any other
kind of text, named with --other and not to be calibrated on. A row is the mean over calibration
seeds; one that the text is too short for is left out by name. `poor` counts experts that saw fewer
tokens than their widest matrix has inputs.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.accuracy import Silent
from calibrate.coverage import coverage
from calibrate.data import CalibrationSet, calibration_tokens
from calibrate.mix import parse_mix
from calibrate.run import Job, Outcome, quantize
from evals.evaluation import Evaluation
from evals.questions import Questions, ask
from evals.tasks import Ladder
from llama4q.config import read_config
from llama4q.errors import UserError
from llama4q.hidden import Spool
from llama4q.hub import resolve
from llama4q.model import DecoderLayer, Head
from llama4q.recipe import Recipe, adjusted, load_recipe
from llama4q.source import folder_source
from llama4q.tokens import load_tokenizer

ROWS = "8x512,16x1024,64x512,64x1024,128x1024,32x4096,128x2048,256x2048"
MIXES = ("pocket", "pocket:0.5,pocket:0.5x4096")


class Several:
    """A LayerObserver that is several evaluations, each on a text of its own."""

    def __init__(self, evaluations: Mapping[str, Evaluation]) -> None:
        self.evaluations = evaluations
        self.key = " ".join(evaluation.key for evaluation in evaluations.values())

    def start(self, embedding: torch.Tensor, spool: Spool) -> None:
        for evaluation in self.evaluations.values():
            evaluation.start(embedding, spool)

    def layer(self, original: DecoderLayer, quantized: DecoderLayer) -> None:
        for evaluation in self.evaluations.values():
            evaluation.layer(original, quantized)

    def finish(self, original: Head, quantized: Head) -> dict[str, Any]:
        return {
            name: evaluation.finish(original, quantized)
            for name, evaluation in self.evaluations.items()
        }


def measure(
    source: Path, recipe: Recipe, drawn: CalibrationSet, texts: Mapping[str, Questions]
) -> dict[str, float]:
    """One run's figures: the KL on each text, poor experts, seconds."""
    config = read_config(source)
    observer = Several({name: Evaluation(config, asked) for name, asked in texts.items()})
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            folder_source(source),
            Path(folder) / "out",
            recipe,
            drawn.tokens,
            drawn.digest,
            torch.float32,
        )
        began = time.perf_counter()

        def report(outcome: Outcome) -> Mapping[str, Any]:
            return dataclasses.asdict(outcome)

        found = quantize(job, observer, Silent(), report)
        seconds = time.perf_counter() - began
    covered = coverage(recipe, config, found["layers"])
    figures = {"seconds": seconds, "poor": 0.0}
    if covered is not None:
        figures["poor"] = sum(len(entry["experts"]) for entry in covered["poor"])
    for name, evidence in found["evidence"].items():
        figures[name] = evidence["likelihood"]["kl_mean"]
        figures[f"{name} error"] = evidence["likelihood"]["kl_standard_error"]
    return figures


def row(
    source: Path,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    seeds: int,
    texts: Mapping[str, Questions],
) -> tuple[CalibrationSet, dict[str, float]]:
    """The last seed's tokens and the mean figures. Raises UserError where the text is too short."""
    size = recipe.calibration
    runs = []
    for seed in range(seeds):
        drawn = calibration_tokens(
            parse_mix(size.text), tokenizer, samples=size.samples, length=size.length, seed=seed
        )
        runs.append(measure(source, recipe, drawn, texts))
    return drawn, {key: sum(run[key] for run in runs) / seeds for key in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", nargs="?", default="pocket")
    parser.add_argument("--other", help="another kind of text to measure on")
    parser.add_argument("--mix", action="append", help=f"as --calibration; {' and '.join(MIXES)}")
    parser.add_argument("--rows", default=ROWS, help="samples x length; %(default)s")
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--windows", type=int, default=32, help="of 1,024 tokens, of each text")
    options = parser.parse_args()
    source = resolve(options.source).folder
    tokenizer = load_tokenizer(source)
    named = {"A": None, "B": options.other} if options.other else {"A": None}
    texts = {
        name: ask(tokenizer, text, options.windows, 1024, Ladder([], [], 1))
        for name, text in named.items()
    }
    columns = "".join(f" {f'KL on {name}':>9} {'error':>8} {'ratio':>6}" for name in texts)
    print(f"{'mix':34} {'asked':>9} {'tokens':>8} {'sequences':>16} {'poor':>5}{columns} {'s':>7}")
    first: dict[str, float] = {}
    for mix in options.mix or MIXES:
        for size in options.rows.split(","):
            samples, length = (int(number) for number in size.split("x"))
            recipe = adjusted(load_recipe(options.recipe), text=mix, samples=samples, length=length)
            try:
                drawn, mean = row(source, tokenizer, recipe, options.seeds, texts)
            except UserError as error:
                print(f"{mix:34} {size:>9} left out: {error}", flush=True)
                continue
            first = first or mean
            tokens = sum(batch.numel() for batch in drawn.tokens)
            shapes = "+".join("x".join(map(str, batch.shape)) for batch in drawn.tokens)
            figures = "".join(
                f" {mean[name]:9.5f} {mean[f'{name} error']:8.5f} {mean[name] / first[name]:6.2f}"
                for name in texts
            )
            print(
                f"{mix:34} {size:>9} {tokens:8,} {shapes:>16} {mean['poor']:5.0f}{figures} "
                f"{mean['seconds']:7.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
