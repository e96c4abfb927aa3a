"""The gate: every limit can fail alone, missing evidence fails, a baseline is held to."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from evals.gate import DEFAULT_THRESHOLDS, METRICS, Thresholds, check, load_report
from llama4q.errors import UserError

GOOD: dict[str, Any] = {
    "llama4q": "0.1.0",
    "rescues": [{"tensor": "a", "kind": "damping", "detail": "0.01 to 0.1"}],
    "evidence": {
        "likelihood": {
            "digest": "aaaaaaaaaaaaaaaa",
            "original": {"perplexity": 10.0},
            "quantized": {"perplexity": 10.1},
            "kl_mean": 0.004,
            "kl_p99": 0.05,
            "top1_agreement": 0.97,
        },
        "layers": [{"layer": 0, "agreement": 0.99}, {"layer": 1, "agreement": 0.95}],
        "retrieval": {"digest": "bbbb", "original": 0.98, "quantized": 0.97},
    },
}
STRICT = replace(DEFAULT_THRESHOLDS, max_fallbacks=0)

# one thing made worse -> the only line that may fail
SPOILED: list[tuple[str, Any, str]] = [
    ("evidence.likelihood.kl_mean", 0.06, "KL divergence, mean"),
    ("evidence.likelihood.kl_p99", 0.6, "KL divergence, 99th"),
    ("evidence.likelihood.top1_agreement", 0.89, "top-1 agreement"),
    ("evidence.likelihood.quantized.perplexity", 10.4, "perplexity increase"),
    ("evidence.retrieval.quantized", 0.9, "retrieval"),
    ("evidence.layers", [{"agreement": 0.95}, {"agreement": 0.8}], "routing agreement, worst"),
    ("rescues", [{"tensor": "a", "kind": "fallback"}], "fallbacks"),
]


def altered(path: str, value: object) -> dict[str, Any]:
    """GOOD with the entry at `path` replaced, or removed where the value is None."""
    report = copy.deepcopy(GOOD)
    *parents, last = path.split(".")
    found: Any = report
    for key in parents:
        found = found[key]
    if value is None:
        del found[last]
    else:
        found[last] = value
    return report


def test_every_threshold_has_its_metric() -> None:
    assert [metric.limit for metric in METRICS] == [field.name for field in fields(Thresholds)]


def test_a_good_report_passes_every_line() -> None:
    verdict = check(GOOD, STRICT)
    assert verdict.passed
    assert len(verdict.lines) == len(METRICS)
    assert verdict.lines[0].metric == "KL divergence, mean (nats per token)"
    assert (verdict.lines[0].value, verdict.lines[0].limit) == (0.004, "≤ 0.05")
    assert verdict.lines[3].value == pytest.approx(0.01)


@pytest.mark.parametrize(("path", "value", "name"), SPOILED)
def test_each_limit_fails_alone(path: str, value: object, name: str) -> None:
    verdict = check(altered(path, value), STRICT)
    assert not verdict.passed
    (failed,) = [line for line in verdict.lines if not line.passed]
    assert failed.metric.startswith(name)


@pytest.mark.parametrize(("path", "_value", "name"), SPOILED)
def test_missing_evidence_fails(path: str, _value: object, name: str) -> None:
    (failed,) = [line for line in check(altered(path, None), STRICT).lines if not line.passed]
    assert failed.metric.startswith(name)
    assert failed.value is None


def test_an_empty_report_fails_all_that_is_asked() -> None:
    assert not any(line.passed for line in check({"llama4q": "0.1.0"}, STRICT).lines)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("evidence.likelihood.kl_mean", float("nan")),
        ("evidence.likelihood.top1_agreement", float("nan")),
        ("evidence.likelihood.quantized.perplexity", float("inf")),
        ("evidence.layers", [{"agreement": 0.99}, {"agreement": float("nan")}]),
        ("evidence.layers", [{"agreement": 0.99}, {"layer": 1}]),
        ("evidence.retrieval.original", 0.0),
    ],
)
def test_figures_that_say_nothing_fail(path: str, value: object) -> None:
    assert not check(altered(path, value), DEFAULT_THRESHOLDS).passed


def test_a_model_without_experts_routes_nothing_differently() -> None:
    assert check(altered("evidence.layers", []), DEFAULT_THRESHOLDS).passed


def test_a_limit_is_met_by_the_limit_itself() -> None:
    assert check(GOOD, Thresholds(max_kl_mean=0.004, min_top1_agreement=0.97)).passed


def test_a_report_passes_against_itself() -> None:
    verdict = check(GOOD, Thresholds(), GOOD)
    assert verdict.passed
    assert len(verdict.lines) == len(METRICS)
    assert all(line.metric.endswith("vs baseline") for line in verdict.lines)


@pytest.mark.parametrize(("path", "value", "name"), SPOILED)
def test_what_is_worse_than_the_baseline_fails(path: str, value: object, name: str) -> None:
    worse = altered(path, value)
    failed = [line.metric for line in check(worse, Thresholds(), GOOD).lines if not line.passed]
    assert [metric.startswith(name) for metric in failed] == [True]
    assert check(GOOD, Thresholds(), worse).passed  # better than the baseline is never wrong


def test_the_baselines_tolerance_is_the_metrics() -> None:
    kl = METRICS[0]
    inside = 0.004 * (1 + kl.relative_tolerance) - 1e-9
    path = "evidence.likelihood.kl_mean"
    assert check(altered(path, inside), Thresholds(), GOOD).passed
    assert not check(altered(path, inside + 2e-9), Thresholds(), GOOD).passed
    # near zero the share of the baseline would be no room at all
    assert check(altered(path, 0.9e-4), Thresholds(), altered(path, 0.0)).passed


def test_what_the_baseline_had_must_not_vanish() -> None:
    failed = [
        line.metric
        for line in check(altered("evidence.retrieval", None), Thresholds(), GOOD).lines
        if not line.passed
    ]
    assert failed == ["retrieval (quantized / original), vs baseline"]
    assert check(GOOD, Thresholds(), altered("evidence.retrieval", None)).passed


def test_another_text_than_the_baselines_fails() -> None:
    verdict = check(altered("evidence.likelihood.digest", "cccc"), Thresholds(), GOOD)
    (failed,) = [line for line in verdict.lines if not line.passed]
    assert failed.metric == "likelihood: same tokens as baseline"
    assert (failed.value, failed.limit) == ("cccc", "= aaaaaaaaaaaa")


def test_nothing_to_check_is_an_error() -> None:
    with pytest.raises(UserError, match="no limit is named"):
        check(GOOD, Thresholds())
    with pytest.raises(UserError, match="baseline holds no figure"):
        check(GOOD, Thresholds(), {"llama4q": "0.1.0"})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("evidence", "none", "evidence.likelihood.kl_mean should be an object but is 'none'"),
        ("evidence.likelihood.kl_mean", "0.1", "kl_mean should be a number but is '0.1'"),
        ("evidence.likelihood.kl_mean", True, "kl_mean should be a number but is 'True'"),
        ("evidence.layers", {"0": 0.9}, "evidence.layers should be a list of objects"),
        ("rescues", ["damping"], "rescues should be a list of objects"),
    ],
)
def test_malformed_figures_are_named(path: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(altered(path, value), STRICT)


def test_reports_are_loaded(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(GOOD))
    assert load_report(tmp_path / "report.json") == GOOD


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"llama4q": ', "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[1, 2]", "JSON, but not a report"),
        (b'{"model_type": "llama4"}', "JSON, but not a report"),
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
    code = "import sys, evals.gate, evals.report; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "False\n"
