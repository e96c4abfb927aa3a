"""What the Hub, or the way to it, refuses, as one line that says what to do.

Knows nothing of what was asked for.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from .errors import UserError, one_line

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

AGAIN = "repeat the command to go on, files that are complete are not fetched again"
TOO_MANY = 429

Result = TypeVar("Result")


@dataclass(frozen=True)
class Errand:
    """What is done at the Hub, in the words of its error lines."""

    name: str
    right: str  # that a token must have
    again: str


DOWNLOAD = Errand("download", "read", AGAIN)


class UnavailableError(UserError):
    """It may go well another time."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"{what}; {advice}")
        self.what = what


def persistently(
    work: Callable[[], Result],
    tell: Callable[[str], None],
    pauses: Iterable[float],
    wait: Callable[[float], object] = time.sleep,
) -> Result:
    """`work`, again after each of `pauses` in seconds while the Hub is unavailable, which is told.

    Raises UnavailableError when it stays so.
    """
    for pause in pauses:
        try:
            return work()
        except UnavailableError as error:
            tell(f"{error.what}; trying again in {pause:.0f} s")
            wait(pause)
    return work()


@contextlib.contextmanager
def named_errors(repo: str, revision: str | None, errand: Errand = DOWNLOAD) -> Iterator[None]:
    """What huggingface_hub raises as one line that says what to do."""
    from huggingface_hub import errors

    # httpx's or httpx2's, whichever huggingface_hub is built on; raised when a connection breaks
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        yield
    except errors.HFValidationError:
        raise UserError(
            f"{repo}: no such folder, and no Hub id; name a folder, or owner/name[@revision]"
        ) from None
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
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise _refused(repo, error.__cause__, errand) from None
        raise UnavailableError(
            f"{repo}: not all of it is in the cache, and the Hub cannot be reached "
            f"({one_line(error.__cause__ or error)})",
            "connect, or name a folder",
        ) from None
    except errors.HfHubHTTPError as error:
        raise _refused(repo, error, errand) from None
    # RuntimeError is what hf_xet, which moves large files, makes of a broken connection, and
    # huggingface_hub of whatever ends the upload of one
    except (HTTPError, OSError, RuntimeError) as error:
        cause = error.__cause__ or error
        # of what the storage answers only its words: the address is signed, like a password
        said = _said(cause) if isinstance(cause, errors.HfHubHTTPError) else one_line(cause)
        raise UnavailableError(f"{repo}: {errand.name} failed ({said})", errand.again) from None


def _refused(repo: str, error: HfHubHTTPError, errand: Errand) -> UserError:
    status, what = error.response.status_code, f"{repo}: {_said(error)}"
    if status in (401, 403):
        return UserError(f"{what}; run 'hf auth login' with a token that may {errand.right} it")
    if status == TOO_MANY:
        patience = "wait some minutes, or run 'hf auth login' to be let more"
        return UnavailableError(what, f"{patience}; {errand.again}")
    return UnavailableError(what, errand.again)


def _said(error: HfHubHTTPError) -> str:
    said = one_line(error.server_message or error.response.reason_phrase)
    return f"the Hub answers {error.response.status_code} ({said})"
