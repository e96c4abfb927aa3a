"""SOURCE, wherever it lies: a folder, a Hub id, or the model that comes with llama4q.

The Hub's protocol, cache and progress bars are huggingface_hub's. Knows nothing of tensors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError

POCKET = "pocket"
POCKET_MODEL = Path(__file__).parent / "pocket" / "model"

NEEDED = (
    "*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "USE_POLICY*", "NOTICE*",
)  # fmt: skip
NOT_NEEDED = ("original/*", "consolidated*", "*.bin", "*.pth")

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)


@dataclass(frozen=True)
class Source:
    """A checkpoint folder on this machine and where it came from."""

    folder: Path
    name: str
    revision: str | None = None  # the Hub's commit


def resolve(name: str) -> Source:
    """The folder of SOURCE, downloaded first when it is a Hub id `owner/name[@revision]`.

    Raises UserError for a name that is neither, and for what the Hub refuses.
    """
    if name == POCKET:
        return Source(POCKET_MODEL, POCKET)
    if Path(name).is_dir():
        return Source(Path(name), name)
    match = _HUB_ID.fullmatch(name)
    if match is None or Path(name).exists():
        raise UserError(
            f"{name}: no such folder; name a checkpoint folder, a Hub id as owner/name[@revision], "
            f"or {POCKET}"
        )
    folder = _download(match["repo"], match["revision"])
    # huggingface_hub keeps each commit in a folder of its name
    return Source(folder, match["repo"], folder.name)


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        found = snapshot_download(
            repo, revision=revision, allow_patterns=list(NEEDED), ignore_patterns=list(NOT_NEEDED)
        )
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
    except errors.LocalEntryNotFoundError:
        raise UserError(
            f"{repo}: the Hub cannot be reached and the cache does not hold it; "
            f"connect, or name a folder"
        ) from None
    except (errors.HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{repo}: download failed ({reason}); repeat the command to go on"
        ) from None
    return Path(found)
