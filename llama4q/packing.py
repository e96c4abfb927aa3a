"""The codes on disk: one quantized weight <-> the tensors that its format names for it.

Names, dtypes and shapes are those of compressed-tensors' `pack-quantized` (INT) and
`float-quantized` (FP8) formats, stored `[O, I]`, or bitsandbytes' (`bnb`). See docs/format.md.
Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import bnb
from .bnb import BnbWeight
from .checkpoint import Checkpoint
from .errors import UserError
from .schemes import FLOAT8, Kind, QuantizedWeight, Scheme

StoredWeight = QuantizedWeight | BnbWeight


def pack(name: str, weight: StoredWeight) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of module `name` on disk, as (tensor name, tensor) pairs, on the host."""
    for key, tensor in _packed(name, weight):
        yield key, tensor.cpu()


def _packed(name: str, weight: StoredWeight) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(weight, BnbWeight):
        yield from bnb.tensors(name, weight)
        return
    if weight.scheme.kind is Kind.FLOAT8:
        yield f"{name}.weight", weight.codes.T.contiguous()
        yield f"{name}.weight_scale", weight.scales.T.contiguous()
        return
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    inputs, outputs = weight.codes.shape
    yield f"{name}.weight_packed", pack_to_int32(weight.codes.T.contiguous(), weight.scheme.bits)
    yield f"{name}.weight_scale", weight.scales.T.contiguous()
    yield f"{name}.weight_shape", torch.tensor([outputs, inputs], dtype=torch.int64)


def is_quantized(checkpoint: Checkpoint, name: str) -> bool:
    """Whether module `name` is stored as codes and scales."""
    return f"{name}.weight_scale" in checkpoint or bnb.stored_as(checkpoint.infos, name) is not None


def unpack(checkpoint: Checkpoint, name: str) -> StoredWeight:
    """Module `name` back from disk. The scheme follows from names and shapes.

    Raises UserError for a layout other than those that llama4q writes.
    """
    if bnb.stored_as(checkpoint.infos, name) is not None:
        return bnb.read(checkpoint.infos, checkpoint.get, name)
    scale = checkpoint.get(f"{name}.weight_scale")
    if f"{name}.weight_packed" not in checkpoint:
        return _unpack_float8(checkpoint, name, scale)
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    unread = [
        f"{name}.{part}" for part in ("weight_zero_point", "weight_g_idx", "weight_global_scale")
    ]
    found = [part for part in unread if part in checkpoint]
    if found or f"{name}.weight_shape" not in checkpoint:
        raise UserError(
            f"{name}: stored with {found[0] if found else 'no weight_shape'}; "
            f"only symmetric INT weights of compressed-tensors' pack-quantized format are read"
        )
    packed = checkpoint.get(f"{name}.weight_packed")
    outputs, inputs = (int(size) for size in checkpoint.get(f"{name}.weight_shape"))
    bits = packed.shape[1] * 32 // inputs
    group = inputs // scale.shape[1]
    scheme = Scheme(f"int{bits}-g{group}", Kind.INT, bits, group)
    codes = unpack_from_int32(packed, bits, torch.Size((outputs, inputs)))
    return QuantizedWeight(scheme, codes.T, scale.T)


def _unpack_float8(checkpoint: Checkpoint, name: str, scale: torch.Tensor) -> QuantizedWeight:
    codes = checkpoint.get(f"{name}.weight")
    if codes.dtype != FLOAT8 or tuple(scale.shape) != (codes.shape[0], 1):
        raise UserError(
            f"{name}: {codes.dtype} codes with scales {tuple(scale.shape)}; "
            f"only E4M3 with one scale an output is read"
        )
    return QuantizedWeight(Scheme("fp8", Kind.FLOAT8, 8), codes.T, scale.T.float())
