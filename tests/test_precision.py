"""Precision under a budget: what `quantize --fit` chooses, writes, keeps and refuses.

Authorities: the plan of what the chosen recipe makes, which is vLLM's own arithmetic to the byte
(tests/test_memory.py, tests/test_shards.py), and the files that were written.
"""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import cli
from calibrate.budget import CANDIDATES, Goal, choose, least
from calibrate.sensitivity import PartLoss, Sensitivity
from commands.passes import MEASURED
from llama4q.checkpoint import Checkpoint
from llama4q.config import parse_config, read_config
from llama4q.errors import UserError
from llama4q.gpus import Device, find_device
from llama4q.kv_cache import KVDtype
from llama4q.memory import Serving
from llama4q.predict import part_bytes, predicted_tensors
from llama4q.recipe import Override, Recipe, parse_recipe, recipe_from_json
from llama4q.schemes import BF16, SCHEMES
from llama4q.shards import sharded
from llama4q.weights import Component
from llama4q.writer import WORK

from . import sparse, test_inspect, tiny
from .test_bad_input import QUICK, VARIANT, mistake, with_tokenizer

REAL = {"scout": test_inspect.SCOUT, "maverick": test_inspect.MAVERICK}
NOTHING = Recipe("fit", "", {})
ERRORS = {"int4": 0.02, "int4-g64": 0.017, "int4-g32": 0.014, "fp8": 0.002, "int8": 0.0001}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer(tiny.write(tmp_path_factory.mktemp("precision") / "source", VARIANT))


def goal(model: str, serving: Serving, recipe: Recipe = NOTHING, device: str = "h100-80gb") -> Goal:
    config = parse_config(REAL[model], model)
    return Goal(config, test_inspect.bf16(REAL[model]), find_device(device), serving, recipe)


def made_up(wanted: Goal, seed: int = 0) -> Sensitivity:
    """Parts of which some lose ten times as much as others."""
    draw = random.Random(seed)
    parts = [
        PartLoss(index, component, 10 ** draw.uniform(-4, -3), ERRORS)
        for index, component in wanted.places()
    ]
    uniform = {name: (error / 0.02) ** 0.7 * 0.05 for name, error in ERRORS.items()}
    return Sensitivity(tuple(parts), uniform)


def planned(wanted: Goal, recipe: Recipe) -> Any:
    return wanted.plan(predicted_tensors(wanted.infos, wanted.config, recipe))


@pytest.mark.parametrize(
    ("model", "serving", "device"),
    [
        ("scout", Serving(131072, kv_dtype=KVDtype.FP8, positions=131072), "h100-80gb"),
        ("scout", Serving(131072, concurrency=4, kv_dtype=KVDtype.FP8), "h200-141gb"),
        ("scout", Serving(65536, cards=2), "h100-80gb"),
        ("maverick", Serving(65536, cards=4), "h100-80gb"),
    ],
)
def test_the_mix_fits_and_uses_what_there_is(model: str, serving: Serving, device: str) -> None:
    wanted = goal(model, serving, device=device)
    choice = choose(wanted, made_up(wanted))
    plan = planned(wanted, choice.recipe)
    assert plan.fits
    assert plan.weight_bytes == choice.weight_bytes  # to the byte
    assert plan.weight_room == choice.menu.room_bytes
    for part, option in zip(choice.menu.parts, choice.mix.options, strict=True):
        for other in part.options:  # nothing better would have fitted
            if other.error < option.error * 0.99:
                assert plan.weight_bytes + other.nbytes - option.nbytes > plan.weight_room


def test_more_room_loses_less() -> None:
    expected = []
    for device in ("h100-80gb", "h100-nvl-94gb", "h200-141gb", "b200-192gb"):
        wanted = goal("scout", Serving(8192), device=device)
        expected.append(choose(wanted, made_up(wanted)).expected)
    assert expected == sorted(expected, reverse=True)
    assert len(set(expected)) == len(expected)


def test_parts_that_lose_more_get_more() -> None:
    wanted = goal("scout", Serving(8192), device="h100-nvl-94gb")
    sensitivity = made_up(wanted)
    choice = choose(wanted, sensitivity)
    experts = [
        (part.divergence, SCHEMES[option.scheme].bits)
        for part, option in zip(sensitivity.parts, choice.mix.options, strict=True)
        if part.component is Component.EXPERTS
    ]
    bits = [bits for _, bits in sorted(experts)]
    assert bits == sorted(bits)
    assert len(set(bits)) > 1


@pytest.mark.parametrize("model", REAL)
def test_bytes_of_parts_add_up_to_those_of_any_recipe(model: str) -> None:
    wanted = goal(model, Serving(8192))
    schemes = [*CANDIDATES, BF16]
    for cards in (1, 8):
        rest, sizes = part_bytes(wanted.infos, wanted.config, schemes, cards)
        draw = random.Random(cards)
        mix = {place: draw.choice(schemes) for place in sizes}
        overrides = tuple(
            Override((index,), {component: scheme}) for (index, component), scheme in mix.items()
        )
        tensors = predicted_tensors(wanted.infos, wanted.config, Recipe("", "", {}, overrides))
        expected = sharded(wanted.config, tensors).on(cards)
        assert rest + sum(sizes[place][scheme] for place, scheme in mix.items()) == expected


def test_what_the_recipe_names_stays() -> None:
    pinned = parse_recipe(
        '[schemes]\nshared_expert = "fp8"\n[[override]]\nlayers = [0, -1]\nexperts = "int8"\n',
        "r.toml",
    )
    wanted = goal("scout", Serving(8192), pinned)
    chosen = choose(wanted, made_up(wanted)).recipe
    layers = wanted.config.num_layers
    for index in range(layers):
        assert chosen.scheme(Component.SHARED_EXPERT, index, layers).name == "fp8"
        if index in (0, layers - 1):
            assert chosen.scheme(Component.EXPERTS, index, layers).name == "int8"
    free = {chosen.scheme(Component.EXPERTS, index, layers).name for index in range(1, layers - 1)}
    assert "int4" in {name[:4] for name in free}


def test_the_recipe_says_what_is_usual() -> None:
    """Overrides name the layers that differ, none of them twice; cards and reports go by it."""
    wanted = goal("scout", Serving(8192), device="h100-nvl-94gb")
    choice = choose(wanted, made_up(wanted))
    counted: dict[Component, Counter[str]] = {}
    layers = wanted.config.num_layers
    for part, option in zip(choice.menu.parts, choice.mix.options, strict=True):
        counted.setdefault(part.component, Counter())[option.scheme] += 1
        assert choice.recipe.scheme(part.component, part.layer, layers).name == option.scheme
    for component, counts in counted.items():
        assert counts[choice.recipe.schemes[component].name] == max(counts.values())
    named = [layer for override in choice.recipe.overrides for layer in override.layers]
    assert len(named) == len(set(named)) < layers


def test_the_recipe_can_be_read_again() -> None:
    """From a report, which is how a run is repeated."""
    wanted = goal("scout", Serving(8192))
    recipe = choose(wanted, made_up(wanted)).recipe
    again = recipe_from_json(json.loads(json.dumps(recipe.to_json())), "report")
    assert dataclasses.replace(again, description=recipe.description) == recipe


# What is refused


@pytest.mark.parametrize(
    ("model", "recipe", "serving", "words"),
    [
        ("scout", '[schemes]\nexperts = "fp8"', Serving(8192), "the smallest mix that r allows"),
        ("scout", "[schemes]", Serving(1048576), "the smallest mix has 6"),
        ("maverick", "[schemes]", Serving(8192), "would do: 4 of these GPUs"),
    ],
)
def test_truthful_no(model: str, recipe: str, serving: Serving, words: str) -> None:
    wanted = goal(model, serving, parse_recipe(recipe, "r.toml"))
    with pytest.raises(UserError, match=words) as refusal:
        least(wanted)
    plan_short = str(refusal.value)
    assert "GB more than there is room for" in plan_short
    assert "\n" not in plan_short


def test_a_scheme_that_so_many_cards_cannot_cut(tmp_path: Path) -> None:
    """Three groups of 128 are not cut in two, six groups of 64 are."""
    source = tiny.write(tmp_path, dataclasses.replace(VARIANT, expert_size=384))
    pinned = parse_recipe('[schemes]\nexperts = "int4"\n', "r.toml")
    serving = Serving(64, cards=2)
    infos = Checkpoint(source).infos
    free = Goal(read_config(source), infos, find_device("h100-80gb"), serving, NOTHING)
    layers = free.config.num_layers
    assert least(free).scheme(Component.EXPERTS, 0, layers).name == "int4-g64"
    with pytest.raises(UserError, match="experts of layer 0 in int4 cannot be cut among 2 GPUs"):
        least(dataclasses.replace(free, recipe=pinned))


def test_a_context_that_fits_by_less_than_that() -> None:
    """The largest context of the smallest mix is where `least` begins to refuse."""
    wanted = goal("scout", Serving(8192))
    largest = planned(wanted, least(wanted)).largest_context
    least(dataclasses.replace(wanted, serving=Serving(largest)))
    with pytest.raises(UserError, match="the smallest mix"):
        least(dataclasses.replace(wanted, serving=Serving(largest + 1)))


def test_refused_before_anything_is_read(tmp_path: Path) -> None:
    """Headers are enough: the checkpoint has no tokenizer, and zeros for weights."""
    source = sparse.write(
        tmp_path / "maverick", REAL["maverick"], test_inspect.bf16(REAL["maverick"])
    )
    line = mistake("quantize", source, tmp_path / "out", "--fit", "h100-80gb")
    assert "the smallest mix has 2" in line
    line = mistake("quantize", source, tmp_path / "out", "--fit", "h100")
    assert "unknown GPU 'h100'; did you mean 'h100-80gb'" in line
    line = mistake("quantize", source, tmp_path / "out", "--fit", "h100-80gb", "--context", 10**8)
    assert "the model knows 1,048,576 positions" in line
    line = mistake("quantize", source, tmp_path / "out", "--fit", "h100-80gb", "--gpus", 3)
    assert "vLLM cannot divide this model into so many" in line
    assert not (tmp_path / "out").exists()


# The command


def size_for(source: Path, share: float) -> str:
    """A memory of which INT8 takes `share` of what it takes more than INT4."""
    config, infos = read_config(source), Checkpoint(source).infos
    device = Device("100GB", 100 * 10**9)
    wanted = Goal(config, infos, device, Serving(64), NOTHING)
    low, high = (
        wanted.plan(
            predicted_tensors(
                infos, config, Recipe("", "", dict.fromkeys(Component, SCHEMES[name]))
            )
        ).weight_bytes
        for name in ("int4", "int8")
    )
    room = low + share * (high - low)
    spare = wanted.plan(infos).weight_room - room
    return f"{(device.total_bytes - spare / wanted.serving.utilization) / 1e9:.9f}GB"


def fitted(source: Path, out: Path, size: str, *options: str) -> dict[str, Any]:
    command = ["quantize", str(source), str(out), *QUICK, "--fit", size, "--context", "64"]
    found: Result = CliRunner().invoke(cli.main, [*command, *options, "--json"])
    assert found.exit_code == 0, found.output
    report: dict[str, Any] = json.loads(found.stdout)
    return report


def test_the_result_fits(source: Path, tmp_path: Path) -> None:
    reports = [
        fitted(source, tmp_path / str(share), size_for(source, share)) for share in (0.3, 0.8)
    ]
    mixes = []
    for report, share in zip(reports, (0.3, 0.8), strict=True):
        written = sharded(read_config(source), Checkpoint(tmp_path / str(share)).infos).on(1)
        budget, fit = report["budget"], report["fit"]
        assert written == budget["weight_bytes"] <= budget["room_bytes"]
        assert fit["fits"]
        assert fit["weight_bytes"] == written
        assert budget["expected"] > 0
        mixes.append(
            [(part["layer"], part["component"], part["scheme"]) for part in budget["parts"]]
        )
    assert mixes[0] != mixes[1]
    assert reports[0]["budget"]["expected"] > reports[1]["budget"]["expected"]


def test_an_original_that_fits_is_left_alone(source: Path, tmp_path: Path) -> None:
    """Unless a recipe says what is wanted."""
    out = tmp_path / "out"
    options = (*QUICK, "--context", "64", "--fit", "16GB")
    line = mistake("quantize", source, out, *options)
    assert line.startswith("--fit 1 x 64 tokens on 16GB: the original fits as it is, 0.00 GB of ")
    assert not out.exists()
    found = CliRunner().invoke(
        cli.main, ["quantize", str(source), str(out), *options, "--recipe", "int4"]
    )
    assert found.exit_code == 0, found.output


def test_measured_once(source: Path, tmp_path: Path) -> None:
    """A run that was killed goes on with what it had measured, to the same mix."""
    out = tmp_path / "out"
    command = [
        "quantize", str(source), str(out), *QUICK,
        "--context", "64", "--fit", size_for(source, 0.5),
    ]  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", "import cli; cli.main()", *command])
    file = out / WORK / MEASURED
    while not file.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    found = CliRunner().invoke(cli.main, [*command, "--json"])
    assert found.exit_code == 0, found.output
    assert "measuring what parts lose" not in found.stderr
