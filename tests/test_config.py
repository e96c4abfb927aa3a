"""ModelConfig against transformers' own reading of the same config.json, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.models.llama4 import Llama4TextConfig

from llama4q.config import parse_config
from llama4q.errors import UserError

from . import tiny


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_switches_against_transformers(name: str) -> None:
    raw = tiny.config_json(tiny.VARIANTS[name])
    ours = parse_config(raw, "config.json")
    theirs: Any = Llama4TextConfig(**raw.get("text_config", raw))
    layers = range(theirs.num_hidden_layers)
    assert ours.moe_layers == set(theirs.moe_layers)
    assert ours.rope_layers == {layer for layer in layers if theirs.no_rope_layers[layer]}
    assert ours.chunked_layers == {
        layer for layer in layers if theirs.layer_types[layer] == "chunked_attention"
    }
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (ours.rope_scaling is None) == (theirs.rope_parameters["rope_type"] == "default")
    assert (ours.qk_norm, ours.chunk_size) == (theirs.use_qk_norm, theirs.attention_chunk_size)
    assert (ours.dense_size, ours.expert_size) == (
        theirs.intermediate_size_mlp,
        theirs.intermediate_size,
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention_chunk_size": None}, "wrong form"),
        ({"num_experts_per_tok": 2}, "exactly 1 expert"),
        ({"attention_bias": True}, "no biases"),
        ({"hidden_act": "gelu"}, "uses 'silu'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
        ({"num_key_value_heads": 3}, "do not go together"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(change: dict[str, Any], words: str) -> None:
    raw = tiny.config_json(tiny.SCOUT)
    raw["text_config"] |= change
    with pytest.raises(UserError, match=words):
        parse_config(raw, "config.json")
