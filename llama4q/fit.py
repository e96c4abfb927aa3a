"""`llama4q fit`: a checkpoint, or what a recipe would make of an original, against GPUs.

Puts together what the other modules know: tensors on each card, the plan, what would do, and the
command that serves it.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .config import ModelConfig, read_config
from .errors import UserError
from .export import NAME_ANOTHER, has_float8_cache, quantized_already, refuse_other_tools
from .gpus import Device
from .hub import resolve_remote
from .kv_cache import KVDtype
from .memory import MemoryPlan, Serving, make_plan
from .memory_table import render_plan
from .predict import alternatives, predicted_tensors
from .recipe import check_recipe, load_recipe
from .remedies import Advisor, Remedy
from .shards import ShardedWeights, sharded
from .source import Source
from .vllm_command import engine_options, serve_command

LEAST_CONTEXT = 4096  # tokens; a card with room for fewer is of no use


@dataclass(frozen=True)
class Answer:
    """The plan; where it does not fit, what would do."""

    source: str
    recipe: str | None  # that the source is to be quantized with
    config: ModelConfig
    plan: MemoryPlan
    remedies: tuple[Remedy, ...]  # where it does not fit; where it does, what makes more of it

    def command(self, remedy: Remedy | None = None) -> str:
        """What serves it, as planned or after a remedy."""
        plan = remedy.plan if remedy else self.plan
        recipe = remedy.recipe if remedy and remedy.recipe else self.recipe
        # as quantize names its folder
        name = f"{Path(self.source).name}-{recipe}" if recipe else self.source
        return serve_command(name, engine_options(self.config, plan))

    def render(self) -> str:
        """For the terminal, ending in the command that serves it, if there is one."""
        lines = [render_plan(self.plan)]
        if self.plan.fits:
            lines += [f"more: {self._told(remedy)}" for remedy in self.remedies]
            return "\n".join([*lines, f"serve: {self.command()}"])
        lines += (
            ["would do:"] if self.remedies else ["no option, recipe or GPU known here would do"]
        )
        lines += [f"  {self._told(remedy)}" for remedy in self.remedies]
        lines += [f"serve: {self.command(remedy)}" for remedy in self.remedies[:1]]
        return "\n".join(lines)

    def _told(self, remedy: Remedy) -> str:
        """A remedy and the options that it adds."""
        before = engine_options(self.config, self.plan)
        added = [
            shlex.join(option)
            for option in engine_options(self.config, remedy.plan)
            if option not in before
        ]
        return f"{remedy.words} ({' '.join(added)})" if added else remedy.words

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "recipe": self.recipe,
            **self.plan.to_json(),
            "command": self.command() if self.plan.fits else None,
            "remedies": [
                {
                    "words": remedy.words,
                    "recipe": remedy.recipe,
                    "command": self.command(remedy),
                    "total_bytes": remedy.plan.total_bytes,
                    "usable_bytes": remedy.plan.usable_bytes,
                }
                for remedy in self.remedies
            ],
        }


def opened(name: str) -> Source:
    """The checkpoint of that name, of which headers are enough. Raises UserError for formats that
    llama4q does not read."""
    if name.endswith(".gguf"):
        raise UserError(f"{name}: is GGUF, for llama.cpp; {NAME_ANOTHER}")
    source = resolve_remote(name)
    refuse_other_tools(source.folder)
    return source


def answer(source: Source, recipe_name: str | None, device: Device, serving: Serving) -> Answer:
    """Raises UserError for a recipe that does not go with the model or is to be applied to what is
    quantized already, and as `make_plan` does."""
    config, infos = read_config(source.folder), source.checkpoint().infos
    if recipe_name is not None:
        recipe, method = load_recipe(recipe_name), quantized_already(source.folder)
        if method is not None:
            raise UserError(f"{source.name}: is quantized already ({method}); leave out --recipe")
        check_recipe(recipe, config)
        infos, recipe_name = predicted_tensors(infos, config, recipe), recipe.name
    weights = sharded(config, infos)
    plan = make_plan(config, weights, device, serving)
    if plan.fits:
        remedies = list(Advisor(config, weights, {}).longest(plan))
    else:
        remedies = Advisor(config, weights, alternatives(config, infos)).remedies(plan)
    return Answer(source.name, recipe_name, config, plan, tuple(remedies))


def stored_kv_dtype(source: Source, recipe_name: str | None) -> KVDtype:
    """How vLLM keeps keys and values when nothing is asked for, of a checkpoint or of what a recipe
    makes of it."""
    if recipe_name is not None:
        return load_recipe(recipe_name).kv_cache
    return KVDtype.FP8 if has_float8_cache(source.folder) else KVDtype.BF16


def fit_line(
    config: ModelConfig, weights: ShardedWeights, device: Device, serving: Serving
) -> dict[str, Any]:
    """What a report says of a checkpoint on GPUs, and how they serve it: JSON types.

    Raises UserError as `make_plan` does.
    """
    plan = make_plan(config, weights, device, serving)
    served = _served(config, weights, plan)
    return {
        "device": device.name,
        "cards": serving.cards,
        "context": serving.context,
        "concurrency": serving.concurrency,
        "kv": serving.kv_dtype.value,
        "fits": plan.fits,
        "largest_context": plan.largest_context,
        "total_bytes": plan.total_bytes,
        "usable_bytes": plan.usable_bytes,
        "weight_bytes": plan.weight_bytes,
        "kv_bytes": plan.kv_bytes,
        "reserved_bytes": plan.position_bytes + plan.workspace_bytes + plan.overhead_bytes,
        "served": None
        if served is None
        else {
            "cards": served.serving.cards,
            "context": served.serving.context,
            "options": [list(option) for option in engine_options(config, served)],
        },
    }


def _served(config: ModelConfig, weights: ShardedWeights, plan: MemoryPlan) -> MemoryPlan | None:
    """As planned, or with the largest context that there is room for, or on more cards."""
    if plan.fits:
        return plan
    if plan.largest_context >= LEAST_CONTEXT:
        serving = replace(plan.serving, context=plan.largest_context)
        return make_plan(config, weights, plan.device, serving)
    for cards in weights.sizes:
        more = make_plan(config, weights, plan.device, replace(plan.serving, cards=cards))
        if more.fits:
            return more
    return None
