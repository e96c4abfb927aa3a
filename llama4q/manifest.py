"""The SHA-256 and size of every file of a checkpoint, in one file: whether a copy is whole.

Knows nothing of tensors, nor of what a checkpoint must hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import check_inside, naming_errors, sha256
from .errors import UserError

MANIFEST = "manifest.json"
CARD = "README.md"  # people edit cards, also on the Hub's pages


@dataclass(frozen=True)
class Entry:
    """What the manifest says of one file."""

    size: int  # bytes
    sha256: str


def manifest(folder: Path, known: Mapping[str, str] = {}) -> bytes:
    """The manifest of the files in `folder`; `known` SHA-256 by file name are not taken again.

    Left out are the manifest, the card and what begins with a dot, as that is of git, of the Hub's
    client or of a run's work. Raises UserError for a folder in the folder, or an unreadable file.
    """
    files = {}
    for path in _parts(folder):
        if not path.is_file():
            raise UserError(f"{path}: is no file, so no part of a checkpoint; move it elsewhere")
        digest = known[path.name] if path.name in known else sha256(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": digest}
    return _to_json({"files": files})


def extended(folder: Path, names: Iterable[str]) -> bytes | None:
    """The manifest with those of these files in `folder` that it does not name; None without any.

    Raises UserError when there is no manifest, or a file cannot be read.
    """
    entries = read_manifest(folder)
    added = [name for name in names if name not in entries]
    if not added:
        return None
    found = json.loads((folder / MANIFEST).read_bytes())
    for name in added:
        size = (folder / name).stat().st_size
        found["files"][name] = {"size": size, "sha256": sha256(folder / name)}
    return _to_json(found)


def check_manifest(
    folder: Path, read: Callable[[int], None] = lambda count: None
) -> dict[str, str]:
    """The SHA-256 of each file in `folder`, all of which are read; `read` is told bytes.

    Raises UserError when there is no manifest, when it names a file out of the folder, and at the
    first file that is missing, additional, or not as it was.
    """
    entries = read_manifest(folder)
    unnamed = [path.name for path in _parts(folder) if path.name not in entries]
    if unnamed:
        raise UserError(
            f"{folder}: {unnamed[0]} and {len(unnamed) - 1} more are not in {MANIFEST}; "
            f"move them elsewhere"
        )
    for name, entry in entries.items():  # sizes first, as they cost nothing
        _check_size(folder / name, entry.size)
    for name, entry in entries.items():
        if sha256(folder / name, read) != entry.sha256:
            raise UserError(
                f"{folder / name}: is not as it was written (another SHA-256 than in {MANIFEST}); "
                f"copy or download it again"
            )
    return {name: entry.sha256 for name, entry in entries.items()}


def read_manifest(folder: Path) -> dict[str, Entry]:
    """The entries by file name. Raises UserError when there is none, or a name leads elsewhere."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{folder}: not a finished llama4q checkpoint, it has no {MANIFEST}; "
            f"repeat the command that writes or downloads it"
        )
    try:
        with naming_errors(path):
            content = path.read_bytes()
        entries = {
            str(name): Entry(int(entry["size"]), str(entry["sha256"]))
            for name, entry in json.loads(content)["files"].items()
        }
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{path}: not a manifest; copy or download it again") from None
    for name in entries:
        check_inside(name, path)
    return entries


def _to_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _parts(folder: Path) -> Iterator[Path]:
    """What lies in `folder` and belongs into its manifest, in order."""
    with naming_errors(folder):
        for path in sorted(folder.iterdir()):
            if path.name not in (MANIFEST, CARD) and not path.name.startswith("."):
                yield path


def _check_size(path: Path, size: int) -> None:
    if not path.is_file():
        raise UserError(f"{path}: is missing, {MANIFEST} names it; copy or download it again")
    found = path.stat().st_size
    if found != size:
        kind = "truncated" if found < size else "changed"
        raise UserError(
            f"{path}: is {kind} ({found:,} bytes, {size:,} in {MANIFEST}); "
            f"copy or download it again"
        )
