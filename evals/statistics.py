"""Numbers with their uncertainty: means of clustered tokens, perplexity, percentiles, paired tests.

The tokens of one window (or document) resemble each other, so the standard error is taken over
windows, not over tokens. Pure functions of tensors; knows nothing of models or of what is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

RESAMPLES = 2_000


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error, both in the unit of what was measured."""

    value: float
    standard_error: float | None  # None where a single cluster gives no idea of the spread


def clustered_mean(clusters: torch.Tensor | Sequence[torch.Tensor]) -> Estimate:
    """Mean over all values; each row of a tensor, or each tensor of a sequence, is one cluster.

    Clusters may differ in size: the mean is the ratio of the clusters' sums to their sizes, and
    the standard error is the ratio's, linearized (Cochran, Sampling Techniques, 1977, ch. 6).
    Raises ValueError when there is no value.
    """
    filled = [cluster.double() for cluster in clusters if cluster.numel()]
    sums = torch.tensor([float(cluster.sum()) for cluster in filled], dtype=torch.float64)
    sizes = torch.tensor([cluster.numel() for cluster in filled], dtype=torch.float64)
    count, total = len(filled), float(sizes.sum())
    if not filled:
        raise ValueError("a mean needs at least one value")
    mean = float(sums.sum()) / total
    if count == 1:
        return Estimate(mean, None)
    residuals = sums - mean * sizes
    variance = count / (count - 1) * float(residuals.square().sum()) / total**2
    return Estimate(mean, math.sqrt(variance))


def perplexity(losses: torch.Tensor | Sequence[torch.Tensor]) -> Estimate:
    """exp of the mean loss in nats per token, its standard error by the delta method."""
    mean = clustered_mean(losses)
    value = math.exp(mean.value)
    error = mean.standard_error
    return Estimate(value, None if error is None else value * error)


def percentile(values: torch.Tensor, percent: float) -> float:
    """The value below which `percent` % lie, interpolated linearly between two ranks.

    Sorts instead of calling torch.quantile, which refuses more than 2**24 values.
    Raises ValueError when there is no value.
    """
    if values.numel() == 0:
        raise ValueError("a percentile needs at least one value")
    ordered = values.flatten().sort().values
    rank = percent / 100 * (len(ordered) - 1)
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    low, high = float(ordered[below]), float(ordered[above])
    return low + (rank - below) * (high - low)


def resampled(
    clusters: torch.Tensor, statistic: Callable[[torch.Tensor], torch.Tensor], seed: int = 0
) -> tuple[float, float]:
    """A 95 % interval by bootstrap over clusters; what is paired must be in one cluster.

    `clusters` `[C, K]` holds K sums for each cluster, `statistic` takes their totals over drawn
    clusters, `[R, K]`, to `[R]`. Percentiles of RESAMPLES draws with replacement (Efron and
    Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13).
    """
    count = len(clusters)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (RESAMPLES, count), generator=generator)
    times = torch.zeros(RESAMPLES, count, dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones_like(times))
    values = statistic(times @ clusters.double())
    return percentile(values, 2.5), percentile(values, 97.5)


def mcnemar(lost: int, gained: int) -> float:
    """The exact two-sided p-value of McNemar's test, for answers of two models to the same prompts.

    `lost` of them only the first one got right, `gained` only the second one. Were neither better,
    each would be as likely lost as gained: a binomial test (McNemar 1947; Fagerland, Lydersen and
    Laake 2013, the exact conditional test).
    """
    count = lost + gained
    tail = sum(math.comb(count, number) for number in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / (1 << count))
