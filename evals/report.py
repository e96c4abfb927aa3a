"""A report as text for the terminal: aligned columns, units given, at most WIDTH characters wide.

Shows what the report holds and names what was not measured. Knows nothing of models, tensors or
how the figures came about; a report is the dictionary that report.json holds.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .figures import Report
from .gate import Verdict
from .verdict import answer, remarks, table
from .wording import count, drawn, part, percent, pooled, size

WIDTH = 100
LENGTHS_PER_TABLE = 6  # columns of the depth table that fit beside each other

Row = Sequence[str]


def render(report: Report) -> str:
    """The whole report: what was run, the comparison, retrieval, experts, rescues, fit."""
    sections = (
        _header(report),
        _comparison(report),
        _depths(report),
        _budget(report),
        _coverage(report),
        _rescues(report),
        _footer(report),
    )
    return "\n\n".join(section for section in sections if section)


def render_verdict(verdict: Verdict) -> str:
    """A line for each limit, what else is to say, and the answer to them all."""
    said = [_wrapped("", remark) for remark in remarks(verdict)]
    parts = [_table(table(verdict)), "\n".join(said), answer(verdict)]
    return "\n\n".join(part for part in parts if part)


# --- the sections ---


def _header(report: Report) -> str:
    calibration = part(report, "calibration")
    facts = {
        "original": _name(part(report, "source")),
        "quantized": _name(part(report, "quantized")),
        "recipe": part(report, "recipe").get("name"),
        "calibration": drawn(calibration) if calibration else None,
    }
    return "\n".join(_wrapped(f"{key:<12}", str(value)) for key, value in facts.items() if value)


def _name(checkpoint: Mapping[str, Any]) -> str | None:
    name, revision = checkpoint.get("name"), checkpoint.get("revision")
    return f"{name} at {revision}" if name and revision else name


def _comparison(report: Report) -> str:
    rows = [
        *_likelihood_rows(part(report, "evidence", "likelihood")),
        *_routing_rows(part(report, "evidence").get("layers") or []),
        *_cut_rows(part(report, "evidence").get("layers") or []),
        *_retrieval_rows(part(report, "evidence", "retrieval")),
        *_size_rows(report),
    ]
    return _table([("", "original", "quantized", "difference"), *rows]) if rows else ""


def _likelihood_rows(likelihood: Mapping[str, Any]) -> list[Row]:
    rows: list[Row] = []
    original, quantized = part(likelihood, "original"), part(likelihood, "quantized")
    before, after = original.get("perplexity"), quantized.get("perplexity")
    if before is not None and after is not None:
        label = f"perplexity ({count(likelihood.get('tokens'))} tokens)"
        difference = f"{after - before:+.4g} ({100 * (after / before - 1):+.3g} %)"
        rows.append((label, _uncertain(original), _uncertain(quantized), difference))
    mean, p99 = likelihood.get("kl_mean"), likelihood.get("kl_p99")
    unit = likelihood.get("units", "nats per token")
    if mean is not None:
        error = likelihood.get("kl_standard_error")
        shown = f"{mean:.4g}" if error is None else f"{mean:.4g} ± {error:.2g}"
        rows.append((f"KL, mean ({unit})", "", "", shown))
    if p99 is not None:
        rows.append((f"KL, 99th percentile ({unit})", "", "", f"{p99:.4g}"))
    if (agreement := likelihood.get("top1_agreement")) is not None:
        rows.append(("top-1 agreement (tokens)", "", "", percent(agreement, 2)))
    return rows


def _uncertain(side: Mapping[str, Any]) -> str:
    value, error = side["perplexity"], side.get("standard_error")
    return _plain(value) if error is None else f"{_plain(value)} ± {_plain(error)}"


def _routing_rows(layers: Sequence[Mapping[str, Any]]) -> list[Row]:
    layers = [layer for layer in layers if layer["agreement"] is not None]
    if not layers:
        return []
    worst = min(layers, key=lambda layer: layer["agreement"])
    mean = sum(layer["agreement"] for layer in layers) / len(layers)
    label = f"routing agreement, worst layer ({worst.get('layer', '?')})"
    return [
        (label, "", "", percent(worst["agreement"], 2)),
        (f"routing agreement, mean of {len(layers)} layers", "", "", percent(mean, 2)),
    ]


def _cut_rows(layers: Sequence[Mapping[str, Any]]) -> list[Row]:
    """How many keys and values are larger than what calibration prepared the FP8 cache for."""
    kept = [layer for layer in layers if layer.get("cut")]
    rows: list[Row] = []
    for name in ("keys", "values") if kept else ():
        worst = max(kept, key=lambda layer: layer["cut"][name])
        label = f"{name} beyond FP8, worst layer ({worst.get('layer', '?')})"
        rows.append((label, "", "", percent(worst["cut"][name], 4)))
    return rows


def _retrieval_rows(retrieval: Mapping[str, Any]) -> list[Row]:
    """Exact answers in all, by task where there are several, and by length."""
    if retrieval.get("original") is None or retrieval.get("quantized") is None:
        return []
    label = f"retrieval, exact match ({count(retrieval.get('prompts'))} prompts)"
    rows = [_shares(label, retrieval)]
    interval = part(retrieval, "difference")
    if interval.get("low") is not None:
        shown = f"{100 * interval['low']:+.1f} to {100 * interval['high']:+.1f} points"
        rows.append(("  95 % interval of the difference", "", "", shown))
    tasks = retrieval.get("tasks") or []
    for task in tasks:
        if len(tasks) > 1:
            rows.append(_shares(f"  {task['task']}", task))
        if recall := task.get("recall"):
            rows.append(_shares(f"  {task['task']}, recall", recall))
    cells = [cell for task in tasks for cell in task["cells"]]
    for length in sorted({cell["length"] for cell in cells}):
        at_length = [cell for cell in cells if cell["length"] == length]
        rows.append(_points(f"  at {length:,} tokens", *pooled(at_length)))
    return rows


def _shares(label: str, found: Mapping[str, Any]) -> Row:
    return _points(label, found["original"], found["quantized"])


def _points(label: str, original: float, quantized: float) -> Row:
    points = 100 * (quantized - original)
    return label, percent(original, 1), percent(quantized, 1), f"{points:+.1f} points"


def _size_rows(report: Report) -> list[Row]:
    before = part(report, "source").get("bytes")
    after = part(report, "quantized").get("bytes")
    if before is None or after is None:
        return []
    difference = f"{before / after:.2f} times smaller" if after else "-"
    return [("size of the checkpoint", size(before), size(after), difference)]


def _depths(report: Report) -> str:
    """Exact match by depth (rows) and length (columns), a table for each task that has depths."""
    tables = []
    for task in part(report, "evidence", "retrieval").get("tasks") or []:
        cells = [cell for cell in task["cells"] if cell["depth"] is not None]
        depths = sorted({cell["depth"] for cell in cells})
        if len(depths) > 1:
            tables += [f"{task['task']} in % by depth and length in tokens, original → quantized"]
            tables += _depth_tables(cells, depths)
    return "\n".join(tables)


def _depth_tables(cells: Sequence[Mapping[str, Any]], depths: Sequence[float]) -> Iterator[str]:
    lengths = sorted({cell["length"] for cell in cells})
    for start in range(0, len(lengths), LENGTHS_PER_TABLE):
        shown = lengths[start : start + LENGTHS_PER_TABLE]
        rows = [("depth", *(f"{length:,}" for length in shown))]
        rows += [(percent(depth, 0), *_depth_cells(cells, depth, shown)) for depth in depths]
        yield _table(rows)


def _depth_cells(
    cells: Sequence[Mapping[str, Any]], depth: float, lengths: Iterable[int]
) -> list[str]:
    found = []
    for length in lengths:
        here = [cell for cell in cells if (cell["depth"], cell["length"]) == (depth, length)]
        if not here:
            found.append("-")
            continue
        original, quantized = pooled(here)
        found.append(f"{100 * original:.0f} → {100 * quantized:.0f}")
    return found


def _budget(report: Report) -> str:
    """What was chosen for the bytes that there are, beside what recipes would take."""
    found = part(report, "budget")
    if not found:
        return ""
    schemes: dict[str, Counter[str]] = {}
    for one in found["parts"]:
        schemes.setdefault(one["component"], Counter())[one["scheme"]] += 1
    goal = (
        f"for {count(found['cards'])} x {found['device']}, {count(found['concurrency'])} x "
        f"{count(found['context'])} tokens: room for {size(found['room_bytes'])} of weights"
    )
    lines = [_wrapped("precision   ", goal)]
    for component, counted in schemes.items():
        shares = ", ".join(f"{number} x {name}" for name, number in counted.most_common())
        lines.append(_wrapped(f"  {component.replace('_', ' '):<14}", shares))
    measured = part(report, "evidence", "likelihood").get("kl_mean")
    rows: list[Row] = [("weights on a card", "bytes", "KL expected", "KL measured")]
    chosen = ("this mix", size(found["weight_bytes"]), f"{found['expected']:.3g}")
    rows.append((*chosen, "-" if measured is None else f"{measured:.3g}"))
    for recipe in sorted(found["recipes"], key=lambda recipe: recipe["bytes"]):
        expected = f"{recipe['expected']:.3g}"
        rows.append((f"recipe {recipe['name']}", size(recipe["bytes"]), expected, "-"))
    return "\n".join([*lines, _table(rows)])


def _coverage(report: Report) -> str:
    """Tokens of the experts that saw the fewest and the most, layer by layer, too few marked."""
    counted = [layer for layer in report.get("layers") or [] if layer.get("expert_tokens")]
    if not counted:
        return ""
    coverage = part(report, "calibration", "coverage")
    poor = {entry["layer"]: entry["experts"] for entry in coverage.get("poor") or []}
    rows: list[Row] = [("layer", "experts", "mean", "fewest (expert)", "most (expert)", "poor")]
    rows += [_expert_row(layer, poor.get(layer.get("layer"), [])) for layer in counted]
    lines = ["calibration tokens by expert", _table(rows if poor else [row[:-1] for row in rows])]
    if poor:
        held = sum(len(experts) for experts in poor.values())
        meaning = (
            f"{held:,} of {count(coverage.get('experts'))} experts, fewer tokens than the "
            f"{count(coverage.get('needed'))} inputs of their widest matrix"
        )
        lines.append(_wrapped("* poor: ", meaning))
    for layer in counted:
        without = [str(expert) for expert, held in enumerate(layer["expert_tokens"]) if not held]
        if without:
            head = f"no tokens in layer {layer.get('layer', '?')}: "
            lines.append(_wrapped(head, f"experts {', '.join(without)}"))
    return "\n".join(lines)


def _expert_row(layer: Mapping[str, Any], poor: Sequence[int]) -> Row:
    tokens = layer["expert_tokens"]
    fewest, most = (pick(range(len(tokens)), key=tokens.__getitem__) for pick in (min, max))
    return (
        str(layer.get("layer", "?")),
        str(len(tokens)),
        f"{sum(tokens) / len(tokens):,.1f}",
        *(f"{tokens[at]:,}{'*' if at in poor else ''} ({at})" for at in (fewest, most)),
        str(len(poor) or ""),
    )


def _rescues(report: Report) -> str:
    """Every rescue by its tensor: none may go unseen."""
    rescues = report.get("rescues")
    if rescues is None:
        return ""
    if not rescues:
        return "rescues: none"
    lines = [f"rescues: {len(rescues)}"]
    for rescue in rescues:
        detail = f": {rescue['detail']}" if rescue.get("detail") else ""
        lines.append(_wrapped(f"  {rescue.get('kind', '?'):<16}", f"{rescue['tensor']}{detail}"))
    return "\n".join(lines)


def _footer(report: Report) -> str:
    evidence = part(report, "evidence")
    lines = [_fit(part(report, "fit"))]
    missing = [name for name in ("likelihood", "layers", "retrieval") if evidence.get(name) is None]
    if missing:
        lines.append(f"not measured: {', '.join(missing)}")
    seconds = part(report, "seconds").get("total")
    if seconds is not None:
        lines.append(f"took {seconds:,.1f} s")
    return "\n".join(line for line in lines if line)


def _fit(fit: Mapping[str, Any]) -> str:
    if "fits" not in fit:
        return ""
    answer = "fits" if fit["fits"] else "does not fit"
    cards = f"{fit['cards']} x " if fit.get("cards", 1) > 1 else ""
    line = (
        f"{answer} {cards}{fit.get('device', '?')} at {count(fit.get('context'))} tokens of context"
    )
    if fit.get("concurrency", 1) > 1:
        line += f", {fit['concurrency']} requests at once"
    if fit.get("total_bytes") is not None and fit.get("usable_bytes") is not None:
        line += f": needs {size(fit['total_bytes'])} of {size(fit['usable_bytes'])}"
    if fit.get("largest_context"):
        line += f"; largest context {count(fit['largest_context'])} tokens"
    return _wrapped("", line)


# --- putting text together ---


def _plain(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def _wrapped(head: str, text: str) -> str:
    """`head` and `text`, the text broken at WIDTH and kept in a column of its own."""
    return textwrap.fill(
        text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False
    )


def _table(rows: Sequence[Row]) -> str:
    """The first column to the left, the others to the right, two spaces between."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)
