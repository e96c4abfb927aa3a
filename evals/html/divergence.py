"""How far the two models' predictions are apart: a table, a histogram, and the worst passages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..figures import Report
from ..wording import UNKNOWN, count, number, part, percent, signed
from .axis import Axis, logarithmic
from .element import Markup, element, joined
from .plots import Mark, histogram
from .section import Section, figure, judged, said, section
from .table import Cell, Row, behind, table

SHOWN = 5  # of the worst passages; the others are folded away
QUANTILES = {
    "kl_median": "median",
    "kl_mean": "mean",
    "kl_p99": "99 %",
    "kl_p999": "99.9 %",
    "kl_max": "largest",
}
FLAGGED = ("kl_median", "kl_mean", "kl_p99", "kl_p999")


def divergence(report: Report) -> Section | None:
    """None where likelihoods were not measured."""
    likelihood = part(report, "evidence", "likelihood")
    if not likelihood:
        return None
    return section(
        "Predictions",
        said(
            f"Both models read the same {count(likelihood.get('tokens'))} tokens of text in "
            f"{count(likelihood.get('windows'))} windows. KL divergence, in nats a token, says "
            f"how far the quantized model's prediction is from the original's; 0 is no difference."
        ),
        _figures(likelihood),
        _histogram(likelihood),
        _worst(likelihood.get("worst") or []),
    )


def _figures(likelihood: Mapping[str, Any]) -> Markup:
    intervals = part(likelihood, "intervals")
    before, after = part(likelihood, "original"), part(likelihood, "quantized")
    rows: list[Row] = []
    if before.get("perplexity") and after.get("perplexity"):
        increase = likelihood.get(
            "perplexity_increase", after["perplexity"] / before["perplexity"] - 1
        )
        interval = intervals.get("perplexity_increase")
        rows.append(
            (
                "perplexity, change",
                f"{signed(100 * increase, 2)} %",
                _ends(interval, lambda end: f"{signed(100 * end, 2)} %"),
                Cell(judged(interval, more_is_better=False), "note"),
                _uncertain(before),
                _uncertain(after),
            )
        )
    if before.get("bits_per_byte") is not None:
        sides = [side.get("bits_per_byte") for side in (before, after)]
        rows.append(("bits per byte", None, None, None, *(number(side, 4) for side in sides)))
    for key, name in QUANTILES.items():
        if likelihood.get(key) is not None:
            interval = _ends(intervals.get(key), number)
            rows.append((f"KL, {name}", number(likelihood[key]), interval, None, None, None))
    for key, name in {
        "top1_agreement": "same first choice",
        "top5_agreement": "shared of the first five",
    }.items():
        if likelihood.get(key) is not None:
            share = percent(likelihood[key], 2)
            interval = _ends(intervals.get(key), lambda end: percent(end, 2))
            rows.append((name, share, interval, None, None, None))
    header = ("", "figure", "95 % interval", "", "original", "quantized")
    return table("Predictions of both models", header, rows)


def _uncertain(side: Mapping[str, Any]) -> str:
    error = side.get("standard_error")
    shown = number(side["perplexity"], 4)
    return shown if error is None else f"{shown} ± {number(error, 2)}"


def _ends(interval: Sequence[float] | None, written: Any) -> str | None:
    return None if interval is None else " to ".join(written(end) for end in interval)


def _histogram(likelihood: Mapping[str, Any]) -> Markup | None:
    found = part(likelihood, "histogram")
    edges, counts = found.get("edges") or [], found.get("counts") or []
    if not any(counts):
        return None
    bins = _within(edges, counts)
    x = Axis(bins[0][0], bins[-1][1], log=True)
    y = Axis(0.8, 10 * logarithmic([1.0, *counts]).high, log=True)  # room for the marks' names
    marks = [
        Mark(f"{QUANTILES[key]} {number(likelihood[key], 2)}", likelihood[key])
        for key in FLAGGED
        if likelihood.get(key)
    ]
    told = (
        f"Histogram of KL divergence by token: {count(sum(counts))} tokens between "
        f"{number(bins[0][0])} and {number(bins[-1][1])} nats, most of them near "
        f"{number(max(bins, key=lambda bar: bar[2])[0])}; " + ", ".join(mark.name for mark in marks)
    )
    rows = [(number(low), number(high), count(int(height))) for low, high, height in bins]
    return figure(
        "How the divergence is spread over tokens",
        histogram(x, y, bins, marks, "KL divergence, nats", "tokens", told),
        behind(table("Tokens by KL divergence", ("from (nats)", "to", "tokens"), rows)),
    )


def _within(edges: Sequence[float], counts: Sequence[int]) -> list[tuple[float, float, float]]:
    """Bins from the first to the last that has tokens; a first edge of 0 is drawn a decade left."""
    filled = [number for number, held in enumerate(counts) if held]
    return [
        (edges[at] if edges[at] > 0 else edges[at + 1] / 10, edges[at + 1], counts[at])
        for at in range(filled[0], filled[-1] + 1)
    ]


def _worst(passages: Sequence[Mapping[str, Any]]) -> Markup | None:
    if not passages:
        return None
    shown = [_passage(passage) for passage in passages]
    rest = len(shown) - SHOWN
    return joined(
        element("h3", "Where they differ most"),
        said("The marked token is the text's own; below it, what each model would have said."),
        element("ol", shown[:SHOWN], class_="passages"),
        element(
            "details",
            element("summary", f"{rest} more"),
            element("ol", shown[SHOWN:], class_="passages", start=SHOWN + 1),
        )
        if rest > 0
        else None,
    )


def _passage(passage: Mapping[str, Any]) -> Markup:
    here = " · ".join(
        f"{key} {passage[key]:,}" for key in ("window", "position") if passage.get(key) is not None
    )
    answers = [
        element("div", element("dt", side), element("dd", _token(passage.get(side))))
        for side in ("original", "quantized")
    ]
    return element(
        "li",
        element("p", element("b", f"{number(passage.get('kl'))} nats"), f" {here}", class_="where"),
        element(
            "blockquote",
            _lines(passage.get("before")),
            element("mark", _lines(passage.get("token"))),
            _lines(passage.get("after")),
        ),
        element("dl", answers),
    )


def _token(text: object) -> Markup:
    """A token alone, its blanks shown."""
    shown = UNKNOWN if text is None else _lines(text).replace(" ", "␣").replace("\t", "⇥")
    return element("code", shown)


def _lines(text: object) -> str:
    """On one line: where it breaks is shown, not done."""
    return str(text or "").replace("\r\n", "\n").replace("\n", "↵")
