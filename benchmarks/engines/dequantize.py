"""Read a Llama 4 checkpoint back to plain BF16 tensors under the source's fused names.

An opinion of its own: written from the description of the format, it neither imports llama4q or
compressed-tensors nor reads `quantization_config`. How many bits and how many columns share a
scale follows from the shapes of the stored tensors, so that an engine that goes by the
configuration and this file that goes by the bytes can disagree.

It knows pack-quantized INT4 and INT8 (symmetric, by group or by channel), FP8 weights with one
scale per output channel or per tensor, and unquantized tensors, fused or not. It doesn't know zero
points, other bit widths, FP4, block scales, or how activations are quantized.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

INDEX = "model.safetensors.index.json"
EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<expert>\d+)\.(?P<projection>\w+)\.weight$")
# What belongs to a quantized weight, or to stored keys and values, and is no tensor of the source.
COMPANIONS = ("weight_packed", "weight_scale", "weight_shape", "k_scale", "v_scale")


@contextmanager
def tensor_files(checkpoint: Path) -> Iterator[dict[str, Any]]:
    """The open file of every tensor name; nothing is read before it is asked for."""
    index = checkpoint / INDEX
    names = json.loads(index.read_text())["weight_map"].values() if index.exists() else []
    shards = sorted({checkpoint / name for name in names}) or sorted(
        checkpoint.glob("*.safetensors")
    )
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(shard, "pt")) for shard in shards]
        # safe_open is no mapping: it has keys() and cannot be iterated.
        yield {name: file for file in opened for name in file.keys()}  # noqa: SIM118


def unfused_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, dequantized to BF16; experts as they are stored."""
    with tensor_files(checkpoint) as files:
        stored = {name: file.get_tensor(name) for name, file in files.items()}
    weights = {}
    for name, tensor in stored.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight_packed":
            shape = tuple(stored[f"{module}.weight_shape"].tolist())
            weights[f"{module}.weight"] = unpack(tensor, shape, stored[f"{module}.weight_scale"])
        elif tensor.dtype == torch.float8_e4m3fn:
            weights[name] = scaled(tensor.float(), stored[f"{module}.weight_scale"])
        elif leaf not in COMPANIONS:
            weights[name] = tensor
    return weights


def unpack(packed: torch.Tensor, shape: tuple[int, int], scale: torch.Tensor) -> torch.Tensor:
    """BF16 weight [out, in] of int32 words [out, in * bits / 32] that hold codes + 2^(bits-1)."""
    rows, columns = shape
    if packed.shape[0] != rows or packed.shape[1] * 32 % columns:
        raise ValueError(f"packed words {tuple(packed.shape)} do not hold a weight of {shape}")
    bits = packed.shape[1] * 32 // columns
    unsigned = packed.contiguous().view(torch.uint8)  # little end first, so bytes are in order
    if bits == 4:
        unsigned = torch.stack((unsigned & 15, unsigned >> 4), dim=-1).flatten(1)
    elif bits != 8:
        raise ValueError(f"{bits} bits in a packed weight of {shape}: only 4 and 8 are known")
    return scaled(unsigned.float() - 2 ** (bits - 1), scale)


def scaled(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes [out, in] times scales [out, groups], [out, 1] or [1], rounded to BF16 at the end."""
    scale = scale.float()
    if scale.ndim < 2:
        return (codes * scale).to(torch.bfloat16)
    if scale.shape[0] != codes.shape[0] or codes.shape[1] % scale.shape[1]:
        raise ValueError(f"scales {tuple(scale.shape)} do not divide a weight {tuple(codes.shape)}")
    groups = codes.reshape(*scale.shape, -1) * scale.unsqueeze(-1)
    return groups.reshape(codes.shape).to(torch.bfloat16)


def fuse_experts(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stack per-expert weights [out, in] into gate_up_proj [E, D, 2F] and down_proj [E, F, D]."""
    fused = {name: tensor for name, tensor in weights.items() if not EXPERT.match(name)}
    counts: dict[str, int] = {}
    for match in filter(None, map(EXPERT.match, weights)):
        experts = match["experts"]
        counts[experts] = max(counts.get(experts, 0), int(match["expert"]) + 1)
    for experts, count in counts.items():
        gate, up, down = (
            [transposed(weights, f"{experts}.{expert}.{name}.weight") for expert in range(count)]
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        fused[f"{experts}.gate_up_proj"] = torch.cat((torch.stack(gate), torch.stack(up)), dim=-1)
        fused[f"{experts}.down_proj"] = torch.stack(down)
    return fused


def transposed(weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in weights:
        raise ValueError(f"{name} is not in the checkpoint, although its neighbours are")
    return weights[name].T


def digest(weight: torch.Tensor) -> str:
    """A name for the bits of a BF16 tensor, so that two processes can compare theirs."""
    return hashlib.sha256(weight.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class StoredScheme:
    """How one weight lies in the files: 'int4', 'int8', 'float8', 'bf16', ... and its scales."""

    values: str
    shape: tuple[int, ...]
    scales: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return self.values + (f" with scales {list(self.scales)}" if self.scales else "")

    def agrees(self, values: str, strategy: str | None, group_size: int | None) -> bool:
        """Would weights declared in a configuration's words be stored like this?"""
        rows, columns = self.shape[0], self.shape[-1]
        declared = {
            "group": (rows, columns // (group_size or columns)),
            "channel": (rows, 1),
            "tensor": (1,),
        }
        return values == self.values and declared.get(strategy or "") == self.scales


def stored_schemes(checkpoint: Path) -> dict[str, StoredScheme]:
    """Scheme of every module with a weight, and of fused experts, by name.

    Only the files' headers are read, and the two numbers of each `weight_shape`."""
    schemes = {}
    with tensor_files(checkpoint) as files:
        for name, file in files.items():
            module, _, leaf = name.rpartition(".")
            if leaf in ("weight", "weight_packed"):
                schemes[module] = stored_scheme(files, module)
            elif leaf in ("gate_up_proj", "down_proj"):
                schemes[name] = StoredScheme("fused", tuple(file.get_slice(name).get_shape()))
    return schemes


def stored_scheme(files: dict[str, Any], module: str) -> StoredScheme:
    scale, packed, weight = (
        f"{module}.{leaf}" for leaf in ("weight_scale", "weight_packed", "weight")
    )
    scales = tuple(files[scale].get_slice(scale).get_shape()) if scale in files else None
    if packed in files:
        dimensions = f"{module}.weight_shape"
        shape = tuple(files[dimensions].get_tensor(dimensions).tolist())
        words = files[packed].get_slice(packed).get_shape()[1]
        return StoredScheme(f"int{words * 32 // shape[1]}", shape, scales)
    stored = files[weight].get_slice(weight)
    dtype = stored.get_dtype()
    values = "float8" if dtype == "F8_E4M3" else dtype.lower()
    return StoredScheme(values, tuple(stored.get_shape()), scales)
