"""The pocket model's sizes, and its config.json as the Hub spells it.

Scout's switches at pocket size, and variants with Maverick's and with none but dense layers. Knows
nothing of weights or training. The spelling is that of the
published Scout (`rope_scaling` and `rope_theta`, `torch_dtype`), not the one that transformers 5
writes, because that is what quantization meets in the wild.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PocketConfig:
    """Sizes and switches of the text model; every quantized dimension is a multiple of 128."""

    vocabulary: int = 2_048
    hidden: int = 256
    layers: int = 8
    query_heads: int = 4
    key_value_heads: int = 2
    head: int = 64
    experts: int = 8
    expert_width: int = 128
    dense_width: int = 256
    chunk: int = 256
    context: int = 16_384
    global_every: int = 4
    floor_scale: int = 1_024
    attention_scale: float = 0.1
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_factor: float = 16.0
    rope_original: int = 1_024
    moe_step: int = 1  # every so many layers has experts; 0: none has
    qk_norm: bool = True

    def is_global(self, layer: int) -> bool:
        """Global layers see everything and know no positions; the others see their chunk."""
        return (layer + 1) % self.global_every == 0

    def is_moe(self, layer: int) -> bool:
        """Whether the layer has routed experts; the others have one dense feed-forward."""
        return self.moe_step > 0 and (layer + 1) % self.moe_step == 0


VARIANTS = {
    "scout": PocketConfig(),
    "maverick": PocketConfig(
        experts=16, moe_step=2, dense_width=512, qk_norm=False, rope_factor=1.0
    ),
    "dense": PocketConfig(moe_step=0, dense_width=512, qk_norm=False),
}


def hub_config(config: PocketConfig, special: dict[str, int]) -> dict[str, Any]:
    """config.json; `special` gives the ids of the special tokens by their text."""
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "boi_token_index": special["<|image_start|>"],
        "eoi_token_index": special["<|image_end|>"],
        "image_token_index": special["<|patch|>"],
        "model_type": "llama4",
        "text_config": _text_config(config, special),
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "vision_config": _vision_config(),
    }


def _text_config(config: PocketConfig, special: dict[str, int]) -> dict[str, Any]:
    return {
        "attention_bias": False,
        "attention_chunk_size": config.chunk,
        "attention_dropout": 0.0,
        "attn_scale": config.attention_scale,
        "attn_temperature_tuning": True,
        "bos_token_id": special["<|begin_of_text|>"],
        "eos_token_id": [special[token] for token in ("<|end_of_text|>", "<|eom|>", "<|eot|>")],
        "floor_scale": config.floor_scale,
        "head_dim": config.head,
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "initializer_range": 0.02,
        "interleave_moe_layer_step": config.moe_step,
        "intermediate_size": config.expert_width,
        "intermediate_size_mlp": config.dense_width,
        **({} if config.moe_step else {"moe_layers": []}),
        "max_position_embeddings": config.context,
        "model_type": "llama4_text",
        "no_rope_layers": [int(not config.is_global(layer)) for layer in range(config.layers)],
        "num_attention_heads": config.query_heads,
        "num_experts_per_tok": 1,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.key_value_heads,
        "num_local_experts": config.experts,
        "output_router_logits": False,
        "pad_token_id": special["<|finetune_right_pad|>"],
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": _rope_scaling(config),
        "rope_theta": config.rope_theta,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_qk_norm": config.qk_norm,
        "vocab_size": config.vocabulary,
    }


def _rope_scaling(config: PocketConfig) -> dict[str, Any] | None:
    if config.rope_factor == 1.0:
        return None
    return {
        "factor": config.rope_factor,
        "high_freq_factor": 1.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": config.rope_original,
        "rope_type": "llama3",
    }


def _vision_config() -> dict[str, Any]:
    # The pixel shuffle packs 2 x 2 patches into one: its width is four times the hidden size, and
    # must equal intermediate_size.
    return {
        "attention_dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": 64,
        "image_size": 56,
        "initializer_range": 0.02,
        "intermediate_size": 256,
        "model_type": "llama4_vision_model",
        "multi_modal_projector_bias": False,
        "norm_eps": 1e-05,
        "num_attention_heads": 4,
        "num_channels": 3,
        "num_hidden_layers": 2,
        "patch_size": 14,
        "pixel_shuffle_ratio": 0.5,
        "projector_dropout": 0.0,
        "projector_input_dim": 128,
        "projector_output_dim": 128,
        "rope_theta": 10000,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "vision_output_dim": 128,
    }
