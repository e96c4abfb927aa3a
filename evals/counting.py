"""RULER's two tasks of counting words: the most common of a list, the most frequent of a code.

Wording and settings are RULER's (arXiv 2404.06654; NVIDIA/RULER, `synthetic.yaml`). A list takes as
many words as fit, and the first one is cut to the exact length; a code takes dots, which the
question says to ignore. The answer names common words in the order of the list, as the example
before it does, and frequent ones by frequency. Knows nothing of models or files.
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from llama4q.errors import UserError

from . import words
from .prompt import Cell, Frame, Material, Prompt, answer, beginning, enumeration

# Common words

COMMON = 10
LIST = (
    "Below is a numbered list of words. In these words, some appear more often than others."
    " Memorize the ones that appear most often.\n"
)
LIST_QUESTION = (
    "\nQuestion: What are the 10 most common words in the above list?"
    " Answer: The top 10 words that appear most often in the list are:"
)


@dataclass(frozen=True)
class Repeats:
    """How often words stand in a list: in RULER's worked example and in the list asked about."""

    example_words: int  # common ones included
    example_common: int
    example_others: int
    common: int
    others: int


LONG = Repeats(40, 10, 3, 30, 3)
SHORT = Repeats(20, 3, 1, 6, 1)
LONG_FROM = 4096
"""Tokens; shorter prompts repeat words less."""


def cwe(material: Material, cell: Cell, chance: random.Random) -> Prompt:
    """One prompt; raises UserError when the common words do not fit into the length."""
    repeats = LONG if cell.length >= LONG_FROM else SHORT
    example = _example(material, repeats, chance)
    for draw in (words.singles, words.pairs):
        found = _counted(material, cell, example, repeats, draw(chance), chance)
        if found is not None:
            return found
    raise UserError(f"cwe: {cell.length} tokens are more than its words fill; give shorter lengths")


def _example(material: Material, repeats: Repeats, chance: random.Random) -> list[int]:
    """A whole list with its answer, from begin-of-text on."""
    drawn = list(itertools.islice(words.singles(chance), repeats.example_words))
    common, others = drawn[:COMMON], drawn[COMMON:]
    listed = [*common * repeats.example_common, *others * repeats.example_others]
    chance.shuffle(listed)
    context = "".join(_numbered(listed)).lstrip()
    found = "".join(_numbered(_first_seen(common, listed)))
    return beginning(material, f"{LIST}{context}{LIST_QUESTION}{found}\n")


def _counted(
    material: Material,
    cell: Cell,
    example: Sequence[int],
    repeats: Repeats,
    drawn: Iterator[str],
    chance: random.Random,
) -> Prompt | None:
    """One prompt with words as they are drawn; None when there are too few of them."""

    def size(texts: Iterable[str]) -> int:
        return sum(len(material.piece(text)) for text in texts)

    def entries(count: int, word: str, before: int) -> int:
        """Tokens of a word `count` times, behind so many entries."""
        numbers = (f" {number + 1}." for number in range(before, before + count))
        return count * size([f" {word}"]) + size(numbers)

    common, others = list(itertools.islice(drawn, COMMON)), [next(drawn)]
    count = COMMON * repeats.common + repeats.others
    taken = size(_numbered([*common * repeats.common, *others * repeats.others]))
    room = _common_frame(material, example, common).room(cell.length, taken)
    while taken <= room:
        word = next(drawn, None)
        if word is None:
            return None
        others.append(word)
        taken += entries(repeats.others, word, count)
        count += repeats.others
    # The last word is one too many: it stands first, where the cut to the exact length falls. So
    # does the one before, as the numbers at the end may have more tokens than those at the front.
    listed = [*common * repeats.common, *others[:-2] * repeats.others]
    chance.shuffle(listed)
    listed = [*others[-1:] * repeats.others, *others[-2:-1] * repeats.others, *listed]
    context = list(itertools.chain(*map(material.piece, _numbered(listed))))
    frame = _common_frame(material, example, _first_seen(common, listed))
    return frame.around(context[-room:], None)


def _common_frame(material: Material, example: Sequence[int], common: Sequence[str]) -> Frame:
    return Frame(
        "cwe",
        [*example, *material.encode(LIST)],
        material.encode(LIST_QUESTION),
        answer(material.piece, _numbered(common)),
    )


def _numbered(listed: Sequence[str]) -> list[str]:
    """Pieces of a numbered list: ` 1.`, ` word`, ` 2.`, ` word`."""
    return [
        piece
        for number, word in enumerate(listed, start=1)
        for piece in (f" {number}.", f" {word}")
    ]


def _first_seen(common: Sequence[str], listed: Sequence[str]) -> list[str]:
    """The common words in the order of the list."""
    return sorted(common, key=listed.index)


# Frequent words

ALPHA = 2.0
ZETA = math.pi**2 / 6  # of ALPHA
LETTERS = 6
TOKENS_A_WORD = 50  # of the prompt, for each coded word there is
FREQUENT = 3
DOTS = "..."
CODE = (
    "Read the following coded text and track the frequency of each coded word."
    " Find the three most frequently appeared coded words."
)
CODE_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'."
    " What are the three most frequently appeared words in the above coded text?"
    " Answer: According to the coded text above,"
    " the three most frequently appeared words are:"
)
FEWEST_WORDS = 53
"""From here on the third of the frequent words comes more often than the next one."""


def fwe(material: Material, cell: Cell, chance: random.Random) -> Prompt:
    """One prompt; raises UserError when the frequencies would not tell the words apart."""
    coded = _coded(max(cell.length // TOKENS_A_WORD, FREQUENT + 1), chance)
    frame = Frame(
        "fwe",
        beginning(material, CODE),
        material.encode(CODE_QUESTION),
        answer(material.encode, enumeration(coded[:FREQUENT])),
    )
    pieces = [material.encode(f" {word}") for word in (DOTS, *coded)]

    def size(total: int) -> int:
        counts = frequencies(total, len(pieces))
        return sum(count * len(piece) for count, piece in zip(counts, pieces, strict=True))

    room = frame.room(cell.length, size(FEWEST_WORDS))
    total = bisect.bisect_right(range(2 * room), room, key=size) - 1
    counts = frequencies(total, len(pieces))
    text = [piece for count, piece in zip(counts, pieces, strict=True) for _ in range(count)]
    chance.shuffle(text)
    dots = pieces[0] * (room - size(total))
    return frame.around([*dots, *itertools.chain(*text)][-room:], None)


def frequencies(total: int, kinds: int) -> list[int]:
    """How often each of so many words comes in about `total`: a zeta distribution, rounded down."""
    return [int(total * rank**-ALPHA / ZETA) for rank in range(1, kinds + 1)]


def _coded(count: int, chance: random.Random) -> list[str]:
    """Different words of random letters."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn["".join(chance.choices(string.ascii_lowercase, k=LETTERS))] = None
    return list(drawn)
