"""Which precision was chosen for the bytes that there are, why, and what others would cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..figures import Report
from ..wording import cards, number, part, percent, requests, size
from .axis import Axis, logarithmic
from .element import Markup
from .plots import Series, key, lines
from .section import Section, figure, said, section
from .table import Row, behind, table

Record = Mapping[str, Any]
MARGIN = 0.04  # of the x axis, on both sides
SIDES = ("bytes", "expected KL", "measured KL")


def budget(report: Report) -> Section | None:
    """None where a recipe said it all."""
    found = part(report, "budget")
    if not found:
        return None
    return section(
        "Precision",
        said(
            f"Each part of each layer got the precision with which the model fits {cards(found)} "
            f"with {requests(found)} and loses least: {size(found['weight_bytes'])} of weights on "
            f"a card, where there is room for {size(found['room_bytes'])}."
        ),
        _frontier(found, part(report, "evidence", "likelihood")),
        _parts(found["parts"]),
    )


def _frontier(found: Record, likelihood: Record) -> Markup:
    """Divergence against bytes: of the best mixes, of recipes, and of what was made."""
    measured, interval = likelihood.get("kl_mean"), part(likelihood, "intervals").get("kl_mean")
    unit, name = (1e9, "GB") if found["weight_bytes"] >= 1e9 else (1e6, "MB")

    def points(records: Sequence[Record]) -> list[tuple[float, float]]:
        return [(one["bytes"] / unit, one["expected"]) for one in records if one["expected"] > 0]

    here = found["weight_bytes"] / unit
    ranges = [] if measured is None or interval is None else [(here, *interval)]
    series = [
        Series("best mixes, expected", "s0", points(found["frontier"])),
        Series("recipes, expected", "s2", points(found["recipes"]), joined=False),
        Series("this one, expected", "s3", [(here, found["expected"])], joined=False),
        Series(
            "this one, measured", "s1", [] if measured is None else [(here, measured)], ranges,
            joined=False,
        ),
    ]  # fmt: skip
    across = [left for one in series for left, _ in one.points]
    room = MARGIN * (max(across) - min(across)) or 1.0
    x = Axis(min(across) - room, max(across) + room)
    heights = [above for one in series for _, above in one.points]
    told = (
        f"Expected KL divergence against bytes of weights on a card. This one has {here:,.3g} "
        f"{name}, expected {number(found['expected'])}, measured {number(measured)} nats a token."
    )
    rows: list[Row] = [
        *(("best mix", size(one["bytes"]), number(one["expected"]), None)
          for one in found["frontier"]),
        *((one["name"], size(one["bytes"]), number(one["expected"]), None)
          for one in found["recipes"]),
        ("this one", size(found["weight_bytes"]), number(found["expected"]), number(measured)),
    ]  # fmt: skip
    return figure(
        "What bytes buy",
        said(
            "Expected is what a few tokens say of the original's layers when they are rounded, and "
            "how much of it the solver leaves; nats a token. It is meant to rank mixes; measured "
            "is what came of this one."
        ),
        lines(x, logarithmic(heights), series, f"weights on a card, {name}",
              "KL divergence, nats a token", told, x.ticks()),
        key({one.name: one.class_ for one in series if one.points}),
        behind(table("Divergence by bytes", ("", *SIDES), rows)),
    )  # fmt: skip


def _parts(parts: Sequence[Record]) -> Markup:
    """What each part got, and what it would have added in the least precision."""
    rows: list[Row] = []
    for one in parts:
        [chosen] = (option for option in one["options"] if option["scheme"] == one["scheme"])
        worst = max(one["options"], key=lambda option: option["error"])
        rows.append(
            (
                f"{one['layer']}, {one['component'].replace('_', ' ')}",
                f"{one['scheme']}, as the recipe says" if one["pinned"] else one["scheme"],
                size(chosen["bytes"]),
                percent(chosen["error"], 2),
                f"{percent(worst['error'], 2)} in {worst['scheme']}",
            )
        )
    header = ("layer, part", "scheme", "bytes", "error it adds", "most it could add")
    return figure(
        "What each part got",
        said(
            "Errors are shares of what the whole model would have if all parts were rounded to the "
            "least precision. A part is worth bytes where its error would be large for its size."
        ),
        behind(table("Precision by part", header, rows, "sortable"), "Table of all parts"),
    )
