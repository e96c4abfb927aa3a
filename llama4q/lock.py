"""One run at a time in a folder: a lock that falls when its holder ends, however it ends.

Knows nothing of what lies in the folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
from pathlib import Path
from typing import IO

from .errors import UserError

# What flock says on a file system that has no locks: Lustre or NFS mounted without them.
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class Lock:
    """Held until `release`, or until the process ends, by SIGKILL too."""

    def __init__(self, path: Path, folder: Path) -> None:
        """Raises UserError when another run holds the lock `path` of `folder`.

        Where the file system has no locks it says so and goes on: such disks are where room for
        a large model is, and two runs in one folder are a rare mistake.
        """
        with contextlib.ExitStack() as undo:
            self._file = undo.enter_context(path.open("a+"))
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _held(path, folder) from None
            except OSError as error:
                _go_on_without(error, folder)
            if not _in_place(self._file, path):
                raise _held(path, folder)
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._file.flush()
            undo.pop_all()

    def release(self) -> None:
        self._file.close()


def refuse_held(path: Path, folder: Path) -> None:
    """Raises UserError when a run holds the lock `path` of `folder` now."""
    with contextlib.suppress(FileNotFoundError), path.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _held(path, folder) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise


def _in_place(file: IO[str], path: Path) -> bool:
    """Not where the run before took the file away after it was opened and before it was locked."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _held(path: Path, folder: Path) -> UserError:
    holder = "another process"
    with contextlib.suppress(OSError):
        holder = path.read_text() or holder
    return UserError(
        f"{folder}: another run is at work here ({holder}); wait for its end, stop it, "
        f"or choose another folder"
    )


def _go_on_without(error: OSError, folder: Path) -> None:
    if error.errno not in NO_LOCKS:
        raise error
    print(
        f"Warning: {folder}: this file system has no locks ({error.strerror}); "
        f"start no second run in this folder",
        file=sys.stderr,
    )
