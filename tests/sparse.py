"""Checkpoints of true sizes that take no room: headers, and files of holes.

Whoever reads names, shapes and dtypes sees a whole checkpoint; whoever reads values sees zeros.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llama4q.checkpoint import INDEX, TensorInfo

DTYPES = {
    torch.bfloat16: "BF16", torch.float32: "F32", torch.int32: "I32", torch.int64: "I64",
    torch.uint8: "U8", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
SHARD_BYTES = 4 * 10**9


def write(folder: Path, config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> Path:
    """A checkpoint of these tensors in `folder`, in as many shards as a real one; returns it."""
    folder.mkdir(parents=True)
    where: dict[str, str] = {}
    for number, names in enumerate(_shards(infos), 1):
        shard = f"model-{number:05d}.safetensors"
        _write_shard(folder / shard, {name: infos[name] for name in names})
        where |= dict.fromkeys(names, shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _shards(infos: Mapping[str, TensorInfo]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, info in infos.items():
        if shards[-1] and size + info.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += info.nbytes
    return shards


def _write_shard(path: Path, infos: Mapping[str, TensorInfo]) -> None:
    """Source: "Format" in the README of huggingface/safetensors."""
    entries, end = {}, 0
    for name, info in infos.items():
        start, end = end, end + info.nbytes
        dtype, shape = DTYPES[info.dtype], list(info.shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
