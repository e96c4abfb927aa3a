"""Sharded safetensors on disk: read tensors by name, write so that a killed run loses nothing.

Knows nothing of Llama, layers or bits. A folder becomes a checkpoint only when its index is
written, and the index is the last file that `CheckpointWriter.finish` writes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WORK = ".llama4q"  # what a run has written so far; gone when the checkpoint is finished
MAX_SHARD_BYTES = 4 * 10**9

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies and what it is, known without reading it."""

    shard: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * int(torch.Size(self.shape).numel())


class Checkpoint:
    """Tensors by name from the safetensors files of one folder; opening reads headers only."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError when the index or a shard is missing, truncated or out of the folder."""
        self.folder = folder
        self.infos = _read_infos(folder, _read_index(folder))
        self._open: tuple[str, Any] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self.infos

    def names(self) -> list[str]:
        return list(self.infos)

    def info(self, name: str) -> TensorInfo:
        """Raises UserError when the checkpoint has no such tensor."""
        try:
            return self.infos[name]
        except KeyError:
            raise UserError(
                f"{self.folder}: tensor {name} is missing; download the checkpoint again"
            ) from None

    def get(self, name: str) -> torch.Tensor:
        """The whole tensor, in memory of its own."""
        shard = self.info(name).shard
        with _named_errors(self.folder / shard, name):
            tensor: torch.Tensor = self._shard(shard).get_tensor(name)
            return tensor.clone()

    def get_row(self, name: str, row: int) -> torch.Tensor:
        """Entry `row` of the first dimension (one expert of a fused tensor), the rest unread."""
        shard = self.info(name).shard
        with _named_errors(self.folder / shard, name):
            tensor: torch.Tensor = self._shard(shard).get_slice(name)[row]
            return tensor.clone()

    def _shard(self, shard: str) -> Any:
        # One shard open at a time: a mapping kept open would keep its pages.
        if self._open is None or self._open[0] != shard:
            self._open = (shard, safe_open(str(self.folder / shard), framework="pt"))
        return self._open[1]


def _read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> shard from the index; None when the checkpoint is one file without index."""
    path = folder / INDEX
    if not path.exists():
        if (folder / SINGLE).exists():
            return None
        raise UserError(f"{folder}: neither {INDEX} nor {SINGLE} here; name a checkpoint folder")
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        shards = {str(name): str(shard) for name, shard in weight_map.items()}
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError, UnicodeDecodeError):
        raise UserError(f"{path}: not a safetensors index; download it again") from None
    for shard in set(shards.values()):
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise UserError(f"{path}: names {shard!r}, outside the folder; refused")
    return shards


def _read_infos(folder: Path, index: Mapping[str, str] | None) -> dict[str, TensorInfo]:
    shards = [SINGLE] if index is None else sorted(set(index.values()))
    found: dict[str, TensorInfo] = {}
    for shard in shards:
        found |= _shard_infos(folder, shard)
    if index is None:
        return found
    for name, shard in index.items():
        if name not in found or found[name].shard != shard:
            raise UserError(f"{folder / shard}: tensor {name} of the index is not in it")
    return {name: found[name] for name in index}


def _shard_infos(folder: Path, shard: str) -> dict[str, TensorInfo]:
    path = folder / shard
    if not path.exists():
        raise UserError(f"{path}: this shard of the index is missing; download it again")
    with _named_errors(path):
        path.open("rb").close()  # safe_open calls a file that may not be read missing
    with _named_errors(path), safe_open(str(path), framework="pt") as reader:
        infos = {}
        for name in reader.keys():  # noqa: SIM118 - a safetensors reader, not a dictionary
            view = reader.get_slice(name)
            kind = view.get_dtype()
            if kind not in DTYPES:
                raise UserError(f"{path}: tensor {name} has dtype {kind}, which llama4q can't read")
            infos[name] = TensorInfo(shard, tuple(view.get_shape()), DTYPES[kind])
        return infos


@contextlib.contextmanager
def _named_errors(path: Path, name: str = "") -> Iterator[None]:
    """Reading errors as one line with the shard's name."""
    at = f" at tensor {name}" if name else ""
    try:
        yield
    except SafetensorError as error:
        raise UserError(
            f"{path}: truncated or corrupted{at} ({error}); download it again"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read{at} ({error.strerror or error})") from None


@dataclass(frozen=True)
class Unit:
    """One resumable step of a run: its files with their SHA-256, and what else to remember."""

    files: Mapping[str, str]
    memory: Mapping[str, Any]


class CheckpointWriter:
    """Writes a checkpoint unit by unit into a work folder, then gives the files their final names.

    A unit counts only when its record is on disk, which is written after its files. `run_key` says
    what the run depends on; a work folder left by a run with another key is refused.
    """

    def __init__(self, folder: Path, run_key: Mapping[str, Any]) -> None:
        self.folder = folder
        self.work = folder / WORK
        with writing(folder):
            refuse_foreign_files(folder)
            self.work.mkdir(parents=True, exist_ok=True)
            self._check_run_key(dict(run_key))

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
        self, unit: str, tensors: Iterable[tuple[str, torch.Tensor]], memory: Mapping[str, Any]
    ) -> Unit:
        """Write the unit's tensors, then its record."""
        return self.record(unit, self.write_files(unit, tensors), memory)

    def write_files(self, unit: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
        """Write tensors in shards of at most MAX_SHARD_BYTES; their SHA-256 by file name.

        They don't count before `record`.
        """
        with writing(self.folder):
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

    def read_back(self, files: Iterable[str]) -> PartReader:
        """What was written under these names."""
        return PartReader(self.work, list(files))

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

    def publish(self, written: Checkpoint, side_files: Mapping[str, bytes]) -> None:
        """Side files, config.json, and last the index; then the work folder goes."""
        index = {
            "metadata": {"total_size": sum(info.nbytes for info in written.infos.values())},
            "weight_map": {name: written.infos[name].shard for name in sorted(written.infos)},
        }
        with writing(self.folder):
            # config.json comes late: some engines load any folder with a config and shards.
            for name in sorted(side_files, key=lambda name: name == "config.json"):
                write_atomically(self.folder / name, side_files[name])
            write_atomically(self.folder / INDEX, to_json(index))
            # Without run.json no later run takes the remains for an unfinished one.
            (self.work / "run.json").unlink()
            shutil.rmtree(self.work)


class PartReader(Checkpoint):
    """The tensors of some shards of a work folder, read as a Checkpoint."""

    def __init__(self, folder: Path, shards: list[str]) -> None:
        self.folder = folder
        self.infos = {}
        for shard in shards:
            self.infos |= _shard_infos(folder, shard)
        self._open = None


def refuse_foreign_files(folder: Path) -> None:
    """Raises UserError when `folder` holds a finished checkpoint or files that are not ours."""
    with writing(folder):  # it may lie where not even looking is allowed
        if not folder.exists():
            return
        if not folder.is_dir():
            raise UserError(f"{folder}: is a file; choose a folder that does not exist yet")
        if (folder / WORK / "run.json").exists() or not any(folder.iterdir()):
            return
        if (folder / INDEX).exists() or (folder / SINGLE).exists():
            raise UserError(
                f"{folder}: already holds a finished checkpoint; choose another folder or delete it"
            )
        if [path.name for path in folder.iterdir()] == [WORK]:
            return
        raise UserError(
            f"{folder}: is not empty and holds no unfinished run; choose another folder"
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
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 of names, shapes and dtypes, of each shard's size and of 64 KiB from its middle.

    Tells one source from another without reading it all.
    """
    digest = hashlib.sha256()
    for name, info in sorted(checkpoint.infos.items()):
        digest.update(f"{name} {info.shape} {info.dtype}\n".encode())
    for shard in sorted({info.shard for info in checkpoint.infos.values()}):
        with (checkpoint.folder / shard).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(size // 2)
            digest.update(f"{size}\n".encode() + file.read(65536))
    return digest.hexdigest()


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
