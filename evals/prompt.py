"""A prompt with its answer at its end, and what surrounds the part that grows with the length.

Every prompt has exactly the tokens that were asked for, answer included, so that prompts of one
length go through a model together. It is put together from texts that are tokenized once: making
one takes time linear in its length. Knows nothing of tasks, models or files.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from llama4q.errors import UserError

Tokens = Sequence[int]
Span = tuple[int, int]  # first token, and the one behind the last

_ROUND = 64
"""Lengths that would do are named in multiples of this, and a sixteenth longer: other prompts of
the task need a few tokens more than the one at hand."""


@dataclass(frozen=True)
class Prompt:
    """One question about a long text, with its answer at its end."""

    task: str
    tokens: tuple[int, ...]
    """The whole prompt followed by the answer; token i is predicted at position i - 1."""
    answer_start: int
    """`tokens[answer_start:]` is the answer as a model should write it."""
    answers: tuple[Span, ...]
    """Where in `tokens` the things asked for stand, without what is between them."""
    depth: float | None
    """Where that stands which is asked for: 0 = start of the text, 1 = its end; None: all over."""

    @property
    def length(self) -> int:
        """In tokens, answer included."""
        return len(self.tokens)


@dataclass(frozen=True)
class Material:
    """What prompts are made of."""

    encode: Callable[[str], list[int]]
    """The tokens of a text, without special ones."""
    decode: Callable[[Tokens], str]
    bos: int | None
    text: Tokens
    """Of a text to hide things in; read in a ring where it is short."""
    chunk: int | None = None
    """Tokens that local layers attend to at most; None where there is no such border."""
    documents: Documents | None = None
    """For question answering."""

    @functools.cached_property
    def piece(self) -> Callable[[str], list[int]]:
        """`encode`, for texts that come again and again."""
        return functools.cache(self.encode)

    @functools.cached_property
    def prose(self) -> list[int]:
        """The text on one line, single spaces between words, as RULER has its essays."""
        return self.encode("".join(f" {word}" for word in self.decode(self.text).split()))


@dataclass(frozen=True)
class Cell:
    """What is asked of one prompt."""

    length: int
    """In tokens, answer included."""
    depth: float | None
    """See Prompt."""
    across: bool
    """Whether what is asked for should stand across the border of two attention chunks."""


@dataclass(frozen=True)
class Question:
    """What a data set asks about one of its documents."""

    text: str
    answer: str
    document: int
    near: tuple[int, ...]
    """Other documents on the same subject."""


@dataclass(frozen=True)
class Documents:
    """A data set for question answering."""

    texts: tuple[str, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Frame:
    """A prompt but for its context: what stands before it, and behind it, and the answer."""

    task: str
    before: Tokens
    behind: Tokens
    answer: Answer

    def room(self, length: int, least: int = 0) -> int:
        """Tokens that are left for the context. Raises UserError for fewer than `least`."""
        fixed = len(self.before) + len(self.behind) + len(self.answer.tokens)
        if length < fixed + least:
            enough = -(-(fixed + least) * 17 // 16 // _ROUND) * _ROUND
            raise UserError(
                f"{self.task}: {length} tokens are too few for its prompt; "
                f"give lengths of {enough} or more"
            )
        return length - fixed

    def around(self, context: Tokens, depth: float | None) -> Prompt:
        """The whole prompt."""
        start = len(self.before) + len(context) + len(self.behind)
        spans = tuple((start + first, start + stop) for first, stop in self.answer.spans)
        tokens = (*self.before, *context, *self.behind, *self.answer.tokens)
        return Prompt(self.task, tokens, start, spans, depth)


@dataclass(frozen=True)
class Answer:
    """The tokens that a model should write, and where among them the things asked for stand."""

    tokens: tuple[int, ...]
    spans: tuple[Span, ...]


def answer(encode: Callable[[str], list[int]], pieces: Iterable[str]) -> Answer:
    """Of texts in turns: what stands before something asked for, and that thing itself."""
    encoded = [encode(piece) for piece in pieces]
    ends = list(itertools.accumulate(map(len, encoded), initial=0))
    return Answer(tuple(itertools.chain(*encoded)), tuple(itertools.pairwise(ends))[1::2])


def enumeration(values: Sequence[str]) -> list[str]:
    """Pieces of an answer in plain English: ` A`, or ` A, B, and C`."""
    first, *others = values
    pieces = ["", f" {first}"]
    for value in others:
        pieces += [",", f" {value}"]
    if others:
        pieces[-2] = ", and"
    return pieces


def beginning(material: Material, text: str) -> list[int]:
    """The tokens that a prompt begins with."""
    return [*([] if material.bos is None else [material.bos]), *material.encode(text)]
