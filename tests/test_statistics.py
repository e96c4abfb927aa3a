"""Means, perplexities and percentiles against numpy and repeated sampling."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest
import torch

from evals.statistics import Estimate, clustered_mean, mcnemar, percentile, perplexity, resampled


def clusters_with_a_level_of_their_own(
    rows: int, columns: int, generator: torch.Generator
) -> torch.Tensor:
    level = torch.randn(rows, 1, generator=generator)
    return 2 + 0.5 * level + torch.randn(rows, columns, generator=generator)


def test_equal_clusters_against_numpy() -> None:
    """With equal sizes it is the standard error of the cluster means."""
    values = clusters_with_a_level_of_their_own(12, 50, torch.Generator().manual_seed(0))
    means = values.double().mean(dim=1).numpy()
    found = clustered_mean(values)
    assert found.value == pytest.approx(values.double().mean().item(), rel=1e-12)
    assert found.standard_error == pytest.approx(numpy.std(means, ddof=1) / math.sqrt(12))


def test_single_tokens_as_clusters_are_independent_values() -> None:
    values = torch.randn(300, 1, generator=torch.Generator().manual_seed(1))
    found = clustered_mean(values)
    assert found.standard_error == pytest.approx(
        numpy.std(values.double().numpy(), ddof=1) / math.sqrt(300)
    )


def test_the_standard_error_is_the_spread_of_repeated_measurements() -> None:
    """Clusters of different sizes, measured 2,000 times: the formula against the real spread."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(2_000):
        sizes = torch.randint(5, 40, (40,), generator=generator).tolist()
        drawn = clusters_with_a_level_of_their_own(40, 40, generator)
        found.append(clustered_mean([row[:size] for row, size in zip(drawn, sizes, strict=True)]))
    spread = numpy.std([estimate.value for estimate in found])
    claimed = numpy.mean([estimate.standard_error or 0 for estimate in found])
    assert claimed == pytest.approx(spread, rel=0.06)


def test_empty_clusters_change_nothing() -> None:
    clusters = [torch.tensor([1.0, 3.0]), torch.tensor([5.0])]
    assert clustered_mean([*clusters, torch.tensor([])]) == clustered_mean(clusters)


def test_one_cluster_has_no_standard_error() -> None:
    assert clustered_mean(torch.tensor([[1.0, 2.0]])) == Estimate(1.5, None)
    assert perplexity(torch.tensor([[1.0, 2.0]])) == Estimate(math.exp(1.5), None)


def test_low_precision_values_are_added_in_float64() -> None:
    values = torch.full((4, 100_000), 0.1, dtype=torch.bfloat16)
    assert clustered_mean(values).value == pytest.approx(float(values[0, 0]), rel=1e-12)


def test_perplexity_by_the_delta_method() -> None:
    """The standard error against a numerical derivative of exp."""
    losses = clusters_with_a_level_of_their_own(12, 50, torch.Generator().manual_seed(3))
    mean, found = clustered_mean(losses), perplexity(losses)
    assert mean.standard_error is not None
    step = 1e-6
    slope = (math.exp(mean.value + step) - math.exp(mean.value - step)) / (2 * step)
    assert found.value == pytest.approx(math.exp(mean.value))
    assert found.standard_error == pytest.approx(slope * mean.standard_error)


@pytest.mark.parametrize("percent", [0, 1, 37.5, 50, 99, 99.9, 100])
@pytest.mark.parametrize("count", [1, 2, 7, 1_000])
def test_percentile_against_numpy(percent: float, count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(4)).double()
    assert percentile(values, percent) == pytest.approx(numpy.percentile(values.numpy(), percent))


def test_percentile_of_more_values_than_torch_quantile_takes() -> None:
    values = torch.arange(2**24 + 3, dtype=torch.int32)
    assert percentile(values.flip(0), 50) == (2**24 + 2) / 2


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        clustered_mean([])
    with pytest.raises(ValueError, match="at least one value"):
        percentile(torch.tensor([]), 50)


def test_a_bootstrap_interval_holds_the_truth_as_often_as_it_says() -> None:
    """The ratio of two sums over clusters of different sizes, measured 400 times."""
    generator = torch.Generator().manual_seed(5)
    held = 0
    for _ in range(400):
        sizes = torch.randint(5, 40, (40,), generator=generator)
        drawn = clusters_with_a_level_of_their_own(40, 40, generator)
        sums = torch.stack([row[:size].sum() for row, size in zip(drawn, sizes, strict=True)])
        low, high = resampled(
            torch.stack([sums, sizes], dim=1), lambda found: found[:, 0] / found[:, 1]
        )
        held += low <= 2 <= high
    assert 0.91 <= held / 400 <= 0.98


@pytest.mark.parametrize(
    ("lost", "gained"), [(0, 0), (1, 0), (0, 5), (5, 1), (4, 4), (3, 9), (2, 3)]
)
def test_mcnemar_against_every_way_in_which_answers_could_have_changed(
    lost: int, gained: int
) -> None:
    """Each changed answer lost or gained like a coin: the share of ways at least as uneven."""
    ways = list(itertools.product((0, 1), repeat=lost + gained))
    uneven = [way for way in ways if abs(2 * sum(way) - len(way)) >= abs(lost - gained)]
    assert mcnemar(lost, gained) == pytest.approx(len(uneven) / len(ways))


def test_mcnemar_of_many_answers_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    assert mcnemar(1_300, 1_100) == pytest.approx(stats.binomtest(1_300, 2_400).pvalue, rel=1e-9)
