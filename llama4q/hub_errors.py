"""What the Hub, or the way to it, refuses, as one line that says what to do.

Knows nothing of what was asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

AGAIN = "repeat the command to go on, files that are complete are not fetched again"
TOO_MANY = 429


class UnavailableError(UserError):
    """It may go well another time."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"{what}; {advice}")
        self.what = what


@contextlib.contextmanager
def named_errors(repo: str, revision: str | None) -> Iterator[None]:
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
            raise _refused(repo, error.__cause__) from None
        raise UnavailableError(
            f"{repo}: not all of it is in the cache, and the Hub cannot be reached "
            f"({one_line(error.__cause__ or error)})",
            "connect, or name a folder",
        ) from None
    except errors.HfHubHTTPError as error:
        raise _refused(repo, error) from None
    # RuntimeError is what hf_xet, which fetches large files, makes of a broken connection
    except (HTTPError, OSError, RuntimeError) as error:
        raise UnavailableError(f"{repo}: download failed ({one_line(error)})", AGAIN) from None


def _refused(repo: str, error: HfHubHTTPError) -> UserError:
    status = error.response.status_code
    said = one_line(error.server_message or error.response.reason_phrase)
    what = f"{repo}: the Hub answers {status} ({said})"
    if status in (401, 403):
        return UserError(f"{what}; run 'hf auth login' with a token that may read it")
    if status == TOO_MANY:
        return UnavailableError(
            what, f"wait some minutes, or run 'hf auth login' to be let more; {AGAIN}"
        )
    return UnavailableError(what, AGAIN)


def one_line(error: BaseException | str) -> str:
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 200 else line[:197] + "..."
