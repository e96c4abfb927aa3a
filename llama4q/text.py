"""Text as tokens: where it comes from, its documents in order, and windows cut from them.

A text source is one string:

    pocket                     the text shipped with llama4q (also the default)
    FILE or FOLDER             .txt, .md, .json, .jsonl and .parquet files
    owner/name                 a dataset of the Hugging Face Hub, its split `train`
    owner/name:config@split    the same with a configuration, a split, or both
    ANY OF THESE#column        the column of JSON, Parquet or Hub rows that holds the text

A text file is one document, or several with a form feed between two. A row is one document; a
column of conversations (lists of messages) goes through the tokenizer's chat template.

Knows nothing of models, nor of what the tokens are for.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import jinja2
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from .errors import UserError

SHIPPED = "pocket"
SHIPPED_FOLDER = Path(__file__).parent / "pocket" / "text"
TEXT_SUFFIXES = (".txt", ".md")
ROW_SUFFIXES = (".json", ".jsonl", ".parquet")

CHAT_COLUMNS = ("messages", "conversations")
TEXT_COLUMNS = ("text", "content", "document", "article")
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's words -> the chat template's

END_OF_TEXT = "<|end_of_text|>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
MOST_CHARACTERS_PER_TOKEN = 16

Message = dict[str, Any]
Document = str | list[Message]

_HUB = re.compile(
    r"(?P<id>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<config>[\w.+-]+))?(@(?P<split>[\w.-]+))?", re.ASCII
)


@dataclass(frozen=True)
class TextSource:
    """A text source that has been understood, not yet read. Neither files nor dataset: shipped."""

    name: str  # as the user wrote it
    files: tuple[Path, ...] = ()
    dataset: str | None = None  # id on the Hub
    config: str | None = None
    split: str = "train"
    column: str | None = None


@dataclass(frozen=True)
class TokenSet:
    """Token rows for a model, every row beginning with the begin-of-text token."""

    tokens: torch.Tensor  # int64 [S, T]
    digest: str  # SHA-256 of shape and token bytes
    description: str


def parse_source(name: str | None) -> TextSource:
    """The text source that `name` means; None is the shipped text.

    Raises UserError for a missing file, a kind of file that cannot be read, a folder without text,
    and a string that can be no Hub id.
    """
    if name is None or name == SHIPPED:
        return TextSource(SHIPPED)
    address, _, column = (name, "", "") if os.path.exists(name) else name.partition("#")
    if os.path.exists(address):  # unlike Path's, False for what is too long to be a name
        return TextSource(name, files=_files(Path(address)), column=column or None)
    match = _HUB.fullmatch(address)
    if match is None or Path(address).suffix in TEXT_SUFFIXES + ROW_SUFFIXES:
        raise UserError(
            f"text {name!r}: no such file; name a file, a folder, "
            f"a Hub dataset as owner/name:config@split#column, or {SHIPPED}"
        )
    split = match["split"] or "train"
    return TextSource(name, (), match["id"], match["config"], split, column or None)


def _files(path: Path) -> tuple[Path, ...]:
    """The readable files at `path`, sorted by name so that every machine sees the same order."""
    readable = TEXT_SUFFIXES + ROW_SUFFIXES
    if path.is_dir():
        found = tuple(file for file in sorted(path.rglob("*")) if file.suffix in readable)
        if not found:
            raise UserError(f"{path}: no {', '.join(readable)} file here; name a folder with text")
        return found
    if path.suffix not in readable:
        raise UserError(
            f"{path}: {path.suffix or 'no suffix'}, but text is read from {', '.join(readable)}; "
            f"rename or convert it"
        )
    return (path,)


def documents(source: TextSource, shipped_file: str, seed: int | None = None) -> Iterator[Document]:
    """The source's documents, empty ones left out, read no further than asked for.

    In order; with a seed, files (or the shards of a Hub dataset) come in an order drawn by it.
    `shipped_file` is read where the source is the shipped text.
    Raises UserError when something cannot be read or no column holds text.
    """
    if source.dataset is not None:
        yield from _row_documents(_hub_rows(source, source.dataset, seed), source)
        return
    files = list(source.files) or [SHIPPED_FOLDER / shipped_file]
    if seed is not None:
        chance = random.Random(seed)
        files.sort(key=lambda _: chance.random())
    for file in files:
        if file.suffix in TEXT_SUFFIXES:
            yield from (part for part in _read_text(file).split("\f") if part.strip())
        else:
            rows = _parquet_rows(file) if file.suffix == ".parquet" else _json_rows(file)
            yield from _row_documents(rows, source)


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error.reason}); convert it to UTF-8") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None


def _read_text(file: Path) -> str:
    with _reading(file):
        return file.read_text(encoding="utf-8-sig")


def _json_rows(file: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of a JSON array or of JSON lines.

    Read here and not by `datasets`, which infers one schema from the first rows: a later row with
    one more key, as conversations with tool calls have, would stop it.
    """
    for line, part in _json_parts(file):
        try:
            parsed = json.loads(part)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{file}: line {line + error.lineno - 1} is not valid JSON ({error.msg}); "
                f"write one object a line, or one array of objects"
            ) from None
        for row in parsed if isinstance(parsed, list) else [parsed]:
            if not isinstance(row, dict):
                raise UserError(f"{file}: a row is a {type(row).__name__}; rows must be objects")
            yield row


def _json_parts(file: Path) -> Iterator[tuple[int, str]]:
    """Line number and text of each JSON value: the rest of the file at an array, else a line."""
    with _reading(file), file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.lstrip().startswith("["):
                yield number, line + lines.read()
            elif line.strip():
                yield number, line


def _parquet_rows(file: Path) -> Iterator[Mapping[str, Any]]:
    with _dataset_errors(str(file), "download or write it again"):
        # not load_dataset, which would tell the Hub that a Parquet file is being read
        yield from datasets.IterableDataset.from_parquet(str(file))


def _hub_rows(source: TextSource, dataset: str, seed: int | None) -> Iterator[Mapping[str, Any]]:
    """Rows of a Hub dataset as they stream in; nothing of it is kept on the disk."""
    advice = "check its name, configuration, split and the connection"
    with _dataset_errors(f"text {source.name!r}", advice):
        rows = datasets.load_dataset(dataset, source.config, split=source.split, streaming=True)
        # A buffer of one row: the order of the shards is drawn here, the rows are shuffled by
        # whoever draws samples.
        yield from rows if seed is None else rows.shuffle(seed=seed, buffer_size=1)


@contextlib.contextmanager
def _dataset_errors(name: str, advice: str) -> Iterator[None]:
    """Errors of the `datasets` package as one line.

    It lets through what its readers raise (Arrow's errors, HTTP's, a bare IndexError), so all are
    caught; the blocks inside do nothing but read.
    """
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs the error as well
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{name}: cannot be read as a dataset ({_one_line(error)}); {advice}"
        ) from None


def _row_documents(rows: Iterable[Mapping[str, Any]], source: TextSource) -> Iterator[Document]:
    """The document of each row; rows without text are left out."""
    iterator = iter(rows)
    first = next(iterator, None)
    if first is None:
        return
    column = _find_column(source, list(first))
    for row in itertools.chain([first], iterator):
        document = _document(row.get(column), source, column)
        if document is not None:
            yield document


def _find_column(source: TextSource, columns: list[str]) -> str:
    wanted = (source.column,) if source.column else CHAT_COLUMNS + TEXT_COLUMNS
    for column in wanted:
        if column in columns:
            return column
    missing = f"no column {source.column!r}" if source.column else "no column known to hold text"
    plain = source.name.removesuffix(f"#{source.column}")
    raise UserError(
        f"text {source.name!r}: {missing}, found {', '.join(columns) or 'none'}; "
        f"name one as {plain}#COLUMN"
    )


def _document(value: object, source: TextSource, column: str) -> Document | None:
    """A row's value as a document; None for an empty one."""
    if value is None or value == []:
        return None
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, list) and all(isinstance(message, Mapping) for message in value):
        return [_message(message, source, column) for message in value]
    raise UserError(
        f"text {source.name!r}: column {column!r} holds a {type(value).__name__}, "
        f"neither text nor messages; name another column with #COLUMN"
    )


def _message(message: Mapping[str, Any], source: TextSource, column: str) -> Message:
    """One message with the keys of chat templates, `role` and `content`, and what else it has."""
    role = message.get("role") or message.get("from")
    if not role:
        raise UserError(
            f"text {source.name!r}: a message in column {column!r} has no role, only "
            f"{', '.join(message)}; name a column of messages with role and content"
        )
    content = message.get("content", message.get("value"))
    # Arrow fills what a message doesn't have with None; templates ask whether a key is there.
    rest = {key: value for key, value in message.items() if value is not None}
    return {
        **rest,
        "role": ROLES.get(str(role), str(role)),
        "content": "" if content is None else content,
    }


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
            f"{folder}: its tokenizer cannot be loaded ({_one_line(error)}); "
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
            f"the chat template refuses a conversation ({_one_line(error)}): "
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


def _one_line(error: Exception) -> str:
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 200 else line[:197] + "..."
