"""Grids and rounding against compressed-tensors' min-max observer and quantizer."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams

from llama4q.packing import pack
from llama4q.schemes import FP8, SCHEMES, fake_float8_tokens, round_to_nearest


@pytest.mark.parametrize("name", ["int4", "int4-g32", "int8"])
def test_rounding_against_compressed_tensors(name: str) -> None:
    scheme = SCHEMES[name]
    weight = torch.randn(256, 40, generator=torch.Generator().manual_seed(1))
    args = QuantizationArgs(
        num_bits=scheme.bits, strategy="group", group_size=scheme.group, symmetric=True
    )
    grouped = weight.T.reshape(40, -1, scheme.group or 0)
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    theirs = fake_quantize(weight.T, scale.to(torch.bfloat16).float(), zero, args)
    torch.testing.assert_close(round_to_nearest(weight, scheme).dequantize(), theirs.T)


def test_float8_saturates_and_keeps_zeros() -> None:
    weight = torch.zeros(128, 3)
    weight[0, 0], weight[1, 1] = 1e4, -1e-6
    found = round_to_nearest(weight, FP8)
    assert torch.isfinite(found.codes.float()).all()
    assert (found.scales > 0).all()
    torch.testing.assert_close(found.dequantize(), weight, rtol=0.07, atol=0)
    rows = torch.tensor([[1e6, -1.0, 0.0], [0.0, 0.0, 0.0]])
    assert torch.isfinite(fake_float8_tokens(rows)).all()
    torch.testing.assert_close(fake_float8_tokens(rows)[1], rows[1])


@pytest.mark.parametrize("name", ["int4", "fp8"])
def test_scales_are_those_that_every_engine_computes_with(name: str) -> None:
    """vLLM holds FP8 scales in F32, transformers 5.23 rounds them to BF16: values must agree."""
    scales = round_to_nearest(torch.randn(256, 40), SCHEMES[name]).scales
    assert torch.equal(scales.float(), scales.to(torch.bfloat16).float())


@pytest.mark.parametrize("name", [s.name for s in SCHEMES.values() if not s.bitsandbytes])
def test_stored_bytes_are_those_on_disk(name: str) -> None:
    scheme = SCHEMES[name]
    if not scheme.quantizes:
        assert scheme.stored_bytes(256, 48) == 2 * 256 * 48
        return
    tensors = pack("linear", round_to_nearest(torch.randn(256, 48), scheme))
    assert scheme.stored_bytes(256, 48) == sum(tensor.nbytes for _, tensor in tensors)
