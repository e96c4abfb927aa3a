"""Benchmarks that look into the product by name: what they look for must be there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from benchmarks import written_bytes
from benchmarks.layer import OUTER, PHASES, phase_of
from calibrate.work import Phase
from llama4q.recipe import load_recipe, shipped_recipes

from . import tiny

ROOT = Path(__file__).resolve().parent.parent
PLACES = [place for places, _ in PHASES.values() for place in places]


@pytest.mark.parametrize(("file", "function"), PLACES)
def test_the_phases_of_a_layer_are_those_of_the_code(file: str, function: str) -> None:
    tree = ast.parse((ROOT / file).read_text())
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert not function or function in names


def test_every_amount_of_the_plan_is_in_one_phase() -> None:
    counted = [phase for _, phases in PHASES.values() for phase in phases]
    assert sorted(counted) == sorted(Phase)
    assert set(OUTER) <= set(PHASES)


def test_what_no_phase_names_is_the_rest() -> None:
    assert phase_of(None) == "the rest"


@pytest.mark.parametrize("recipe", shipped_recipes())
@pytest.mark.parametrize("variant", [tiny.SCOUT, tiny.MAVERICK])
def test_what_is_written_piece_by_piece_is_as_predicted(
    variant: tiny.Variant, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The scaled form of a run with the true shapes: files made by packing and safetensors."""
    raw = tiny.config_json(variant)
    del raw["vision_config"]  # make_giant's checkpoints have none
    assert written_bytes.compare(raw, load_recipe(recipe)) == []
    found = re.search(r"predicted ([\d,]+) bytes .* written ([\d,]+) in", capsys.readouterr().out)
    assert found is not None
    assert found[1] == found[2]
