"""How one weight matrix is stored: its scheme, the grid of its codes, and round-to-nearest.

Weights here are in-major, `[I, O]`: a row holds what one input feature sends to every output, the
layout in which Llama 4 stores its experts. Knows nothing of models, names or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
FLOAT8_MAX_BYTE = 0x7E
NF4_BLOCK = 64


class Kind(Enum):
    """What a code is."""

    INT = "int"  # symmetric integers, one BF16 scale for each group of inputs and output
    FLOAT8 = "float8"  # E4M3, one F32 scale an output; activations E4M3, one scale a token
    NF4 = "nf4"  # bitsandbytes' 16 normal quantiles, blocks of 64, scales quantized again
    LLM_INT8 = "llm.int8"  # bitsandbytes' integers, one F32 scale an output
    BF16 = "bf16"  # as in the source


@dataclass(frozen=True)
class Scheme:
    """How one weight matrix is stored. `group` counts inputs that share a scale."""

    name: str
    kind: Kind
    bits: int
    group: int | None = None

    @property
    def code_min(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def code_max(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """The value of the code nearest to each of `values`, which count in steps; saturates."""
        if self.kind is Kind.FLOAT8:
            return to_float8(values).float()
        return torch.round(values).clamp_(self.code_min, self.code_max)

    def second_nearest(self, values: torch.Tensor, nearest: torch.Tensor) -> torch.Tensor:
        """The neighbour of `nearest` on the other side of `values`; `nearest` at the grid's end."""
        above = values > nearest
        if self.kind is Kind.FLOAT8:
            return _float8_neighbour(nearest, above)
        found = nearest + torch.where(above, 1.0, -1.0)
        return found.clamp_(self.code_min, self.code_max)

    def stored_codes(self, values: torch.Tensor) -> torch.Tensor:
        """Values of codes in the dtype in which they are stored."""
        return values.to(FLOAT8 if self.kind is Kind.FLOAT8 else torch.int8)

    @property
    def calibrates(self) -> bool:
        """Whether the solver can look for better codes than rounding gives."""
        return self.kind in (Kind.INT, Kind.FLOAT8)

    @property
    def quantizes(self) -> bool:
        return self.kind is not Kind.BF16

    @property
    def bitsandbytes(self) -> bool:
        """Whether bitsandbytes does the rounding and names the tensors: `bnb.quantize`."""
        return self.kind in (Kind.NF4, Kind.LLM_INT8)

    def stored_bytes(self, inputs: int, outputs: int) -> int:
        """Bytes on disk of an `[inputs, outputs]` matrix: codes, scales and `weight_shape`."""
        if self.kind is Kind.BF16:
            return 2 * inputs * outputs
        if self.kind is Kind.FLOAT8:
            return inputs * outputs + 4 * outputs
        if self.bitsandbytes:
            from .bnb import layout

            tensors = layout(self, inputs, outputs).values()
            return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in tensors)
        assert self.group is not None
        words = -(-inputs * self.bits // 32)
        return 4 * words * outputs + 2 * (inputs // self.group) * outputs + 16


BF16 = Scheme("bf16", Kind.BF16, 16)
FP8 = Scheme("fp8", Kind.FLOAT8, 8)
BNB_NF4 = Scheme("bnb-nf4", Kind.NF4, 4, NF4_BLOCK)
BNB_INT8 = Scheme("bnb-int8", Kind.LLM_INT8, 8)
SCHEMES = {
    scheme.name: scheme
    for scheme in (
        BF16,
        FP8,
        Scheme("int3", Kind.INT, 3, 128),
        Scheme("int4", Kind.INT, 4, 128),
        Scheme("int4-g64", Kind.INT, 4, 64),
        Scheme("int4-g32", Kind.INT, 4, 32),
        Scheme("int8", Kind.INT, 8, 128),
        BNB_NF4,
        BNB_INT8,
    )
}


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes `[I, O]` (int8 or E4M3) and scales: `[I/group, O]` BF16, or `[1, O]` F32 for FP8."""

    scheme: Scheme
    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """`(I, O)`."""
        inputs, outputs = self.codes.shape
        return inputs, outputs

    def dequantize(self) -> torch.Tensor:
        """The weight that an engine multiplies with, F32 `[I, O]`; BF16 engines round it."""
        if self.scheme.kind is Kind.FLOAT8:
            return self.codes.float() * self.scales
        inputs, outputs = self.codes.shape
        grouped = self.codes.reshape(self.scales.shape[0], -1, outputs).float()
        return (grouped * self.scales.float()[:, None, :]).view(inputs, outputs)


def absmax_scales(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The scales at which no weight is clipped, F32 `[I/group, O]` (FP8: `[1, O]`).

    INT scales divide by (code_max - code_min) / 2, as compressed-tensors' min-max observer does.
    """
    inputs, outputs = weight.shape
    group = scheme.group or inputs
    largest = weight.float().view(inputs // group, group, outputs).abs().amax(dim=1)
    if scheme.kind is Kind.FLOAT8:
        return positive(largest / FLOAT8_MAX)
    return positive(largest / ((scheme.code_max - scheme.code_min) / 2))


def positive(scales: torch.Tensor) -> torch.Tensor:
    """Scales of all-zero groups become 1 (their codes are 0), so that none divides by zero."""
    return torch.where(scales > 0, scales, torch.ones_like(scales))


def round_to_nearest(weight: torch.Tensor, scheme: Scheme) -> QuantizedWeight:
    """Plain rounding of an in-major weight `[I, O]` with `absmax_scales`; needs no data."""
    assert scheme.kind in (Kind.INT, Kind.FLOAT8), scheme
    stored = storable(absmax_scales(weight, scheme))
    if scheme.kind is Kind.FLOAT8:
        # F32 on disk, as vLLM holds them, with BF16's values, to which transformers rounds them
        exact = stored.float()
        return QuantizedWeight(scheme, to_float8(weight.float() / exact), exact)
    inputs, outputs = weight.shape
    grouped = weight.float().view(stored.shape[0], -1, outputs)
    codes = scheme.stored_codes(scheme.nearest(grouped / stored.float()[:, None, :]))
    return QuantizedWeight(scheme, codes.view(inputs, outputs), stored)


def storable(scales: torch.Tensor) -> torch.Tensor:
    """Scales as engines will have them, BF16. Codes must be found against these, not F32 ones."""
    stored = scales.to(torch.bfloat16)
    return torch.where(stored != 0, stored, torch.ones_like(stored))


def to_float8(values: torch.Tensor) -> torch.Tensor:
    """To E4M3, saturating: PyTorch's cast alone would turn large values into NaN."""
    return values.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)


def _float8_neighbour(codes: torch.Tensor, above: torch.Tensor) -> torch.Tensor:
    """The next E4M3 value above each code, or below; the code itself beyond the largest one.

    Sign and magnitude: within one sign the bytes of E4M3 count up as the values do.
    """
    stored = codes.to(FLOAT8).view(torch.uint8).to(torch.int16)
    magnitude, negative = stored & 0x7F, stored >= 0x80
    signed = torch.where(negative, -magnitude, magnitude) + torch.where(above, 1, -1)
    signed = signed.clamp(-FLOAT8_MAX_BYTE, FLOAT8_MAX_BYTE)
    found = torch.where(signed < 0, 0x80 - signed, signed).to(torch.uint8)
    return found.view(FLOAT8).float()


def fake_float8_tokens(inputs: torch.Tensor) -> torch.Tensor:
    """Activations as an FP8 engine sees them: one dynamic scale a row, `[..., I]` -> same shape.

    Source: vLLM's dynamic per-token quantization; compressed-tensors' `strategy: token`.
    """
    rows = inputs.float()
    scales = positive(rows.abs().amax(dim=-1, keepdim=True) / FLOAT8_MAX)
    return (to_float8(rows / scales).float() * scales).to(inputs.dtype)
