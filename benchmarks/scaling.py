"""How time and memory grow with the text, its sequences and the experts, and how true the ETA is.

    python -m benchmarks.scaling FOLDER [any option of `quantize`]

Writes models of four layers of Scout's build, a quarter as wide, into FOLDER, and quantizes them
with one thing changed at a time. Prints for each run the wall time, the peak of resident memory
seen from outside, both also against the first run, and how far the run's own ETA was from the
truth: the worst it said from the end of the second layer on, as a share of the time that was left,
while that was a tenth of the run or more.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from benchmarks.make_giant import SCOUT, write_giant
from benchmarks.pocket.config import hub_config
from benchmarks.pocket.export import special_ids
from benchmarks.survive import attempt
from calibrate import progress
from cli import main as llama4q
from llama4q.hub import POCKET_MODEL

QUARTER = replace(
    SCOUT, vocabulary=2_048, layers=4, hidden=1_280, query_heads=10, key_value_heads=2,
    expert_width=2_048, dense_width=4_096,
)  # fmt: skip
RUN = "from benchmarks.scaling import recorded; recorded()"
EVALUATION = (
    "--eval-windows", "2", "--eval-length", "512",
    "--lengths", "512", "--depths", "0.5", "--prompts", "1",
)  # fmt: skip
SKIPPED = 2  # layers
LATE = 0.1  # of the run


@dataclass(frozen=True)
class Case:
    """One run; the rest is the same in all."""

    samples: int = 16
    length: int = 1_024
    experts: int = 16


CASES = (
    Case(),
    Case(samples=64),
    Case(samples=4, length=4_096),
    Case(experts=4),
    Case(experts=64),
    Case(samples=32),
    Case(samples=1, length=16_384),
)


def recorded() -> None:
    """`llama4q`, and what its bar says of the time that is left, into the file named first."""
    log = Path(sys.argv.pop(1))
    said: list[tuple[float, float]] = []

    class Recorded(progress.Bar):
        def layer(self, seconds: float | None) -> None:
            super().layer(seconds)
            said.append((time.monotonic(), self._eta.remaining()))

    progress.Bar = Recorded  # type: ignore[misc]
    llama4q(standalone_mode=False)
    end = time.monotonic()
    log.write_text(json.dumps([(end - moment, left) for moment, left in said]))


def worst(said: list[tuple[float, float]], total: float) -> float:
    """Share of what was really left by which the ETA was off most."""
    errors = [left / real - 1 for real, left in said[SKIPPED - 1 :] if real > LATE * total]
    return max(errors, key=abs)


def quantized(case: Case, folder: Path, options: tuple[str, ...]) -> tuple[float, int, float]:
    """Seconds, peak in bytes, and how far the ETA was off."""
    source, result, eta = folder / f"experts-{case.experts}", folder / "result", folder / "eta.json"
    if not source.exists():
        sizes = replace(QUARTER, experts=case.experts)
        config: dict[str, Any] = hub_config(sizes, special_ids(POCKET_MODEL))
        config.pop("vision_config")
        write_giant(source, config)
    shutil.rmtree(result, ignore_errors=True)
    text = ("--samples", str(case.samples), "--length", str(case.length))
    command = [sys.executable, "-c", RUN, str(eta), "quantize", str(source), str(result)]
    run = attempt([*command, *text, *EVALUATION, *options], folder / "log", None)
    if run.ended != "exit 0":
        raise SystemExit(f"{case}: {run.said}")
    return run.seconds, run.peak, worst(json.loads(eta.read_text()), run.seconds)


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(folder: Path, options: tuple[str, ...]) -> None:
    """Quantize one case after the other, and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    print("| samples | length | experts | seconds | | peak | | ETA off by |\n|" + "---|" * 8)
    first: tuple[float, int, float] | None = None
    for case in CASES:
        found = quantized(case, folder, options)
        first = first or found
        seconds, peak, off = found
        print(
            f"| {case.samples} | {case.length:,} | {case.experts} "
            f"| {seconds:.0f} | {seconds / first[0]:.2f} "
            f"| {peak / 1e9:.2f} GB | {peak / first[1]:.2f} | {off:+.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
