"""Recipes: what a TOML file means, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama4q.config import read_config
from llama4q.errors import UserError
from llama4q.recipe import (
    Method,
    adjusted,
    check_recipe,
    load_recipe,
    parse_recipe,
    planned,
    shipped_recipes,
)
from llama4q.weights import Component

from . import tiny

MIXED = """
name = "mine"
[schemes]
experts = "int4"
o_proj = "fp8"
[[override]]
layers = [0, -1]
experts = "fp8"
[[override]]
layers = [3]
experts = "bf16"
[calibration]
text = "owner/name:0.5,pocket:0.5x8192"
samples = 3
[solver]
damping = 1
method = "rtn"
"""


def test_what_a_file_means() -> None:
    recipe = parse_recipe(MIXED, "mine.toml")
    names = [recipe.scheme(Component.EXPERTS, layer, 4).name for layer in range(4)]
    assert names == ["fp8", "int4", "int4", "bf16"]  # the last override that names a layer holds
    assert recipe.scheme(Component.O_PROJ, 2, 4).name == "fp8"
    assert recipe.scheme(Component.DENSE, 2, 4).name == "bf16"
    assert (recipe.calibration.samples, recipe.calibration.length) == (3, 2048)
    assert recipe.calibration.text == "owner/name:0.5,pocket:0.5x8192"
    assert (recipe.solver.damping, recipe.solver.method) == (1.0, Method.RTN)


def test_the_command_line_wins_over_the_file() -> None:
    recipe = adjusted(parse_recipe(MIXED, "mine.toml"), samples=9, seed=4, method="gptq")
    assert (recipe.calibration.samples, recipe.calibration.seed) == (9, 4)
    assert recipe.solver.method is Method.GPTQ
    assert recipe.calibration.length == 2048
    assert recipe.calibration.text == "owner/name:0.5,pocket:0.5x8192"
    assert adjusted(recipe, text="a.txt").calibration.text == "a.txt"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[schemes]\nexpert = 'int4'", "unknown key 'expert' in [schemes]; did you mean 'experts'"),
        ("[schemes]\nexperts = 'int5'", "unknown scheme 'int5' for experts"),
        ("[schemas]\nexperts = 'int4'", "unknown key 'schemas'; did you mean 'schemes'"),
        ("name = 'x'", "no [schemes]"),
        ("[schemes]\n[solver]\ndampening = 0.1", "did you mean 'damping'"),
        ("[schemes]\n[solver]\ndamping = -1", "is below 0"),
        ("[schemes]\n[solver]\nact_order = 1", "is no bool"),
        ("[schemes]\n[solver]\nmethod = 'awq'", "is none of gptq, rtn"),
        ("[schemes]\n[calibration]\nsamples = 'x'", "is no int"),
        ("[schemes]\n[calibration]\ntext = 3", "is no str"),
        ("[schemes]\n[[override]]\nexperts = 'int4'", "needs layers"),
        ("[schemes", "not valid TOML"),
    ],
)
def test_refusals_name_the_key_and_the_nearest(text: str, words: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_recipe(text, "mine.toml")
    assert str(refused.value).startswith("mine.toml: ")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_recipes_that_do_not_go_with_a_model(tmp_path: Path) -> None:
    scout = read_config(tiny.write(tmp_path / "scout", tiny.SCOUT))
    guard = read_config(tiny.write(tmp_path / "guard", tiny.GUARD))
    only_experts = parse_recipe("[schemes]\nexperts = 'int4'", "r.toml")
    check_recipe(only_experts, scout)
    with pytest.raises(UserError, match="quantizes nothing"):
        check_recipe(only_experts, guard)
    far = "[schemes]\nexperts = 'int4'\n[[override]]\nlayers = [4]\nexperts = 'fp8'"
    with pytest.raises(UserError, match=r"layer 4 in \[\[override\]\], but the model has 4"):
        check_recipe(parse_recipe(far, "r.toml"), scout)
    narrow = read_config(tiny.write(tmp_path / "narrow", tiny.Variant(expert_size=96)))
    with pytest.raises(UserError, match=r"down_proj has 96 inputs, no multiple .* 128"):
        check_recipe(only_experts, narrow)
    check_recipe(parse_recipe("[schemes]\nexperts = 'int4-g32'", "r.toml"), narrow)


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_quantize_every_kind_of_model(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    for kind in (tiny.SCOUT, tiny.MAVERICK, tiny.GUARD):
        config = read_config(tiny.write(tmp_path, kind))
        check_recipe(recipe, config)
        for layer in range(config.num_layers):
            schemes = {
                scheme.name
                for linear, scheme in planned(recipe, config, layer)
                if linear.component is Component.EXPERTS
            }
            assert len(schemes) <= 1  # one scheme for all experts of a layer


def test_unknown_names_show_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'int4-fp8'"):
        load_recipe("int4_fp8")
    (tmp_path / "mine.toml").write_text(MIXED)
    assert load_recipe(str(tmp_path / "mine.toml")).name == "mine"
