"""What a run has written, as all of its ranks know it: the first one writes, the others are told.

They read it where it lies, so the folder must be one that all of them see. Knows nothing of what
is written.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from llama4q.checkpoint import Checkpoint, PartReader
from llama4q.errors import UserError
from llama4q.ranks import Ranks
from llama4q.writer import WORK, CheckpointWriter, Unit, write_atomically, writing

SEEN = "ranks"  # in the work folder: a word that is new for each run
PATIENCE = 10.0  # seconds until what one rank has written must be seen by all
POLL = 0.1


class Units:
    """The units of a run; every rank asks the same at the same time."""

    def __init__(self, ranks: Ranks, folder: Path, run_key: Mapping[str, Any]) -> None:
        """Raises UserError as CheckpointWriter does, and when a rank does not see the folder."""
        self.ranks = ranks
        self.work = folder / WORK
        self.writer: CheckpointWriter | None = None  # of the first rank

        def begin() -> str:
            self.writer = CheckpointWriter(folder, run_key)
            word = secrets.token_hex()
            if ranks.count > 1:
                with writing(folder):
                    write_atomically(self.work / SEEN, word.encode())
            return word

        word = ranks.from_first(begin)
        if ranks.count > 1:
            check_seen(ranks, self.work / SEEN, word.encode(), folder)
            check_alike(ranks, dict(run_key))

    def __enter__(self) -> Units:
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            self.writer.__exit__()

    def done(self, unit: str) -> Unit | None:
        """The record of a unit whose files are all there with the right hash, else None."""
        return self.ranks.from_first(lambda: self.first.done(unit))

    def recorded(self, unit: str) -> Unit:
        """A unit's record without checking its files."""
        return self.ranks.from_first(lambda: self.first.recorded(unit))

    def finishing(self, units: Iterable[str]) -> bool:
        """Whether a run was killed while finishing."""
        return self.ranks.from_first(lambda: self.first.finishing(units))

    def write(
        self,
        unit: str,
        tensors: Iterable[tuple[str, torch.Tensor]],
        memory: Mapping[str, Any],
        look: Callable[[Checkpoint], Mapping[str, Any]] = lambda written: {},
    ) -> None:
        """The unit's tensors, which the first rank alone asks for and looks at, then its record."""
        if self.writer is not None:
            self.writer.write(unit, tensors, memory, look)

    def read_back(self, files: Iterable[str], device: torch.device) -> PartReader:
        """What was written under these names, to be read to `device`."""
        return PartReader(self.work, list(files), device)

    @property
    def first(self) -> CheckpointWriter:
        """For what the first rank alone does."""
        assert self.writer is not None
        return self.writer


def check_seen(ranks: Ranks, file: Path, content: bytes, folder: Path) -> None:
    """Raises UserError on the first rank, and ends the others, where one does not see what the
    first rank has in `file`."""
    begun = time.monotonic()
    while not (seen := file.is_file() and file.read_bytes() == content):
        if time.monotonic() - begun > PATIENCE:
            break
        time.sleep(POLL)  # a network's file system may be late
    found = ranks.everyone((seen, socket.gethostname()))

    def refuse() -> None:
        for number, (there, host) in enumerate(found):
            if not there:
                raise UserError(
                    f"{folder}: rank {number} on {host} does not see what rank 0 sees there; "
                    f"name a folder that all ranks share"
                )

    ranks.from_first(refuse)


def check_alike(ranks: Ranks, run_key: dict[str, Any]) -> None:
    """Raises UserError on the first rank, and ends the others, where one does another run."""
    found = ranks.everyone((run_key, socket.gethostname()))

    def refuse() -> None:
        for number, (other, host) in enumerate(found):
            for name, value in run_key.items():
                if other[name] != value:
                    raise UserError(
                        f"rank {number} on {host} has another {name} than rank 0 ({other[name]} "
                        f"there, {value} here); start all ranks with the same files and programs"
                    )

    ranks.from_first(refuse)
