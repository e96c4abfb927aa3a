"""The terminal table: every figure there, units with it, never wider than 100 characters."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from evals.report import WIDTH, render

from . import reports

EXPERT = "language_model.model.layers.0.feed_forward.experts.0.gate_up_proj"


def shares(prompts: int, original: float, quantized: float) -> dict[str, float]:
    return {"prompts": prompts, "original": original, "quantized": quantized}


FULL: dict[str, Any] = {
    "llama4q": "0.1.0",
    "source": {"name": "o/scout", "revision": "4bd10c4d", "bytes": 217_000_000_000},
    "quantized": {"name": "out", "bytes": 63_100_000_000},
    "recipe": {"name": "int4"},
    "calibration": {"source": "pocket", "samples": 128, "length": 512, "seed": 7},
    "layers": [
        {"layer": 1, "expert_tokens": [412, 100, 3000]},
        {"layer": 2},
        {"layer": 3, "expert_tokens": [0, 100, 65536, 0]},
    ],
    "rescues": [
        {"tensor": EXPERT, "kind": "damping", "detail": "raised from 0.01 to 0.1 " * 5},
        {"tensor": EXPERT.replace("0.gate", "5.gate"), "kind": "fallback"},
    ],
    "evidence": {
        "likelihood": {
            "tokens": 16384,
            "original": {"perplexity": 9.1, "standard_error": 0.21},
            "quantized": {"perplexity": 9.2, "standard_error": 0.22},
            "kl_mean": 0.004,
            "kl_standard_error": 0.0002,
            "kl_p99": 0.05,
            "top1_agreement": 0.97,
            "units": "nats per token",
        },
        "layers": [
            {"layer": 1, "agreement": 0.99, "cut": {"keys": 0.25, "values": 0.0}},
            {"layer": 3, "agreement": 0.95, "cut": {"keys": 0.125, "values": 0.0625}},
        ],
        "retrieval": {
            "prompts": 16,
            "original": 1.0,
            "quantized": 0.875,
            "difference": {"value": -0.125, "low": -0.3125, "high": 0.0, "p_value": 0.5},
            "tasks": [
                {
                    "task": "needle",
                    "cells": [
                        {"length": 512, "depth": 0.0, **shares(4, 1.0, 1.0)},
                        {"length": 512, "depth": 0.5, **shares(12, 1.0, 0.75)},
                        {"length": 1024, "depth": 0.5, **shares(4, 1.0, 0.5)},
                    ],
                },
            ],
        },
    },
    "fit": {
        "device": "h100-80gb",
        "context": 131072,
        "fits": True,
        "largest_context": 1000000,
        "total_bytes": 71_000_000_000,
        "usable_bytes": 73_600_000_000,
    },
    "seconds": {"total": 60.0},
}


def without(*path: str) -> dict[str, Any]:
    report = copy.deepcopy(FULL)
    found = report
    for key in path[:-1]:
        found = found[key]
    del found[path[-1]]
    return report


def squeezed(text: str) -> list[str]:
    """Lines with single spaces, so that tests don't depend on column widths."""
    return [" ".join(line.split()) for line in text.splitlines()]


@pytest.mark.parametrize(
    "line",
    [
        "original o/scout at 4bd10c4d",
        "calibration pocket, 128 samples of 512 tokens, seed 7",
        "perplexity (16,384 tokens) 9.1000 ± 0.2100 9.2000 ± 0.2200 +0.1 (+1.1 %)",
        "KL, mean (nats per token) 0.004 ± 0.0002",
        "KL, 99th percentile (nats per token) 0.05",
        "top-1 agreement (tokens) 97.00 %",
        "routing agreement, worst layer (3) 95.00 %",
        "routing agreement, mean of 2 layers 97.00 %",
        "keys beyond FP8, worst layer (1) 25.0000 %",
        "values beyond FP8, worst layer (3) 6.2500 %",
        "retrieval, exact match (16 prompts) 100.0 % 87.5 % -12.5 points",
        "95 % interval of the difference -31.2 to +0.0 points",
        "at 512 tokens 100.0 % 81.2 % -18.8 points",  # 4 and 12 prompts: (4 + 9) / 16
        "at 1,024 tokens 100.0 % 50.0 % -50.0 points",
        "size of the checkpoint 217.00 GB 63.10 GB 3.44 times smaller",
        "0 % 100 → 100 -",
        "50 % 100 → 75 100 → 50",
        "1 3 1,170.7 100 (1) 3,000 (2)",
        "3 4 16,409.0 0 (0) 65,536 (2)",
        "no tokens in layer 3: experts 0, 3",
        "rescues: 2",
        f"fallback {EXPERT.replace('0.gate', '5.gate')}",
        "took 60.0 s",
    ],
)
def test_every_figure_is_there(line: str) -> None:
    assert line in squeezed(render(FULL))


def test_the_fit_is_told() -> None:
    text = " ".join(render(FULL).split())
    expected = "fits h100-80gb at 131,072 tokens of context: needs 71.00 GB of 73.60 GB"
    assert f"{expected}; largest context 1,000,000 tokens" in text
    no = {
        **FULL,
        "fit": {"device": "a100", "context": 8192, "fits": False, "largest_context": None},
    }
    assert "does not fit a100 at 8,192 tokens of context" in render(no)


def test_columns_are_aligned() -> None:
    """Figures of one column end at the same place."""
    lines = render(FULL).splitlines()
    ends = [
        line.index(figure) + len(figure)
        for line in lines
        for figure in ("9.2000 ± 0.2200", "87.5 %", "63.10 GB")
        if figure in line
    ]
    assert len(ends) == 3
    assert len(set(ends)) == 1


def test_no_line_is_wider_than_the_terminal() -> None:
    wide = copy.deepcopy(FULL)
    wide["evidence"]["likelihood"]["original"] = {"perplexity": 9.9e8, "standard_error": 999.9999}
    wide["evidence"]["likelihood"]["quantized"] = {"perplexity": 999.9999, "standard_error": 9e9}
    wide["evidence"]["retrieval"]["tasks"][0]["cells"] = [
        {"length": 2**n, "depth": depth / 10, "prompts": 4, "original": 1.0, "quantized": 1.0}
        for n in range(8, 24)
        for depth in range(11)
    ]
    wide["layers"] = [{"layer": 0, "expert_tokens": [0] * 128 + [10**9]}]
    wide["source"]["name"] = "/a/folder/with" + "/a/very/long/name" * 10
    text = render(wide)
    assert max(len(line) for line in text.splitlines()) <= WIDTH
    assert text.count("8,388,608") == 2  # the longest of 16 lengths: by length, by depth


def test_experts_with_too_few_tokens_are_marked() -> None:
    report = copy.deepcopy(FULL)
    report["calibration"]["coverage"] = {
        "needed": 256,
        "experts": 7,
        "poor": [{"layer": 1, "experts": [1]}, {"layer": 3, "experts": [0, 1, 3]}],
        "worst": {"layer": 3, "expert": 0, "tokens": 0},
        "warning": "4 of 7 experts",
    }
    lines = squeezed(render(report))
    assert "layer experts mean fewest (expert) most (expert) poor" in lines
    assert "1 3 1,170.7 100* (1) 3,000 (2) 1" in lines
    assert "3 4 16,409.0 0* (0) 65,536 (2) 3" in lines
    meaning = "* poor: 4 of 7 experts, fewer tokens than the 256 inputs of their widest matrix"
    assert meaning in lines
    report["calibration"]["coverage"]["poor"] = [{"layer": 3, "experts": [0, 3]}]
    assert "1 3 1,170.7 100 (1) 3,000 (2)" in squeezed(render(report))
    for coverage in (None, {**report["calibration"]["coverage"], "poor": []}):
        report["calibration"]["coverage"] = coverage
        assert render(report) == render(FULL)


def test_a_mix_is_told_text_by_text() -> None:
    report = copy.deepcopy(FULL)
    part = {"source": "pocket", "share": 0.6, "samples": 77, "length": 512, "tokens": 39424}
    report["calibration"]["mix"] = [part]
    assert "calibration pocket, 77 samples of 512 tokens, seed 7" in squeezed(render(report))
    other = {"source": "o/n", "share": 0.4, "samples": 3, "length": 8192, "tokens": 24576}
    report["calibration"]["mix"] = [part, other]
    told = (
        "calibration pocket 60.0 % in 77 samples of 512 tokens, o/n 40.0 % in 3 samples of 8,192 "
        "tokens, seed 7"
    )
    assert told in " ".join(render(report).split())


def test_several_tasks_have_a_line_each() -> None:
    """One with several answers has a second one; one without depths has no table."""
    report = copy.deepcopy(FULL)
    report["evidence"]["retrieval"]["tasks"].append(
        {
            "task": "vt",
            **shares(4, 0.75, 0.5),
            "recall": shares(4, 0.9, 0.8),
            "cells": [{"length": 512, "depth": None, **shares(4, 0.75, 0.5)}],
        }
    )
    report["evidence"]["retrieval"]["tasks"][0] |= shares(20, 1.0, 0.85)
    lines = squeezed(render(report))
    assert "needle 100.0 % 85.0 % -15.0 points" in lines
    assert "vt 75.0 % 50.0 % -25.0 points" in lines
    assert "vt, recall 90.0 % 80.0 % -10.0 points" in lines
    assert "at 512 tokens 95.0 % 75.0 % -20.0 points" in lines  # (4 + 9 + 2) / 20
    assert len([line for line in lines if "by depth and length" in line]) == 1


def test_one_depth_needs_no_table_of_depths() -> None:
    report = copy.deepcopy(FULL)
    del report["evidence"]["retrieval"]["tasks"][0]["cells"][0]
    assert "depth" not in render(report)


def test_no_rescue_is_said() -> None:
    assert "rescues: none" in squeezed(render({**FULL, "rescues": []}))
    assert "rescues" not in render(without("rescues"))


def test_small_checkpoints_are_in_megabytes() -> None:
    small = {"source": {"bytes": 12_300_000}, "quantized": {"bytes": 4_560_000}}
    assert "size of the checkpoint 12.30 MB 4.56 MB 2.70 times smaller" in squeezed(render(small))


@pytest.mark.parametrize(
    "path",
    [
        *((key,) for key in FULL),
        *(("evidence", key) for key in FULL["evidence"]),
        *(("evidence", "likelihood", key) for key in FULL["evidence"]["likelihood"]),
        *(("evidence", "retrieval", key) for key in FULL["evidence"]["retrieval"]),
        *(("fit", key) for key in FULL["fit"]),
        ("source", "revision"),
        ("source", "bytes"),
        ("calibration", "seed"),
        ("evidence", "likelihood", "original", "standard_error"),
    ],
)
def test_anything_may_be_missing(path: tuple[str, ...]) -> None:
    text = render(without(*path))
    assert "None" not in text
    if path[0] == "evidence" and len(path) < 3:
        missing = path[1:] or ("likelihood, layers, retrieval",)
        assert f"not measured: {missing[0]}" in text


def test_an_empty_report_names_what_was_not_measured() -> None:
    assert render({"llama4q": "0.1.0"}) == "not measured: likelihood, layers, retrieval"


def test_the_choice_is_told() -> None:
    text = render(reports.quantized(fitted=True))
    assert "precision   for 2 x h100-80gb, 4 x 131,072 tokens: room for 12.80 GB of weights" in text
    assert "  experts       4 x int4, 4 x int8" in text
    [mix] = (line for line in text.splitlines() if line.startswith("this mix"))
    assert mix.split()[2:5] == ["12.00", "GB", "0.0072"]
    assert "precision" not in render(reports.quantized())
