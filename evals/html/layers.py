"""Where in the model the error is: hidden states and routing layer by layer, and how well each
weight's codes do against plain rounding."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from ..figures import Report
from ..wording import count, number, percent
from .axis import Axis, around, logarithmic, numbered, whole_ticks
from .element import Markup, element
from .plots import Series, key, lines
from .section import Section, figure, said, section
from .table import behind, table

Record = Mapping[str, Any]


def layers(report: Report) -> Section | None:
    """None where neither hidden states nor weights were measured."""
    evidence = report.get("evidence") or {}
    measured = evidence.get("layers") or []
    plots = [
        _hidden(measured),
        _gain(measured),
        _routing(measured),
        _cut(measured),
        _weights(report.get("layers") or []),
    ]
    return section("Layers", plots) if any(plots) else None


def _hidden(measured: Sequence[Record]) -> Markup | None:
    errors = {
        record["layer"]: record["hidden_error"]
        for record in measured
        if record.get("hidden_error") is not None
    }
    if not errors:
        return None
    x = numbered(errors)
    last = max(errors)
    told = (
        f"Error of the hidden states by layer, from {number(errors[min(errors)])} after layer "
        f"{min(errors)} to {number(errors[last])} after layer {last}"
    )
    risen = _largest_rise(errors)
    return figure(
        "Error of the hidden states",
        said(
            "How far the quantized model's hidden states have moved after each layer, as a share "
            "of their energy. Errors add up, so the line rises; a sudden step points at a layer.",
            f" The largest step is at layer {risen}." if risen is not None else None,
        ),
        lines(
            x, logarithmic(errors.values()), [Series("error", "s1", list(errors.items()))],
            "layer", "share of energy", told, whole_ticks(x),
        ),
        behind(
            table(
                "Error of the hidden states by layer",
                ("layer", "share of energy"),
                [(str(layer), number(error)) for layer, error in errors.items()],
                "sortable",
            )
        ),
    )  # fmt: skip


def _largest_rise(errors: Mapping[int, float]) -> int | None:
    """The layer whose error is most above that of the layer before; None for a single layer."""
    pairs = list(errors.items())
    rises = {layer: after - before for (_, before), (layer, after) in itertools.pairwise(pairs)}
    return max(rises, key=rises.__getitem__) if rises else None


def _gain(measured: Sequence[Record]) -> Markup | None:
    gains = {
        record["layer"]: record["gain"] for record in measured if record.get("gain") is not None
    }
    if not gains:
        return None
    x = numbered(gains)
    middle = median(gains.values())
    farthest = max(gains, key=lambda layer: abs(gains[layer] - middle))
    told = (
        f"Layer {farthest} is farthest from the others with {number(gains[farthest])}; "
        f"the median is {number(middle)}."
    )
    y = around(gains.values(), 1.0)
    return figure(
        "Gain of the feed-forward",
        said(
            "What the quantized feed-forward adds along what the original's adds; 1 is neither "
            f"more nor less. {told}"
        ),
        lines(x, y, [Series("gain", "s1", list(gains.items()))], "layer", "gain",
              f"Gain of the feed-forward by layer. {told}", whole_ticks(x)),
        behind(
            table(
                "Gain of the feed-forward by layer",
                ("layer", "gain"),
                [(str(layer), number(gain, 4)) for layer, gain in gains.items()],
                "sortable",
            )
        ),
    )  # fmt: skip


def _routing(measured: Sequence[Record]) -> Markup | None:
    shares = {
        record["layer"]: record["agreement"]
        for record in measured
        if record.get("agreement") is not None
    }
    if not shares:
        return None
    x = numbered(record["layer"] for record in measured)
    worst = min(shares, key=shares.__getitem__)
    told = (
        f"Share of tokens that both models send to the same expert, by layer; lowest "
        f"{percent(shares[worst], 2)} in layer {worst}"
    )
    y = Axis(_round_below(100 * shares[worst]), 100.0)
    points = [(layer, 100 * share) for layer, share in shares.items()]
    return figure(
        "Agreement of routing",
        said(
            "Tokens that both models send to the same expert. ",
            f"Layer {worst} is the lowest with {percent(shares[worst], 2)}.",
        ),
        lines(x, y, [Series("agreement", "s1", points)], "layer", "% of tokens", told,
              whole_ticks(x)),
        behind(
            table(
                "Routing agreement by layer",
                ("layer", "same expert"),
                [(str(layer), percent(share, 2)) for layer, share in shares.items()],
                "sortable",
            )
        ),
    )  # fmt: skip


def _round_below(percentage: float) -> float:
    """A round percentage below, with some room."""
    room = 100 - percentage
    return 100 - next(step for step in (1, 2, 5, 10, 20, 50, 100) if step >= room)


def _cut(measured: Sequence[Record]) -> Markup | None:
    """None where keys and values are kept as they are."""
    shares = {record["layer"]: record["cut"] for record in measured if record.get("cut")}
    if not shares:
        return None
    most = {name: max(cut[name] for cut in shares.values()) for name in ("keys", "values")}
    return figure(
        "Keys and values beyond the FP8 cache",
        said(
            "Numbers that are larger than any that calibration prepared the cache for; they are "
            f"stored as the largest one. At most {percent(most['keys'], 4)} of a layer's keys and "
            f"{percent(most['values'], 4)} of its values."
        ),
        behind(
            table(
                "Keys and values beyond the FP8 cache by layer",
                ("layer", "keys", "values"),
                [
                    (str(layer), percent(cut["keys"], 4), percent(cut["values"], 4))
                    for layer, cut in shares.items()
                ],
                "sortable",
            )
        ),
    )


def _weights(records: Sequence[Record]) -> Markup | None:
    """A small plot for each kind of weight: its error beside that of plain rounding."""
    kinds: dict[str, dict[int, list[Record]]] = {}
    for record in records:
        for group in record.get("groups") or []:
            if group.get("error") is not None and group.get("rounding_error") is not None:
                by_layer = kinds.setdefault(kind_of(group["name"]), {})
                by_layer.setdefault(record["layer"], []).append(group)
    if not kinds:
        return None
    every = [group for by_layer in kinds.values() for found in by_layer.values() for group in found]
    ratios = [
        group["error"] / group["rounding_error"] for group in every if group["rounding_error"]
    ]
    y = logarithmic(group[side] for group in every for side in ("error", "rounding_error"))
    left = f" Half of all weights have less than {percent(median(ratios), 0)} of rounding's error."
    return figure(
        "Calibrated codes against plain rounding",
        said(
            "Error of each weight's output on tokens kept from calibration, as a share of its "
            "energy; of experts the median, with lines from the best to the worst.",
            left if ratios else None,
        ),
        key({"plain rounding": "s0", "calibrated": "s1"}),
        element(
            "div", [_kind(name, by_layer, y) for name, by_layer in kinds.items()], class_="panels"
        ),
    )


def kind_of(name: str) -> str:
    """A weight's part of its layer, the same for all experts: "experts gate_up"."""
    within = re.sub(r"^.*layers\.\d+\.", "", name)
    path = re.sub(r"\.\d+(?=\.)", "", within).removesuffix("_proj").split(".")
    if path[0] == "feed_forward":
        path = path[1:] if len(path) > 2 else ["dense", *path[1:]]
    return " ".join(path).replace("shared_expert", "shared expert")


def _kind(name: str, by_layer: Mapping[int, Sequence[Record]], y: Axis) -> Markup:
    x = numbered(by_layer)
    middle = {
        layer: tuple(median(group[side] for group in found) for side in _SIDES)
        for layer, found in by_layer.items()
    }
    ranges = [
        (layer, min(errors), max(errors))
        for layer, errors in (
            (layer, [group["error"] for group in found]) for layer, found in by_layer.items()
        )
        if len(errors) > 1
    ]
    worst = max(
        ((layer, group) for layer, found in by_layer.items() for group in found),
        key=lambda pair: pair[1]["error"],
    )
    told = (
        f"{name}: error by layer, calibrated and with plain rounding; the worst calibrated weight "
        f"is {worst[1]['name']} with {number(worst[1]['error'])}"
    )
    rows = [
        (
            str(layer),
            count(len(found)),
            number(middle[layer][1]),
            number(middle[layer][0]),
            number(max(group["error"] for group in found)),
        )
        for layer, found in by_layer.items()
    ]
    header = ("layer", "weights", "rounding", "calibrated", "worst")
    return element(
        "div",
        element("h4", name),
        lines(
            x, y,
            [
                Series("rounding", "s0", [(layer, pair[1]) for layer, pair in middle.items()]),
                Series("calibrated", "s1", [(layer, pair[0]) for layer, pair in middle.items()],
                       ranges),
            ],
            "layer", "share of energy", told, whole_ticks(x, 6),
        ),
        behind(table(f"Errors of {name} by layer", header, rows, "sortable")),
    )  # fmt: skip


_SIDES = ("error", "rounding_error")
