"""Linears of compressed-tensors checkpoints in layouts that llama4q does not write.

What others make of Llama 4: FP8 by block or tensor, integers with zero points or one scale an
output, FP4. compressed-tensors itself decodes the weights; what an engine makes of a linear's
inputs follows from config.json. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .checkpoint import Checkpoint
from .config import read_config_json
from .errors import UserError, one_line
from .schemes import fake_float8_tokens, positive

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

PARTS = (
    "weight", "weight_packed", "weight_shape", "weight_scale", "weight_global_scale",
    "weight_zero_point", "input_scale", "input_global_scale",
)  # fmt: skip
INT8_MAX = 127

Inputs = Callable[[torch.Tensor], torch.Tensor]


class ForeignSchemes:
    """Which linears of a checkpoint are stored in a foreign layout, and how."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError for a quantization_config that compressed-tensors does not know."""
        # what a run has written so far has none
        raw = read_config_json(folder) if (folder / "config.json").exists() else {}
        found = raw.get("quantization_config") or {}
        self.folder = folder
        self.groups: list[QuantizationScheme] = []
        if found.get("quant_method") == "compressed-tensors":
            self.groups = [scheme for scheme in _schemes(folder, found) if not _written(scheme)]

    def of(self, name: str) -> QuantizationScheme | None:
        """How linear `name` is stored, if it is in a foreign layout."""
        if not self.groups:
            return None
        from compressed_tensors.utils.match import match_name

        for scheme in self.groups:
            if any(target == "Linear" or match_name(name, target) for target in scheme.targets):
                return scheme
        return None


def _schemes(folder: Path, config: dict[str, Any]) -> list[QuantizationScheme]:
    from compressed_tensors.quantization import QuantizationConfig

    try:
        groups = QuantizationConfig.model_validate(config).config_groups.values()
    except ValueError as error:
        raise UserError(
            f"{folder}: compressed-tensors does not know this quantization_config "
            f"({one_line(error)}); compare a checkpoint of a newer or another tool"
        ) from None
    return [
        scheme if scheme.format else scheme.model_copy(update={"format": config.get("format")})
        for scheme in groups
        if scheme.weights is not None
    ]


def _written(scheme: QuantizationScheme) -> bool:
    """Whether llama4q writes it, and `packing` reads it."""
    weights, inputs = scheme.weights, scheme.input_activations
    if weights.type == "int":
        return (
            scheme.format == "pack-quantized"
            and bool(weights.symmetric)
            and weights.strategy in ("group", "channel")
            and inputs is None
        )
    by_token = inputs is not None and inputs.strategy == "token" and inputs.type == "float"
    return weights.num_bits == 8 and weights.strategy == "channel" and by_token


def read(
    checkpoint: Checkpoint, name: str, scheme: QuantizationScheme
) -> tuple[torch.Tensor, Inputs | None]:
    """A weight `[O, I]`, F32 or as the format has it, and what an engine does to its inputs.

    Raises UserError for tensors that do not fit the scheme.
    """
    from compressed_tensors.compressors import BaseCompressor

    stored = {
        part: checkpoint.get(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in checkpoint
    }
    if stored["weight_scale"].dtype in (torch.bfloat16, torch.float16):
        stored["weight_scale"] = stored["weight_scale"].float()  # products are not rounded
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    try:
        weight: torch.Tensor = compressor.decompress(stored, scheme)["weight"]
    except (KeyError, RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise UserError(
            f"{checkpoint.folder}: {name} is not stored as config.json says, "
            f"{scheme.format} ({one_line(error)}); download it again"
        ) from None
    return weight, _inputs(name, scheme.input_activations, stored)


def _inputs(
    name: str, args: QuantizationArgs | None, stored: dict[str, torch.Tensor]
) -> Inputs | None:
    """Source: vLLM's `CompressedTensors*` schemes."""
    if args is None:
        return None
    if args.strategy == "token" and args.num_bits == 8:
        return fake_float8_tokens if args.type == "float" else fake_int8_tokens
    if args.dynamic is False and "input_scale" not in stored:
        raise UserError(
            f"{name}: config.json names a scale for its inputs and there is no "
            f"{name}.input_scale; download the checkpoint again"
        )
    scale = None if args.dynamic else stored["input_scale"].float()
    return partial(_fake, args, scale, stored.get("input_global_scale"))


def fake_int8_tokens(inputs: torch.Tensor) -> torch.Tensor:
    """Inputs `[..., I]` rounded to INT8 with one dynamic scale a token, as vLLM does it."""
    rows = inputs.float()
    scales = positive(rows.abs().amax(dim=-1, keepdim=True) / INT8_MAX)
    return ((rows / scales).round() * scales).to(inputs.dtype)


def _fake(
    args: QuantizationArgs,
    scale: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    inputs: torch.Tensor,
) -> torch.Tensor:
    """Inputs `[..., I]` as they are after rounding, by compressed-tensors."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    values = inputs.float()
    if scale is None:
        scale, zero = compute_dynamic_scales_and_zp(values, args, None, global_scale)
    else:
        zero = torch.zeros_like(scale)
    rounded: torch.Tensor = fake_quantize(values, scale, zero, args, global_scale)
    return rounded.to(inputs.dtype)
