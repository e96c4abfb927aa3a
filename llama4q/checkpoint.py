"""Sharded safetensors on disk: tensors by name. Knows nothing of Llama, layers, bits or writing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

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


class PartReader(Checkpoint):
    """The tensors of some shards of a work folder, read as a Checkpoint."""

    def __init__(self, folder: Path, shards: list[str]) -> None:
        self.folder = folder
        self.infos = {}
        for shard in shards:
            self.infos |= _shard_infos(folder, shard)
        self._open = None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
