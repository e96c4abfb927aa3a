"""Where the time of one matrix goes, at the true sizes of Scout, and what each part adds.

    python -m benchmarks.solver_parts [--tokens 4096] [--threads 2]

Random weights and correlated rows. Prints processor seconds of each part for gate and up
(5,120 -> 16,384) and for down (8,192 -> 5,120), and the ratio of the default to the same without
the correction: the limit is 2.
"""

from __future__ import annotations

import argparse
import functools
import resource
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from calibrate.gptq import choose_scales, factorize, solve
from calibrate.hessian import damping_for, joined, measure
from calibrate.outputs import solve_in_turn, turns
from calibrate.routing import output_metric, view
from calibrate.target import Moments, Pair, corrected
from llama4q.recipe import Solver
from llama4q.schemes import SCHEMES, QuantizedWeight, round_to_nearest

SHAPES = {"gate and up": (5120, 16384), "down": (8192, 5120)}
Item = TypeVar("Item")


def timed(parts: dict[str, float], name: str, work: Callable[[], Item]) -> Item:
    began = time.perf_counter()
    found = work()
    parts[name] = time.perf_counter() - began
    return found


def rows_of(tokens: int, inputs: int, outputs: int, down: bool) -> tuple[torch.Tensor, Pair]:
    """A weight and what reaches it; only down makes up for what the residual stream lacks."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(256, inputs, generator=generator)
    original = torch.randn(tokens, 256, generator=generator) @ mixing / 16
    original += torch.randn(tokens, inputs, generator=generator)
    served = original + 0.1 * torch.randn(tokens, inputs, generator=generator)
    lacking = (0.1 * torch.randn(tokens, outputs, generator=generator)).bfloat16()
    part = (torch.arange(tokens) // 64 % 2).to(torch.int8)
    weight = torch.randn(inputs, outputs, generator=generator) * inputs**-0.5
    return weight, Pair(served.bfloat16(), original.bfloat16(), lacking if down else None, part)


def moments(weight: torch.Tensor, pair: Pair, half: int) -> Moments:
    found = Moments(weight, lacking=pair.lacking is not None)
    found.add(pair.rows(torch.nonzero(pair.part == half).squeeze(1)))
    found.to_means(1.0)
    return found


def parts_of(inputs: int, outputs: int, tokens: int, down: bool) -> dict[str, float]:
    """Processor seconds by part."""
    solver, scheme = Solver(), SCHEMES["int4"]
    weight, pair = rows_of(tokens, inputs, outputs, down)
    parts: dict[str, float] = {}
    timed(parts, "round to nearest", lambda: round_to_nearest(weight, scheme))
    timed(parts, "Hessian alone", lambda: measure([pair.served], inputs))
    first, second = timed(
        parts, "Hessian and cross moments",
        lambda: (moments(weight, pair, 0), moments(weight, pair, 1)),
    )  # fmt: skip
    hessian = joined(first.hessian, second.hessian)
    damping = damping_for(hessian, solver.damping, solver.token_damping)
    factor = timed(parts, "factor", lambda: factorize(hessian.matrix, damping, True))
    assert factor is not None
    aim, _ = timed(
        parts, "correction", lambda: corrected(weight, (first, second), factor, lambda own: own)
    )
    scales = timed(
        parts, "scales", lambda: choose_scales(aim, factor.importance, scheme, 20, signed=True)
    )
    for beams in (1, 4, 8):
        found = timed(
            parts, f"codes, {beams} beams",
            functools.partial(solve, aim, factor, scales, scheme, beams),
        )  # fmt: skip
    assert found.dequantize().isfinite().all()

    def codes(part: torch.Tensor) -> QuantizedWeight:
        scales = choose_scales(part, factor.importance, scheme, 20, signed=True)
        return solve(part, factor, scales, scheme, solver.beams)

    if down:
        order = turns(metric_of(outputs))
        timed(parts, "by metric: scales and codes", lambda: solve_in_turn(aim, order, codes))
    return parts


def metric_of(width: int) -> torch.Tensor:
    """What 24 later routers of 16 experts see."""
    generator = torch.Generator().manual_seed(1)
    seen = {
        layer: view(torch.ones(width), torch.randn(width, 16, generator=generator))
        for layer in range(1, 25)
    }
    metric = output_metric(seen, 0, Solver().routing_weight)
    assert metric is not None
    return metric


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, (inputs, outputs) in SHAPES.items():
        parts = parts_of(inputs, outputs, options.tokens, name == "down")
        print(f"{name}, {inputs:,} -> {outputs:,}, {options.tokens:,} tokens")
        for part, seconds in parts.items():
            print(f"  {part:28} {seconds:7.1f} s")
        plain = parts["scales"] + parts["codes, 8 beams"]
        shared = parts["factor"] + parts.get("by metric: scales and codes", plain)
        default = parts["Hessian and cross moments"] + parts["correction"] + shared
        without = parts["Hessian alone"] + shared
        print(f"  default {default:.1f} s, without correction {without:.1f} s: ", end="")
        print(f"{default / without:.2f}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"peak resident memory {peak:.1f} GB")


if __name__ == "__main__":
    main()
