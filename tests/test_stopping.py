"""Ctrl-C and SIGTERM: one line, the exit code that shells expect, and nothing is lost.

The authority is an undisturbed run. tests/stop_runs.py sends the signals, in processes of its own.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llama4q.checkpoint import SINGLE, Checkpoint
from llama4q.stopping import SIGNALS, Stopped, finishing, stoppable
from llama4q.writer import WORK, CheckpointWriter

from . import tiny
from .stop_runs import STOPS
from .test_bad_input import QUICK, VARIANT, with_tokenizer

ROOT = Path(__file__).parent.parent
CLI = (sys.executable, "-c", "import cli; cli.main()")
KEY = {"run": 1}

pytestmark = pytest.mark.usefixtures("signals_restored")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests/stop_runs.py saw."""
    folder = tmp_path_factory.mktemp("stopped")
    found = subprocess.run(
        [sys.executable, "-m", "tests.stop_runs", str(folder)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    saw: dict[str, Any] = json.loads(found.stdout)
    return saw


def stopped(work: Callable[[], object]) -> Stopped:
    """What ends the work."""
    with pytest.raises(Stopped) as stop, stoppable():
        work()
    return stop.value


def test_stopped_by_a_signal_and_repeated(seen: dict[str, Any]) -> None:
    """At random moments: the line says what is there, and the same command ends with its bytes."""
    assert seen["undisturbed"]["code"] == 0, seen["undisturbed"]["said"]
    assert len(seen["stops"]) == len(STOPS)
    for stop in seen["stops"]:
        layers = stop["progress"]
        name = signal.Signals(stop["signal"]).name
        advice = (
            f"{layers} of 2 layers are written; repeat the command, it goes on at layer {layers}"
            if layers < VARIANT.layers
            else "all 2 layers are written; repeat the command to finish"
        )
        *before, last = stop["stopped"]["said"]
        assert last == f"Stopped by {name}: {advice}.", stop
        assert not any("Traceback" in line or "Error" in line for line in before), stop
        assert stop["stopped"]["code"] == 128 + stop["signal"]
        assert stop["again"]["code"] == 0, stop
        replayed = [line for line in stop["again"]["said"] if "was written before" in line]
        assert len(replayed) >= 2 * layers  # a layer has two parts
        assert stop["differences"] == []


def test_two_runs_at_once(seen: dict[str, Any]) -> None:
    """The second is refused by the first one's name; once that is killed a third goes on."""
    twice = seen["twice"]
    assert twice["second"]["code"] == 1
    [line] = twice["second"]["said"]
    holder = rf"\(process {twice['first']} on \S+\)"
    assert re.search(f": another run is at work here {holder}; ", line)
    assert twice["third"]["code"] == 0, twice
    assert "layer 0, part 1 of 2 was written before: checked and replayed" in twice["third"]["said"]
    assert twice["differences"] == []


def test_a_process_that_reads_ahead_ends(tmp_path: Path) -> None:
    """The whole process and its threads, not only the command."""
    source = with_tokenizer(tiny.write(tmp_path / "source", VARIANT))
    process = subprocess.Popen(
        [*CLI, "quantize", source, tmp_path / "out", *QUICK],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (tmp_path / "out" / WORK / "run.json").exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 128 + signal.SIGTERM, said
    assert said[-1].startswith("Stopped by SIGTERM: ")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_raises_at_once(number: signal.Signals) -> None:
    def work() -> None:
        signal.raise_signal(number)
        raise AssertionError("went on")

    assert stopped(work).signal == number


def test_a_write_is_finished_first(tmp_path: Path) -> None:
    """Files and record: the unit counts, though the signal came before its last tensor."""

    def signalled() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.ones(3)
        signal.raise_signal(signal.SIGTERM)
        yield "b", torch.ones(2)

    with CheckpointWriter(tmp_path, KEY) as writer:
        stopped(lambda: writer.write("one", signalled(), {}))
        assert writer.done("one") is not None


def test_sections_in_sections_end_with_the_outer_one() -> None:
    reached = []

    def work() -> None:
        with finishing():
            with finishing():
                signal.raise_signal(signal.SIGINT)
            reached.append("the end of the inner one")
        reached.append("the end of the outer one")

    stopped(work)
    assert reached == ["the end of the inner one"]


def test_a_signal_in_a_finalizer_is_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    """Python lets no exception out of one, and prints it."""

    class Held:
        pass

    def work() -> None:
        weakref.finalize(Held(), signal.raise_signal, signal.SIGTERM)  # at once
        time.sleep(60)

    assert stopped(work).signal == signal.SIGTERM
    assert capfd.readouterr().err == ""


def test_a_mistake_while_finishing_is_told_and_not_the_signal() -> None:
    def work() -> None:
        with stoppable(), finishing():
            signal.raise_signal(signal.SIGTERM)
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        work()


def test_the_second_signal_ends_the_process_at_once() -> None:
    """Even while something is being finished, and with no traceback."""
    program = (
        "import time; from llama4q.stopping import *\n"
        "with stoppable(), finishing():\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    assert process.stderr
    with process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "\n"
        said = process.stderr.readline()
        assert said == "Finishing what is being written; a second signal stops at once.\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == -signal.SIGINT
        assert process.stderr.read() == ""


def test_a_thread_that_reads_ahead_gives_up(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1000)}, tmp_path / SINGLE)
    ours = Checkpoint(tmp_path)

    def read_forever() -> None:
        while True:
            ours.get("a")

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_forever)
        stopped(lambda: signal.raise_signal(signal.SIGTERM))
        assert isinstance(reading.exception(timeout=60), Stopped)
    with stoppable():  # the next command reads again
        assert ours.get("a").equal(torch.ones(1000))


def test_what_a_shell_had_ignored_stays_ignored() -> None:
    """Ctrl-C is not for a command that runs in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def work() -> None:
        signal.raise_signal(signal.SIGINT)
        with finishing():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)

    assert stopped(work).signal == signal.SIGTERM


def test_handlers_come_back_and_other_threads_have_none() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with stoppable():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before

    def command() -> None:
        with stoppable():
            assert [signal.getsignal(number) for number in SIGNALS] == before

    thread = threading.Thread(target=command)
    thread.start()
    thread.join()


def test_ctrl_c_that_somebody_else_turned_into_an_exception() -> None:
    """As hf_xet does."""

    def work() -> None:
        raise KeyboardInterrupt

    assert stopped(work).signal == signal.SIGINT
