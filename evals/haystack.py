"""Tokens to hide things in: any stretch of a text in a ring, and where its sentences end.

Knows nothing of tokenizers beyond the material's `encode`, nor of what is hidden.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .prompt import Tokens

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""RULER's sentences that say nothing."""

_SENTENCE_ENDS = ("word.", "word\n", "word.\n", "word.\n\n")
_REACH = 32
"""How many tokens a thing may move from its exact place to stand behind a sentence."""
_SHIFT = 256
"""The same for a text that moves instead, which costs nothing."""


@dataclass(frozen=True)
class Haystack:
    """A text as tokens, and those among them that end a sentence or a line."""

    tokens: Tokens
    ends: frozenset[int]

    def stretch(self, start: int, count: int) -> list[int]:
        """`count` tokens from `start` on, as often around the ring as it takes."""
        rounds = -(-(start + count) // len(self.tokens))
        if rounds <= 1:
            return list(self.tokens[start : start + count])
        return (list(self.tokens) * rounds)[start : start + count]

    def stretch_with_end_at(self, chance: random.Random, count: int, at: int) -> list[int]:
        """`count` tokens from somewhere, chosen so that a sentence begins at `at`."""
        text = self.stretch(chance.randrange(len(self.tokens)), count + 2 * _SHIFT)
        shift = self.sentence_near(text, at + _SHIFT, _SHIFT) - at
        return text[shift : shift + count]

    def sentence_near(self, text: Tokens, exact: int, reach: int = _REACH) -> int:
        """The place behind a sentence of `text` that is nearest; both its ends stay exact."""
        if exact in (0, len(text)):
            return exact
        for distance in range(min(reach, len(text)) + 1):
            for at in (exact - distance, exact + distance):
                if 0 < at < len(text) and text[at - 1] in self.ends:
                    return at
        return exact


def haystack(encode: Callable[[str], list[int]], tokens: Tokens) -> Haystack:
    """The text that `tokens` are, in the tokenizer of `encode`."""
    return Haystack(tokens, frozenset(encode(sample)[-1] for sample in _SENTENCE_ENDS))


def woven(text: Tokens, pieces: Iterable[tuple[int, Tokens]]) -> list[int]:
    """`text` with each piece put before the token of its place, places in ascending order."""
    mixed: list[int] = []
    done = 0
    for at, piece in pieces:
        mixed += text[done:at]
        mixed += piece
        done = at
    mixed += text[done:]
    return mixed
