"""A verdict in words: rows of a table, remarks, and what CI systems read (JUnit, Markdown, JSON).

Knows nothing of how the verdict came about; evals/report.py shows it on the terminal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from .gate import Answer, Line, Verdict
from .policy import Kind

WORDS = {Answer.PASS: "pass", Answer.UNDECIDED: "no data", Answer.FAIL: "FAIL"}
HEADER = ("figure", "value [95 %]", "limit", "verdict")


def table(verdict: Verdict) -> list[Sequence[str]]:
    """HEADER and a row for each line."""
    return [HEADER, *(_row(line) for line in verdict.lines)]


def answer(verdict: Verdict) -> str:
    """The whole verdict in a few words."""
    counts = Counter(line.answer for line in verdict.lines)
    failed, undecided, asked = counts[Answer.FAIL], counts[Answer.UNDECIDED], len(verdict.lines)
    found = [
        f"failed: {failed} of {asked} limits" if failed else "",
        f"not enough data: {undecided} of {asked} limits" if undecided else "",
    ]
    return ", ".join(part for part in found if part) or f"passed: all {asked} limits"


def remarks(verdict: Verdict) -> list[str]:
    """What the rows do not say, each once: why there is no answer, and where to look."""
    said: dict[str, list[str]] = {}
    for line in verdict.lines:
        if line.remark:
            said.setdefault(line.remark, []).append(_name(line))
    found = [f"{remark}: {', '.join(dict.fromkeys(names))}" for remark, names in said.items()]
    if verdict.unasked:
        found.append(f"not asked without --baseline: {verdict.unasked} limits")
    looks = dict.fromkeys(_printable(line.look) for line in verdict.lines if line.look)
    return found + [f"look at {look}" for look in looks]


def markdown(verdict: Verdict) -> str:
    """A section for a pull request, or for the summary of a GitHub job."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in table(verdict)]
    lines = [f"| {' | '.join(row)} |" for row in escaped]
    lines.insert(1, "|---|---:|---:|---|")
    said = [f"- {remark}" for remark in remarks(verdict)]
    parts = [f"### llama4q check: {answer(verdict)}", "\n".join(lines), "\n".join(said)]
    return "\n\n".join(part for part in parts if part) + "\n"


def junit(verdict: Verdict) -> str:
    """JUnit XML as GitLab, Jenkins and GitHub's reporters read it: a testcase a limit.

    What could not be decided is an error, a missed limit a failure. A testcase is named after its
    limit alone, so that its history is one, whatever the values.
    """
    counts = Counter(line.answer for line in verdict.lines)
    totals = {
        "tests": str(len(verdict.lines)),
        "failures": str(counts[Answer.FAIL]),
        "errors": str(counts[Answer.UNDECIDED]),
    }
    root = ElementTree.Element("testsuites", totals | {"name": "llama4q check"})
    suite = ElementTree.SubElement(root, "testsuite", root.attrib | {"skipped": "0"})
    for line in verdict.lines:
        limit = line.limit
        name = f"{_at(limit.figure.name, limit.place)} {limit.kind.value}"
        case = ElementTree.SubElement(
            suite, "testcase", name=name, classname="llama4q.check", time="0"
        )
        if line.answer is not Answer.PASS:
            failed = line.answer is Answer.FAIL
            found = ElementTree.SubElement(
                case, "failure" if failed else "error",
                type="regression" if failed else "not enough data", message=_sentence(line),
            )  # fmt: skip
            found.text = _printable(line.look or line.remark)
    ElementTree.indent(root)
    text: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return f"{text.decode()}\n"


def to_json(verdict: Verdict) -> dict[str, Any]:
    """All of it, for a program."""
    return {
        "passed": verdict.answer is Answer.PASS,
        "answer": verdict.answer.name.lower(),
        "exit_code": verdict.answer.value,
        "unasked": verdict.unasked,
        "lines": [
            {
                "figure": line.limit.figure.name,
                "title": line.limit.figure.title,
                "place": line.reading.place,
                "value": line.reading.value,
                "interval": line.reading.interval,
                "kind": line.limit.kind.value,
                "limit": line.limit.value,
                "bound": line.bound,
                "strict": line.limit.strict,
                "answer": line.answer.name.lower(),
                "remark": line.remark,
                "look": line.look,
            }
            for line in verdict.lines
        ],
    }


def _row(line: Line) -> Sequence[str]:
    return _name(line), _value(line), _limit(line), WORDS[line.answer]


def _name(line: Line) -> str:
    return _at(line.limit.figure.name, line.reading.place)


def _at(name: str, place: str) -> str:
    return _printable(f"{name}.{place}" if place else name)


def _value(line: Line) -> str:
    reading = line.reading
    if reading.value is None:
        return "-"
    if reading.interval is None:
        return _number(reading.value)
    low, high = map(_number, reading.interval)
    return f"{_number(reading.value)} [{low}, {high}]"


def _limit(line: Line) -> str:
    """With the baseline's figure in it, where it counts."""
    limit, larger = line.limit, line.limit.figure.larger_is_better
    sign = "≥" if larger else "≤"
    if not limit.kind.needs_baseline:
        return f"{sign} {_number(limit.value)}"
    ratio = limit.kind is Kind.BASELINE_RATIO
    operator = "×" if ratio else "-" if larger else "+"
    if line.before is None:
        return f"{sign} baseline {operator} {_number(limit.value)}"
    return f"{sign} {_number(line.before)} {operator} {_number(limit.value)}"


def _sentence(line: Line) -> str:
    value = "" if line.reading.value is None else f" is {_value(line)}"
    return f"{_name(line)}{value}, limit {_limit(line)}{f'; {line.remark}' if line.remark else ''}"


def _number(value: float) -> str:
    """To three digits and at most five decimals, but whole where it counts something."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{round(value, 5):.3g}"


def _printable(text: str) -> str:
    """A task's name comes from a file; XML cannot hold control characters, nor a row a new line."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
