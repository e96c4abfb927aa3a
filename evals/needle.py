"""Needle prompts: a number hidden in a long text, and the question that asks for it.

Pure and seeded: tokens in, prompts out. Knows nothing of models, files or tokenizers beyond the
`encode` function it is handed. Wording and layout follow RULER's single-needle task.

A prompt carries its own answer (`tokens[answer_start:]`), so that one teacher-forced pass scores
it: greedy decoding gives the answer exactly if and only if the arg max is right at each answer
position. (While every earlier answer token is right, greedy decoding sees the same tokens as the
teacher-forced pass; at the first wrong arg max both are wrong.)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

STATEMENT = "One of the special magic numbers for {key} is: {digits}."
QUESTION = (
    "What is the special magic number for {key} mentioned in the provided text?"
    " The special magic number for {key} mentioned in the provided text is"
)
ANSWER = " {digits}"
DIGITS = 5
"""Digits of a hidden number; the first is never 0, so that no tokenizer treats it as special."""

_WORDS = """
anchor apple arrow autumn badge barn basket beacon bell bench bird blanket boat bottle branch
bread bridge bronze brush bucket butter cabin candle canyon carpet castle cedar chair cherry
circle cloud coast copper coral cotton cradle crown crystal curtain desert diamond dragon drum
eagle engine falcon feather fence field flame flower forest fountain garden ginger glacier glass
guitar hammer harbor hill honey horse island ivory jacket jungle kettle kitchen ladder lake
lantern lemon letter lion lizard maple marble meadow melon mirror monkey moon mountain needle
ocean olive orange orchid otter oyster paddle palace paper parrot pearl pencil pepper piano
pillow planet pocket pond prairie puzzle rabbit raven ribbon river rocket saddle salmon
sandal shadow shell silver spider spoon spring stable statue stone storm summer sunset table
temple thunder tiger timber tower tractor tulip tunnel turtle valley velvet violin wagon walnut
whale willow window winter wizard yellow zebra
"""
KEYS = tuple(_WORDS.split())
"""Words that a needle's number may belong to."""

_BORDER_SAMPLES = ("word.", "word\n", "word.\n", "word.\n\n")
_BORDER_REACH = 32
"""How many tokens the needle may move from its exact depth to stand behind a sentence."""


@dataclass(frozen=True)
class NeedlePrompt:
    """One question about one hidden number, with the answer at its end."""

    tokens: tuple[int, ...]
    """The whole prompt followed by the answer."""
    answer_start: int
    """`tokens[answer_start:]` is the answer; token i is predicted at position i - 1."""
    length: int
    """Nominal length of the cell, in tokens; equals `len(tokens)`."""
    depth: float
    """Where the needle stands: 0 = start of the text, 1 = right before the question."""


def needle_prompts(
    encode: Callable[[str], list[int]],
    haystack: Sequence[int],
    *,
    bos: int | None,
    lengths: Sequence[int],
    depths: Sequence[float],
    per_cell: int,
    seed: int,
) -> list[NeedlePrompt]:
    """`per_cell` prompts for every length and depth, in that order.

    `encode` gives the tokens of a text without special tokens; `haystack` is the text to hide in,
    as tokens (read in a ring when it is short). A prompt depends on the seed and on its own cell
    alone, so that more lengths or depths leave the others as they were.
    """
    if not haystack:
        raise ValueError("The haystack has 0 tokens: give the tokens of some text to hide in.")
    outside = [depth for depth in depths if not 0 <= depth <= 1]
    if outside:
        raise ValueError(f"Depth {outside[0]} is outside 0 to 1: give a share of the text.")
    borders = frozenset(encode(sample)[-1] for sample in _BORDER_SAMPLES)
    return [
        _prompt(
            encode,
            haystack,
            borders,
            bos=bos,
            length=length,
            depth=depth,
            chance=random.Random(f"{seed} {length} {depth:.6f} {index}"),
        )
        for length in lengths
        for depth in depths
        for index in range(per_cell)
    ]


def _prompt(
    encode: Callable[[str], list[int]],
    haystack: Sequence[int],
    borders: frozenset[int],
    *,
    bos: int | None,
    length: int,
    depth: float,
    chance: random.Random,
) -> NeedlePrompt:
    key = chance.choice(KEYS)
    digits = str(chance.randrange(10 ** (DIGITS - 1), 10**DIGITS))
    needle = encode(f"\n{STATEMENT.format(key=key, digits=digits)}\n")
    question = encode(f"\n{QUESTION.format(key=key)}")
    answer = encode(ANSWER.format(digits=digits))
    start = [] if bos is None else [bos]
    room = length - len(start) - len(needle) - len(question) - len(answer)
    if room < 0:
        raise ValueError(
            f"Length {length} is too short for a needle and its question:"
            f" give {length - room} tokens or more."
        )
    text = _ring_slice(haystack, chance.randrange(len(haystack)), room)
    at = _border_near(text, depth, borders)
    tokens = (*start, *text[:at], *needle, *text[at:], *question, *answer)
    return NeedlePrompt(tokens, len(tokens) - len(answer), length, depth)


def _ring_slice(tokens: Sequence[int], start: int, count: int) -> list[int]:
    return [tokens[(start + step) % len(tokens)] for step in range(count)]


def _border_near(text: Sequence[int], depth: float, borders: frozenset[int]) -> int:
    """The place behind a sentence or line that is nearest to the depth; both ends stay exact."""
    exact = round(depth * len(text))
    if exact in (0, len(text)):
        return exact
    for distance in range(min(_BORDER_REACH, len(text)) + 1):
        for at in (exact - distance, exact + distance):
            if 0 < at < len(text) and text[at - 1] in borders:
                return at
    return exact
