"""How a checkpoint is to be served: the engine's options, and the precision chosen for them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from calibrate.budget import Choice, Goal
    from llama4q.config import ModelConfig
    from llama4q.gpus import Device
    from llama4q.kv_cache import KVDtype
    from llama4q.memory import Serving
    from llama4q.recipe import Recipe
    from llama4q.source import Source

CONTEXT = 131072  # tokens


@dataclass(frozen=True)
class Engine:
    """Options of an engine; what was not named is its own default."""

    kv: str | None
    no_hybrid: bool
    named: Mapping[str, Any]

    def serving(self, context: int, kv_dtype: KVDtype) -> Serving:
        """Of requests of so many tokens; keys and values are stored as named, or else so.

        Raises UserError for values that no engine takes.
        """
        from llama4q.kv_cache import KVDtype
        from llama4q.memory import Serving

        chosen = KVDtype(self.kv) if self.kv else kv_dtype
        return Serving(context, kv_dtype=chosen, hybrid=not self.no_hybrid, **self.named)


def engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say how an engine is started, which the command gets as its `engine`."""

    @functools.wraps(command)
    def with_engine(*, kv: str | None, no_hybrid: bool, **others: Any) -> None:
        named = {key: others.pop(key) for key in _NAMED}
        given = {key: value for key, value in named.items() if value is not None}
        command(engine=Engine(kv, no_hybrid, given), **others)

    for option in reversed(_OPTIONS):
        with_engine = option(with_engine)
    return with_engine


_NAMED = ("cards", "concurrency", "batched_tokens", "utilization", "positions", "block_tokens")
_OPTIONS = (
    click.option(
        "--gpus", "cards", default=1, show_default=True, help="How many of them, tensor parallel."
    ),
    click.option("--concurrency", default=1, show_default=True, help="Such requests at once."),
    click.option(
        "--kv", type=click.Choice(["bf16", "fp8"]),
        help="How the engine stores keys and values; for fp8 `quantize` writes their scales.  "
        "[default: as the checkpoint or recipe says, else bf16]",
    ),
    click.option(
        "--batched-tokens", type=int, help="Of one step.  [default: vLLM's on that device]"
    ),
    click.option(
        "--utilization", type=float, help="Share of the device's memory.  [default: 0.92]"
    ),
    click.option(
        "--positions", type=int, help="Of the rotary table.  [default: the model's own]"
    ),
    click.option(
        "--block-size", "block_tokens", type=int, help="Tokens of a block.  [default: 16]"
    ),
    click.option("--no-hybrid", is_flag=True, help="Chunked layers keep all tokens, too."),
)  # fmt: skip


def default_context(config: ModelConfig) -> int:
    """Tokens of one request where nobody named a number."""
    return min(CONTEXT, config.max_positions)


def no_schemes() -> Recipe:
    """What a goal is reached from where no recipe is named."""
    from llama4q.recipe import Recipe

    return Recipe("fit", "nothing is decided yet", {})


def goal_of(
    source: Source, device: Device, context: int | None, engine: Engine, recipe: Recipe
) -> Goal:
    """Raises UserError for what is quantized already, or need not be."""
    from calibrate.budget import Goal, refuse_needless
    from llama4q.config import read_config
    from llama4q.export import refuse_quantized

    refuse_quantized(source.folder)
    config = read_config(source.folder)
    serving = engine.serving(context or default_context(config), recipe.kv_cache)
    goal = Goal(config, source.checkpoint().infos, device, serving, recipe)
    refuse_needless(goal)
    return goal


def range_told(goal: Goal) -> str:
    """What can be chosen from, before anything is measured."""
    from calibrate.allocate import smallest
    from calibrate.budget import menu
    from evals.wording import size

    found = menu(goal)
    most = sum(max(option.nbytes for option in part.options) for part in found.parts)
    low, high = (found.rest_bytes + nbytes for nbytes in (smallest(found.parts).nbytes, most))
    return (
        f"precision is chosen after a first pass over the original: a card has room for "
        f"{size(found.room_bytes)} of weights, mixes have {size(low)} to {size(high)}"
    )


def told(choice: Choice) -> str:
    """What was chosen, in lines for a terminal: how many parts have which scheme."""
    from evals.wording import size

    counted: dict[str, Counter[str]] = {}
    for part, option in zip(choice.menu.parts, choice.mix.options, strict=True):
        counted.setdefault(part.component.value, Counter())[option.scheme] += 1
    lines = [
        f"chosen: {size(choice.weight_bytes)} of weights on a card, where there is room for "
        f"{size(choice.menu.room_bytes)}; expected KL {choice.expected:.2g} nats a token"
    ]
    for component, schemes in counted.items():
        shares = ", ".join(f"{number} x {name}" for name, number in schemes.most_common())
        lines.append(f"  {component.replace('_', ' '):14}{shares}")
    return "\n".join(lines)
