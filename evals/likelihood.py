"""Perplexity of two models on the same tokens, and how far their predictions lie apart.

KL(original || quantized) in nats a token is the number to trust: perplexity moves too little to
rank methods. Logits come in pieces, so that those of a 202,048-word vocabulary are never all held.
Knows nothing of models, files or tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.nn import functional

from .statistics import clustered_mean, percentile, perplexity, resampled

# both models' logits `[T, vocabulary]` and the tokens `[T]` that came
Piece = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

BEST = 5  # tokens that each model thinks likeliest
EDGES = tuple(10 ** (step / 4) for step in range(-28, 9))  # of the histogram: 1e-7 to 100 nats


@dataclass(frozen=True)
class Window:
    """What both models make of each token of a window, `[T]` each."""

    original: torch.Tensor  # loss, nats
    quantized: torch.Tensor
    divergence: torch.Tensor  # nats
    same: torch.Tensor  # 1 where both choose the same token, else 0
    shared: torch.Tensor  # share of the original's BEST tokens that are among the quantized's
    original_choice: torch.Tensor  # the likeliest token
    quantized_choice: torch.Tensor


def compared(pieces: Iterable[Piece]) -> Window:
    """One window, in pieces of which only one need be in memory."""
    found = [_compared(*piece) for piece in pieces]
    return Window(
        *(torch.cat([getattr(one, field.name) for one in found]).cpu() for field in fields(Window))
    )


def summary(windows: Sequence[Window]) -> dict[str, Any]:
    """JSON for the report; intervals are 95 %, over windows, with the models paired.

    Raises ValueError when there is no token.
    """
    divergence = [window.divergence for window in windows]
    every = torch.cat(divergence)
    mean = clustered_mean(divergence)
    sides = {
        "original": perplexity([window.original for window in windows]),
        "quantized": perplexity([window.quantized for window in windows]),
    }
    return {
        "tokens": len(every),
        "windows": len(windows),
        "units": "nats per token",  # of KL(original || quantized)
        **{
            side: {"perplexity": found.value, "standard_error": found.standard_error}
            for side, found in sides.items()
        },
        "perplexity_increase": sides["quantized"].value / sides["original"].value - 1,
        "kl_mean": mean.value,
        "kl_standard_error": mean.standard_error,
        "kl_median": percentile(every, 50),
        "kl_p99": percentile(every, 99),
        "kl_p999": percentile(every, 99.9),
        "kl_max": float(every.max()),
        "top1_agreement": clustered_mean([window.same for window in windows]).value,
        "top5_agreement": clustered_mean([window.shared for window in windows]).value,
        "intervals": _intervals(windows),
        "histogram": _histogram(every),
    }


def bits_per_byte(windows: Sequence[Window], nbytes: int) -> dict[str, float]:
    """Of both models, over a text of `nbytes` in UTF-8: comparable between tokenizers."""
    return {
        side: sum(float(getattr(window, side).double().sum()) for window in windows)
        / (math.log(2) * nbytes)
        for side in ("original", "quantized")
    }


def _intervals(windows: Sequence[Window]) -> dict[str, list[float]]:
    if len(windows) < 2:
        return {}
    counts = torch.tensor([len(window.divergence) for window in windows])

    def interval(
        of: Callable[[Window], torch.Tensor], of_mean: Callable[[torch.Tensor], torch.Tensor]
    ) -> list[float]:
        sums = torch.stack([of(window).double().sum() for window in windows])
        pairs = torch.stack([sums, counts], dim=1)
        return list(resampled(pairs, lambda drawn: of_mean(drawn[:, 0] / drawn[:, 1])))

    return {
        "perplexity_increase": interval(lambda one: one.quantized - one.original, torch.expm1),
        "kl_mean": interval(lambda one: one.divergence, torch.clone),
        "top1_agreement": interval(lambda one: one.same, torch.clone),
        "top5_agreement": interval(lambda one: one.shared, torch.clone),
    }


def _histogram(divergence: torch.Tensor) -> dict[str, list[float]]:
    """What lies outside of the edges is counted at the ends."""
    inside = torch.tensor(EDGES[1:-1], dtype=torch.float64)
    bins = torch.bucketize(divergence.double(), inside, right=True)
    return {"edges": list(EDGES), "counts": torch.bincount(bins, minlength=len(EDGES) - 1).tolist()}


def _compared(original: torch.Tensor, quantized: torch.Tensor, targets: torch.Tensor) -> Window:
    plain = functional.log_softmax(original.float(), dim=-1)
    served = functional.log_softmax(quantized.float(), dim=-1)
    # BF16 logits tie: of the best ones argmax takes the first in both models, topk any; what ties
    # with the quantized model's last one of BEST is among them
    choices = plain.argmax(1), served.argmax(1)
    count = min(BEST, plain.shape[1])
    likely = plain.topk(count, dim=1).indices
    last = served.topk(count, dim=1).values[:, -1:]
    return Window(
        original=-plain.gather(1, targets[:, None]).squeeze(1),
        quantized=-served.gather(1, targets[:, None]).squeeze(1),
        # KL is never below 0; F32 rounding may make it so by about 1e-7
        divergence=functional.kl_div(served, plain, log_target=True, reduction="none").sum(1),
        same=(choices[0] == choices[1]).float(),
        shared=(served.gather(1, likely) >= last).float().mean(dim=1),
        original_choice=choices[0],
        quantized_choice=choices[1],
    )
