"""Which settings of two models differ, of those that a forward depends on.

Knows nothing of tensors.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from llama4q.config import ModelConfig

IRRELEVANT = ("prefix", "has_vision", "max_positions")  # to what a token's logits are


def other_settings(original: ModelConfig, quantized: ModelConfig) -> list[dict[str, Any]]:
    """JSON for the report: each setting that differs, with both values as text."""
    return [
        {
            "setting": field.name,
            "original": _shown(getattr(original, field.name)),
            "quantized": _shown(getattr(quantized, field.name)),
        }
        for field in fields(ModelConfig)
        if field.name not in IRRELEVANT
        and getattr(original, field.name) != getattr(quantized, field.name)
    ]


def _shown(value: Any) -> str:
    return str(sorted(value)) if isinstance(value, frozenset) else str(value)
