"""What both models find in long texts: by task, length and depth, as tables of coloured cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..figures import Report
from ..wording import count, ends, length, number, part, percent, pooled, signed
from .colours import (
    LEVELS,
    SIDE,
    amount_class,
    amount_level,
    difference_class,
    difference_level,
)
from .element import Markup, element, joined
from .plots import scale
from .section import Section, figure, judged, said, section
from .table import Cell, Row, table

LARGEST = 0.5  # the difference in share that has the strongest colour
Cells = Sequence[Mapping[str, Any]]


def retrieval(report: Report) -> Section | None:
    """None where nothing was asked."""
    found = part(report, "evidence", "retrieval")
    tasks = found.get("tasks") or []
    if not tasks:
        return None
    everything = [cell for task in tasks for cell in task["cells"]]
    every = "All tasks by length and depth" if len(tasks) > 1 else "By length and depth"
    parts = [_heat(every, everything, "depth", _depth)]
    if len(tasks) > 1:
        named = [{**cell, "task": task["task"]} for task in tasks for cell in task["cells"]]
        parts = [_heat("By task and length", named, "task", str), *parts, *map(_folded, tasks)]
    return section(
        "Retrieval",
        said(
            f"Both models answered the same {count(found.get('prompts'))} prompts; the answer "
            f"stands at a known depth of a text of a known length. Shares are of prompts answered "
            f"right, in %, differences in points."
        ),
        table("Retrieval by task", _HEADER, [_task(task) for task in _with_total(found, tasks)]),
        _legend(),
        parts,
    )


_HEADER = ("task", "original", "quantized", "difference", "95 % interval", "", "p", "prompts")


def _with_total(found: Mapping[str, Any], tasks: Cells) -> Cells:
    return [*tasks, {**found, "task": "all"}] if len(tasks) > 1 else tasks


def _task(task: Mapping[str, Any]) -> Row:
    difference = part(task, "difference")
    interval = ends(difference)
    value, chance = difference.get("value"), difference.get("p_value")
    shown = None
    if interval is not None:
        shown = " to ".join(signed(100 * end, 1) for end in interval)
    return (
        task["task"],
        percent(task["original"], 1),
        percent(task["quantized"], 1),
        None if value is None else signed(100 * value, 1),
        shown,
        Cell(judged(interval, more_is_better=True), "note"),
        None if chance is None else number(chance, 2),
        count(task.get("prompts")),
    )


def _folded(task: Mapping[str, Any]) -> Markup:
    """One task's own tables."""
    change = f"{percent(task['original'], 1)} → {percent(task['quantized'], 1)}"
    return element(
        "details",
        element("summary", f"{task['task']} ", element("span", change, class_="quiet")),
        _heat(f"{task['task']} by length and depth", task["cells"], "depth", _depth),
        class_="fold",
    )


def _heat(title: str, cells: Cells, key: str, named: Callable[[Any], str]) -> Markup:
    """Three tables beside each other: original, quantized, difference; columns are lengths."""
    lengths = sorted({cell["length"] for cell in cells})
    rows = list(dict.fromkeys(cell[key] for cell in cells))
    if key == "depth":
        rows.sort(key=lambda depth: (depth is None, depth))
    found = {
        (row, column): pooled(here)
        for row in rows
        for column in lengths
        if (here := [cell for cell in cells if (cell[key], cell["length"]) == (row, column)])
    }
    header = (key, *map(length, lengths))
    tables = [
        table(
            caption,
            header,
            [
                (named(row), *(shown(found.get((row, column))) for column in lengths))
                for row in rows
            ],
            "heat" if key == "depth" else "heat named",
        )
        for caption, shown in (
            ("original", _share_of(0)),
            ("quantized", _share_of(1)),
            ("difference", _difference),
        )
    ]
    return figure(title, element("div", tables, class_="trio"))


def _share_of(side: int) -> Callable[[tuple[float, float] | None], Cell]:
    def shown(shares: tuple[float, float] | None) -> Cell:
        if shares is None:
            return Cell("–")
        share = shares[side]
        return Cell(f"{100 * share:.0f}", amount_class(amount_level(share)))

    return shown


def _difference(shares: tuple[float, float] | None) -> Cell:
    if shares is None:
        return Cell("–")
    gained = shares[1] - shares[0]
    return Cell(signed(100 * gained, 0), difference_class(difference_level(gained, LARGEST)))


def _depth(depth: float | None) -> str:
    return "any" if depth is None else percent(depth, 0)


def _legend() -> Markup:
    points = f"{100 * LARGEST:.0f} points"
    return joined(
        scale("0 %", "100 % right", [amount_class(level) for level in range(LEVELS)]),
        scale(
            f"lost {points}",
            f"gained {points}",
            [difference_class(level) for level in range(-SIDE, SIDE + 1)],
        ),
    )
