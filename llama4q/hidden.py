"""Rows of many tokens that need not fit in memory: hidden states, and what lies between two passes.

A Store holds batches of one width: on the GPU, in memory, or in a file that has no name and goes
with the process. A Spool decides which, by budgets of bytes: what is stored is the same, and comes
to the device that computes, either way. Row numbers are the host's. Files are read and written, not
mapped, so that no page of them counts as the process's own memory. Knows nothing of models.
"""

from __future__ import annotations

import itertools
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from .device import HOST
from .errors import UserError

Where = slice | torch.Tensor  # rows: neighbours, or by ascending number


class Store:
    """Batches `[..., width]` in order, and their rows `[N, width]` by number."""

    def __init__(
        self, shapes: Sequence[Sequence[int]], dtype: torch.dtype, rows: Rows, spool: Spool
    ) -> None:
        self.shapes = [tuple(shape) for shape in shapes]
        counts = [torch.Size(shape[:-1]).numel() for shape in self.shapes]
        self.starts = [0, *itertools.accumulate(counts)]
        self.dtype = dtype
        self._rows = rows
        self.spool = spool  # where what belongs to it may lie

    def __len__(self) -> int:
        return len(self.shapes)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> torch.Tensor:
        """A whole batch; to keep it while the store changes, clone it."""
        return self.rows(self.slices()[number]).view(self.shapes[number])

    def __setitem__(self, number: int, batch: torch.Tensor) -> None:
        self._rows.write(self.slices()[number], batch.reshape(-1, batch.shape[-1]))

    def raw(self, number: int) -> memoryview:
        """The bytes of a batch."""
        return _raw(self[number].to(HOST).contiguous())

    def fill(self, number: int, raw: bytes) -> None:
        """A batch from its bytes."""
        batch = torch.empty(self.shapes[number], dtype=self.dtype)
        _raw(batch)[:] = raw
        self[number] = batch

    def nbytes(self, number: int) -> int:
        """Of a batch."""
        return torch.Size(self.shapes[number]).numel() * self.dtype.itemsize

    @property
    def tokens(self) -> int:
        """How many rows there are."""
        return self.starts[-1]

    def slices(self) -> list[slice]:
        """Which rows each batch has."""
        return [slice(start, stop) for start, stop in itertools.pairwise(self.starts)]

    def first(self, count: int) -> Store:
        """The first batches alone, of which a change is one of this store's."""
        return Store(self.shapes[:count], self.dtype, self._rows, self.spool)

    def rows(self, where: Where) -> torch.Tensor:
        """`[n, width]`; to keep them while the store changes, clone them."""
        return self._rows.read(where).to(self.spool.device)

    def put(self, where: Where, values: torch.Tensor) -> None:
        """Replace some rows by `[n, width]`."""
        self._rows.write(where, values)

    def add(self, where: Where, values: torch.Tensor) -> None:
        """Add `[n, width]` to some rows."""
        self._rows.write(where, self.rows(where) + values)


@dataclass
class Room:
    """Bytes that are left for rows in one memory."""

    device: torch.device
    left: float


class Spool:
    """Makes stores for a `device`: there while `on_device` bytes last, then in memory while
    `budget` bytes do, else in files in `folder`."""

    def __init__(
        self,
        budget: float = float("inf"),
        folder: Path | None = None,
        device: torch.device = HOST,
        on_device: float = 0,
    ) -> None:
        self.device = device
        self.host = Room(HOST, budget)
        self.rooms = (Room(device, on_device), self.host)
        self.folder = folder
        self.spilled = 0  # bytes that went to files, in all

    def store(self, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> Store:
        """Room for batches of these shapes, all of one width; their values are still undefined."""
        width = shapes[0][-1] if shapes else 0
        rows = sum(torch.Size(shape[:-1]).numel() for shape in shapes)
        size = rows * width * dtype.itemsize
        for room in self.rooms:
            if size <= room.left:
                room.left -= size
                values = torch.empty(rows, width, dtype=dtype, device=room.device)
                return Store(shapes, dtype, InMemory(values, room), self)
        self.spilled += size
        return Store(shapes, dtype, InFile(self._file(), width, dtype, self.folder), self)

    def copy(self, other: Store) -> Store:
        """A store with the same batches."""
        store = self.store(other.shapes, other.dtype)
        for number, batch in enumerate(other):
            store[number] = batch
        return store

    def _file(self) -> Any:
        try:
            if self.folder is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
            return tempfile.TemporaryFile(dir=self.folder, buffering=0)
        except OSError as error:
            raise _unwritable(self.folder, error) from None


class Rows(Protocol):
    """Where a store's rows lie."""

    def read(self, where: Where) -> torch.Tensor: ...
    def write(self, where: Where, values: torch.Tensor) -> None: ...


class InMemory:
    """Rows in one tensor; its bytes go back to their room with it."""

    def __init__(self, values: torch.Tensor, room: Room) -> None:
        self.values = values
        self.room = room

    def __del__(self) -> None:
        self.room.left += self.values.nbytes

    def read(self, where: Where) -> torch.Tensor:
        return self.values[where]

    def write(self, where: Where, values: torch.Tensor) -> None:
        self.values[where] = values.to(self.values.device)


class InFile:
    """Rows in a file."""

    def __init__(self, file: Any, width: int, dtype: torch.dtype, folder: Path | None) -> None:
        self.file, self.folder = file, folder
        self.width, self.dtype = width, dtype
        self.row_bytes = width * dtype.itemsize
        weakref.finalize(self, file.close)  # before the file itself, in whatever order both go

    def read(self, where: Where) -> torch.Tensor:
        runs = _runs(where)
        found = torch.empty(sum(len(run) for run in runs), self.width, dtype=self.dtype)
        raw, done = _raw(found), 0
        try:
            for run in runs:
                size = len(run) * self.row_bytes
                self.file.seek(run.start * self.row_bytes)
                _fill(self.file, raw[done : done + size])
                done += size
        except OSError as error:
            raise UserError(
                f"{self.folder or tempfile.gettempdir()}: hidden states cannot be read back "
                f"({error.strerror}); check the disk and repeat the command"
            ) from None
        return found

    def write(self, where: Where, values: torch.Tensor) -> None:
        raw, done = _raw(values.to(HOST, self.dtype).contiguous()), 0
        try:
            for run in _runs(where):
                size = len(run) * self.row_bytes
                self.file.seek(run.start * self.row_bytes)
                _drain(self.file, raw[done : done + size])
                done += size
        except OSError as error:
            raise _unwritable(self.folder, error) from None


def _runs(where: Where) -> list[range]:
    """Rows that lie beside each other, together."""
    if isinstance(where, slice):
        return [range(where.start, where.stop)]
    if not len(where):
        return []
    breaks = (torch.nonzero(where.diff() != 1).squeeze(1) + 1).tolist()
    bounds = [0, *breaks, len(where)]
    first = where.tolist()
    return [
        range(first[start], first[start] + stop - start)
        for start, stop in itertools.pairwise(bounds)
    ]


def _raw(values: torch.Tensor) -> memoryview:
    flat: Any = values.flatten().view(torch.uint8).numpy()
    return memoryview(flat)


def _fill(file: Any, raw: memoryview) -> None:
    while raw:
        count = file.readinto(raw)
        if not count:  # never written: a store's values are undefined then
            return
        raw = raw[count:]


def _drain(file: Any, raw: memoryview) -> None:
    while raw:
        raw = raw[file.write(raw) :]


def _unwritable(folder: Path | None, error: OSError) -> UserError:
    return UserError(
        f"{folder or tempfile.gettempdir()}: hidden states do not fit ({error.strerror}); "
        f"free some space or give the run more --memory, and repeat the command"
    )
