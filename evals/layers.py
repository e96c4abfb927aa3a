"""What sets two models apart behind each layer, and which of its experts is to blame.

Hidden states drift apart everywhere a little. An expert that is damaged does more or less of what
it should: its gain, what the quantized model adds for its tokens along what the original adds, is
far from that of its neighbours. Knows nothing of files or texts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llama4q.hidden import Store
from llama4q.stream import Passing, pieces_of

ROWS_AT_ONCE = 1024  # of four kinds, in F64


@dataclass(frozen=True)
class Part:
    """Sums over some tokens, F64."""

    energy: float  # of the original's hidden states behind the layer
    error: float  # of what the quantized model's lack
    added: float  # energy of what the original's feed-forward adds
    along: float  # what the quantized one adds along it
    routed: Routed | None  # None: a dense layer


@dataclass(frozen=True)
class Routed:
    """The same by expert, `[E]` each; sums are of tokens that both models send to it."""

    tokens: torch.Tensor  # [3, E], int64: the original's, the quantized one's, those of both
    added: torch.Tensor
    along: torch.Tensor


def cut_share(counts: Iterable[tuple[int, int, int]]) -> dict[str, float] | None:
    """Of keys and of values the share that an FP8 cache cuts off; None: they are kept as they are.

    `counts` are those of `cut_keys_values`.
    """
    keys, values, every = (sum(column) for column in zip(*counts, strict=True))
    return {"keys": keys / every, "values": values / every} if every else None


def sums(plain: Passing, served: Passing) -> list[Part]:
    """Piece by piece, of two models' passages through the same layer."""
    return [
        _part(plain, served, slice(start, min(start + ROWS_AT_ONCE, piece.stop)))
        for piece in pieces_of(plain.hidden)
        for start in range(piece.start, piece.stop, ROWS_AT_ONCE)
    ]


def _part(plain: Passing, served: Passing, piece: slice) -> Part:
    x, y = (_rows(one.hidden, piece) for one in (plain, served))
    a, b = (_rows(one.added, piece) for one in (plain, served))
    along, added = (a * b).sum(1).cpu(), a.square().sum(1).cpu()
    routed = None
    if plain.routing is not None and served.routing is not None:
        experts = plain.routing.expert[piece], served.routing.expert[piece]
        routed = _routed(experts, added, along, plain.config.num_experts)
    error = float((x - y).square().sum())
    return Part(float(x.square().sum()), error, float(added.sum()), float(along.sum()), routed)


def _routed(
    experts: tuple[torch.Tensor, torch.Tensor],
    added: torch.Tensor,
    along: torch.Tensor,
    count: int,
) -> Routed:
    same = experts[0] == experts[1]
    both = experts[0][same]
    tokens = [torch.bincount(one, minlength=count) for one in (*experts, both)]
    sums = [torch.bincount(both, values[same], minlength=count) for values in (added, along)]
    return Routed(torch.stack(tokens), *sums)


def _rows(store: Store, piece: slice) -> torch.Tensor:
    return store.rows(piece).double()


@dataclass(frozen=True)
class Sums:
    """One layer, from all of its parts in any order."""

    parts: Sequence[Part]

    def to_json(self) -> dict[str, Any]:
        """The report's figures; those by expert are None in a dense layer, and where no token
        reached an expert in both models."""
        found = {
            "hidden_error": self._exact("error") / self._exact("energy"),
            "gain": self._exact("along") / self._exact("added"),
        }
        routed = [part.routed for part in self.parts if part.routed is not None]
        if not routed:
            names = ("agreement", "load_original", "load_quantized", "expert_gain")
            return {**found, **dict.fromkeys(names)}
        plain, served, both = torch.stack([one.tokens for one in routed]).sum(0).tolist()
        along, added = (
            [math.fsum(column) for column in torch.stack(every).T.tolist()]
            for every in ([one.along for one in routed], [one.added for one in routed])
        )
        return {
            **found,
            "agreement": sum(both) / sum(plain),
            "load_original": plain,
            "load_quantized": served,
            "expert_gain": [x / y if y else None for x, y in zip(along, added, strict=True)],
        }

    def _exact(self, name: str) -> float:
        """Rounded once."""
        return math.fsum(getattr(part, name) for part in self.parts)
