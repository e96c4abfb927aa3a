"""SOURCE, wherever it lies: a folder, a Hub id, or the model that comes with llama4q.

The Hub's protocol, cache and progress bars are huggingface_hub's. Knows nothing of tensors.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Callable, Sequence, Set
from pathlib import Path

from .checkpoint import INDEX, SINGLE, read_index
from .config import parse_config, read_config_json
from .errors import UserError
from .hub_errors import named_errors
from .remote import Remote, mend
from .source import Source

POCKET = "pocket"
POCKET_MODEL = Path(__file__).parent / "pocket" / "model"

SMALL = (
    "*.json", "*.jinja", "*.model", "*.txt", "*.md", "LICENSE*", "USE_POLICY*", "NOTICE*",
    "report.html",
)  # fmt: skip
NEEDED = ("*.safetensors", *SMALL)
# A checkpoint lies at the top of its repository. Folders hold the same weights in other formats
# (original/, onnx/, ...), and `*` matches across slashes.
NOT_NEEDED = ("*/*", "consolidated*")

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)

Tell = Callable[[str], None]


def _nobody(line: str) -> None:
    del line


def resolve(name: str, tell: Tell = _nobody) -> Source:
    """The folder of SOURCE, downloaded first when it is a Hub id `owner/name[@revision]`.

    What is downloaded is held to the Hub's digests; wrong bytes, which `tell` hears of, are fetched
    again once. Raises UserError for a name that is neither, for what the Hub refuses, and for a
    repository that holds no Llama 4.
    """
    found = _here(name) or _small_files(name)
    if found.revision is None or _shards_here(found.folder):
        return found
    remote = Remote(found.name, found.revision)
    files = remote.files()
    there = {path.name for path in found.folder.glob("*.safetensors")}
    wanted = _wanted(found.folder)
    _check_room(found, sum(files[name].size for name in wanted - there if name in files))
    folder = _download(found.name, found.revision, NEEDED)
    _check(remote, folder, _files(folder) - there, tell)
    return found


def resolve_remote(name: str) -> Source:
    """As `resolve`, but shards that are not here stay on the Hub: their headers alone are read."""
    found = _here(name) or _small_files(name)
    if found.revision is None or _shards_here(found.folder):
        return found
    from .streamed import Shards, StreamedSource, read_headers

    remote = Remote(found.name, found.revision)
    files = remote.files()
    infos = read_headers(remote, found.folder, files)
    return StreamedSource(
        folder=found.folder, name=found.name, revision=found.revision,
        shards=Shards(remote, files, infos),
    )  # fmt: skip


def pull(name: str, tell: Tell = _nobody) -> Source:
    """As `resolve`, but every file is held to the Hub's digests, also those from earlier calls."""
    found = resolve(name, tell)
    if found.revision is None:
        raise UserError(f"{name}: lies on this machine; name a Hub id as owner/name[@revision]")
    remote = Remote(found.name, found.revision)
    _check(remote, found.folder, _files(found.folder), tell)
    return found


def _here(name: str) -> Source | None:
    """What needs no Hub."""
    if name == POCKET:
        return Source(folder=POCKET_MODEL, name=POCKET)
    if os.path.isdir(name):  # False where a folder may not be entered; pathlib raises
        return Source(folder=Path(name), name=name)
    return None


def _small_files(name: str) -> Source:
    """The repository of that name, all but its shards."""
    match = _HUB_ID.fullmatch(name)
    if match is None or os.path.exists(name):
        raise UserError(
            f"{name}: no such folder; name a checkpoint folder, a Hub id as owner/name[@revision], "
            f"or {POCKET}"
        )
    repo = match["repo"]
    # config.json alone first: a model of another kind is refused before the rest comes
    folder = _download(repo, match["revision"], ["config.json"])
    if not (folder / "config.json").exists():
        raise UserError(f"{repo}: has no config.json; name a repository with a checkpoint")
    parse_config(read_config_json(folder), f"{repo}/config.json")
    # huggingface_hub keeps each commit in a folder of its name
    return Source(folder=_download(repo, folder.name, SMALL), name=repo, revision=folder.name)


def _download(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The cache's folder of a commit, with the files that match `patterns`."""
    from huggingface_hub import snapshot_download

    with named_errors(repo, revision):
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(NOT_NEEDED),
            )
        )


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def _wanted(folder: Path) -> set[str]:
    """The shards of a checkpoint whose index, if it has one, is here."""
    index = read_index(folder) if (folder / INDEX).exists() else None
    return {SINGLE} if index is None else set(index.values())


def _shards_here(folder: Path) -> bool:
    """Whether the cache has all of a checkpoint."""
    return all((folder / shard).exists() for shard in _wanted(folder))


def _check_room(found: Source, needed: int) -> None:
    """Raises UserError when the cache's disk cannot take so many bytes more."""
    blobs = found.folder.parent.parent / "blobs"  # of huggingface_hub's cache
    begun = sum(path.stat().st_size for path in blobs.glob("*.incomplete"))
    free = shutil.disk_usage(found.folder).free + begun
    if needed > free:
        raise UserError(
            f"{found.name}: {needed / 1e9:.1f} GB are to be downloaded, the disk of the cache has "
            f"{free / 1e9:.1f} GB free; free some, set HF_HOME to a folder on another disk, or "
            f"quantize with --stream"
        )


def _check(remote: Remote, folder: Path, names: Set[str], tell: Tell) -> None:
    """Raises UserError when a file has other bytes than the Hub's, twice."""
    files = remote.files()
    for name in sorted(files.keys() & names):  # else it is no file of the repository's
        again = functools.partial(remote.fetch, name, None, again=True)
        mend(folder / name, files[name], again, tell)
