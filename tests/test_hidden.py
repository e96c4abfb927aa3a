"""Stores in files against stores in memory, and both against plain tensors."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from llama4q.errors import UserError
from llama4q.hidden import Spool, Store

SHAPES = [(2, 5, 8), (1, 7, 8), (3, 1, 8)]  # 20 rows


@pytest.fixture(params=["memory", "file"])
def spool(request: pytest.FixtureRequest, tmp_path: Path) -> Spool:
    return Spool() if request.param == "memory" else Spool(0, tmp_path)


def filled(spool: Spool, dtype: torch.dtype) -> tuple[Store, torch.Tensor]:
    """A store, and what lies in it as rows."""
    store = spool.store(SHAPES, dtype)
    rows = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    for number, where in enumerate(store.slices()):
        store[number] = rows[where].view(SHAPES[number])
    return store, rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_and_rows(spool: Spool, dtype: torch.dtype) -> None:
    store, rows = filled(spool, dtype)
    assert len(store) == 3
    assert [tuple(batch.shape) for batch in store] == SHAPES
    assert torch.equal(torch.cat([batch.flatten(0, 1) for batch in store]), rows)
    assert torch.equal(store.rows(slice(3, 12)), rows[3:12])
    for some in ([0], [1, 2, 3, 9, 10, 19], list(range(20)), []):
        index = torch.tensor(some, dtype=torch.int64)
        assert torch.equal(store.rows(index), rows[index])


def test_adding_and_putting(spool: Spool) -> None:
    store, rows = filled(spool, torch.bfloat16)
    index = torch.tensor([2, 3, 11, 19])
    more = torch.full((4, 8), 0.3, dtype=torch.bfloat16)
    store.add(index, more)
    store.put(slice(5, 9), more)
    rows[index] += more
    rows[5:9] = more
    assert torch.equal(store.rows(slice(0, 20)), rows)


def test_a_copy_is_one(spool: Spool) -> None:
    store, rows = filled(spool, torch.float32)
    other = spool.copy(store)
    store[0] = torch.zeros(SHAPES[0])
    assert torch.equal(other.rows(slice(0, 20)), rows)


def test_the_budget_is_kept_and_given_back(tmp_path: Path) -> None:
    """20 rows of 8 F32 values are 640 bytes."""
    spool = Spool(1000, tmp_path)
    first = spool.store(SHAPES, torch.float32)
    assert (spool.host.left, spool.spilled) == (360, 0)
    second = spool.store(SHAPES, torch.float32)
    assert (spool.host.left, spool.spilled) == (360, 640)
    del first
    third = spool.store(SHAPES, torch.float32)
    assert (spool.host.left, spool.spilled) == (360, 640)
    assert list(tmp_path.iterdir()) == []  # files have no name, so a kill leaves nothing
    del second, third


def test_a_folder_is_made_when_it_is_needed(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    Spool(folder=folder).store(SHAPES, torch.float32)
    assert not folder.exists()
    Spool(0, folder).store(SHAPES, torch.float32)
    assert folder.is_dir()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    spool = Spool(0, tmp_path / "file" / "folder")
    with pytest.raises(UserError, match=r"folder: hidden states do not fit \(Not a directory"):
        spool.store(SHAPES, torch.float32)


def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full has no room, and at the start of its own memory no process can read."""

    def opened(path: str, flags: int) -> Any:
        return io.FileIO(os.open(path, flags), "r+" if flags & os.O_RDWR else "r")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: opened("/dev/full", os.O_RDWR))
    store = Spool(0, tmp_path).store(SHAPES, torch.float32)
    with pytest.raises(UserError, match=r"hidden states do not fit \(No space left on device\)"):
        store[0] = torch.zeros(SHAPES[0])
    monkeypatch.setattr(
        tempfile, "TemporaryFile", lambda **_: opened("/proc/self/mem", os.O_RDONLY)
    )
    store = Spool(0, tmp_path).store(SHAPES, torch.float32)
    with pytest.raises(UserError, match=r"cannot be read back \(Input/output error\)"):
        store.rows(slice(0, 5))
