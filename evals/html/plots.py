"""Plots: points and lines over an axis, bars of a histogram, a grid of coloured cells, stacks.

The drawing is an SVG that stretches with the page; the words around it are HTML beside it, so that
they keep their size on a phone. Each is an image with a text alternative. Knows no report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .axis import Axis, named
from .element import Child, Markup, element, joined

WIDTH, HEIGHT = 1000, 1000  # of a drawing's own units; the page decides how large it is


@dataclass(frozen=True)
class Series:
    """Points `(x, y)` under one name; `ranges` are vertical lines `(x, low, high)` around them."""

    name: str
    class_: str  # its colour in the style sheet
    points: Sequence[tuple[float, float]]
    ranges: Sequence[tuple[float, float, float]] = ()
    joined: bool = True  # by a line


@dataclass(frozen=True)
class Mark:
    """A named value of the x axis."""

    name: str
    value: float


def lines(
    x: Axis, y: Axis, series: Sequence[Series], x_name: str, y_name: str, told: str,
    x_ticks: Sequence[float],
) -> Markup:  # fmt: skip
    """Points, joined by lines or not, of one or more series; `told` is the text alternative."""
    drawn: list[Markup | None] = [_rules(y)]
    for one in series:
        shown = [point for point in one.points if all(map(math.isfinite, point))]
        places = [f"{_x(x, left)} {_y(y, above)}" for left, above in shown]
        ranges = "".join(f"M{_x(x, at)} {_y(y, low)}V{_y(y, high)}" for at, low, high in one.ranges)
        drawn += (
            [
                element("path", class_=f"range {one.class_}", d=ranges) if ranges else None,
                element("path", class_=f"line {one.class_}", d="M" + "L".join(places))
                if one.joined
                else None,
                element(
                    "path",
                    class_=f"dot {one.class_}" if one.joined else f"dot {one.class_} alone",
                    d="".join(f"M{at}h0" for at in places),
                ),
            ]
            if places
            else []
        )
    return _framed(joined(drawn), x, y, x_name, y_name, told, x_ticks)


def histogram(
    x: Axis, y: Axis, bins: Sequence[tuple[float, float, float]], marks: Sequence[Mark],
    x_name: str, y_name: str, told: str,
) -> Markup:  # fmt: skip
    """Bars `(low edge, high edge, height)`, and named values as lines across."""
    bars = "".join(
        f"M{_x(x, low)} {HEIGHT}V{_y(y, height)}H{_x(x, high)}V{HEIGHT}z"
        for low, high, height in bins
        if height > 0
    )
    across = "".join(f"M{_x(x, mark.value)} 0V{HEIGHT}" for mark in marks)
    drawing = joined(
        _rules(y),
        element("path", class_="bar", d=bars),
        element("path", class_="mark", d=across) if across else None,
    )
    flags = [
        element(
            "span", mark.name,
            class_="flag left" if x.place(mark.value) > 0.75 else "flag",
            style=f"left:{100 * x.place(mark.value):.1f}%;top:{1.35 * row:.2f}em",
        )
        for row, mark in enumerate(marks)
    ]  # fmt: skip
    return _framed(drawing, x, y, x_name, y_name, told, x.ticks(), flags)


def grid(
    classes: Sequence[Sequence[str | None]], rows: Sequence[str], x_name: str, y_name: str,
    told: str, marked: Sequence[tuple[int, int]] = (),
) -> Markup:  # fmt: skip
    """Cells coloured by class, row by row; `marked` ones `(row, column)` get a dot.

    One path a class keeps thousands of cells small. The script reads the values from the table
    behind it.
    """
    columns = max(map(len, classes))
    paths: dict[str, list[str]] = {}
    for row, line in enumerate(classes):
        for column, class_ in enumerate(line):
            if class_ is not None:
                paths.setdefault(class_, []).append(f"M{column} {row}h1v1h-1z")
    drawing = [element("path", class_=name, d="".join(cells)) for name, cells in paths.items()]
    dots = "".join(f"M{column + 0.5} {row + 0.5}h0" for row, column in marked)
    svg = element(
        "svg", drawing, element("path", class_="dot poor", d=dots) if dots else None,
        viewBox=f"0 0 {columns} {len(rows)}", preserveAspectRatio="none", role="img",
        aria_label=told, class_="cells fine" if columns > 32 else "cells",
        data_rows=len(rows), data_columns=columns,
    )  # fmt: skip
    every = max(1, math.ceil(len(rows) / 12))
    down = [
        _tick("top", (row + 0.5) / len(rows), name)
        for row, name in enumerate(rows)
        if row % every == 0
    ]
    step = max(1, 2 ** math.ceil(math.log2(columns / 8)))
    along = [
        _tick("left", (column + 0.5) / columns, str(column)) for column in range(0, columns, step)
    ]
    height = min(26.0, max(9.0, 0.62 * len(rows)))
    return _plot(svg, down, along, x_name, y_name, f"height:{height:.1f}rem")


def stack(parts: Mapping[str, tuple[float, str]], whole: float, told: str, limit: float) -> Markup:
    """A bar of `parts` (name -> amount, class) beside each other, `whole` wide, with a line at
    `limit`."""
    drawn, left = [], 0.0
    for amount, class_ in parts.values():
        width = WIDTH * amount / whole
        drawn.append(
            element(
                "path", class_=f"part {class_}", d=f"M{left:.2f} 0h{width:.2f}v100h-{width:.2f}z"
            )
        )
        left += width
    at = WIDTH * limit / whole
    drawn.append(element("path", class_="limit", d=f"M{at:.2f} 0v100"))
    return element(
        "svg", drawn,
        viewBox=f"0 0 {WIDTH} 100", preserveAspectRatio="none", role="img", aria_label=told,
        class_="stack",
    )  # fmt: skip


def key(classes: Mapping[str, str]) -> Markup:
    """What the colours stand for: name -> class."""
    return element(
        "ul",
        [
            element("li", element("i", class_=f"swatch {class_}", aria_hidden="true"), name)
            for name, class_ in classes.items()
        ],
        class_="key",
    )


def scale(low: str, high: str, classes: Sequence[str]) -> Markup:
    """The steps of a colour scale between the words for its ends."""
    steps = [element("i", class_=f"step {class_}") for class_ in classes]
    return element("p", low, element("span", steps, class_="steps", aria_hidden="true"), high,
                   class_="scale")  # fmt: skip


def _framed(
    drawing: Markup, x: Axis, y: Axis, x_name: str, y_name: str, told: str,
    x_ticks: Sequence[float], over: Sequence[Markup] = (),
) -> Markup:  # fmt: skip
    svg = element(
        "svg", drawing,
        viewBox=f"0 0 {WIDTH} {HEIGHT}", preserveAspectRatio="none", role="img", aria_label=told,
    )  # fmt: skip
    down = [_tick("top", 1 - y.place(value), named(value)) for value in y.ticks()]
    along = [_tick("left", x.place(value), named(value)) for value in x_ticks]
    return _plot(svg, down, along, x_name, y_name, None, over)


def _plot(
    svg: Markup, down: Sequence[Markup], along: Sequence[Markup], x_name: str, y_name: str,
    style: str | None, over: Sequence[Markup] = (),
) -> Markup:  # fmt: skip
    """The drawing between its axes."""
    return element(
        "div",
        element("div", y_name, class_="y-name"),
        element("div", down, class_="down", aria_hidden="true"),
        element("div", svg, over, class_="drawing", style=style),
        element("div", along, class_="along", aria_hidden="true"),
        element("div", x_name, class_="x-name"),
        class_="plot",
    )


def _tick(side: str, share: float, name: Child) -> Markup:
    return element("span", name, style=f"{side}:{100 * share:.2f}%")


def _rules(y: Axis) -> Markup:
    d = "".join(f"M0 {_y(y, value)}H{WIDTH}" for value in y.ticks())
    return element("path", class_="rule", d=d)


def _x(axis: Axis, value: float) -> str:
    return f"{WIDTH * axis.place(value):.1f}"


def _y(axis: Axis, value: float) -> str:
    return f"{HEIGHT * (1 - axis.place(value)):.1f}"
