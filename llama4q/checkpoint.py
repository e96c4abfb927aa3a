"""Sharded safetensors on disk: tensors by name. Knows nothing of Llama, layers, bits or writing."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .device import HOST, arrived
from .errors import UserError
from .stopping import stop_if_asked

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PIECE = 16 * 2**20  # bytes read between two looks at whether to stop
LENGTH = 8  # bytes in which a shard says how long its header is
HASHED = 2**20  # bytes at a time; a core's cache holds them

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
    start: int  # its first byte in the shard

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * int(torch.Size(self.shape).numel())


@dataclass(frozen=True)
class State:
    """What tells that a file is still the same."""

    size: int
    modified: int  # nanoseconds since 1970

    def __str__(self) -> str:
        return f"{self.size} bytes of {datetime.fromtimestamp(self.modified / 1e9)}"


class Checkpoint:
    """Tensors by name from the safetensors files of one folder; opening reads headers only.

    They come on `device`.
    """

    infos: dict[str, TensorInfo]

    def __init__(self, folder: Path, device: torch.device = HOST) -> None:
        """Raises UserError when the index or a shard is missing, truncated or out of the folder."""
        self.device = device
        index = read_index(folder)
        self._open(folder, [SINGLE] if index is None else sorted(set(index.values())))
        if index is not None:
            self.infos = indexed(self.infos, index, folder)

    def _open(self, folder: Path, shards: Sequence[str]) -> None:
        self.folder = folder
        self.states = {shard: opened_state(folder / shard) for shard in shards}
        self.infos = {}
        for shard in shards:
            self.infos |= shard_infos(folder, shard)

    def __contains__(self, name: str) -> bool:
        return name in self.infos

    def names(self) -> list[str]:
        return list(self.infos)

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(info.nbytes for info in self.infos.values())

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
        info = self.info(name)
        return self._read(name, info.start, info.shape)

    def get_row(self, name: str, row: int) -> torch.Tensor:
        """Entry `row` of the first dimension (one expert of a fused tensor), the rest unread."""
        info = self.info(name)
        rows = info.shape[0]
        skipped = range(rows)[row]  # IndexError for a row that there is not
        return self._read(name, info.start + skipped * (info.nbytes // rows), info.shape[1:])

    def _read(self, name: str, start: int, shape: tuple[int, ...]) -> torch.Tensor:
        """What lies from byte `start` on in the shard of tensor `name`, as a tensor of `shape`.

        Read and not mapped, so that a failing disk or a file cut short is an error and no SIGBUS.
        The shard is opened each time: threads may read at once, and see the file that is there now.
        """
        info = self.infos[name]
        path = self._path(info.shard)
        size = info.dtype.itemsize * torch.Size(shape).numel()
        raw = torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        with naming_errors(path, name), path.open("rb", buffering=0) as file:
            read = _fill(memoryview(raw.numpy().data), file.fileno(), start)
            self._check_unchanged(info.shard, _state(file.fileno()))
            if read < raw.nbytes:
                raise OSError(errno.EIO, f"{raw.nbytes - read} bytes are missing")
        return arrived(raw.view(info.dtype).view(shape), self.device)

    def _path(self, shard: str) -> Path:
        return self.folder / shard

    def _check_unchanged(self, shard: str, now: State) -> None:
        then = self.states[shard]
        if now != then:
            raise UserError(
                f"{self.folder / shard}: was changed while in use ({then} then, {now} now); "
                f"let nothing write to it, and repeat the command"
            )


def read_index(folder: Path) -> dict[str, str] | None:
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
        check_inside(shard, path)
    return shards


def check_inside(name: str, listing: Path) -> None:
    """Raises UserError when a file that `listing` names would not lie beside it."""
    if Path(name).name != name or name in ("", ".", "..") or "\0" in name:
        raise UserError(f"{listing}: names {name!r}, outside the folder; refused")


def indexed(
    found: Mapping[str, TensorInfo], index: Mapping[str, str], folder: Path
) -> dict[str, TensorInfo]:
    """Of the tensors found, those that the index names, in its order."""
    for name, shard in index.items():
        if name not in found or found[name].shard != shard:
            raise UserError(f"{folder / shard}: tensor {name} of the index is not in it")
    return {name: found[name] for name in index}


def shard_infos(folder: Path, shard: str) -> dict[str, TensorInfo]:
    """The tensors of one shard by its header."""
    path = folder / shard
    with naming_errors(path), path.open("rb") as file:
        with safe_open(str(path), framework="pt"):
            pass  # it knows whether the header is sound and the file as long as it says
        length = header_length(file.read(LENGTH))
        return header_infos(path, file.read(length))


def header_length(start: bytes) -> int:
    """Bytes of the header of a shard that begins with `start`."""
    return int.from_bytes(start[:LENGTH], "little")


def header_infos(path: Path | str, header: bytes) -> dict[str, TensorInfo]:
    """The tensors of the shard at `path`: 8 bytes of length, its header in JSON, then their bytes.

    Raises UserError for a dtype that is none of DTYPES.
    """
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    infos = {}
    for name, entry in entries.items():
        kind, start = entry["dtype"], LENGTH + len(header) + entry["data_offsets"][0]
        if kind not in DTYPES:
            raise UserError(f"{path}: tensor {name} has dtype {kind}, which llama4q can't read")
        infos[name] = TensorInfo(Path(path).name, tuple(entry["shape"]), DTYPES[kind], start)
    return infos


def opened_state(path: Path) -> State:
    with naming_errors(path):
        try:
            return _state(path)
        except FileNotFoundError:
            raise UserError(
                f"{path}: this shard of the index is missing; download it again"
            ) from None


def _state(file: Path | int) -> State:
    """Of a file by path or descriptor."""
    found = os.stat(file)
    return State(found.st_size, found.st_mtime_ns)


def _fill(buffer: memoryview, descriptor: int, start: int) -> int:
    """Read from byte `start` on until `buffer` is full or the file ends; how many bytes."""
    done = 0
    while done < len(buffer):
        stop_if_asked()  # a thread that reads ahead would hold up the end of the process
        read = os.preadv(descriptor, [buffer[done : done + PIECE]], start + done)
        if not read:
            break
        done += read
    return done


@contextlib.contextmanager
def naming_errors(path: Path, name: str = "") -> Iterator[None]:
    """Reading errors as one line with the shard's name."""
    at = f" at tensor {name}" if name else ""
    try:
        yield
    except SafetensorError as error:
        raise UserError(
            f"{path}: truncated or corrupted{at} ({error}); download it again"
        ) from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read{at} ({error.strerror or error}); "
            f"mend that and repeat the command"
        ) from None


class PartReader(Checkpoint):
    """The tensors of some shards of a work folder, read as a Checkpoint."""

    def __init__(self, folder: Path, shards: list[str], device: torch.device = HOST) -> None:
        self.device = device
        self._open(folder, shards)


def sha256(path: Path, read: Callable[[int], None] = lambda count: None) -> str:
    """Raises UserError when the file cannot be read. `read` is told each number of bytes."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(HASHED))
    with naming_errors(path), path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            read(count)
    return digest.hexdigest()


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 of names, shapes and dtypes, of each shard's size and of 64 KiB from its middle.

    Tells one source from another without reading it all.
    """
    digest = hashlib.sha256()
    for name, info in sorted(checkpoint.infos.items()):
        digest.update(f"{name} {info.shape} {info.dtype}\n".encode())
    for shard in sorted({info.shard for info in checkpoint.infos.values()}):
        path = checkpoint.folder / shard
        with naming_errors(path), path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(size // 2)
            digest.update(f"{size}\n".encode() + file.read(65536))
    return digest.hexdigest()
