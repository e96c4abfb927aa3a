"""Documents as tokens: a model's tokenizer, and rows of tokens cut from its text.

A row begins with the begin-of-text token; documents are joined by the end-of-text token. Knows
nothing of models, nor of what the tokens are for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jinja2
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from .errors import UserError, one_line
from .text import Document, Message, TextSource, documents

END_OF_TEXT = "<|end_of_text|>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
MOST_CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True)
class TokenSet:
    """Token rows for a model, every row beginning with the begin-of-text token."""

    tokens: torch.Tensor  # int64 [S, T]
    digest: str  # SHA-256 of shape and token bytes
    description: str


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint folder. Raises UserError where it is missing or broken."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"{folder}: no tokenizer here; copy the model's tokenizer.json and "
            f"tokenizer_config.json into it"
        )
    # It warns of Scout's own rope settings, which its model code accepts.
    transformers_logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # a broken tokenizer.json is a bare Exception from its Rust reader
        raise UserError(
            f"{folder}: its tokenizer cannot be loaded ({one_line(error)}); "
            f"download the tokenizer files again"
        ) from None


def check_same_tokens(original: Path, quantized: Path) -> None:
    """Raises UserError where another checkpoint's tokenizer gives other tokens than the original's.

    Files may be written anew, so what counts is what each token is. Without one there is no check.
    """
    if not any((quantized / name).is_file() for name in TOKENIZER_FILES):
        return
    ours, theirs = (load_tokenizer(folder).get_vocab() for folder in (original, quantized))
    if ours == theirs:
        return
    token = min(key for key, _ in ours.items() ^ theirs.items())
    raise UserError(
        f"{quantized} and {original} have different tokenizers (token {token!r} is "
        f"{theirs.get(token)} and {ours.get(token)}); compare a checkpoint with the one that it "
        f"was made from"
    )


def encode(document: Document, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A document's tokens without begin-of-text; conversations as the chat template writes them.

    Raises UserError when the tokenizer has no chat template or the template refuses.
    """
    text = document if isinstance(document, str) else _written_chat(document, tokenizer)
    # verbose=False: a document longer than the model's context is cut later, no need to warn
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids[1:] if ids[:1] == [tokenizer.bos_token_id] else ids


def _written_chat(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        raise UserError(
            "conversations need a chat template and this tokenizer has none; "
            "add chat_template.jinja to the model, or name a column of plain text with #COLUMN"
        )
    try:
        written: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except (jinja2.TemplateError, TypeError) as error:
        raise UserError(
            f"the chat template refuses a conversation ({one_line(error)}): "
            f"{json.dumps(messages, default=str)[:80]}...; mend or drop that row"
        ) from None
    return written


def pack(
    encoded: Iterable[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    length: int,
    source: TextSource,
    longer: str = "",
    stride: int | None = None,
) -> torch.Tensor:
    """Documents joined by the end-of-text token, cut into [rows, length] of int64.

    Every row is the begin-of-text token and the next `length` - 1 tokens of the joined text, or
    those that lie `stride` behind the row before. `longer` says what took of the same text before,
    if anything did.
    Raises UserError when there is too little text.
    """
    check_size(rows, length)
    begin, end = _begin_and_end(tokenizer)
    step = stride or length - 1
    needed = (rows - 1) * step + length - 1
    stream = _joined(encoded, end, needed)
    if len(stream) < needed:
        raise UserError(_too_little(source, len(stream), rows, length, longer))
    cut = torch.tensor(stream[:needed], dtype=torch.int64).unfold(0, length - 1, step)
    return torch.cat([torch.full((rows, 1), begin, dtype=torch.int64), cut], dim=1)


def _joined(encoded: Iterable[list[int]], end: int, needed: int) -> list[int]:
    """Documents joined by `end`, read no further than `needed` tokens; the last one is whole."""
    stream: list[int] = []
    for ids in encoded:
        stream += [*ids, end] if ids else []
        if len(stream) >= needed:
            break
    return stream


def check_size(rows: int, length: int) -> None:
    """Raises UserError for a token set that would be empty."""
    if rows < 1 or length < 2:
        raise UserError(
            f"{rows} samples of {length} tokens: at least 1 of 2 tokens is needed, "
            f"the first is begin-of-text"
        )


def _too_little(source: TextSource, found: int, rows: int, length: int, longer: str) -> str:
    if found == 0 and not longer:
        return f"text {source.name!r}: empty, there is no text in it; name another source"
    after = f" after {longer}" if longer else ""
    return (
        f"text {source.name!r}: {found:,} tokens{after}, but {rows} samples of {length} need "
        f"{rows * (length - 1):,} and a begin-of-text token each; name more text, or ask for "
        f"fewer or shorter samples ({found // (length - 1)} of this length are there)"
    )


def _begin_and_end(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Begin-of-text and end-of-text. Instruct tokenizers name end-of-turn as their eos token."""
    begin = tokenizer.bos_token_id
    end = tokenizer.added_tokens_encoder.get(END_OF_TEXT, tokenizer.eos_token_id)
    if begin is None or end is None:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer names no begin-of-text or no end-of-text "
            f"token; use the tokenizer files of the Llama 4 checkpoint"
        )
    return begin, end


def token_set(tokens: torch.Tensor, description: str) -> TokenSet:
    """Tokens [S, T] with their digest."""
    return TokenSet(tokens, token_digest([tokens]), description)


def token_digest(batches: Iterable[torch.Tensor]) -> str:
    """SHA-256 of the shapes and tokens of all batches [S, T]; the same on every machine."""
    digest = hashlib.sha256()
    for tokens in batches:
        samples, length = tokens.shape
        digest.update(f"{samples} x {length} int64\n".encode())
        digest.update(tokens.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def evaluation_tokens(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    windows: int,
    length: int,
    stride: int | None = None,
) -> TokenSet:
    """The first `windows` windows of `length` tokens of the text, in order.

    They begin `stride` tokens apart; without one they do not overlap.

    The shipped text is its held-out part. Raises UserError when there is too little text.
    """
    encoded = _heldout(source, tokenizer, windows * length)
    tokens = pack(encoded, tokenizer, windows, length, source, stride=stride)
    return token_set(tokens, f"{source.name}: the first {windows} windows of {length} tokens")


def opening_tokens(source: TextSource, tokenizer: PreTrainedTokenizerBase, count: int) -> list[int]:
    """The first `count` tokens of the text that windows are cut from, or all where it has fewer."""
    _, end = _begin_and_end(tokenizer)
    return _joined(_heldout(source, tokenizer, count), end, count)[:count]


def _heldout(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, count: int
) -> Iterator[list[int]]:
    """The documents' tokens; of a huge one only what could be among the first `count`."""
    limit = MOST_CHARACTERS_PER_TOKEN * count
    for document in documents(source, "heldout.txt"):
        yield encode(document[:limit] if isinstance(document, str) else document, tokenizer)
