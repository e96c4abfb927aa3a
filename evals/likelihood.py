"""Perplexity of two models on the same tokens, and how far their predictions lie apart.

KL(original || quantized) in nats a token is the number to trust: perplexity moves too little to
rank methods. Logits come in pieces, so that those of a 202,048-word vocabulary are never all held.
Knows nothing of models or files.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import functional

from .statistics import clustered_mean, percentile, perplexity

# both models' logits `[T, vocabulary]` and the tokens `[T]` that came
Piece = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# of each token of a window: both losses, the divergence, and whether the arg max is the same
Window = tuple[torch.Tensor, ...]


def compared(pieces: Iterable[Piece]) -> Window:
    """One window, in pieces of which only one need be in memory."""
    found = [_compared(*piece) for piece in pieces]
    return tuple(torch.cat(parts).cpu() for parts in zip(*found, strict=True))


class Likelihood:
    """Collects both models' token losses and their divergence, by window, `[T]` each."""

    def __init__(self) -> None:
        self.original: list[torch.Tensor] = []
        self.quantized: list[torch.Tensor] = []
        self.divergence: list[torch.Tensor] = []
        self.agree: list[torch.Tensor] = []

    def add(self, window: Window) -> None:
        for all_windows, values in zip(
            (self.original, self.quantized, self.divergence, self.agree), window, strict=True
        ):
            all_windows.append(values)

    def summary(self, digest: str) -> dict[str, Any]:
        """JSON for the report; `digest` names the tokens."""
        divergence = clustered_mean(self.divergence)
        original, quantized = perplexity(self.original), perplexity(self.quantized)
        return {
            "tokens": sum(len(window) for window in self.divergence),
            "windows": len(self.divergence),
            "digest": digest,
            "units": "nats per token",  # of KL(original || quantized)
            "original": {
                "perplexity": original.value,
                "standard_error": original.standard_error,
            },
            "quantized": {
                "perplexity": quantized.value,
                "standard_error": quantized.standard_error,
            },
            "kl_mean": divergence.value,
            "kl_standard_error": divergence.standard_error,
            "kl_p99": percentile(torch.cat(self.divergence), 99),
            "top1_agreement": clustered_mean(self.agree).value,
        }


def _compared(original: torch.Tensor, quantized: torch.Tensor, targets: torch.Tensor) -> Window:
    plain = functional.log_softmax(original.float(), dim=-1)
    served = functional.log_softmax(quantized.float(), dim=-1)
    return (
        -plain.gather(1, targets[:, None]).squeeze(1),
        -served.gather(1, targets[:, None]).squeeze(1),
        # KL is never below 0; F32 rounding may make it so by about 1e-7
        functional.kl_div(served, plain, log_target=True, reduction="none").sum(1),
        (plain.argmax(1) == served.argmax(1)).float(),
    )
