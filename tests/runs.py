"""Quantize a small folder through the public entry point, without text or tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from calibrate.codes import GroupReport, Rescue
from calibrate.run import Job, Outcome, quantize
from evals.evaluation import Evaluation
from evals.prompt import Prompt
from evals.questions import Questions
from llama4q.checkpoint import Checkpoint
from llama4q.config import read_config
from llama4q.device import HOST
from llama4q.machine import UNBOUNDED, Memory
from llama4q.model import logits
from llama4q.recipe import Recipe, load_recipe
from llama4q.source import Source, folder_source
from llama4q.stream import advance, embed
from llama4q.weights import LayerReader


class Quiet:
    """A Progress that remembers what it was told."""

    def __init__(self) -> None:
        self.groups: list[GroupReport] = []
        self.rescues: list[Rescue] = []
        self.replayed_groups = 0
        self.layers: list[float | None] = []
        self.phases: list[str] = []
        self.total = 0

    def start(self, groups: int) -> None:
        self.total = groups

    def group(self, report: GroupReport) -> None:
        self.groups.append(report)

    def rescue(self, rescue: Rescue) -> None:
        self.rescues.append(rescue)

    def replayed(self, part: str, groups: int) -> None:
        self.replayed_groups += groups

    def layer(self, seconds: float | None) -> None:
        self.layers.append(seconds)

    def phase(self, what: str) -> None:
        self.phases.append(what)


def tokens(folder: Path, sequences: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random tokens of the folder's vocabulary, [S, T]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        0, read_config(folder).vocab_size, (sequences, length), generator=generator
    )


def questions(folder: Path) -> Questions:
    """Two windows and two prompts with a three-token answer."""
    prompts = [
        Prompt("needle", tuple(row.tolist()), 37, ((37, 40),), 0.5)
        for row in tokens(folder, 2, 40, seed=8)
    ]
    return Questions(tokens(folder, 2, 64, seed=9), "digest", prompts, 0, words)


def words(ids: list[int]) -> str:
    """A text for tokens that stand for none."""
    return " ".join(map(str, ids))


def run(
    source: Path | Source,
    destination: Path,
    recipe: Recipe | str = "int4",
    calibration: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
    progress: Quiet | None = None,
    dtype: torch.dtype = torch.float32,
    asked: Questions | None = None,
    memory: Memory = UNBOUNDED,
    device: torch.device = HOST,
) -> Mapping[str, Any]:
    """The report of a small run; the recipe may be a shipped one's name.

    Calibration tokens are `[S, T]`, or such a tensor for each length.
    """
    if isinstance(source, Path):
        source = folder_source(source)
    chosen = load_recipe(recipe) if isinstance(recipe, str) else recipe
    drawn = tokens(source.folder, 4, 96, seed=7) if calibration is None else calibration
    batches = (drawn,) if isinstance(drawn, torch.Tensor) else drawn
    digest = f"digest of {sum(int(batch.sum()) for batch in batches)}"
    job = Job(source, destination, chosen, batches, digest, dtype, device)
    evaluation = Evaluation(read_config(source.folder), asked or questions(source.folder))

    def report(outcome: Outcome) -> Mapping[str, Any]:
        return dataclasses.asdict(outcome)

    return quantize(job, evaluation, progress or Quiet(), report, memory)


@torch.inference_mode()
def our_logits(
    folder: Path, inputs: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Logits of a checkpoint, original or quantized, by our streamed forward."""
    config = read_config(folder)
    reader = LayerReader(Checkpoint(folder), config, dtype)
    batches = embed(reader.embedding(), [inputs])
    for index in range(config.num_layers):
        advance(config, reader.layer(index), batches)
    return torch.cat([logits(config, reader.head(), hidden) for hidden in batches])
