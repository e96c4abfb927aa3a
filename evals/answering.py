"""RULER's question answering: a question about one of many documents, of a data set in SQuAD form.

Wording and order are RULER's (arXiv 2404.06654; NVIDIA/RULER, `qa.py`): documents on the same
subject come in before others do. The document asked about stands at the cell's depth; the first one
is cut to the exact length. The answer is the first of the references that the data set gives. Knows
nothing of models.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llama4q.errors import UserError

from .prompt import (
    Cell,
    Documents,
    Frame,
    Material,
    Prompt,
    Question,
    answer,
    beginning,
    enumeration,
)

INSTRUCTION = (
    "Answer the question based on the given documents."
    " Only give me the answer and do not output any other words."
)
INTRODUCTION = f"{INSTRUCTION}\n\nThe following are given documents.\n\n"
QUESTION = f"{INSTRUCTION}\n\nQuestion: {{question}} Answer:"


def qa(material: Material, cell: Cell, chance: random.Random) -> Prompt:
    """One prompt; raises UserError when one of the documents is too long, or all are too few."""
    assert material.documents is not None
    assert cell.depth is not None
    texts = material.documents.texts
    question = chance.choice(material.documents.questions)
    frame = Frame(
        "qa",
        beginning(material, INTRODUCTION),
        material.encode(QUESTION.format(question=question.text)),
        answer(material.encode, enumeration([question.answer])),
    )
    asked = _document(material, texts[question.document])
    title = len(_title(material, 1)) + len(_title(material, 2))
    longest = max(len(_document(material, text)) for text in texts)
    room = frame.room(cell.length, longest + title)
    others: list[list[int]] = []
    taken = len(_title(material, 1)) + len(asked)
    for number in _others(len(texts), question, chance):
        others.append(_document(material, texts[number]))
        taken += len(others[-1]) + len(_title(material, len(others) + 1))
        if taken > room:
            break
    else:
        raise UserError(
            f"qa: the data set has {cell.length - room + taken:,} tokens for a prompt, not "
            f"{cell.length:,}; give shorter lengths or a larger data set"
        )
    # The last one is one too many: it stands first, where the cut falls, and is never asked about.
    cut = others.pop()
    chance.shuffle(others)
    at = round(cell.depth * len(others))
    ordered = [cut, *others[:at], asked, *others[at:]]
    titled = ((_title(material, number), one) for number, one in enumerate(ordered, start=1))
    context = list(itertools.chain(*itertools.chain(*titled)))
    return frame.around(context[-room:], cell.depth)


def _title(material: Material, number: int) -> list[int]:
    return material.piece(f"Document {number}:\n")


def _document(material: Material, text: str) -> list[int]:
    return material.piece(f"{text}\n\n")


def _others(count: int, question: Question, chance: random.Random) -> Iterator[int]:
    """All other documents, those on the same subject first."""
    yield from chance.sample(question.near, len(question.near))
    known = {question.document, *question.near}
    rest = [number for number in range(count) if number not in known]
    yield from chance.sample(rest, len(rest))


def read_documents(path: Path) -> Documents:
    """A JSON file in SQuAD form, of version 1.1 or 2.0: `data`, `paragraphs`, `qas`, `answers`.

    Questions without an answer are left out. Raises UserError for a file that cannot be read or is
    of another form, and for one without a question that has an answer.
    """
    try:
        parsed = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); name a JSON file in SQuAD form"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); name one in SQuAD form") from None
    try:
        found = _documents(parsed)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"{path}: not in SQuAD form ({type(error).__name__}: {error}); give "
            f"data[].paragraphs[] with context and qas[] with question and answers[].text"
        ) from None
    if not found.questions:
        raise UserError(f"{path}: no question with an answer in it; name another data set")
    return found


def _documents(parsed: Mapping[str, Any]) -> Documents:
    numbers: dict[str, int] = {}  # of each document, a text that comes twice being one
    questions: list[Question] = []
    for article in parsed["data"]:
        own = [
            numbers.setdefault(paragraph["context"].strip(), len(numbers))
            for paragraph in article["paragraphs"]
        ]
        for paragraph, number in zip(article["paragraphs"], own, strict=True):
            near = tuple(other for other in dict.fromkeys(own) if other != number)
            questions += [
                Question(
                    asked["question"].strip(), asked["answers"][0]["text"].strip(), number, near
                )
                for asked in paragraph["qas"]
                if asked["answers"] and not asked.get("is_impossible")
            ]
    return Documents(tuple(numbers), tuple(questions))
