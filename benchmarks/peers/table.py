"""The arena's tables: a record for each cell in, Markdown out.

A record holds one figure for each window, so that differences can be paired: the same windows, the
same calibration seeds. Intervals are bootstrapped over windows, which are independent of each other
where tokens are not. How records came about is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

RESAMPLES = 10_000
Record = Mapping[str, Any]
Records = Mapping[str, Mapping[int, Record]]  # contestant -> calibration seed -> record

HEADER = (
    "| | seeds | MB | KL | of {yardstick}'s | {ours}'s KL less its | KL 99 % | top-1 | routing "
    "| perplexity | {ours}'s loss less its | needles | other text: KL | {ours}'s KL less its "
    "| CPU s | peak MB |"
)


@dataclass(frozen=True)
class Difference:
    """A mean over windows with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: torch.Tensor) -> Difference:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
        means = values[drawn].mean(dim=1)
        low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
        return cls(float(values.mean()), low, high)

    def __str__(self) -> str:
        return f"{self.mean:+.5f} [{self.low:+.5f}, {self.high:+.5f}]"


def windows(records: Sequence[Record], text: str, key: str) -> torch.Tensor:
    """A figure by window, the mean over records."""
    return torch.tensor([record[text][key] for record in records], dtype=torch.float64).mean(dim=0)


def paired(ours: Sequence[Record], theirs: Sequence[Record], text: str, key: str) -> Difference:
    """Ours less theirs; both in the same order of seeds."""
    return Difference.of(windows(ours, text, key) - windows(theirs, text, key))


def table(title: str, records: Records, ours: str, yardstick: str) -> Iterator[str]:
    """One model and grid: contestants in rows, means over the seeds that `ours` shares with each.

    Ratios are against `yardstick`, intervals of the difference to `ours`.
    """
    yield f"### {title}"
    yield ""
    yield HEADER.format(ours=ours, yardstick=yardstick)
    yield "|---" * (HEADER.count("|") - 1) + "|"
    for name, by_seed in records.items():
        seeds = sorted(set(by_seed) & set(records.get(ours, {}))) or sorted(by_seed)
        mine = [by_seed[seed] for seed in seeds]
        if failures := [record["failure"] for record in mine if "failure" in record]:
            yield f"| {name} | {len(seeds)} | failed: `{failures[0][:160]}` |" + " |" * 13
            continue
        own = [records.get(ours, {}).get(seed) for seed in seeds]
        pairs = [] if name == ours else [record for record in own if record is not None]
        common = [seed for seed in seeds if "same" in records.get(yardstick, {}).get(seed, {})]
        ratio = ""
        if common:
            of_yardstick = [records[yardstick][seed] for seed in common]
            ratio = f"{_kl([by_seed[seed] for seed in common]) / _kl(of_yardstick):.2f}"
        yield _row(name, mine, pairs, ratio)


def _kl(records: Sequence[Record]) -> float:
    return float(windows(records, "same", "kl").mean())


def _row(name: str, mine: Sequence[Record], ours: Sequence[Record], ratio: str) -> str:
    def mean(text: str, key: str) -> float:
        return float(sum(record[text][key] for record in mine) / len(mine))

    def against(text: str) -> str:
        if not ours:
            return ""
        clear = sum(paired([a], [b], text, "kl").high < 0 for a, b in zip(ours, mine, strict=True))
        return f"{paired(ours, mine, text, 'kl')}, {clear}/{len(mine)} clear"

    each = {id(record): record for record in mine}  # an uncalibrated one stands for all seeds
    found = [answer for record in each.values() for answer in record["same"]["needles"]]
    routing = [record["same"]["routing"] for record in mine]
    cells = (
        name,
        f"{len(mine)}",
        f"{mine[0]['stored_bytes'] / 1e6:.2f}",
        f"{mean('same', 'kl_mean'):.5f}",
        ratio,
        against("same"),
        f"{mean('same', 'kl_p99'):.4f}",
        f"{mean('same', 'top1'):.2%}",
        "" if routing[0] is None else f"{sum(routing) / len(routing):.2%}",
        f"{mean('same', 'perplexity'):.3f}",
        str(paired(ours, mine, "same", "loss")) if ours else "",
        f"{sum(found) / max(1, len(found)):.1%} of {len(found)}",
        f"{mean('other', 'kl_mean'):.5f}",
        against("other"),
        f"{sum(record['cpu_seconds'] for record in mine) / len(mine):.0f}",
        f"{max(record['peak_bytes'] for record in mine) / 1e6:.0f}",
    )
    return f"| {' | '.join(cells)} |"
