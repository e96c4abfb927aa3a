"""What a person sees of a long run: a bar with an ETA, and a line for each weight that is done.

Knows nothing of how codes are found.
"""

from __future__ import annotations

import sys
from typing import Protocol

from tqdm import tqdm

from .codes import GroupReport, Rescue


class Progress(Protocol):
    """Is told how far a run is."""

    def start(self, groups: int) -> None: ...
    def group(self, report: GroupReport) -> None: ...
    def rescue(self, rescue: Rescue) -> None: ...
    def replayed(self, part: str, groups: int) -> None: ...
    def phase(self, what: str) -> None: ...


class Bar:
    """A Progress on stderr; the bar is left out where stderr is no terminal."""

    def __init__(self) -> None:
        self._bar = tqdm(total=0, unit="group", file=sys.stderr, dynamic_ncols=True, disable=None)

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
        self._bar.update()

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
