"""How often the default policy fails a sound checkpoint by chance, and a damaged one at all.

    python -m benchmarks.gate_seeds QUANTIZED [--against pocket] [--seeds 20]

Every seed is another evaluation: other passages of the held-out text and other prompts. QUANTIZED
is judged on each of them as it is, and with faults of benchmarks/faults.py planted in copies: all
scales of one expert 5 % too large, two experts swapped, attention temperature off. Prints a
Markdown table: how many evaluations fail, and how often the verdict names the right place.
"""

from __future__ import annotations

import random
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import torch

from benchmarks.faults import plant, scales, swap
from evals.evaluation import compare
from evals.gate import SCHEMA, Answer, Verdict, check
from evals.policy import load_policy
from evals.questions import Questions, ask
from evals.tasks import Ladder
from llama4q.checkpoint import Checkpoint
from llama4q.config import read_config
from llama4q.hub import POCKET, resolve
from llama4q.tokens import load_tokenizer
from llama4q.weights import LayerReader

LAYER, EXPERT, OTHER = 3, 2, 4
WINDOWS, LENGTH = 16, 1_024
LADDER = {"lengths": [1_024, 2_048], "depths": [0.0, 0.25, 0.5, 0.75, 1.0], "prompts": 2}


def cool(folder: Path) -> None:
    """Attention temperature off."""
    raw = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        re.sub(r'("attn_temperature_tuning": )(true|4|1)', r"\1false", raw)
    )


# what is done to a copy, and what a verdict must say of it
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "untouched": (lambda folder: None, ""),
    "scales of one expert times 1.05": (
        lambda folder: plant(folder, scales(LAYER, EXPERT, 1.05)),
        f"layer {LAYER}, expert {EXPERT}",
    ),
    "two experts swapped": (
        lambda folder: plant(folder, swap(LAYER, EXPERT, OTHER)), f"layer {LAYER}, expert",
    ),
    "attention temperature off": (cool, "temperature_tuning"),
}  # fmt: skip


def asked(source: Path, seed: int, folder: Path) -> Questions:
    """Questions of one seed: the held-out paragraphs in another order."""
    text = Path(__file__).parents[1] / "llama4q/pocket/text/heldout.txt"
    paragraphs = text.read_text().split("\n\n")
    random.Random(seed).shuffle(paragraphs)
    shuffled = folder / f"{seed}.txt"
    shuffled.write_text("\n\n".join(paragraphs))
    ladder = Ladder(**LADDER, seed=seed)  # type: ignore[arg-type]
    return ask(load_tokenizer(source), str(shuffled), WINDOWS, LENGTH, ladder)


def verdict(source: Path, quantized: Path, questions: Questions) -> Verdict:
    readers = [
        LayerReader(Checkpoint(folder), read_config(folder), torch.bfloat16)
        for folder in (source, quantized)
    ]
    evidence = compare(readers[0], readers[1], questions, lambda: None)
    return check({"schema": SCHEMA, "evidence": evidence}, load_policy(None))


@click.command()
@click.argument("quantized", type=click.Path(exists=True, path_type=Path))
@click.option("--against", default=POCKET, show_default=True)
@click.option("--seeds", default=20, show_default=True)
@click.option("--row", "rows", multiple=True, type=click.Choice(list(FAULTS)), help="Only these.")
def main(quantized: Path, against: str, seeds: int, rows: tuple[str, ...]) -> None:
    """Judge all of them, and print the table."""
    source = resolve(against).folder
    print("| | evaluations | fail | not enough data | right place named |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        for name in rows or FAULTS:
            spoil, place = FAULTS[name]
            folder = Path(temporary) / "checkpoint"
            shutil.copytree(quantized, folder)
            spoil(folder)
            found = [
                verdict(source, folder, asked(source, seed, Path(temporary)))
                for seed in range(1, seeds + 1)
            ]
            shutil.rmtree(folder)
            failed = [one for one in found if one.answer is Answer.FAIL]
            unsure = sum(one.answer is Answer.UNDECIDED for one in found)
            named = sum(
                any(place in f"{line.look} {line.remark}" for line in one.lines) for one in failed
            )
            shown = f"{named} of {len(failed)}" if place else ""
            print(f"| {name} | {seeds} | {len(failed)} | {unsure} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
