"""Needle retrieval scored by length and depth, for two models on the same prompts.

A prompt counts when the arg max is right at every position of the answer, in one teacher-forced
pass: greedy decoding gives the answer exactly then and only then. Knows nothing of models or files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from .needle import NeedlePrompt


def batches(prompts: Sequence[NeedlePrompt]) -> list[torch.Tensor]:
    """Token ids `[S, T]`, one batch for each run of prompts of the same length, in order."""
    grouped: list[list[tuple[int, ...]]] = []
    for prompt in prompts:
        if not grouped or len(grouped[-1][0]) != len(prompt.tokens):
            grouped.append([])
        grouped[-1].append(prompt.tokens)
    return [torch.tensor(group) for group in grouped]


def exact(predicted: torch.Tensor, prompt: NeedlePrompt) -> bool:
    """Whether the arg max tokens at the answer's positions are the answer."""
    return tuple(predicted.tolist()) == prompt.tokens[prompt.answer_start :]


def answer_positions(prompt: NeedlePrompt) -> slice:
    """The positions whose logits predict the answer's tokens."""
    return slice(prompt.answer_start - 1, len(prompt.tokens) - 1)


def summary(
    prompts: Sequence[NeedlePrompt],
    original: Sequence[bool],
    quantized: Sequence[bool],
    seed: int,
) -> dict[str, Any]:
    """JSON for the report: exact match of both models, in all and by cell."""
    cells: dict[tuple[int, float], list[tuple[bool, bool]]] = {}
    for prompt, plain, served in zip(prompts, original, quantized, strict=True):
        cells.setdefault((prompt.length, prompt.depth), []).append((plain, served))
    return {
        "prompts": len(prompts),
        "seed": seed,
        "digest": digest(prompts),
        "units": "share of prompts answered exactly",
        "original": _share(original),
        "quantized": _share(quantized),
        "cells": [
            {
                "length": length,
                "depth": depth,
                "prompts": len(pairs),
                "original": _share([plain for plain, _ in pairs]),
                "quantized": _share([served for _, served in pairs]),
            }
            for (length, depth), pairs in cells.items()
        ],
    }


def digest(prompts: Sequence[NeedlePrompt]) -> str:
    """SHA-256 of all prompts' tokens."""
    text = repr([prompt.tokens for prompt in prompts])
    return hashlib.sha256(text.encode()).hexdigest()


def _share(answers: Sequence[bool]) -> float:
    return sum(answers) / len(answers)
