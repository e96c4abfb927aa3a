"""The inner loops of the solver in C, compiled where they are first needed; on a GPU in Triton.

PyTorch does the same work (lookahead.py, gptq.py) one operation at a time, over and over through
memory: 10 times slower with 8 beams. It is what runs where there is no C compiler or no Triton
(kernel_triton.py), to the same codes but for sums that round differently; `description` says which
of them it is. A compiled kernel is kept in the user's cache, by everything that its bytes depend
on. Knows no models.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llama4q.device import HOST
from llama4q.schemes import FLOAT8_MAX, Kind, Scheme

if TYPE_CHECKING:
    from .kernel_triton import TritonKernel

SOURCE = Path(__file__).with_name("kernel.c")
OPTIONS = ("-O3", "-march=native", "-shared", "-fPIC")
WIDE = "-mprefer-vector-width=512"  # else compilers halve the vectors of AVX-512
MOST_BEAMS = 16  # beyond them a kernel takes long to compile and its beams leave the cache
MOST_ROWS = 128
LANES = 16  # outputs at a time


@dataclass(frozen=True)
class Kernel:
    """The loops for one grid and number of beams, in F32."""

    library: ctypes.CDLL
    least: float
    most: float

    def solve_block(
        self,
        wanted: torch.Tensor,
        target: torch.Tensor,
        steps: torch.Tensor,
        importance: torch.Tensor,
        correction: torch.Tensor,
    ) -> torch.Tensor:
        """lookahead.solve_block for `[B, O]`, B at most MOST_ROWS."""
        assert len(wanted) <= MOST_ROWS
        given = (wanted, target, steps, importance, correction)
        return self._in_parts(self.library.solve_block, given, len(wanted), wanted.shape)

    def scale_errors(
        self, weight: torch.Tensor, importance: torch.Tensor, scales: torch.Tensor
    ) -> torch.Tensor:
        """gptq.scale_errors: `[points, O]` for the `[group, O]` of one group."""
        given = (weight, importance, scales)
        sizes = (*weight.shape, len(scales))
        return self._in_parts(self.library.scale_errors, given, len(scales), sizes)

    def _in_parts(
        self,
        work: Callable[..., None],
        given: tuple[torch.Tensor, ...],
        rows: int,
        sizes: tuple[int, ...],
    ) -> torch.Tensor:
        """What `work` finds, `[rows, O]`, some outputs in each thread: ctypes frees the GIL."""
        outputs = sizes[1]
        found = torch.zeros(rows, outputs)
        tensors = [tensor.float().contiguous() for tensor in (*given, found)]
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
        numbers = [ctypes.c_long(size) for size in sizes]
        grid = (ctypes.c_float(self.least), ctypes.c_float(self.most))

        def run(part: range) -> None:
            work(*pointers, *numbers, ctypes.c_long(part.start), ctypes.c_long(part.stop), *grid)

        parts = _parts(outputs, torch.get_num_threads())
        if len(parts) == 1:
            run(parts[0])
        else:
            with ThreadPoolExecutor(len(parts)) as threads:
                list(threads.map(run, parts))
        return found


def _parts(outputs: int, count: int) -> list[range]:
    """All outputs in at most `count` parts of whole lanes."""
    width = -(-outputs // (count * LANES)) * LANES
    return [range(start, min(start + width, outputs)) for start in range(0, outputs, width)]


def kernel(scheme: Scheme, beams: int, device: torch.device) -> Kernel | TritonKernel | None:
    """None where PyTorch has to do the work: with many beams, uncompiled, without Triton."""
    if beams > MOST_BEAMS:
        return None
    float8 = scheme.kind is Kind.FLOAT8
    bounds = (-FLOAT8_MAX, FLOAT8_MAX) if float8 else (scheme.code_min, scheme.code_max)
    if device.type == "cuda":
        triton = _triton()
        return None if triton is None else triton(beams, float8, *map(float, bounds))
    library = _library(_compiler(), beams, float8)
    return Kernel(library, *bounds) if isinstance(library, ctypes.CDLL) else None


def description(beams: int, device: torch.device = HOST) -> str:
    """What runs the search on a device, for a report."""
    on_gpu = device.type == "cuda"
    name = "Triton kernel" if on_gpu else "C kernel"
    where = f" on {torch.cuda.get_device_name(device)}" if on_gpu else ""
    if beams > MOST_BEAMS:
        return f"PyTorch{where}, as the {name} takes at most {MOST_BEAMS} beams"
    if on_gpu:
        missing = "triton is not installed" if _triton() is None else None
    else:
        library = _library(_compiler(), beams, False)
        missing = library if isinstance(library, str) else None
    if missing is not None:
        return f"PyTorch{where}, as the {name} could not be had: {missing}"
    return f"{name}{where}"


def _triton() -> type[TritonKernel] | None:
    """PyTorch brings Triton along for most GPUs."""
    try:
        from .kernel_triton import TritonKernel
    except ImportError:
        return None
    return TritonKernel


def name_mask(beams: int) -> int:
    """The last bits of a cost, where a candidate's number goes: there are two for each beam."""
    return (1 << (2 * beams - 1).bit_length()) - 1


def _compiler() -> str:
    return os.environ.get("CC") or "cc"


@cache
def _library(compiler: str, beams: int, float8: bool) -> ctypes.CDLL | str:
    """Compiled, or why not in one line."""
    try:
        return ctypes.CDLL(str(compiled([*shlex.split(compiler), *defines(beams, float8)])))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
        return f"{compiler}: {lines[0]}"
    except OSError as error:
        return str(error)


def defines(beams: int, float8: bool) -> list[str]:
    """What kernel.c is compiled for."""
    values = {
        "BEAMS": beams,
        "NAME": name_mask(beams),
        "FLOAT8": int(float8),
        "MOST_ROWS": MOST_ROWS,
        "LANES": LANES,
        "SORT": _network(beams),
        "PICK": _tree(beams),
    }
    return [f"-D{name}={value}" for name, value in values.items()]


def compiled(command: list[str]) -> Path:
    """The shared library that a compiler and its defines make of kernel.c."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    command = [*command, *OPTIONS, *([WIDE] if x86 else [])]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llama4q"
    # The macros hold the compiler's version and every instruction set that the processor has.
    macros = _run([*command, "-dM", "-E", "-x", "c", os.devnull])
    key = hashlib.sha256("\0".join((*command, macros, SOURCE.read_text())).encode())
    file = folder / f"kernel-{key.hexdigest()[:32]}.so"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:  # another process may be at it, too
            made = Path(own) / file.name
            _run([*command, str(SOURCE), "-o", str(made), "-lm"])
            made.replace(file)
    return file


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _network(count: int) -> str:
    """Exchanges that sort `count` keys, as calls: merge exchange, Knuth 5.2.2 algorithm M."""
    top = 1 << max(0, (count - 1).bit_length() - 1)
    calls = []
    gap = top
    while gap and count > 1:
        half, rest, distance = top, 0, gap
        while True:
            calls += [
                f"EXCHANGE({low},{low + distance})"
                for low in range(count - distance)
                if low & gap == rest
            ]
            if half == gap:
                break
            distance, half, rest = half - gap, half // 2, gap
        gap //= 2
    return " ".join(calls)


def _tree(count: int) -> str:
    """Selections that leave the one of `count` items that a number names in the first place."""
    calls = []
    for bit in range((count - 1).bit_length()):
        step = 1 << bit
        calls += [f"SELECT({one},{one + step},{bit})" for one in range(0, count - step, 2 * step)]
    return " ".join(calls)
