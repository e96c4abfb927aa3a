"""Codes on disk against compressed-tensors' own decompressor, and a bit-by-bit reading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

from llama4q.checkpoint import PartReader
from llama4q.errors import UserError
from llama4q.packing import pack, unpack
from llama4q.schemes import SCHEMES, Kind, QuantizedWeight, round_to_nearest

QUANTIZING = [
    name
    for name, scheme in SCHEMES.items()
    if scheme.quantizes and not scheme.bitsandbytes  # those: tests/test_bnb.py
]


def random_weight(name: str) -> QuantizedWeight:
    weight = torch.randn(256, 48, generator=torch.Generator().manual_seed(0))
    weight[:, 3] = 0  # an output without weights must not give a scale of zero
    return round_to_nearest(weight, SCHEMES[name])


def written(folder: Path, weight: QuantizedWeight) -> PartReader:
    save_file(dict(pack("linear", weight)), str(folder / "part.safetensors"))
    return PartReader(folder, ["part.safetensors"])


@pytest.mark.parametrize("name", QUANTIZING)
def test_round_trip(name: str, tmp_path: Path) -> None:
    weight = random_weight(name)
    back = unpack(written(tmp_path, weight), "linear")
    assert isinstance(back, QuantizedWeight)
    assert (back.scheme.kind, back.scheme.bits) == (weight.scheme.kind, weight.scheme.bits)
    assert torch.equal(back.codes.float(), weight.codes.float())
    assert torch.equal(back.dequantize(), weight.dequantize())


@pytest.mark.parametrize("name", QUANTIZING)
def test_dequantized_against_compressed_tensors(name: str, tmp_path: Path) -> None:
    """Its decompressor, fed with the tensors that we write."""
    weight = random_weight(name)
    integer = weight.scheme.kind is Kind.INT
    args = QuantizationArgs(
        num_bits=weight.scheme.bits,
        type="int" if integer else "float",
        strategy="group" if integer else "channel",
        group_size=weight.scheme.group,
        symmetric=True,
    )
    file_format = "pack-quantized" if integer else "float-quantized"
    theirs = BaseCompressor.get_value_from_registry(file_format).decompress(
        {key.removeprefix("linear."): tensor for key, tensor in pack("linear", weight)},
        QuantizationScheme(targets=["Linear"], weights=args, format=file_format),
    )["weight"]
    torch.testing.assert_close(theirs.float(), weight.dequantize().T, atol=0, rtol=2**-8)


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_bits_one_by_one(name: str) -> None:
    """Element i is at bit b * i of its row, counted through 32-bit words, plus 2^(b-1)."""
    weight = random_weight(name)
    bits = weight.scheme.bits
    words = dict(pack("linear", weight))["linear.weight_packed"]
    for output, position in [(0, 0), (5, 1), (47, 255), (3, 130), (20, 77)]:
        word = int(words[output, position * bits // 32]) & 0xFFFFFFFF
        stored = word >> (bits * position % 32) & (2**bits - 1)
        assert stored - 2 ** (bits - 1) == int(weight.codes[position, output])


def test_other_layouts_are_refused(tmp_path: Path) -> None:
    tensors = dict(pack("linear", random_weight("int4")))
    tensors["linear.weight_zero_point"] = torch.zeros(6, 2, dtype=torch.int32)
    save_file(tensors, str(tmp_path / "part.safetensors"))
    with pytest.raises(UserError, match="only symmetric"):
        unpack(PartReader(tmp_path, ["part.safetensors"]), "linear")
