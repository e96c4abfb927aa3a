"""What this machine has, and how fast it is: memory that a run may use, and rates of small pieces.

Rates are the best of a few repetitions, as a ceiling is meant: what the machine does when nobody
disturbs it. Knows nothing of models or of what is computed.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .device import HOST
from .errors import UserError
from .gpus import memory_bytes
from .products import add_product, add_rough_product

SECONDS = 0.1  # each rate is measured for about so long
HOST_SIZE, DEVICE_SIZE = 2048, 8192  # of square matrices: a GPU is not filled by small ones
COPIED_BYTES = 2**27  # more than caches hold
PIECE_BYTES = 2**26  # read and written to measure a disk
CHUNK_BYTES = 2**23  # of one read or write
MMAP_THRESHOLD, TRIM_THRESHOLD, LARGEST_INT = -3, -1, 2**31 - 1  # of mallopt
LEAST_BUDGET = 2**20  # a smaller plain number has lost its unit


@dataclass(frozen=True)
class Budget:
    """Bytes that a run may use on the host and on its GPU; None: it has none."""

    host: int
    device: int | None = None


@dataclass(frozen=True)
class Memory:
    """What a run may hold, in bytes."""

    rows: float = float("inf")  # of tokens: hidden states, and what lies between two passes
    on_device: float = 0  # the same, on the GPU
    most: float = float("inf")  # resident, before freed memory goes back to the system


UNBOUNDED = Memory()


def parse_memory(text: str) -> Budget:
    """ "16GB,70GB" as host and device, "16GB" as host alone; units as in 16GB, 16GiB or 16e9.

    Raises UserError for anything else.
    """
    sizes = [_size(part) for part in text.split(",")]
    if len(sizes) > 2:
        raise UserError(f"memory {text!r}: give HOST or HOST,DEVICE, as in 16GB,70GB")
    return Budget(*sizes)


def _size(text: str) -> int:
    try:
        plain = float(text)
    except ValueError:
        return memory_bytes(text)
    return int(plain) if LEAST_BUDGET <= plain < math.inf else memory_bytes(text)


# --- memory ---


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that a run may use on the host: what is free, within the limits of its cgroups.

    Pages of files count as free where the kernel can drop them. `root` holds proc and sys. Raises
    UserError where there is no /proc/meminfo, so outside of Linux.
    """
    try:
        meminfo = (root / "proc/meminfo").read_text()
    except OSError:
        raise UserError(
            "free memory can only be told on Linux; name what a run may use: --memory 16GB"
        ) from None
    fields = (line.split() for line in meminfo.splitlines())
    available = next(int(field[1]) * 1024 for field in fields if field[0] == "MemAvailable:")
    return max(0, min([available, *_left_in_cgroups(root)]))


def _left_in_cgroups(root: Path) -> Iterator[int]:
    """What each cgroup above this process, of version 1 or 2, leaves of its limits.

    /proc/self/cgroup may name a path from outside of a container: then only those above it exist
    here, down to the mount itself, whose limit is the container's.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        inside = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(inside) + 1):
            yield from _left(mount.joinpath(*inside[:depth]))


def _left(group: Path) -> Iterator[int]:
    """What one cgroup leaves of each limit that it has."""
    for limits, usage, prefix in (
        (("memory.max", "memory.high"), "memory.current", ""),  # version 2
        (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_"),  # version 1
    ):
        for name in limits:
            limit, used = _number(group / name), _number(group / usage)
            if limit is not None and used is not None:
                yield limit - used + _reclaimable(group, prefix)


def _number(path: Path) -> int | None:
    """What a file of the kernel says; None where it is missing or says "max"."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _reclaimable(group: Path, prefix: str) -> int:
    """Bytes of file pages, children's too: they count as used, but the kernel drops them first."""
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    names = (f"{prefix}inactive_file", f"{prefix}active_file")
    return sum(int(line.split()[1]) for line in lines if line.split()[0] in names)


def keep_freed_memory() -> None:
    """Let the C library keep large blocks that are freed for those that follow.

    glibc takes each one from the system and returns it, and to touch fresh pages for the first time
    takes as long as to compute what they hold: the solver took 1.7 times as long, in a virtual
    machine. Other C libraries have no such option.
    """
    option = getattr(_c_library(), "mallopt", None)
    if option is not None:
        option(MMAP_THRESHOLD, LARGEST_INT)
        option(TRIM_THRESHOLD, LARGEST_INT)


def give_back_memory(beyond: float) -> None:
    """Return what has been freed to the system, when more than `beyond` bytes are resident."""
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None and resident_memory() > beyond:
        trim(0)


def resident_memory() -> int:
    """Bytes of this process that are in memory; 0 where there is no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


@cache
def _c_library() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if os.name == "posix" else None


def device_memory(device: torch.device) -> int:
    """Free bytes of a GPU."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free)


# --- rates ---


@dataclass(frozen=True)
class Rates:
    """What this machine reaches: FLOP/s of products, where a multiply-add is two, and bytes/s."""

    f32: float
    bf16_factors: float  # of products.py: BF16 rows, summed in F32
    rough: float  # of products.py: where each element may be off by 0.4 %
    bf16: float
    copy: float  # bytes read plus bytes written
    read: float  # from disk
    write: float  # to disk


def properties(device: torch.device) -> dict[str, Any]:
    """What the bytes of a result may depend on beside versions: sums are rounded in an order that
    processors and numbers of threads differ in."""
    return {
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "processor": _processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """Its name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def measure_rates(shard: Path | None, folder: Path, device: torch.device = HOST) -> Rates:
    """Takes about a second. Reads a piece of `shard`, and writes one to `folder`, which is removed.

    Without a shard on this machine it is as fast to read as what is written.

    Raises UserError when a file cannot be read or written.
    """
    size = HOST_SIZE if device == HOST else DEVICE_SIZE
    f32 = torch.rand(size, size, device=device)
    bf16 = f32.to(torch.bfloat16)
    flops, total = 2 * size**3, torch.zeros_like(f32)
    write = _write_rate(folder)
    return Rates(
        f32=best_rate(lambda: f32 @ f32, flops, device),
        bf16_factors=best_rate(lambda: add_product(total, bf16.T, bf16), flops, device),
        rough=best_rate(lambda: add_rough_product(total, bf16, bf16), flops, device),
        bf16=best_rate(lambda: bf16 @ bf16, flops, device),
        copy=_copy_rate(device),
        read=write if shard is None else _read_rate(shard),
        write=write,
    )


def best_rate(work: Callable[[], object], amount: float, device: torch.device) -> float:
    """`amount` a second of `work`, the best of what fits into SECONDS after one to warm up."""
    _timed(work, device)
    began, least = time.perf_counter(), math.inf
    while math.isinf(least) or time.perf_counter() - began < SECONDS:
        least = min(least, _timed(work, device))
    return amount / least


def _timed(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _copy_rate(device: torch.device) -> float:
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return best_rate(lambda: target.copy_(source), 2 * COPIED_BYTES, device)


def _read_rate(shard: Path) -> float:
    """From disk: pages that the system has kept of the file are dropped first, where it can."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    done = 0
    try:
        with shard.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            while done < PIECE_BYTES and (count := file.readinto(buffer)):
                done += count
            taken = time.perf_counter() - began
    except OSError as error:
        raise UserError(f"{shard}: cannot be read ({error.strerror or error})") from None
    return max(done, 1) / taken


def _write_rate(folder: Path) -> float:
    """To disk, the wait for it included. The file has no name and goes with its handle."""
    chunk = os.urandom(CHUNK_BYTES)  # some disks compress
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            began = time.perf_counter()
            for _ in range(PIECE_BYTES // CHUNK_BYTES):
                file.write(chunk)
            os.fsync(file.fileno())
            return PIECE_BYTES / (time.perf_counter() - began)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None
