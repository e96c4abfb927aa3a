"""What both models are measured on: windows of a text, and needle prompts hidden in it.

Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from llama4q.errors import UserError
from llama4q.text import evaluation_tokens, parse_source

from .needle import NeedlePrompt, needle_prompts


@dataclass(frozen=True)
class Questions:
    """What both models read: windows of text `[W, T]` and needle prompts."""

    windows: torch.Tensor
    digest: str  # of the windows
    prompts: Sequence[NeedlePrompt]
    seed: int  # of the prompts


@dataclass(frozen=True)
class Needles:
    """Which prompts to make: `count` for each length in tokens and depth in 0..1."""

    lengths: Sequence[int]
    depths: Sequence[float]
    count: int
    seed: int = 0


def ask(
    tokenizer: PreTrainedTokenizerBase,
    text: str | None,
    windows: int,
    length: int,
    needles: Needles,
) -> Questions:
    """`windows` of `length` tokens from a text source, and prompts with its tokens as haystack.

    Raises UserError when the text cannot be read or is too little, or a prompt is impossible.
    """
    read = evaluation_tokens(parse_source(text), tokenizer, windows=windows, length=length)

    def encode(words: str) -> list[int]:
        ids: list[int] = tokenizer(words, add_special_tokens=False)["input_ids"]
        return ids

    try:
        prompts = needle_prompts(
            encode,
            read.tokens[:, 1:].flatten().tolist(),
            bos=tokenizer.bos_token_id,
            lengths=needles.lengths,
            depths=needles.depths,
            per_cell=needles.count,
            seed=needles.seed,
        )
    except ValueError as error:
        raise UserError(f"needle prompts: {error}") from None
    return Questions(read.tokens, read.digest, prompts, needles.seed)
