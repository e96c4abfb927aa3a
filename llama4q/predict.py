"""The tensors of a result before there is one. Knows names, shapes and dtypes, no values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from .checkpoint import TensorInfo
from .config import ModelConfig
from .recipe import Recipe, load_recipe, planned, shipped_recipes
from .schemes import Kind, Scheme
from .shards import ShardedWeights, sharded
from .verify import converted_tensors, kept_tensors
from .weights import Component, layer_of, linears

_SERVED_BITS = (4, 8)  # of INT codes; no engine has a kernel for others


def predicted_tensors(
    infos: Mapping[str, TensorInfo], config: ModelConfig, recipe: Recipe
) -> dict[str, TensorInfo]:
    """All tensors of a result, from those of the original."""
    converted = {
        name: TensorInfo("", shape, dtype, 0)
        for name, (dtype, shape) in converted_tensors(config, recipe).items()
    }
    return kept_tensors(infos, config, recipe) | converted


Place = tuple[int, Component]  # one component of one layer


def part_bytes(
    infos: Mapping[str, TensorInfo], config: ModelConfig, schemes: Iterable[Scheme], cards: int
) -> tuple[int, dict[Place, dict[Scheme, int]]]:
    """Bytes on each of `cards` of what no recipe names, and of each component of each layer by
    scheme. What vLLM cannot cut into so many is left out.

    `infos` are an original's tensors.
    """
    owners = {
        linear.name: (index, linear.component)
        for index in range(config.num_layers)
        for linear in linears(config, index)
    }
    sizes: dict[Place, dict[Scheme, int]] = {place: {} for place in owners.values()}
    rest: dict[str, TensorInfo] = {}
    for scheme in schemes:
        parts: dict[Place, dict[str, TensorInfo]] = {place: {} for place in sizes}
        uniform = Recipe(scheme.name, "", dict.fromkeys(Component, scheme))
        for name, info in predicted_tensors(infos, config, uniform).items():
            owner = owners.get(name.rpartition(".")[0])
            (rest if owner is None else parts[owner])[name] = info
        for place, tensors in parts.items():
            held = sharded(config, tensors)
            if cards in held.sizes:
                sizes[place][scheme] = held.on(cards)
    return sharded(config, rest).on(cards), sizes


def alternatives(config: ModelConfig, infos: Mapping[str, TensorInfo]) -> dict[str, ShardedWeights]:
    """What the shipped recipes that vLLM serves would make of the model, the largest first.

    `infos` are an original's tensors or those of any result of it.
    """
    original = _original_tensors(config, infos)
    found = {
        recipe.name: sharded(config, predicted_tensors(original, config, recipe))
        for recipe in served_recipes(config)
    }
    return dict(sorted(found.items(), key=lambda item: -item[1].on(1)))


def served_recipes(config: ModelConfig) -> list[Recipe]:
    """The shipped recipes that go with the model and that vLLM serves."""
    every = (load_recipe(name) for name in shipped_recipes())
    return [recipe for recipe in every if _served(recipe, config)]


def _served(recipe: Recipe, config: ModelConfig) -> bool:
    """Whether vLLM has kernels for it, and the model's sizes go with its groups."""
    return all(
        (scheme.kind is not Kind.INT or scheme.bits in _SERVED_BITS)
        and not scheme.bitsandbytes
        and not (scheme.group and linear.inputs % scheme.group)
        for index in range(config.num_layers)
        for linear, scheme in planned(recipe, config, index)
    )


def _original_tensors(
    config: ModelConfig, infos: Mapping[str, TensorInfo]
) -> dict[str, TensorInfo]:
    """The same model with all linears that a recipe names in BF16, one tensor each."""
    plain = {
        f"{linear.name}.weight": TensorInfo("", (linear.outputs, linear.inputs), torch.bfloat16, 0)
        for index in range(config.num_layers)
        for linear in linears(config, index)
    }
    stored = {name.removesuffix(".weight") for name in plain}
    other = {
        name: info
        for name, info in infos.items()
        if f"{name.partition('_proj.')[0]}_proj" not in stored
        and not (layer_of(config, name) is not None and ".experts." in name)
    }
    return plain | other
