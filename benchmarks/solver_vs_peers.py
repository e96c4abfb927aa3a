"""What the solver alone costs and what it loses, against those of the peers, at true sizes.

    python benchmarks/peers/setup.py llmcompressor gptqmodel
    python -m benchmarks.solver_vs_peers [--scale 4] [--peers .peers]

The same weight and the same Hessian for all, INT4 in groups of 128, everybody in one thread and at
the defaults: scales and codes, without the Hessian. Gate and up are one weight, which spares the
peers a factorisation that their pipelines do. The Hessian has outlier channels and correlations.
Prints processor seconds and the loss tr(R^T H R) relative to llm-compressor's. `--scale` divides
all sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

from calibrate.gptq import choose_scales, factorize, solve
from calibrate.kernel import description
from llama4q.products import add_square, mirror
from llama4q.recipe import Solver
from llama4q.schemes import SCHEMES

SHAPES = {"gate and up": (5120, 16384), "down": (8192, 5120)}
WORKER = Path(__file__).parent / "peers" / "solver_worker.py"
NO_COMPILER = "no-such-compiler"


@dataclass(frozen=True)
class Contestant:
    """Who solves, and with what."""

    name: str
    peer: str | None = None  # the worker's name of it; None: llama4q
    beams: int = 1
    compiler: str = "cc"


CONTESTANTS = (
    Contestant("llm-compressor", "llmcompressor"),
    Contestant("llm-compressor, MSE scales", "llmcompressor-mse"),
    Contestant("GPTQModel", "gptqmodel"),
    Contestant("llama4q, 1 beam"),
    Contestant("llama4q, 8 beams", beams=8),
    Contestant("llama4q, 1 beam, no compiler", compiler=NO_COMPILER),
    Contestant("llama4q, 8 beams, no compiler", beams=8, compiler=NO_COMPILER),
)


def problem(inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight `[I, O]` of BF16 values, and moments of rows with strong directions and outliers."""
    generator = torch.Generator().manual_seed(0)
    size = torch.exp(0.7 * torch.randn(inputs, generator=generator))
    size[torch.randperm(inputs, generator=generator)[: max(1, inputs // 200)]] *= 12
    shared = torch.randn(inputs // 16, inputs, generator=generator) / 4
    own = torch.randn(2 * inputs, inputs, generator=generator)
    hessian = torch.zeros(inputs, inputs)
    for rows in (shared, own / len(own) ** 0.5):
        add_square(hessian, rows)
    mirror(hessian)
    weight = 0.02 * torch.randn(inputs, outputs, generator=generator)
    return weight.bfloat16().float(), hessian * size * size[:, None]


def ours(folder: Path, beams: int) -> None:
    """What the workers of the peers do, for llama4q's defaults."""
    torch.set_num_threads(1)
    weight = torch.from_numpy(numpy.load(folder / "weight.npy"))
    hessian = torch.from_numpy(numpy.load(folder / "hessian.npy"))
    settings, scheme = Solver(), SCHEMES["int4"]
    description(beams)  # compiles and loads
    began = time.process_time()
    factor = factorize(hessian, settings.damping, settings.act_order)
    assert factor is not None
    scales = choose_scales(
        weight, factor.importance, scheme, settings.scale_points, settings.signed_scales
    )
    found = solve(weight, factor, scales, scheme, beams)
    seconds = time.process_time() - began
    numpy.save(folder / "found.npy", found.dequantize().numpy())
    (folder / "seconds.json").write_text(json.dumps(seconds))


def run(contestant: Contestant, folder: Path, peers: Path) -> float:
    """Processor seconds; the weight that was found is in the folder."""
    if contestant.peer is None:
        command = [sys.executable, "-m", "benchmarks.solver_vs_peers", "--ours", str(folder)]
        command += ["--beams", str(contestant.beams)]
        place = Path.cwd()
    else:
        environment = contestant.peer.partition("-")[0]
        python = (peers / environment / "bin" / "python").absolute()
        command = [str(python), str(WORKER.absolute()), contestant.peer, str(folder)]
        place = folder  # GPTQModel leaves its logs where it runs
    variables = os.environ | {"OMP_NUM_THREADS": "1", "CC": contestant.compiler}
    done = subprocess.run(command, cwd=place, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{contestant.name}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    seconds: float = json.loads((folder / "seconds.json").read_text())
    return seconds


def loss(weight: torch.Tensor, hessian: torch.Tensor, folder: Path) -> float:
    """tr(R^T H R)."""
    residual = weight - torch.from_numpy(numpy.load(folder / "found.npy"))
    return float((residual * (hessian @ residual)).sum())


def compare(inputs: int, outputs: int, peers: Path, folder: Path) -> dict[str, tuple[float, float]]:
    """Processor seconds and loss by contestant."""
    weight, hessian = problem(inputs, outputs)
    numpy.save(folder / "weight.npy", weight.numpy())
    numpy.save(folder / "hessian.npy", hessian.numpy())
    found = {}
    for contestant in CONTESTANTS:
        seconds = run(contestant, folder, peers)
        found[contestant.name] = seconds, loss(weight, hessian, folder)
        print(f"  {contestant.name}: {seconds:.2f} s", file=sys.stderr, flush=True)
    return found


def print_table(results: dict[str, dict[str, tuple[float, float]]]) -> None:
    columns = [f"{name}: CPU s | loss" for name in results]
    print("| | " + " | ".join([*columns, "together: CPU s", "of llm-compressor's"]) + " |")
    print("|---" * (2 * len(results) + 3) + "|")
    first = CONTESTANTS[0].name
    sums = {one.name: sum(found[one.name][0] for found in results.values()) for one in CONTESTANTS}
    for name, whole in sums.items():
        cells = []
        for found in results.values():
            seconds, lost = found[name]
            cells += [f"{seconds:.1f}", f"{lost / found[first][1]:.3f}"]
        cells += [f"{whole:.1f}", f"{whole / sums[first]:.2f}"]
        print(f"| {name} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scale", type=int, default=1, choices=(1, 2, 4, 8))  # whole groups
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="default: %(default)s")
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--beams", type=int, default=8, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ours:
        ours(options.ours, options.beams)
        return
    results = {}
    for name, (inputs, outputs) in SHAPES.items():
        sizes = inputs // options.scale, outputs // options.scale
        print(f"{name}, {sizes[0]:,} -> {sizes[1]:,}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            results[name] = compare(*sizes, options.peers, Path(folder))
    print_table(results)


if __name__ == "__main__":
    main()
