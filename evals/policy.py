"""A policy: which figures of a report are limited, and how. Read from TOML.

    [likelihood.kl_mean]
    max = 0.05                 # the figure itself
    baseline_ratio = 1.1       # times the baseline's figure
    [retrieval.tasks.difference]
    min = -0.1                 # each task
    [retrieval.tasks.difference.cwe]
    min = -0.15                # but for this one

Unknown figures and keys are refused with the nearest known one. Knows nothing of verdicts.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib import resources
from pathlib import Path
from typing import Any

from llama4q.errors import UserError, nearest

from .figures import FIGURES, Figure, Section

DEFAULT = "default_policy.toml"
SETTINGS = ("strict", "min_tokens", "min_prompts")


class Kind(Enum):
    """What a limit is a limit on, by its key in a policy."""

    MAX = "max"  # the figure, in its unit
    MIN = "min"
    BASELINE_RATIO = "baseline_ratio"  # the figure, in the baseline's
    BASELINE_MARGIN = "baseline_margin"  # how much worse than the baseline's, in its unit

    @property
    def needs_baseline(self) -> bool:
        return self in (Kind.BASELINE_RATIO, Kind.BASELINE_MARGIN)


KEYS = (*(kind.value for kind in Kind), "strict")


@dataclass(frozen=True)
class Limit:
    """What must hold of a figure, at one place or at each that has no limit of its own."""

    figure: Figure
    kind: Kind
    value: float
    place: str = ""  # a layer, task or length; '' for each
    but: frozenset[str] = frozenset()  # places that have their own
    strict: bool = False  # the value itself must hold, not only the better end of its interval

    def bound(self, baseline: float) -> float:
        """The largest or smallest value that holds, given the baseline's where it counts."""
        if self.kind is Kind.BASELINE_RATIO:
            return self.value * baseline
        if self.kind is Kind.BASELINE_MARGIN:
            return baseline - self.value if self.figure.larger_is_better else baseline + self.value
        return self.value


@dataclass(frozen=True)
class Policy:
    """All limits, and the sample that they need."""

    limits: tuple[Limit, ...]
    min_tokens: int = 0
    min_prompts: int = 0

    def least(self, section: Section) -> int:
        return self.min_tokens if section is Section.LIKELIHOOD else self.min_prompts


def default_policy() -> str:
    """The TOML of the policy that holds when none is named."""
    return (resources.files("evals") / DEFAULT).read_text(encoding="utf-8")


def load_policy(path: Path | None, changes: Sequence[str] = ()) -> Policy:
    """The policy in a file, or the default, with some of its lines put differently.

    A change is a line such as `likelihood.kl_mean.max = 0.03`. Raises UserError.
    """
    where = DEFAULT if path is None else str(path)
    raw = _parsed(default_policy() if path is None else _text(path), where)
    for change in changes:
        _merge(raw, _parsed(change, f"--limit {change!r}"))
    return _policy(raw, where)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; a policy is a TOML file") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); "
            f"`llama4q check --show-policy` prints a policy to start from"
        ) from None


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{where}: not valid TOML ({error})") from None


def _merge(raw: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(raw.get(key), dict):
            _merge(raw[key], value)
        else:
            raw[key] = value


def _policy(raw: Mapping[str, Any], where: str) -> Policy:
    """Raises UserError for what is unknown, of another type, or without effect."""
    settings = {key: value for key, value in raw.items() if not isinstance(value, Mapping)}
    _refuse_unknown(settings, SETTINGS, f"{where}: unknown setting")
    strict = _boolean(settings.pop("strict", False), f"{where}: strict")
    least = {key: _count(value, f"{where}: {key}") for key, value in settings.items()}
    tables = dict(_tables({key: value for key, value in raw.items() if key not in settings}))
    limits: list[Limit] = []
    for path, table in tables.items():
        figure, place = _figure(path, where)
        inner = [other for other in tables if other.startswith(f"{path}.")]
        own = frozenset(other.removeprefix(f"{path}.") for other in inner)
        shared = Limit(figure, Kind.MAX, 0.0, place, own, strict)
        limits += _limits(shared, table, f"{where}: [{path}]")
    if not limits:
        raise UserError(f"{where}: limits nothing; `llama4q check --show-policy` shows how to")
    return Policy(tuple(limits), **least)


def _tables(raw: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The tables that hold keys, by their dotted path."""
    for name, value in raw.items():
        path = f"{above}{name}"
        if isinstance(value, Mapping):
            keys = {key: inner for key, inner in value.items() if not isinstance(inner, Mapping)}
            if keys or not value:
                yield path, keys
            yield from _tables(
                {key: inner for key, inner in value.items() if key not in keys}, f"{path}."
            )


def _figure(path: str, where: str) -> tuple[Figure, str]:
    """The figure that a table is about, and its place."""
    for name, figure in FIGURES.items():
        if path == name:
            return figure, ""
        if figure.by and path.startswith(f"{name}."):
            return figure, path.removeprefix(f"{name}.")
    raise UserError(
        f"{where}: unknown figure [{path}]{nearest(path, FIGURES)} (known: {', '.join(FIGURES)})"
    )


def _limits(shared: Limit, table: Mapping[str, Any], where: str) -> Iterator[Limit]:
    _refuse_unknown(table, KEYS, f"{where}: unknown key")
    strict = _boolean(table.get("strict", shared.strict), f"{where}: strict")
    for kind in Kind:
        if kind.value in table:
            value = _number(table[kind.value], f"{where}: {kind.value}")
            limit = dataclasses.replace(shared, kind=kind, value=value, strict=strict)
            _refuse_senseless(limit, where)
            yield limit


def _refuse_senseless(limit: Limit, where: str) -> None:
    better = "large" if limit.figure.larger_is_better else "small"
    if limit.kind is (Kind.MAX if limit.figure.larger_is_better else Kind.MIN):
        other = Kind.MIN if limit.kind is Kind.MAX else Kind.MAX
        raise UserError(
            f"{where}: {limit.kind.value} = {limit.value:g}, but this figure is good when it is "
            f"{better}; limit it with {other.value}"
        )
    if limit.kind is Kind.BASELINE_RATIO and limit.figure.relative:
        raise UserError(
            f"{where}: baseline_ratio = {limit.value:g}, but this figure is a difference, which "
            f"may be 0; limit it with baseline_margin"
        )
    if limit.kind.needs_baseline and limit.value < 0:
        raise UserError(f"{where}: {limit.kind.value} = {limit.value:g} is below 0")


def _refuse_unknown(found: Collection[str], known: Collection[str], unknown: str) -> None:
    for key in found:
        if key not in known:
            raise UserError(f"{unknown} {key!r}{nearest(key, known)} (known: {', '.join(known)})")


def _number(value: Any, what: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise UserError(f"{what} is {value!r}, no number")
    return float(value)


def _count(value: Any, what: str) -> int:
    if type(value) is not int or value < 0:
        raise UserError(f"{what} is {value!r}, no count")
    return value


def _boolean(value: Any, what: str) -> bool:
    if type(value) is not bool:
        raise UserError(f"{what} is {value!r}; write true or false")
    return value
