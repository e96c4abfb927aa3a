"""Quantizes one layer of the pocket model under many budgets, and says what each run took.

`python -m tests.budgets FOLDER COUNT` prints JSON for tests/test_budget.py to judge. A process of
its own, so that what is resident is the run's.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import torch

from calibrate.plan import check_memory, plan_for
from calibrate.work import Texts
from llama4q.checkpoint import Checkpoint
from llama4q.config import read_config
from llama4q.hub import POCKET, resolve
from llama4q.machine import Budget, keep_freed_memory
from llama4q.manifest import check_manifest
from llama4q.recipe import load_recipe
from llama4q.weights import layer_of
from llama4q.writer import CheckpointWriter

from . import runs

LAYERS, SEQUENCES, LENGTH = 1, 176, 512  # rows of 90,000 tokens are what budgets are about


@dataclasses.dataclass(frozen=True)
class Took:
    """One run."""

    budget: int
    peak: int  # bytes, as the kernel counts them
    spilled: int  # bytes that the plan puts into files
    files: dict[str, str]  # SHA-256


def shortened(folder: Path) -> Path:
    """The pocket model's first layers as a model of their own."""
    pocket = resolve(POCKET).folder
    source, config = Checkpoint(pocket), read_config(pocket)
    raw = json.loads((pocket / "config.json").read_bytes())
    raw["text_config"]["num_hidden_layers"] = LAYERS
    raw["text_config"]["no_rope_layers"] = raw["text_config"]["no_rope_layers"][:LAYERS]
    names = [name for name in source.infos if (layer_of(config, name) or 0) < LAYERS]
    with CheckpointWriter(folder, {}) as writer:
        writer.write("all", [(name, source.get(name)) for name in names], {})
        written, digests = writer.assemble(["all"])
        writer.publish(written, digests, {"config.json": json.dumps(raw).encode()})
    return folder


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def main(folder: Path, count: int) -> list[Took]:
    keep_freed_memory()
    source = shortened(folder / "source")
    tokens = runs.tokens(source, SEQUENCES, LENGTH)
    asked = runs.questions(source)
    windows, length = asked.windows.shape
    texts = Texts(((SEQUENCES, LENGTH),), ((windows, length),), ((2, 40),))
    config, recipe = read_config(source), load_recipe("int4")
    plan = plan_for(Checkpoint(source), config, recipe, texts)
    least = plan.held(Budget(0))
    most = least + plan.kept(Budget(0)) + sum(store.nbytes for store in plan.stores)
    found = []
    for number in range(count):
        budget = Budget(least + (most - least) * number // (count - 1))
        memory = check_memory(plan, budget, named=True)
        forget_peak()
        result = folder / "result"
        runs.run(source, result, recipe, tokens, dtype=torch.bfloat16, asked=asked, memory=memory)
        # all but the report, which says how long it took
        files = {
            name: digest for name, digest in check_manifest(result).items() if name != "report.json"
        }
        found.append(Took(budget.host, peak(), plan.fits(budget).spilled_bytes, files))
        shutil.rmtree(result)
    return found


if __name__ == "__main__":
    print(
        json.dumps([dataclasses.asdict(one) for one in main(Path(sys.argv[1]), int(sys.argv[2]))])
    )
