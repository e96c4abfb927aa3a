"""A checkpoint on the Hub: known by its headers, read from shards that come and go.

Headers, and the few tensors that a run needs before their turn, are fetched by ranges. Knows
nothing of layers or bits.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from .checkpoint import (
    INDEX,
    LENGTH,
    SINGLE,
    Checkpoint,
    State,
    TensorInfo,
    header_infos,
    header_length,
    indexed,
    opened_state,
    read_index,
    shard_infos,
)
from .device import HOST, arrived
from .errors import UserError
from .hub_errors import persistently
from .remote import Remote, RemoteFile, mend
from .source import Source
from .window import Schedule, Window, schedule

HEADER = 100_000  # bytes asked for at first: nearly all headers are shorter
LONGEST = 10**8  # bytes of a header, as safetensors has it
REQUESTS = 8  # at once
PAUSES = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # seconds before a shard is tried again
LONG = 5.0  # seconds of waiting that are told

Tell = Callable[[str], None]


def read_headers(remote: Remote, folder: Path, files: Collection[str]) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint whose index, if it has one, lies in `folder`.

    Raises UserError where shards are missing, or their headers are not what the index says.
    """
    index = read_index(folder) if (folder / INDEX).exists() else None
    shards = [SINGLE] if index is None else sorted(set(index.values()))
    for shard in shards:
        if shard not in files:
            raise UserError(f"{remote.repo}: has no {shard}; name a repository with a checkpoint")
    with ThreadPoolExecutor(REQUESTS) as pool:
        infos: dict[str, TensorInfo] = {}
        for found in pool.map(lambda shard: _header(remote, shard), shards):
            infos |= found
    return infos if index is None else indexed(infos, index, folder)


def _header(remote: Remote, shard: str) -> dict[str, TensorInfo]:
    start = remote.read(shard, 0, HEADER)
    length = header_length(start)
    try:
        if length > LONGEST:
            raise ValueError(f"{length} bytes of header")
        header = start[LENGTH : LENGTH + length]
        if len(header) < length:
            header = remote.read(shard, LENGTH, length)
        return header_infos(shard, header)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{remote.repo}: {shard} is no safetensors file ({error})") from None


class Shards:
    """The shards of one repository that are on this machine now."""

    def __init__(
        self, remote: Remote, files: Mapping[str, RemoteFile], infos: Mapping[str, TensorInfo]
    ) -> None:
        self.remote, self.files, self.infos = remote, files, infos
        self.early: dict[str, bytes] = {}  # tensors that came before their shard
        self.states: dict[str, State] = {}
        self._ending = threading.Event()
        self._window: Window | None = None

    def plan(self, steps: Sequence[Collection[str]]) -> Schedule:
        """When the shards of tensors that are read step by step are needed."""
        shards = [{self.infos[name].shard for name in names} for names in steps]
        return schedule(shards, self._sizes())

    def begin(
        self, steps: Sequence[Collection[str]], early: Collection[str], work: Path, tell: Tell
    ) -> None:
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        disable_progress_bars()  # the run has a bar of its own
        self.work, self._tell = work, tell
        plan = self.plan(steps)
        self._tidy(plan)
        with ThreadPoolExecutor(REQUESTS) as pool:
            self.early = dict(zip(early, pool.map(self._fetch_tensor, early), strict=True))
        self._window = Window(plan, self._sizes(), self._fetch, self._drop)

    def path(self, shard: str) -> Path:
        """Of a shard, when it is there."""
        assert self._window is not None
        waited = self._window.need(shard)
        if waited > LONG:
            self._tell(f"waited {waited:.0f} s for {shard}")
        return self.work / shard

    def piece(self, name: str, start: int, size: int) -> bytes | None:
        """`size` bytes of a tensor, from byte `start` of its shard on: by a range before a run has
        begun, from those that came early, or None: they are in the shard."""
        if self._window is None:
            return self._fetch_piece(self.infos[name].shard, start, size)
        if name not in self.early:
            return None
        skipped = start - self.infos[name].start
        return self.early[name][skipped : skipped + size]

    def passed(self, step: int) -> None:
        if self._window is not None:
            self._window.passed(step)

    def end(self) -> None:
        self._ending.set()
        if self._window is not None:
            self._window.end()

    def _sizes(self) -> dict[str, int]:
        return {name: file.size for name, file in self.files.items()}

    def _tidy(self, plan: Schedule) -> None:
        """Whole shards that a killed run has left and that come first now stay."""
        self.work.mkdir(parents=True, exist_ok=True)
        wanted = plan.needed(0)
        for path in (*self.work.glob("*.safetensors"), *self.work.rglob("*.incomplete")):
            if path.name not in wanted:
                path.unlink()

    def _fetch_tensor(self, name: str) -> bytes:
        info = self.infos[name]
        return self._fetch_piece(info.shard, info.start, info.nbytes)

    def _fetch_piece(self, shard: str, start: int, size: int) -> bytes:
        found = self.remote.read(shard, start, size)
        if len(found) != size:
            raise UserError(
                f"{self.remote.repo}: {shard} ends before byte {start + size}, which its header "
                f"speaks of; name another revision"
            )
        return found

    def _fetch(self, shard: str) -> None:
        """A shard whose bytes are those that the Hub has; wrong ones are fetched again once."""
        path = self.work / shard
        self._download(shard)
        mend(path, self.files[shard], functools.partial(self._fetch_again, shard), self._tell)
        self._check_early(shard)
        self.states[shard] = opened_state(path)

    def _fetch_again(self, shard: str) -> None:
        self._drop(shard)  # or the disk would hold it twice for a while
        self._download(shard)

    def _download(self, shard: str) -> None:
        def fetch() -> Path:
            if self._ending.is_set():
                raise UserError(f"{self.remote.repo}: {shard} is not fetched, the run has ended")
            return self.remote.fetch(shard, self.work)

        persistently(fetch, self._tell, PAUSES, self._ending.wait)

    def _check_early(self, shard: str) -> None:
        """What ranges gave is what the whole shard, whose SHA-256 is right, has."""
        here = shard_infos(self.work, shard)
        with (self.work / shard).open("rb") as file:
            for name, info in self.infos.items():
                if info.shard != shard:
                    continue
                same = here.get(name) == info
                if same and name in self.early:
                    file.seek(info.start)
                    same = file.read(info.nbytes) == self.early[name]
                if not same:
                    raise UserError(
                        f"{self.remote.repo}: {name} was read otherwise than {shard} has it; "
                        f"delete {self.work.parent} and repeat the command"
                    )

    def _drop(self, shard: str) -> None:
        (self.work / shard).unlink()


class StreamedCheckpoint(Checkpoint):
    """Tensors by name; whoever reads one waits until its shard is there."""

    def __init__(self, folder: Path, shards: Shards, device: torch.device) -> None:
        self.folder, self.device, self.shards = folder, device, shards
        self.infos, self.states = dict(shards.infos), shards.states

    def _path(self, shard: str) -> Path:
        return self.shards.path(shard)

    def _read(self, name: str, start: int, shape: tuple[int, ...]) -> torch.Tensor:
        dtype = self.infos[name].dtype
        content = self.shards.piece(name, start, dtype.itemsize * torch.Size(shape).numel())
        if content is None:
            return super()._read(name, start, shape)
        raw = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return arrived(raw.view(dtype).view(shape), self.device)


@dataclass(frozen=True)
class StreamedSource(Source):
    """A checkpoint whose small files are here, and whose shards come when they are needed."""

    shards: Shards

    def checkpoint(self, device: torch.device = HOST) -> Checkpoint:
        return StreamedCheckpoint(self.folder, self.shards, device)

    def identity(self) -> str:
        """By the digests that the Hub has of the shards."""
        used = sorted({info.shard for info in self.shards.infos.values()})
        said = [
            (name, self.shards.files[name].size, self.shards.files[name].digest) for name in used
        ]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def held(self, steps: Sequence[Collection[str]]) -> int:
        return self.shards.plan(steps).most

    def begin(
        self, steps: Sequence[Collection[str]], early: Collection[str], work: Path, tell: Tell
    ) -> None:
        self.shards.begin(steps, early, work, tell)

    def passed(self, step: int) -> None:
        self.shards.passed(step)

    def end(self) -> None:
        self.shards.end()
