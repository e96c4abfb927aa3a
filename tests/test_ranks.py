"""Several processes on one run: they write what one process writes, however many there are.

The authority is the run of one process. They are started as a user does, by torchrun, on one
machine and as on two, with 127.0.0.1 between them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from calibrate.judge import parts_of
from calibrate.leaves import LEAVES, check_ranks, deal
from calibrate.units import check_alike
from llama4q.errors import UserError
from llama4q.export import REPORTS
from llama4q.manifest import check_manifest
from llama4q.ranks import Ranks
from llama4q.writer import WORK

from .kill_runs import POLL, without_seconds

ROOT = Path(__file__).parent.parent
COMMAND = (sys.executable, "-c", "import cli; cli.main()", "quantize")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
OPTIONS = (
    "--samples", "12", "--length", "128", "--eval-windows", "5", "--eval-length", "128",
    "--lengths", "256", "--depths", "0.5", "--prompts", "2",  # two batches in all
)  # fmt: skip
RECIPE = """
name = "all"
description = "Every way in which a weight is found, and experts that stay as they are"
[schemes]
experts = "int4"
shared_expert = "int4"
o_proj = "int4"
[[override]]
layers = [1]
experts = "bf16"
[[override]]
layers = [4]
experts = "fp8"
shared_expert = "fp8"
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
PATIENCE = 300.0  # seconds until a test gives up


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class Launched:
    """A command at work, and what it says on stderr."""

    def __init__(self, log: Path, *command: str, **more: Any) -> None:
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=file, **{"env": ENVIRONMENT, **more}
            )

    def code(self) -> int:
        return self.process.wait(PATIENCE)

    def said(self) -> str:
        return self.log.read_text()

    def worker(self) -> int:
        """The process that the launcher has started."""
        pid = self.process.pid
        [child] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(child)


def quantize(folder: Path) -> list[str]:
    """The command, alone."""
    recipe = folder.with_suffix(".toml")
    recipe.write_text(RECIPE)
    return [*COMMAND, "pocket", str(folder), "--recipe", str(recipe), *OPTIONS]


def alone(folder: Path) -> Launched:
    return Launched(folder.with_suffix(".log"), *quantize(folder))


def together(folder: Path, count: int) -> Launched:
    start = (*TORCHRUN, "--standalone", f"--nproc-per-node={count}", "--no-python")
    return Launched(folder.with_suffix(".log"), *start, *quantize(folder))


def on_two_nodes(folder: Path) -> list[Launched]:
    """A launcher for each, and one process under it."""
    meeting = ("--master-addr=127.0.0.1", f"--master-port={free_port()}", "--nnodes=2")
    return [
        Launched(
            folder.with_suffix(f".{node}.log"),
            *TORCHRUN, *meeting, f"--node-rank={node}", "--nproc-per-node=1", "--no-python",
            *quantize(folder),
        )
        for node in range(2)
    ]  # fmt: skip


def await_written(folder: Path, unit: str, running: Launched) -> None:
    while not (folder / WORK / f"{unit}.json").exists():
        assert running.process.poll() is None, running.said()
        time.sleep(POLL)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    run = alone(folder)
    assert run.code() == 0, run.said()
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Launched]]:
    """A folder as two nodes leave it when one of them dies, and both launchers."""
    folder = tmp_path_factory.mktemp("killed") / "out"
    nodes = on_two_nodes(folder)
    await_written(folder, "layer-00002.01", nodes[0])
    os.kill(nodes[1].worker(), signal.SIGKILL)
    for node in nodes:
        node.code()
    return folder, nodes


def assert_same(wanted: Path, found: Path) -> None:
    """Every byte; of the report all but when, how long, and by which command."""
    names = sorted(check_manifest(wanted))
    assert sorted(check_manifest(found)) == names
    for name in names:
        if name not in REPORTS:
            assert (found / name).read_bytes() == (wanted / name).read_bytes(), name
    ours, theirs = (json.loads((folder / "report.json").read_bytes()) for folder in (found, wanted))
    for key in ("layers", "rescues", "evidence", "files", "calibration", "verified"):
        assert without_seconds(ours[key]) == without_seconds(theirs[key]), key


def test_three_processes_write_what_one_writes(reference: Path, tmp_path: Path) -> None:
    run = together(tmp_path / "out", 3)
    assert run.code() == 0, run.said()
    assert_same(reference, tmp_path / "out")
    # told once and of all weights: the first rank speaks for the others
    told, wanted = (
        sorted(re.findall(r"^layers\S+|^\d+\.\S+", text, re.MULTILINE))
        for text in (run.said(), reference.with_suffix(".log").read_text())
    )
    assert told == wanted


def test_when_a_rank_dies_the_others_end_with_a_line(killed: tuple[Path, list[Launched]]) -> None:
    folder, nodes = killed
    assert [node.process.returncode for node in nodes] == [1, 1]
    errors = re.findall("^Error: .*", nodes[0].said(), re.MULTILINE)
    assert len(errors) == 1
    assert "another rank has stopped" in errors[0]
    assert "repeat the command, with any number of ranks" in errors[0]
    assert re.search(r"exitcode\s*: 1 ", nodes[0].said())  # of the rank itself
    assert [path.name for path in folder.iterdir()] == [WORK]


@pytest.mark.parametrize("go_on", ["alone", "on two nodes"])
def test_another_number_of_ranks_goes_on_where_they_were(
    go_on: str, killed: tuple[Path, list[Launched]], reference: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(killed[0], folder)
    runs = [alone(folder)] if go_on == "alone" else on_two_nodes(folder)
    assert [run.code() for run in runs] == [0] * len(runs), runs[0].said()
    assert "was written before: checked and replayed" in runs[0].said()
    assert_same(reference, folder)


def test_a_folder_that_not_all_ranks_see(tmp_path: Path) -> None:
    """Each process has a working folder of its own, as each machine has its own disk."""
    port = str(free_port())
    runs = []
    for rank in range(2):
        place = tmp_path / f"machine{rank}"
        place.mkdir()
        told = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        runs.append(
            Launched(
                place / "log", *COMMAND, "pocket", "out", *OPTIONS,
                cwd=place, env={**ENVIRONMENT, **told, **there},
            )
        )  # fmt: skip
    assert [run.code() for run in runs] == [1, 1]
    assert runs[0].said().splitlines()[-1].startswith("Error: out: rank 1 on ")
    assert "name a folder that all ranks share" in runs[0].said()
    assert runs[1].said() == ""


@dataclasses.dataclass
class Numbered(Ranks):
    """One of several, for what is decided without the others."""

    number: int
    count: int


class Mixed(Numbered):
    """The first of two ranks, the other one of which has another version."""

    def everyone(self, value: Any) -> list[Any]:
        key, host = value
        return [value, ({**key, "llama4q": "0.0.1"}, host)]


TEXTS = (
    torch.arange(13 * 4).view(13, 4),
    1000 + torch.arange(9 * 6).view(9, 6),
)


@pytest.mark.parametrize("count", range(1, LEAVES + 1))
def test_ranks_side_by_side_have_the_text_of_one(count: int) -> None:
    """The same batches in the same order, and each token in the part that is its sequence's."""
    whole = deal(TEXTS)
    dealt = [deal(TEXTS, Numbered(number, count)) for number in range(count)]
    batches = [batch for one in dealt for batch in one.batches]
    assert [batch.tolist() for batch in batches] == [batch.tolist() for batch in whole.batches]
    assert [one.own.start for one in dealt[1:]] == [one.own.stop for one in dealt[:-1]]
    assert dealt[-1].own.stop == len(whole.parts) == sum(text.numel() for text in TEXTS)
    drawn = torch.cat([text.flatten() for text in TEXTS])
    wanted = dict(zip(drawn.tolist(), parts_of([(13, 4), (9, 6)]).tolist(), strict=True))
    order = torch.cat([batch.flatten() for batch in batches]).tolist()
    assert [wanted[token] for token in order] == whole.parts.tolist()
    for one in dealt:
        assert torch.equal(one.parts, whole.parts)


def test_no_leaf_is_in_both_halves() -> None:
    dealt = deal(TEXTS)
    starts = [0, *dealt.ends]
    halves = [
        set(dealt.parts[start:stop].tolist()) - {2}
        for start, stop in zip(starts, dealt.ends, strict=False)
    ]
    assert halves == [{leaf % 2} for leaf in range(LEAVES)]


@pytest.mark.parametrize(
    ("count", "sequences", "said"),
    [(9, 100, "at most 8"), (2, 7, "7 calibration sequences for 2 ranks")],
)
def test_more_ranks_than_there_is_text_for(count: int, sequences: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_ranks(Numbered(0, count), sequences)
    check_ranks(Numbered(0, 1), 1)


def test_ranks_with_other_programs_or_files_are_refused() -> None:
    key = {"source": "one", "llama4q": "0.1.0"}
    with pytest.raises(UserError, match=r"rank 1 on .* has another llama4q than rank 0 \(0\.0\.1"):
        check_alike(Mixed(0, 2), key)
    check_alike(Numbered(0, 1), key)


def test_python_is_not_taken_apart_beside_gloo() -> None:
    """Its threads abort the process then, now and again: a rank's process ends before that."""
    program = "import atexit, os; atexit.register(os.abort); import cli; cli.main(['--version'])"
    several = {**ENVIRONMENT, "WORLD_SIZE": "2", "RANK": "1"}
    run = subprocess.run([sys.executable, "-c", program], env=several, capture_output=True)
    assert run.returncode == 0
    assert run.stdout.startswith(b"llama4q")
