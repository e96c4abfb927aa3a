"""The gate: every figure can be limited and fail alone, in the way that its interval asks for.

The authority is the arithmetic of each case, done by hand on made-up reports.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evals.figures import FIGURES
from evals.gate import Answer, Line, Verdict, check, load_report
from evals.policy import Policy, load_policy
from llama4q.errors import UserError

from .plain_reports import altered, faulty, report, task

GOOD = report()
LIKELIHOOD = "evidence.likelihood"


def policy(text: str, folder: Path) -> Policy:
    (folder / "gate.toml").write_text(text)
    return load_policy(folder / "gate.toml")


def only(verdict: Verdict) -> Line:
    [line] = verdict.lines
    return line


def failed(verdict: Verdict) -> list[str]:
    return [line.limit.figure.name for line in verdict.lines if line.answer is Answer.FAIL]


# --- each figure ---

# figure, the key that limits it, a limit that GOOD meets just so, the value that it reads there
MET: list[tuple[str, str, float, float]] = [
    ("likelihood.kl_mean", "max", 0.01, 0.01),
    ("likelihood.kl_median", "max", 0.002, 0.002),
    ("likelihood.kl_p99", "max", 0.1, 0.1),
    ("likelihood.kl_p999", "max", 0.3, 0.3),
    ("likelihood.kl_max", "max", 1.5, 1.5),
    ("likelihood.top1_agreement", "min", 0.95, 0.95),
    ("likelihood.top5_agreement", "min", 0.96, 0.96),
    ("likelihood.perplexity_increase", "max", 0.01, 0.01),
    ("likelihood.perplexity", "max", 10.1, 10.1),
    ("layers.hidden_error", "max", 0.007, 0.007),
    ("layers.hidden_error.1", "max", 0.003, 0.003),
    ("layers.jump", "max", 1.75, 1.75),
    ("likelihood.bits_per_byte", "max", 1.6, 1.6),
    ("layers.gain", "max", 0.02, 0.02),
    ("layers.gain.0", "max", 0.01, 0.01),
    ("layers.expert_gain", "max", 0.02, 0.02),  # of 0.96 from 0.98
    ("layers.expert_gain.1.1", "max", 0.0125, 0.0125),
    ("layers.agreement", "min", 0.96, 0.96),
    ("layers.agreement.1", "min", 0.98, 0.98),
    ("layers.cut", "max", 3 / 1024, 3 / 1024),
    ("layers.cut.1", "max", 1 / 1024, 1 / 1024),
    ("retrieval.quantized", "min", 0.9625, 0.9625),
    ("retrieval.difference", "min", -0.0125, -0.0125),
    ("retrieval.tasks.quantized", "min", 0.925, 0.925),
    ("retrieval.tasks.difference", "min", -0.025, -0.025),
    ("retrieval.tasks.difference.niah_single_1", "min", 0.0, 0.0),
    ("retrieval.lengths.quantized", "min", 0.95, 0.95),  # (1.0 + 0.9) / 2 at 4,096
    ("retrieval.lengths.difference", "min", -0.025, -0.025),
    ("retrieval.lengths.difference.1024", "min", 0.0, 0.0),
    ("other_settings", "max", 0, 0),
    ("rescues.fallback", "max", 0, 0),
    ("quantized.bytes", "max", 9e6, 9e6),
]


def test_every_figure_is_tried() -> None:
    tried = {name for name, *_ in MET}
    assert set(FIGURES) <= tried


@pytest.mark.parametrize(("name", "key", "limit", "value"), MET)
def test_a_limit_is_met_by_itself_and_missed_by_less(
    name: str, key: str, limit: float, value: float, tmp_path: Path
) -> None:
    """With strict = true the value itself counts."""
    tighter = limit - 1e-6 if key == "max" else limit + 1e-6
    exact = only(
        check(
            GOOD,
            policy(
                f"strict = true\n[{name}]\n{key} = {limit + (1e-12 if key == 'max' else -1e-12)}",
                tmp_path,
            ),
        )
    )
    assert exact.answer is Answer.PASS
    assert exact.reading.value == pytest.approx(value)
    missed = check(GOOD, policy(f"strict = true\n[{name}]\n{key} = {tighter}", tmp_path))
    assert only(missed).answer is Answer.FAIL
    assert missed.answer is Answer.FAIL


def test_the_default_policy_passes_a_good_report() -> None:
    assert check(GOOD, load_policy(None)).answer is Answer.PASS
    verdict = check(GOOD, load_policy(None), GOOD)
    assert verdict.answer is Answer.PASS
    assert verdict.unasked == 0


@pytest.mark.parametrize(
    ("changes", "figures"),
    [
        ({f"{LIKELIHOOD}.intervals.kl_mean": [0.051, 0.06]}, ["likelihood.kl_mean"]),
        ({f"{LIKELIHOOD}.kl_p99": 0.51}, ["likelihood.kl_p99"]),
        ({f"{LIKELIHOOD}.intervals.top1_agreement": [0.8, 0.89]}, ["likelihood.top1_agreement"]),
        (
            {f"{LIKELIHOOD}.intervals.perplexity_increase": [0.031, 0.04]},
            ["likelihood.perplexity_increase"],
        ),
        ({"evidence.layers.2.agreement": 0.89}, ["layers.agreement"]),
        ({"evidence.retrieval.difference.high": -0.051}, ["retrieval.difference"]),
        (
            {"evidence.retrieval.tasks.1": task("cwe", 0.95, 0.8, -0.2, -0.101)},
            ["retrieval.tasks.difference"],
        ),
    ],
)
def test_the_default_policy_fails_each_alone(changes: dict[str, Any], figures: list[str]) -> None:
    """Values that their intervals contradict: it is the interval that counts."""
    assert failed(check(altered(changes), load_policy(None))) == figures


# --- intervals ---


@pytest.mark.parametrize(
    ("interval", "relaxed", "strict"),
    [
        ([0.03, 0.045], Answer.PASS, Answer.PASS),
        ([0.045, 0.06], Answer.PASS, Answer.FAIL),  # beyond, but not at 95 %
        ([0.0501, 0.06], Answer.FAIL, Answer.FAIL),
    ],
)
def test_a_figure_fails_when_all_of_its_interval_is_beyond(
    interval: list[float], relaxed: Answer, strict: Answer, tmp_path: Path
) -> None:
    middle = sum(interval) / 2
    found = altered({f"{LIKELIHOOD}.kl_mean": middle, f"{LIKELIHOOD}.intervals.kl_mean": interval})
    limit = "[likelihood.kl_mean]\nmax = 0.05\n"
    line = only(check(found, policy(limit, tmp_path)))
    assert line.answer is relaxed
    assert (line.remark == "beyond the limit, but not at 95 %") == (relaxed is not strict)
    assert only(check(found, policy(f"strict = true\n{limit}", tmp_path))).answer is strict
    assert only(check(found, policy(f"{limit}strict = true", tmp_path))).answer is strict
    assert (
        only(check(found, policy(f"strict = true\n{limit}strict = false", tmp_path))).answer
        is relaxed
    )


@pytest.mark.parametrize(
    ("low", "high", "remark"),
    [(-0.01, 0.02, "no difference seen"), (0.001, 0.02, ""), (-0.02, -0.001, "")],
)
def test_a_difference_within_its_interval_is_not_seen(
    low: float, high: float, remark: str, tmp_path: Path
) -> None:
    found = altered({f"{LIKELIHOOD}.intervals.perplexity_increase": [low, high]})
    limits = policy("[likelihood.perplexity_increase]\nmax = 0.03", tmp_path)
    assert only(check(found, limits)).remark == remark


# --- a baseline ---


@pytest.mark.parametrize(
    ("limit", "changes", "answer"),
    [
        ("[likelihood.kl_p99]\nbaseline_ratio = 1.2", {f"{LIKELIHOOD}.kl_p99": 0.119}, Answer.PASS),
        ("[likelihood.kl_p99]\nbaseline_ratio = 1.2", {f"{LIKELIHOOD}.kl_p99": 0.121}, Answer.FAIL),
        (
            "[layers.agreement]\nbaseline_margin = 0.01",
            {"evidence.layers.1.agreement": 0.971},
            Answer.PASS,
        ),
        (
            "[layers.agreement]\nbaseline_margin = 0.01",
            {"evidence.layers.1.agreement": 0.969},  # not the worst layer, but worse than it was
            Answer.FAIL,
        ),
        (
            "[layers.agreement]\nbaseline_ratio = 0.99",
            {"evidence.layers.3.agreement": 0.95},  # 0.96 before
            Answer.FAIL,
        ),
        (
            "[likelihood.kl_mean]\nbaseline_ratio = 1.1",
            {f"{LIKELIHOOD}.kl_mean": 0.02, f"{LIKELIHOOD}.intervals.kl_mean": [0.0112, 0.03]},
            Answer.FAIL,
        ),
        (
            "[likelihood.kl_mean]\nbaseline_ratio = 1.1",
            {f"{LIKELIHOOD}.kl_mean": 0.02, f"{LIKELIHOOD}.intervals.kl_mean": [0.0108, 0.03]},
            Answer.PASS,
        ),
        (
            "[rescues.fallback]\nbaseline_margin = 0",
            {"rescues": [{"kind": "fallback"}]},
            Answer.FAIL,
        ),
    ],
)
def test_limits_relative_to_a_baseline(
    limit: str, changes: dict[str, Any], answer: Answer, tmp_path: Path
) -> None:
    limits = policy(limit, tmp_path)
    assert only(check(altered(changes), limits, GOOD)).answer is answer
    assert only(check(GOOD, limits, altered(changes))).answer is Answer.PASS  # better is not wrong


def test_the_layer_that_is_worse_by_the_largest_ratio_is_shown(tmp_path: Path) -> None:
    """Layer 0 by a half; layer 3 by more, but by a quarter of what it was."""
    worse = {"evidence.layers.0.hidden_error": 0.003, "evidence.layers.3.hidden_error": 0.00875}
    limits = policy("[layers.hidden_error]\nbaseline_ratio = 1.1", tmp_path)
    assert only(check(altered(worse), limits, GOOD)).reading.place == "0"


def test_a_baseline_that_cannot_be_compared_decides_nothing(tmp_path: Path) -> None:
    limits = policy("[layers.hidden_error]\nbaseline_ratio = 1.1", tmp_path)
    for baseline, why in (
        (altered({f"{LIKELIHOOD}.digest": "other"}), "measured on other tokens than the baseline"),
        (altered({f"{LIKELIHOOD}.digest": None}), "measured on other tokens than the baseline"),
        (altered({"evidence.layers": None}), "not in the baseline"),
        (altered({"evidence.layers": GOOD["evidence"]["layers"][:3]}), "not in the baseline"),
    ):
        line = only(check(GOOD, limits, baseline))
        assert (line.answer, line.remark) == (Answer.UNDECIDED, why)


def test_without_a_baseline_its_limits_are_not_asked(tmp_path: Path) -> None:
    both = "[likelihood.kl_mean]\nmax = 0.05\nbaseline_ratio = 1.1"
    verdict = check(GOOD, policy(both, tmp_path))
    assert (len(verdict.lines), verdict.unasked) == (1, 1)
    with pytest.raises(UserError, match="name one with --baseline"):
        check(GOOD, policy("[likelihood.kl_mean]\nbaseline_ratio = 1.1", tmp_path))


# --- not enough data ---


@pytest.mark.parametrize(
    ("limit", "changes", "why"),
    [
        ("[likelihood.kl_mean]\nmax = 1", {f"{LIKELIHOOD}.kl_mean": None}, "not in the report"),
        ("[likelihood.kl_mean]\nmax = 1", {f"{LIKELIHOOD}.kl_mean": math.nan}, "not in the report"),
        ("[likelihood.kl_mean]\nmax = 1", {"evidence": None}, "not in the report"),
        (
            "[likelihood.kl_mean]\nmax = 1",
            {f"{LIKELIHOOD}.intervals": {}},
            "no interval, as from a single window",
        ),
        (
            "min_tokens = 4096\n[likelihood.kl_p99]\nmax = 1",
            {f"{LIKELIHOOD}.tokens": 4095},
            "4,095 tokens, the policy asks for 4,096",
        ),
        (
            "min_tokens = 4096\n[layers.agreement]\nmin = 0.5",
            {f"{LIKELIHOOD}.tokens": None},
            "0 tokens, the policy asks for 4,096",
        ),
        ("[layers.agreement]\nmin = 0.5", {"evidence.layers": None}, "not in the report"),
        (
            "[layers.agreement]\nmin = 0.5",
            {"evidence.layers": [{"layer": 0, "hidden_error": 0.1}]},
            "not in the report",
        ),
        (
            "[layers.expert_gain]\nmax = 1",
            {"evidence.layers": [{"layer": 0, "hidden_error": 0.1}]},
            "not in the report",
        ),
        (
            "[layers.cut]\nmax = 0.5",
            {"evidence.layers": [{"layer": 0, "hidden_error": 0.1}]},
            "not in the report",
        ),
        ("[layers.agreement.9]\nmin = 0.5", {}, "no such layer in the report"),
        ("[retrieval.difference]\nmin = -1", {"evidence.retrieval": None}, "not in the report"),
        (
            "min_prompts = 41\n[retrieval.tasks.difference]\nmin = -1",
            {},
            "40 prompts, the policy asks for 41",
        ),
        ("[retrieval.tasks.difference.vt]\nmin = -1", {}, "no such task in the report"),
        ("[rescues.fallback]\nmax = 0", {"rescues": None}, "not in the report"),
    ],
)
def test_what_decides_nothing(
    limit: str, changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    line = only(check(altered(changes), policy(limit, tmp_path)))
    assert (line.answer, line.remark) == (Answer.UNDECIDED, why)


def test_a_strict_limit_needs_no_interval(tmp_path: Path) -> None:
    limits = policy("strict = true\n[likelihood.kl_mean]\nmax = 0.05", tmp_path)
    found = altered({f"{LIKELIHOOD}.intervals": {}})
    assert only(check(found, limits)).answer is Answer.PASS


def test_a_regression_is_worse_than_missing_data() -> None:
    found = altered({f"{LIKELIHOOD}.kl_p99": 9.0, "evidence.retrieval": None})
    verdict = check(found, load_policy(None))
    assert {line.answer for line in verdict.lines} == set(Answer)
    assert verdict.answer is Answer.FAIL


def test_a_model_without_experts_routes_nothing_differently(tmp_path: Path) -> None:
    dense = altered({"evidence.layers": [{"layer": 0, "hidden_error": 0.1, "agreement": None}]})
    assert (
        only(check(dense, policy("[layers.agreement]\nmin = 0.9", tmp_path))).answer is Answer.PASS
    )


def test_a_named_task_has_its_own_limit(tmp_path: Path) -> None:
    each = "strict = true\n[retrieval.tasks.difference]\nmin = -0.01\n"
    assert check(GOOD, policy(each, tmp_path)).answer is Answer.FAIL
    own = f"{each}[retrieval.tasks.difference.cwe]\nmin = -0.03"
    verdict = check(GOOD, policy(own, tmp_path))
    assert [line.reading.place for line in verdict.lines] == ["niah_single_1", "cwe"]
    assert verdict.answer is Answer.PASS


# --- where to look ---


@pytest.mark.parametrize("layer", range(4))
def test_a_fault_is_found_in_its_layer(layer: int) -> None:
    """By 5 % of one layer's error, where the next layers' are larger by themselves."""
    verdict = check(faulty(layer, 1.05), load_policy(None), GOOD)
    assert failed(verdict) == ["layers.jump"]
    [line] = [line for line in verdict.lines if line.answer is Answer.FAIL]
    assert line.reading.place == str(layer)
    assert line.look.startswith(f"layer {layer}: hidden_error jumps to ")


@pytest.mark.parametrize("layer", range(4))
def test_a_gross_fault_is_found_without_a_baseline(layer: int, tmp_path: Path) -> None:
    found = faulty(layer, 10.0)
    line = only(check(found, policy("[layers.hidden_error]\nmax = 0.008", tmp_path)))
    error = found["evidence"]["layers"][layer]["hidden_error"]
    assert line.look.startswith(f"layer {layer}: hidden_error jumps to {error:.4g}; routing agrees")


def test_an_expert_that_does_too_much_is_named(tmp_path: Path) -> None:
    """Without a baseline: its neighbours tell."""
    found = altered({"evidence.layers.2.expert_gain": [0.97, 1.2, None, 0.98, 0.98]})
    [line] = [line for line in check(found, load_policy(None)).lines if line.answer is Answer.FAIL]
    assert line.reading.place == "2.1"
    assert line.look.startswith("layer 2, expert 1: gain 1.200, median of the layer 0.980; routing")


def test_a_setting_of_another_value_is_named(tmp_path: Path) -> None:
    other = {"setting": "temperature", "original": "True", "quantized": "False"}
    verdict = check(altered({"evidence.other_settings": [other]}), load_policy(None))
    [line] = [line for line in verdict.lines if line.answer is Answer.FAIL]
    assert line.look == "temperature: False, in the original True"


def test_the_layer_with_the_worst_routing_is_named(tmp_path: Path) -> None:
    found = altered({"evidence.layers.2.agreement": 0.8})
    line = only(check(found, policy("[layers.agreement]\nmin = 0.9", tmp_path)))
    assert line.reading.place == "2"
    assert "routing agrees least in layer 2: 80.0 %" in line.look


def test_the_task_and_the_length_that_fell_most_are_named(tmp_path: Path) -> None:
    limits = policy("strict = true\n[retrieval.difference]\nmin = 0", tmp_path)
    assert only(check(GOOD, limits)).look == (
        "task cwe fell most: -2.5 points; 4,096 tokens fell most: -2.5 points"
    )


# --- reports ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evidence": "none"}, "should be an object but is 'none'"),
        ({f"{LIKELIHOOD}.kl_mean": "0.1"}, "kl_mean should be a number but is '0.1'"),
        ({f"{LIKELIHOOD}.kl_mean": True}, "kl_mean should be a number but is 'True'"),
        ({f"{LIKELIHOOD}.intervals.kl_mean": 3}, "kl_mean should be two numbers but is '3'"),
        ({"evidence.layers": {"0": 0.9}}, "evidence.layers should be a list of objects"),
        ({"evidence.layers.1.expert_gain": 1.0}, "expert_gain should be a list of numbers but"),
        ({"evidence.layers.1.expert_gain": ["1"]}, "expert_gain should be a number but is '1'"),
        ({"evidence.retrieval": []}, "evidence.retrieval should be an object"),
        ({"evidence.retrieval.tasks.1.cells.0.quantized": 2}, "quantized should be a share from 0"),
        ({"evidence.retrieval.tasks": ["cwe"]}, "tasks should be a list of objects"),
    ],
)
def test_malformed_figures_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(altered(changes), load_policy(None))


def test_reports_are_loaded(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(GOOD))
    assert load_report(tmp_path / "report.json") == GOOD


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"llama4q": ', "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1, 2]", "JSON, but not a report"),
        (b'{"model_type": "llama4"}', "JSON, but not a report"),
        (b'{"llama4q": "0.1.0"}', "a report of schema 1, but this llama4q reads 2; run `llama4q"),
        (b'{"llama4q": "9", "schema": 3}', "a report of schema 3, but this llama4q reads 2"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_report(tmp_path / "report.json")


def test_missing_reports_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such report"):
        load_report(tmp_path / "report.json")
    with pytest.raises(UserError, match="cannot be read"):
        load_report(tmp_path)


def test_checking_and_rendering_need_no_torch() -> None:
    code = "import sys, evals.gate, evals.report, evals.verdict; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "False\n"
