"""A verdict as others read it: a terminal, a pull request, a CI system's JUnit reader, a program.

The authority on JUnit XML is the schema of Jenkins' xUnit plugin (junit-10.xsd), which GitLab and
GitHub's reporters read, too: its elements, their order and their attributes stand here in Python.
"""

from __future__ import annotations

import json
from xml.etree import ElementTree

from evals.gate import Answer, Verdict, check
from evals.policy import load_policy
from evals.report import WIDTH, render_verdict
from evals.verdict import junit, markdown, to_json

from .plain_reports import altered, report, task

PASSED = check(report(), load_policy(None), report())
# one of each answer, and a remark of each kind
MIXED = check(
    altered(
        {
            "evidence.likelihood.kl_mean": 0.07,
            "evidence.likelihood.intervals.kl_mean": [0.06, 0.08],
            "evidence.likelihood.kl_p99": None,
            "evidence.likelihood.intervals.perplexity_increase": [-0.01, 0.02],
            "evidence.likelihood.top1_agreement": 0.89,
            "evidence.likelihood.intervals.top1_agreement": [0.88, 0.91],
        }
    ),
    load_policy(None),
)


def squeezed(text: str) -> list[str]:
    """Lines with single spaces, so that tests don't depend on column widths."""
    return [" ".join(line.split()) for line in text.splitlines()]


# --- the terminal ---


def test_the_table_has_a_line_for_each_limit() -> None:
    lines = squeezed(render_verdict(MIXED))
    assert lines[0] == "figure value [95 %] limit verdict"
    assert "likelihood.kl_mean 0.07 [0.06, 0.08] ≤ 0.05 FAIL" in lines
    assert "likelihood.kl_p99 - ≤ 0.5 no data" in lines
    assert "likelihood.perplexity_increase 0.01 [-0.01, 0.02] ≤ 0.03 pass" in lines
    assert "layers.agreement.3 0.96 ≥ 0.9 pass" in lines
    assert "not in the report: likelihood.kl_p99" in lines
    assert "no difference seen: likelihood.perplexity_increase, retrieval.difference, " in (
        f"{' '.join(lines)} "
    )
    assert "beyond the limit, but not at 95 %: likelihood.top1_agreement" in lines
    assert any(line.startswith("look at layer 3: hidden_error jumps to 0.007;") for line in lines)
    assert "not asked without --baseline: 9 limits" in lines
    assert lines[-1] == "failed: 1 of 11 limits, not enough data: 1 of 11 limits"


def test_a_baselines_figure_stands_in_the_limit() -> None:
    lines = squeezed(render_verdict(PASSED))
    assert "likelihood.kl_mean 0.01 [0.009, 0.011] ≤ 0.01 × 1.1 pass" in lines
    assert "layers.agreement.1 0.98 ≥ 0.98 - 0.01 pass" in lines
    assert lines[-1] == f"passed: all {len(PASSED.lines)} limits"


def test_no_line_is_wider_than_the_terminal() -> None:
    wide = altered(
        {
            "evidence.retrieval.tasks.0": task(
                "niah_multivalue", 0.98765, 0.51234, -0.61234, -0.31234
            ),
            "evidence.likelihood.intervals.perplexity_increase": [-0.01234, 0.01234],
            "evidence.likelihood.digest": "another",
        }
    )
    limits = load_policy(None, ["retrieval.lengths.difference.1048576.min = 0"])
    shown = render_verdict(check(wide, limits, report()))
    assert "niah_multivalue" in shown
    assert max(map(len, shown.splitlines())) <= WIDTH


# --- Markdown and JSON ---


def test_markdown_has_the_answer_the_rows_and_the_remarks() -> None:
    lines = markdown(MIXED).splitlines()
    assert lines[0] == "### llama4q check: failed: 1 of 11 limits, not enough data: 1 of 11 limits"
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(MIXED.lines)
    assert len({line.count("|") for line in table}) == 1
    assert "| likelihood.kl_mean | 0.07 [0.06, 0.08] | ≤ 0.05 | FAIL |" in table
    assert "- not in the report: likelihood.kl_p99" in lines


def test_json_says_it_all() -> None:
    found = json.loads(json.dumps(to_json(MIXED)))
    assert (found["passed"], found["answer"], found["exit_code"]) == (False, "fail", 1)
    assert [line["answer"] for line in found["lines"]][:2] == ["fail", "undecided"]
    first = found["lines"][0]
    assert (first["figure"], first["kind"], first["limit"]) == ("likelihood.kl_mean", "max", 0.05)
    assert (first["value"], first["interval"], first["bound"]) == (0.07, [0.06, 0.08], 0.05)
    assert first["look"].startswith("layer 3: ")
    assert to_json(PASSED)["exit_code"] == 0


# --- JUnit ---

# element -> its attributes (those that must be there first), and what may stand in it
SUITES = ({"name", "time", "tests", "failures", "disabled", "errors"}, {"testsuite"})
SUITE = (
    {
        "name", "tests", "failures", "errors", "group", "time", "skipped", "timestamp", "hostname",
        "id", "package", "file", "log", "url", "version",
    },
    {"testsuite", "properties", "testcase", "system-out", "system-err"},
)  # fmt: skip
CASE = (
    {"name", "time", "classname", "group", "assertions", "status"},
    {"skipped", "error", "failure", "system-out", "system-err", "rerunFailure", "properties"},
)
FOUND = ({"type", "message"}, set[str]())
SCHEMA = {
    "testsuites": SUITES, "testsuite": SUITE, "testcase": CASE, "failure": FOUND, "error": FOUND,
}  # fmt: skip
REQUIRED = {"testsuite": {"name", "tests", "failures", "errors"}, "testcase": {"name", "classname"}}


def parsed(verdict: Verdict) -> ElementTree.Element:
    text = junit(verdict)
    assert text.startswith("<?xml version='1.0' encoding='utf-8'?>")
    root = ElementTree.fromstring(text.encode())
    for element in root.iter():
        attributes, children = SCHEMA[element.tag]
        assert set(element.attrib) <= attributes
        assert REQUIRED.get(element.tag, set()) <= set(element.attrib)
        assert {child.tag for child in element} <= children
    return root


def test_junit_follows_the_schema_and_counts_right() -> None:
    for verdict in (PASSED, MIXED):
        root = parsed(verdict)
        [suite] = root
        assert root.tag == "testsuites"
        cases = list(suite)
        for counted in (root, suite):
            assert counted.get("tests") == str(len(cases)) == str(len(verdict.lines))
            assert counted.get("failures") == str(len(suite.findall("testcase/failure")))
            assert counted.get("errors") == str(len(suite.findall("testcase/error")))
        assert len({(case.get("classname"), case.get("name")) for case in cases}) == len(cases)


def test_junit_says_why() -> None:
    root = parsed(MIXED)
    [failure] = root.iter("failure")
    assert failure.get("type") == "regression"
    assert failure.get("message") == "likelihood.kl_mean is 0.07 [0.06, 0.08], limit ≤ 0.05"
    assert failure.text is not None
    assert failure.text.startswith("layer 3: hidden_error jumps to ")
    [error] = root.iter("error")
    assert error.get("message") == "likelihood.kl_p99, limit ≤ 0.5; not in the report"


def test_a_testcase_keeps_its_name_whatever_the_values() -> None:
    """CI systems tell a test's history by its name."""
    other = check(altered({"evidence.layers.1.agreement": 0.5}), load_policy(None), report())
    assert other.answer is Answer.FAIL
    names = [[case.get("name") for case in parsed(one).iter("testcase")] for one in (PASSED, other)]
    assert names[0] == names[1]
    assert "layers.agreement min" in names[0]


def test_names_that_xml_cannot_hold_are_written_all_the_same() -> None:
    """A task's name comes from a file."""
    odd = altered({"evidence.retrieval.tasks.1": task('a\0<b>&"|\n', 1.0, 0.5, -0.6, -0.4)})
    verdict = check(odd, load_policy(None))
    [failure] = [
        one for one in parsed(verdict).iter("failure") if "tasks" in one.get("message", "")
    ]
    assert 'a?<b>&"|?' in failure.get("message", "")
    table = [line for line in markdown(verdict).splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
