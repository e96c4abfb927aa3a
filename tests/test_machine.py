"""llama4q.machine: free memory on made-up kernels, budgets as written, rates of known work."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import astuple
from pathlib import Path

import pytest
import torch

from llama4q import machine
from llama4q.errors import UserError
from llama4q.machine import (
    Budget,
    best_rate,
    device_memory,
    free_memory,
    measure_rates,
    parse_memory,
    resident_memory,
)

from .fake_gpu import FREE, fake_gpu

GIB = 2**30
V2 = ("memory.max", "memory.current", "")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")


def kernel(root: Path, available: int, cgroups: str = "") -> Path:
    """A root folder with /proc as Linux writes it."""
    proc = root / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(
        f"MemTotal:       99999999 kB\nMemFree:  1 kB\nMemAvailable: {available // 1024:8} kB\n"
    )
    (proc / "self/cgroup").write_text(cgroups)
    return root


def limit(
    group: Path, version: tuple[str, str, str], most: int | str, used: int, file: int
) -> None:
    """A cgroup that allows `most` bytes; `file` of those in use are pages of files."""
    limit_name, usage_name, prefix = version
    group.mkdir(parents=True, exist_ok=True)
    (group / limit_name).write_text(f"{most}\n")
    (group / usage_name).write_text(f"{used}\n")
    own = "active_file 7\n" if prefix else ""  # version 1 counts children apart
    (group / "memory.stat").write_text(
        f"anon {used - file}\n{own}{prefix}inactive_file {file // 2}\n"
        f"{prefix}active_file {file - file // 2}\n"
    )


def test_without_limits_it_is_what_the_kernel_calls_available(tmp_path: Path) -> None:
    assert free_memory(kernel(tmp_path, 12 * GIB)) == 12 * GIB


@pytest.mark.parametrize(("version", "mount"), [(V2, ""), (V1, "memory")], ids=["v2", "v1"])
def test_the_tightest_cgroup_above_counts(
    tmp_path: Path, version: tuple[str, str, str], mount: str
) -> None:
    line = "4:cpuset,memory:/job/step\n9:pids:/else\n" if mount else "0::/job/step\n"
    kernel(tmp_path, 64 * GIB, line)
    groups = tmp_path / "sys/fs/cgroup" / mount
    limit(groups / "job/step", version, 40 * GIB, 10 * GIB, 0)
    limit(groups / "job", version, 24 * GIB, 20 * GIB, 12 * GIB)  # 4 GiB left, 12 can be dropped
    limit(groups / "else", version, GIB, 0, 0)  # not above this process
    assert free_memory(tmp_path) == 16 * GIB


def test_no_limit_is_no_limit(tmp_path: Path) -> None:
    kernel(tmp_path, 8 * GIB, "4:memory:/\n0::/job\n")
    limit(tmp_path / "sys/fs/cgroup/memory", V1, 9223372036854771712, GIB, 0)  # as v1 says none
    limit(tmp_path / "sys/fs/cgroup/job", V2, "max", GIB, 0)
    assert free_memory(tmp_path) == 8 * GIB


def test_a_container_sees_its_own_limit_at_the_mount(tmp_path: Path) -> None:
    """Without a cgroup namespace the path is the host's, and does not exist inside."""
    kernel(tmp_path, 64 * GIB, "4:memory:/docker/4f2a\n")
    limit(tmp_path / "sys/fs/cgroup/memory", V1, 6 * GIB, 2 * GIB, GIB)
    assert free_memory(tmp_path) == 5 * GIB


def test_a_path_above_the_namespace_is_not_left(tmp_path: Path) -> None:
    kernel(tmp_path, 64 * GIB, "0::/../../sibling\n")
    limit(tmp_path / "sys/fs/cgroup", V2, 6 * GIB, 2 * GIB, 0)
    assert free_memory(tmp_path) == 4 * GIB


def test_beyond_memory_high_the_kernel_slows_a_run_down(tmp_path: Path) -> None:
    kernel(tmp_path, 64 * GIB, "0::/job\n")
    job = tmp_path / "sys/fs/cgroup/job"
    limit(job, V2, 10 * GIB, GIB, 0)
    (job / "memory.high").write_text(f"{4 * GIB}\n")
    assert free_memory(tmp_path) == 3 * GIB


def test_a_group_beyond_its_limit_leaves_nothing(tmp_path: Path) -> None:
    kernel(tmp_path, 64 * GIB, "0::/job\n")
    limit(tmp_path / "sys/fs/cgroup/job", V2, 2 * GIB, 3 * GIB, 0)
    assert free_memory(tmp_path) == 0


def test_outside_of_linux_the_user_has_to_say(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"only be told on Linux.*--memory 16GB"):
        free_memory(tmp_path)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux only")
def test_here_it_is_below_what_the_machine_has() -> None:
    assert 0 < free_memory() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_device_memory_is_what_is_free() -> None:
    with fake_gpu() as gpu:
        assert device_memory(gpu) == FREE


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("16GB,70GB", Budget(16 * 10**9, 70 * 10**9)),
        ("16GiB", Budget(16 * GIB)),
        ("16e9", Budget(16 * 10**9)),
        (" 900 MB , 1.5e10", Budget(900 * 10**6, 15 * 10**9)),
        ("1.5GiB", Budget(3 * GIB // 2)),
    ],
)
def test_a_budget_as_written(text: str, budget: Budget) -> None:
    assert parse_memory(text) == budget


@pytest.mark.parametrize(
    "text", ["", "16", "16XB", "-3GB", "0GB", "nan", "inf", "1e400", "16GB,", "much"]
)
def test_what_is_no_memory_size(text: str) -> None:
    with pytest.raises(UserError, match="give a number above 0 and a unit"):
        parse_memory(text)


def test_a_third_size_has_no_meaning() -> None:
    with pytest.raises(UserError, match="give HOST or HOST,DEVICE"):
        parse_memory("1GB,2GB,3GB")


def test_a_rate_is_the_best_of_several() -> None:
    """Work that takes 20 ms but for its first two times, of which the first is to warm up."""
    waits = iter([0.2, 0.06] + 9 * [0.02])
    rate = best_rate(lambda: time.sleep(next(waits)), 1.0, torch.device("cpu"))
    assert 35 < rate <= 50


def test_rates_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "HOST_SIZE", 256)
    monkeypatch.setattr(machine, "SECONDS", 0.01)
    shard, folder = tmp_path / "shard", tmp_path / "folder"
    shard.write_bytes(bytes(1000))
    folder.mkdir()
    before = torch.get_float32_matmul_precision()
    rates = measure_rates(shard, folder)
    assert all(0 < rate < float("inf") for rate in astuple(rates))
    assert torch.get_float32_matmul_precision() == before
    assert list(folder.iterdir()) == []
    assert shard.read_bytes() == bytes(1000)


def test_a_disk_that_cannot_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "HOST_SIZE", 64)
    monkeypatch.setattr(machine, "SECONDS", 0.001)
    (tmp_path / "shard").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no shard: cannot be read \(No such file"):
        measure_rates(tmp_path / "no shard", tmp_path)
    with pytest.raises(UserError, match=r"no folder: cannot be written \(No such file"):
        measure_rates(tmp_path / "shard", tmp_path / "no folder")


def test_freed_memory_is_kept_until_it_is_too_much() -> None:
    """In a process of its own, as allocator options hold for all of it."""
    script = """
import torch
from llama4q.machine import give_back_memory, keep_freed_memory, resident_memory
keep_freed_memory()
before, size = resident_memory(), 2**28
torch.ones(size, dtype=torch.uint8)
assert resident_memory() - before > 0.9 * size
give_back_memory(beyond=float("inf"))
assert resident_memory() - before > 0.9 * size
give_back_memory(beyond=before)
assert resident_memory() - before < 0.1 * size
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_resident_memory_against_the_kernels_table() -> None:
    lines = Path("/proc/self/status").read_text().splitlines()
    told = int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024
    assert resident_memory() == pytest.approx(told, rel=0.02)
