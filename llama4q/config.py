"""Sizes and switches of one Llama 4, read from its config.json in either spelling.

Knows nothing of tensors or files other than config.json, and nothing of the model's name: Scout,
Maverick and dense derivatives differ by switches alone. Refuses what is not a Llama 4.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError

MODEL_TYPES = ("llama4", "llama4_text")


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling, as Scout uses it (transformers `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class ModelConfig:
    """One Llama 4 text model; sizes in elements, positions in tokens."""

    prefix: str  # "language_model." when the checkpoint is multimodal, else ""
    has_vision: bool
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    expert_size: int  # width of a routed and of the shared expert
    dense_size: int  # width of the feed-forward in layers without experts
    num_experts: int
    moe_layers: frozenset[int]
    rope_layers: frozenset[int]  # the others are global and have no positions
    chunked_layers: frozenset[int]  # the others attend to everything before
    chunk_size: int
    qk_norm: bool
    temperature_tuning: bool
    floor_scale: int
    attn_scale: float
    rms_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_positions: int
    tied_embeddings: bool

    def layer_prefix(self, layer: int) -> str:
        """The checkpoint's name of decoder layer `layer`, with the closing dot."""
        return f"{self.prefix}model.layers.{layer}."


def read_config(folder: Path) -> ModelConfig:
    """The ModelConfig of the checkpoint in `folder`. Raises UserError for anything else."""
    return parse_config(read_config_json(folder), str(folder / "config.json"))


def read_config_json(folder: Path) -> dict[str, Any]:
    """config.json as a dictionary. Raises UserError where it is missing or no JSON object."""
    path = folder / "config.json"
    try:
        parsed = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{folder}: no config.json here; name a checkpoint folder") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); download it again") from None
    if not isinstance(parsed, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(parsed).__name__}")
    return parsed


def parse_config(raw: Mapping[str, Any], where: str) -> ModelConfig:
    """ModelConfig from config.json's dictionary; `where` names it in errors.

    Both spellings are read: `rope_scaling` + `rope_theta` (the Hub) and `rope_parameters`
    (transformers 5); `moe_layers` given or derived from `interleave_moe_layer_step`.
    Source: transformers `configuration_llama4.py`.
    """
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        kind = raw.get("architectures") or "no architecture named"
        raise UserError(
            f"{where}: not a Llama 4 but model_type {model_type!r} ({kind}); "
            f"llama4q reads {' and '.join(MODEL_TYPES)}"
        )
    text = raw.get("text_config", {}) if model_type == "llama4" else raw
    if not isinstance(text, Mapping) or not text:
        raise UserError(f"{where}: a llama4 without text_config; download config.json again")
    try:
        config = _from_text_config(text, model_type == "llama4", bool(raw.get("vision_config")))
    except KeyError as error:
        raise UserError(f"{where}: key {error} is missing; download config.json again") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{where}: a value has the wrong form ({error})") from None
    except IndexError:
        raise UserError(
            f"{where}: no_rope_layers or layer_types has fewer entries than the "
            f"{text['num_hidden_layers']} layers; download config.json again"
        ) from None
    _refuse_unsupported(text, config, where)
    return config


def _from_text_config(text: Mapping[str, Any], multimodal: bool, vision: bool) -> ModelConfig:
    layers = int(text["num_hidden_layers"])
    interval = int(text.get("no_rope_layer_interval", 4))
    uses_rope = text.get("no_rope_layers") or [(n + 1) % interval != 0 for n in range(layers)]
    rope_layers = frozenset(n for n in range(layers) if uses_rope[n])
    types = text.get("layer_types")
    chunked = (
        frozenset(n for n in range(layers) if types[n] == "chunked_attention")
        if types
        else rope_layers
    )
    heads = int(text["num_attention_heads"])
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    return ModelConfig(
        prefix="language_model." if multimodal else "",
        has_vision=vision and multimodal,
        vocab_size=int(text["vocab_size"]),
        hidden_size=int(text["hidden_size"]),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=int(text.get("num_key_value_heads") or heads),
        head_dim=int(text.get("head_dim") or int(text["hidden_size"]) // heads),
        expert_size=int(text["intermediate_size"]),
        dense_size=int(text["intermediate_size_mlp"]),
        num_experts=int(text.get("num_local_experts", 16)),
        moe_layers=_moe_layers(text, layers),
        rope_layers=rope_layers,
        chunked_layers=chunked,
        chunk_size=int(text.get("attention_chunk_size", 8192)),
        qk_norm=bool(text.get("use_qk_norm", True)),
        temperature_tuning=bool(text.get("attn_temperature_tuning", True)),
        floor_scale=int(text.get("floor_scale", 8192)),
        attn_scale=float(text.get("attn_scale", 0.1)),
        rms_eps=float(text.get("rms_norm_eps", 1e-5)),
        rope_theta=float(rope.get("rope_theta") or text.get("rope_theta", 500000.0)),
        rope_scaling=_rope_scaling(rope),
        max_positions=int(text.get("max_position_embeddings", 131072)),
        tied_embeddings=bool(text.get("tie_word_embeddings", False)),
    )


def _moe_layers(text: Mapping[str, Any], layers: int) -> frozenset[int]:
    given = text.get("moe_layers")
    if given is not None:
        return frozenset(int(layer) for layer in given)
    step = int(text.get("interleave_moe_layer_step", 1))
    return frozenset(range(step - 1, layers, step)) if step > 0 else frozenset()


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"rope_type {kind!r}; Llama 4 uses 'llama3' or 'default'")
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position=int(rope["original_max_position_embeddings"]),
    )


def _refuse_unsupported(text: Mapping[str, Any], config: ModelConfig, where: str) -> None:
    """No published Llama 4 sets these; computing them wrongly would be worse than refusing."""
    if config.moe_layers and int(text.get("num_experts_per_tok", 1)) != 1:
        top_k = text["num_experts_per_tok"]
        raise UserError(f"{where}: num_experts_per_tok {top_k}; Llama 4 routes to exactly 1 expert")
    if text.get("attention_bias"):
        raise UserError(f"{where}: attention_bias true; Llama 4 has no biases")
    if text.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act {text['hidden_act']!r}; Llama 4 uses 'silu'")
    if config.head_dim % 2 or config.num_heads % config.num_kv_heads:
        raise UserError(
            f"{where}: head_dim {config.head_dim}, {config.num_heads} heads and "
            f"{config.num_kv_heads} key/value heads do not go together"
        )
