"""The model card's section against the report: its tables as Markdown readers see them."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from markdown_it import MarkdownIt

from evals.card import markdown

from . import reports

FULL = reports.quantized(tasks=("niah_single_1", "vt"))


def tables(text: str) -> list[list[list[str]]]:
    """Rows of cells, by a Markdown parser of its own."""
    found: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and found and token.level >= 4:
            children = token.children or []
            found[-1][-1].append("".join(child.content for child in children))
    return found


def test_what_it_cost() -> None:
    report = copy.deepcopy(FULL)
    report["evidence"]["retrieval"] |= {
        "prompts": 60, "original": 0.95, "quantized": 0.9,
        "difference": {"value": -0.05, "low": -0.09, "high": -0.01, "p_value": 0.01},
    }  # fmt: skip
    comparison, _ = tables(markdown(report))
    assert comparison == [
        ["", "original", "quantized", "difference"],
        ["size", "217.29 GB", "65.04 GB", "3.34 times smaller"],
        ["perplexity", "7.414", "7.432", "+0.24 % (−0.11 to +0.58), no difference seen"],
        ["KL divergence, nats a token", "", "", "0.0118 (0.0111 to 0.0125)"],
        ["KL divergence, 99th percentile", "", "", "0.153"],
        ["same next token", "", "", "95.36 % (95.12 % to 95.61 %)"],
        ["retrieval", "95.0 %", "90.0 %", "−5.0 points (−9.0 to −1.0)"],
    ]


def test_retrieval_by_length_is_pooled_over_prompts() -> None:
    """4 prompts with 4 right and 12 with 6 are 10 of 16."""
    report = copy.deepcopy(FULL)
    cell = {"length": 4096, "depth": 0.5, "prompts": 4, "original": 1.0, "quantized": 1.0}
    one, other = report["evidence"]["retrieval"]["tasks"]
    one["cells"] = [cell, {**cell, "length": 8192}]
    other["cells"] = [{**cell, "depth": None, "prompts": 12, "quantized": 0.5}]
    _, by_length = tables(markdown(report))
    assert by_length[1:] == [
        ["4,096", "16", "100.0 %", "62.5 %", "−37.5 points"],
        ["8,192", "4", "100.0 %", "100.0 %", "0.0 points"],
    ]


def test_how_it_was_made() -> None:
    text = markdown(FULL)
    assert text.startswith("## Evaluation\n\n| ")
    assert (
        "Quantized with llama4q 0.1.0, recipe int4. Calibrated on pocket, 128 samples of 2,048 "
        "tokens, seed 0. Measured on wikitext-2, 32,736 tokens in 32 windows, stride 1,024."
    ) in text
    assert text.endswith("\n\n    llama4q quantize o/scout scout-int4 --recipe int4\n")


def test_nothing_of_a_report_becomes_markup() -> None:
    report = copy.deepcopy(FULL)
    report["calibration"]["source"] = "a|b*c*`d`\n# <script>[e](f)"
    report["evidence"]["retrieval"]["tasks"][0]["task"] = "x|y"
    rendered = MarkdownIt("commonmark").enable("table").render(markdown(report))
    assert set(re.findall(r"<(\w+)", rendered)) <= {
        "h2", "table", "thead", "tbody", "tr", "th", "td", "p", "pre", "code",
    }  # fmt: skip
    assert "a|b*c*`d` # &lt;script&gt;[e](f), 128 samples" in rendered
    assert "(x|y, vt)" in rendered


@pytest.mark.parametrize(
    "path",
    [
        *((key,) for key in FULL),
        *(("evidence", key) for key in FULL["evidence"]),
        *(("evidence", "likelihood", key) for key in FULL["evidence"]["likelihood"]),
        ("source", "bytes"),
    ],
)
def test_anything_may_be_missing(path: tuple[str, ...]) -> None:
    report: dict[str, Any] = copy.deepcopy(FULL)
    *parents, last = path
    found = report
    for key in parents:
        found = found[key]
    del found[last]
    text = markdown(report)
    assert "None" not in text
    assert text.startswith("## Evaluation\n")


def test_a_report_of_eval_knows_no_calibration() -> None:
    text = markdown(reports.evaluated(tasks=()))
    assert "Calibrated" not in text
    assert "Retrieval" not in text
    assert len(tables(text)) == 1
