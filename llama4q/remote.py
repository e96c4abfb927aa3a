"""A repository on the Hub as it lies there: its files with their digests, and bytes out of them.

The protocol is huggingface_hub's. Knows nothing of tensors, caches or folders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .checkpoint import sha256
from .errors import UserError
from .hub_errors import named_errors

PARTIAL = 206  # what answers a request for a range


@dataclass(frozen=True)
class RemoteFile:
    """What the Hub says of one file."""

    name: str
    size: int  # bytes
    digest: str  # SHA-256 of a large file, git's SHA-1 of a small one

    @property
    def large(self) -> bool:
        return len(self.digest) == 64


@dataclass(frozen=True)
class Remote:
    """A repository at one commit."""

    repo: str
    commit: str

    def files(self) -> dict[str, RemoteFile]:
        """Those at its top, where a checkpoint lies. Raises UserError for what the Hub refuses."""
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        with named_errors(self.repo, self.commit):
            tree = list(HfApi().list_repo_tree(self.repo, revision=self.commit))
        found = {}
        for entry in tree:
            if isinstance(entry, RepoFile) and self._at_top(entry.path):
                digest = entry.lfs.sha256 if entry.lfs else entry.blob_id
                found[entry.path] = RemoteFile(entry.path, entry.size, digest)
        return found

    def _at_top(self, name: str) -> bool:
        parts = PurePosixPath(name).parts
        if "\\" in name or name.startswith("/") or ".." in parts or not parts:
            raise UserError(f"{self.repo}: lists {name!r}, outside its folder; refused")
        return len(parts) == 1

    def read(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes of a file from `start` on; fewer where the file ends before.

        Raises UserError for what the Hub refuses, and when it does not answer with that range.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
            http_backoff,
        )

        asked = {**build_hf_headers(), "Range": f"bytes={start}-{start + length - 1}"}
        url = hf_hub_url(self.repo, name, revision=self.commit)
        with named_errors(self.repo, self.commit):
            answer = http_backoff("GET", url, headers=asked)
            hf_raise_for_status(answer)
        if answer.status_code != PARTIAL or len(answer.content) > length:
            raise UserError(
                f"{self.repo}: the server of {name} sends whole files only; "
                f"fetch it by 'llama4q pull {self.repo}' first"
            )
        return answer.content

    def fetch(self, name: str, folder: Path | None, again: bool = False) -> Path:
        """The whole file, into `folder` or huggingface_hub's cache.

        Goes on where an earlier call broke off; with `again` what lies there does not count.
        Raises UserError for what the Hub refuses.
        """
        from huggingface_hub import hf_hub_download

        with named_errors(self.repo, self.commit):
            path = hf_hub_download(
                self.repo, name, revision=self.commit, local_dir=folder, force_download=again
            )
        return Path(path)


def mend(
    path: Path, expected: RemoteFile, fetch_again: Callable[[], object], tell: Callable[[str], None]
) -> None:
    """A file that has other bytes here than on the Hub is fetched once more, which `tell` hears of.

    Raises UserError when they are wrong again.
    """
    if (problem := damage(path, expected)) is None:
        return
    tell(f"{path.name}: {problem}; fetching it again")
    fetch_again()
    if (problem := damage(path, expected)) is not None:
        raise UserError(
            f"{path.name}: {problem}, and so when fetched again; "
            f"check disk and network, then repeat the command"
        )


def damage(path: Path, expected: RemoteFile) -> str | None:
    """How a file here differs from the one on the Hub; None when it does not."""
    size = path.stat().st_size
    if size != expected.size:
        return f"has {size:,} bytes, the Hub says {expected.size:,}"
    kind, found = ("SHA-256", sha256(path)) if expected.large else ("git's SHA-1", _blob(path))
    if found != expected.digest:
        return f"has {kind} {found[:12]}..., the Hub says {expected.digest[:12]}..."
    return None


def _blob(path: Path) -> str:
    from huggingface_hub.utils.sha import git_hash

    return git_hash(path.read_bytes())
