"""Make the pocket model's text: pages of the Python 3.11 documentation, as plain paragraphs.

Takes the folder of reStructuredText sources (`_sources`) that the documentation ships with and
writes `train.txt`, `heldout.txt` and `LICENSE`. Whole pages go to one side or the other, so the
held-out pages were never seen. Knows nothing of tokenizers and models.

    python benchmarks/pocket/make_text.py FOLDER_OF_SOURCES llama4q/pocket/text
"""

from __future__ import annotations

import argparse
import random
import re
from pathlib import Path

DOCUMENT_BREAK = "\f\n"
"""Stands between two pages; a form feed occurs nowhere inside a page."""

WHOLE_FOLDERS = ("tutorial", "howto", "faq", "reference")
FILLING_FOLDER = "library"
SKIPPED = ("index", "license", "howto/clinic", "howto/logging-cookbook", "tutorial/appendix")
TRAIN_BYTES = 3_000_000
HELDOUT_BYTES = 250_000

# Directives whose whole block says nothing to a reader of plain text.
_DROPPED = (
    "index module moduleauthor sectionauthor codeauthor highlight currentmodule testsetup"
    " testcleanup toctree include includefile literalinclude image figure only ifconfig raw"
    " tabularcolumns contents rubric role default-role graphviz sphinx availability audit-event"
    " audit-event-table impl-detail-table productionlist"
)
DROPPED_BLOCKS = frozenset(_DROPPED.split())
NAMED = {
    "versionadded": "New in version {}.",
    "versionchanged": "Changed in version {}:",
    "deprecated": "Deprecated since version {}:",
    "deprecated-removed": "Deprecated since version {}:",
    "note": "Note: {}",
    "warning": "Warning: {}",
    "seealso": "See also: {}",
    "impl-detail": "CPython implementation detail: {}",
    "tip": "Tip: {}",
    "important": "Important: {}",
}

LICENSE_HEADER = """\
The files train.txt and heldout.txt in this folder are derived from the documentation of Python
3.11, Copyright (c) 2001-2023 Python Software Foundation; All Rights Reserved. They are
distributed under the PSF License Agreement below; examples, recipes and other code in the
documentation are dual licensed under the Zero-Clause BSD license, also below.

Summary of the changes: a selection of whole pages (tutorial, howto, faq, reference and part of
the library reference) was reduced from reStructuredText to plain text (markup, index entries,
link targets and comments removed), and joined, with a form feed between two pages. The pages in
heldout.txt are not in train.txt.

"""

_DIRECTIVE = re.compile(r"^(\s*)\.\. ([A-Za-z0-9:+-]+)::\s*(.*)$")
_UNDERLINE = re.compile(r"^([=\-~^\"'*+#.`])\1{2,}\s*$")
_TABLE_RULE = re.compile(r"^\s*[+|]?[-=+| ]{3,}$")


def plain_inline(text: str) -> str:
    """Roles, literals, emphasis and links as the words a reader would see.

    A role or link may run over one line end, no further: a stray backtick must not swallow a page.
    """
    inside = r"[^`<\n]+(?:\n[^`<\n]+)?"
    text = re.sub(r"``(.+?)``", r"\1", text)
    text = re.sub(rf":[\w:+-]+:`[!~]?({inside}?)\s*<[^`>]*>`", r"\1", text)
    text = re.sub(r":[\w:+-]+:`[!~]?\.?([^`\n]+(?:\n[^`\n]+)?)`", r"\1", text)
    text = re.sub(rf"`({inside}?)\s*<[^`>]*>`__?", r"\1", text)
    text = re.sub(rf"`({inside})`_?_?", r"\1", text)
    text = re.sub(r"(?<![\w*])\*\*([^*\n]+)\*\*(?![\w*])", r"\1", text)
    text = re.sub(r"(?<![\w*])\*([^*\s][^*\n]*)\*(?![\w*])", r"\1", text)
    return text.replace("|release|", "3.11").replace("\\*", "*").replace("\\`", "`")


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _block_end(lines: list[str], start: int, indent: int) -> int:
    """The first line after `start` that isn't indented deeper than `indent`."""
    at = start
    while at < len(lines) and (not lines[at].strip() or _indent(lines[at]) > indent):
        at += 1
    return at


def plain_page(source: str) -> str:
    """One page of reStructuredText as plain text."""
    lines = source.expandtabs(8).replace("\f", "").splitlines()
    kept: list[str] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        directive = _DIRECTIVE.match(line)
        if directive:
            space, name, argument = directive.groups()
            if name in DROPPED_BLOCKS:
                at = _block_end(lines, at + 1, len(space))
                continue
            at = _directive(lines, at, kept, space, name, argument)
            continue
        if line.lstrip().startswith(".. ") or line.strip() == "..":  # a comment, label or footnote
            at = _block_end(lines, at + 1, _indent(line))
            continue
        if not (_UNDERLINE.match(line) or _TABLE_RULE.match(line)):
            kept.append(re.sub(r"::$", ":", line.rstrip()))
        at += 1
    page = plain_inline(re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip())
    return re.sub(r"[^\n\x20-\x7e\u00a0-\u024f\u2010-\u2026\u20ac]", "", page) + "\n"


def _directive(
    lines: list[str], at: int, kept: list[str], space: str, name: str, argument: str
) -> int:
    """Write what a directive says; the lines indented under it follow as they are."""
    short = name.split(":")[-1]
    if short in NAMED:
        kept.append(space + NAMED[short].format(argument).rstrip())
    elif argument and short not in ("code-block", "sourcecode", "parsed-literal", "doctest"):
        kept.append(space + argument)
    at += 1
    while at < len(lines) and re.match(r"^\s+:[\w-]+:", lines[at]):  # options of the directive
        at += 1
    return at


def pages(sources: Path, folder: str) -> list[str]:
    """The page names of one folder, in order."""
    names = (
        f"{folder}/{path.name.removesuffix('.rst.txt')}"
        for path in (sources / folder).glob("*.rst.txt")
    )
    return sorted(n for n in names if n.split("/")[1] != "index" and n not in SKIPPED)  # fmt: skip


def split_pages(sources: Path, seed: int) -> tuple[list[str], list[str]]:
    """Whole pages for training and for holding out, the latter from every folder."""
    chance = random.Random(seed)
    text = {}
    heldout: list[str] = []
    train: list[str] = []
    spare = HELDOUT_BYTES
    for folder in (*WHOLE_FOLDERS, FILLING_FOLDER):
        names = pages(sources, folder)
        chance.shuffle(names)
        share = HELDOUT_BYTES // 10 if folder in WHOLE_FOLDERS else spare
        for name in names:
            text[name] = plain_page((sources / f"{name}.rst.txt").read_text(encoding="utf-8"))
            size = len(text[name].encode())
            if 2_000 < size <= min(share, 40_000):
                heldout.append(name)
                share -= size
                spare -= size
            else:
                train.append(name)
    room = TRAIN_BYTES
    chosen = []
    for name in train:  # the whole folders first, then library pages while there is room
        size = len(text[name].encode())
        if size < room:
            chosen.append(name)
            room -= size
    chance.shuffle(chosen)
    return [text[name] for name in chosen], [text[name] for name in heldout]


def licence(sources: Path) -> str:
    """The PSF and the Zero-Clause BSD licence, as the documentation itself states them."""
    source = (sources / "license.rst.txt").read_text(encoding="utf-8")
    parts = []
    for first, after in (
        ("PSF LICENSE AGREEMENT", "\nBEOPEN.COM"),
        ("ZERO-CLAUSE BSD", "\n.. _Other"),
    ):
        part = source[source.index(first) :]
        parts.append(re.sub(r"\.\. parsed-literal::\n", "", part[: part.index(after)]))
    return (
        LICENSE_HEADER
        + "\n\n".join(part.replace("|release|", "3.11").strip() for part in parts)
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("sources", type=Path, help="the documentation's folder _sources")
    parser.add_argument("out", type=Path, help="the folder for train.txt, heldout.txt and LICENSE")
    parser.add_argument("--seed", type=int, default=11)
    options = parser.parse_args()
    train, heldout = split_pages(options.sources, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, texts in (("train.txt", train), ("heldout.txt", heldout)):
        joined = DOCUMENT_BREAK.join(texts)
        (options.out / name).write_text(joined, encoding="utf-8")
        print(f"{name}: {len(texts)} pages, {len(joined.encode()) / 1e6:.2f} MB")
    (options.out / "LICENSE").write_text(licence(options.sources), encoding="utf-8")


if __name__ == "__main__":
    main()
