"""What both models are measured on: windows of a text, and prompts that hide things in it.

Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from llama4q.errors import UserError
from llama4q.text import parse_source
from llama4q.tokens import evaluation_tokens, opening_tokens

from .passages import Decode
from .prompt import Documents, Material, Prompt
from .tasks import Ladder, prompts


@dataclass(frozen=True)
class Questions:
    """What both models read: windows of text `[W, T]` and retrieval prompts."""

    windows: torch.Tensor
    digest: str  # of the windows
    prompts: Sequence[Prompt]
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


def ask(
    tokenizer: PreTrainedTokenizerBase,
    text: str | None,
    windows: int,
    length: int,
    ladder: Ladder,
    stride: int | None = None,
    chunk: int | None = None,
    documents: Documents | None = None,
) -> Questions:
    """`windows` of `length` tokens from a text source, `stride` tokens apart, and prompts with its
    tokens as haystack, as many of them as the windows have, or twice the longest prompt.

    `chunk` is how many tokens local layers attend to, `documents` are for question answering.
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

    def decode(ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text

    # twice the longest prompt, so that those of its length do not all hide in the same text
    count = max([windows * (length - 1), *(2 * longest for longest in ladder.lengths)])
    opening = opening_tokens(source, tokenizer, count) if ladder.lengths else []
    material = Material(encode, decode, tokenizer.bos_token_id, opening, chunk, documents)
    return Questions(
        read.tokens,
        read.digest,
        prompts(material, ladder),
        ladder.seed,
        tokenizer.decode,
        source.name,
        stride,
    )
