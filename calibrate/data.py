"""Drawing calibration samples: which text, which rows, in what order.

Long texts are cut into passages of about one sample, from a random first cut on. Passages, rows
and conversations are shuffled together, encoded and packed. So a sample set touches as many
documents as it can, uses no token twice, and can use all of a small text.

Knows where text comes from only through llama4q.text, and nothing of models. What is drawn
depends on text, tokenizer, sizes and seed alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

from transformers import PreTrainedTokenizerBase

from llama4q.text import Document, TextSource, TokenSet, documents, encode, pack, token_set

CHARACTERS_PER_TOKEN = 4  # about, in English with Llama 4's vocabulary
SHUFFLED_CHARACTERS = 32_000_000  # held in memory; a smaller source is shuffled as a whole


def calibration_tokens(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, *, samples: int, length: int, seed: int
) -> TokenSet:
    """`samples` rows of `length` tokens, drawn by `seed`; the shipped text is its training part.

    Of a source beyond SHUFFLED_CHARACTERS only that much and what is used is read.
    Raises UserError when the text cannot be read or is too little.
    """
    chance = random.Random(seed)
    size = CHARACTERS_PER_TOKEN * length
    pieces = (
        passage
        for document in documents(source, "train.txt", seed)
        for passage in passages(document, size, chance)
    )
    drawn = shuffled(pieces, chance, SHUFFLED_CHARACTERS)
    encoded = (encode(piece, tokenizer) for piece in drawn)
    tokens = pack(encoded, tokenizer, samples, length, source)
    return token_set(tokens, f"{source.name}: {samples} samples of {length} tokens, seed {seed}")


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


def _take(buffer: list[Document], chance: random.Random) -> Document:
    # random() is the one method whose sequence Python promises to keep from version to version
    index = int(chance.random() * len(buffer))
    buffer[index], buffer[-1] = buffer[-1], buffer[index]
    return buffer.pop()


def _characters(piece: Document) -> int:
    if isinstance(piece, str):
        return len(piece)
    return sum(len(str(message["content"])) for message in piece)
