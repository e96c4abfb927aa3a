"""Text: where it comes from, and its documents in order.

A text source is one string:

    pocket                     the text shipped with llama4q (also the default)
    FILE or FOLDER             .txt, .md, .json, .jsonl and .parquet files
    owner/name                 a dataset of the Hugging Face Hub, its split `train`
    owner/name:config@split    the same with a configuration, a split, or both
    ANY OF THESE#column        the column of JSON, Parquet or Hub rows that holds the text

A text file is one document, or several with a form feed between two. A row is one document; in a
column of conversations it is a list of messages. Knows nothing of tokens or models.
"""

from __future__ import annotations

import contextlib
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

from .errors import UserError, one_line

SHIPPED = "pocket"
SHIPPED_FOLDER = Path(__file__).parent / "pocket" / "text"
TEXT_SUFFIXES = (".txt", ".md")
ROW_SUFFIXES = (".json", ".jsonl", ".parquet")

CHAT_COLUMNS = ("messages", "conversations")
TEXT_COLUMNS = ("text", "content", "document", "article")
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's words -> the chat template's

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
            f"{name}: cannot be read as a dataset ({one_line(error)}); {advice}"
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
