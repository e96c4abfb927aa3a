"""A whole model by transformers on some windows: what the streamed one must say, too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from . import tiny


@dataclass(frozen=True)
class Naive:
    """A model as transformers runs it: log-probabilities `[S, T - 1, vocabulary]`, F64, hidden
    states after each layer but the last, what each layer's feed-forward adds `[S * T, D]`, F64,
    and which expert of each layer every token goes to."""

    logprobs: torch.Tensor
    hidden: list[torch.Tensor]
    added: list[torch.Tensor]
    experts: list[torch.Tensor]


def naive(folder: Path, windows: torch.Tensor) -> Naive:
    model = tiny.transformers_model(folder)
    experts: list[torch.Tensor] = []
    added: list[torch.Tensor] = []

    def feed_forward(module: Any, inputs: Any, found: Any) -> None:
        out = found[0] if isinstance(found, tuple) else found
        added.append(out.flatten(0, -2).double())

    for layer in model.language_model.model.layers:
        layer.feed_forward.register_forward_hook(feed_forward)
        if hasattr(layer.feed_forward, "router"):
            layer.feed_forward.router.register_forward_hook(
                lambda module, inputs, found: experts.append(found[1].argmax(-1))
            )
    found = model(input_ids=windows, output_hidden_states=True)
    logprobs = functional.log_softmax(found.logits[:, :-1].double(), dim=-1)
    return Naive(
        logprobs, list(found.hidden_states[1:-1]), added, experts
    )  # the last one is normed
