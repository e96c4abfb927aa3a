"""The top of the page: what it is about, the verdict, and the three figures that matter.

Takes a verdict as the gate gives it; knows no limits of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from ..figures import Report
from ..gate import Answer, Line, Verdict
from ..verdict import answer, remarks
from ..verdict import table as limits
from ..wording import cards, count, ends, number, part, percent, requests, signed, size
from .element import Child, Markup, element
from .section import judged
from .table import Cell, Row, table


def title(report: Report) -> str:
    """What was made of what, or compared with what."""
    source = _short(part(report, "source").get("name"))
    recipe = part(report, "recipe").get("name")
    if recipe:
        return f"{source}, quantized to {recipe}"
    return f"{_short(part(report, 'quantized').get('name'))}, compared with {source}"


def head(report: Report, verdict: Verdict | None) -> Markup:
    """Heading, size and fit, the gate's verdict, three figures, and what was not measured."""
    lead = " ".join(sentence for sentence in (_smaller(report), _fits(report)) if sentence)
    return element(
        "header",
        element("p", "Quantization report", class_="kicker"),
        element("h1", title(report)),
        element("p", lead, class_="lead") if lead else None,
        None if verdict is None else _verdict(verdict),
        element("div", _cards(report), class_="cards"),
        _missing(report),
    )


def _short(name: object) -> str:
    return PurePath(str(name)).name or str(name) if name else "a checkpoint"


def _smaller(report: Report) -> str:
    before, after = (part(report, side).get("bytes") for side in ("source", "quantized"))
    if not before or not after:
        return ""
    times = f"{before / after:.2f} times smaller" if after <= before else "which is not smaller"
    return f"{size(after)} instead of {size(before)}, {times}."


def _fits(report: Report) -> str:
    fit = part(report, "fit")
    if "fits" not in fit:
        return ""
    answer = "Fits" if fit["fits"] else "Does not fit"
    return f"{answer} {cards(fit)} with {requests(fit)}."


def _verdict(verdict: Verdict) -> Markup:
    passed = verdict.answer is Answer.PASS
    word, _, told = answer(verdict).partition(": ")
    header, *rows = limits(verdict)
    cells: list[Row] = [
        (_named(line), *row[1:-1], Cell(row[-1], "good" if line.answer is Answer.PASS else "bad"))
        for line, row in zip(verdict.lines, rows, strict=True)
    ]
    said = [element("li", remark) for remark in remarks(verdict)]
    return element(
        "div",
        element("p", element("strong", word.capitalize()), f": {told} of the accuracy gate."),
        element(
            "details",
            element("summary", "The limits one by one"),
            table("Limits of the accuracy gate", header, cells),
            element("ul", said) if said else None,
            open=not passed,
        ),
        class_=f"verdict {'good' if passed else 'bad'}",
    )


def _named(line: Line) -> str:
    """The figure in words, and where it is worst."""
    figure, place = line.limit.figure, line.reading.place
    return f"{figure.title}, {figure.at(place)}" if place else figure.title


def _cards(report: Report) -> list[Markup]:
    """Divergence, perplexity and retrieval; agreement where there is no retrieval."""
    likelihood = part(report, "evidence", "likelihood")
    retrieval = part(report, "evidence", "retrieval")
    cards = [_divergence(likelihood), _perplexity(likelihood)]
    cards.append(_retrieval(retrieval) if retrieval else _agreement(likelihood))
    return [card for card in cards if card is not None]


def _divergence(likelihood: Mapping[str, Any]) -> Markup | None:
    mean = likelihood.get("kl_mean")
    if mean is None:
        return None
    same = likelihood.get("top1_agreement")
    meaning = (
        f"Both models would choose the same next token in {percent(same, 1)} of "
        f"{count(likelihood.get('tokens'))} cases."
        if same is not None
        else None
    )
    interval = part(likelihood, "intervals").get("kl_mean")
    shown = None if interval is None else " to ".join(number(end) for end in interval)
    return _card("Divergence of predictions", number(mean), "nats a token", shown, meaning)


def _perplexity(likelihood: Mapping[str, Any]) -> Markup | None:
    before, after = (part(likelihood, side).get("perplexity") for side in ("original", "quantized"))
    if not before or not after:
        return None
    increase = likelihood.get("perplexity_increase", after / before - 1)
    interval = part(likelihood, "intervals").get("perplexity_increase")
    return _card(
        "Perplexity",
        signed(100 * increase, 2),
        "%",
        _between(interval, 2, "%"),
        f"{number(before, 4)} before, {number(after, 4)} after.",
        judged(interval, more_is_better=False),
    )


def _retrieval(retrieval: Mapping[str, Any]) -> Markup | None:
    before, after = retrieval.get("original"), retrieval.get("quantized")
    if before is None or after is None:
        return None
    difference = part(retrieval, "difference")
    interval = ends(difference)
    return _card(
        "Retrieval from long text",
        signed(100 * difference.get("value", after - before), 1),
        "points",
        _between(interval, 1, "points"),
        f"{percent(before, 1)} before, {percent(after, 1)} after, of "
        f"{count(retrieval.get('prompts'))} prompts.",
        judged(interval, more_is_better=True),
    )


def _agreement(likelihood: Mapping[str, Any]) -> Markup | None:
    share = likelihood.get("top1_agreement")
    if share is None:
        return None
    interval = part(likelihood, "intervals").get("top1_agreement")
    shown = None if interval is None else " to ".join(percent(end, 2) for end in interval)
    return _card("Same next token", f"{100 * share:.2f}", "%", shown, "Of all tokens measured.")


def _between(interval: Sequence[float] | None, decimals: int, unit: str) -> str | None:
    if interval is None:
        return None
    return " to ".join(signed(100 * end, decimals) for end in interval) + f" {unit}"


def _card(
    name: str, value: str, unit: str, interval: str | None, meaning: Child, judgement: Child = None
) -> Markup:
    return element(
        "div",
        element("h2", name),
        element("p", value, element("small", f" {unit}"), class_="value"),
        element(
            "p",
            f"95 % interval {interval}" if interval else "no interval measured",
            class_="interval",
        ),
        element("p", judgement, class_="judgement") if judgement else None,
        element("p", meaning, class_="meaning") if meaning else None,
        class_="card",
    )


def _missing(report: Report) -> Markup | None:
    evidence = part(report, "evidence")
    missing = [name for name in ("likelihood", "layers", "retrieval") if not evidence.get(name)]
    return element("p", f"Not measured: {', '.join(missing)}.", class_="said") if missing else None
