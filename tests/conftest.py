"""Tests use one thread: their matrices are small, and two threads on a busy machine mostly wait."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; child processes inherit it
os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is: no GPU is needed

import signal
from collections.abc import Iterator

import pytest

from llama4q.stopping import stoppable


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    """Also where a shell runs the tests in the background, and has it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def signals_restored() -> Iterator[None]:
    """For a test that sends signals to itself: Ctrl-C stops pytest afterwards as before."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    with stoppable():  # nobody asks any more
        pass
