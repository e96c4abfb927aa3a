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
from .passages import Decode


@dataclass(frozen=True)
class Questions:
    """What both models read: windows of text `[W, T]` and needle prompts."""

    windows: torch.Tensor
    digest: str  # of the windows
    prompts: Sequence[NeedlePrompt]
    seed: int  # of the prompts
    decode: Decode  # token ids to text
    text: str = ""  # where the windows are from
    stride: int | None = None  # tokens from window to window, where they overlap

    def scored(self, window: int) -> torch.Tensor:
        """The tokens of a window that no earlier one has scored, `[n]`; they are its last ones."""
        tokens = self.windows[window, 1:]
        return tokens[-self.stride :] if window and self.stride else tokens

    def nbytes(self) -> int:
        """Of the scored text, in UTF-8."""
        every = [self.scored(window) for window in range(len(self.windows))]
        return len(self.decode(torch.cat(every).tolist()).encode())


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
    stride: int | None = None,
) -> Questions:
    """`windows` of `length` tokens from a text source, `stride` tokens apart, and prompts with its
    tokens as haystack.

    Raises UserError when the text cannot be read or is too little, or a prompt is impossible.
    """
    if stride is not None and not 0 < stride < length:
        raise UserError(
            f"windows of {length} tokens, {stride} apart, would leave some out; "
            f"choose a stride of 1 to {length - 1} tokens"
        )
    source = parse_source(text)
    read = evaluation_tokens(source, tokenizer, windows=windows, length=length, stride=stride)

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
    return Questions(
        read.tokens, read.digest, prompts, needles.seed, tokenizer.decode, source.name, stride
    )
