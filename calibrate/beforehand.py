"""What can be told of a run before a tensor is read.

What is refused, what the run will write and report, in which order it reads. Knows nothing of how
codes are found.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from llama4q.checkpoint import Checkpoint
from llama4q.config import ModelConfig
from llama4q.errors import UserError
from llama4q.export import refuse_quantized
from llama4q.predict import predicted_tensors
from llama4q.recipe import Recipe, check_recipe, planned
from llama4q.weights import UP, embedding_name, layer_of
from llama4q.writer import refuse_foreign_files


def refuse_early(
    source: Path, destination: Path, recipe: Recipe, config: ModelConfig, lengths: Iterable[int]
) -> None:
    """Raises UserError for what can be told before a tensor or a text is read.

    `lengths` are those of the calibration sequences, in tokens.
    """
    refuse_quantized(source)
    check_recipe(recipe, config)
    refuse_foreign_files(destination)
    longest = max(lengths)
    if longest > config.max_positions:
        raise UserError(
            f"calibration sequences of {longest} tokens, but the model reads at most "
            f"{config.max_positions}; choose a smaller length"
        )


def reading_order(config: ModelConfig, names: Iterable[str]) -> list[set[str]]:
    """The tensors that a run reads layer by layer, and last those of no layer."""
    steps: list[set[str]] = [set() for _ in range(config.num_layers + 1)]
    for name in names:
        layer = layer_of(config, name)
        steps[config.num_layers if layer is None else layer].add(name)
    steps[0].add(embedding_name(config))
    return steps


def predicted_bytes(source: Checkpoint, config: ModelConfig, recipe: Recipe) -> int:
    """Bytes of the result's tensors, known before any tensor is read."""
    tensors = predicted_tensors(source.infos, config, recipe)
    return sum(info.nbytes for info in tensors.values())


def groups_in(config: ModelConfig, recipe: Recipe) -> int:
    """How many weights or gate-up pairs the run will report."""
    return sum(
        scheme.quantizes and not linear.name.endswith(UP)
        for index in range(config.num_layers)
        for linear, scheme in planned(recipe, config, index)
    )


def check_disk(needed: int, folder: Path) -> None:
    """Raises UserError before anything is read when a result of `needed` bytes will not fit."""
    there = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free + there:
        raise UserError(
            f"{folder}: the result needs {needed / 1e9:.1f} GB, the disk has "
            f"{(free + there) / 1e9:.1f} GB free; free {(needed - free - there) / 1e9:.1f} GB "
            f"or choose another disk"
        )
