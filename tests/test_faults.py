"""A fault that is planted in one layer fails the default policy, and the verdict names the layer.

The authority is the hand that planted it. On the pocket model, rounded to nearest.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.faults import Fault, plant, scales, swap
from evals.evaluation import compare
from evals.gate import Answer, check
from evals.policy import load_policy
from evals.questions import Needles, Questions, ask
from llama4q.checkpoint import Checkpoint
from llama4q.config import read_config
from llama4q.hub import POCKET_MODEL
from llama4q.recipe import Method, Solver, load_recipe
from llama4q.text import load_tokenizer
from llama4q.weights import LayerReader

from . import runs


@pytest.fixture(scope="module")
def questions() -> Questions:
    return ask(load_tokenizer(POCKET_MODEL), None, 8, 513, Needles([], [], 1))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "sound"
    recipe = dataclasses.replace(load_recipe("int4"), solver=Solver(method=Method.RTN))
    runs.run(POCKET_MODEL, folder, recipe)
    return folder


@pytest.fixture(scope="module")
def baseline(sound: Path, questions: Questions) -> Mapping[str, Any]:
    return measured(sound, questions)


def measured(folder: Path, questions: Questions) -> dict[str, Any]:
    original, quantized = (
        LayerReader(Checkpoint(side), read_config(side), torch.float32)
        for side in (POCKET_MODEL, folder)
    )
    return {"evidence": compare(original, quantized, questions, lambda: None)}


@pytest.mark.parametrize(
    ("layer", "fault"),
    [
        (0, scales(0, 2, 1.2)),
        (3, scales(3, 2, 1.2)),
        (7, scales(7, 2, 1.2)),
        (0, swap(0, 1, 4)),
        (3, swap(3, 1, 4)),
        (7, swap(7, 1, 4)),
    ],
)
def test_a_planted_fault_is_named_by_its_layer(
    layer: int,
    fault: Fault,
    sound: Path,
    baseline: Mapping[str, Any],
    questions: Questions,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "faulty"
    shutil.copytree(sound, folder)
    assert plant(folder, fault)
    verdict = check(measured(folder, questions), load_policy(None), baseline)
    assert verdict.answer is Answer.FAIL
    looks = {line.look for line in verdict.lines if line.answer is Answer.FAIL}
    assert all(look.startswith(f"layer {layer}: hidden_error jumps") for look in looks)
    assert looks


def test_the_same_checkpoint_once_more_does_not_fail(
    sound: Path, baseline: Mapping[str, Any], questions: Questions
) -> None:
    verdict = check(measured(sound, questions), load_policy(None), baseline)
    answers = {line.answer for line in verdict.lines if line.limit.kind.needs_baseline}
    assert answers == {Answer.PASS}


def test_only_what_was_named_is_changed(sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "faulty"
    shutil.copytree(sound, folder)
    plant(folder, swap(3, 1, 4))
    plant(folder, scales(3, 2, 2.0))
    before, after = Checkpoint(sound), Checkpoint(folder)
    assert after.names() == before.names()
    one, two, four = (f"layers.3.feed_forward.experts.{expert}." for expert in (1, 2, 4))
    for name in before.names():
        expected = before.get(name)
        if one in name:
            expected = before.get(name.replace(one, four))
        elif four in name:
            expected = before.get(name.replace(four, one))
        elif two in name and name.endswith("weight_scale"):
            expected = expected * 2
        assert torch.equal(after.get(name), expected), name
