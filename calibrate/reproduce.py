"""A finished run once more, from what its report says of it: is the result the same?

Knows nothing of evaluation, which leaves no trace in the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llama4q.checkpoint import Checkpoint, sha256
from llama4q.config import read_config
from llama4q.custody import REPORT, read_report
from llama4q.difference import Difference, compare, differing_shards
from llama4q.errors import UserError
from llama4q.hidden import Spool
from llama4q.manifest import check_manifest
from llama4q.model import DecoderLayer, Head
from llama4q.recipe import Recipe, recipe_from_json
from llama4q.writer import differences

from .run import DTYPES, Job

CONFIG = "config.json"
CIRCUMSTANCES = ("llama4q", "versions", "machine", "kernel", "products")  # keys of a report
SHOWN = 20  # differing weights


@dataclass(frozen=True)
class Recorded:
    """What a report says of the run that it is about."""

    report: Mapping[str, Any]
    source: str  # a SOURCE
    recipe: Recipe
    dtype: str
    device: str
    threads: int
    digest: str  # of the calibration tokens


class Unobserved:
    """A LayerObserver that looks at nothing."""

    key = "none"

    def start(self, embedding: torch.Tensor, spool: Spool) -> None: ...
    def layer(self, original: DecoderLayer, quantized: DecoderLayer) -> None: ...

    def finish(self, original: Head, quantized: Head) -> dict[str, Any]:
        return {}


def recorded(checkpoint: Checkpoint) -> Recorded:
    """The run that has written a checkpoint. Raises UserError when it is not as it was written, or
    its report lacks what it takes to repeat it."""
    check_manifest(checkpoint.folder)
    report = read_report(checkpoint.folder)
    path = checkpoint.folder / REPORT
    try:
        source, machine = report["source"], report["machine"]
        revision = f"@{source['revision']}" if source["revision"] else ""
        found = Recorded(
            report=report,
            source=f"{source['name']}{revision}",
            recipe=recipe_from_json(report["recipe"], str(path)),
            dtype=report["dtype"],
            device=machine["device"],
            threads=int(machine["threads"]),
            digest=report["calibration"]["digest"],
        )
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{path}: lacks what it takes to repeat the run; it is of an older llama4q"
        ) from None
    if found.dtype not in DTYPES:
        raise UserError(f"{path}: dtype {found.dtype!r} is none of {', '.join(DTYPES)}")
    return found


def check_tokens_alike(run: Recorded, digest: str) -> None:
    """Raises UserError when the calibration text has become another one."""
    if digest != run.digest:
        raise UserError(
            f"calibration text {run.recipe.calibration.text}: gives other tokens than those of "
            f"the recorded run (SHA-256 {digest[:12]}... now, {run.digest[:12]}... then); get "
            f"the text, the tokenizer and the versions that it had"
        )


@dataclass(frozen=True)
class Result:
    """What became of a repeated run."""

    files: int  # compared: shards and config.json
    differing_files: tuple[str, ...]
    weights: tuple[Difference, ...]  # those that differ
    circumstances: tuple[tuple[str, Any, Any], ...]  # what was then, and what is now, if not equal

    @property
    def same(self) -> bool:
        return not self.differing_files

    def to_json(self) -> dict[str, Any]:
        return {
            "same": self.same,
            "files": self.files,
            "differing_files": list(self.differing_files),
            "weights": [vars(one) for one in self.weights],
            "circumstances": [
                {"what": what, "recorded": then, "here": now}
                for what, then, now in self.circumstances
            ],
        }


def result(checkpoint: Checkpoint, run: Recorded, job: Job, report: Mapping[str, Any]) -> Result:
    """The files of a finished `job` against those of the run that it repeats."""
    again = job.destination
    shards = differing_shards(run.report["files"], report["files"])
    differing = set(shards)
    if sha256(checkpoint.folder / CONFIG) != sha256(again / CONFIG):
        differing.add(CONFIG)
    weights = compare(
        checkpoint, Checkpoint(again), shards, read_config(checkpoint.folder), run.recipe
    )
    then, now = ({key: of[key] for key in CIRCUMSTANCES} for of in (run.report, report))
    return Result(
        files=len(report["files"]) + 1,
        differing_files=tuple(sorted(differing)),
        weights=tuple(weights),
        circumstances=tuple(differences(then, now)),
    )


def render(found: Result) -> str:
    """The answer in words and tables."""
    if found.same:
        return f"same bytes: {found.files - 1} shards and {CONFIG}"
    lines = [
        f"{len(found.differing_files)} of {found.files} files differ, "
        f"in {len(found.weights)} weights:"
    ]
    if found.weights:
        shown = found.weights[:SHOWN]
        width = max(len(one.name) for one in shown)
        lines.append(f"{'':{width}}  {'stored as':10}{'largest':>10}{'of the whole':>14}")
        lines += [
            f"{one.name:{width}}  {one.scheme:10}{one.largest:10.3g}{one.share:14.2%}"
            for one in shown
        ]
        if len(found.weights) > SHOWN:
            lines.append(f"and {len(found.weights) - SHOWN} more")
        largest = max(one.largest for one in found.weights)
        lines.append(f"largest difference {largest:.3g}")
    lines += [f"{what}: {then} then, {now} here" for what, then, now in found.circumstances]
    if not found.circumstances:
        lines.append("versions, processor, threads and kernels are those of the recorded run")
    return "\n".join(lines)
