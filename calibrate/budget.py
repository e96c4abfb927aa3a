"""Precision for a goal: what GPUs leave for weights is spent where the model would lose most.

Puts together what each part takes in each scheme (llama4q/predict.py), what it loses there
(sensitivity.py) and which of them fit (allocate.py), and makes a recipe of the choice.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama4q.checkpoint import TensorInfo
from llama4q.config import ModelConfig
from llama4q.errors import UserError
from llama4q.gpus import Device
from llama4q.memory import MemoryPlan, Serving, make_plan
from llama4q.predict import Place, part_bytes, predicted_tensors, served_recipes
from llama4q.recipe import Method, Override, Recipe
from llama4q.remedies import Advisor
from llama4q.schemes import BF16, SCHEMES, Kind, Scheme
from llama4q.shards import sharded
from llama4q.weights import Component, linears

from .allocate import Mix, Option, Part, best, frontier, smallest
from .sensitivity import Sensitivity

CANDIDATES = tuple(SCHEMES[name] for name in ("int4", "int4-g64", "int4-g32", "fp8", "int8"))
# Share of the error of rounding that is left when codes are looked for. FP8's is mostly that of its
# activations, which the solver does not touch. Measured by benchmarks/mixes.py.
LEFT = {Kind.INT: 0.25, Kind.FLOAT8: 1.0}


@dataclass(frozen=True)
class Goal:
    """A model, the GPUs that are to serve it and how, and what a recipe has decided already."""

    config: ModelConfig
    infos: Mapping[str, TensorInfo]  # of the original
    device: Device
    serving: Serving
    recipe: Recipe  # what it names stays so

    def pinned(self, place: Place) -> Scheme | None:
        """The scheme that the recipe names for a part."""
        index, component = place
        return self.recipe.named(component, index, self.config.num_layers)

    def places(self) -> list[Place]:
        """Every component of every layer, in order."""
        found = [
            (index, linear.component)
            for index in range(self.config.num_layers)
            for linear in linears(self.config, index)
        ]
        return list(dict.fromkeys(found))

    def schemes(self) -> list[Scheme]:
        """Those that a part may have beside BF16, and the pinned ones; the coarsest first."""
        pinned = {scheme for place in self.places() if (scheme := self.pinned(place)) is not None}
        found = {*self._candidates(), *pinned} - {BF16}
        return sorted(found, key=lambda scheme: (scheme.bits, -(scheme.group or 0)))

    def _candidates(self) -> list[Scheme]:
        """Those whose groups go with all of the model's sizes."""
        every = range(self.config.num_layers)
        inputs = {linear.inputs for index in every for linear in linears(self.config, index)}
        return [
            scheme
            for scheme in CANDIDATES
            if all(size % (scheme.group or 1) == 0 for size in inputs)
        ]

    def options(self, place: Place, known: Mapping[Scheme, Option]) -> tuple[Option, ...]:
        """Those of the known options that a part may have. Raises UserError when there is none."""
        pinned = self.pinned(place)
        allowed = [*self._candidates(), BF16] if pinned is None else [pinned]
        found = tuple(known[scheme] for scheme in allowed if scheme in known)
        if not found:
            index, component = place
            raise UserError(
                f"recipe {self.recipe.name}: {component.value} of layer {index} in "
                f"{allowed[0].name} cannot be cut among {self.serving.cards} GPUs; leave it out of "
                f"the recipe, or name another scheme"
            )
        return found

    def plan(self, infos: Mapping[str, TensorInfo]) -> MemoryPlan:
        """The plan for weights of these tensors."""
        return make_plan(self.config, sharded(self.config, infos), self.device, self.serving)


@dataclass(frozen=True)
class Menu:
    """What there is to choose from; bytes are those on each card."""

    rest_bytes: int  # of what is never quantized
    room_bytes: int  # for all weights
    known: Mapping[Place, Mapping[Scheme, Option]]
    parts: tuple[Part, ...]  # with the options that the goal allows


@dataclass(frozen=True)
class Choice:
    """What each part gets, beside what it might have got."""

    goal: Goal
    sensitivity: Sensitivity
    menu: Menu
    mix: Mix

    @property
    def recipe(self) -> Recipe:
        return _recipe(self.goal, self.menu.parts, self.mix)

    @property
    def weight_bytes(self) -> int:
        """On each card."""
        return self.menu.rest_bytes + self.mix.nbytes

    @property
    def expected(self) -> float:
        """The divergence, nats a token."""
        return self.sensitivity.divergence(self.mix.error)

    def to_json(self) -> dict[str, Any]:
        """For the report: the goal, what was chosen and why, and what else there was."""
        serving = self.goal.serving
        return {
            "device": self.goal.device.name,
            "cards": serving.cards,
            "context": serving.context,
            "concurrency": serving.concurrency,
            "kv": serving.kv_dtype.value,
            "room_bytes": self.menu.room_bytes,
            "weight_bytes": self.weight_bytes,
            "expected": self.expected,
            "parts": [
                {
                    "layer": part.layer,
                    "component": part.component.value,
                    "pinned": self.goal.pinned((part.layer, part.component)) is not None,
                    "scheme": option.scheme,
                    "options": [
                        {"scheme": one.scheme, "bytes": one.nbytes, "error": one.error}
                        for one in part.options
                    ],
                }
                for part, option in zip(self.menu.parts, self.mix.options, strict=True)
            ],
            "frontier": [self._point(mix) for mix in frontier(self.menu.parts)],
            "recipes": [
                {"name": recipe.name, **self._point(mix)}
                for recipe in served_recipes(self.goal.config)
                if (mix := self._as(recipe)) is not None
            ],
        }

    def _point(self, mix: Mix) -> dict[str, Any]:
        return {
            "bytes": self.menu.rest_bytes + mix.nbytes,
            "expected": self.sensitivity.divergence(mix.error),
        }

    def _as(self, recipe: Recipe) -> Mix | None:
        """What a recipe would make of the model; None when so many cards cannot divide that."""
        layers = self.goal.config.num_layers
        found = [
            options.get(recipe.scheme(component, index, layers))
            for (index, component), options in self.menu.known.items()
        ]
        there = tuple(option for option in found if option is not None)
        return Mix(there) if len(there) == len(found) else None


def refuse_needless(goal: Goal) -> None:
    """Raises UserError when the original fits, and no recipe names what is to be quantized."""
    plan = goal.plan(goal.infos)
    if plan.fits and not any(map(goal.pinned, goal.places())):
        raise UserError(
            f"--fit {_wanted(plan)}: the original fits as it is, {plan.weight_bytes / 1e9:.2f} GB "
            f"of weights where there is room for {plan.weight_room / 1e9:.2f} GB; serve that, or "
            f"name a --recipe"
        )


def least(goal: Goal) -> Recipe:
    """The smallest mix, before anything is measured.

    Raises UserError when not even that fits, or the GPUs cannot divide the model.
    """
    parts = menu(goal).parts
    recipe = _recipe(goal, parts, smallest(parts))
    tensors = predicted_tensors(goal.infos, goal.config, recipe)
    plan = goal.plan(tensors)
    if not plan.fits:
        advisor = Advisor(goal.config, sharded(goal.config, tensors), {})
        raise UserError(_refusal(goal, plan, [one.words for one in advisor.remedies(plan)]))
    return recipe


def choose(goal: Goal, sensitivity: Sensitivity) -> Choice:
    """The mix that fits with the least error, for a goal that `least` has found to be possible."""
    found = menu(goal, _errors(goal, sensitivity))
    mix = best(found.parts, found.room_bytes - found.rest_bytes)
    assert mix is not None
    return Choice(goal, sensitivity, found, mix)


def menu(goal: Goal, errors: Mapping[Place, Mapping[str, float]] = {}) -> Menu:
    """All options of all parts; their errors are 0 where nothing was measured."""
    room = goal.plan(goal.infos).weight_room
    rest, sizes = part_bytes(goal.infos, goal.config, [*goal.schemes(), BF16], goal.serving.cards)
    known = {
        place: {
            scheme: Option(scheme.name, nbytes, errors.get(place, {}).get(scheme.name, 0.0))
            for scheme, nbytes in sizes[place].items()
        }
        for place in goal.places()
    }
    parts = tuple(Part(*place, goal.options(place, known[place])) for place in known)
    return Menu(rest, room, known, parts)


def _recipe(goal: Goal, parts: Sequence[Part], mix: Mix) -> Recipe:
    """A mix as a recipe, with calibration and solver of the goal's: of each component the scheme
    that it has most often, and overrides of layers that differ from that in the same way."""
    chosen = [
        (part.layer, part.component, SCHEMES[option.scheme])
        for part, option in zip(parts, mix.options, strict=True)
    ]
    counted: dict[Component, Counter[Scheme]] = {}
    for _, component, scheme in chosen:
        counted.setdefault(component, Counter())[scheme] += 1
    usual = {component: counts.most_common(1)[0][0] for component, counts in counted.items()}
    unusual: dict[int, dict[Component, Scheme]] = {}
    for layer, component, scheme in chosen:
        if scheme is not usual[component]:
            unusual.setdefault(layer, {})[component] = scheme
    alike: dict[tuple[tuple[Component, Scheme], ...], list[int]] = {}
    for layer, schemes in unusual.items():
        alike.setdefault(tuple(schemes.items()), []).append(layer)
    return dataclasses.replace(
        goal.recipe,
        name=f"fit-{goal.device.name}",
        description=f"the least error for {goal.serving.context:,} tokens on {goal.device.name}",
        schemes=usual,
        overrides=tuple(Override(tuple(layers), dict(same)) for same, layers in alike.items()),
    )


def _errors(goal: Goal, sensitivity: Sensitivity) -> dict[Place, dict[str, float]]:
    """What is left of each part's error in each scheme when its codes have been looked for."""
    solved = goal.recipe.solver.method is Method.GPTQ
    return {
        (part.layer, part.component): {
            name: share * (LEFT[SCHEMES[name].kind] if solved else 1.0)
            for name, share in sensitivity.shares(part).items()
        }
        for part in sensitivity.parts
    }


def _refusal(goal: Goal, plan: MemoryPlan, remedies: Iterable[str]) -> str:
    """One line: by how much no mix fits, and what would do."""
    pinned = f" that {goal.recipe.name} allows" if any(map(goal.pinned, goal.places())) else ""
    would_do = "; ".join(remedies) or "no option or GPU known here"
    return (
        f"--fit {_wanted(plan)}: the smallest mix{pinned} has {plan.weight_bytes / 1e9:.2f} GB of "
        f"weights on a card, {plan.short_bytes / 1e9:.2f} GB more than there is room for; "
        f"would do: {would_do}"
    )


def _wanted(plan: MemoryPlan) -> str:
    """The goal in words."""
    serving = plan.serving
    cards = f" x {serving.cards}" if serving.cards > 1 else ""
    return f"{serving.concurrency} x {serving.context:,} tokens on {plan.device.name}{cards}"
