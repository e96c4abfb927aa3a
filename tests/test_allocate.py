"""Mixes under a number of bytes, against trying all of them."""

from __future__ import annotations

import itertools
import random

import pytest

from calibrate.allocate import Mix, Option, Part, best, frontier, smallest
from llama4q.weights import Component


def drawn(seed: int, parts: int = 6, options: int = 4) -> list[Part]:
    """Parts whose options get larger as they get better, with sizes of real layers."""
    draw = random.Random(seed)
    found = []
    for layer in range(parts):
        size, error = draw.randrange(10**7, 10**9), draw.random()
        found.append(
            Part(
                layer,
                Component.EXPERTS,
                tuple(
                    Option(
                        f"scheme {step}", size * (step + 2) + draw.randrange(10**5), error / 4**step
                    )
                    for step in range(options)
                ),
            )
        )
    return found


def every(parts: list[Part]) -> list[Mix]:
    return [Mix(options) for options in itertools.product(*(part.options for part in parts))]


@pytest.mark.parametrize("seed", range(20))
def test_no_mix_that_fits_has_less_error(seed: int) -> None:
    parts = drawn(seed)
    mixes = every(parts)
    sizes = sorted(mix.nbytes for mix in mixes)
    for room in (sizes[0], *random.Random(seed).sample(sizes, 5), sizes[-1], 2 * sizes[-1]):
        found = best(parts, room)
        assert found is not None
        assert found.nbytes <= room
        least = min(mix.error for mix in mixes if mix.nbytes <= room)
        assert found.error <= least * (1 + 1e-3)


def test_nothing_fits() -> None:
    parts = drawn(0)
    least = min(mix.nbytes for mix in every(parts))
    assert smallest(parts).nbytes == least
    assert best(parts, least - 1) is None


def test_frontier_goes_down() -> None:
    parts = drawn(1)
    mixes = frontier(parts)
    assert mixes[0] == smallest(parts)
    assert mixes[-1].error == min(mix.error for mix in every(parts))
    for before, after in itertools.pairwise(mixes):
        assert after.nbytes >= before.nbytes
        assert after.error <= before.error
