"""Both streams of hidden states in one feed-forward, and the tokens that reach each of its parts.

The quantized model's routing says which tokens an expert is calibrated on; the original's own
tokens pass the original expert beside them. Knows nothing of codes or files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from llama4q.config import ModelConfig
from llama4q.hidden import Store, Where
from llama4q.model import DecoderLayer, Mlp
from llama4q.stream import Passing, pieces

from .judge import MOST_TOKENS, spaced
from .target import HELD_OUT, Pair


@dataclass(frozen=True)
class Streams:
    """The hidden states of both models."""

    served: Store  # of the quantized model
    plain: Store  # of the original


class Both:
    """Both streams on their way through a feed-forward."""

    def __init__(
        self, config: ModelConfig, layer: DecoderLayer, streams: Streams, parts: torch.Tensor
    ) -> None:
        self.served = Passing(config, layer, streams.served)
        self.plain = Passing(config, layer, streams.plain)
        self.parts = parts

    def all(self) -> Tokens:
        return Tokens(self, self.served.everywhere(), None)

    def reaching(self, expert: int) -> Tokens:
        """The tokens that the quantized model sends to an expert: what serving will see."""
        return Tokens(self, self.served.reaching(expert), expert)

    def same(self, where: Where) -> torch.Tensor:
        """Whether both models send some tokens to the same expert, `[n]`."""
        assert self.served.routing is not None
        assert self.plain.routing is not None
        same: torch.Tensor = self.served.routing.expert[where] == self.plain.routing.expert[where]
        return same

    def scaled(self, where: Where) -> Pair:
        """Some tokens as their experts get them.

        A token that the original sent to another expert has no original input to this one.
        """
        served = self.served.scaled(where)
        same = self.same(where)[:, None].to(served.device)
        plain = torch.where(same, self.plain.scaled(where), served)
        return Pair(served, plain, None, self.parts[where])

    def seen(self) -> Iterator[torch.Tensor]:
        """What experts get of all tokens that moments may see."""
        for where in self.served.everywhere():
            yield self.served.scaled(where)[self.parts[where] != HELD_OUT]

    def sample(self, most: int) -> torch.Tensor:
        """Of those, at most `most`, evenly spaced."""
        return self.served.scaled(spaced(torch.nonzero(self.parts != HELD_OUT).squeeze(1), most))

    def held_out(self) -> Pair:
        """Tokens that no moment sees, as their experts get them."""
        return self.scaled(spaced(torch.nonzero(self.parts == HELD_OUT).squeeze(1), MOST_TOKENS))

    def finish(self) -> None:
        self.plain.finish()
        self.served.finish()


class Tokens:
    """The tokens that reach one part of a feed-forward, piece by piece, in both streams."""

    def __init__(self, both: Both, where: list[Where], expert: int | None) -> None:
        self.both = both
        self.where = where
        self.expert = expert
        self.parts = torch.cat([both.parts[:0], *(both.parts[piece] for piece in where)])

    def __len__(self) -> int:
        return len(self.where)

    def store(self, width: int) -> Store:
        """Room for something of each token."""
        shapes = [(len(self.both.parts[piece]), width) for piece in self.where]
        return self.both.served.hidden.spool.store(shapes, self.both.served.dtype)

    def inputs(self, piece: int) -> Pair:
        where = self.where[piece]
        if self.expert is not None:
            return self.both.scaled(where)
        served, plain = self.both.served.inputs(where), self.both.plain.inputs(where)
        return Pair(served, plain, None, self.both.parts[where])

    def lacking(self, piece: int) -> torch.Tensor:
        """What the quantized stream lacks where this part's outputs go, F32 `[n, D]`."""
        where = self.where[piece]
        served, plain = self.both.served, self.both.plain
        lacking = plain.hidden.rows(where).float() - served.hidden.rows(where).float()
        if self.expert is not None:  # what all tokens take has been added already
            lacking += plain.added.rows(where).float() - served.added.rows(where).float()
            lacking *= self.both.same(where)[:, None].to(lacking.device)
        return lacking

    def add(self, piece: int, served: torch.Tensor, plain: torch.Tensor) -> None:
        """What the part makes of a piece in either model."""
        where = self.where[piece]
        if self.expert is None:
            self.both.served.added.put(where, served)
            self.both.plain.added.put(where, plain)
        else:
            assert isinstance(where, torch.Tensor)
            same = self.both.same(where)
            self.both.served.added.add(where, served)
            self.both.plain.added.add(where[same], plain[same])

    def add_strays(self, mlp: Mlp) -> None:
        """The original's tokens that its own router sends to this expert, and the other's not."""
        plain = self.both.plain.routing
        if self.expert is None or plain is None:
            return
        rows = plain.rows(self.expert)
        for where in pieces(rows[~self.both.same(rows)]):
            self.both.plain.added.add(where, mlp(self.both.plain.scaled(where)))
