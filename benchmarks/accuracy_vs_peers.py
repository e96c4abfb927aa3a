"""The arena: one model, the same calibration tokens, the same format, every quantizer, one judge.

    python benchmarks/peers/setup.py
    python -m benchmarks.accuracy_vs_peers --model scout=pocket --model dense=FOLDER
    python -m benchmarks.accuracy_vs_peers --model scout=pocket --options --grids int4

Each contestant runs in its own environment and gets a file of token ids. What its codes decode to
is put into a BF16 checkpoint of the source's layout, and that is judged: KL(original || quantized)
on held-out text of the calibration's kind and of another kind, top-1 and routing agreement,
perplexity, needles, and beside them bytes, CPU seconds and peak memory. Differences to llama4q are
paired over windows, with 95 % bootstrap intervals. With --options the contestants are llama4q's own
options, one changed at a time. Records are kept, so that a run that was stopped goes on; several
processes may work on the same ones; `--table` prints what is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from benchmarks.peers.judge import Seen, all_found, by_transformers, see, verdict
from benchmarks.peers.table import table
from calibrate.data import calibration_tokens
from evals.questions import Questions, ask
from evals.tasks import Ladder
from llama4q.hub import resolve
from llama4q.text import parse_source
from llama4q.tokens import load_tokenizer

WORKERS = Path(__file__).parent / "peers"
RECORDS = Path(__file__).parent / "records"
SAMPLES, LENGTH = 64, 1024
WINDOWS = 32
NEEDLES = 2  # prompts of each length and depth
NEEDLE_LENGTHS, NEEDLE_DEPTHS = [512, 1024, 2048], [step / 10 for step in range(11)]
OTHER_TEXT = (
    "argparse.py",
    "datetime.py",
    "decimal.py",
    "tarfile.py",
    "typing.py",
    "subprocess.py",
)
GRIDS = {  # a shipped recipe -> bits and group
    "int4": (4, 128),
    "int3": (3, 128),
    "int4-g64": (4, 64),
    "int4-g32": (4, 32),
    "int8": (8, 128),
    "fp8": (8, 0),
}


@dataclass(frozen=True)
class Contestant:
    """A quantizer in one of its modes."""

    name: str
    worker: str  # the file that runs it, and the environment that it runs in
    mode: str = ""
    grids: tuple[str, ...] = ("int4", "int3")
    calibrated: bool = True  # else one seed tells


OURS = Contestant("llama4q", "llama4q", grids=tuple(GRIDS))
ROUNDING = Contestant("rounding to nearest", "llama4q", "rtn", tuple(GRIDS), calibrated=False)
PEERS = (
    Contestant("llm-compressor", "llmcompressor"),
    Contestant("llm-compressor, routed tokens", "llmcompressor", "routed"),
    Contestant("llm-compressor, MSE scales", "llmcompressor", "mse"),
    Contestant("GPTQModel", "gptqmodel"),
    Contestant("GPTQModel, its solver alone", "gptqmodel", "solver"),
    Contestant("AutoRound", "autoround"),
    Contestant("AutoRound, mask and scores repaired", "autoround", "fixed"),
    Contestant("bitsandbytes NF4", "bitsandbytes", "", ("int4",), calibrated=False),
)
YARDSTICK = PEERS[0]
SETTINGS = (
    "correction = false",
    "shrinkage = false",
    "act_order = false",
    "scale_points = 1",
    "signed_scales = false",
    "beams = 1",
    "weighting = false",
    "routing_weight = 0.0",
    "token_damping = 0.0",
)
OPTIONS = tuple(Contestant(setting, "llama4q", setting, tuple(GRIDS)) for setting in SETTINGS)


@dataclass(frozen=True)
class Cell:
    """One run: which model, grid and calibration seed, and by whom."""

    model: str
    grid: str
    seed: int
    contestant: Contestant

    @property
    def name(self) -> str:
        mode = "".join(filter(str.isalnum, self.contestant.mode))
        parts = (self.model, self.grid, str(self.seed), self.contestant.worker, mode)
        return "-".join(filter(None, parts))


class Arena:
    """Runs and judges cells of one model; what is found lies in `records`."""

    def __init__(
        self, source: Path, records: Path, work: Path, peers: Path, needles: int = NEEDLES
    ) -> None:
        self.source = source.absolute()
        self.records = records
        self.work = work.absolute()
        self.peers = peers
        self.tokenizer = load_tokenizer(source)
        asked = Ladder(NEEDLE_LENGTHS, NEEDLE_DEPTHS, needles)
        self.questions = {"same": self._ask(None, asked), "other": self._ask_other()}
        self.originals: dict[tuple[str, int], Seen] = {}

    def _ask(self, text: str | None, ladder: Ladder) -> Questions:
        return ask(self.tokenizer, text, WINDOWS, LENGTH, ladder)

    def _ask_other(self) -> Questions:
        """Source code of Python's standard library; the calibration text is documentation."""
        folder = self.work / "other-text"
        folder.mkdir(parents=True, exist_ok=True)
        for name in OTHER_TEXT:
            code = Path(sysconfig.get_paths()["stdlib"], name).read_text(encoding="utf-8")
            (folder / f"{name}.txt").write_text(code, encoding="utf-8")
        return self._ask(str(folder), Ladder([], [], 0))

    def run(self, cell: Cell) -> None:
        """Make the cell's record, unless it is there or another process is at it."""
        record = self.records / f"{cell.name}.json"
        lock = self.work / "locks" / cell.name
        lock.parent.mkdir(parents=True, exist_ok=True)
        self.records.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            if not record.exists():
                found = self._judged(cell, self.work / "runs" / cell.name)
                record.with_suffix(".new").write_text(json.dumps(found) + "\n")
                record.with_suffix(".new").replace(record)

    def _judged(self, cell: Cell, folder: Path) -> dict[str, Any]:
        began = time.perf_counter()
        shutil.rmtree(folder, ignore_errors=True)
        facts = self._quantized(cell, folder)
        if "failure" not in facts:
            for text, questions in self.questions.items():
                facts[text] = self._verdict(folder / "dest", text, questions, cell.seed)
            if cell.seed == 0:
                facts["by_transformers"] = by_transformers(
                    self.source, folder / "dest", self.questions["same"].windows[:2]
                )
        shutil.rmtree(folder)
        print(f"{cell.name}: {time.perf_counter() - began:.0f} s {line(facts)}", flush=True)
        return facts

    def _verdict(self, folder: Path, text: str, questions: Questions, seed: int) -> dict[str, Any]:
        original = self._original(text, questions)
        if seed and all_found(original, questions):  # no needle was ever lost then: one seed tells
            questions = dataclasses.replace(questions, prompts=[])
            original = self._original(text, questions)
        return verdict(original, see(folder, questions), questions)

    def _original(self, text: str, questions: Questions) -> Seen:
        key = (text, len(questions.prompts))
        if key not in self.originals:
            self.originals[key] = see(self.source, questions)
        return self.originals[key]

    def _quantized(self, cell: Cell, folder: Path) -> dict[str, Any]:
        """What the worker says of itself and the processor seconds it took, or why it failed."""
        (folder / "work").mkdir(parents=True)
        numpy.save(folder / "tokens.npy", self._tokens(cell.seed))
        bits, group = GRIDS[cell.grid]
        assignment = {
            "source": str(self.source), "tokens": str(folder / "tokens.npy"), "grid": cell.grid,
            "bits": bits, "group": group, "mode": cell.contestant.mode, "seed": cell.seed,
            "work": str(folder / "work"), "dest": str(folder / "dest"),
        }  # fmt: skip
        (folder / "job.json").write_text(json.dumps(assignment))
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [*self._command(cell.contestant.worker), str(folder / "job.json")],
                stdout=log, stderr=log, cwd=folder,  # some leave logs where they run
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            _, status, used = os.wait4(process.pid, 0)
        measured = {"cpu_seconds": used.ru_utime + used.ru_stime}
        if status:
            lines = (folder / "log").read_text(errors="replace").strip().splitlines()
            return {**measured, "failure": lines[-1] if lines else f"status {status}"}
        facts: dict[str, Any] = json.loads((folder / "dest" / "peer.json").read_text())
        return {**facts, **measured}

    def _command(self, worker: str) -> list[str]:
        if worker == "llama4q":
            return [sys.executable, "-m", "benchmarks.peers.llama4q_worker"]
        python = self.peers.absolute() / worker / "bin" / "python"
        return [str(python), "-W", "ignore", str(WORKERS / f"{worker}_worker.py")]

    def _tokens(self, seed: int) -> Any:
        drawn = calibration_tokens(
            parse_source(None), self.tokenizer, samples=SAMPLES, length=LENGTH, seed=seed
        )
        [tokens] = drawn.tokens
        return tokens.numpy()


def line(facts: dict[str, Any]) -> str:
    """A record in a few words."""
    if "failure" in facts:
        return f"failed: {facts['failure']}"
    same, other = facts["same"], facts["other"]
    check = ""
    if "by_transformers" in facts:
        check = f", by transformers on two windows {facts['by_transformers']:.5f}"
    return (
        f"KL {same['kl_mean']:.5f} ({sum(same['kl'][:2]) / 2:.5f} on two windows{check}), "
        f"other text {other['kl_mean']:.5f}, perplexity {same['perplexity']:.3f}"
    )


def cells(
    model: str, grid: str, seeds: list[int], contestants: Sequence[Contestant]
) -> Iterator[Cell]:
    for contestant in contestants:
        if grid in contestant.grids:
            for seed in seeds if contestant.calibrated else seeds[:1]:
                yield Cell(model, grid, seed, contestant)


def read_records(
    folder: Path, model: str, grid: str, seeds: list[int], contestants: Sequence[Contestant]
) -> dict[str, dict[int, dict[str, Any]]]:
    """Contestant -> seed -> record, of all that is there."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for cell in cells(model, grid, seeds, contestants):
        file = folder / f"{cell.name}.json"
        if file.exists():
            record = json.loads(file.read_text())
            for seed in [cell.seed] if cell.contestant.calibrated else seeds:
                found.setdefault(cell.contestant.name, {})[seed] = record
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--grids", default="int4,int3", help=f"of {', '.join(GRIDS)}")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--options", action="store_true", help="llama4q's options, not the peers")
    parser.add_argument("--only", help="contestants whose name is one of these, by ;")
    parser.add_argument(
        "--needles", type=int, default=NEEDLES,
        help="prompts of each length and depth; records of another number need another folder",
    )  # fmt: skip
    parser.add_argument("--records", type=Path, default=RECORDS, help="default: %(default)s")
    parser.add_argument("--work", type=Path, default=Path(".arena"), help="default: %(default)s")
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="default: %(default)s")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    models = dict(one.split("=", 1) for one in options.model)
    grids = options.grids.split(",")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    contestants = (OURS, *OPTIONS) if options.options else (OURS, ROUNDING, *PEERS)
    known = [one.name for one in contestants]
    if unknown := [grid for grid in grids if grid not in GRIDS]:
        parser.error(f"unknown grid {unknown[0]!r}, choose from {', '.join(GRIDS)}")
    if unknown := [name for name in (options.only or "").split(";") if name and name not in known]:
        parser.error(f"unknown contestant {unknown[0]!r}, choose from {'; '.join(known)}")
    if not options.table:
        arenas = {
            name: Arena(
                resolve(source).folder,
                options.records,
                options.work,
                options.peers,
                options.needles,
            )
            for name, source in models.items()
        }
        wanted = [
            one for one in contestants if not options.only or one.name in options.only.split(";")
        ]
        for grid in grids:
            todo = [cell for name in models for cell in cells(name, grid, seeds, wanted)]
            for cell in sorted(todo, key=lambda cell: cell.seed):
                arenas[cell.model].run(cell)
    for name in models:
        for grid in grids:
            records = read_records(options.records, name, grid, seeds, contestants)
            yardstick = OURS if options.options else YARDSTICK
            print("\n".join(table(f"{name}, {grid}", records, OURS.name, yardstick.name)), "\n")


if __name__ == "__main__":
    main()
