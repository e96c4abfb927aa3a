"""Tables: plain ones, those that stand behind a plot, and those that are the plot, by the colours
of their cells. Knows no report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .element import Child, Markup, element


@dataclass(frozen=True)
class Cell:
    """One cell with a class, as for its colour."""

    content: Child
    class_: str | None = None


Row = Sequence[Child | Cell]


def table(caption: str, header: Sequence[str], rows: Iterable[Row], class_: str = "") -> Markup:
    """The first cell of each row is its heading. Wider than the page, it scrolls by itself.

    Classes: "words" sets text to the left, "sortable" lets a reader sort, "heat" makes cells even.
    """
    head = element("tr", [element("th", name, scope="col") for name in header])
    body = [
        element("tr", _cell("th", row[0], scope="row"), [_cell("td", cell) for cell in row[1:]])
        for row in rows
    ]
    whole = element(
        "table",
        element("caption", caption),
        element("thead", head),
        element("tbody", body),
        class_=class_ or None,
    )
    return element("div", whole, class_="wide", role="region", aria_label=caption, tabindex=0)


def behind(figures: Markup, label: str = "Table of these figures") -> Markup:
    """A table that is there for whoever asks."""
    return element("details", element("summary", label), figures, class_="behind")


def _cell(name: str, cell: Child | Cell, **attributes: str) -> Markup:
    found = cell if isinstance(cell, Cell) else Cell(cell)
    return element(name, found.content, class_=found.class_, **attributes)
