"""Publishing a checkpoint on the Hub: one commit, which changes all of its files or none.

Large files go first, as objects that belong to no commit yet; the commit that names them is one
last request. So an upload that is cut leaves the repository as it was, and the objects that arrived
stay at the Hub: when the command is repeated, it asks which are there (by SHA-256; with Xet, piece
by piece) and sends the others. The protocol and the progress bars are huggingface_hub's. Knows
nothing of licences, reports or tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError, one_line
from .hub_errors import Errand, Result, named_errors, persistently
from .manifest import CARD, MANIFEST, extended
from .writer import write_atomically, writing

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

UPLOAD = Errand("upload", "write", "repeat the command to go on, what has arrived stays there")
PAUSES = (1.0, 2.0, 4.0)  # seconds before a request is tried again: somebody waits for it
# Weights that are not of the new checkpoint; whoever loads all shards would mix two of them.
REPLACED = ("*.safetensors", "*.safetensors.index.json")

_OTHER_TYPE = re.compile(r"(datasets|spaces|kernels|buckets)/", re.ASCII)
_URL = re.compile(r"\w+://|hf\.co/|huggingface\.co/")


@dataclass(frozen=True)
class Order:
    """What goes where. Raises UserError for a name or a combination that no push can have."""

    folder: Path
    repo: str  # owner/name
    private: bool = False  # when it is created
    revision: str | None = None  # a branch, created when it is not there; None: main
    create_pr: bool = False  # propose the commit instead of making it

    def __post_init__(self) -> None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils._validators import validate_repo_id

        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder; name the checkpoint to publish")
        if _OTHER_TYPE.match(self.repo):
            raise UserError(
                f"{self.repo}: a repository of another type; a checkpoint goes to a model's, "
                f"name it as owner/name"
            )
        if _URL.match(self.repo) or self.repo.count("/") != 1:
            raise UserError(f"{self.repo}: not a model's repository; name it as owner/name")
        try:
            validate_repo_id(self.repo)
        except HFValidationError as error:
            said = one_line(error)
            raise UserError(f"{self.repo}: not a name for a repository ({said})") from None
        if self.create_pr and self.revision not in (None, "main"):
            raise UserError(
                f"--create-pr with --revision {self.revision}: the Hub proposes changes of main "
                f"only; leave out one of the two"
            )


def read_card(folder: Path) -> str | None:
    """The README.md of a folder; None where there is none."""
    path = folder / CARD
    return path.read_text(encoding="utf-8") if path.is_file() else None


def list_too(folder: Path, names: Iterable[str]) -> None:
    """Have the manifest name these files too, which whoever publishes may have added by hand.

    Raises UserError when there is no manifest: only what is finished has one.
    """
    listed = extended(folder, names)
    if listed is not None:
        with writing(folder):
            write_atomically(folder / MANIFEST, listed)


def check_token() -> None:
    """Raises UserError where this machine has no token for the Hub."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError("no token for the Hub here; run 'hf auth login' with one that may write")


def sent(files: Mapping[str, str]) -> list[str]:
    """The names of all that goes with the manifest's `files`."""
    return [*files, MANIFEST, CARD]


def publish(order: Order, files: Mapping[str, str], card: str, tell: Callable[[str], None]) -> str:
    """Send `files` (their SHA-256 by name), the manifest and the card; returns the address.

    The card is written beside them first, where there is none. Until the upload begins, what an
    unavailable Hub refused is tried again, which `tell` hears of. Raises UserError, with nothing
    changed at the Hub, for whatever ends the upload.
    """
    from huggingface_hub import HfApi

    if read_card(order.folder) is None:
        with writing(order.folder / CARD):
            write_atomically(order.folder / CARD, card.encode())
    api = HfApi(library_name="llama4q")

    def hold(work: Callable[[], Result]) -> Result:
        def named() -> Result:
            with named_errors(order.repo, order.revision, UPLOAD):
                return work()

        return persistently(named, tell, PAUSES)

    hold(lambda: _validate_card(order))
    if not order.create_pr:
        hold(lambda: api.create_repo(order.repo, private=order.private or None, exist_ok=True))
        if order.revision is not None and not order.revision.startswith("refs/"):
            branch = order.revision
            hold(lambda: api.create_branch(order.repo, branch=branch, exist_ok=True))
    with named_errors(order.repo, order.revision, UPLOAD):
        return _commit(api, order, files)


def _commit(api: HfApi, order: Order, files: Mapping[str, str]) -> str:
    """One commit on top of the last one; its address, or that of the pull request."""
    from huggingface_hub import CommitOperationDelete

    parent, there = _state(api, order)
    names = sent(files)
    stale = [CommitOperationDelete(name) for name in _replaced(there, names)]
    try:
        done = api.create_commit(
            order.repo,
            [*(_addition(order.folder / name, files.get(name)) for name in names), *stale],
            commit_message=f"Upload {order.folder.absolute().name} with llama4q",
            revision=order.revision,
            create_pr=order.create_pr,
            parent_commit=parent,
        )
    except ValueError as error:  # what the Hub answered made no sense to the client
        said = one_line(error)
        raise UserError(f"{order.repo}: upload failed ({said}); {UPLOAD.again}") from None
    return str(done.pr_url or done.commit_url)


def _validate_card(order: Order) -> None:
    """Raises UserError when the Hub would not take the card's metadata."""
    from huggingface_hub import ModelCard

    try:
        ModelCard.load(order.folder / CARD).validate()
    except ValueError as error:
        said = one_line(error)
        raise UserError(
            f"{order.folder / CARD}: the Hub refuses its metadata ({said}); mend it"
        ) from None


def _state(api: HfApi, order: Order) -> tuple[str, Collection[str]]:
    """The last commit of a branch, and the files in it."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(order.repo, revision=order.revision)
    except RepositoryNotFoundError:
        raise UserError(
            f"{order.repo}: no such repository that this token may see; check the name, or leave "
            f"out --create-pr to create it"
        ) from None
    if order.private and not info.private:
        raise UserError(
            f"{order.repo}: is there already, and public; make it private in its settings, or "
            f"leave out --private"
        )
    assert info.sha is not None  # a repository has a first commit
    return info.sha, [file.rfilename for file in info.siblings or ()]


def _replaced(there: Collection[str], names: Collection[str]) -> list[str]:
    return [
        name
        for name in there
        if name not in names
        and "/" not in name
        and any(fnmatch(name, pattern) for pattern in REPLACED)
    ]


def _addition(path: Path, digest: str | None) -> CommitOperationAdd:
    """One file; where its SHA-256 is known, that is what must arrive."""
    from huggingface_hub import CommitOperationAdd

    added = CommitOperationAdd(path.name, str(path))
    if digest is not None:
        added.upload_info.sha256 = bytes.fromhex(digest)
    return added
