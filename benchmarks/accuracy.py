"""What each part of the solver buys: divergence from the original at the same bytes.

    python -m benchmarks.accuracy [SOURCE] [--seeds 3] [--samples 64] [--length 1024]

Quantizes SOURCE (default: the pocket model) with plain rounding, with plain GPTQ, and with the
solver's parts added one by one, on the same calibration tokens, and measures all on the same
windows and needle prompts, in float32. A row is the mean over calibration seeds.
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

from calibrate.codes import GroupReport, Rescue
from calibrate.data import calibration_tokens
from calibrate.run import Job, Outcome, quantize
from evals.evaluation import Evaluation
from evals.questions import Questions, ask
from evals.tasks import Ladder
from llama4q.config import read_config
from llama4q.hub import resolve
from llama4q.recipe import Method, Recipe, Solver, load_recipe
from llama4q.source import folder_source
from llama4q.text import parse_source
from llama4q.tokens import load_tokenizer

PLAIN = Solver(
    damping=0.01, token_damping=0.0, act_order=False, scale_points=1, signed_scales=False, beams=1,
    shrinkage=False, weighting=False, routing_weight=0.0, correction=False,
)  # fmt: skip
ADDED: dict[str, dict[str, Any]] = {
    "GPTQ, plain": {},
    "+ act-order": {"act_order": True},
    "+ scale search": {"scale_points": 20},
    "+ damping 0.003": {"damping": 0.003},
    "+ damping by tokens": {"token_damping": 0.5},
    "+ shrinkage": {"shrinkage": True},
    "+ correction": {"correction": True},
    "+ signed scales": {"signed_scales": True},
    "+ 8 beams": {"beams": 8},
    "+ weighting": {"weighting": True},
    "+ routing weight (default)": {"routing_weight": Solver().routing_weight},
}
TAKEN: dict[str, dict[str, Any]] = {
    "- act-order": {"act_order": False},
    "- scale search": {"scale_points": 1},
    "- shrinkage": {"shrinkage": False},
    "- correction": {"correction": False},
    "- signed scales": {"signed_scales": False},
    "- beams": {"beams": 1},
    "4 beams": {"beams": 4},
    "- weighting": {"weighting": False},
    "- routing weight": {"routing_weight": 0.0},
    "- damping by tokens": {"token_damping": 0.0},
    "damping 0.001": {"damping": 0.001},
    "damping 0.01": {"damping": 0.01},
}


def steps() -> dict[str, tuple[str, Solver]]:
    """Rows of the table: recipe and solver settings."""
    found = {"int4 round to nearest": ("int4", Solver(method=Method.RTN))}
    solver = PLAIN
    for name, setting in ADDED.items():
        solver = dataclasses.replace(solver, **setting)
        found[f"int4 {name}"] = ("int4", solver)
    assert solver == Solver(), "the last step is the default"
    for name, setting in TAKEN.items():
        found[f"int4 {name}"] = ("int4", dataclasses.replace(Solver(), **setting))
    for recipe in ("int3", "int4-g64", "int4-g32", "int8", "fp8", "int4-fp8", "mixed"):
        found[f"{recipe} round to nearest"] = (recipe, Solver(method=Method.RTN))
        found[f"{recipe} (default)"] = (recipe, Solver())
    return found


class Silent:
    """A Progress for a table."""

    def start(self, groups: int) -> None:
        del groups

    def group(self, report: GroupReport) -> None:
        del report

    def rescue(self, rescue: Rescue) -> None:
        print(f"  rescue: {rescue.tensor}: {rescue.kind}: {rescue.detail}")

    def replayed(self, part: str, groups: int) -> None:
        del part, groups

    def layer(self, seconds: float | None) -> None:
        del seconds

    def phase(self, what: str) -> None:
        del what


def measure(source: Path, recipe: Recipe, drawn: Any, questions: Questions) -> dict[str, float]:
    """One run's figures."""
    evaluation = Evaluation(read_config(source), questions)
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

        found = quantize(job, evaluation, Silent(), report)
        seconds = time.perf_counter() - began
    likelihood, needles = found["evidence"]["likelihood"], found["evidence"]["retrieval"]
    return {
        "bytes": found["quantized_bytes"],
        "kl": likelihood["kl_mean"],
        "p99": likelihood["kl_p99"],
        "top1": likelihood["top1_agreement"],
        "routing": min(
            record["agreement"]
            for record in found["evidence"]["layers"]
            if record["agreement"] is not None
        ),
        "perplexity": likelihood["quantized"]["perplexity"],
        "original": likelihood["original"]["perplexity"],
        "needles": needles["quantized"],
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", nargs="?", default="pocket")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--only", help="rows whose name holds this")
    options = parser.parse_args()
    source = resolve(options.source).folder
    tokenizer = load_tokenizer(source)
    depths = [step / 10 for step in range(11)]
    questions = ask(tokenizer, None, 32, 1024, Ladder([512, 1024, 2048], depths, 1))
    print(
        f"{'':26} {'MB':>6} {'KL mean':>9} {'ratio':>6} {'KL p99':>8} {'top-1':>7} "
        f"{'routing':>8} {'perplexity':>11} {'needles':>8} {'seconds':>8}"
    )
    first = None
    for name, (recipe_name, solver) in steps().items():
        if options.only and options.only not in name:
            continue
        recipe = dataclasses.replace(load_recipe(recipe_name), solver=solver)
        runs = []
        for seed in range(1 if solver.method is Method.RTN else options.seeds):
            drawn = calibration_tokens(
                parse_source(None), tokenizer,
                samples=options.samples, length=options.length, seed=seed,
            )  # fmt: skip
            runs.append(measure(source, recipe, drawn, questions))
        mean = {key: sum(run[key] for run in runs) / len(runs) for key in runs[0]}
        first = first or mean["kl"]
        print(
            f"{name:26} {mean['bytes'] / 1e6:6.2f} {mean['kl']:9.5f} {mean['kl'] / first:6.2f} "
            f"{mean['p99']:8.4f} {mean['top1']:7.2%} {mean['routing']:8.2%} "
            f"{mean['perplexity']:11.3f} {mean['needles']:8.1%} {mean['seconds']:8.1f}",
            flush=True,
        )
    print(f"original perplexity {mean['original']:.3f}")


if __name__ == "__main__":
    main()
