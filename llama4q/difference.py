"""Where two checkpoints of one recipe differ, and by how much of what engines multiply with.

Reads only the shards whose SHA-256 differ, tensor by tensor. Knows nothing of why they do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .checkpoint import Checkpoint
from .config import ModelConfig
from .errors import UserError
from .recipe import Recipe, planned
from .schemes import Scheme
from .verify import bits
from .weights import LayerReader, LinearName


@dataclass(frozen=True)
class Difference:
    """One weight, or a tensor of its own, that is not the same."""

    name: str
    scheme: str  # or the dtype
    largest: float  # of its values' differences
    share: float  # |one - other| / |one|


def differing_shards(one: Mapping[str, str], other: Mapping[str, str]) -> set[str]:
    """Of shards by name and SHA-256 those that are not in both."""
    return {name for name in {**one, **other} if one.get(name) != other.get(name)}


@torch.inference_mode()
def compare(
    one: Checkpoint, other: Checkpoint, shards: set[str], config: ModelConfig, recipe: Recipe
) -> list[Difference]:
    """What differs among the tensors of `shards`, the largest share first.

    Raises UserError when the checkpoints don't hold the same tensors.
    """
    odd = set(one.names()) ^ set(other.names())
    if odd:
        raise UserError(f"{one.folder} and {other.folder}: {min(odd)} is in one of them only")
    weights = {
        linear.name: (linear, scheme)
        for index in range(config.num_layers)
        for linear, scheme in planned(recipe, config, index)
    }
    names = [name for name, info in one.infos.items() if info.shard in shards]
    differing = [name for name in names if bits(one.get(name)) != bits(other.get(name))]
    found = {_weight_of(name, weights) for name in differing}
    readers = LayerReader(one, config, torch.float32), LayerReader(other, config, torch.float32)
    compared = []
    for name in found:
        if name in weights:
            linear, scheme = weights[name]
            ours, theirs = (
                reader.linear(name, linear.inputs, linear.outputs).weight for reader in readers
            )
            label = scheme.name
        else:
            ours, theirs = one.get(name).float(), other.get(name).float()
            label = str(one.info(name).dtype).removeprefix("torch.")
        compared.append(_difference(name, label, ours, theirs))
    return sorted(compared, key=lambda each: (-each.share, each.name))


def _weight_of(name: str, weights: Mapping[str, tuple[LinearName, Scheme]]) -> str:
    """The linear that a tensor belongs to, else the tensor."""
    module = name
    while module and module not in weights:
        module = module.rpartition(".")[0]
    return module or name


def _difference(name: str, label: str, ours: torch.Tensor, theirs: torch.Tensor) -> Difference:
    gap, size = (ours - theirs).abs(), float(ours.norm())
    return Difference(name, label, float(gap.max()), float(gap.norm()) / size if size else 1.0)
