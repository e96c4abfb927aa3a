"""SOURCE, wherever it lies: a folder, a Hub id, or the model that comes with llama4q.

The Hub's protocol, cache and progress bars are huggingface_hub's. Knows nothing of tensors.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .config import parse_config, read_config_json
from .errors import UserError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

POCKET = "pocket"
POCKET_MODEL = Path(__file__).parent / "pocket" / "model"

NEEDED = (
    "*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "USE_POLICY*", "NOTICE*",
    "README.md",  # for what it says of licence and language
)  # fmt: skip
# A checkpoint lies at the top of its repository. Folders hold the same weights in other formats
# (original/, onnx/, ...), and `*` matches across slashes.
NOT_NEEDED = ("*/*", "consolidated*")

AGAIN = "repeat the command to go on, files that are complete stay in the cache"


@dataclass(frozen=True)
class Errand:
    """What is done at the Hub, in the words of its error lines."""

    name: str
    right: str  # that a token must have
    again: str


DOWNLOAD = Errand("download", "read", AGAIN)

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)


@dataclass(frozen=True)
class Source:
    """A checkpoint folder on this machine and where it came from."""

    folder: Path
    name: str
    revision: str | None = None  # the Hub's commit


def resolve(name: str) -> Source:
    """The folder of SOURCE, downloaded first when it is a Hub id `owner/name[@revision]`.

    Raises UserError for a name that is neither, for what the Hub refuses, and for a repository
    that holds no Llama 4.
    """
    if name == POCKET:
        return Source(POCKET_MODEL, POCKET)
    if os.path.isdir(name):  # False where a folder may not be entered; pathlib raises
        return Source(Path(name), name)
    match = _HUB_ID.fullmatch(name)
    if match is None or os.path.exists(name):
        raise _neither(name)
    repo = match["repo"]
    with named_errors(repo, match["revision"]):
        # config.json alone first: a model of another kind is refused before its weights come
        folder = _download(repo, match["revision"], ["config.json"])
        if not (folder / "config.json").exists():
            raise UserError(f"{repo}: has no config.json; name a repository with a checkpoint")
        parse_config(read_config_json(folder), f"{repo}/config.json")
        # huggingface_hub keeps each commit in a folder of its name
        return Source(_download(repo, folder.name, NEEDED), repo, folder.name)


def _neither(name: str) -> UserError:
    return UserError(
        f"{name}: no such folder; name a checkpoint folder, a Hub id as owner/name[@revision], "
        f"or {POCKET}"
    )


def _download(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The cache's folder of a commit, with the files that match `patterns`."""
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(NOT_NEEDED),
        )
    )


@contextlib.contextmanager
def named_errors(repo: str, revision: str | None, errand: Errand = DOWNLOAD) -> Iterator[None]:
    """What huggingface_hub raises as one line that says what to do."""
    from huggingface_hub import errors

    # httpx's or httpx2's, whichever huggingface_hub is built on; raised when a connection breaks
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        yield
    except errors.HFValidationError:
        raise _neither(repo) from None
    except errors.GatedRepoError:
        raise UserError(
            f"{repo}: is gated; accept its licence on its Hub page, then run 'hf auth login'"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{repo}: neither a folder here nor a repository on the Hub that this token may see; "
            f"check the name, or run 'hf auth login'"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{repo}: has no revision {revision!r}; check it on the Hub") from None
    except errors.LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise _refused(repo, error.__cause__, errand) from None
        raise UserError(
            f"{repo}: not all of it is in the cache, and the Hub cannot be reached "
            f"({_one_line(error.__cause__ or error)}); connect, or name a folder"
        ) from None
    except errors.HfHubHTTPError as error:
        raise _refused(repo, error, errand) from None
    # RuntimeError is what hf_xet, which moves large files, makes of a broken connection, and
    # huggingface_hub of whatever ends the upload of one
    except (HTTPError, OSError, RuntimeError) as error:
        cause = error.__cause__ or error
        # of what the storage answers only its words: the address is signed, like a password
        said = _said(cause) if isinstance(cause, errors.HfHubHTTPError) else _one_line(cause)
        raise UserError(f"{repo}: {errand.name} failed ({said}); {errand.again}") from None


def _refused(repo: str, error: HfHubHTTPError, errand: Errand) -> UserError:
    login = f"run 'hf auth login' with a token that may {errand.right} it"
    advice = login if error.response.status_code in (401, 403) else errand.again
    return UserError(f"{repo}: {_said(error)}; {advice}")


def _said(error: HfHubHTTPError) -> str:
    said = _one_line(error.server_message or error.response.reason_phrase)
    return f"the Hub answers {error.response.status_code} ({said})"


def _one_line(error: BaseException | str) -> str:
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 200 else line[:197] + "..."
