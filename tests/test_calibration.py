"""Calibration as `quantize` does it: mixes, several lengths, the recipe's text, coverage.

tests/test_data.py has what is drawn; the authority on what the layers make of two lengths is
transformers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from calibrate.coverage import coverage
from llama4q.checkpoint import Checkpoint
from llama4q.config import read_config
from llama4q.recipe import Calibration, Method, Recipe, Solver, adjusted, load_recipe, parse_recipe

from . import runs, tiny
from .test_bad_input import VARIANT, refused, with_tokenizer
from .test_cli import interrupted_after, parsed, ran, weights
from .test_export import loaded

QUICK = (
    "--eval-windows", "1", "--eval-length", "64", "--lengths", "", "--dtype", "float32",
)  # fmt: skip
TWO_LENGTHS = "pocket:0.5,pocket:0.5x2048"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer(tiny.write(tmp_path_factory.mktemp("calibration") / "source", VARIANT))


# --- several lengths ---


@torch.inference_mode()
def test_two_lengths_from_the_command_line(source: Path, tmp_path: Path) -> None:
    """What is written loads in transformers without a key missing, and computes as we do."""
    out = tmp_path / "out"
    options = ("-c", TWO_LENGTHS, "--samples", 8, "--length", 512, *QUICK)
    report = parsed("quantize", source, out, *options)
    drawn = report["calibration"]
    assert drawn["source"] == report["recipe"]["calibration"]["text"] == TWO_LENGTHS
    assert drawn["mix"] == [
        {"source": "pocket", "share": 0.5, "samples": 4, "length": 512, "tokens": 2048},
        {"source": "pocket", "share": 0.5, "samples": 1, "length": 2048, "tokens": 2048},
    ]
    assert drawn["tokens"] == 4096
    assert [sum(layer["expert_tokens"]) for layer in report["layers"]] == [4096, 4096]
    inputs = runs.tokens(source, 2, 70, seed=3)
    model = loaded(out, AutoModelForCausalLM)
    ours = runs.our_logits(out, inputs)
    torch.testing.assert_close(model(input_ids=inputs).logits, ours, atol=1e-3, rtol=0)
    again = parsed("quantize", source, tmp_path / "again", *options)
    assert weights(tmp_path / "again") == weights(out)
    assert again["calibration"]["digest"] == drawn["digest"]


def test_expert_tokens_of_two_lengths_against_transformers(tmp_path: Path) -> None:
    """In the first layer both streams are the original's, so its router must agree."""
    variant = tiny.Variant(layers=1, rope_scaling=tiny.SCOUT_ROPE)
    source = tiny.write(tmp_path / "source", variant)
    batches = (runs.tokens(source, 4, 40, seed=7), runs.tokens(source, 3, 96, seed=8))
    report = runs.run(source, tmp_path / "out", calibration=batches)
    model = tiny.transformers_model(source)
    model = getattr(model, "model", model).language_model
    counts = torch.zeros(variant.experts, dtype=torch.int64)
    with torch.inference_mode():
        for batch in batches:
            routed = model(input_ids=batch, output_router_logits=True).router_logits[0]
            counts += routed.argmax(-1).flatten().bincount(minlength=variant.experts)
    assert report["layers"][0]["expert_tokens"] == counts.tolist()


def test_each_length_counts(tmp_path: Path) -> None:
    """Attention sees whole sequences: the same tokens in other lengths are another text."""
    source = tiny.write(tmp_path / "source", tiny.Variant(layers=2, rope_scaling=tiny.SCOUT_ROPE))
    short, long = runs.tokens(source, 4, 48, seed=7), runs.tokens(source, 2, 96, seed=8)
    given: dict[str, tuple[torch.Tensor, ...]] = {
        "both": (short, long),
        "short": (short,),
        "all short": (torch.cat([short, long.view(4, 48)]),),
    }
    written = set()
    for name, batches in given.items():
        runs.run(source, tmp_path / name, calibration=batches)
        written.add(weights(tmp_path / name))
    assert len(written) == 3


def test_a_run_with_two_lengths_is_resumed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals_restored: None
) -> None:
    """Another spelling of the same mix goes on; another share of it is another text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.txt").write_text("One two three four five six seven. " * 900)
    options = ("--samples", 8, "--length", 64, *QUICK)
    first = ("quantize", source, "out", "-c", "own.txt:1,own.txt:1x256", *options)
    parsed("quantize", source, "whole", "-c", "own.txt:1,own.txt:1x256", *options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calibrate.layer.pack", interrupted_after(9))
        assert ran(*first).exit_code == 130
    other = ran("quantize", source, "out", "-c", "own.txt:1,own.txt:9x256", *options)
    assert other.exit_code == 1
    assert "an unfinished run with another calibration tokens is here" in other.stderr
    found = ran("quantize", source, "out", "-c", "./own.txt:2,./own.txt:2x256", *options)
    assert found.exit_code == 0, found.stderr
    assert "layer 0, part 1 of 2 was written before: checked and replayed" in found.stderr
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


# --- the option and the recipe ---


def test_shares_and_lengths_change_what_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chat = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A list."}]
    rows = [{"messages": chat * number} for number in range(1, 30)]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    mixes = (
        "pocket",
        "pocket:3,chat.jsonl:1",
        "pocket:1,chat.jsonl:1",
        "pocket:1,chat.jsonl:1x32",
    )
    options = ("--samples", 8, "--length", 64, *QUICK)
    written, digests = set(), set()
    for number, mix in enumerate(mixes):
        report = parsed("quantize", source, f"out-{number}", "-c", mix, *options)
        written.add(weights(tmp_path / f"out-{number}"))
        digests.add(report["calibration"]["digest"])
    assert len(written) == len(digests) == len(mixes)


def test_a_recipe_may_name_its_text(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line wins over it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.txt").write_text("One two three four five six seven. " * 200)
    (tmp_path / "mine.toml").write_text(
        '[schemes]\nexperts = "int4"\n[calibration]\ntext = "own.txt:1,pocket:1"\nsamples = 4\n'
        "length = 64\n"
    )
    of_recipe = parsed("quantize", source, "a", "--recipe", "mine.toml", *QUICK)["calibration"]
    assert [part["source"] for part in of_recipe["mix"]] == ["own.txt", "pocket"]
    options = ("--recipe", "mine.toml", "--calibration", "pocket", *QUICK)
    of_option = parsed("quantize", source, "b", *options)["calibration"]
    assert of_option["source"] == "pocket"
    assert of_option["digest"] != of_recipe["digest"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("pocket:0,pocket:1", "a share of 0; shares are numbers above 0"),
        ("pocket:nan,pocket:1", "a share of nan; shares are numbers above 0"),
        ("pocket:1,pocket", "'pocket' has no share; write each as SOURCE:SHARE"),
        ("pocket:1,pocket:1x4097", "calibration sequences of 4097 tokens, but the model reads at"),
        ("pocket:1,pocket:9999x4096", "text 'pocket': "),
        ("pocket:1,missing.txt:1", "text 'missing.txt': no such file"),
    ],
)
def test_a_mix_with_a_mistake(spec: str, words: str, source: Path) -> None:
    assert words in refused(source, "--calibration", spec, "--samples", "2000", "--length", "2048")


# --- coverage ---

MIXED_LAYERS = """
[schemes]
experts = "int4"
[[override]]
layers = [1]
experts = "bf16"
"""


@pytest.fixture(scope="module")
def scout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 inputs to gate and up, 256 to down."""
    return tiny.write(tmp_path_factory.mktemp("scout"), tiny.Variant(layers=2, expert_size=256))


def covered(
    scout: Path, counts: Sequence[Sequence[int]], recipe: Recipe, samples: int = 10
) -> dict[str, Any] | None:
    layers = [
        {"layer": layer, "expert_tokens": list(tokens)} for layer, tokens in enumerate(counts)
    ]
    return coverage(adjusted(recipe, samples=samples), read_config(scout), layers)


def test_poor_coverage_says_how_many_the_worst_and_a_remedy(scout: Path) -> None:
    found = covered(scout, [[256, 255, 300, 900], [256, 100, 30, 400]], load_recipe("int4"))
    assert found is not None
    assert (found["needed"], found["experts"]) == (256, 8)
    assert found["poor"] == [{"layer": 0, "experts": [1]}, {"layer": 1, "experts": [1, 2]}]
    assert found["worst"] == {"layer": 1, "expert": 2, "tokens": 30}
    assert found["warning"] == (
        "3 of 8 experts saw fewer calibration tokens than the 256 inputs of their widest matrix, "
        "expert 2 of layer 1 only 30; their codes lean on the layer's pooled statistics; "
        "choose the text among more of it, --candidates 4, or calibrate on more: "
        "--samples 86"  # 10 * 256 / 30 = 85.3
    )


@pytest.mark.parametrize(
    ("worst", "words"),
    [
        (16, "--samples 160"),
        (15, "other or mixed text: --calibration a:0.6,b:0.4"),
        (0, "other or mixed text: --calibration a:0.6,b:0.4"),
    ],
)
def test_sixteen_times_the_samples_is_the_most(worst: int, words: str, scout: Path) -> None:
    found = covered(scout, [[worst, 300, 300, 300]], load_recipe("int4"))
    assert found is not None
    assert found["warning"].endswith(words)


def test_good_coverage_warns_of_nothing(scout: Path) -> None:
    found = covered(scout, [[256] * 4, [700] * 4], load_recipe("int4"))
    assert found is not None
    assert found["warning"] is None
    assert found["poor"] == []
    assert found["worst"] == {"layer": 0, "expert": 0, "tokens": 256}


def test_only_codes_that_depend_on_tokens_count(scout: Path) -> None:
    counts = [[256] * 4, [0] * 4]
    found = covered(scout, counts, parse_recipe(MIXED_LAYERS, "r.toml"))
    assert found is not None
    assert (found["experts"], found["warning"]) == (4, None)
    fp8 = covered(scout, counts, load_recipe("fp8"))
    assert fp8 is not None
    assert fp8["experts"] == 8
    rounded = dataclasses.replace(load_recipe("int4"), solver=Solver(method=Method.RTN))
    assert covered(scout, counts, rounded) is None
    alone = dataclasses.replace(load_recipe("int4"), solver=Solver(shrinkage=False))
    found = covered(scout, counts, alone)
    assert found is not None
    assert "their codes fit those few tokens alone" in found["warning"]


def test_quantize_warns_at_its_end(source: Path, tmp_path: Path) -> None:
    """On stderr, whatever stdout holds, and in the report; the samples it names are enough."""
    few = ("quantize", source, tmp_path / "few", "--samples", 2, "--length", 64, *QUICK)
    found = ran(*few, "--json")
    assert found.exit_code == 0
    report = json.loads(found.stdout)
    warning = report["calibration"]["coverage"]["warning"]
    counts = [tokens for layer in report["layers"] for tokens in layer["expert_tokens"]]
    poor = sum(tokens < 128 for tokens in counts)
    assert warning.startswith(f"{poor} of 4 experts saw fewer calibration tokens than the 128 ")
    assert found.stderr.splitlines()[-1] == f"Warning: {warning}"
    samples = int(warning.partition("--samples ")[2])
    assert samples == -(-2 * 128 // min(counts))
    enough = ("quantize", source, tmp_path / "enough", "--samples", 4 * samples, *few[5:])
    found = ran(*enough)
    assert found.exit_code == 0
    assert "Warning" not in found.stderr
    assert "poor" not in found.stdout
    assert (
        json.loads((tmp_path / "enough" / "report.json").read_text())["calibration"]["coverage"][
            "poor"
        ]
        == []
    )


def test_a_dense_model_has_no_experts_to_cover(tmp_path: Path) -> None:
    dense = dataclasses.replace(tiny.GUARD, layers=2, vocab_size=2048)
    folder = with_tokenizer(tiny.write(tmp_path / "source", dense))
    out = tmp_path / "out"
    found = ran("quantize", folder, out, "--samples", 1, "--length", 64, *QUICK)
    assert found.exit_code == 0, found.stderr
    assert "Warning" not in found.stderr
    assert json.loads((out / "report.json").read_text())["calibration"]["coverage"] is None
    assert Checkpoint(out).names()


def test_the_default_text_is_the_shipped_one() -> None:
    assert Calibration().text == "pocket"
    assert load_recipe("int4").calibration.text == "pocket"
