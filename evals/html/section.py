"""What the sections of the page share: their frame, and words for a difference. Knows no plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..wording import no_difference
from .element import Child, Markup, element


@dataclass(frozen=True)
class Section:
    """A section of the page and the heading that the page's contents name."""

    title: str
    markup: Markup

    @property
    def link(self) -> Markup:
        return element("a", self.title, href=f"#{_anchor(self.title)}")


def section(title: str, *children: Child) -> Section:
    """A section under its heading."""
    name = _anchor(title)
    heading = element("h2", title, id=name)
    return Section(title, element("section", heading, children, aria_labelledby=name))


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def figure(title: str, *children: Child) -> Markup:
    """A plot with its heading and the table behind it."""
    return element("figure", element("h3", title), children)


def said(*children: Child) -> Markup:
    """A sentence on what a section or a plot shows."""
    return element("p", children, class_="said")


def judged(interval: Sequence[float] | None, more_is_better: bool) -> Markup | None:
    """What a 95 % interval of a difference says; None without one."""
    if interval is None:
        return None
    if no_difference(interval):
        return element("span", "no difference seen", class_="pill")
    better = (interval[0] > 0) == more_is_better
    return element("span", "better" if better else "worse", class_=f"pill {_SIDES[better]}")


_SIDES = {True: "good", False: "bad"}
