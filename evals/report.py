"""A report as text for the terminal: aligned columns, units given, at most WIDTH characters wide.

Shows what the report holds and names what was not measured. Knows nothing of models, tensors or
how the figures came about; a report is the dictionary that report.json holds.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .figures import Report
from .gate import Verdict
from .verdict import answer, remarks, table

WIDTH = 100
LENGTHS_PER_TABLE = 6  # columns of the depth table that fit beside each other

Row = Sequence[str]


def render(report: Report) -> str:
    """The whole report: what was run, the comparison, retrieval, experts, rescues, fit."""
    sections = (
        _header(report),
        _comparison(report),
        _depths(report),
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
    calibration = _part(report, "calibration")
    facts = {
        "original": _name(_part(report, "source")),
        "quantized": _name(_part(report, "quantized")),
        "recipe": _part(report, "recipe").get("name"),
        "calibration": _drawn(calibration) if calibration else None,
    }
    return "\n".join(_wrapped(f"{key:<12}", str(value)) for key, value in facts.items() if value)


def _drawn(calibration: Mapping[str, Any]) -> str:
    """The calibration tokens: a text and its samples, or those of each text of a mix."""
    mix = calibration.get("mix") or []
    if len(mix) > 1:
        texts = [
            f"{part['source']} {_percent(part['share'], 1)} in {_samples(part)}" for part in mix
        ]
    else:
        texts = [str(calibration.get("source", "?")), _samples(mix[0] if mix else calibration)]
    return ", ".join([*texts, f"seed {calibration.get('seed', '?')}"])


def _samples(drawn: Mapping[str, Any]) -> str:
    return f"{_count(drawn.get('samples'))} samples of {_count(drawn.get('length'))} tokens"


def _name(checkpoint: Mapping[str, Any]) -> str | None:
    name, revision = checkpoint.get("name"), checkpoint.get("revision")
    return f"{name} at {revision}" if name and revision else name


def _comparison(report: Report) -> str:
    rows = [
        *_likelihood_rows(_part(report, "evidence", "likelihood")),
        *_routing_rows(_part(report, "evidence").get("layers") or []),
        *_retrieval_rows(_part(report, "evidence", "retrieval")),
        *_size_rows(report),
    ]
    return _table([("", "original", "quantized", "difference"), *rows]) if rows else ""


def _likelihood_rows(likelihood: Mapping[str, Any]) -> list[Row]:
    rows: list[Row] = []
    original, quantized = _part(likelihood, "original"), _part(likelihood, "quantized")
    before, after = original.get("perplexity"), quantized.get("perplexity")
    if before is not None and after is not None:
        label = f"perplexity ({_count(likelihood.get('tokens'))} tokens)"
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
        rows.append(("top-1 agreement (tokens)", "", "", _percent(agreement, 2)))
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
        (label, "", "", _percent(worst["agreement"], 2)),
        (f"routing agreement, mean of {len(layers)} layers", "", "", _percent(mean, 2)),
    ]


def _retrieval_rows(retrieval: Mapping[str, Any]) -> list[Row]:
    if retrieval.get("original") is None or retrieval.get("quantized") is None:
        return []
    label = f"retrieval, exact match ({_count(retrieval.get('prompts'))} prompts)"
    rows = [_shares(label, retrieval["original"], retrieval["quantized"])]
    cells = retrieval.get("cells") or []
    for length in sorted({cell["length"] for cell in cells}):
        at_length = [cell for cell in cells if cell["length"] == length]
        rows.append(_shares(f"  at {length:,} tokens", *_pooled(at_length)))
    return rows


def _pooled(cells: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Original's and quantized's share of exact answers over all prompts of the cells."""
    prompts = sum(cell["prompts"] for cell in cells)
    original, quantized = (
        sum(cell[side] * cell["prompts"] for cell in cells) / prompts
        for side in ("original", "quantized")
    )
    return original, quantized


def _shares(label: str, original: float, quantized: float) -> Row:
    points = 100 * (quantized - original)
    return label, _percent(original, 1), _percent(quantized, 1), f"{points:+.1f} points"


def _size_rows(report: Report) -> list[Row]:
    before = _part(report, "source").get("bytes")
    after = _part(report, "quantized").get("bytes")
    if before is None or after is None:
        return []
    difference = f"{before / after:.2f} times smaller" if after else "-"
    return [("size of the checkpoint", _size(before), _size(after), difference)]


def _depths(report: Report) -> str:
    """Exact match by depth (rows) and length (columns)."""
    cells = _part(report, "evidence", "retrieval").get("cells") or []
    depths = sorted({cell["depth"] for cell in cells})
    if len(depths) < 2:
        return ""
    lengths = sorted({cell["length"] for cell in cells})
    tables = ["retrieval in % by depth of the needle and length in tokens, original → quantized"]
    for start in range(0, len(lengths), LENGTHS_PER_TABLE):
        shown = lengths[start : start + LENGTHS_PER_TABLE]
        rows = [("depth", *(f"{length:,}" for length in shown))]
        rows += [(_percent(depth, 0), *_depth_cells(cells, depth, shown)) for depth in depths]
        tables.append(_table(rows))
    return "\n".join(tables)


def _depth_cells(
    cells: Sequence[Mapping[str, Any]], depth: float, lengths: Iterable[int]
) -> list[str]:
    found = []
    for length in lengths:
        here = [cell for cell in cells if (cell["depth"], cell["length"]) == (depth, length)]
        if not here:
            found.append("-")
            continue
        original, quantized = _pooled(here)
        found.append(f"{100 * original:.0f} → {100 * quantized:.0f}")
    return found


def _coverage(report: Report) -> str:
    """Tokens of the experts that saw the fewest and the most, layer by layer, too few marked."""
    counted = [layer for layer in report.get("layers") or [] if layer.get("expert_tokens")]
    if not counted:
        return ""
    coverage = _part(report, "calibration", "coverage")
    poor = {entry["layer"]: entry["experts"] for entry in coverage.get("poor") or []}
    rows: list[Row] = [("layer", "experts", "mean", "fewest (expert)", "most (expert)", "poor")]
    rows += [_expert_row(layer, poor.get(layer.get("layer"), [])) for layer in counted]
    lines = ["calibration tokens by expert", _table(rows if poor else [row[:-1] for row in rows])]
    if poor:
        count = sum(len(experts) for experts in poor.values())
        meaning = (
            f"{count:,} of {_count(coverage.get('experts'))} experts, fewer tokens than the "
            f"{_count(coverage.get('needed'))} inputs of their widest matrix"
        )
        lines.append(_wrapped("* poor: ", meaning))
    for layer in counted:
        without = [str(expert) for expert, count in enumerate(layer["expert_tokens"]) if not count]
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
    evidence = _part(report, "evidence")
    lines = [_fit(_part(report, "fit"))]
    missing = [part for part in ("likelihood", "layers", "retrieval") if evidence.get(part) is None]
    if missing:
        lines.append(f"not measured: {', '.join(missing)}")
    seconds = _part(report, "seconds").get("total")
    if seconds is not None:
        lines.append(f"took {seconds:,.1f} s")
    return "\n".join(line for line in lines if line)


def _fit(fit: Mapping[str, Any]) -> str:
    if "fits" not in fit:
        return ""
    answer = "fits" if fit["fits"] else "does not fit"
    line = f"{answer} {fit.get('device', '?')} at {_count(fit.get('context'))} tokens of context"
    if fit.get("total_bytes") is not None and fit.get("usable_bytes") is not None:
        line += f": needs {_size(fit['total_bytes'])} of {_size(fit['usable_bytes'])}"
    if fit.get("largest_context"):
        line += f"; largest context {_count(fit['largest_context'])} tokens"
    return _wrapped("", line)


# --- putting text together ---


def _part(report: Report, *keys: str) -> Mapping[str, Any]:
    """The object at `keys`; empty where the report has none."""
    found: Mapping[str, Any] = report
    for key in keys:
        found = found.get(key) or {}
    return found


def _count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _plain(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def _percent(share: float, decimals: int) -> str:
    return f"{100 * share:.{decimals}f} %"


def _size(count: float) -> str:
    """Bytes in decimal units: 1 GB is 10^9 bytes."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


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
