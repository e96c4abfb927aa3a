"""Answers to retrieval prompts scored by task, length and depth, for two models on the same ones.

A prompt counts as exact when the arg max is right at every position of its answer, in one
teacher-forced pass: greedy decoding gives the answer then and only then. (While every earlier
token is right, both see the same tokens; at the first wrong arg max both are wrong.)

RULER's own metric reads what a model generates and takes the share of the references found in it
anywhere, in any order (`string_match_all`; `string_match_part`, for question answering: any one of
several references). An exact answer holds all references, so RULER gives it 1; not the other way
round: a model that names the right things in another order, or says something first, is wrong here
and right there. Both models are judged alike. Where several things are asked for, the recall says
which share of them has the right arg max at each of its tokens, the right answer standing before
it: a wrong one costs no more than itself. Knows nothing of models or files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .prompt import Prompt
from .proportions import matched
from .statistics import mcnemar, resampled


class Score(NamedTuple):
    """What a model made of one prompt."""

    exact: bool
    recall: float  # share of the things asked for, 0 to 1


def batches(prompts: Sequence[Prompt]) -> list[torch.Tensor]:
    """Token ids `[S, T]`, one batch for each run of prompts of the same length, in order."""
    grouped: list[list[tuple[int, ...]]] = []
    for prompt in prompts:
        if not grouped or len(grouped[-1][0]) != prompt.length:
            grouped.append([])
        grouped[-1].append(prompt.tokens)
    return [torch.tensor(group) for group in grouped]


def answer_positions(prompt: Prompt) -> slice:
    """The positions whose logits predict the answer's tokens."""
    return slice(prompt.answer_start - 1, prompt.length - 1)


def score(predicted: torch.Tensor, prompt: Prompt) -> Score:
    """Of the arg max tokens `[n]` at the answer's positions."""
    right = [
        token == wanted
        for token, wanted in zip(
            predicted.tolist(), prompt.tokens[prompt.answer_start :], strict=True
        )
    ]
    found = [
        all(right[first - prompt.answer_start : stop - prompt.answer_start])
        for first, stop in prompt.answers
    ]
    return Score(all(right), sum(found) / len(found))


def summary(
    prompts: Sequence[Prompt],
    original: Sequence[Score],
    quantized: Sequence[Score],
    seed: int,
) -> dict[str, Any]:
    """JSON for the report: exact match of both models, in all, by task and by cell."""
    rows = list(zip(prompts, original, quantized, strict=True))
    by_task: dict[str, list[_Row]] = {}
    for row in rows:
        by_task.setdefault(row[0].task, []).append(row)
    return {
        "seed": seed,
        "digest": digest(prompts),
        **_compared([(plain.exact, served.exact) for _, plain, served in rows]),
        "tasks": [_task(name, those) for name, those in by_task.items()],
    }


_Row = tuple[Prompt, Score, Score]


def _task(name: str, rows: Sequence[_Row]) -> dict[str, Any]:
    cells: dict[tuple[int, float | None], list[tuple[bool, bool]]] = {}
    for prompt, plain, served in rows:
        cells.setdefault((prompt.length, prompt.depth), []).append((plain.exact, served.exact))
    found = {
        "task": name,
        "metric": "exact",
        **_compared([(plain.exact, served.exact) for _, plain, served in rows]),
        "cells": [
            {"length": length, "depth": depth, **_cell(pairs)}
            for (length, depth), pairs in cells.items()
        ],
    }
    if any(len(prompt.answers) > 1 for prompt, _, _ in rows):
        found["recall"] = _recall([(plain.recall, served.recall) for _, plain, served in rows])
    return found


def _compared(pairs: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    """Of answers that are right or wrong."""
    lost, gained = _changes(pairs)
    low, high = matched(lost, gained, len(pairs))
    value = (gained - lost) / len(pairs)
    difference = {"value": value, "low": low, "high": high, "p_value": mcnemar(lost, gained)}
    return {**_shares(pairs), "difference": difference}


def _changes(pairs: Sequence[tuple[bool, bool]]) -> tuple[int, int]:
    """How many only the original got right, and only the quantized one."""
    return (
        sum(plain and not served for plain, served in pairs),
        sum(served and not plain for plain, served in pairs),
    )


def _cell(pairs: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    lost, gained = _changes(pairs)
    return {**_shares(pairs), "lost": lost, "gained": gained}


def _shares(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    plain, served = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
    return {"prompts": len(pairs), "original": plain, "quantized": served}


def _recall(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Quantized less original; its interval is null where a single prompt gives none."""
    differences = torch.tensor([served - plain for plain, served in pairs], dtype=torch.float64)
    low: float | None = None
    high: float | None = None
    if len(pairs) > 1:
        low, high = resampled(differences[:, None] / len(pairs), lambda totals: totals[:, 0])
    difference = {"value": float(differences.mean()), "low": low, "high": high}
    return {**_shares(pairs), "difference": difference}


def digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of all prompts' tokens."""
    every = hashlib.sha256()
    for prompt in prompts:
        every.update(f"{prompt.task} {prompt.answer_start} {prompt.tokens}\n".encode())
    return every.hexdigest()
