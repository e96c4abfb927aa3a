"""The user's mistakes: one line that says what is wrong, the value seen, and what to do next."""

import difflib
from collections.abc import Collection


class UserError(Exception):
    """Something the user can mend. The command line shows its one line and exits with code 1."""


def nearest(word: str, known: Collection[str]) -> str:
    """A question with the known word that is most like `word`, or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def one_line(error: BaseException | str) -> str:
    """What a library says, for the middle of a line: at most 200 characters."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 200 else line[:197] + "..."
