"""Where the bytes are, before and after, and whether they fit the GPU. Does no planning itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..figures import Report
from ..wording import cards, count, part, percent, requests, size
from .element import Markup, element
from .plots import key, stack
from .section import Section, figure, said, section
from .table import Row, table


def memory(report: Report) -> Section | None:
    """None where neither sizes nor a fit are known."""
    parts = [_components(report), _fit(part(report, "fit"))]
    return section("Size and memory", parts) if any(parts) else None


def _components(report: Report) -> Markup | None:
    """A bar before and after for each part of the model, the largest first."""
    before, after = (part(report, side, "components") for side in ("source", "quantized"))
    if not before or not after:
        return None
    names = sorted({**before, **after}, key=lambda name: -before.get(name, 0))
    most = max(*before.values(), *after.values())
    rows: list[Row] = []
    for name in names:
        old, new = before.get(name, 0), after.get(name, 0)
        bars = element(
            "div",
            [
                element("i", class_=class_, style=f"width:{100 * nbytes / most:.2f}%")
                for nbytes, class_ in ((old, "s0"), (new, "s1"))
            ],
            class_="bars",
            aria_hidden="true",
        )
        times = f"{old / new:.2f} ×" if new else None
        rows.append((name.replace("_", " "), bars, size(old), size(new), times))
    total = [sum(side.values()) for side in (before, after)]
    rows.append(
        ("total", None, *map(size, total), f"{total[0] / total[1]:.2f} ×" if total[1] else None)
    )
    header = ("component", "", "original", "quantized", "smaller")
    return figure(
        "Bytes by component",
        key({"original": "s0", "quantized": "s1"}),
        table("Bytes by component", header, rows, "components"),
    )


def _fit(fit: Mapping[str, Any]) -> Markup | None:
    """What one GPU must hold, as a bar against what the engine may use."""
    needed, usable = fit.get("total_bytes"), fit.get("usable_bytes")
    if needed is None or usable is None:
        return None
    parts = {
        "weights": (fit.get("weight_bytes", 0), "s1"),
        f"KV cache of {requests(fit).removeprefix('a context of ')}": (
            fit.get("kv_bytes", 0),
            "s2",
        ),
        "reserve of the engine": (fit.get("reserved_bytes", 0), "s3"),
        "free": (max(0, usable - needed), "s0"),
    }
    shown = {name: found for name, found in parts.items() if found[0]}
    answer = (
        f"Fits: needs {size(needed)} of the {size(usable)} that an engine may use"
        if fit.get("fits")
        else f"Does not fit: needs {size(needed)}, {size(needed - usable)} more than the "
        f"{size(usable)} that an engine may use"
    )
    largest = fit.get("largest_context")
    told = "; ".join(f"{name} {size(amount)}" for name, (amount, _) in shown.items())
    rows = [
        (name, size(amount), percent(amount / usable, 1)) for name, (amount, _) in shown.items()
    ]
    return figure(
        f"Fit on {cards(fit)}",
        said(
            f"{answer}.",
            f" The largest context is {count(largest)} tokens." if largest else None,
        ),
        stack(shown, max(needed, usable), f"{answer}: {told}", usable),
        key({name: class_ for name, (_, class_) in shown.items()}),
        table("Memory of one GPU", ("what", "bytes", "of usable"), rows),
    )
