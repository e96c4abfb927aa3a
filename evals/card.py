"""A report as the evaluation section of a model card, in Markdown. Knows nothing of how it was
measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .figures import Report
from .markdown import Row, plain, table
from .wording import (
    UNKNOWN,
    count,
    drawn,
    ends,
    measured,
    no_difference,
    number,
    part,
    percent,
    pooled,
    signed,
    size,
)


def markdown(report: Report) -> str:
    """Size, predictions, retrieval by length, and how to make it again; what is missing is left
    out."""
    retrieval = part(report, "evidence", "retrieval")
    parts = ["## Evaluation", comparison(report), _retrieval(retrieval), _made(report)]
    return "\n\n".join(text for text in parts if text) + "\n"


def comparison(report: Report) -> str:
    """Both models' figures beside each other, with intervals."""
    return table(("", "original", "quantized", "difference"), _comparison(report))


def _comparison(report: Report) -> Iterable[Row]:
    before, after = (part(report, side).get("bytes") for side in ("source", "quantized"))
    if before and after:
        yield "size", size(before), size(after), f"{before / after:.2f} times smaller"
    likelihood = part(report, "evidence", "likelihood")
    intervals = part(likelihood, "intervals")
    plain, served = part(likelihood, "original"), part(likelihood, "quantized")
    if plain.get("perplexity") and served.get("perplexity"):
        increase = served["perplexity"] / plain["perplexity"] - 1
        interval = intervals.get("perplexity_increase")
        change = within(f"{signed(100 * increase, 2)} %", interval, points(2))
        sides = (f"{number(side['perplexity'], 4)}" for side in (plain, served))
        yield "perplexity", *sides, change + _judged(interval)
    for key, name, shown in (
        ("kl_mean", "KL divergence, nats a token", number),
        ("kl_p99", "KL divergence, 99th percentile", number),
        ("top1_agreement", "same next token", lambda share: percent(share, 2)),
    ):
        if likelihood.get(key) is not None:
            yield name, "", "", within(shown(likelihood[key]), intervals.get(key), shown)
    retrieval = part(report, "evidence", "retrieval")
    if retrieval.get("original") is not None:
        difference = part(retrieval, "difference")
        change = within(
            f"{signed(100 * (retrieval['quantized'] - retrieval['original']), 1)} points",
            ends(difference),
            points(1),
        )
        sides = (percent(retrieval[side], 1) for side in ("original", "quantized"))
        yield "retrieval", *sides, change + _judged(ends(difference))


def _retrieval(retrieval: Mapping[str, Any]) -> str:
    shares = by_length(retrieval)
    names = ", ".join(plain(task["task"]) for task in retrieval.get("tasks") or [])
    return shares and f"Retrieval ({names}) by length of the prompt:\n\n{shares}"


def by_length(retrieval: Mapping[str, Any]) -> str:
    """Shares by length, all tasks and depths together; empty where nothing was asked."""
    cells = [cell for task in retrieval.get("tasks") or [] for cell in task["cells"]]
    rows = []
    for length in sorted({cell["length"] for cell in cells}):
        here = [cell for cell in cells if cell["length"] == length]
        before, after = pooled(here)
        change = signed(100 * (after - before), 1)
        prompts = count(sum(cell["prompts"] for cell in here))
        sides = percent(before, 1), percent(after, 1)
        rows.append((f"{length:,}", prompts, *sides, f"{change} points"))
    return table(("tokens", "prompts", "original", "quantized", "difference"), rows)


def _made(report: Report) -> str:
    calibration = part(report, "calibration")
    likelihood = part(report, "evidence", "likelihood")
    recipe, version = part(report, "recipe").get("name"), report.get("llama4q", UNKNOWN)
    facts = [
        f"Quantized with llama4q {version}, recipe {recipe}." if recipe else None,
        f"Calibrated on {drawn(calibration)}." if calibration else None,
        f"Measured on {measured(likelihood)}." if likelihood else None,
        "Intervals are 95 %, paired." if likelihood or part(report, "evidence") else None,
    ]
    told = " ".join(plain(fact) for fact in facts if fact)
    command = report.get("command")
    again = f"To make it again:\n\n    {' '.join(command.split())}" if command else ""
    return "\n\n".join(text for text in (told, again) if text)


def within(value: str, interval: Sequence[float] | None, shown: Callable[[float], str]) -> str:
    return value if interval is None else f"{value} ({' to '.join(map(shown, interval))})"


def points(decimals: int) -> Callable[[float], str]:
    return lambda share: signed(100 * share, decimals)


def _judged(interval: Sequence[float] | None) -> str:
    return ", no difference seen" if no_difference(interval) else ""
