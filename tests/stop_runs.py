"""Stops the command by signals at random moments, and starts it twice at once.

`python -m tests.stop_runs FOLDER` works in FOLDER and prints what it saw as JSON, for
tests/test_stopping.py to judge. A process of its own because it forks, as tests/kill_runs.py does.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import compressed_tensors.compressors.pack_quantized.helpers  # noqa: F401 - before the forks

import cli
import evals.evaluation
import evals.report  # noqa: F401
from llama4q.export import REPORTS
from llama4q.writer import WORK

from . import tiny
from .kill_runs import POLL, differences, ended, exit_code, fork, progress, without_seconds
from .test_bad_input import QUICK, VARIANT, with_tokenizer

SEED = 0
STOPS = [signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT]
LAYER_SECONDS = 0.2  # about what a layer takes


def quantize(source: Path, folder: Path) -> int:
    """Begin the command; its process."""

    def command() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            cli.main(["quantize", str(source), str(folder), *QUICK])

    return fork(command, folder.with_suffix(".log"))


def result(pid: int, folder: Path) -> dict[str, Any]:
    """How the command ended."""
    code = exit_code(pid)
    return {"code": code, "said": folder.with_suffix(".log").read_text().splitlines()}


def await_layers(pid: int, folder: Path, layers: int) -> None:
    """Until the run has begun and so many layers are recorded."""
    while not ended(pid) and not (
        (folder / WORK / "run.json").exists() and progress(folder) >= layers
    ):
        time.sleep(POLL)


def stop(source: Path, folder: Path, number: signal.Signals, layers: int, seconds: float) -> Any:
    """Send the signal so long after a layer, then repeat the command."""
    pid = quantize(source, folder)
    await_layers(pid, folder, layers)
    end = time.perf_counter() + seconds
    while progress(folder) <= layers and time.perf_counter() < end:  # not beyond the next layer
        time.sleep(POLL)
    os.kill(pid, number)
    stopped = result(pid, folder)
    reached = progress(folder)
    again = result(quantize(source, folder), folder)
    return {"signal": number, "stopped": stopped, "progress": reached, "again": again}


def twice(source: Path, folder: Path) -> Any:
    """A second command beside the first, which is then killed, and a third."""
    first = quantize(source, folder)
    await_layers(first, folder, 1)
    os.kill(first, signal.SIGSTOP)
    second = result(quantize(source, folder), folder)
    os.kill(first, signal.SIGKILL)
    exit_code(first)
    return {"first": first, "second": second, "third": result(quantize(source, folder), folder)}


def other_files(wanted: Path, found: Path) -> list[str]:
    """What differs, beside when and where the report was made."""
    names = [name for name in differences(wanted, found) if name not in REPORTS]
    return names if report(wanted) == report(found) else [*names, "report.json"]


def report(folder: Path) -> Any:
    content = without_seconds(json.loads((folder / "report.json").read_bytes()))
    del content["created"], content["quantized"]
    return content


def main(folder: Path) -> dict[str, Any]:
    chance = random.Random(SEED)
    source, wanted = folder / "source", folder / "reference"
    if exit_code(fork(lambda: with_tokenizer(tiny.write(source, VARIANT)), folder / "source.log")):
        raise SystemExit((folder / "source.log").read_text())
    undisturbed = result(quantize(source, wanted), wanted)
    stops = []
    for at, number in enumerate(STOPS):
        run = folder / f"stop-{at}"
        seen = stop(source, run, number, at % VARIANT.layers, LAYER_SECONDS * chance.random())
        stops.append({**seen, "differences": other_files(wanted, run)})
    both = folder / "twice"
    beside = twice(source, both)
    return {
        "undisturbed": undisturbed,
        "stops": stops,
        "twice": {**beside, "differences": other_files(wanted, both)},
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
