"""A report against limits, and against an earlier report: what passed, what did not.

METRICS says everything the gate can ask of a report, where the figure stands in it and how much
worse than a baseline it may be; DEFAULT_THRESHOLDS holds the limits that apply when none is named.
A figure that is asked for and missing fails: silence is no evidence.

Knows nothing of models, tensors or how the figures were measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama4q.errors import UserError

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Thresholds:
    """The limits of a check; None is not checked."""

    max_kl_mean: float | None = None  # nats per token
    max_kl_p99: float | None = None  # nats per token, 99th percentile over tokens
    min_top1_agreement: float | None = None  # share of positions, 0 to 1
    max_perplexity_increase: float | None = None  # quantized / original - 1
    min_retrieval: float | None = None  # quantized / original share of exact answers
    min_routing_agreement: float | None = None  # share of tokens in the worst layer, 0 to 1
    max_fallbacks: int | None = None  # tensors rounded to nearest because no solution was found


# Wide enough for good 4-bit weights, narrow enough to stop a broken checkpoint; whoever has a
# baseline should hold to that. No limit on fallbacks: a report of `eval` cannot know them, and the
# harm they do shows in the divergence.
DEFAULT_THRESHOLDS = Thresholds(
    max_kl_mean=0.05,
    max_kl_p99=0.5,
    min_top1_agreement=0.9,
    max_perplexity_increase=0.03,
    min_retrieval=0.95,
    min_routing_agreement=0.9,
)


@dataclass(frozen=True)
class Metric:
    """One figure of a report: its limit in Thresholds, its reader, its tolerance."""

    limit: str  # the field of Thresholds; its first three letters tell maximum from minimum
    name: str
    read: Callable[[Report], float | None]
    # worse than a baseline by at most the larger of these two
    tolerance: float  # in the metric's unit
    relative_tolerance: float = 0.0  # as a share of the baseline's figure

    @property
    def smaller_is_better(self) -> bool:
        return self.limit.startswith("max")

    def within(self, value: float, limit: float) -> bool:
        """False for NaN, whichever side the limit is on."""
        return value <= limit if self.smaller_is_better else value >= limit

    def limit_from(self, baseline: float) -> float:
        room = max(self.tolerance, self.relative_tolerance * abs(baseline))
        return baseline + room if self.smaller_is_better else baseline - room


@dataclass(frozen=True)
class Line:
    """One question to the report and its answer."""

    metric: str
    value: float | str | None  # None: the report doesn't say
    limit: str
    passed: bool


@dataclass(frozen=True)
class Verdict:
    """All lines of a check, in the order of METRICS."""

    lines: tuple[Line, ...]

    @property
    def passed(self) -> bool:
        return all(line.passed for line in self.lines)


def load_report(path: Path) -> dict[str, Any]:
    """A report as `quantize` and `eval` write it. Raises UserError for anything else."""
    try:
        report = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such report; name the JSON file of a run") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); name the JSON file of a run"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); run the evaluation again") from None
    if not isinstance(report, dict) or not ("llama4q" in report or "evidence" in report):
        raise UserError(f"{path}: JSON, but not a report of llama4q; name the report of a run")
    return report


def check(report: Report, thresholds: Thresholds, baseline: Report | None = None) -> Verdict:
    """Each limit of `thresholds`, then each figure of `baseline`, against `report`.

    Raises UserError when there is nothing to check, or a figure of either report is malformed.
    """
    lines = _threshold_lines(report, thresholds)
    if baseline is not None:
        lines += _baseline_lines(report, baseline)
    if not lines:
        missing = "no limit is named" if baseline is None else "the baseline holds no figure"
        raise UserError(f"nothing to check, {missing}; name a limit or another baseline")
    return Verdict(tuple(lines))


def _threshold_lines(report: Report, thresholds: Thresholds) -> list[Line]:
    lines = []
    for metric in METRICS:
        limit = getattr(thresholds, metric.limit)
        if limit is not None:
            lines.append(_line(metric, metric.name, report, limit))
    return lines


def _baseline_lines(report: Report, baseline: Report) -> list[Line]:
    """A line for each figure the baseline has: what was measured once must not vanish unseen."""
    lines = []
    for metric in METRICS:
        before = metric.read(baseline)
        if before is not None:
            name = f"{metric.name}, vs baseline"
            lines.append(_line(metric, name, report, metric.limit_from(before)))
    for section in ("likelihood", "retrieval"):
        expected, found = _digest(baseline, section), _digest(report, section)
        if expected and found and expected != found:
            name = f"{section}: same tokens as baseline"
            lines.append(Line(name, found[:12], f"= {expected[:12]}", False))
    return lines


def _line(metric: Metric, name: str, report: Report, limit: float) -> Line:
    value = metric.read(report)
    sign = "≤" if metric.smaller_is_better else "≥"
    passed = value is not None and metric.within(value, limit)
    return Line(name, value, f"{sign} {limit:.4g}", passed)


def _find(report: Report, path: str) -> object:
    """The entry at a dotted path; None where it or anything on the way is missing."""
    found: object = report
    for key in path.split("."):
        if found is None:
            return None
        if not isinstance(found, Mapping):
            raise _malformed(path, "an object", found)
        found = found.get(key)
    return found


def _number(report: Report, path: str) -> float | None:
    found = _find(report, path)
    if found is None:
        return None
    # JSON's true is an int to Python
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise _malformed(path, "a number", found)
    return float(found)


def _entries(report: Report, path: str) -> list[Report] | None:
    found = _find(report, path)
    if found is None:
        return None
    if not isinstance(found, list) or not all(isinstance(entry, Mapping) for entry in found):
        raise _malformed(path, "a list of objects", found)
    return found


def _malformed(path: str, expected: str, found: object) -> UserError:
    return UserError(
        f"report: {path} should be {expected} but is {str(found)[:40]!r}; run the evaluation again"
    )


def _digest(report: Report, section: str) -> str | None:
    found = _find(report, f"evidence.{section}.digest")
    return None if found is None else str(found)


def _ratio(report: Report, quantized: str, original: str) -> float | None:
    """One figure over another; None where either is missing or the original is zero."""
    above, below = _number(report, quantized), _number(report, original)
    return above / below if above is not None and below else None


def _perplexity_increase(report: Report) -> float | None:
    section = "evidence.likelihood"
    ratio = _ratio(report, f"{section}.quantized.perplexity", f"{section}.original.perplexity")
    return None if ratio is None else ratio - 1


def _retrieval(report: Report) -> float | None:
    return _ratio(report, "evidence.retrieval.quantized", "evidence.retrieval.original")


def _worst_routing(report: Report) -> float | None:
    layers = _entries(report, "evidence.layers")
    if layers is None:
        return None
    if any("agreement" not in layer for layer in layers):  # null in a dense one
        return None
    found = [_number(layer, "agreement") for layer in layers]
    shares = [share for share in found if share is not None]
    # A model without routed experts has none: nothing is routed differently. NaN, which
    # compares with nothing, counts as the worst.
    return min(shares, key=lambda share: (share == share, share), default=1.0)


def _fallbacks(report: Report) -> float | None:
    rescues = _entries(report, "rescues")
    return None if rescues is None else sum(rescue.get("kind") == "fallback" for rescue in rescues)


METRICS = (
    Metric(
        "max_kl_mean",
        "KL divergence, mean (nats per token)",
        lambda report: _number(report, "evidence.likelihood.kl_mean"),
        tolerance=1e-4,
        relative_tolerance=0.05,
    ),
    Metric(
        "max_kl_p99",
        "KL divergence, 99th percentile (nats per token)",
        lambda report: _number(report, "evidence.likelihood.kl_p99"),
        tolerance=1e-3,
        relative_tolerance=0.1,
    ),
    Metric(
        "min_top1_agreement",
        "top-1 agreement (share of tokens)",
        lambda report: _number(report, "evidence.likelihood.top1_agreement"),
        tolerance=0.005,
    ),
    Metric(
        "max_perplexity_increase",
        "perplexity increase (quantized / original - 1)",
        _perplexity_increase,
        tolerance=0.005,
    ),
    Metric(
        "min_retrieval",
        "retrieval (quantized / original)",
        _retrieval,
        tolerance=0.02,
    ),
    Metric(
        "min_routing_agreement",
        "routing agreement, worst layer (share of tokens)",
        _worst_routing,
        tolerance=0.01,
    ),
    Metric("max_fallbacks", "fallbacks (tensors)", _fallbacks, tolerance=0),
)
