"""Whether the calibration text reached every expert often enough, and what to do if it did not.

Knows how many tokens each expert saw; nothing of texts, tensors or how codes are found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama4q.config import ModelConfig
from llama4q.recipe import Method, Recipe
from llama4q.weights import Component

MOST_TIMES = 16  # as many samples: beyond that it is the kind of text that leaves an expert out


@dataclass(frozen=True)
class Expert:
    """One expert of one layer, and the calibration tokens that the router sent it."""

    layer: int
    number: int
    tokens: int


def coverage(
    recipe: Recipe, config: ModelConfig, layers: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The report's `calibration.coverage`; None when no expert's codes depend on tokens.

    An expert is poor when it saw fewer tokens than its widest matrix has inputs: its own second
    moments then do not determine its codes. `layers` are those of the report.
    """
    experts = [
        Expert(record["layer"], number, tokens)
        for record in layers
        if _depends_on_tokens(recipe, record["layer"], config.num_layers)
        for number, tokens in enumerate(record["expert_tokens"])
    ]
    if not experts:
        return None
    needed = max(config.hidden_size, config.expert_size)
    poor = [expert for expert in experts if expert.tokens < needed]
    worst = min(experts, key=lambda expert: expert.tokens)
    by_layer: dict[int, list[int]] = {}
    for expert in poor:
        by_layer.setdefault(expert.layer, []).append(expert.number)
    return {
        "needed": needed,
        "experts": len(experts),
        "poor": [{"layer": layer, "experts": numbers} for layer, numbers in by_layer.items()],
        "worst": {"layer": worst.layer, "expert": worst.number, "tokens": worst.tokens},
        "warning": _warning(recipe, needed, len(experts), len(poor), worst) if poor else None,
    }


def _depends_on_tokens(recipe: Recipe, layer: int, num_layers: int) -> bool:
    scheme = recipe.scheme(Component.EXPERTS, layer, num_layers)
    return scheme.calibrates and recipe.solver.method is not Method.RTN


def _warning(recipe: Recipe, needed: int, experts: int, poor: int, worst: Expert) -> str:
    """How many, the worst, what it means and what would help, in one line."""
    meaning = "lean on the layer's pooled statistics"
    if not recipe.solver.shrinkage:
        meaning = "fit those few tokens alone"
    return (
        f"{poor:,} of {experts:,} experts saw fewer calibration tokens than the {needed:,} inputs "
        f"of their widest matrix, expert {worst.number} of layer {worst.layer} only "
        f"{worst.tokens:,}; their codes {meaning}; {_remedy(recipe, needed, worst)}"
    )


def _remedy(recipe: Recipe, needed: int, worst: Expert) -> str:
    """By proportion; the next run draws other passages, so it is an estimate."""
    samples = recipe.calibration.samples
    if worst.tokens * MOST_TIMES >= needed:
        return (
            f"choose the text among more of it, --candidates 4, or calibrate on more: "
            f"--samples {math.ceil(samples * needed / worst.tokens)}"
        )
    return "calibrate on other or mixed text: --calibration a:0.6,b:0.4"
