"""calibrate.eta: simulated runs on machines that are slower than planned, phase by phase."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from calibrate.eta import Eta, Planned
from calibrate.plan import OVERHEAD, Pace, make_plan
from calibrate.work import Phase, Texts
from llama4q.config import parse_config
from llama4q.recipe import load_recipe

from .test_inspect import MAVERICK, SCOUT

# FLOP/s, or weights times points or beams, and bytes/s of a desktop.
FLOPS = dict.fromkeys(Phase, 1e12) | {
    Phase.FACTOR: 1e11, Phase.CORRECTION: 3e11, Phase.SCALES: 1e9, Phase.CODES: 5e7,
}  # fmt: skip
PACE = Pace(FLOPS, read=1e9, write=3e8)
TEXTS = Texts(((128, 2048),), ((16, 2048),), ((10, 4096),))


def slower(pace: Pace, seed: int) -> Pace:
    """Every phase and the disk by a factor of its own, up to four and never faster than half."""
    chance = random.Random(seed)
    factors = {phase: chance.uniform(0.5, 4) for phase in Phase}
    return replace(
        pace,
        speeds={phase: pace.speeds[phase] / factors[phase] for phase in Phase},
        read=pace.read / chance.uniform(0.5, 4),
        write=pace.write / chance.uniform(0.5, 4),
    )


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    ("config", "recipe"),
    [(SCOUT, "int4"), (SCOUT, "mixed"), (MAVERICK, "int4"), (MAVERICK, "mixed")],
)
def test_within_a_fifth_after_the_second_layer(
    config: dict[str, object], recipe: str, seed: int
) -> None:
    """Maverick's dense and expert layers take very different times; `mixed` has FP8 in the first
    two layers, so that those behind them are of kinds not seen yet."""
    plan = make_plan(parse_config(config, "here"), load_recipe(recipe), TEXTS)
    eta = plan.eta(PACE)
    true = [slower(PACE, seed).seconds(unit) for unit in plan.units]
    for done, seconds in enumerate(true, start=1):
        eta.finished(seconds)
        left = sum(true[done:])
        if 2 <= done < len(true):
            whole = sum(true)  # at the end, little is left that was not seen before
            assert eta.remaining() == pytest.approx(left, rel=0.2, abs=0.01 * whole), done
    assert eta.remaining() == 0


def units(*seconds: float) -> Sequence[Planned]:
    return [Planned("MoE", "int4", one) for one in seconds]


def test_before_anything_is_done_it_is_the_plans_own_guess() -> None:
    assert Eta(units(10, 20), guess=OVERHEAD).remaining() == 30 * OVERHEAD


def test_each_kind_has_its_own_factor() -> None:
    planned = [Planned(network, "int4", 10) for network in ("dense", "MoE", "dense", "MoE")]
    eta = Eta(planned)
    eta.finished(10)
    eta.finished(40)
    assert eta.remaining() == 50


def test_schemes_not_seen_yet_take_the_factor_of_their_network() -> None:
    eta = Eta([Planned("dense", "fp8", 10), Planned("MoE", "fp8", 10), Planned("MoE", "int4", 5)])
    eta.finished(10)
    eta.finished(30)
    assert eta.remaining() == 15


def test_it_goes_down_within_a_unit() -> None:
    eta = Eta(units(10, 10, 10))
    eta.finished(20)
    assert eta.remaining(spent=5) == 35
    assert eta.remaining(spent=500) == 20  # the present one is about to end


def test_what_an_earlier_run_did_teaches_nothing() -> None:
    eta = Eta(units(10, 10, 10))
    eta.replayed()
    assert eta.remaining() == 20
    eta.finished(30)
    assert eta.remaining() == 30
