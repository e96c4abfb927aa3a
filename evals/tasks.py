"""Retrieval tasks by name, and the ladder of lengths and depths that prompts are made for.

The plain needle, and RULER's tasks (arXiv 2404.06654) but for its second data set of question
answering. A prompt depends on the seed and its own cell alone, so that more tasks, lengths or
depths leave the others as they were. Knows nothing of models or files.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llama4q.errors import UserError

from .answering import qa
from .counting import cwe, fwe
from .needle import needle
from .niah import NIAH
from .prompt import Cell, Material, Prompt
from .tracking import vt


@dataclass(frozen=True)
class Task:
    """How prompts of a task are made, and whether what is asked for stands somewhere."""

    prompt: Callable[[Material, Cell, random.Random], Prompt]
    has_depth: bool


NEEDLE = "needle"
QA = "qa"
RULER = "ruler"
TASKS = {
    NEEDLE: Task(needle, True),
    **{task.name: Task(task.prompt, task.has_depth) for task in NIAH},
    "vt": Task(vt, False),
    "cwe": Task(cwe, False),
    "fwe": Task(fwe, False),
    QA: Task(qa, True),
}


@dataclass(frozen=True)
class Ladder:
    """Which prompts to make."""

    lengths: Sequence[int]
    """In tokens, answers included."""
    depths: Sequence[float]
    """0 is the start of the text, 1 its end."""
    prompts: int
    """For each length and depth. A task without depths gets as many in all at each length."""
    tasks: Sequence[str] = (NEEDLE,)
    seed: int = 0


def prompts(material: Material, ladder: Ladder) -> list[Prompt]:
    """All prompts, task by task, length by length, depth by depth.

    With a chunk size every second prompt of a cell has its needle across a chunk's border, where
    there is one near. Raises UserError for a depth outside of 0 to 1, a text without tokens, and a
    length that is too short for a task, or too long for its data set.
    """
    outside = [depth for depth in ladder.depths if not 0 <= depth <= 1]
    if outside:
        raise UserError(f"depth {outside[0]} is outside of 0 to 1; give shares of the text")
    if ladder.lengths and not material.text:
        raise UserError("the text to hide needles in has 0 tokens; name another text")
    return [
        TASKS[task].prompt(
            material,
            Cell(length, depth if TASKS[task].has_depth else None, number % 2 == 1),
            random.Random(f"{ladder.seed} {length} {depth:.6f} {number}"),
        )
        for task in ladder.tasks
        for length in ladder.lengths
        for depth in ladder.depths
        for number in range(ladder.prompts)
    ]


def parse_tasks(text: str, with_documents: bool) -> list[str]:
    """Names with commas between; `ruler` is all of RULER's, with question answering where there
    are documents for it. Raises UserError for an unknown name, with the nearest known one."""
    named: dict[str, None] = {}
    for name in (part.strip() for part in text.split(",")):
        if name == RULER:
            named.update(
                (task, None) for task in TASKS if task != NEEDLE and (with_documents or task != QA)
            )
        elif name in TASKS:
            named[name] = None
        elif name:
            near = difflib.get_close_matches(name, [*TASKS, RULER], 1, cutoff=0)
            raise UserError(f"unknown task {name!r}; did you mean {near[0]!r}?")
    if QA in named and not with_documents:
        raise UserError("task 'qa' asks about documents; name a JSON file in SQuAD form with --qa")
    return list(named)


def parse_lengths(text: str) -> list[int]:
    """Lengths with commas between: `4096`, `4k`, `1M`, and `4k..1M` by doubling.

    Raises UserError for anything else.
    """
    found: dict[int, None] = {}
    for part in (part.strip() for part in text.split(",")):
        first, dots, last = part.partition("..")
        if not part:
            continue
        length, end = _length(first, text), _length(last if dots else first, text)
        while length <= end:
            found[length] = None
            length *= 2
    return list(found)


def _length(number: str, text: str) -> int:
    digits = number.strip().lower()
    scale = {"k": 1 << 10, "m": 1 << 20}.get(digits[-1:], 1)
    digits = digits if scale == 1 else digits[:-1]
    if not digits.isdecimal() or not int(digits):
        raise UserError(
            f"lengths {text!r}: give numbers of tokens with commas between, as 1024,4k or 4k..1M"
        )
    return int(digits) * scale


def parse_depths(text: str) -> list[float]:
    """Depths with commas between. Raises UserError for what is no number."""
    try:
        return list(dict.fromkeys(float(part) for part in text.split(",") if part.strip()))
    except ValueError:
        raise UserError(f"depths {text!r}: give numbers with commas between, as 0,0.5,1") from None
