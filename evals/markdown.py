"""Tables and plain words in Markdown. Knows nothing of reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Row = Sequence[str]


def table(header: Row, rows: Iterable[Row], words: int = 1) -> str:
    """The first columns, `words` of them, to the left, numbers to the right; empty without rows."""
    return _table(header, ([plain(cell) for cell in row] for row in rows), words)


def facts(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """Names and values, which are Markdown already, but for values that are empty."""
    return _table((title, ""), (row for row in rows if row[1]), 2)


def _table(header: Row, rows: Iterable[Row], words: int) -> str:
    lines = [" | ".join(row) for row in rows]
    if not lines:
        return ""
    ruler = " | ".join([":--"] * words + ["--:"] * (len(header) - words))
    return "\n".join(f"| {line} |" for line in (" | ".join(header), ruler, *lines))


def plain(text: str) -> str:
    """Nothing in it is Markdown or HTML, and it is one line."""
    told = " ".join(text.split()).replace("\\", "\\\\")
    for character in "|`*_<[":
        told = told.replace(character, f"\\{character}")
    return told


def code(text: str) -> str:
    """As code in a line; what would end it, or a table's cell, is left out."""
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "\\|") + "`"
