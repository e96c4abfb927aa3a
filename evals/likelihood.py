"""Perplexity of two models on the same tokens, and how far their predictions lie apart.

KL(original || quantized) in nats a token is the number to trust: perplexity moves too little to
rank methods. Logits come in pieces, so that those of a 202,048-word vocabulary are never all held.
Knows nothing of models or files.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from .statistics import clustered_mean, percentile, perplexity


class Likelihood:
    """Collects both models' token losses and their divergence, by window, `[T]` each."""

    def __init__(self) -> None:
        self.original: list[torch.Tensor] = []
        self.quantized: list[torch.Tensor] = []
        self.divergence: list[torch.Tensor] = []
        self.agree: list[torch.Tensor] = []

    def add(self, original: torch.Tensor, quantized: torch.Tensor, targets: torch.Tensor) -> None:
        """One window: both models' logits `[T, vocabulary]` and the tokens `[T]` that came."""
        plain = functional.log_softmax(original.float(), dim=-1)
        served = functional.log_softmax(quantized.float(), dim=-1)
        self.original.append(-plain.gather(1, targets[:, None]).squeeze(1))
        self.quantized.append(-served.gather(1, targets[:, None]).squeeze(1))
        # KL is never below 0; F32 rounding may make it so by about 1e-7
        self.divergence.append(
            functional.kl_div(served, plain, log_target=True, reduction="none").sum(1)
        )
        self.agree.append((plain.argmax(1) == served.argmax(1)).float())

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
