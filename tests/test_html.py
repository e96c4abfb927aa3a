"""The page against the report that it shows: every figure is there, nothing is taken for HTML.

Its look and what a browser says of it are in tests/test_html_browser.py. Authorities: the report
itself, Python's HTML parser, and WCAG 2 for contrast.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from evals.gate import check
from evals.html import colours
from evals.html.axis import Axis, logarithmic, named, numbered, whole_ticks
from evals.html.element import VOID, element
from evals.html.page import page
from evals.policy import Policy, load_policy
from evals.wording import length, number, percent, signed

from . import reports

EVERY_SECTION = [
    "Predictions", "Retrieval", "Layers", "Experts", "Precision", "Size and memory",
    "Rescues and warnings", "Provenance",
]  # fmt: skip


@dataclasses.dataclass
class Node:
    """One element of a parsed page."""

    tag: str
    attributes: dict[str, str | None]
    children: list[Node | str] = dataclasses.field(default_factory=list)

    def all(self, tag: str) -> list[Node]:
        """Elements of a kind below this one, in the page's order."""
        found = []
        for child in self.children:
            if isinstance(child, Node):
                found += [child] * (child.tag == tag) + child.all(tag)
        return found

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


class Tree(HTMLParser):
    """A page as nodes; fails where an element ends that is not the one that is open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open = [Node("", {})]
        self.feed(text)
        self.close()
        assert len(self.open) == 1, f"{self.open[-1].tag} never ends"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, dict(attrs))
        assert len(attrs) == len(node.attributes), f"an attribute of {tag} stands there twice"
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parsed(report: dict[str, Any], policy: Policy | None = None) -> Node:
    verdict = None if policy is None else check(report, policy)
    return Tree(page(report, verdict)).open[0]


def tables(tree: Node) -> dict[str, list[list[str]]]:
    """Rows of cells under the captions of the page's tables; of several the first."""
    found: dict[str, list[list[str]]] = {}
    for table in tree.all("table"):
        rows = [
            [cell.text for cell in row.children if isinstance(cell, Node)]
            for row in table.all("tr")
        ]
        found.setdefault(table.all("caption")[0].text, rows)
    return found


def sections(tree: Node) -> list[str]:
    return [section.all("h2")[0].text for section in tree.all("section")]


FULL = reports.quantized(poor=3, tasks=("niah_single_1", "vt"), fitted=True)


# --- the page as a whole ---


def test_every_section_is_there_and_in_the_contents() -> None:
    tree = parsed(FULL)
    assert sections(tree) == EVERY_SECTION
    [contents] = tree.all("nav")
    assert [link.text for link in contents.all("a")] == EVERY_SECTION
    ids = [node.attributes["id"] for node in tree.all("h2") if "id" in node.attributes]
    assert [link.attributes["href"] for link in contents.all("a")] == [f"#{name}" for name in ids]


@pytest.mark.parametrize("report", [FULL, reports.evaluated(), reports.quantized(experts=0)])
def test_it_can_be_read_aloud(report: dict[str, Any]) -> None:
    """Headings in order, a text for every picture, scopes and captions for every table (WCAG 2:
    1.1.1, 1.3.1, 2.4.2, 3.1.1)."""
    text = page(report)
    tree = Tree(text).open[0]
    levels = [int(level) for level in re.findall(r"<h([1-6])", text)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    for svg in tree.all("svg"):
        assert svg.attributes["role"] == "img"
        assert len(svg.attributes["aria-label"] or "") > 20
    for table in tree.all("table"):
        assert table.all("caption")[0].text
        assert {heading.attributes["scope"] for heading in table.all("th")} == {"col", "row"}
    for figure in tree.all("figure"):
        assert len(figure.all("table")) >= len(figure.all("svg"))
    assert tree.all("html")[0].attributes["lang"] == "en"
    assert tree.all("title")[0].text


def test_it_asks_for_nothing() -> None:
    """No address in any attribute but places of the page itself; the policy forbids the rest."""
    tree = parsed(FULL)
    addresses = [
        str(node.attributes[name])
        for tag in ("a", "link", "script", "img", "iframe", "use", "image")
        for node in tree.all(tag)
        for name in ("href", "src", "xlink:href")
        if name in node.attributes
    ]
    assert all(address.startswith("#") or address == "data:," for address in addresses)
    [style] = tree.all("style")
    assert "url(" not in style.text
    assert "@import" not in style.text
    policies = [m.attributes["content"] for m in tree.all("meta") if "http-equiv" in m.attributes]
    assert [str(policy).startswith("default-src 'none'; ") for policy in policies] == [True]


def spoiled(value: Any) -> Any:
    """A report with every text of it made hostile."""
    if isinstance(value, dict):
        return {key: spoiled(part) for key, part in value.items()}
    if isinstance(value, list):
        return [spoiled(part) for part in value]
    return f"{value}{reports.EVIL}" if isinstance(value, str) else value


def shape(node: Node) -> list[Any]:
    return [(child.tag, shape(child)) for child in node.children if isinstance(child, Node)]


def test_no_text_of_a_report_becomes_html() -> None:
    """The elements are those of a harmless report, and every character is one of HTML's."""
    hostile = spoiled(FULL)
    assert shape(parsed(hostile)) == shape(parsed(FULL))
    text = page(hostile)
    text.encode()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    [title] = parsed(hostile).all("title")
    assert "␀␛[31m�" in title.text


def test_texts_and_attributes_are_escaped() -> None:
    assert element("p", '<&">', title='<&">', class_=None, hidden=True, open=False) == (
        '<p title="&lt;&amp;&quot;&gt;" hidden>&lt;&amp;&quot;&gt;</p>'
    )
    assert element("b", [element("i", "1"), None, ["<"]]) == "<b><i>1</i>&lt;</b>"


@pytest.mark.parametrize("experts", [16, 128])
def test_the_largest_reports_stay_small(experts: int) -> None:
    large = reports.quantized(
        48, experts, poor=200, tasks=reports.TASKS, lengths=9, depths=11,
    )  # fmt: skip
    large["rescues"] = [
        {"tensor": f"layers.{at}.experts.3.gate_up_proj", "kind": "damping", "detail": "0.1"}
        for at in range(6000)
    ]
    text = page(large)
    assert len(text.encode()) < 2 * 10**6
    assert "6,000 × damping" in text
    assert "5,800 more are in report.json" in text


# --- parts that are not there ---


@pytest.mark.parametrize(
    ("path", "lost"),
    [
        (("evidence", "likelihood"), ["Predictions"]),
        (("evidence", "retrieval"), ["Retrieval"]),
        (("evidence", "layers"), []),
        (("evidence",), ["Predictions", "Retrieval"]),
        (("layers",), []),
        (("rescues",), []),
        (("fit",), []),
        (("budget",), ["Precision"]),
        *(((key,), []) for key in ("source", "quantized", "recipe", "calibration", "files")),
        *(((key,), []) for key in ("versions", "seconds", "verified", "command", "kernel")),
        *((("evidence", "likelihood", key), []) for key in FULL["evidence"]["likelihood"]),
        *((("fit", key), []) for key in FULL["fit"]),
        *(((side, key), []) for side in ("source", "quantized") for key in FULL[side]),
        (("calibration", "coverage"), []),
        (("calibration", "mix"), []),
        (("evidence", "likelihood", "original", "standard_error"), []),
    ],
)
def test_anything_may_be_missing(path: tuple[str, ...], lost: list[str]) -> None:
    report = copy.deepcopy(FULL)
    *parents, last = path
    found: Any = report
    for key in parents:
        found = found[key]
    del found[last]
    tree = parsed(report)
    assert sections(tree) == [name for name in EVERY_SECTION if name not in lost]
    said = " ".join(node.text for node in tree.all("body"))
    assert not re.search(r"(?i)\b(none|nan)\b", said)
    if path[0] == "evidence" and len(path) == 2:
        assert f"Not measured: {path[1]}." in said


def test_an_empty_report_says_so() -> None:
    tree = parsed({"llama4q": "0.1.0"})
    assert sections(tree) == ["Provenance"]
    assert "Not measured: likelihood, layers, retrieval." in tree.all("header")[0].text


def test_eval_knows_nothing_of_calibration() -> None:
    tree = parsed(reports.evaluated(tasks=()))
    assert sections(tree) == ["Predictions", "Layers", "Experts", "Size and memory", "Provenance"]
    assert "Calibration tokens by layer and expert" not in tables(tree)


def test_a_dense_model_has_no_experts() -> None:
    tree = parsed(reports.quantized(experts=0))
    assert "Experts" not in sections(tree)
    assert "Routing agreement by layer" not in tables(tree)
    assert "Errors of dense gate_up by layer" in tables(tree)


def test_layers_without_experts_have_no_row() -> None:
    report = reports.quantized(dense_every=2)
    rows = tables(parsed(report))["Load, original, tokens by layer and expert"]
    assert [row[0] for row in rows] == ["layer", "1", "3", "5", "7"]


def test_what_an_fp8_cache_cuts_off() -> None:
    name = "Keys and values beyond the FP8 cache by layer"
    report = reports.quantized(layers=3)
    assert name not in tables(parsed(report))
    for entry in report["evidence"]["layers"]:
        entry["cut"] = {"keys": 0.0, "values": entry["layer"] / 10_000}
    tree = parsed(report)
    assert tables(tree)[name][1:] == [
        ["0", "0.0000 %", "0.0000 %"], ["1", "0.0000 %", "0.0100 %"], ["2", "0.0000 %", "0.0200 %"],
    ]  # fmt: skip
    assert "At most 0.0000 % of a layer's keys and 0.0200 % of its values." in tree.text


# --- the top ---


def cards(tree: Node) -> dict[str, str]:
    return {
        node.all("h2")[0].text: " | ".join(line.text for line in node.all("p"))
        for node in tree.all("div")
        if node.attributes.get("class") == "card"
    }


def test_the_top_says_what_how_large_and_whether_it_fits() -> None:
    [top] = parsed(FULL).all("header")
    assert top.all("h1")[0].text == "Llama-4-Scout-17B-16E-Instruct, quantized to int4"
    assert (
        "65.04 GB instead of 217.29 GB, 3.34 times smaller. "
        "Fits one H100-80GB with a context of 131,072 tokens."
    ) in top.text
    larger = copy.deepcopy(FULL)
    larger["fit"]["fits"] = False
    assert "Does not fit one H100-80GB" in parsed(larger).all("header")[0].text
    compared = parsed(reports.evaluated()).all("h1")[0].text
    assert compared == "scout-int4, compared with Llama-4-Scout-17B-16E-Instruct"


def test_three_figures_with_their_intervals() -> None:
    report = copy.deepcopy(FULL)
    report["evidence"]["retrieval"] |= {
        "prompts": 60, "original": 0.95, "quantized": 0.9,
        "difference": {"value": -0.05, "low": -0.09, "high": -0.01, "p_value": 0.01},
    }  # fmt: skip
    assert cards(parsed(report)) == {
        "Divergence of predictions": (
            "0.0118 nats a token | 95 % interval 0.0111 to 0.0125 | Both models would choose the "
            "same next token in 95.4 % of 32,736 cases."
        ),
        "Perplexity": (
            "+0.24 % | 95 % interval −0.11 to +0.58 % | no difference seen | "
            "7.414 before, 7.432 after."
        ),
        "Retrieval from long text": (
            "−5.0 points | 95 % interval −9.0 to −1.0 points | worse | "
            "95.0 % before, 90.0 % after, of 60 prompts."
        ),
    }
    assert list(cards(parsed(reports.evaluated(tasks=()))))[2] == "Same next token"


@pytest.mark.parametrize(
    ("interval", "word"),
    [
        ([-0.01, 0.02], "no difference seen"),
        ([0.0, 0.02], "no difference seen"),
        ([0.01, 0.02], "worse"),
        ([-0.02, -0.01], "better"),
    ],
)
def test_a_difference_is_judged_by_its_interval(interval: list[float], word: str) -> None:
    report = copy.deepcopy(FULL)
    report["evidence"]["likelihood"]["intervals"]["perplexity_increase"] = interval
    assert f" | {word} | " in cards(parsed(report))["Perplexity"]
    rows = tables(parsed(report))["Predictions of both models"]
    assert rows[1][3] == word
    del report["evidence"]["likelihood"]["intervals"]["perplexity_increase"]
    assert "no interval measured" in cards(parsed(report))["Perplexity"]


def test_the_verdict_is_on_top() -> None:
    [top] = parsed(FULL, load_policy(None)).all("header")
    assert "Passed: all 11 limits of the accuracy gate." in top.text
    assert "open" not in top.all("details")[0].attributes
    failing = load_policy(None, ["likelihood.kl_mean.max=0.01"])
    [top] = parsed(FULL, failing).all("header")
    assert "Failed: 1 of 11 limits of the accuracy gate." in top.text
    assert "open" in top.all("details")[0].attributes
    rows = tables(top)["Limits of the accuracy gate"]
    assert rows[1] == ["KL, mean (nats per token)", "0.0118 [0.0111, 0.0125]", "≤ 0.01", "FAIL"]
    assert rows[2][-1] == "pass"
    assert any("look at layer " in item.text for item in top.all("li"))
    unknown = copy.deepcopy(FULL)
    unknown["evidence"]["retrieval"] = None
    [top] = parsed(unknown, load_policy(None)).all("header")
    assert "Not enough data: 3 of 11 limits of the accuracy gate." in top.text
    assert "accuracy gate" not in parsed(FULL).all("header")[0].text


# --- figures ---


def test_tables_hold_the_figures_of_the_report() -> None:
    found = tables(parsed(FULL))
    measured, records = FULL["evidence"]["layers"], FULL["layers"]
    errors = [number(entry["hidden_error"]) for entry in measured]
    assert [row[1] for row in found["Error of the hidden states by layer"][1:]] == errors
    for caption, key, source in (
        ("Calibration tokens by layer and expert", "expert_tokens", records),
        ("Load, original, tokens by layer and expert", "load_original", measured),
        ("Load, quantized, tokens by layer and expert", "load_quantized", measured),
    ):
        rows = [[int(cell.replace(",", "")) for cell in row[1:]] for row in found[caption][1:]]
        assert rows == [entry[key] for entry in source]
    histogram = FULL["evidence"]["likelihood"]["histogram"]
    held = [int(row[2].replace(",", "")) for row in found["Tokens by KL divergence"][1:]]
    assert sum(held) == sum(histogram["counts"])
    assert held[0] > 0
    assert held[-1] > 0


def test_change_of_load_is_of_an_even_share() -> None:
    report = reports.evaluated(layers=1, experts=4)
    [entry] = report["evidence"]["layers"]
    entry |= {"load_original": [100, 300, 0, 0], "load_quantized": [110, 290, 0, 0]}
    tree = parsed(report)
    rows = tables(tree)["Change of load in % of an even share"]
    assert rows[1] == ["0", "+10.0", "−10.0", "0.0", "0.0"]


def test_an_expert_that_stands_out_is_named() -> None:
    """By its distance from the median of its own layer; one that no token reached has no cell."""
    report = reports.evaluated(layers=2, experts=4)
    first, second = report["evidence"]["layers"]
    first["expert_gain"] = [0.97, 0.98, 1.1, None]
    second["expert_gain"] = [1.2, 1.21, 1.19, 1.2]
    tree = parsed(report)
    said = " ".join(p.text for p in tree.all("p"))
    told = "Expert 2 of layer 0 stands out most: 1.10, where the median of its layer is 0.980"
    assert f"{told}." in said
    rows = tables(tree)["Gain of each expert by layer"]
    assert rows[1] == ["0", "0.970", "0.980", "1.10", "–"]
    [drawing] = [s for s in tree.all("svg") if told in str(s.attributes["aria-label"])]
    assert sum(str(p.attributes["d"]).count("z") for p in drawing.all("path")) == 7


def test_a_layer_that_adds_too_much_is_named() -> None:
    report = reports.evaluated(layers=5)
    for entry, gain in zip(
        report["evidence"]["layers"], (0.98, 0.99, 1.3, 0.97, 0.98), strict=True
    ):
        entry["gain"] = gain
    said = " ".join(p.text for p in parsed(report).all("p"))
    assert "Layer 2 is farthest from the others with 1.30; the median is 0.980." in said


def test_other_settings_are_a_warning() -> None:
    report = reports.evaluated()
    assert "Rescues and warnings" not in sections(parsed(report))
    report["evidence"]["other_settings"] = [
        {"setting": "attn_temperature_tuning", "original": True, "quantized": False}
    ]
    [warning] = [p for p in parsed(report).all("p") if p.attributes.get("class") == "warning"]
    assert warning.text == (
        "The two config.json differ: attn_temperature_tuning is True, then False."
    )


def test_experts_with_too_few_tokens_are_marked() -> None:
    tree = parsed(FULL)
    [table] = [
        table for table in tree.all("table")
        if table.all("caption")[0].text == "Calibration tokens by layer and expert"
    ]  # fmt: skip
    poor = [cell.text for cell in table.all("td") if cell.attributes.get("class") == "poor"]
    assert poor == ["17", "17", "17"]
    dots = [p for p in tree.all("path") if p.attributes.get("class") == "dot poor"]
    assert [str(dot.attributes["d"]).count("M") for dot in dots] == [3]
    said = " ".join(p.text for p in tree.all("p"))
    assert "3 of 64 experts saw fewer than the 100 tokens" in said
    assert "3 experts saw too few tokens; give more" in said


def test_retrieval_is_pooled_over_prompts() -> None:
    """4 prompts with 4 right and 12 with 6: 10 of 16, not the mean of 100 % and 50 %."""
    report = reports.evaluated(tasks=("needle",))
    cell = {"length": 4096, "depth": 0.5, "prompts": 4, "original": 1.0, "quantized": 1.0}
    other = {**cell, "prompts": 12, "original": 1.0, "quantized": 0.5}
    longer = {**cell, "length": 131072, "depth": None, "quantized": 0.25}
    [task] = report["evidence"]["retrieval"]["tasks"]
    task["cells"] = [cell, other, longer]
    found = tables(parsed(report))
    assert found["original"] == [
        ["depth", "4k", "128k"], ["50 %", "100", "–"], ["any", "–", "100"],
    ]  # fmt: skip
    assert found["quantized"][1:] == [["50 %", "62", "–"], ["any", "–", "25"]]
    assert found["difference"][1:] == [["50 %", "−38", "–"], ["any", "–", "−75"]]


def test_each_task_has_its_own_tables() -> None:
    tree = parsed(FULL)
    folded = [node for node in tree.all("details") if node.attributes.get("class") == "fold"]
    assert [node.all("summary")[0].text.split()[0] for node in folded] == ["niah_single_1", "vt"]
    rows = tables(tree)["Retrieval by task"]
    assert [row[0] for row in rows[1:]] == ["niah_single_1", "vt", "all"]
    assert [row[0] for row in tables(tree)["original"]] == ["task", "niah_single_1", "vt"]


def test_the_worst_passages_are_readable() -> None:
    tree = parsed(FULL)
    passages = [item for item in tree.all("li") if item.all("blockquote")]
    assert len(passages) == 20
    assert [mark.text for mark in passages[0].all("mark")] == [" since"]
    assert [code.text for code in passages[0].all("code")] == ["␣since", "␣for"]
    assert passages[1].all("blockquote")[0].text.startswith('<script>alert("1")</script>')
    assert passages[2].all("mark")[0].text == "↵the"


def test_kinds_of_weights_are_told_apart() -> None:
    found = tables(parsed(reports.quantized(dense_every=2)))
    kinds = [
        "dense gate_up", "dense down", "shared expert gate_up", "shared expert down",
        "experts gate_up", "experts down",
    ]  # fmt: skip
    assert [c[10:-9] for c in found if c.startswith("Errors of ")] == kinds
    rows = found["Errors of experts down by layer"]
    assert [row[:2] for row in rows[1:]] == [[layer, "8"] for layer in "1357"]


def test_the_bar_of_the_gpu_adds_up() -> None:
    rows = tables(parsed(FULL))["Memory of one GPU"]
    assert [row[0] for row in rows[1:]] == [
        "weights", "KV cache of 131,072 tokens", "reserve of the engine", "free",
    ]  # fmt: skip
    assert sum(float(row[1].removesuffix(" GB")) for row in rows[1:]) == pytest.approx(78.14)
    short = copy.deepcopy(FULL)
    short["fit"] |= {"fits": False, "total_bytes": 80_138_340_016}
    said = " ".join(p.text for p in parsed(short).all("p"))
    assert "Does not fit: needs 80.14 GB, 2.00 GB more than the 78.14 GB" in said
    assert "free" not in [row[0] for row in tables(parsed(short))["Memory of one GPU"]]


def test_the_choice_is_told_part_by_part() -> None:
    tree = parsed(FULL)
    found, budget = tables(tree), FULL["budget"]
    parts = found["Precision by part"][1:]
    assert len(parts) == len(budget["parts"])
    for row, one in zip(parts, budget["parts"], strict=True):
        [option] = (option for option in one["options"] if option["scheme"] == one["scheme"])
        assert row[0] == f"{one['layer']}, {one['component'].replace('_', ' ')}"
        assert row[1] == one["scheme"] + (", as the recipe says" if one["pinned"] else "")
        assert row[3] == percent(option["error"], 2)
    rows = found["Divergence by bytes"][1:]
    assert [row[0] for row in rows] == ["best mix"] * 5 + ["int4", "int8", "this one"]
    assert rows[-1][2:] == [number(0.0072), number(FULL["evidence"]["likelihood"]["kl_mean"])]
    [section] = [
        node for node in tree.all("section") if node.attributes["aria-labelledby"] == "precision"
    ]
    assert "fits 2 × H100-80GB with 4 requests of 131,072 tokens" in section.text


def test_figures_that_are_not_finite_are_shown_as_such() -> None:
    report = copy.deepcopy(FULL)
    report["evidence"]["likelihood"] |= {"kl_mean": float("nan"), "kl_max": float("inf")}
    report["evidence"]["layers"][3]["hidden_error"] = float("nan")
    rows = {row[0]: row[1] for row in tables(parsed(report))["Predictions of both models"]}
    assert rows["KL, mean"] == "nan"
    assert rows["KL, largest"] == "inf"


def test_a_model_compared_with_itself() -> None:
    """No error anywhere: nothing to place on a logarithmic axis, no colour for a change."""
    report = reports.evaluated(layers=3, experts=4)
    likelihood = report["evidence"]["likelihood"]
    likelihood |= dict.fromkeys(("kl_mean", "kl_median", "kl_p99", "kl_p999", "kl_max"), 0.0)
    likelihood |= {"perplexity_increase": 0.0, "intervals": {"perplexity_increase": [0.0, 0.0]}}
    likelihood["histogram"]["counts"] = [0] * 72
    for entry in report["evidence"]["layers"]:
        entry |= {
            "hidden_error": 0.0, "gain": 1.0, "agreement": 1.0, "expert_gain": [1.0] * 4,
            "load_quantized": entry["load_original"],
        }  # fmt: skip
    tree = parsed(report)
    assert "0.00 % | 95 % interval 0.00 to 0.00 % | no difference seen" in cards(tree)["Perplexity"]
    assert "Tokens by KL divergence" not in tables(tree)
    [change] = [s for s in tree.all("svg") if "Change of load" in str(s.attributes["aria-label"])]
    assert {path.attributes["class"] for path in change.all("path")} == {"d0"}


# --- writing figures, placing them, colouring them ---


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0117703, "0.0118"), (0.00418, "0.00418"), (12.345, "12.3"), (24600.4, "24,600"),
        (0, "0.00"), (3.1e-7, "3.10e−07"), (-0.5, "−0.500"), (None, "?"),
    ],
)  # fmt: skip
def test_figures_have_three_digits(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_what_rounds_to_nothing_has_no_sign() -> None:
    assert [signed(value, 1) for value in (0.04, -0.04, 0.05001, -1.25, 3)] == [
        "0.0", "0.0", "+0.1", "−1.2", "+3.0",
    ]  # fmt: skip


def test_lengths_are_named_as_people_do() -> None:
    assert [length(n) for n in (512, 1024, 131072, 2**20, 1500)] == [
        "512", "1k", "128k", "1M", "1,500",
    ]  # fmt: skip


def test_an_axis_places_values() -> None:
    log = Axis(1e-4, 1.0, log=True)
    assert [log.place(value) for value in (0, 1e-4, 1e-2, 1.0, 7.0)] == pytest.approx(
        [0, 0, 0.5, 1, 1]
    )
    assert log.ticks() == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1])
    assert Axis(1e-3, 1e-2, log=True).ticks() == pytest.approx([0.001, 0.002, 0.005, 0.01])
    assert len(Axis(1e-12, 1.0, log=True).ticks()) <= 6
    assert Axis(95, 100).ticks() == pytest.approx([95, 96, 97, 98, 99, 100])
    assert logarithmic([0.003, 0.0, 0.02]) == Axis(0.001, 0.1, log=True)
    assert logarithmic([]) == Axis(1, 10, log=True)
    assert whole_ticks(numbered(range(48))) == [0, 8, 16, 24, 32, 40]
    assert whole_ticks(numbered([3])) == [3]
    assert [named(v) for v in (0.01, 1e-6, 1e5, 1000)] == ["0.01", "10⁻⁶", "10⁵", "1,000"]


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_every_figure_on_a_colour_is_readable(mode: str) -> None:
    """4.5 to 1 at least (WCAG 2, 1.4.3); and steps differ in brightness, not in hue alone."""
    rules = re.findall(r"background:(#\w+);fill:#\w+;color:(#\w+)", colours.css(mode))
    assert len(rules) == colours.LEVELS + 2 * colours.SIDE + 1
    assert min(colours.contrast(ink, ground) for ground, ink in rules) >= 4.5
    amounts = [colours.contrast(colour, "#000000") for colour, _ in rules[: colours.LEVELS]]
    assert amounts == sorted(amounts, reverse=mode == "light")
    differences = [colours.contrast(colour, "#000000") for colour, _ in rules[colours.LEVELS :]]
    for side in (differences[colours.SIDE :: -1], differences[colours.SIDE :]):
        assert side == sorted(side, reverse=mode == "light")


def test_contrast_is_that_of_wcag() -> None:
    """Its own examples: black on white, and #777777, the grey just too light for text."""
    assert colours.contrast("#000000", "#ffffff") == pytest.approx(21)
    assert colours.contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_words_and_lines_are_readable(mode: int) -> None:
    """Text 4.5 to 1, what is drawn 3 to 1 (WCAG 2, 1.4.3 and 1.4.11)."""
    style = (Path(colours.__file__).with_name("style.css")).read_text()
    names = dict(re.findall(r"--([\w-]+):(#\w+)", re.findall(r":root\{(.*?)\}", style, re.S)[mode]))
    named = {name: re.sub(r"^#(.)(.)(.)$", r"#\1\1\2\2\3\3", c) for name, c in names.items()}
    for ground in ("page", "card"):
        for ink in ("ink", "quiet", "blue"):
            assert colours.contrast(named[ink], named[ground]) >= 4.5, (ink, ground)
    for ink in ("blue", "teal", "grey"):
        assert colours.contrast(named[ink], named["card"]) >= 3, ink
    for side in ("good", "bad"):
        assert colours.contrast(named[side], named[f"{side}-page"]) >= 4.5
    assert colours.contrast(named["ink"], named["mark"]) >= 4.5


def test_a_difference_has_a_colour_unless_it_is_none() -> None:
    levels = [colours.difference_level(value, 0.5) for value in (-0.7, -0.01, 0.0, 0.001, 0.5)]
    assert levels == [-5, -1, 0, 1, 5]
