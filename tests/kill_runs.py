"""Kills quantize runs at random moments, resumes them, and compares the files byte for byte.

`python -m tests.kill_runs FOLDER` works in FOLDER and prints what it saw as JSON, for
tests/test_resume.py to judge. A process of its own because it forks: no torch operation may have
run in the parent, or the children would inherit OpenMP's locks without its threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import compressed_tensors.compressors.pack_quantized.helpers  # noqa: F401 - before the forks

from llama4q.checkpoint import INDEX, Checkpoint
from llama4q.errors import UserError
from llama4q.export import REPORTS
from llama4q.manifest import MANIFEST, check_manifest
from llama4q.writer import WORK

from . import runs, tiny

LAYERS = 6
VARIANT = tiny.Variant(layers=LAYERS, experts=2, rope_scaling=tiny.SCOUT_ROPE)
SEED = 0
ANYWHERE, FINISHING = 22, 8  # kills spread over the whole run, and over its last steps alone
AT_INDEX = 2  # kills at the very moment when the index appears, and as many at the manifest
CHAIN = 5  # kills of one and the same run
ATTEMPTS = 3  # at a kill that came too late
POLL = 0.0005  # seconds

# How far a run is: so many layers are recorded, or
LAST_STEPS = LAYERS + 1  # the first shard has its final name
INDEXED = LAYERS + 2  # the index is there
FINISHED = LAYERS + 3  # the manifest is there


@dataclass
class Seen:
    """What one kill left behind, and what became of it."""

    progress: int  # when the run was killed; before it was resumed:
    is_checkpoint: bool
    has_index: bool
    has_manifest: bool
    complete: bool  # the files, all of them as in the reference
    code: int = 0  # of the resumed run
    said: str = ""
    differences: tuple[str, ...] = ()


class Timeline:
    """When an undisturbed run made each step; finds the same place in a faster or slower run."""

    def __init__(self, steps: list[tuple[float, int]], end: float) -> None:
        self.steps = steps  # seconds, progress
        self.end = end

    def at(self, progress: int) -> float:
        return next(moment for moment, step in self.steps if step >= progress)

    def place(self, moment: float) -> tuple[int, float]:
        """The last step before `moment`, and the seconds from there."""
        began, step = max(entry for entry in self.steps if entry[0] <= moment)
        return step, moment - began


def progress(folder: Path) -> int:
    if (folder / MANIFEST).exists():
        return FINISHED
    if (folder / INDEX).exists():
        return INDEXED
    if any(folder.glob("model-*-of-*.safetensors")):
        return LAST_STEPS
    return len(list((folder / WORK).glob("layer-?????.json")))


def fork(work: Callable[[], object], log: Path) -> int:
    """Do `work` in a child; exit code 0, its own, 1 for a user's mistake, 2 for anything else."""
    pid = os.fork()
    if pid:
        return pid
    code = 2
    try:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
        work()
        code = 0
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        code = 1
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
    finally:
        os._exit(code)


def start(source: Path, folder: Path) -> int:
    return fork(lambda: runs.run(source, folder), folder.with_suffix(".log"))


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def undisturbed(source: Path, folder: Path) -> Timeline:
    """A run that nothing disturbs."""
    began = time.perf_counter()
    steps = [(0.0, 0)]
    pid = start(source, folder)
    while not ended(pid):
        now = progress(folder)
        if now > steps[-1][1]:
            steps.append((time.perf_counter() - began, now))
        time.sleep(POLL)
    if exit_code(pid):
        raise SystemExit(folder.with_suffix(".log").read_text())
    return Timeline(steps, time.perf_counter() - began)


def kill(source: Path, folder: Path, wanted: Path, step: int, seconds: float) -> Seen:
    """Start or resume a run, SIGKILL it so long after a step, and look at what it left."""
    pid = start(source, folder)
    while progress(folder) < step and not ended(pid):
        time.sleep(POLL)
    end = time.perf_counter() + seconds
    # not beyond the next step, should the machine be less busy than before
    while progress(folder) <= step and time.perf_counter() < end:
        time.sleep(POLL)
    os.kill(pid, signal.SIGKILL)
    exit_code(pid)
    return Seen(
        progress(folder),
        opens(folder),
        (folder / INDEX).exists(),
        (folder / MANIFEST).exists(),
        not any(differences(wanted, folder)),
    )


def caught(source: Path, folder: Path, wanted: Path, step: int, seconds: float) -> Seen:
    """Kill a fresh run; once more, and sooner, where it was done by then: disks are not always as
    slow as they were for the reference."""
    for _ in range(ATTEMPTS):
        seen = kill(source, folder, wanted, step, seconds)
        if seen.progress < FINISHED or step == FINISHED:
            break
        shutil.rmtree(folder)
        seconds /= 4
    else:
        seen = kill(source, folder, wanted, step, seconds)
    return seen


def opens(folder: Path) -> bool:
    """Whether the folder passes for a checkpoint."""
    with contextlib.suppress(UserError):
        Checkpoint(folder)
        return True
    return False


def resume(source: Path, folder: Path, wanted: Path, seen: Seen) -> Seen:
    """Let the run go on to its end and compare its files with the reference's."""
    seen.code = exit_code(start(source, folder))
    seen.said = folder.with_suffix(".log").read_text().strip()
    seen.differences = tuple(differences(wanted, folder))
    return seen


def differences(wanted: Path, found: Path) -> Iterator[str]:
    """Names of the files that differ. What a kill left of the work folder is not part of it."""
    names = {
        str(path.relative_to(folder))
        for folder in (wanted, found)
        for path in folder.rglob("*")
        if path.is_file() and WORK not in path.parts
    }
    for name in sorted(names):
        if not ((wanted / name).exists() and (found / name).exists()):
            yield f"{name} is in one folder only"
        elif content(wanted / name) != content(found / name):
            yield name


def content(path: Path) -> Any:
    """A file's bytes; of the report all but how long things took, and of the manifest all but the
    reports, each of which it must have as it is."""
    if path.name == "report.json":
        return without_seconds(json.loads(path.read_bytes()))
    if path.name == MANIFEST:
        check_manifest(path.parent)
        listed = json.loads(path.read_bytes())["files"]
        return {name: entry for name, entry in listed.items() if name not in REPORTS}
    return path.read_bytes()


def without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_seconds(item) for key, item in value.items() if key != "seconds"}
    if isinstance(value, list):
        return [without_seconds(item) for item in value]
    return value


def moments(timeline: Timeline, chance: random.Random) -> list[float]:
    """Random, yet spread: one in each of equal parts of the run, and of its last steps."""
    last = timeline.at(LAST_STEPS)
    anywhere = [timeline.end * (n + chance.random()) / ANYWHERE for n in range(ANYWHERE)]
    finishing = [
        (timeline.end - last) * (n + chance.random()) / FINISHING for n in range(FINISHING)
    ]
    return anywhere + [last + rest for rest in finishing]


def main(folder: Path) -> dict[str, Any]:
    chance = random.Random(SEED)
    source, wanted = folder / "source", folder / "reference"
    if exit_code(fork(lambda: tiny.write(source, VARIANT), folder / "source.log")):
        raise SystemExit((folder / "source.log").read_text())
    timeline = undisturbed(source, wanted)
    places = [timeline.place(moment) for moment in moments(timeline, chance)]
    kills = []
    for number, (step, seconds) in enumerate(places):
        run = folder / f"run-{number:02d}"
        kills.append(resume(source, run, wanted, caught(source, run, wanted, step, seconds)))
    for number in range(AT_INDEX):
        for step in (LAST_STEPS, INDEXED):
            run = folder / f"after-{step}-{number}"
            kills.append(resume(source, run, wanted, kill(source, run, wanted, step, 60.0)))
    run = folder / "chain"
    chain = []
    for layers in range(CHAIN):
        seconds = (timeline.at(layers + 1) - timeline.at(layers)) * chance.random()
        chain.append(kill(source, run, wanted, layers, seconds))
    resume(source, run, wanted, chain[-1])
    return {"kills": [asdict(one) for one in kills], "chain": [asdict(one) for one in chain]}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
