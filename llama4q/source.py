"""The checkpoint that a run reads: a folder whose files are all there.

Knows nothing of the Hub; streamed.py has one whose shards come and go.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .checkpoint import Checkpoint, fingerprint
from .device import HOST


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint and where it came from."""

    folder: Path  # config.json, tokenizer and the like; the shards too, unless they are streamed
    name: str
    revision: str | None = None  # the Hub's commit

    def checkpoint(self, device: torch.device = HOST) -> Checkpoint:
        """Its tensors, which come on `device`."""
        return Checkpoint(self.folder, device)

    def identity(self) -> str:
        """Tells its tensors from those of any other source."""
        return fingerprint(self.checkpoint())

    def held(self, steps: Sequence[Collection[str]]) -> int:
        """Bytes that it takes at most on the disk of a run's result while the tensors of each of
        `steps` are read, one after the other."""
        del steps
        return 0

    def begin(
        self,
        steps: Sequence[Collection[str]],
        early: Collection[str],
        work: Path,
        tell: Callable[[str], None],
    ) -> None:
        """The tensors of `steps` will be read one after the other, and those of `early` at any
        time. A source that is not here comes into `work`, and tells what goes wrong on the way."""

    def passed(self, step: int) -> None:
        """The steps up to this one are done: nobody reads their tensors again."""

    def end(self) -> None:
        """Nothing more is read."""


def folder_source(folder: Path) -> Source:
    """What lies in a folder, by its path."""
    return Source(folder=folder, name=str(folder))
