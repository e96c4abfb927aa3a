"""The card against huggingface_hub's own reading and validation, the report, and a Markdown parser.

Validation goes over a socket to a Hub on 127.0.0.1, from a process of its own.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from cli import main
from evals.model_card import Subject, model_card
from evals.serving import commands
from llama4q.config import ModelConfig, parse_config
from llama4q.fit import fit_line
from llama4q.gpus import find_device
from llama4q.licence import NOTICE_LINE, Card, Licence
from llama4q.memory import MemoryPlan, Serving, make_plan
from llama4q.shards import Cut, Piece, ShardedWeights

from . import publishable, reports, test_inspect
from .hub_home import Home
from .hub_server import Hub
from .test_card import tables

LLAMA4 = Subject(
    f"me/{publishable.NAME}",
    Licence("other", "llama4", "LICENSE", community=True),
    publishable.BASE_MODEL,
    multimodal=True,
)
OTHER = Subject("me/small-int4", Licence("apache-2.0"), None, multimodal=False)
FULL = publishable.report()
VALIDATE = """
import sys
from huggingface_hub import ModelCard
try:
    ModelCard.load(sys.argv[1]).validate()
except ValueError as error:
    sys.exit("refused: " + str(error))
"""


def validated(text: str, folder: Path) -> str:
    """What huggingface_hub's validation says of a card; nothing when it is valid."""
    (folder / "card.md").write_text(text)
    with Hub({}) as hub:
        done = Home(folder / "hf", hub.address).run(VALIDATE, str(folder / "card.md"))
        assert [path for _, path, _ in hub.requests] == ["/api/validate-yaml"]
    assert "Traceback" not in done.stderr
    return done.stderr


# --- metadata ---


@pytest.mark.parametrize("subject", [LLAMA4, OTHER], ids=["llama4", "other"])
def test_it_validates(subject: Subject, tmp_path: Path) -> None:
    assert validated(model_card(FULL, subject), tmp_path) == ""


def test_validation_can_fail(tmp_path: Path) -> None:
    text = model_card(FULL, LLAMA4)
    wrong = text.replace("license_name: llama4\n", "").replace("quantized\n---", "smaller\n---")
    said = validated(wrong, tmp_path)
    assert "license_name" in said
    assert "base_model_relation" in said


def test_metadata_as_huggingface_hub_reads_it() -> None:
    said = ModelCard(model_card(FULL, LLAMA4)).data.to_dict()
    tags = said.pop("tags")
    assert said == {
        "license": "other", "license_name": "llama4", "license_link": "LICENSE",
        "base_model": publishable.BASE_MODEL, "base_model_relation": "quantized",
        "language": ["en", "de"], "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
    }  # fmt: skip
    assert {"llama-4", "quantized", "compressed-tensors", "int4", "vllm", "sglang"} <= set(tags)
    other = ModelCard(model_card(FULL, OTHER)).data.to_dict()
    assert other["license"] == "apache-2.0"
    assert not {"license_name", "base_model", "base_model_relation"} & set(other)


# --- what it says ---


def test_what_the_licence_wants_to_be_said() -> None:
    body = Card(model_card(FULL, LLAMA4)).body
    title, opening, *_ = body.strip().split("\n\n")
    assert title == f"# {publishable.NAME}"
    assert opening.startswith("**Built with Llama.** ")
    assert "This model was modified" in opening
    assert NOTICE_LINE in body
    assert "European Union" in body
    text_only = Subject(LLAMA4.repo, LLAMA4.licence, LLAMA4.base_model, multimodal=False)
    assert "European Union" not in model_card(FULL, text_only)
    for words in ("Built with Llama", "Meta Platforms", "European Union"):
        assert words not in model_card(FULL, OTHER)


def test_figures_are_the_report_s() -> None:
    report = copy.deepcopy(FULL)
    report["evidence"]["retrieval"]["tasks"][0] |= {
        "prompts": 60, "original": 0.95, "quantized": 0.9,
        "difference": {"value": -0.05, "low": -0.09, "high": -0.01, "p_value": 0.01},
    }  # fmt: skip
    glance, comparison, by_task, by_length, changed, *_ = tables(model_card(report, LLAMA4))
    assert ["Size", "65.04 GB, the original has 217.29 GB"] in glance
    assert comparison[2] == [
        "perplexity",
        "7.414",
        "7.432",
        "+0.24 % (−0.11 to +0.58), no difference seen",
    ]
    assert by_task[1] == ["niah_single_1", "60", "95.0 %", "90.0 %", "−5.0 points (−9.0 to −1.0)"]
    assert [row[0] for row in by_length[1:]] == ["4,096", "8,192", "16,384"]
    assert ["routed experts", "INT4, groups of 128", "193.27 GB", "49.90 GB"] in changed
    assert ["attention", "BF16, as in the original", "6.04 GB", "6.04 GB"] in changed


def test_expert_coverage() -> None:
    poor = reports.quantized(poor=3)
    text = model_card(poor, LLAMA4)
    assert "3 of them saw fewer than the 100" in text
    *_, layers, _ = tables(text)
    assert len(layers) == 1 + 8
    fewest = min(poor["layers"][0]["expert_tokens"])
    assert layers[1][:2] == ["0", f"{fewest:,}"]
    assert "routed experts was" not in model_card(reports.quantized(experts=0), LLAMA4)


def test_provenance_is_whole() -> None:
    text = model_card(FULL, LLAMA4)
    for fact in (
        FULL["source"]["revision"], "c" * 64, "d" * 64, "f" * 64, "torch 2.13.0", "seed 0",
        "2026-01-01T00:00:00+00:00", FULL["command"], f"llama4q reproduce me/{publishable.NAME}",
    ):  # fmt: skip
        assert fact in text, fact
    [recipe] = re.findall(r"```json\n(.*?)\n```", text, re.DOTALL)
    assert json.loads(recipe) == FULL["recipe"]


def test_nothing_of_a_report_becomes_markup() -> None:
    evil = 'a|b*c*`d`\n# <script src="x">[e](f)\n```\n</details>'
    report = copy.deepcopy(FULL)
    report["calibration"]["source"] = report["calibration"]["mix"][0]["source"] = evil
    report["command"] = report["kernel"] = report["recipe"]["name"] = evil
    report["source"] |= {"name": evil, "revision": evil}
    report["quantized"]["name"] = evil
    report["evidence"]["retrieval"]["tasks"][0]["task"] = evil
    report["rescues"] = [{"tensor": evil, "kind": evil, "detail": evil}]
    subject = Subject(None, Licence(evil, evil), None, multimodal=True)
    rendered = (
        MarkdownIt("commonmark").enable("table").render(Card(model_card(report, subject)).body)
    )
    plain = MarkdownIt("commonmark").enable("table").render(Card(model_card(FULL, OTHER)).body)
    kinds = set(re.findall(r"</?\w+", plain))
    assert set(re.findall(r"</?\w+", rendered)) <= kinds
    assert rendered.count("<h1>") == 1
    assert rendered.count("</details>") == 2
    assert 'href="f"' not in rendered


@pytest.mark.parametrize(
    "path",
    [
        *((key,) for key in FULL),
        *(("evidence", key) for key in FULL["evidence"]),
        *(("source", key) for key in FULL["source"]),
        *(("recipe", key) for key in FULL["recipe"]),
        *(("calibration", key) for key in FULL["calibration"]),
    ],
    ids=".".join,
)
def test_anything_may_be_missing(path: tuple[str, ...]) -> None:
    report: dict[str, Any] = copy.deepcopy(FULL)
    *parents, last = path
    found = report
    for key in parents:
        found = found[key]
    del found[last]
    text = model_card(report, LLAMA4)
    assert "None" not in text.replace("None saw fewer", "").replace("None of", "")
    assert ModelCard(text).data.to_dict()["base_model"] == publishable.BASE_MODEL


def test_a_chosen_precision_and_an_fp8_cache_are_told() -> None:
    report = {**FULL, "budget": reports.quantized(fitted=True)["budget"]}
    report["recipe"] = {**FULL["recipe"], "kv_cache": "fp8"}
    text = model_card(report, LLAMA4)
    assert "the model fits 2 × H100-80GB with 4 requests of 131,072 tokens and loses least" in text
    assert "each layer has a calibrated scale for both" in text
    plain = model_card(FULL, LLAMA4)
    assert "loses least" not in plain
    assert "calibrated scale" not in plain


# --- serving: the plan of llama4q/memory.py, which is vLLM's arithmetic, is the authority ---


def fit(config: ModelConfig, weights: int, context: int) -> dict[str, Any]:
    """A report's fit line."""
    return fit_line(config, shared(weights), find_device("h100-80gb"), Serving(context))


def shared(weights: int) -> ShardedWeights:
    return ShardedWeights({Piece(Cut.EVEN, weights, 1): 1}, (1, 2, 4, 8))


def planned(config: ModelConfig, weights: int, context: int, cards: int) -> MemoryPlan:
    return make_plan(
        config, shared(weights), find_device("h100-80gb"), Serving(context, cards=cards)
    )


@pytest.mark.parametrize(
    ("weights", "context", "cards"),
    [(64_900_000_000, 8192, 1), (64_900_000_000, 131072, 1), (114_700_000_000, 131072, 2),
     (215_000_000_000, 131072, 4), (400_000_000_000, 131072, 8)],
)  # fmt: skip
def test_commands_are_sized_by_the_plan(weights: int, context: int, cards: int) -> None:
    config = parse_config(test_inspect.SCOUT, "scout")
    line = fit(config, weights, context)
    expected = min(context, line["largest_context"]) if cards == 1 else context
    assert (line["served"]["cards"], line["served"]["context"]) == (cards, expected)
    assert planned(config, weights, expected, cards).fits
    if cards > 1:
        assert not planned(config, weights, context, cards // 2).fits
    vllm, sglang, _ = commands({**FULL, "fit": line}, "me/x", True)
    assert f"--max-model-len {expected}" in vllm.lines[1]
    assert ("--tensor-parallel-size" in vllm.lines[1]) == (cards > 1)
    assert f"--context-length {expected}" in sglang.lines[1]


def test_what_no_number_of_cards_holds() -> None:
    config = parse_config(test_inspect.SCOUT, "scout")
    line = fit(config, 800_000_000_000, 131072)
    assert line["served"] is None
    assert "more than 8 × H100 80GB" in model_card({**FULL, "fit": line}, LLAMA4)


@pytest.mark.parametrize(
    ("scheme", "engines"),
    [
        ("int4", ["vLLM", "SGLang", "transformers"]),
        ("fp8", ["vLLM", "SGLang", "transformers"]),
        ("int8", ["vLLM", "transformers"]),
        ("int4-g64", ["vLLM", "transformers"]),
        ("int3", ["transformers"]),
        ("bnb-nf4", ["transformers"]),
    ],
)
def test_engines_that_take_a_scheme(scheme: str, engines: list[str]) -> None:
    """As docs/format.md has them."""
    report = copy.deepcopy(FULL)
    report["recipe"]["schemes"] = {"experts": "int4" if scheme == "int8" else scheme}
    report["recipe"]["overrides"] = [{"layers": [0], "experts": scheme}]
    found = list(commands(report, "me/x", True))
    assert [command.engine for command in found] == engines
    for command in found:
        option = {"vLLM": "--moe-backend triton", "SGLang": "--moe-runner-backend triton"}
        assert option.get(command.engine, "from_pretrained") in "\n".join(command.lines)
    assert ("bitsandbytes" in found[-1].remark) == (scheme == "bnb-nf4")


# --- the command ---


def test_card_prints_it(tmp_path: Path) -> None:
    folder = publishable.scout(tmp_path / "scout-int4")
    done = CliRunner().invoke(main, ["card", str(folder), "--repo", str(LLAMA4.repo)])
    assert done.exit_code == 0
    assert done.stdout == model_card(FULL, LLAMA4)
    unnamed = CliRunner().invoke(main, ["card", str(folder), "--base-model", "a/b"]).stdout
    assert "\n# scout-int4\n" in unnamed
    assert "\nbase_model: a/b\n" in unnamed


def test_card_of_a_folder_without_a_report(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["card", str(tmp_path)])
    assert done.exit_code == 1
    assert "report.json: no such report" in done.output
