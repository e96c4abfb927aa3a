"""A fault that is planted in one layer fails the default policy, and the verdict names the layer.

The authority is the hand that planted it; `alone`: without a baseline, too. On the pocket model,
rounded to nearest.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.faults import Fault, plant, scales, swap
from evals.evaluation import compare
from evals.figures import Section
from evals.gate import Answer, check
from evals.policy import load_policy
from evals.questions import Questions, ask
from evals.tasks import Ladder
from llama4q.checkpoint import Checkpoint
from llama4q.config import read_config
from llama4q.hub import POCKET_MODEL
from llama4q.recipe import Method, Solver, load_recipe
from llama4q.tokens import load_tokenizer
from llama4q.weights import LayerReader

from . import runs


@pytest.fixture(scope="module")
def questions() -> Questions:
    return ask(load_tokenizer(POCKET_MODEL), None, 8, 513, Ladder([], [], 0))


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
    ("layer", "fault", "alone"),
    [
        (0, scales(0, 2, 1.05), False),  # what the shared expert adds there hides it
        (3, scales(3, 2, 1.05), True),
        (7, scales(7, 2, 1.05), True),
        (0, swap(0, 1, 4), True),
        (3, swap(3, 1, 4), True),
        (7, swap(7, 1, 4), True),
    ],
)
def test_a_planted_fault_is_named_by_its_layer(
    layer: int,
    fault: Fault,
    alone: bool,
    sound: Path,
    baseline: Mapping[str, Any],
    questions: Questions,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "faulty"
    shutil.copytree(sound, folder)
    assert plant(folder, fault)
    found = measured(folder, questions)
    for before in (None, baseline) if alone else (baseline,):
        verdict = check(found, load_policy(None), before)
        assert verdict.answer is Answer.FAIL
        looks = [line.look for line in verdict.lines if line.answer is Answer.FAIL]
        assert [look for look in looks if not look.startswith(f"layer {layer}")] == []
        named = [look for look in looks if re.search(rf"layer {layer}, expert [124]: gain", look)]
        assert named == looks or not alone


def test_the_same_checkpoint_once_more_does_not_fail(
    sound: Path, baseline: Mapping[str, Any], questions: Questions
) -> None:
    verdict = check(measured(sound, questions), load_policy(None), baseline)
    lines = [line for line in verdict.lines if line.limit.figure.section is not Section.RETRIEVAL]
    assert {line.answer for line in lines} == {Answer.PASS}


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
