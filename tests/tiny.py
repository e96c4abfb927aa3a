"""Small random Llama 4s of every variant, as folders with the Hub's names and spellings.

The tensor names and shapes come from transformers' own classes, so that they are not ours twice.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Llama4Config, Llama4ForCausalLM, Llama4ForConditionalGeneration
from transformers.models.llama4 import Llama4TextConfig

VISION = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": 28, "patch_size": 14, "vision_output_dim": 64, "projector_input_dim": 64,
    "projector_output_dim": 64, "pixel_shuffle_ratio": 0.5, "model_type": "llama4_vision_model",
}  # fmt: skip

SCOUT_ROPE = {
    "factor": 8.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64, "rope_type": "llama3",
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """What tells one Llama 4 from another; `text_only` is a Llama4ForCausalLM without vision."""

    layers: int = 4
    moe_step: int = 1  # 0: no experts at all
    experts: int = 4
    qk_norm: bool = True
    rope_scaling: dict[str, Any] | None = None
    text_only: bool = False
    new_spelling: bool = False  # rope_parameters and dtype, as transformers 5 writes them
    width: int = 128
    expert_size: int = 128
    vocab_size: int = 512


SCOUT = Variant(rope_scaling=SCOUT_ROPE)
MAVERICK = Variant(moe_step=2, experts=8, qk_norm=False)
GUARD = Variant(moe_step=0, qk_norm=True)
VARIANTS = {
    "scout": SCOUT,
    "scout-new-spelling": Variant(rope_scaling=SCOUT_ROPE, new_spelling=True),
    "maverick": MAVERICK,
    "guard": GUARD,
    "scout-text-only": Variant(rope_scaling=SCOUT_ROPE, text_only=True),
    "maverick-text-only": Variant(moe_step=2, experts=8, qk_norm=False, text_only=True),
    "llama3-band": Variant(rope_scaling={**SCOUT_ROPE, "high_freq_factor": 4.0}),
}


def text_config(variant: Variant) -> dict[str, Any]:
    """The text half of config.json."""
    config: dict[str, Any] = {
        "model_type": "llama4_text", "vocab_size": variant.vocab_size,
        "hidden_size": variant.width, "intermediate_size": variant.expert_size,
        "intermediate_size_mlp": 2 * variant.expert_size, "num_hidden_layers": variant.layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "num_local_experts": variant.experts, "num_experts_per_tok": 1,
        "interleave_moe_layer_step": variant.moe_step, "use_qk_norm": variant.qk_norm,
        "attention_chunk_size": 32, "floor_scale": 48, "attn_scale": 0.1,
        "attn_temperature_tuning": True, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip
    if variant.moe_step == 0:
        config["moe_layers"] = []
    if variant.new_spelling:
        config["rope_parameters"] = {"rope_theta": 10000.0, **(variant.rope_scaling or {})}
    else:
        config["rope_theta"] = 10000.0
        config["rope_scaling"] = variant.rope_scaling
    return config


def config_json(variant: Variant) -> dict[str, Any]:
    """config.json as the Hub spells it, or as transformers 5 does."""
    dtype = {"dtype" if variant.new_spelling else "torch_dtype": "bfloat16"}
    if variant.text_only:
        return {"architectures": ["Llama4ForCausalLM"], **dtype, **text_config(variant)}
    return {
        "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", **dtype,
        "image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7,
        "tie_word_embeddings": False,
        "text_config": text_config(variant), "vision_config": VISION,
    }  # fmt: skip


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes, from transformers on the meta device."""
    with torch.device("meta"):
        if config["model_type"] == "llama4_text":
            model: Any = Llama4ForCausalLM(Llama4TextConfig(**config))
        else:
            model = Llama4ForConditionalGeneration(Llama4Config(**config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def tensors(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random BF16 weights, large enough that routing and attention are far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes(config).items():
        values = torch.randn(shape, generator=generator)
        if "norm" in name and len(shape) == 1:
            values = 1 + 0.1 * values
        else:
            fan_in = shape[-2] if "experts." in name else shape[-1]
            values = values * (1.0 if "embed" in name else fan_in**-0.5)
        made[name] = values.to(torch.bfloat16)
    return made


def write(
    folder: Path,
    variant: Variant,
    seed: int = 0,
    shards: int = 2,
    replace: dict[str, torch.Tensor] | None = None,
    scattered: bool = True,
) -> Path:
    """A checkpoint folder of `variant` with an index and `shards` shards; returns the folder.

    A layer's tensors are scattered over the shards, or beside each other, in the order of layers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = config_json(variant)
    made = {**tensors(config, seed), **(replace or {})}
    names = list(made)
    weight_map = {}
    for number in range(shards):
        shard = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        ends = (len(names) * number // shards, len(names) * (number + 1) // shards)
        mine = names[number::shards] if scattered else names[slice(*ends)]
        part = {name: made[name] for name in mine}
        save_file(part, str(folder / shard), metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, shard))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}\n')
    return folder


def transformers_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The authority: transformers' own model of the folder."""
    config = json.loads((folder / "config.json").read_text())
    kind = Llama4ForCausalLM
    if config["model_type"] == "llama4":
        kind = Llama4ForConditionalGeneration
    return kind.from_pretrained(folder, dtype=dtype).eval()
