"""A report against a policy, and against an earlier report: what holds and what does not.

A figure misses its limit when its whole 95 % interval lies beyond it. A figure that the report does
not have, or has from too small a sample, decides nothing: silence is no evidence. Knows nothing of
models, tensors, files of policies or how a verdict is shown.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from llama4q.errors import UserError

from .diagnosis import where_to_look
from .figures import Reading, Report, same_sample
from .policy import Kind, Limit, Policy

SCHEMA = 2  # of reports; files of another one are refused


class Answer(Enum):
    """Of one line, or of all; the worst one last. The number is the exit code of `check`."""

    PASS = 0
    UNDECIDED = 3
    FAIL = 1


SEVERITY = tuple(Answer)


@dataclass(frozen=True)
class Line:
    """One limit, the reading that keeps it worst, and whether it holds."""

    limit: Limit
    reading: Reading
    bound: float | None  # what the reading may be; None where that is not known
    before: float | None  # the baseline's value, where it counts and there is one
    answer: Answer
    remark: str = ""  # what the numbers alone do not say
    look: str = ""  # where a failure comes from


@dataclass(frozen=True)
class Verdict:
    """A line for each limit of the policy that could be asked."""

    lines: tuple[Line, ...]
    unasked: int  # limits that need a baseline, where none was named

    @property
    def answer(self) -> Answer:
        return max((line.answer for line in self.lines), key=SEVERITY.index)


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
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); run the evaluation again") from None
    if not isinstance(report, dict) or not ("llama4q" in report or "evidence" in report):
        raise UserError(f"{path}: JSON, but not a report of llama4q; name the report of a run")
    schema = report.get("schema", 1)  # the first one did not say
    if schema != SCHEMA:
        raise UserError(
            f"{path}: a report of schema {str(schema)[:40]}, but this llama4q reads {SCHEMA}; "
            f"run `llama4q eval` again with this version"
        )
    return report


def check(report: Report, policy: Policy, baseline: Report | None = None) -> Verdict:
    """Every limit of `policy` against `report`.

    Limits that need a baseline are asked only where there is one. Raises UserError when no limit is
    left, or a figure of either report is malformed.
    """
    asked = [one for one in policy.limits if baseline is not None or not one.kind.needs_baseline]
    if not asked:
        raise UserError("every limit of the policy needs a baseline; name one with --baseline")
    lines = tuple(_Question(report, policy, limit, baseline or {}).line() for limit in asked)
    return Verdict(lines, len(policy.limits) - len(asked))


@dataclass(frozen=True)
class _Question:
    """One limit, put to all readings of its figure."""

    report: Report
    policy: Policy
    limit: Limit
    baseline: Report

    def line(self) -> Line:
        """Of the reading that keeps the limit worst."""
        figure, limit = self.limit.figure, self.limit
        readings = [one for one in figure.read(self.report) if one.place not in limit.but]
        if limit.place:
            readings = [one for one in readings if one.place == limit.place]
        if not readings:
            nothing = Reading(None, place=limit.place)
            if limit.place:
                return self._undecided(nothing, f"no such {figure.by} in the report")
            return Line(
                limit, nothing, None, None, Answer.PASS, f"the report has no {figure.by} for it"
            )
        worst = max(map(self._judged, readings), key=_badness)
        if worst.answer is not Answer.FAIL:
            return worst
        look = where_to_look(figure, self.report, self.baseline)
        return dataclasses.replace(worst, look=look)

    def _judged(self, reading: Reading) -> Line:
        limit, value, missing = self.limit, reading.value, self._missing(reading)
        if value is None or missing:
            return self._undecided(reading, missing or "not in the report")
        before = self._before(reading)
        bound = limit.bound(0.0 if before is None else before)
        interval = None if limit.strict else reading.interval
        low, high = interval or (value, value)
        larger = limit.figure.larger_is_better
        beyond, surely = (value < bound, high < bound) if larger else (value > bound, low > bound)
        zero = 0.0 if limit.figure.relative else before
        remark = ""
        if beyond and not surely:
            remark = "beyond the limit, but not at 95 %"
        elif not surely and interval and zero is not None and low <= zero <= high:
            remark = "no difference seen"
        answer = Answer.FAIL if surely else Answer.PASS
        return Line(limit, reading, bound, before, answer, remark)

    def _missing(self, reading: Reading) -> str:
        """What a value does not have that it needs; empty where there is enough, or no value."""
        limit, section = self.limit, self.limit.figure.section
        if reading.value is None:
            return ""
        if section is not None:
            sample = section.sample(self.report) if reading.prompts is None else reading.prompts
            least = self.policy.least(section)
            if (sample or 0) < least:
                return f"{sample or 0:,.0f} {section.unit}, the policy asks for {least:,}"
        if limit.figure.estimated and not limit.strict and reading.interval is None:
            return "no interval, as from a single window"
        if not limit.kind.needs_baseline:
            return ""
        if not same_sample(section, self.report, self.baseline):
            return f"measured on other {section.unit if section else ''} than the baseline"
        return "not in the baseline" if self._before(reading) is None else ""

    def _before(self, reading: Reading) -> float | None:
        """The baseline's value for it, where that counts."""
        if not self.limit.kind.needs_baseline:
            return None
        found = {one.place: one.value for one in self.limit.figure.read(self.baseline)}
        return found.get(reading.place)

    def _undecided(self, reading: Reading, why: str) -> Line:
        return Line(self.limit, reading, None, None, Answer.UNDECIDED, why)


def _badness(line: Line) -> tuple[int, float]:
    """By answer, then by how far beyond its bound: in the figure's unit, or as a ratio is meant."""
    value, bound = line.reading.value, line.bound
    if value is None or bound is None:
        return SEVERITY.index(line.answer), math.inf
    beyond = bound - value if line.limit.figure.larger_is_better else value - bound
    if line.limit.kind is Kind.BASELINE_RATIO and line.before:
        beyond /= line.before
    return SEVERITY.index(line.answer), beyond
