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
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STDERR = 2
SOON = 0.01  # seconds

Handler = Callable[[int, FrameType | None], None] | signal.Handlers

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
    _handle(_on_signal)
    try:
        with _raised_again():
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
    _handle(signal.SIG_DFL)
    _asked = signal.Signals(number)
    if _sections:
        said = b"\nFinishing what is being written; a second signal stops at once.\n"
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(STDERR, said)  # not print, which this may be in the middle of
    stop_if_asked()


@contextlib.contextmanager
def _raised_again() -> Iterator[None]:
    """`Stopped` a moment later where Python lets nothing out, as in a finalizer."""
    before = sys.unraisablehook
    repeats: list[threading.Timer] = []
    main = threading.get_ident()

    def hook(lost: sys.UnraisableHookArgs) -> None:
        if not isinstance(lost.exc_value, Stopped):
            before(lost)
            return
        _handle(_on_signal)
        repeats.append(threading.Timer(SOON, signal.pthread_kill, [main, lost.exc_value.signal]))
        repeats[-1].start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        for repeat in repeats:
            repeat.cancel()


def _handle(handler: Handler) -> None:
    for number in SIGNALS:
        # a shell has SIGINT ignored in what it runs in the background; leave that so
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)
