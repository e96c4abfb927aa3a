"""Scores of retrieval prompts: a worked example, and what transformers' greedy generation says.

RULER's own metric is written here as its `string_match_all` defines it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch

from evals import retrieval
from evals.evaluation import compare
from evals.prompt import Prompt
from evals.questions import Questions, ask
from evals.retrieval import Score
from evals.tasks import TASKS, Ladder
from llama4q.checkpoint import Checkpoint
from llama4q.config import read_config
from llama4q.hub import POCKET_MODEL
from llama4q.tokens import load_tokenizer
from llama4q.weights import LayerReader

from . import tiny

LENGTH = 1_024


def string_match_all(text: str, references: list[str]) -> float:
    return sum(one.lower() in text.lower() for one in references) / len(references)


def prompt(task: str, depth: float | None, answers: int = 1) -> Prompt:
    """Ten tokens, of which the answers are the last ones, two tokens each."""
    start = 10 - 2 * answers
    spans = tuple((at, at + 2) for at in range(start, 10, 2))
    return Prompt(task, tuple(range(10)), start, spans, depth)


@pytest.mark.parametrize(
    ("predicted", "exact", "recall"),
    [
        ([4, 5, 6, 7, 8, 9], True, 1),
        ([4, 5, 6, 0, 8, 9], False, 2 / 3),
        ([0, 5, 6, 0, 8, 9], False, 1 / 3),
        ([0, 0, 0, 0, 0, 0], False, 0),
    ],
)
def test_a_score(predicted: list[int], exact: bool, recall: float) -> None:
    asked = prompt("vt", None, answers=3)
    assert retrieval.answer_positions(asked) == slice(3, 9)
    found = retrieval.score(torch.tensor(predicted), asked)
    assert found.exact == exact
    assert found.recall == pytest.approx(recall)


def test_tokens_between_answers_count_for_exact_ones_alone() -> None:
    asked = Prompt("vt", tuple(range(10)), 5, ((5, 7), (8, 10)), None)
    assert retrieval.score(torch.tensor([5, 6, 0, 8, 9]), asked) == Score(False, 1)


def test_a_summary_by_hand() -> None:
    """Six prompts: of the original's five the quantized model loses three, and gains one."""
    asked = [
        *(prompt("needle", depth) for depth in (0.0, 0.0, 1.0)),
        *(prompt("vt", None, answers=2) for _ in range(3)),
    ]
    right, half, wrong = Score(True, 1), Score(False, 0.5), Score(False, 0)
    plain = [right, right, right, right, right, half]
    served = [right, wrong, wrong, half, right, right]
    found = retrieval.summary(asked, plain, served, seed=3)
    assert (found["prompts"], found["seed"]) == (6, 3)
    assert found["original"] == pytest.approx(5 / 6)
    assert found["quantized"] == pytest.approx(3 / 6)
    difference = found["difference"]
    assert difference["value"] == pytest.approx(-2 / 6)
    assert difference["p_value"] == pytest.approx(10 / 16)  # 4 changed, 1 or fewer or 3 or more
    assert -1 <= difference["low"] < -2 / 6 < difference["high"] <= 0.5
    needle, vt = found["tasks"]
    assert [task["task"] for task in (needle, vt)] == ["needle", "vt"]
    assert needle["metric"] == "exact"
    assert (needle["original"], needle["quantized"]) == (1, pytest.approx(1 / 3))
    assert needle["difference"]["p_value"] == 0.5
    assert "recall" not in needle
    assert needle["cells"] == [
        {"length": 10, "depth": 0.0, "prompts": 2, "original": 1.0, "quantized": 0.5}
        | {"lost": 1, "gained": 0},
        {"length": 10, "depth": 1.0, "prompts": 1, "original": 1.0, "quantized": 0.0}
        | {"lost": 1, "gained": 0},
    ]
    assert [cell["depth"] for cell in vt["cells"]] == [None]
    assert (vt["original"], vt["quantized"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert vt["recall"]["original"] == vt["recall"]["quantized"] == pytest.approx(2.5 / 3)
    assert vt["recall"]["difference"]["value"] == pytest.approx(0)


def test_a_single_prompt_says_next_to_nothing() -> None:
    found = retrieval.summary([prompt("needle", 0.5)], [Score(True, 1)], [Score(False, 0)], 0)
    difference = found["difference"]
    assert (difference["value"], difference["low"], difference["p_value"]) == (-1.0, -1.0, 1.0)
    assert difference["high"] > 0
    recall = retrieval.summary(
        [prompt("vt", None, answers=2)], [Score(True, 1)], [Score(False, 0)], 0
    )["tasks"][0]["recall"]
    assert recall["difference"] == {"value": -1.0, "low": None, "high": None}


def test_the_interval_of_many_prompts_is_that_of_a_mean() -> None:
    """Against the normal distribution's, for 400 paired answers."""
    asked = [prompt("needle", 0.5)] * 400
    served = [Score(number % 10 != 0, float(number % 10 != 0)) for number in range(400)]
    found = retrieval.summary(asked, [Score(True, 1)] * 400, served, 0)["difference"]
    spread = 1.96 * (0.1 * 0.9 / 400) ** 0.5
    assert found["low"] == pytest.approx(-0.1 - spread, abs=0.004)
    assert found["high"] == pytest.approx(-0.1 + spread, abs=0.004)


@torch.inference_mode()
def test_exact_is_what_greedy_generation_writes() -> None:
    """For every task on the pocket model: as asked, and with what it generates as the answer."""
    tokenizer = load_tokenizer(POCKET_MODEL)
    tasks = [name for name in TASKS if name != "qa"]
    questions = ask(tokenizer, None, 1, 64, Ladder([LENGTH], [0.2], 1, tasks))
    texts = generated(questions.prompts)
    prompts = [
        *questions.prompts,
        *(
            dataclasses.replace(asked, tokens=(*asked.tokens[: asked.answer_start], *text))
            for asked, text in zip(questions.prompts, texts, strict=True)
        ),
    ]
    found = exact(questions, prompts)
    for asked, text, answered in zip(prompts, [*texts, *texts], found, strict=True):
        written = tokenizer.decode(text)
        answer = tokenizer.decode(asked.tokens[asked.answer_start :])
        assert answered == (written == answer), asked.task
        references = [tokenizer.decode(asked.tokens[slice(*span)]) for span in asked.answers]
        if answered:
            assert string_match_all(written, references) == 1
    count = len(questions.prompts)
    assert all(found[count:])
    assert any(found[:count])
    assert not all(found[:count])


def generated(prompts: Sequence[Prompt]) -> list[list[int]]:
    """What transformers writes, as many tokens as each answer has."""
    model = tiny.transformers_model(POCKET_MODEL)
    texts = []
    for prompt in prompts:
        start = torch.tensor([prompt.tokens[: prompt.answer_start]])
        count = prompt.length - prompt.answer_start
        [text] = model.generate(
            start, max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        texts.append(text[prompt.answer_start :].tolist())
    return texts


def exact(questions: Questions, prompts: list[Prompt]) -> list[bool]:
    """What the report says of each prompt, given a cell of its own."""
    reader = LayerReader(Checkpoint(POCKET_MODEL), read_config(POCKET_MODEL), torch.float32)
    alone = [dataclasses.replace(prompt, task=str(number)) for number, prompt in enumerate(prompts)]
    evidence = compare(reader, reader, dataclasses.replace(questions, prompts=alone), lambda: None)
    return [task["original"] == 1 for task in evidence["retrieval"]["tasks"]]
