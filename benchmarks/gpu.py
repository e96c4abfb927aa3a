"""One Scout layer's experts on a GPU, phase by phase, and the solver's paths side by side.

    python -m benchmarks.gpu [--device cuda] [--experts 16] [--tokens 65536] [--beams 8]

Random weights and correlated rows of true sizes, INT4 in groups of 128, all defaults on. Prints for
each phase seconds, amounts as the plan counts them (calibrate/work.py), amounts a second, and the
share of what the device reaches on one large product; then the loss that the solver leaves on one
piece: by the device's own kernel, by PyTorch on the device, and on the CPU, which should be equal;
last the peaks of memory. Runs on the CPU, too, with --device cpu and smaller sizes.
"""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar
from unittest import mock

import click
import torch

from calibrate import work
from calibrate.gptq import Factor, choose_scales, factorize, relative_error, solve
from calibrate.hessian import damping_for, joined, measure
from calibrate.judge import MOST_TOKENS, Judge
from calibrate.kernel import description
from calibrate.outputs import Turn, solve_in_turn, turns
from calibrate.routing import output_metric, view
from calibrate.target import HALVES, HELD_OUT, Moments, Pair, corrected
from llama4q.device import HOST, use_device
from llama4q.machine import best_rate
from llama4q.model import Linear, Mlp
from llama4q.packing import pack
from llama4q.products import add_product
from llama4q.recipe import Solver
from llama4q.schemes import SCHEMES, QuantizedWeight

SCHEME = SCHEMES["int4"]
LATER = 24  # layers whose routers look at what this one adds
PIECE = (1024, 512)  # of a weight, on which the paths are compared
Item = TypeVar("Item")


class Watch:
    """Seconds and amounts by phase; waits for the device before and after."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.amounts: dict[str, int] = defaultdict(int)

    def time(self, phase: str, amount: int, task: Callable[[], Item]) -> Item:
        self._wait()
        began = time.perf_counter()
        found = task()
        self._wait()
        self.seconds[phase] += time.perf_counter() - began
        self.amounts[phase] += amount
        return found

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def random(*shape: int, seed: int, device: torch.device) -> torch.Tensor:
    """The same values on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def a_pair(tokens: int, inputs: int, seed: int, device: torch.device) -> Pair:
    """Correlated rows of both streams, a sixteenth of them held out."""
    mixing = random(64, inputs, seed=0, device=device)
    original = random(tokens, 64, seed=seed, device=device) @ mixing / 8
    original += random(tokens, inputs, seed=seed + 1, device=device)
    served = original + 0.1 * random(tokens, inputs, seed=seed + 2, device=device)
    numbers = torch.arange(tokens)
    part = torch.where(numbers % 16 == 15, HELD_OUT, numbers // 64 % 2).to(torch.int8)
    return Pair(served.bfloat16(), original.bfloat16(), None, part)


def rows_of(pair: Pair, half: int) -> Pair:
    return pair.rows(torch.nonzero(pair.part == half).squeeze(1))


def one_expert(
    watch: Watch, before: Pair, size: int, seed: int, solver: Solver, order: list[Turn]
) -> None:
    """Random weights on rows that reach it; what the stream lacks is some of their size."""
    device = watch.device
    tokens, width = before.served.shape
    gate_up = random(width, 2 * size, seed=seed, device=device).mul_(width**-0.5).bfloat16()
    down = random(size, width, seed=seed + 1, device=device).mul_(size**-0.5).bfloat16()
    original = Mlp(Linear(gate_up), Linear(down))
    codes = one_weight(watch, "gate_up", gate_up, before, solver, None)
    served = Mlp(Linear(codes.dequantize().bfloat16()), Linear(down))
    half = work.product(tokens, width, 2 * size)
    hidden = watch.time("forward", 2 * half, lambda: (
        served.hidden(before.served), original.hidden(before.original)
    ))  # fmt: skip
    behind = Pair(*hidden, before.original.float() - before.served.float(), before.part)
    codes = one_weight(watch, "down", down, behind, solver, order)
    last = Linear(codes.dequantize().bfloat16())
    full = work.product(tokens, size, width)
    watch.time("forward", 2 * full, lambda: (last(behind.served), original.down(behind.original)))


def one_weight(
    watch: Watch,
    name: str,
    weight: torch.Tensor,
    pair: Pair,
    solver: Solver,
    order: list[Turn] | None,
) -> QuantizedWeight:
    """Its codes, found as calibrate/codes.py finds them."""
    inputs, outputs = weight.shape
    exact, lacking = weight.float(), pair.lacking is not None
    halves = [rows_of(pair, half) for half in HALVES]

    def gathered() -> tuple[Moments, Moments]:
        found = Moments(exact, lacking), Moments(exact, lacking)
        for moments, half in zip(found, halves, strict=True):
            moments.add(half)
            moments.to_means(1.0)
        return found

    rows = sum(len(half.part) for half in halves)
    moments = watch.time("moments", work.moments(rows, inputs, outputs, lacking, True), gathered)
    hessian = joined(moments[0].hessian, moments[1].hessian)
    damping = damping_for(hessian, solver.damping, solver.token_damping)
    factor = watch.time(
        "factor", work.factor(inputs), lambda: factorize(hessian.matrix, damping, True)
    )
    assert factor is not None
    crossed = work.correction(inputs, outputs, lacking) + len(HALVES) * work.factor(inputs)
    aim, _ = watch.time(
        "correction", crossed, lambda: corrected(exact, moments, factor, lambda own: own)
    )

    def codes(part: torch.Tensor) -> QuantizedWeight:
        scales = watch.time(
            f"scales, {name}", part.numel() * solver.scale_points,
            lambda: choose_scales(part, factor.importance, SCHEME, solver.scale_points, True),
        )  # fmt: skip
        return watch.time(
            f"codes, {name}", part.numel() * solver.beams,
            lambda: solve(part, factor, scales, SCHEME, solver.beams),
        )  # fmt: skip

    found = codes(aim) if order is None else solve_in_turn(aim, order, codes)
    judge = rows_of(pair, HELD_OUT).rows(torch.arange(min(MOST_TOKENS, len(pair.part) // 16)))
    watch.time(
        "judge", 2 * work.product(len(judge.part), inputs, outputs),
        lambda: Judge(exact, judge, None).error(aim, found),
    )  # fmt: skip
    watch.time("pack, to the host", weight.numel(), lambda: list(pack("weight", found)))
    return found


def metric_of(width: int, device: torch.device) -> list[Turn]:
    seen = {
        layer: view(torch.ones(width, device=device), random(width, 16, seed=layer, device=device))
        for layer in range(1, LATER + 1)
    }
    metric = output_metric(seen, 0, Solver().routing_weight)
    assert metric is not None
    return turns(metric)


def ceiling(size: int, device: torch.device) -> float:
    """FLOP/s of the fastest kind of product."""
    f32 = random(size, size, seed=0, device=device)
    bf16, total, flops = f32.bfloat16(), torch.zeros_like(f32), 2 * size**3
    kinds = (lambda: f32 @ f32, lambda: bf16 @ bf16, lambda: add_product(total, bf16, bf16))
    return max(best_rate(kind, flops, device) for kind in kinds)


@contextmanager
def in_pytorch() -> Iterator[None]:
    """Inside, no compiled kernel is taken."""
    with (
        mock.patch("calibrate.gptq.kernel", return_value=None),
        mock.patch("calibrate.lookahead.kernel", return_value=None),
    ):
        yield


def paths(device: torch.device, solver: Solver) -> Iterator[tuple[str, float, float]]:
    """Which path of the solver, its seconds, and the loss that it leaves on the same piece."""
    inputs, outputs = PIECE
    pair = a_pair(4 * inputs, inputs, 5, HOST)
    weight = random(inputs, outputs, seed=6, device=HOST)
    hessian = measure([pair.served], inputs).matrix
    factor = factorize(hessian, solver.damping, True)
    assert factor is not None

    def solved(where: torch.device) -> tuple[float, float]:
        watch = Watch(where)
        moved = Factor(
            factor.order.to(where), factor.correction.to(where), factor.rounded.to(where),
            factor.importance.to(where), factor.damping, factor.attempts,
        )  # fmt: skip
        there = weight.to(where)

        def codes() -> QuantizedWeight:
            scales = choose_scales(there, moved.importance, SCHEME, solver.scale_points, True)
            return solve(there, moved, scales, SCHEME, solver.beams)

        codes()  # compiles
        found = watch.time("", 0, codes).dequantize().to(HOST)
        return watch.seconds[""], relative_error(weight, found, hessian)

    yield (description(solver.beams, device), *solved(device))
    with in_pytorch():
        yield (f"PyTorch on {device}", *solved(device))
    yield (f"{description(solver.beams)} on the CPU", *solved(HOST))


@click.command()
@click.option("--device", "name")
@click.option("--experts", default=16, show_default=True)
@click.option("--tokens", default=65536, show_default=True, help="Of each expert.")
@click.option("--width", default=5120, show_default=True)
@click.option("--size", default=8192, show_default=True)
@click.option("--beams", default=Solver().beams, show_default=True)
@torch.inference_mode()
def main(name: str | None, experts: int, tokens: int, width: int, size: int, beams: int) -> None:
    """Print three tables."""
    device, solver = use_device(name), Solver(beams=beams)
    best = ceiling(min(size, 8192), device)
    order = metric_of(width, device)
    rows = a_pair(tokens, width, 1, device)
    one_expert(Watch(device), rows, size, 100, solver, order)  # compiles
    watch = Watch(device)
    for number in range(experts):
        one_expert(watch, rows, size, 2 * number, solver, order)
    print(f"{experts} experts, {tokens:,} tokens each, {width:,} -> {size:,}, on {device}")
    print(f"one large product: {best:.2e} FLOP/s")
    print(f"{'':20}{'seconds':>10}{'amount':>10}{'a second':>10}{'of ceiling':>12}")
    for phase, seconds in watch.seconds.items():
        amount = watch.amounts[phase]
        line = f"{phase:20}{seconds:10.3f}{amount:10.2e}{amount / seconds:10.2e}"
        counts_flops = not phase.startswith(("scales", "codes", "pack"))
        print(line + (f"{amount / seconds / best:12.0%}" if counts_flops else ""))
    print(f"{'all':20}{sum(watch.seconds.values()):10.3f}")
    print(f"\none piece {PIECE[0]:,} x {PIECE[1]:,}, {beams} beams")
    for path, seconds, loss in paths(device, solver):
        print(f"{path:50}{seconds:10.4f} s   loss {loss:.6f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"\npeak of the host {peak:.2f} GB", end="")
    if device.type == "cuda":
        print(f", of the GPU {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB", end="")
    print()


if __name__ == "__main__":
    main()
