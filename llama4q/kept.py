"""How far a long pass over the layers has come, kept on the disk: a pass that is stopped goes on.

Rows of tokens lie in one file, what was found so far in another, which is written last and holds
the digest of the first. Knows nothing of models, nor what a pass is for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError
from .hidden import Store
from .writer import to_json, write_atomically, writing


@dataclass(frozen=True)
class Reached:
    """Where a pass stands; `found` are JSON types."""

    layers: int
    found: Any


class Kept:
    """What is kept of one pass in `folder`; a later start with the same `key` goes on with it."""

    every = 300.0  # seconds of work that a stop may cost, beside the layer that it meets
    share = 0.05  # of the time may go into keeping

    def __init__(self, folder: Path, name: str, key: Any) -> None:
        """`key` is all that the pass depends on, in JSON types."""
        self.folder, self.name, self.key = folder, name, key
        self.record = folder / f"{name}.json"
        self._due = time.monotonic() + self.every

    def reached(self) -> Reached | None:
        """How far an earlier pass came; None when there was none, or another one."""
        if not self.record.exists():
            return None
        found = json.loads(self.record.read_bytes())
        if found["key"] != self.key:
            return None
        return Reached(found["layers"], found["found"])

    def take(self, stores: Sequence[Store]) -> None:
        """Fill the stores, of the shapes in which they were kept.

        Raises UserError when the file is not what was written.
        """
        record = json.loads(self.record.read_bytes())
        path, digest = self.folder / record["rows"], hashlib.sha256()
        with contextlib.suppress(OSError), path.open("rb") as file:
            for store in stores:
                for number in range(len(store)):
                    raw = file.read(store.nbytes(number))
                    digest.update(raw)
                    if len(raw) == store.nbytes(number):
                        store.fill(number, raw)
        if digest.hexdigest() != record["sha256"]:
            raise UserError(
                f"{path}: not what was kept there of a pass that was stopped; delete {self.record} "
                f"and repeat the command, it begins that pass again"
            )

    def keep(self, reached: Reached, stores: Sequence[Store]) -> None:
        """When it is time to."""
        began = time.monotonic()
        if began < self._due:
            return
        rows = self.folder / f"{self.name}-{reached.layers}.rows"
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            digest = self._write(rows, stores)
            record = {"key": self.key, **vars(reached), "rows": rows.name, "sha256": digest}
            write_atomically(self.record, to_json(record))
        self._forget_but(rows)
        now = time.monotonic()
        self._due = now + max(self.every, (now - began) / self.share)

    def forget(self) -> None:
        """The pass is done."""
        self.record.unlink(missing_ok=True)
        self._forget_but(None)

    def _write(self, path: Path, stores: Sequence[Store]) -> str:
        digest = hashlib.sha256()
        with path.open("wb") as file:
            for store in stores:
                for number in range(len(store)):
                    raw = store.raw(number)
                    digest.update(raw)
                    file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()

    def _forget_but(self, path: Path | None) -> None:
        for other in self.folder.glob(f"{self.name}-*.rows"):
            if other != path:
                other.unlink()
