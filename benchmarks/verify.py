"""Time and memory of `llama4q verify`, against plain SHA-256 of the same files.

    python -m benchmarks.verify FOLDER [--size 10GB]

Writes an INT4 checkpoint of random codes in layers of Scout's shapes into FOLDER, as many as come
nearest to the size, unless it is there already. Then all files are read by Python's own SHA-256 and
by the command, each in a process of its own, with the files dropped from the system's cache before.
Prints seconds, bytes a second and the peak of resident memory, and ends with 1 when the command
takes more than twice the time.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from benchmarks.make_giant import giant_config, shapes_of
from llama4q.checkpoint import TensorInfo
from llama4q.config import ModelConfig, parse_config
from llama4q.custody import REPORT
from llama4q.export import quantization_config, side_files
from llama4q.gpus import memory_bytes
from llama4q.hub import POCKET_MODEL
from llama4q.manifest import MANIFEST
from llama4q.recipe import load_recipe
from llama4q.verify import converted_tensors, kept_tensors
from llama4q.weights import layer_of
from llama4q.writer import CheckpointWriter, to_json

MODEL, VOCABULARY = "scout", 2048  # layers are what is large
RECIPE = load_recipe("int4")
MOST = 2.0  # times plain SHA-256
COMMAND = "import sys, cli; cli.main(['verify', sys.argv[1]])"
PLAIN = """
import hashlib, pathlib, sys
for path in pathlib.Path(sys.argv[1]).iterdir():
    with path.open("rb") as file:
        print(hashlib.file_digest(file, "sha256").hexdigest(), path.name)
"""


def kept(layers: int) -> dict[str, TensorInfo]:
    """The tensors of a model of so many layers that INT4 leaves alone."""
    raw = giant_config(MODEL, layers, vocab=VOCABULARY)
    infos = {
        name: TensorInfo("", shape, torch.bfloat16, start=0)
        for name, shape in shapes_of(raw).items()
    }
    return kept_tensors(infos, parse_config(raw, MODEL), RECIPE)


def expected(layers: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """All tensors of a quantized model of so many layers."""
    alone = {name: (info.dtype, info.shape) for name, info in kept(layers).items()}
    return alone | converted_tensors(config_of(layers), RECIPE)


def config_of(layers: int) -> ModelConfig:
    return parse_config(giant_config(MODEL, layers, vocab=VOCABULARY), MODEL)


def nbytes(layers: int) -> int:
    return sum(
        dtype.itemsize * torch.Size(shape).numel() for dtype, shape in expected(layers).values()
    )


def write(folder: Path, layers: int) -> None:
    """The checkpoint, with what `verify` asks for."""
    config, tensors = config_of(layers), expected(layers)

    def random(index: int | None) -> Iterator[tuple[str, torch.Tensor]]:
        for name, (dtype, shape) in tensors.items():
            if layer_of(config, name) == index:
                yield name, values(dtype, shape)

    units = [*range(layers), None]
    with CheckpointWriter(folder, {"layers": layers}) as writer:
        for index in units:
            writer.write(str(index), random(index), {})
        written, digests = writer.assemble(map(str, units))
        raw = giant_config(MODEL, layers, vocab=VOCABULARY)
        report = {
            "recipe": RECIPE.to_json(),
            "files": digests,
            "verified": {"untouched": len(kept(layers))},
        }
        quantization = quantization_config(RECIPE, config)
        side = side_files(POCKET_MODEL) | {
            REPORT: to_json(report),
            "config.json": to_json({**raw, "quantization_config": quantization}),
        }
        writer.publish(written, digests, side)


def values(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Codes as random bits, scales and all others in BF16 not far from 1."""
    if dtype.is_floating_point:
        return torch.rand(shape).add_(0.5).to(dtype)
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(dtype)


@dataclass(frozen=True)
class Took:
    """One process."""

    code: int
    seconds: float
    busy: float  # seconds of processors
    peak: int  # bytes


def took(program: str, folder: Path) -> Took:
    """A program of Python on a folder whose files lie on the disk alone."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", program, folder], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    busy = usage.ru_utime + usage.ru_stime
    return Took(os.waitstatus_to_exitcode(status), seconds, busy, 1024 * usage.ru_maxrss)


def told(named: Mapping[str, Took], size: int) -> Iterator[str]:
    for name, one in named.items():
        yield (
            f"{name:16}{one.seconds:8.1f} s{size / one.seconds / 1e9:8.2f} GB/s"
            f"{one.busy:8.1f} s of processors{one.peak / 1e9:8.2f} GB at its peak"
        )


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--size", default="10GB", show_default=True, help="About so many bytes.")
def main(folder: Path, size: str) -> None:
    """Write, read twice, compare."""
    if not (folder / MANIFEST).exists():
        wanted, outside = memory_bytes(size), 2 * nbytes(1) - nbytes(2)
        layers = max(1, round((wanted - outside) / (nbytes(1) - outside)))
        # in a process of its own: a child's peak counts what its parent held when it was started
        process = multiprocessing.Process(target=write, args=(folder, layers))
        process.start()
        process.join()
    total = sum(path.stat().st_size for path in folder.iterdir())
    largest = max(path.stat().st_size for path in folder.iterdir())
    print(f"{total / 1e9:.2f} GB, the largest file has {largest / 1e9:.2f} GB")
    found = {"plain SHA-256": took(PLAIN, folder), "llama4q verify": took(COMMAND, folder)}
    print("\n".join(told(found, total)))
    plain, ours = found.values()
    print(f"{ours.seconds / plain.seconds:.2f} times the time")
    if ours.code or plain.code or ours.seconds > MOST * plain.seconds:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
