"""The arena: one model, the same calibration tokens, the same format, every quantizer, one judge.

    python benchmarks/peers/setup.py
    python -m benchmarks.accuracy_vs_peers --model scout=pocket --model dense=FOLDER --work .arena

Each contestant runs in its own environment and gets a file of token ids. What its codes decode to
is put into a BF16 checkpoint of the source's layout, and that is judged: KL(original || quantized)
on held-out text of the calibration's kind and of another kind, top-1 and routing agreement,
perplexity, needles, and beside them bytes, CPU seconds and peak memory. Differences to llama4q are
paired over windows, with 95 % bootstrap intervals. Needles are asked with the first seed only.
Results are kept in WORK, so that a run that was stopped goes on, and several processes may share
it (`--only`); `--table` prints what is there.
"""

from __future__ import annotations

import argparse
import dataclasses
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
import torch

from benchmarks.peers.judge import Seen, by_transformers, see, verdict
from calibrate.data import calibration_tokens
from evals.questions import Needles, Questions, ask
from llama4q.hub import resolve
from llama4q.text import load_tokenizer, parse_source

WORKERS = Path(__file__).parent / "peers"
SAMPLES, LENGTH = 64, 1024
WINDOWS = 32
NEEDLES = Needles([512, 1024, 2048], [step / 10 for step in range(11)], 2)
OTHER_TEXT = (
    "argparse.py",
    "datetime.py",
    "decimal.py",
    "tarfile.py",
    "typing.py",
    "subprocess.py",
)
RESAMPLES = 10_000


@dataclass(frozen=True)
class Contestant:
    """A quantizer in one of its modes."""

    name: str
    worker: str  # the file that runs it, and the environment that it runs in
    mode: str = ""
    bits: tuple[int, ...] = (4, 3)


OURS = Contestant("llama4q", "llama4q")
CONTESTANTS = (
    Contestant("rounding to nearest", "llama4q", "rtn"),
    OURS,
    Contestant("llm-compressor", "llmcompressor"),
    Contestant("llm-compressor, routed tokens", "llmcompressor", "routed"),
    Contestant("llm-compressor, MSE scales", "llmcompressor", "mse"),
    Contestant("GPTQModel", "gptqmodel"),
    Contestant("GPTQModel, its solver alone", "gptqmodel", "solver"),
    Contestant("AutoRound", "autoround"),
    Contestant("AutoRound, mask repaired", "autoround", "masks"),
    Contestant("AutoRound, mask and scores repaired", "autoround", "fixed"),
    Contestant("bitsandbytes NF4", "bitsandbytes", "", (4,)),
)
YARDSTICK = "llm-compressor"


@dataclass(frozen=True)
class Cell:
    """One run: which model, bits and calibration seed, and by whom."""

    model: str
    bits: int
    seed: int
    contestant: Contestant

    @property
    def name(self) -> str:
        mode = f"-{self.contestant.mode}" if self.contestant.mode else ""
        return f"{self.model}-int{self.bits}-{self.seed}-{self.contestant.worker}{mode}"


class Arena:
    """Runs and judges cells of one model; everything that is found lies in `work`."""

    def __init__(self, model: str, source: Path, work: Path, peers: Path) -> None:
        self.model = model
        self.source = source.absolute()
        self.work = work.absolute()
        self.peers = peers
        self.tokenizer = load_tokenizer(source)
        self.questions = {"same": self._ask(None, NEEDLES), "other": self._ask_other()}
        self.originals: dict[tuple[str, int], Seen] = {}

    def _ask(self, text: str | None, needles: Needles) -> Questions:
        return ask(self.tokenizer, text, WINDOWS, LENGTH, needles)

    def _ask_other(self) -> Questions:
        """Source code of Python's standard library; the calibration text is documentation."""
        folder = self.work / "other-text"
        folder.mkdir(parents=True, exist_ok=True)
        for name in OTHER_TEXT:
            code = Path(sysconfig.get_paths()["stdlib"], name).read_text(encoding="utf-8")
            (folder / f"{name}.txt").write_text(code, encoding="utf-8")
        return self._ask(str(folder), Needles([], [], 0))

    def run(self, cell: Cell) -> dict[str, Any]:
        """The cell's record; runs it unless it is there."""
        record = self.work / "records" / f"{cell.name}.json"
        if not record.exists():
            record.parent.mkdir(parents=True, exist_ok=True)
            found = self._judged(cell, self.work / "runs" / cell.name)
            record.with_suffix(".new").write_text(json.dumps(found))
            record.with_suffix(".new").replace(record)
        found_before: dict[str, Any] = json.loads(record.read_text())
        return found_before

    def _judged(self, cell: Cell, folder: Path) -> dict[str, Any]:
        began = time.perf_counter()
        shutil.rmtree(folder, ignore_errors=True)
        facts = self._quantized(cell, folder)
        if "failure" not in facts:
            for text, questions in self.questions.items():
                if cell.seed:  # no needle was ever lost: one seed tells
                    questions = dataclasses.replace(questions, prompts=[])
                facts[text] = self._verdict(folder / "dest", text, questions)
            if cell.seed == 0:
                facts["by_transformers"] = by_transformers(
                    self.source, folder / "dest", self.questions["same"].windows[:2]
                )
        shutil.rmtree(folder)
        print(f"{cell.name}: {time.perf_counter() - began:.0f} s {line(facts)}", flush=True)
        return facts

    def _verdict(self, folder: Path, text: str, questions: Questions) -> dict[str, Any]:
        key = (text, len(questions.prompts))
        if key not in self.originals:
            self.originals[key] = see(self.source, questions)
        return verdict(self.originals[key], see(folder, questions), questions)

    def _quantized(self, cell: Cell, folder: Path) -> dict[str, Any]:
        """What the worker says of itself and the processor seconds it took, or why it failed."""
        (folder / "work").mkdir(parents=True)
        numpy.save(folder / "tokens.npy", self._tokens(cell.seed))
        assignment = {
            "source": str(self.source), "tokens": str(folder / "tokens.npy"), "bits": cell.bits,
            "group": 128, "mode": cell.contestant.mode, "seed": cell.seed,
            "work": str(folder / "work"), "dest": str(folder / "dest"),
        }  # fmt: skip
        (folder / "job.json").write_text(json.dumps(assignment))
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [*self._command(cell.contestant.worker), str(folder / "job.json")],
                stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"},
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


@dataclass(frozen=True)
class Difference:
    """A mean over windows with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: torch.Tensor) -> Difference:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
        means = values[drawn].mean(dim=1)
        low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
        return cls(float(values.mean()), low, high)


def windows(records: Sequence[dict[str, Any]], text: str, key: str) -> torch.Tensor:
    """A figure by window, the mean over seeds."""
    return torch.tensor([record[text][key] for record in records], dtype=torch.float64).mean(dim=0)


def table(model: str, bits: int, records: dict[str, dict[int, dict[str, Any]]]) -> Iterator[str]:
    """Markdown; contestants in rows, means over the seeds that llama4q and they have in common."""
    ours = records.get(OURS.name, {})
    yield f"### {model}, INT{bits}, groups of 128"
    yield ""
    yield (
        "| | seeds | MB | KL | of llm-compressor's | llama4q's less its | KL 99 % | top-1 "
        "| routing | perplexity | needles | other text: KL | llama4q's less its | CPU s | peak MB |"
    )
    yield "|---" * 15 + "|"
    for name, by_seed in records.items():
        seeds = sorted(set(by_seed) & set(ours)) or sorted(by_seed)
        failed = [by_seed[seed]["failure"] for seed in seeds if "failure" in by_seed[seed]]
        if failed:
            yield f"| {name} | {len(seeds)} | failed: {failed[0][:160]} |" + " |" * 12
            continue
        yield row(name, seeds, [by_seed[seed] for seed in seeds], ours, records.get(YARDSTICK, {}))


def row(
    name: str,
    seeds: list[int],
    mine: list[dict[str, Any]],
    ours: dict[int, dict[str, Any]],
    yardstick: dict[int, dict[str, Any]],
) -> str:
    def mean(text: str, key: str) -> float:
        return float(sum(record[text][key] for record in mine) / len(mine))

    def against(text: str) -> str:
        if name == OURS.name or not all(seed in ours for seed in seeds):
            return ""
        theirs = windows(mine, text, "kl")
        found = Difference.of(windows([ours[seed] for seed in seeds], text, "kl") - theirs)
        clear = sum(
            Difference.of(windows([ours[seed]], text, "kl") - windows([record], text, "kl")).high
            < 0
            for seed, record in zip(seeds, mine, strict=True)
        )
        return (
            f"{found.mean:+.5f} [{found.low:+.5f}, {found.high:+.5f}], {clear}/{len(seeds)} clear"
        )

    common = [seed for seed in seeds if "same" in yardstick.get(seed, {})]
    ratio = ""
    if common:
        of_mine = [m for seed, m in zip(seeds, mine, strict=True) if seed in common]
        kl = float(windows(of_mine, "same", "kl").mean())
        ratio = f"{kl / float(windows([yardstick[s] for s in common], 'same', 'kl').mean()):.2f}"
    found = [answer for record in mine for answer in record["same"]["needles"]]
    routing = [record["same"]["routing"] for record in mine]
    agreed = "" if routing[0] is None else f"{sum(routing) / len(routing):.2%}"
    return (
        f"| {name} | {len(seeds)} | {mine[0]['stored_bytes'] / 1e6:.2f} | "
        f"{mean('same', 'kl_mean'):.5f} | {ratio} | {against('same')} | "
        f"{mean('same', 'kl_p99'):.4f} | {mean('same', 'top1'):.2%} | {agreed} | "
        f"{mean('same', 'perplexity'):.3f} | {sum(found) / max(1, len(found)):.1%} | "
        f"{mean('other', 'kl_mean'):.5f} | {against('other')} | "
        f"{sum(record['cpu_seconds'] for record in mine) / len(mine):.0f} | "
        f"{max(record['peak_bytes'] for record in mine) / 1e6:.0f} |"
    )


def read_records(work: Path, model: str, bits: int) -> dict[str, dict[int, dict[str, Any]]]:
    """Contestant -> seed -> record, of all that is there."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for contestant in CONTESTANTS:
        for seed in range(10):
            file = work / "records" / f"{Cell(model, bits, seed, contestant).name}.json"
            if file.exists():
                found.setdefault(contestant.name, {})[seed] = json.loads(file.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--bits", default="4,3")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", help="contestants whose name is one of these, by ;")
    parser.add_argument("--work", type=Path, default=Path(".arena"))
    parser.add_argument("--peers", type=Path, default=Path(".peers"))
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    models = dict(one.split("=", 1) for one in options.model)
    all_bits = [int(bits) for bits in options.bits.split(",")]
    if not options.table:
        arenas = {
            name: Arena(name, resolve(source).folder, options.work, options.peers)
            for name, source in models.items()
        }
        for seed in map(int, options.seeds.split(",")):
            for bits in all_bits:
                for name, arena in arenas.items():
                    for contestant in CONTESTANTS:
                        wanted = not options.only or contestant.name in options.only.split(";")
                        if wanted and bits in contestant.bits:
                            arena.run(Cell(name, bits, seed, contestant))
    for name in models:
        for bits in all_bits:
            print("\n".join(table(name, bits, read_records(options.work, name, bits))), "\n")


if __name__ == "__main__":
    main()
