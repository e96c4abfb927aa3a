"""What a person sees of a long run: a bar with an ETA, and a line for each weight that is done.

Knows nothing of how codes are found.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Protocol

from tqdm import tqdm

from .codes import GroupReport, Rescue
from .eta import Eta, Planned
from .plan import duration


class Progress(Protocol):
    """Is told how far a run is."""

    def start(self, groups: int) -> None: ...
    def group(self, report: GroupReport) -> None: ...
    def rescue(self, rescue: Rescue) -> None: ...
    def replayed(self, part: str, groups: int) -> None: ...
    def layer(self, seconds: float | None) -> None: ...
    def phase(self, what: str) -> None: ...


class Silence:
    """A Progress that nobody sees."""

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *_: object) -> None: ...
    def start(self, groups: int) -> None: ...
    def group(self, report: GroupReport) -> None: ...
    def rescue(self, rescue: Rescue) -> None: ...
    def replayed(self, part: str, groups: int) -> None: ...
    def layer(self, seconds: float | None) -> None: ...
    def phase(self, what: str) -> None: ...


class Bar:
    """A Progress on stderr; the bar is left out where stderr is no terminal.

    Until a layer is done, what is left is told from the groups that are; then by `expected`, what
    layers take compared with each other.
    """

    def __init__(self, expected: Sequence[Planned]) -> None:
        self._bar = tqdm(
            total=0, unit="group", file=sys.stderr, dynamic_ncols=True, disable=None,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} groups, {elapsed} gone{postfix}",
        )  # fmt: skip
        self._eta = Eta(expected)
        self._began = time.monotonic()
        self._solved = 0  # groups that took time

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def start(self, groups: int) -> None:
        self._bar.reset(total=groups)

    def group(self, report: GroupReport) -> None:
        error = "" if report.error is None else f"{report.error:.2%}"
        blend = f"  blended {report.shrinkage:.0%}" if report.shrinkage else ""
        mended = f"  corrected {report.correction:.0%}" if report.correction else ""
        self.phase(
            f"{_short(report.name):40} {report.scheme:9}{report.tokens:9,} tokens  "
            f"error {error:>7}{report.seconds:8.2f} s{blend}{mended}"
        )
        self._solved += 1
        self._bar.update()
        self._tell_what_is_left()

    def layer(self, seconds: float | None) -> None:
        """A layer is done; None: its time says nothing, an earlier run had written some of it."""
        if seconds is None:
            self._eta.replayed()
        else:
            self._eta.finished(seconds)
        self._began = time.monotonic()
        self._tell_what_is_left()

    def _tell_what_is_left(self) -> None:
        spent = time.monotonic() - self._began
        if self._eta.learned:
            left = self._eta.remaining(spent)
        else:
            left = spent / max(self._solved, 1) * (self._bar.total - self._bar.n)
        self._bar.set_postfix_str(f"{duration(left)} left", refresh=True)

    def rescue(self, rescue: Rescue) -> None:
        self.phase(f"{_short(rescue.tensor):40} {rescue.kind}: {rescue.detail}")

    def replayed(self, part: str, groups: int) -> None:
        self.phase(f"{part} was written before: checked and replayed")
        self._bar.update(groups)

    def phase(self, what: str) -> None:
        self._bar.write(what, file=sys.stderr)


def _short(name: str) -> str:
    """A tensor's name without what all of them share."""
    return name.rpartition("model.layers.")[2].replace("feed_forward.", "")
