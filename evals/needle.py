"""The plain needle: a number hidden in a text as it is, and the question that asks for it.

The pocket model was trained on this wording, which is close to RULER's single needle; prompts of a
seed never change. RULER's own needles are in `niah.py`. Knows nothing of models or files.
"""

from __future__ import annotations

import random

from .haystack import haystack, woven
from .prompt import Cell, Frame, Material, Prompt, answer, beginning, enumeration
from .words import KEYS

STATEMENT = "One of the special magic numbers for {key} is: {digits}."
QUESTION = (
    "What is the special magic number for {key} mentioned in the provided text?"
    " The special magic number for {key} mentioned in the provided text is"
)
DIGITS = 5
"""Digits of a hidden number; the first is never 0, so that no tokenizer treats it as special."""


def needle(material: Material, cell: Cell, chance: random.Random) -> Prompt:
    """One prompt; the number stands behind a sentence near the cell's depth."""
    key = chance.choice(KEYS)
    digits = str(chance.randrange(10 ** (DIGITS - 1), 10**DIGITS))
    statement = material.encode(f"\n{STATEMENT.format(key=key, digits=digits)}\n")
    frame = Frame(
        "needle",
        beginning(material, ""),
        material.encode(f"\n{QUESTION.format(key=key)}"),
        answer(material.encode, enumeration([digits])),
    )
    room = frame.room(cell.length, len(statement)) - len(statement)
    assert cell.depth is not None
    hay = haystack(material.encode, material.text)
    text = hay.stretch(chance.randrange(len(hay.tokens)), room)
    at = hay.sentence_near(text, round(cell.depth * len(text)))
    return frame.around(woven(text, [(at, statement)]), cell.depth)
