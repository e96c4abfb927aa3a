"""What would do where a plan does not fit. Every remedy is planned, and what it plans fits."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations

from .config import ModelConfig
from .gpus import DEVICES, Device
from .kv_cache import KVDtype
from .memory import MemoryPlan, Serving, make_plan
from .shards import ShardedWeights

HIGH_UTILIZATION = 0.95  # proposed at most; the rest is the driver's and other processes'
SMALL_BATCH = 2048  # tokens; what vLLM takes on small cards, proposed when larger ones don't fit


@dataclass(frozen=True)
class Remedy:
    """One thing to do, in words, and the plan after it."""

    words: str
    plan: MemoryPlan
    recipe: str | None = None  # to quantize with, where that is the remedy


@dataclass(frozen=True)
class Advisor:
    """Looks for what would do for one model: `weights` as it is, `recipes` as it might be."""

    config: ModelConfig
    weights: ShardedWeights
    recipes: Mapping[str, ShardedWeights]  # by name, the best first

    def remedies(self, plan: MemoryPlan) -> list[Remedy]:
        """What would make `plan` fit: first options of the engine, each one alone where one alone
        is enough; then less to do, other weights, and more hardware."""
        return [
            *self._options(plan), *self._less(plan), *self._recipes(plan), *self._hardware(plan),
        ]  # fmt: skip

    def _planned(
        self,
        words: str,
        serving: Serving,
        device: Device,
        weights: ShardedWeights | None = None,
        recipe: str | None = None,
    ) -> Iterator[Remedy]:
        """The remedy, if it is one."""
        plan = make_plan(self.config, weights or self.weights, device, serving)
        if plan.fits:
            yield Remedy(words, plan, recipe)

    def _options(self, plan: MemoryPlan) -> list[Remedy]:
        """The fewest options of the engine that are enough, without and with an FP8 cache."""
        exact = self._fewest(plan, {words: _OPTIONS[words] for words in _OPTIONS if words != _FP8})
        known = {remedy.words for remedy in exact}
        return exact + [r for r in self._fewest(plan, _OPTIONS) if r.words not in known]

    def _fewest(self, plan: MemoryPlan, options: Mapping[str, Change]) -> list[Remedy]:
        """All that are enough alone, or else the first of the smallest combinations."""
        for number in range(1, len(options) + 1):
            found: list[Remedy] = []
            for chosen in combinations(options.items(), number):
                found += self._option(plan, dict(chosen))
            if found:
                return found if number == 1 else found[:1]
        return []

    def _option(self, plan: MemoryPlan, chosen: Mapping[str, Change]) -> Iterator[Remedy]:
        changed = plan
        for change in chosen.values():
            serving = change(changed)
            if serving == changed.serving:
                return
            changed = make_plan(self.config, self.weights, plan.device, serving)
        if changed.fits:
            yield Remedy(" and ".join(chosen), changed)

    def _less(self, plan: MemoryPlan) -> Iterator[Remedy]:
        serving, device = plan.serving, plan.device
        if plan.requests:  # fewer than asked for
            words = f"{plan.requests} of these requests at once"
            yield from self._planned(words, replace(serving, concurrency=plan.requests), device)
        if plan.largest_context:
            words = f"a context of at most {plan.largest_context:,} tokens"
            yield from self._planned(words, replace(serving, context=plan.largest_context), device)
        yield from self.longest(plan)

    def longest(self, plan: MemoryPlan) -> Iterator[Remedy]:
        """The longest context with a table of no more positions, where that makes it longer."""
        step, limit = plan.serving.block_tokens, self.config.max_positions
        lengths = range(step, limit + step, step)

        def with_context(tokens: int) -> Serving:
            tokens = min(tokens, limit)
            return replace(plan.serving, context=tokens, positions=tokens)

        def too_long(tokens: int) -> bool:
            return not make_plan(self.config, self.weights, plan.device, with_context(tokens)).fits

        context = step * bisect.bisect_left(lengths, True, key=too_long)
        if context > plan.largest_context:
            serving = with_context(context)
            words = f"a context of at most {serving.context:,} tokens and {_SHORT_TABLE}"
            yield from self._planned(words, serving, plan.device)

    def _recipes(self, plan: MemoryPlan) -> Iterator[Remedy]:
        """The largest recipe that is small enough."""
        for name, weights in self.recipes.items():
            if plan.serving.cards in weights.sizes:
                words = f"the recipe {name}, {weights.on(1) / 1e9:.1f} GB"
                found = list(self._planned(words, plan.serving, plan.device, weights, name))
                if found:
                    yield from found
                    return

    def _hardware(self, plan: MemoryPlan) -> Iterator[Remedy]:
        """The fewest such cards, and the smallest card of which so many would do."""
        for cards in self.weights.sizes:
            more = replace(plan.serving, cards=cards)
            if cards > plan.serving.cards and (
                found := list(self._planned(f"{cards} of these GPUs", more, plan.device))
            ):
                yield from found
                break
        for device in sorted(DEVICES.values(), key=lambda device: device.total_bytes):
            if found := list(self._planned(f"{device.name} instead", plan.serving, device)):
                yield from found
                return


Change = Callable[[MemoryPlan], Serving]


def _short_table(plan: MemoryPlan) -> Serving:
    return replace(plan.serving, positions=plan.serving.context)


def _small_batches(plan: MemoryPlan) -> Serving:
    batched = min(SMALL_BATCH, plan.serving.batched_tokens or SMALL_BATCH)
    return replace(plan.serving, batched_tokens=batched)


def _hybrid(plan: MemoryPlan) -> Serving:
    return replace(plan.serving, hybrid=True)


def _fp8(plan: MemoryPlan) -> Serving:
    return replace(plan.serving, kv_dtype=KVDtype.FP8)


def _larger_share(plan: MemoryPlan) -> Serving:
    """The least share that is enough, if it is one that may be proposed."""
    share = math.ceil(100 * plan.total_bytes / plan.device.total_bytes) / 100
    if plan.serving.utilization < share <= HIGH_UTILIZATION:
        return replace(plan.serving, utilization=share)
    return plan.serving


# In this order they are tried; the share is last, as it takes what the others leave to do.
_SHORT_TABLE = "a table of no more positions than that"
_FP8 = "an FP8 KV cache"
_OPTIONS: dict[str, Change] = {
    "a table of no more positions than the context": _short_table,
    "the hybrid KV cache manager": _hybrid,
    "smaller batches": _small_batches,
    _FP8: _fp8,
    "a larger share of the GPU": _larger_share,
}
