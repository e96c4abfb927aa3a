"""RULER's eight tasks of needles in a haystack: keys and values hidden in essays, noise or needles.

Wording and settings are RULER's (arXiv 2404.06654; NVIDIA/RULER, `synthetic.yaml`); the essays are
whatever text the material has. What is asked for stands behind a sentence at the cell's depth, or
across a chunk border near it; where there are several values or queries, all over the text.
Answers come in the order of the prompt: keys as the question lists them, the values of one key as
they stand in the text. Knows nothing of models or files.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from .haystack import NOISE, Haystack, haystack, woven
from .prompt import Cell, Frame, Material, Prompt, answer, beginning, enumeration
from .words import phrase

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it."
    " I will quiz you about the {kind} afterwards.\n",
    "\nWhat is the special magic {kind} for {keys} mentioned in the provided text?"
    " The special magic {kind} for {keys} mentioned in the provided text is",
)
"""What stands before the text and behind it, where one value is asked for."""
SEVERAL = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it."
    " I will quiz you about the {kind} afterwards.\n",
    "\nWhat are all the special magic {kind} for {keys} mentioned in the provided text?"
    " The special magic {kind} for {keys} mentioned in the provided text are",
)
_FARTHEST = 16
"""A needle moves to a chunk border by at most this part of the prompt's length."""


class Hay(Enum):
    """What needles are hidden in."""

    NOISE = "noise"
    ESSAY = "essay"
    NEEDLES = "needles"


class Kind(Enum):
    """What keys and values are, by the names that prompts have for them."""

    WORDS = "words"
    NUMBERS = "numbers"
    UUIDS = "uuids"

    def draw(self, chance: random.Random) -> str:
        if self is Kind.WORDS:
            return phrase(chance)
        if self is Kind.NUMBERS:
            return str(chance.randrange(10**6, 10**7))
        return str(uuid.UUID(int=chance.getrandbits(128), version=4))


@dataclass(frozen=True)
class Needle:
    """A key, one of its values, and how far into the text it stands, 0 to 1."""

    depth: float
    key: str
    value: str


@dataclass(frozen=True)
class Niah:
    """The settings of one task."""

    name: str
    hay: Hay
    key: Kind = Kind.WORDS
    value: Kind = Kind.NUMBERS
    keys: int = 1
    values: int = 1  # of each key
    queries: int = 1

    @property
    def has_depth(self) -> bool:
        """Whether a single value is asked for, so that it can be somewhere."""
        return self.values * self.queries == 1

    def prompt(self, material: Material, cell: Cell, chance: random.Random) -> Prompt:
        """One prompt; raises UserError when its needles do not fit into the length."""
        keys = _different(self.keys, self.key, chance)
        asked = chance.sample(keys, self.queries)
        main = Needle(
            chance.random() if cell.depth is None else cell.depth,
            asked[0],
            self.value.draw(chance),
        )
        needles = self._hidden(main, keys, chance)
        values = [needle.value for key in asked for needle in needles if needle.key == key]
        frame = self._frame(material, asked, values)
        statements = [self._statement(material, needle.key, needle.value) for needle in needles]
        taken = sum(map(len, statements))
        room = frame.room(cell.length, taken) - taken
        number = needles.index(main)
        ahead = len(frame.before) + sum(map(len, statements[:number]))
        at = round(main.depth * room)
        if cell.across and material.chunk and 0 < at < room:
            at = _across(at, ahead, len(statements[number]), material.chunk, cell.length, chance)
        hay = self._haystack(material, room, asked, chance)
        text = hay.stretch_with_end_at(chance, room, at)
        near = [hay.sentence_near(text, round(needle.depth * room)) for needle in needles]
        places = _in_order(near[:number], at, near[number + 1 :])
        context = woven(text, zip(places, statements, strict=True))
        return frame.around(context, cell.depth)

    def _hidden(self, main: Needle, keys: Sequence[str], chance: random.Random) -> list[Needle]:
        """All needles of the keys, in the order of the text."""
        owners = [key for key in keys for _ in range(self.values)]
        owners.remove(main.key)
        others = [Needle(chance.random(), key, self.value.draw(chance)) for key in owners]
        return sorted([main, *others], key=lambda needle: needle.depth)

    def _frame(self, material: Material, asked: Sequence[str], values: Sequence[str]) -> Frame:
        several = len(values) > 1
        before, behind = SEVERAL if several else ONE
        kind = self.value.value if several else self.value.value.removesuffix("s")
        keys = "".join(enumeration(asked)).lstrip()
        return Frame(
            self.name,
            beginning(material, before.format(kind=kind)),
            material.encode(behind.format(kind=kind, keys=keys)),
            answer(material.encode, enumeration(values)),
        )

    def _statement(self, material: Material, key: str, value: str) -> list[int]:
        """A needle as a sentence of an essay, or as a line."""
        needle = NEEDLE.format(kind=self.value.value, key=key, value=value)
        return material.encode(f" {needle}" if self.hay is Hay.ESSAY else f"{needle}\n")

    def _haystack(
        self, material: Material, room: int, asked: Sequence[str], chance: random.Random
    ) -> Haystack:
        if self.hay is Hay.ESSAY:
            return haystack(material.encode, material.prose)
        if self.hay is Hay.NOISE:
            return haystack(material.encode, material.encode(f"{NOISE}\n"))
        lines: list[int] = []
        while len(lines) <= room:
            key = self.key.draw(chance)
            if key not in asked:
                lines += self._statement(material, key, self.value.draw(chance))
        return haystack(material.encode, lines)


def _different(count: int, kind: Kind, chance: random.Random) -> list[str]:
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[kind.draw(chance)] = None
    return list(drawn)


def _in_order(before: Sequence[int], at: int, behind: Sequence[int]) -> list[int]:
    """Ascending places around `at`, which may have moved past some of them."""
    return [*(min(place, at) for place in before), at, *(max(place, at) for place in behind)]


def _across(at: int, ahead: int, size: int, chunk: int, length: int, chance: random.Random) -> int:
    """A place near `at` where `size` tokens lie on both sides of a chunk's border; `at` itself
    where there is none near. `ahead` tokens of the prompt stand before place 0."""
    border = round((ahead + at) / chunk) * chunk
    moved = border - ahead - chance.randrange(1, size)
    return moved if moved > 0 and abs(moved - at) <= length // _FARTHEST else at


NIAH = (
    Niah("niah_single_1", Hay.NOISE),
    Niah("niah_single_2", Hay.ESSAY),
    Niah("niah_single_3", Hay.ESSAY, value=Kind.UUIDS),
    Niah("niah_multikey_1", Hay.ESSAY, keys=4),
    Niah("niah_multikey_2", Hay.NEEDLES),
    Niah("niah_multikey_3", Hay.NEEDLES, key=Kind.UUIDS, value=Kind.UUIDS),
    Niah("niah_multivalue", Hay.ESSAY, values=4),
    Niah("niah_multiquery", Hay.ESSAY, keys=4, queries=4),
)
