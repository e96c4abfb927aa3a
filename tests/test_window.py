"""Which files lie on the disk: against a slow simulation of every step, and with real threads."""

from __future__ import annotations

import random
import threading
import time

import pytest

from llama4q.window import AHEAD, Window, schedule

SIZES = dict(zip("abcdefgh", (5, 3, 8, 1, 9, 2, 7, 4), strict=True))


def some_steps(chance: random.Random) -> list[set[str]]:
    """What each step needs; files are needed in several steps, some by none."""
    names = sorted(SIZES)
    return [set(chance.sample(names, chance.randint(0, 3))) for _ in range(7)]


@pytest.mark.parametrize("seed", range(20))
def test_the_bound_is_that_of_a_simulation(seed: int) -> None:
    steps = some_steps(random.Random(seed))
    most = 0
    for now in range(len(steps)):
        soon = set().union(*steps[: now + AHEAD + 1])
        later = set().union(*steps[now:])
        most = max(most, sum(SIZES[name] for name in soon & later))
    assert schedule(steps, SIZES).most == most


@pytest.mark.parametrize("seed", range(20))
def test_files_are_there_when_needed_fetched_once_and_never_too_many(seed: int) -> None:
    """The reader is one step ahead of what it has done, as a run's prefetching is."""
    chance = random.Random(seed)
    steps = some_steps(chance)
    here: set[str] = set()
    fetched: list[str] = []
    most = 0
    lock = threading.Lock()

    def fetch(name: str) -> None:
        nonlocal most
        with lock:
            here.add(name)
            fetched.append(name)
            most = max(most, sum(SIZES[one] for one in here))
        time.sleep(chance.random() / 1000)

    def drop(name: str) -> None:
        with lock:
            here.remove(name)

    plan = schedule(steps, SIZES)
    window = Window(plan, SIZES, fetch, drop)
    for step in range(len(steps)):
        for name in sorted(set().union(*steps[step : step + 2])):
            window.need(name)
            assert name in here
        window.passed(step)
    assert sorted(fetched) == sorted(set().union(*steps))
    assert fetched == list(plan.first)
    assert most <= plan.most
    assert not here


def test_what_fetching_raises_reaches_who_needs_the_file() -> None:
    def fetch(name: str) -> None:
        raise OSError(f"no {name}")

    window = Window(schedule([{"a"}], SIZES), SIZES, fetch, lambda name: None)
    for _ in range(2):
        with pytest.raises(OSError, match="no a"):
            window.need("a")


def test_a_file_that_went_is_a_bug() -> None:
    window = Window(schedule([{"a"}], SIZES), SIZES, lambda name: None, lambda name: None)
    window.need("a")
    window.passed(0)
    with pytest.raises(AssertionError, match="a is needed after step 0"):
        window.need("a")


def test_nothing_is_fetched_after_the_end() -> None:
    fetched: list[str] = []
    steps = [{name} for name in SIZES]
    window = Window(schedule(steps, SIZES), SIZES, fetched.append, lambda name: None)
    window.need("a")
    window.end()
    window._thread.join(5)
    assert not window._thread.is_alive()
    assert set(fetched) < set(SIZES)
