"""Writing a checkpoint unit by unit, so that a killed run loses nothing.

Knows nothing of Llama, layers or bits. A folder becomes a checkpoint only when its index is
written, which `CheckpointWriter.publish` does when all else is there, and it is finished when its
manifest is, the last file of all.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from .checkpoint import INDEX, SINGLE, Checkpoint, PartReader, sha256
from .errors import UserError
from .lock import Lock, refuse_held
from .manifest import MANIFEST, manifest
from .stopping import finishing

WORK = ".llama4q"  # what a run has written so far; gone when the checkpoint is finished
LOCK = "lock"  # in there; held by the run at work
MAX_SHARD_BYTES = 4 * 10**9


@dataclass(frozen=True)
class Unit:
    """One resumable step of a run: its files with their SHA-256, and what else to remember."""

    files: Mapping[str, str]
    memory: Mapping[str, Any]


class CheckpointWriter:
    """Writes a checkpoint unit by unit into a work folder, then gives the files their final names.

    A unit counts only when its record is on disk, which is written after its files. `run_key` says
    what the run depends on; a work folder left by a run with another key is refused. Until it is
    left as a context no other run may write here. A signal that asks to stop waits for a write.
    """

    def __init__(self, folder: Path, run_key: Mapping[str, Any]) -> None:
        self.folder = folder
        self.work = folder / WORK
        with writing(folder), contextlib.ExitStack() as undo:
            refuse_foreign_files(folder)
            self.work.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.work / LOCK, folder)
            undo.callback(self._lock.release)
            # once more: a run may have held the lock until now. An index without a manifest is
            # of a run that was killed between them, and goes on here.
            _refuse_finished(folder, [MANIFEST])
            self._check_run_key(dict(run_key))
            undo.pop_all()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _check_run_key(self, run_key: dict[str, Any]) -> None:
        path = self.work / "run.json"
        if not path.exists():
            write_atomically(path, to_json(run_key))
            return
        before, now = json.loads(path.read_bytes()), json.loads(json.dumps(run_key))
        for key, old, new in _differences(before, now):
            raise UserError(
                f"{self.folder}: an unfinished run with another {key} is here "
                f"({_short(old)} then, {_short(new)} now); "
                f"repeat its command, or delete the folder"
            )

    def done(self, unit: str) -> Unit | None:
        """The record of a unit whose files are all there with the right hash, else None."""
        try:
            found = self.recorded(unit)
        except (FileNotFoundError, json.JSONDecodeError, KeyError):
            return None  # no record, or one that a bad disk spoiled: the unit is written again
        for name, digest in found.files.items():
            if not (self.work / name).exists() or sha256(self.work / name) != digest:
                return None
        return found

    def write(
        self,
        unit: str,
        tensors: Iterable[tuple[str, torch.Tensor]],
        memory: Mapping[str, Any],
        look: Callable[[Checkpoint], Mapping[str, Any]] = lambda written: {},
    ) -> Unit:
        """Write the unit's tensors, then its record: `memory`, and what is found by a `look` at
        the tensors as they can be read back."""
        with finishing():
            files = self.write_files(unit, tensors)
            found = look(PartReader(self.work, list(files)))
            return self.record(unit, files, {**memory, **found})

    def write_files(self, unit: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
        """Write tensors in shards of at most MAX_SHARD_BYTES; their SHA-256 by file name.

        They don't count before `record`.
        """
        with writing(self.folder), finishing():
            files: dict[str, str] = {}
            for number, shard in enumerate(_shards(tensors)):
                name = f"{unit}.{number:03d}.safetensors"
                temporary = self.work / f"{name}.tmp"
                save_file(shard, str(temporary), metadata={"format": "pt"})
                _settle(temporary)
                files[name] = sha256(temporary)
                os.replace(temporary, self.work / name)
            return files

    def record(self, unit: str, files: Mapping[str, str], memory: Mapping[str, Any]) -> Unit:
        """The record that makes `files` count as `unit`."""
        with writing(self.folder):
            content = to_json({"files": files, "memory": memory})
            write_atomically(self.work / f"{unit}.json", content)
        return Unit(files, memory)

    def recorded(self, unit: str) -> Unit:
        """A unit's record without checking its files."""
        raw = json.loads((self.work / f"{unit}.json").read_bytes())
        return Unit(raw["files"], raw["memory"])

    def read_back(self, files: Iterable[str], device: torch.device) -> PartReader:
        """What was written under these names, to be read to `device`."""
        return PartReader(self.work, list(files), device)

    def finishing(self, units: Iterable[str]) -> bool:
        """Whether a run was killed while finishing: all recorded, some shards under final names."""
        if not all((self.work / f"{unit}.json").exists() for unit in units):
            return False
        return any(self.folder.glob("model-*-of-*.safetensors"))

    def assemble(self, units: Iterable[str]) -> tuple[Checkpoint, dict[str, str]]:
        """Give the shards their final names; returns them, and the SHA-256 recorded for each.

        Repeating it after a kill is safe. The folder is no checkpoint before `publish`.
        """
        digests = {
            part: digest for unit in units for part, digest in self.recorded(unit).files.items()
        }
        final: dict[str, str] = {}
        with writing(self.folder):
            for number, (part, digest) in enumerate(digests.items(), start=1):
                shard = f"model-{number:05d}-of-{len(digests):05d}.safetensors"
                if (self.work / part).exists():
                    os.replace(self.work / part, self.folder / shard)
                final[shard] = digest
        return PartReader(self.folder, list(final)), final

    def publish(
        self, written: Checkpoint, digests: Mapping[str, str], side_files: Mapping[str, bytes]
    ) -> None:
        """Side files, config.json, the index, and last the manifest; then the work folder goes.

        `digests` are the shards' SHA-256.
        """
        index = {
            "metadata": {"total_size": sum(info.nbytes for info in written.infos.values())},
            "weight_map": {name: written.infos[name].shard for name in sorted(written.infos)},
        }
        with writing(self.folder), finishing():
            # config.json comes late: some engines load any folder with a config and shards.
            for name in sorted(side_files, key=lambda name: name == "config.json"):
                write_atomically(self.folder / name, side_files[name])
            write_atomically(self.folder / INDEX, to_json(index))
            write_atomically(self.folder / MANIFEST, manifest(self.folder, digests))
            # Without run.json no later run takes the remains for an unfinished one.
            (self.work / "run.json").unlink()
            # errors: a second run may be asking for the lock at this very moment
            shutil.rmtree(self.work, ignore_errors=True)


def refuse_foreign_files(folder: Path) -> None:
    """Raises UserError when `folder` holds a finished checkpoint, files that are not ours, or those
    of a run at work."""
    with writing(folder):  # it may lie where not even looking is allowed
        if not folder.exists():
            return
        if not folder.is_dir():
            raise UserError(f"{folder}: is a file; choose a folder that does not exist yet")
        refuse_held(folder / WORK / LOCK, folder)
        if (folder / WORK / "run.json").exists() or not any(folder.iterdir()):
            return
        _refuse_finished(folder, [INDEX, SINGLE, MANIFEST])
        if [path.name for path in folder.iterdir()] == [WORK]:
            return
        raise UserError(
            f"{folder}: is not empty and holds no unfinished run; choose another folder"
        )


def _refuse_finished(folder: Path, signs: Iterable[str]) -> None:
    """Raises UserError when one of these files, the `signs` of a checkpoint, is there."""
    if any((folder / sign).exists() for sign in signs):
        raise UserError(
            f"{folder}: already holds a finished checkpoint; choose another folder or delete it"
        )


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns a full disk or a missing permission into one line that says how to go on."""
    try:
        yield
    except OSError as error:
        _raise_unwritable(folder, error.strerror or str(error))
    except SafetensorError as error:
        # safetensors reports the operating system's errors in an exception of its own
        _raise_unwritable(folder, str(error))


def _raise_unwritable(folder: Path, reason: str) -> NoReturn:
    raise UserError(
        f"{folder}: cannot be written ({reason}); mend that and repeat the command, "
        f"the run goes on where it stopped"
    ) from None


def write_atomically(path: Path, content: bytes) -> None:
    """All of the content under `path`, or nothing: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.tmp")  # no part of a manifest
    with finishing():
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _settle(path: Path) -> None:
    """Onto the disk, readable for whoever the user's umask lets read (safetensors: owner only)."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _shards(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """Group tensors, in their order, into dictionaries of at most MAX_SHARD_BYTES."""
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > MAX_SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
    if shard:
        yield shard


def _differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two JSON values differ: the path of keys, and what stands there in each."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**now, **before}:  # in the order of `now`, which names causes first
            yield from _differences(before.get(name), now.get(name), f"{key} {name}".lstrip())
    elif before != now:
        yield key, before, now


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
