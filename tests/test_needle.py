"""Needle prompts: exact lengths, depth, seeds; with a tokenizer of one token per character."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import pytest

from evals.needle import DIGITS, STATEMENT
from evals.prompt import Material, Prompt
from evals.tasks import Ladder
from evals.tasks import prompts as made
from evals.words import KEYS
from llama4q.errors import UserError

BOS = 7
HAYSTACK_TEXT = " ".join(f"Sentence number {chr(97 + n % 26)} is short." for n in range(200))


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]


def decode(tokens: Sequence[int]) -> str:
    return "".join(map(chr, tokens))


def prompts(
    lengths: tuple[int, ...] = (400, 900),
    depths: tuple[float, ...] = (0.0, 0.3, 0.5, 1.0),
    per_cell: int = 3,
    seed: int = 1,
    bos: int | None = BOS,
    text: str = HAYSTACK_TEXT,
) -> list[Prompt]:
    material = Material(encode, decode, bos, encode(text))
    return made(material, Ladder(lengths, depths, per_cell, seed=seed))


def needle_place(prompt: Prompt) -> int:
    return decode(prompt.tokens).index(STATEMENT.split("{key}")[0])


def test_every_cell_is_filled_in_order() -> None:
    cells = [(prompt.length, prompt.depth) for prompt in prompts()]
    expected = [(n, d) for n in (400, 900) for d in (0.0, 0.3, 0.5, 1.0) for _ in range(3)]
    assert cells == expected


@pytest.mark.parametrize("bos", [BOS, None])
def test_the_prompt_is_exactly_as_long_as_its_cell(bos: int | None) -> None:
    for prompt in prompts(lengths=(333, 400, 2_000), bos=bos):
        assert len(prompt.tokens) == prompt.length
        assert (prompt.tokens[0] == BOS) == (bos is not None)


def test_a_short_haystack_is_read_in_a_ring() -> None:
    (prompt,) = prompts(lengths=(500,), depths=(0.0,), per_cell=1, text="Ab. ")
    assert "Ab. Ab. Ab. " in decode(prompt.tokens)


def test_the_answer_is_the_number_of_the_needle() -> None:
    for prompt in prompts():
        answer = decode(prompt.tokens[prompt.answer_start :])
        text = decode(prompt.tokens[: prompt.answer_start])
        key = text.split("magic number for ")[1].split(" mentioned")[0]
        assert key in KEYS
        assert STATEMENT.format(key=key, digits=answer.strip()) in text
        assert answer.strip().isdigit()
        assert len(answer.strip()) == DIGITS
        assert text.endswith(f"for {key} mentioned in the provided text is")


def test_the_needle_stands_near_its_depth() -> None:
    for prompt in prompts(lengths=(2_000,), depths=(0.25, 0.5, 0.75)):
        question = decode(prompt.tokens).index("\nWhat is the special")
        assert needle_place(prompt) / question == pytest.approx(prompt.depth, abs=0.06)


def test_the_needle_follows_a_sentence() -> None:
    for prompt in prompts(depths=(0.25, 0.5, 0.75)):
        text = decode(prompt.tokens)
        assert text[needle_place(prompt) - 2 : needle_place(prompt)] == ".\n"


def test_depth_zero_and_one_are_the_very_ends() -> None:
    first, last = prompts(lengths=(900,), depths=(0.0, 1.0), per_cell=1)
    assert needle_place(first) == 2  # behind begin-of-text and a line end
    behind = decode(last.tokens)[needle_place(last) :]
    assert "Sentence number" not in behind


def test_the_same_seed_gives_the_same_prompts() -> None:
    random.seed(5)
    once = prompts()
    random.seed(6)
    assert once == prompts()


def test_another_seed_gives_other_prompts() -> None:
    assert not set(prompts(seed=1)) & set(prompts(seed=2))


def test_a_cell_does_not_depend_on_the_others() -> None:
    alone = prompts(lengths=(900,), depths=(0.3,))
    assert alone == [p for p in prompts() if (p.length, p.depth) == (900, 0.3)]


def test_prompts_of_a_cell_differ() -> None:
    cell = prompts(lengths=(900,), depths=(0.3,), per_cell=20)
    assert len(set(cell)) == 20


def test_too_short_a_length_is_refused_with_one_that_would_do() -> None:
    with pytest.raises(
        UserError, match=r"^needle: 50 tokens are too few .* of (\d+) or"
    ) as refused:
        prompts(lengths=(50,))
    enough = re.search(r"lengths of (\d+) or more", str(refused.value))
    assert enough is not None
    assert prompts(lengths=(int(enough[1]),))


def test_an_empty_haystack_is_refused() -> None:
    with pytest.raises(UserError, match=r"^the text to hide needles in has 0 tokens; "):
        prompts(text="")


@pytest.mark.parametrize("depth", [-0.1, 1.5])
def test_a_depth_outside_the_text_is_refused(depth: float) -> None:
    with pytest.raises(UserError, match=f"^depth {depth} is outside of 0 to 1"):
        prompts(depths=(0.5, depth))
