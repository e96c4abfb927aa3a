"""What a checkpoint is made of: the architecture, and where the parameters and the bytes are.

Reads names, shapes and dtypes, of an original or of a quantized checkpoint; how many weights packed
codes stand for follows from config.json. Knows nothing of the weights' values, nor of GPUs.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .bnb import stored_as
from .checkpoint import TensorInfo
from .config import ModelConfig, read_config
from .errors import UserError
from .source import Source

_LAYER = r"model\.layers\.\d+\."
# Component -> its tensors, by the checkpoint's names without the text prefix; the first match wins.
COMPONENTS = {
    "embeddings": r"model\.embed_tokens\.",
    "lm_head": r"lm_head\.",
    "kv_scales": _LAYER + r"self_attn\.(k_proj\.|v_proj\.)?[kv]_scale$",
    "attention": _LAYER + r"self_attn\.",
    "router": _LAYER + r"feed_forward\.router\.",
    "routed_experts": _LAYER + r"feed_forward\.experts\.",
    "shared_experts": _LAYER + r"feed_forward\.shared_expert\.",
    "dense_feed_forward": _LAYER + r"feed_forward\.(gate|up|down)_proj\.",
    "norms": rf"model\.norm\.|{_LAYER}(input|post_attention)_layernorm\.",
    "vision": r"vision_model\.",
    "projector": r"multi_modal_projector\.",
    "other": r"",
}
TEXT = tuple(COMPONENTS)[:9]
# What describes stored codes and is no weight itself: scales, zero points, shapes, and
# bitsandbytes' statistics behind `.weight.`.
_NO_WEIGHT = re.compile(
    r"_scale(_2)?$|\.weight_(shape|zero_point|g_idx|format)$|\.weight\.\w|\.SCB$"
)
_CODES = re.compile(r"\.weight(_packed)?$|\.experts\.(gate_up|down)_proj$")
_CODE_KINDS = {
    torch.int32: "INT", torch.int8: "INT", torch.uint8: "FP",
    torch.float8_e4m3fn: "FP", torch.float8_e5m2: "FP",
}  # fmt: skip
_PLAIN = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True)
class Component:
    """One part of the model: its tensors in the files and the weights that they stand for."""

    name: str
    tensors: int
    parameters: int  # weights; scales and shapes count as bytes only
    nbytes: int
    formats: Mapping[str, int]  # how weights are stored ("BF16", "INT4 g128") -> parameters


@dataclass(frozen=True)
class Summary:
    """A checkpoint at a glance."""

    config: ModelConfig
    components: tuple[Component, ...]  # those that the checkpoint has, in the order of COMPONENTS
    experts_layout: str  # "fused", "unfused", "mixed" (engines fail on that), "none"
    quantized: bool

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.components)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: the weight bytes of a memory plan."""
        return sum(part.nbytes for part in self.components)

    @property
    def active_parameters(self) -> int:
        """Text weights that one token meets: one routed expert a layer and all the rest."""
        text = sum(part.parameters for part in self.components if part.name in TEXT)
        routed = sum(part.parameters for part in self.components if part.name == "routed_experts")
        return text - routed + routed // max(1, self.config.num_experts)

    @property
    def has_kv_scales(self) -> bool:
        """Whether vLLM will keep keys and values in FP8 without being asked."""
        return any(part.name == "kv_scales" for part in self.components)

    def to_json(self) -> dict[str, Any]:
        """The summary for machines; bytes and weights as integers."""
        config = self.config
        return {
            "layers": config.num_layers,
            "global_layers": config.num_layers - len(config.chunked_layers),
            "chunked_layers": len(config.chunked_layers),
            "chunk_size": config.chunk_size,
            "moe_layers": len(config.moe_layers),
            "experts": config.num_experts if config.moe_layers else 0,
            "hidden_size": config.hidden_size,
            "expert_size": config.expert_size,
            "dense_size": config.dense_size,
            "heads": config.num_heads,
            "kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "vocab_size": config.vocab_size,
            "max_positions": config.max_positions,
            "qk_norm": config.qk_norm,
            "vision": config.has_vision,
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
            "bytes": self.nbytes,
            "quantized": self.quantized,
            "experts_layout": self.experts_layout,
            "components": {
                part.name: {
                    "tensors": part.tensors,
                    "parameters": part.parameters,
                    "bytes": part.nbytes,
                    "formats": dict(part.formats),
                }
                for part in self.components
            },
        }


def inspect_checkpoint(source: Source) -> Summary:
    """The summary of a checkpoint. Raises UserError when it is none of Llama 4."""
    config, checkpoint = read_config(source.folder), source.checkpoint()
    # config.json has no sizes for a vision tower that another tool packed; the files do
    shapes = {
        name: tuple(int(size) for size in checkpoint.get(name))
        for name in checkpoint.infos
        if name.endswith(".weight_shape") and component_of(config, name) not in TEXT
    }
    return summarize(config, checkpoint.infos, shapes)


def summarize(
    config: ModelConfig,
    infos: Mapping[str, TensorInfo],
    stored_shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Summary:
    """The summary of tensors of these names, shapes and dtypes.

    `stored_shapes` holds the values of `weight_shape` tensors outside the text model. Raises
    UserError for packed codes whose shape neither these nor `config` tell.
    """
    tensors: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    formats: dict[str, Counter[str]] = {name: Counter() for name in COMPONENTS}
    quantized = False
    for name, info in infos.items():
        part = component_of(config, name)
        tensors[part] += 1
        nbytes[part] += info.nbytes
        if not _NO_WEIGHT.search(name):
            shape = _logical_shape(config, part, name, info, stored_shapes or {})
            formats[part][_format(name, info, shape, infos)] += math.prod(shape)
            quantized |= _holds_codes(name, info)
    parts = (
        Component(part, tensors[part], formats[part].total(), nbytes[part], dict(formats[part]))
        for part in COMPONENTS
        if tensors[part]
    )
    return Summary(config, tuple(parts), _experts_layout(config, infos), quantized)


def component_bytes(config: ModelConfig, infos: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Bytes of the tensors of each component that there is, in the order of COMPONENTS."""
    nbytes: Counter[str] = Counter()
    for name, info in infos.items():
        nbytes[component_of(config, name)] += info.nbytes
    return {part: nbytes[part] for part in COMPONENTS if nbytes[part]}


def component_of(config: ModelConfig, name: str) -> str:
    """The key of COMPONENTS that tensor `name` belongs to."""
    stem = name.removeprefix(config.prefix)
    return next(part for part, pattern in COMPONENTS.items() if re.match(pattern, stem))


def _holds_codes(name: str, info: TensorInfo) -> bool:
    return info.dtype in _CODE_KINDS and _CODES.search(name) is not None


def _logical_shape(
    config: ModelConfig,
    part: str,
    name: str,
    info: TensorInfo,
    stored_shapes: Mapping[str, tuple[int, ...]],
) -> tuple[int, ...]:
    """Shape of the weights that a tensor stands for: its own unless several share a word."""
    if not _holds_codes(name, info):
        return info.shape
    if info.dtype is torch.uint8:  # only 4-bit floats are stored in bytes, two in each
        return (*info.shape[:-1], 2 * info.shape[-1])
    if info.dtype is not torch.int32:
        return info.shape
    module = name.removesuffix(".weight_packed")
    shape = stored_shapes.get(f"{module}.weight_shape")
    if shape is None and part in TEXT:
        shape = _linear_shapes(config, part).get(module.rsplit(".", 1)[-1])
    if shape is None:
        raise UserError(
            f"tensor {name} holds packed codes without a weight_shape beside it; "
            f"llama4q reads compressed-tensors checkpoints, write it again with that library"
        )
    return shape


def _linear_shapes(config: ModelConfig, part: str) -> dict[str, tuple[int, int]]:
    """[out, in] of the linears of a component by their last name."""
    width, heads = config.hidden_size, config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    inner = config.dense_size if part == "dense_feed_forward" else config.expert_size
    return {
        "q_proj": (heads, width), "k_proj": (kv, width), "v_proj": (kv, width),
        "o_proj": (width, heads), "router": (config.num_experts, width),
        "gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner),
        "lm_head": (config.vocab_size, width), "embed_tokens": (config.vocab_size, width),
    }  # fmt: skip


def _format(
    name: str, info: TensorInfo, shape: tuple[int, ...], infos: Mapping[str, TensorInfo]
) -> str:
    """How weights are stored: "BF16", "INT4 g128", "FP8 channel", "bnb NF4"."""
    if not _holds_codes(name, info):
        return _PLAIN.get(info.dtype, str(info.dtype).removeprefix("torch."))
    label = stored_as(infos, name.removesuffix(".weight"))
    if label is not None:
        return label
    bits = 8 * info.nbytes // math.prod(shape)
    scale = infos.get(name.removesuffix("_packed") + "_scale")
    return f"{_CODE_KINDS[info.dtype]}{bits} {_granularity(scale, shape)}".rstrip()


def _granularity(scale: TensorInfo | None, shape: tuple[int, ...]) -> str:
    """What shares a scale, in compressed-tensors' words; "" where the names don't tell."""
    if scale is None or len(shape) != 2:
        return ""
    if math.prod(scale.shape) == 1:
        return "tensor"
    if scale.shape[-1] == 1:
        return "channel"
    return "block" if scale.shape[0] < shape[0] else f"g{shape[1] // scale.shape[1]}"


def _experts_layout(config: ModelConfig, infos: Mapping[str, TensorInfo]) -> str:
    experts = [name for name in infos if component_of(config, name) == "routed_experts"]
    fused = {bool(re.search(r"\.experts\.[a-z]", name)) for name in experts}
    return {(): "none", (True,): "fused", (False,): "unfused"}.get(tuple(fused), "mixed")


def render_summary(summary: Summary) -> str:
    """The architecture in a few lines, then a table by component. GB are 10^9 bytes."""
    rows: list[tuple[str, ...]] = [
        ("component", "tensors", "parameters", "GB", "share", "bits", "stored as")
    ]
    for part in summary.components:
        mix = ", ".join(
            f"{label} {count / part.parameters:.0%}" if len(part.formats) > 1 else label
            for label, count in sorted(part.formats.items(), key=lambda item: -item[1])
        )
        rows.append(_row(part.name.replace("_", " "), part, summary.nbytes, mix))
    total = Component(
        "total",
        sum(part.tensors for part in summary.components),
        summary.parameters,
        summary.nbytes,
        {},
    )
    verdict = "quantized" if summary.quantized else "not quantized"
    rows.append(_row("total", total, summary.nbytes, verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *middle, last in rows:
        cells = [cell.rjust(width) for cell, width in zip(middle, widths[1:-1], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells, last]).rstrip())
    return "\n".join([*_architecture(summary), "", *lines])


def _row(name: str, part: Component, nbytes: int, note: str) -> tuple[str, ...]:
    return (
        name,
        f"{part.tensors:,}",
        f"{part.parameters:,}",
        f"{part.nbytes / 1e9:.3f}",
        f"{part.nbytes / nbytes:.1%}" if nbytes else "",
        f"{8 * part.nbytes / part.parameters:.2f}" if part.parameters else "",
        note,
    )


def _architecture(summary: Summary) -> list[str]:
    config = summary.config
    chunked = len(config.chunked_layers)
    lines = [
        f"layers      {config.num_layers}: {config.num_layers - chunked} global, "
        f"{chunked} chunked by {config.chunk_size:,} tokens; width {config.hidden_size:,}",
        f"attention   {config.num_heads} heads and {config.num_kv_heads} key/value heads of "
        f"{config.head_dim}, q/k norm {'yes' if config.qk_norm else 'no'}",
    ]
    if config.moe_layers:
        lines.append(
            f"experts     {config.num_experts} of width {config.expert_size:,} and a shared one in "
            f"{len(config.moe_layers)} layers, top 1, {summary.experts_layout} in the files"
        )
    if len(config.moe_layers) < config.num_layers:
        dense = config.num_layers - len(config.moe_layers)
        lines.append(f"dense       {dense} layers of width {config.dense_size:,}")
    lines.append(
        f"tokens      vocabulary {config.vocab_size:,}, up to {config.max_positions:,} positions; "
        f"vision {'yes' if config.has_vision else 'no'}"
    )
    lines.append(
        f"a token     meets {summary.active_parameters:,} of {summary.parameters:,} weights"
    )
    return lines
