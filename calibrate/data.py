"""Drawing calibration samples: which text, which rows, in what order.

Long texts are cut into passages of about one sample, from a random first cut on. Passages, rows
and conversations are shuffled together, encoded and packed. So a sample set touches as many
documents as it can, uses no token twice, and can use all of a small text.

Of a mix each source is drawn on its own, so what it gives does not depend on its neighbours. A
source that is named with several lengths gives the longest sequences first; what they leave is cut
anew for the next ones. Samples of one length stand together, those of different sources mingled.

Knows where text comes from only through llama4q.text, and nothing of models. What is drawn
depends on text, tokenizer, sizes and seed alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from llama4q.text import Document, TextSource, documents
from llama4q.tokens import check_size, encode, pack, token_digest

from .mix import Mix, Portion, rows_of

Item = TypeVar("Item")

CHARACTERS_PER_TOKEN = 4  # about, in English with Llama 4's vocabulary
SHUFFLED_CHARACTERS = 32_000_000  # held in memory; a smaller source is shuffled as a whole


@dataclass(frozen=True)
class Drawn:
    """What a portion of the mix gave."""

    portion: Portion
    samples: int
    length: int  # tokens a sample

    def to_json(self) -> dict[str, Any]:
        """For reports; the share is the one asked for, of all portions' sum."""
        return {
            "source": self.portion.source.name,
            "share": float(self.portion.share),
            "samples": self.samples,
            "length": self.length,
            "tokens": self.samples * self.length,
        }


@dataclass(frozen=True)
class CalibrationSet:
    """Calibration tokens, every row beginning with the begin-of-text token."""

    tokens: tuple[torch.Tensor, ...]  # int64 [S, T], one for each length, the shortest first
    digest: str  # SHA-256 of all shapes and token bytes
    drawn: tuple[Drawn, ...]  # in the order of the mix


def kept(drawn: CalibrationSet, which: Sequence[int]) -> CalibrationSet:
    """Some sequences of a set of one text and length, by number."""
    [tokens], [part] = drawn.tokens, drawn.drawn
    chosen = tokens[list(which)]
    return CalibrationSet(
        (chosen,), token_digest((chosen,)), (Drawn(part.portion, len(chosen), part.length),)
    )


def calibration_tokens(
    text: TextSource | Mix,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    length: int,
    seed: int,
) -> CalibrationSet:
    """Rows drawn by `seed`, `samples` x `length` tokens; the shipped text is its training part.

    Portions with other lengths give so many rows that the tokens come nearest to that.
    Of a source beyond SHUFFLED_CHARACTERS only that much and what is used is read.
    Raises UserError when a text cannot be read or is too little.
    """
    check_size(samples, length)
    mix = (Portion(text),) if isinstance(text, TextSource) else text
    drawn = tuple(
        Drawn(portion, rows, portion.length or length)
        for portion, rows in zip(mix, rows_of(mix, samples, length), strict=True)
    )
    found: dict[int, list[torch.Tensor]] = {}
    for origin in dict.fromkeys(portion.origin for portion in mix):
        wanted = [entry for entry in drawn if entry.portion.origin == origin]
        for size, rows in _from_one_source(wanted, tokenizer, seed):
            found.setdefault(size, []).append(rows)
    tokens = tuple(mingled(found[size], random.Random(seed)) for size in sorted(found))
    return CalibrationSet(tokens, token_digest(tokens), drawn)


def _from_one_source(
    wanted: Sequence[Drawn], tokenizer: PreTrainedTokenizerBase, seed: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Length and rows of each portion of one source, the longest first."""
    chance = random.Random(seed)
    source = wanted[0].portion.source
    pieces: Iterator[Document] = documents(source, "train.txt", seed)
    before: list[str] = []
    for entry in sorted(wanted, key=lambda entry: entry.length, reverse=True):
        pieces = _shuffled_passages(pieces, CHARACTERS_PER_TOKEN * entry.length, chance)
        encoded = (encode(piece, tokenizer) for piece in pieces)
        taken = " and ".join(before)
        yield (
            entry.length,
            pack(encoded, tokenizer, entry.samples, entry.length, entry.portion.source, taken),
        )
        before.append(f"{entry.samples} samples of {entry.length}")


def _shuffled_passages(
    texts: Iterable[Document], size: int, chance: random.Random
) -> Iterator[Document]:
    pieces = (passage for document in texts for passage in passages(document, size, chance))
    return shuffled(pieces, chance, SHUFFLED_CHARACTERS)


def mingled(parts: Sequence[torch.Tensor], chance: random.Random) -> torch.Tensor:
    """The rows of several sources in random order, two neighbours always from the same one.

    Whoever takes every other row, as the solver does to judge a correction on text that it was not
    made from, has the same mix in both halves. Rows without a partner stand at the end.
    """
    if len(parts) == 1:
        return parts[0]
    pairs = [pair for part in parts for pair in part.split(2)]
    full = [pair for pair in pairs if len(pair) == 2]
    single = [pair for pair in pairs if len(pair) == 1]
    return torch.cat([_take(some, chance) for some in (full, single) for _ in range(len(some))])


def passages(document: Document, size: int, chance: random.Random) -> Iterator[Document]:
    """A long text cut before words every `size` characters, first at random; the rest whole."""
    if not isinstance(document, str) or len(document) <= size:
        yield document
        return
    start, stop = 0, 1 + int(chance.random() * size)
    while start < len(document):
        stop = _before_word(document, start, stop)
        yield document[start:stop]
        start, stop = stop, stop + size


def _before_word(text: str, start: int, stop: int) -> int:
    """The last space or line end in `text` after `start` and up to `stop`, else `stop`."""
    if stop >= len(text):
        return len(text)
    space = max(text.rfind(" ", start + 1, stop + 1), text.rfind("\n", start + 1, stop + 1))
    return space if space > start else stop


def shuffled(
    pieces: Iterable[Document], chance: random.Random, characters: int
) -> Iterator[Document]:
    """All pieces in random order, through a buffer of about so many characters."""
    buffer: list[Document] = []
    held = 0
    for piece in pieces:
        buffer.append(piece)
        held += _characters(piece)
        while held > characters:
            taken = _take(buffer, chance)
            held -= _characters(taken)
            yield taken
    while buffer:
        yield _take(buffer, chance)


def _take(buffer: list[Item], chance: random.Random) -> Item:
    # random() is the one method whose sequence Python promises to keep from version to version
    index = int(chance.random() * len(buffer))
    buffer[index], buffer[-1] = buffer[-1], buffer[index]
    return buffer.pop()


def _characters(piece: Document) -> int:
    if isinstance(piece, str):
        return len(piece)
    return sum(len(str(message["content"])) for message in piece)
