"""A calibration text as the user names it: one source, or several with shares and lengths.

    SOURCE                             one, as llama4q.text knows it
    SOURCE:SHARE,SOURCE:SHARE          so much of the calibration tokens from each
    SOURCE:SHARE,SOURCE:SHARExLENGTH   the second one in sequences of so many tokens

Shares need not sum to 1. A source may be named again with another length. A file is a file even
where its name holds commas or colons. A source alone has no share: behind a Hub id a number is
then its configuration.

Knows what sources are called, nothing of what they hold.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from llama4q.errors import UserError
from llama4q.text import SHIPPED, TextSource, parse_source

FORM = "write each as SOURCE:SHARE or SOURCE:SHARExLENGTH, as a:0.6,b:0.4x8192"

_PART = re.compile(
    r"(?P<name>.+):(?P<share>[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf))(x(?P<length>\d+))?",
    re.ASCII | re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class Portion:
    """What one source gives to a calibration set."""

    source: TextSource
    share: Fraction = Fraction(1)  # of the tokens; the shares of a mix sum to 1
    length: int | None = None  # tokens a sequence; None is the recipe's

    @property
    def origin(self) -> Hashable:
        """The same for two portions that read the same text, however it is spelled."""
        source = self.source
        return _files(source), source.dataset, source.config, source.split, source.column


Mix = tuple[Portion, ...]


def parse_mix(text: str) -> Mix:
    """The portions that `text` names, in its order; a single source is a mix of one.

    Raises UserError for what is no source, a share that is no positive number, and two sources that
    share a file.
    """
    parts = list(_parts(text))
    matches = [None if os.path.exists(part) else _PART.fullmatch(part) for part in parts]
    shared = [match for match in matches if match is not None]
    alone = len(parts) == 1 and not (shared and _is_local(shared[0]["name"]))
    odd_column = not shared and os.path.exists(text.partition("#")[0])
    if alone or odd_column:
        return (Portion(parse_source(text)),)
    for part, match in zip(parts, matches, strict=True):
        if match is None:
            raise UserError(
                f"calibration text {text!r}: no such file, and as a mix {part!r} has no share; "
                f"{FORM}"
            )
    portions = [_portion(match) for match in shared]
    total = sum(portion.share for portion in portions)
    mix = tuple(
        Portion(portion.source, portion.share / total, portion.length) for portion in portions
    )
    _refuse_shared_files(mix)
    return mix


def _parts(text: str) -> Iterator[str]:
    """`text` at its commas, but for those within the name of a file that exists."""
    pieces = text.split(",")
    start = 0
    while start < len(pieces):
        stop = len(pieces)
        while stop > start + 1 and not _names_a_file(",".join(pieces[start:stop])):
            stop -= 1
        yield ",".join(pieces[start:stop])
        start = stop


def _names_a_file(part: str) -> bool:
    match = _PART.fullmatch(part)
    return _is_local(part) or (match is not None and _is_local(match["name"]))


def _is_local(name: str) -> bool:
    """Whether `name` is the shipped text or a file or folder, perhaps with a column behind it."""
    if name == SHIPPED or os.path.exists(name):
        return True
    address, _, column = name.partition("#")
    return os.path.exists(address) and not set(column) & set(",:")


def _portion(match: re.Match[str]) -> Portion:
    """One part of a mix, its share as written."""
    share = float(match["share"])
    if not (0 < share < math.inf):
        raise UserError(
            f"calibration text {match[0]!r}: a share of {match['share']}; shares are numbers above "
            f"0, and need not sum to 1"
        )
    length = int(match["length"]) if match["length"] else None
    if length is not None and length < 2:
        raise UserError(
            f"calibration text {match[0]!r}: sequences of {length} tokens; at least 2 are needed, "
            f"the first is begin-of-text"
        )
    return Portion(parse_source(match["name"]), Fraction(match["share"]), length)


def _refuse_shared_files(mix: Mix) -> None:
    for one, other in itertools.combinations(mix, 2):
        if one.origin == other.origin or one.source.column != other.source.column:
            continue
        for file in sorted(set(_files(one.source)) & set(_files(other.source))):
            raise UserError(
                f"texts {one.source.name!r} and {other.source.name!r} both hold {file}; "
                f"no text is used twice, name each file once"
            )


def _files(source: TextSource) -> tuple[str, ...]:
    return tuple(str(file.resolve()) for file in source.files)


def rows_of(mix: Mix, samples: int, length: int) -> list[int]:
    """How many sequences each portion gives, at least one, for `samples` x `length` tokens in all.

    Largest remainders: with one length for all it is the classical apportionment, with several the
    total is as near to the budget as whole sequences of the shortest length can bring it.
    """
    budget = samples * length
    sizes = [portion.length or length for portion in mix]
    quotas = [budget * portion.share / size for portion, size in zip(mix, sizes, strict=True)]
    rows = [max(1, math.floor(quota)) for quota in quotas]
    while (step := _nearer(rows, sizes, quotas, budget)) is not None:
        number, change = step
        rows[number] += change
    return rows


def _nearer(
    rows: Sequence[int], sizes: Sequence[int], quotas: Sequence[Fraction], budget: int
) -> tuple[int, int] | None:
    """The portion that is furthest from its quota among those whose one row more or less helps."""
    rest = budget - sum(count * size for count, size in zip(rows, sizes, strict=True))
    change = 1 if rest > 0 else -1
    useful = [
        number
        for number, size in enumerate(sizes)
        if abs(rest - change * size) < abs(rest) and rows[number] + change >= 1
    ]
    if not useful:
        return None
    return max(useful, key=lambda number: change * (quotas[number] - rows[number])), change
