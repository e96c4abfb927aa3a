"""How evenly the experts are used: in calibration, by the original, and by the quantized model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from ..figures import Report
from ..wording import count, number, part, percent, signed
from .colours import (
    LEVELS,
    SIDE,
    amount_class,
    amount_level,
    difference_class,
    difference_level,
)
from .element import Markup, element
from .plots import grid, scale
from .section import Section, figure, said, section
from .table import Cell, behind, table

OCTAVES = 2  # the colours end at a quarter and at four times an even share
Tokens = Mapping[int, Sequence[int]]  # by layer and expert


def experts(report: Report) -> Section | None:
    """None for a model without routed experts, and where nobody counted."""
    covered = _by_layer(report.get("layers") or [], "expert_tokens")
    measured = part(report, "evidence").get("layers") or []
    before, after = (_by_layer(measured, f"load_{side}") for side in ("original", "quantized"))
    parts = [_coverage(covered, part(report, "calibration", "coverage"))]
    if before and after:
        parts += [
            _load("Load, original", before),
            _load("Load, quantized", after),
            _change(before, after),
            _gains(_by_layer(measured, "expert_gain")),
        ]
    if not any(parts):
        return None
    legend = scale(
        "a quarter",
        "four times an even share",
        [amount_class(level) for level in range(1, LEVELS)],
    )
    return section(
        "Experts",
        said(
            "Tokens that the router sends to each expert, in colours relative to an even share "
            "of the layer."
        ),
        legend,
        element("div", parts, class_="pairs"),
    )


def _by_layer(records: Sequence[Mapping[str, Any]], key: str) -> dict[int, list[Any]]:
    return {record["layer"]: record[key] for record in records if record.get(key)}


def _coverage(tokens: Tokens, coverage: Mapping[str, Any]) -> Markup | None:
    """Calibration tokens; experts with too few are marked in picture and table."""
    if not tokens:
        return None
    poor = {
        (entry["layer"], expert)
        for entry in coverage.get("poor") or []
        for expert in entry["experts"]
    }
    row_of = {layer: row for row, layer in enumerate(tokens)}
    marked = [(row_of[layer], expert) for layer, expert in sorted(poor) if layer in row_of]
    needed = coverage.get("needed")
    if needed is None:
        note = None
    elif poor:
        note = (
            f" {count(len(poor))} of {count(coverage.get('experts'))} experts saw fewer than the "
            f"{count(needed)} tokens that determine their codes; they carry a dot."
        )
    else:
        note = f" Every expert saw at least the {count(needed)} tokens that determine its codes."
    return figure(
        "Coverage by calibration",
        said(f"{_extremes(tokens)}.", note),
        _grid(tokens, _shares(tokens), _amount, f"Calibration tokens: {_extremes(tokens)}", marked),
        behind(
            _table(
                "Calibration tokens by layer and expert",
                tokens,
                lambda layer, expert, held: Cell(
                    count(held), "poor" if (layer, expert) in poor else None
                ),
            )
        ),
    )


def _load(title: str, tokens: Tokens) -> Markup:
    return figure(
        title,
        said(f"{_extremes(tokens)}."),
        _grid(tokens, _shares(tokens), _amount, f"{title}: {_extremes(tokens)}"),
        behind(
            _table(
                f"{title}, tokens by layer and expert",
                tokens,
                lambda _layer, _expert, held: Cell(count(held)),
            )
        ),
    )


def _change(before: Tokens, after: Tokens) -> Markup:
    """What the quantized model sends more or less to each expert, as a share of an even share."""
    plain, served = _shares(before), _shares(after)
    changes = {
        layer: [new - old for old, new in zip(plain[layer], served[layer], strict=True)]
        for layer in before
        if layer in served
    }
    largest = max(abs(change) for line in changes.values() for change in line)
    layer, expert = max(
        ((layer, expert) for layer, line in changes.items() for expert in range(len(line))),
        key=lambda place: abs(changes[place[0]][place[1]]),
    )
    told = (
        f"Largest change: expert {expert} of layer {layer}, "
        f"{signed(100 * changes[layer][expert], 1)} % of an even share"
    )
    ends = percent(largest, 1)
    return figure(
        "Change of load",
        said(f"{told}."),
        scale(
            f"−{ends}",
            f"+{ends} of an even share",
            [difference_class(level) for level in range(-SIDE, SIDE + 1)],
        ),
        _grid(changes, changes, lambda change: difference_class(difference_level(change, largest)),
              f"Change of load. {told}"),
        behind(
            _table(
                "Change of load in % of an even share",
                changes,
                lambda _layer, _expert, change: Cell(signed(100 * change, 1)),
            )
        ),
    )  # fmt: skip


def _gains(gains: Mapping[int, Sequence[float | None]]) -> Markup | None:
    """What each expert adds along what the original adds, against the median of its layer."""
    middle = {
        layer: median(gain for gain in line if gain is not None)
        for layer, line in gains.items()
        if any(gain is not None for gain in line)
    }
    if not middle:
        return None
    away = {
        layer: [None if gain is None else gain - middle[layer] for gain in gains[layer]]
        for layer in middle
    }
    farthest, (layer, expert) = max(
        (abs(gain), (layer, expert))
        for layer, line in away.items()
        for expert, gain in enumerate(line)
        if gain is not None
    )
    told = (
        f"Expert {expert} of layer {layer} stands out most: {number(gains[layer][expert])}, "
        f"where the median of its layer is {number(middle[layer])}"
    )
    ends = number(farthest, 2)
    return figure(
        "Gain of each expert",
        said(f"What it adds along what the original's adds. {told}."),
        scale(
            f"−{ends}",
            f"+{ends} beside its layer",
            [difference_class(level) for level in range(-SIDE, SIDE + 1)],
        ),
        _grid(
            away,
            away,
            lambda gain: difference_class(difference_level(gain, farthest)),
            f"Gain of each expert. {told}",
        ),
        behind(
            _table(
                "Gain of each expert by layer",
                {layer: gains[layer] for layer in middle},
                lambda _layer, _expert, gain: Cell("–" if gain is None else number(gain)),
            )
        ),
    )


def _shares(tokens: Tokens) -> dict[int, list[float]]:
    """Relative to an even share of the layer: 1 is even."""
    return {
        layer: [len(held) * one / max(1, sum(held)) for one in held]
        for layer, held in tokens.items()
    }


def _amount(share: float) -> str:
    if not share:
        return amount_class(0)
    place = (math.log2(share) + OCTAVES) / (2 * OCTAVES)
    return amount_class(max(1, amount_level(place)))


def _extremes(tokens: Tokens) -> str:
    """Which expert has the fewest and which the most tokens, in words."""
    places = [(layer, expert) for layer, held in tokens.items() for expert in range(len(held))]
    fewest, most = (
        pick(places, key=lambda place: tokens[place[0]][place[1]]) for pick in (min, max)
    )
    (least, few), (largest, many) = fewest, most
    return (
        f"From {count(tokens[least][few])} tokens (layer {least}, expert {few}) "
        f"to {count(tokens[largest][many])} (layer {largest}, expert {many})"
    )


def _grid(
    rows: Iterable[int],
    values: Mapping[int, Sequence[float | None]],
    class_of: Callable[[float], str],
    told: str,
    marked: Sequence[tuple[int, int]] = (),
) -> Markup:
    classes = [
        [None if value is None else class_of(value) for value in values[layer]] for layer in rows
    ]
    return grid(classes, [str(layer) for layer in rows], "expert", "layer", told, marked)


def _table(
    caption: str,
    rows: Mapping[int, Sequence[Any]],
    cell: Callable[[int, int, Any], Cell],
) -> Markup:
    columns = max(map(len, rows.values()))
    return table(
        caption,
        ("layer", *map(str, range(columns))),
        [
            (str(layer), *(cell(layer, expert, value) for expert, value in enumerate(held)))
            for layer, held in rows.items()
        ],
    )
