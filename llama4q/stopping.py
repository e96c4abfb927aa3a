"""Ctrl-C and SIGTERM: stop where nothing is lost by it, with no traceback.

The first signal raises `Stopped` in the main thread, at once or at the end of what is `finishing`;
the second one ends the process. Knows nothing of what is at work.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_asked: signal.Signals | None = None  # stands until the next `stoppable`, for threads to see
_sections = 0  # how many `finishing` are around the main thread


class Stopped(BaseException):
    """A signal asked to stop. Like KeyboardInterrupt no Exception: nobody may mend it."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.signal = number


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Signals raise `Stopped` in here. Does nothing in other threads than the main one."""
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _asked = None
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as a shell leaves SIGINT for what runs behind it
            signal.signal(number, _on_signal)
    try:
        yield
    except KeyboardInterrupt:  # hf_xet, which fetches large files, has a handler of its own
        raise Stopped(signal.SIGINT) from None
    finally:
        if _asked is None:  # else the process is about to end, and the next signal may end it
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def finishing() -> Iterator[None]:
    """What is in here is finished before a signal stops the main thread."""
    global _sections
    _sections += 1
    try:
        yield
    finally:
        _sections -= 1
    stop_if_asked()


def stop_if_asked() -> None:
    """Raises Stopped where a signal has come and nothing is to be finished, in any thread."""
    if _asked is not None and not _sections:
        raise Stopped(_asked)


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _asked
    del frame
    for each in SIGNALS:
        signal.signal(each, signal.SIG_DFL)
    _asked = signal.Signals(number)
    if _sections:
        # not print: this may be in the middle of one
        said = b"\nFinishing what is being written; a second signal stops at once.\n"
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, said)
    stop_if_asked()
