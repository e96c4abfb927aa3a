"""What a report says, figure by figure: FIGURES has each one's name, its meaning and its place.

A figure has one reading, or one for each layer, task or length. Knows nothing of limits, models or
tensors, nor of how a figure was measured.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from llama4q.errors import UserError

from .proportions import Interval, Z, matched, wilson

Report = Mapping[str, Any]


class Section(Enum):
    """The part of a report's evidence that a figure belongs to."""

    LIKELIHOOD = "likelihood"
    RETRIEVAL = "retrieval"

    @property
    def unit(self) -> str:
        """What the sample of this section is counted in."""
        return "tokens" if self is Section.LIKELIHOOD else "prompts"

    def sample(self, report: Report) -> float | None:
        """How many were measured; None where the report doesn't say."""
        return number(report, f"evidence.{self.value}.{self.unit}")

    def digest(self, report: Report) -> str | None:
        """Of what both models read; None where the report doesn't say."""
        found = _find(report, f"evidence.{self.value}.digest")
        return None if found is None else str(found)


def same_sample(section: Section | None, report: Report, other: Report) -> bool:
    """Whether two reports are about the same tokens or prompts, so that figures can be compared."""
    if section is None:
        return True
    digest = section.digest(report)
    return digest is not None and digest == section.digest(other)


@dataclass(frozen=True)
class Reading:
    """A figure's value, at one place where it has several."""

    value: float | None  # None: the report doesn't have it
    interval: Interval | None = None  # 95 %
    place: str = ""
    prompts: float | None = None  # behind this reading, where it is one of several


Reader = Callable[[Report], Sequence[Reading]]  # none at all where there is nothing to be read


@dataclass(frozen=True)
class Figure:
    """One figure of a report, by the name that a policy has for it."""

    name: str
    title: str
    read: Reader
    section: Section | None = None  # None: counted, not measured on a sample
    larger_is_better: bool = False
    by: str = ""  # what its readings are of, where it has several
    estimated: bool = False  # it comes with an interval
    relative: bool = False  # to the original, 0 is no difference

    def at(self, place: str) -> str:
        """A place in words."""
        if self.by == "length" and place.isdecimal():
            return f"{int(place):,} tokens"
        return f"{self.by} {place}"


# --- entries of a report ---


def number(report: Report, path: str) -> float | None:
    """At a dotted path; None for what is missing or NaN. Raises UserError for no number."""
    found = _find(report, path)
    if found is None:
        return None
    # JSON's true is an int to Python
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise _malformed(path, "a number", found)
    return None if math.isnan(found) else float(found)


def entries(report: Report, path: str) -> Sequence[Report] | None:
    """Objects at a dotted path; None for what is missing. Raises UserError for anything else."""
    found = _find(report, path)
    if found is None:
        return None
    if not isinstance(found, list) or not all(isinstance(entry, Mapping) for entry in found):
        raise _malformed(path, "a list of objects", found)
    return found


def _find(report: Report, path: str) -> object:
    """None where the entry or anything on the way to it is missing."""
    found: object = report
    for key in path.split("."):
        if found is None:
            return None
        if not isinstance(found, Mapping):
            raise _malformed(path, "an object", found)
        found = found.get(key)
    return found


def _interval(report: Report, path: str) -> Interval | None:
    match _find(report, path):
        case None:
            return None
        case [int() | float() as low, int() | float() as high]:
            return (float(low), float(high)) if low <= high else None  # None for NaN, too
        case other:
            raise _malformed(path, "two numbers", other)


def _malformed(path: str, expected: str, found: object) -> UserError:
    return UserError(
        f"report: {path} should be {expected} but is {str(found)[:40]!r}; run the evaluation again"
    )


# --- readings of a figure ---


def _likelihood(key: str) -> Reader:
    """A figure of all tokens, and its interval where it has one."""

    def read(report: Report) -> Sequence[Reading]:
        value = number(report, f"evidence.likelihood.{key}")
        return [Reading(value, _interval(report, f"evidence.likelihood.intervals.{key}"))]

    return read


def _bits_per_byte(report: Report) -> Sequence[Reading]:
    return [Reading(number(report, "evidence.likelihood.quantized.bits_per_byte"))]


def _perplexity(report: Report) -> Sequence[Reading]:
    path = "evidence.likelihood.quantized"
    value, error = number(report, f"{path}.perplexity"), number(report, f"{path}.standard_error")
    if value is None or error is None:
        return [Reading(value)]
    return [Reading(value, (value - Z * error, value + Z * error))]


def _hidden_error(report: Report) -> Sequence[Reading]:
    layers = entries(report, "evidence.layers")
    return [Reading(None)] if layers is None else _of_layers(layers, "hidden_error")


def _agreement(report: Report) -> Sequence[Reading]:
    """Of the layers with experts; a dense one has null."""
    layers = entries(report, "evidence.layers")
    if layers is None:
        return [Reading(None)]
    return _of_layers((one for one in layers if one.get("agreement", 0) is not None), "agreement")


def _cut(report: Report) -> Sequence[Reading]:
    """Of the layers whose keys and values an FP8 cache holds; the others have null."""
    layers = entries(report, "evidence.layers")
    if layers is None:
        return [Reading(None)]
    found = []
    for one in layers:
        if "cut" not in one:
            found.append(Reading(None, place=str(one.get("layer"))))
        elif one["cut"] is not None:
            shares = [number(one, f"cut.{name}") for name in ("keys", "values")]
            known = [share for share in shares if share is not None]
            found.append(Reading(max(known, default=None), place=str(one.get("layer"))))
    return found


def _jump(report: Report) -> Sequence[Reading]:
    """By how much a layer multiplies the error that it meets; without one its own error.

    Tells a fault from its echo: the layers behind a bad one have a large error, but no jump.
    """
    before = 0.0
    jumps = []
    for error in _hidden_error(report):
        jump = error.value / before if error.value is not None and before else error.value
        jumps.append(dataclasses.replace(error, value=jump))
        before = error.value or 0.0
    return jumps


def _gain(report: Report) -> Sequence[Reading]:
    """How far each layer's gain is from 1."""
    layers = entries(report, "evidence.layers")
    readings = [Reading(None)] if layers is None else _of_layers(layers, "gain")
    return [
        one if one.value is None else dataclasses.replace(one, value=abs(one.value - 1))
        for one in readings
    ]


def _expert_gain(report: Report) -> Sequence[Reading]:
    """How far each expert's gain is from the median of its layer's.

    An expert that no token reached in both models has null, a dense layer has null for all.
    """
    layers = entries(report, "evidence.layers")
    if layers is None:
        return [Reading(None)]
    found = []
    for one in layers:
        layer = str(one.get("layer"))
        if "expert_gain" not in one:
            found.append(Reading(None, place=layer))
        gains = gains_of(one)
        middle = statistics.median(gains.values()) if gains else 0.0
        found += [
            Reading(abs(gain - middle), place=f"{layer}.{expert}") for expert, gain in gains.items()
        ]
    return found


def gains_of(layer: Report) -> dict[int, float]:
    """A layer's gains by expert, of the experts that have one."""
    gains = layer.get("expert_gain") or []
    if not isinstance(gains, list):
        raise _malformed("expert_gain", "a list of numbers", gains)
    every = {
        expert: number({"expert_gain": gain}, "expert_gain") for expert, gain in enumerate(gains)
    }
    return {expert: gain for expert, gain in every.items() if gain is not None}


def _of_layers(layers: Iterable[Report], key: str) -> list[Reading]:
    return [Reading(number(one, key), place=str(one.get("layer"))) for one in layers]


# parts of the retrieval, each with its prompts, shares and difference, by place
Parts = Callable[[Report], Mapping[str, Report] | None]


def _whole(report: Report) -> Mapping[str, Report] | None:
    found = _find(report, "evidence.retrieval")
    if found is None:
        return None
    if not isinstance(found, Mapping):
        raise _malformed("evidence.retrieval", "an object", found)
    return {"": found}


def _tasks(report: Report) -> Mapping[str, Report] | None:
    tasks = entries(report, "evidence.retrieval.tasks")
    return None if tasks is None else {str(task.get("task")): task for task in tasks}


def _lengths(report: Report) -> Mapping[str, Report] | None:
    """Cells of all tasks pooled."""
    tasks = entries(report, "evidence.retrieval.tasks")
    if tasks is None:
        return None
    cells = [cell for task in tasks for cell in entries(task, "cells") or []]
    by_length: dict[str, list[Report]] = {}
    for cell in sorted(cells, key=lambda cell: number(cell, "length") or 0):
        by_length.setdefault(str(cell.get("length")), []).append(cell)
    return {length: pooled(some) for length, some in by_length.items()}


def pooled(cells: Sequence[Report]) -> Report:
    """Prompts, shares and difference of some cells together, as those of one task."""
    prompts = _sum(cells, "prompts")
    if not prompts:
        return {"prompts": 0}
    original, quantized = (
        sum((_proportion(cell, side) or 0) * (number(cell, "prompts") or 0) for cell in cells)
        / prompts
        for side in ("original", "quantized")
    )
    low, high = matched(_sum(cells, "lost"), _sum(cells, "gained"), prompts)
    return {
        "prompts": prompts,
        "original": original,
        "quantized": quantized,
        "difference": {"value": quantized - original, "low": low, "high": high},
    }


def _sum(cells: Sequence[Report], key: str) -> float:
    return sum(number(cell, key) or 0 for cell in cells)


def _retrieval(parts: Parts, key: str) -> Reader:
    """The quantized model's share, or its difference from the original's, of each part."""

    def read(report: Report) -> Sequence[Reading]:
        found = parts(report)
        if found is None:
            return [Reading(None)]
        of = {"quantized": _share, "difference": _difference}[key]
        return [of(part, place) for place, part in found.items()]

    return read


def _share(part: Report, place: str) -> Reading:
    value, prompts = _proportion(part, "quantized"), number(part, "prompts")
    interval = wilson(value, prompts) if value is not None and prompts else None
    return Reading(value, interval, place, prompts)


def _proportion(report: Report, path: str) -> float | None:
    """A number from 0 to 1."""
    found = number(report, path)
    if found is not None and not 0 <= found <= 1:
        raise _malformed(path, "a share from 0 to 1", found)
    return found


def _difference(part: Report, place: str) -> Reading:
    value = number(part, "difference.value")
    low, high = number(part, "difference.low"), number(part, "difference.high")
    interval = None if low is None or high is None else (low, high)
    return Reading(value, interval, place, number(part, "prompts"))


def _fallbacks(report: Report) -> Sequence[Reading]:
    rescues = entries(report, "rescues")
    if rescues is None:
        return [Reading(None)]
    return [Reading(sum(rescue.get("kind") == "fallback" for rescue in rescues))]


def _other_settings(report: Report) -> Sequence[Reading]:
    settings = entries(report, "evidence.other_settings")
    return [Reading(None if settings is None else len(settings))]


def _bytes(report: Report) -> Sequence[Reading]:
    return [Reading(number(report, "quantized.bytes"))]


_TOKENS, _PROMPTS = Section.LIKELIHOOD, Section.RETRIEVAL

_ALL = (
    Figure(
        "likelihood.kl_mean", "KL, mean (nats per token)", _likelihood("kl_mean"), _TOKENS,
        estimated=True,
    ),
    Figure("likelihood.kl_median", "KL, median (nats)", _likelihood("kl_median"), _TOKENS),
    Figure("likelihood.kl_p99", "KL, 99th percentile (nats)", _likelihood("kl_p99"), _TOKENS),
    Figure("likelihood.kl_p999", "KL, 99.9th percentile (nats)", _likelihood("kl_p999"), _TOKENS),
    Figure("likelihood.kl_max", "KL, largest (nats)", _likelihood("kl_max"), _TOKENS),
    Figure(
        "likelihood.top1_agreement", "top-1 agreement (share of tokens)",
        _likelihood("top1_agreement"), _TOKENS, larger_is_better=True, estimated=True,
    ),
    Figure(
        "likelihood.top5_agreement", "top-5 agreement (share of tokens)",
        _likelihood("top5_agreement"), _TOKENS, larger_is_better=True, estimated=True,
    ),
    Figure(
        "likelihood.perplexity_increase", "perplexity increase (share)",
        _likelihood("perplexity_increase"), _TOKENS, estimated=True, relative=True,
    ),
    Figure("likelihood.perplexity", "perplexity", _perplexity, _TOKENS, estimated=True),
    Figure("likelihood.bits_per_byte", "bits per byte of text", _bits_per_byte, _TOKENS),
    Figure("layers.hidden_error", "hidden-state error", _hidden_error, _TOKENS, by="layer"),
    Figure("layers.jump", "jump of the hidden-state error", _jump, _TOKENS, by="layer"),
    Figure("layers.gain", "gain of a feed-forward, from 1", _gain, _TOKENS, by="layer"),
    Figure(
        "layers.expert_gain", "gain of an expert, from the median of its layer", _expert_gain,
        _TOKENS, by="expert",
    ),
    Figure(
        "layers.agreement", "routing agreement (share of tokens)", _agreement, _TOKENS,
        larger_is_better=True, by="layer",
    ),
    Figure(
        "layers.cut", "keys or values cut off by the FP8 cache (share)", _cut, _TOKENS, by="layer"
    ),
    Figure(
        "retrieval.quantized", "retrieval (share of prompts)", _retrieval(_whole, "quantized"),
        _PROMPTS, larger_is_better=True, estimated=True,
    ),
    Figure(
        "retrieval.difference", "retrieval, against the original",
        _retrieval(_whole, "difference"), _PROMPTS, larger_is_better=True, estimated=True,
        relative=True,
    ),
    Figure(
        "retrieval.tasks.quantized", "retrieval by task (share)", _retrieval(_tasks, "quantized"),
        _PROMPTS, larger_is_better=True, by="task", estimated=True,
    ),
    Figure(
        "retrieval.tasks.difference", "retrieval by task, against the original",
        _retrieval(_tasks, "difference"), _PROMPTS, larger_is_better=True, by="task",
        estimated=True, relative=True,
    ),
    Figure(
        "retrieval.lengths.quantized", "retrieval by length (share)",
        _retrieval(_lengths, "quantized"), _PROMPTS, larger_is_better=True, by="length",
        estimated=True,
    ),
    Figure(
        "retrieval.lengths.difference", "retrieval by length, against the original",
        _retrieval(_lengths, "difference"), _PROMPTS, larger_is_better=True, by="length",
        estimated=True, relative=True,
    ),
    Figure("other_settings", "settings that differ from the original's", _other_settings),
    Figure("rescues.fallback", "fallbacks (tensors)", _fallbacks),
    Figure("quantized.bytes", "size of the checkpoint (bytes)", _bytes),
)  # fmt: skip

FIGURES: Mapping[str, Figure] = {figure.name: figure for figure in _ALL}
