"""Intervals of shares, against the worked examples of the papers that they come from."""

from __future__ import annotations

import pytest

from evals.proportions import difference, wilson


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_a_share(right: int, count: int, low: float, high: float) -> None:
    """Newcombe, Statistics in Medicine 17, 1998, pp. 857-872, table I, method 3."""
    assert wilson(right / count, count) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("right", "other", "low", "high"),
    [(9, 3, 0.1705, 0.8090), (0, 0, -0.2775, 0.2775), (10, 0, 0.6075, 1.0)],
)
def test_a_difference(right: int, other: int, low: float, high: float) -> None:
    """Newcombe, ibid., pp. 873-890, table II, method 10: two samples of ten."""
    assert difference(right / 10, other / 10, 10) == pytest.approx((low, high), abs=5e-5)
    mirrored = difference(other / 10, right / 10, 10)
    assert mirrored == pytest.approx((-high, -low), abs=5e-5)
