"""RULER's variable tracking: a value is handed from variable to variable, hidden in noise.

Wording and settings are RULER's (arXiv 2404.06654; NVIDIA/RULER, `synthetic.yaml`): one chain, four
hops, and one worked example with shorter names before it. The answer names the variables in the
order of the chain, which is that of the text. Knows nothing of models or files.
"""

from __future__ import annotations

import random
import string

from .haystack import NOISE, haystack, woven
from .prompt import Cell, Frame, Material, Prompt, Tokens, answer, beginning

HOPS = 4
INTRODUCTION = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
)
QUESTION = (  # "assgined" is how RULER writes it
    "\nQuestion: Find all variables that are assigned the value {value} in the text above."
    " Answer: According to the chain(s) of variable assignment in the text above,"
    " {count} variables are assgined the value {value}, they are:"
)
_LETTERS, _LETTERS_OF_EXAMPLE = 5, 3
_LINES_OF_EXAMPLE = 10  # of noise: as many as RULER's 500 tokens hold


def vt(material: Material, cell: Cell, chance: random.Random) -> Prompt:
    """One prompt, the assignments all over its text; raises UserError when they do not fit."""
    noise = haystack(material.encode, material.encode(f" {NOISE}\n"))
    example = _worked_out(material, noise.tokens, chance)
    names, value = _names(_LETTERS, chance), _value(chance)
    frame = Frame(
        "vt",
        [*example, *material.encode(INTRODUCTION)],
        material.encode(_question(value)),
        answer(material.encode, _listed(names)),
    )
    statements = _statements(material, names, value)
    taken = sum(map(len, statements))
    room = frame.room(cell.length, taken) - taken
    text = noise.stretch_with_end_at(chance, room, 0)
    places = sorted(noise.sentence_near(text, chance.randrange(room + 1)) for _ in statements)
    return frame.around(woven(text, zip(places, statements, strict=True)), None)


def _worked_out(material: Material, line: Tokens, chance: random.Random) -> list[int]:
    """The example, from begin-of-text to the empty lines behind it."""
    names, value = _names(_LETTERS_OF_EXAMPLE, chance), _value(chance)
    places = sorted(chance.sample(range(_LINES_OF_EXAMPLE), len(names)))
    statements = _statements(material, names, value)
    starts = [place * len(line) for place in places]
    return [
        *beginning(material, INTRODUCTION),
        *woven(list(line) * _LINES_OF_EXAMPLE, zip(starts, statements, strict=True)),
        *material.encode("".join([_question(value), *_listed(names), "\n\n\n\n"])),
    ]


def _names(letters: int, chance: random.Random) -> list[str]:
    drawn: dict[str, None] = {}
    while len(drawn) <= HOPS:
        drawn["".join(chance.choices(string.ascii_uppercase, k=letters))] = None
    return list(drawn)


def _value(chance: random.Random) -> str:
    return str(chance.randrange(10_000, 100_000))


def _statements(material: Material, names: list[str], value: str) -> list[list[int]]:
    first, *others = names
    texts = [f" VAR {first} = {value}"]
    texts += [f" VAR {name} = VAR {before} " for before, name in zip(names, others, strict=False)]
    return [material.encode(text) for text in texts]


def _question(value: str) -> str:
    return QUESTION.format(value=value, count=HOPS + 1)


def _listed(names: list[str]) -> list[str]:
    return [piece for name in names for piece in ("", f" {name}")]
