"""Both streams of hidden states in one feed-forward, and the tokens that reach each of its parts.

The quantized model's routing says which tokens an expert is calibrated on; the original's own
tokens pass the original expert beside them. Of several ranks each has its own tokens here; how an
expert gets those of all is exchange.py's. Knows nothing of codes or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Protocol, TypeVar

import torch

from llama4q.config import ModelConfig
from llama4q.hidden import Store, Where
from llama4q.model import DecoderLayer, Mlp
from llama4q.stream import Passing, pieces

from .hessian import Hessian, joined, measure
from .judge import MOST_TOKENS, spaced
from .leaves import Dealt, Share
from .target import HELD_OUT, Pair, concatenated

Found = TypeVar("Found")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Streams:
    """The hidden states of both models, for this rank's calibration tokens."""

    served: Store  # of the quantized model
    plain: Store  # of the original
    dealt: Dealt


class Tokens(Protocol):
    """The tokens that reach one part of a feed-forward, piece by piece, in both streams."""

    @property
    def share(self) -> Share: ...
    def __len__(self) -> int: ...
    def store(self, width: int) -> Store:
        """Room for something of each token."""

    def inputs(self, piece: int) -> Pair:
        """What the part sees of a piece."""

    def lacking(self, piece: int) -> torch.Tensor:
        """What the quantized stream lacks where the part's outputs go, F32 `[n, D]`."""

    def add(self, piece: int, served: torch.Tensor, plain: torch.Tensor) -> None:
        """What the part makes of a piece in either model; nobody asks for its inputs again."""

    def add_strays(self, mlp: Mlp) -> None:
        """The same for tokens that only the original's router sends to this expert."""


class Both:
    """Both streams on their way through a feed-forward."""

    def __init__(self, config: ModelConfig, layer: DecoderLayer, streams: Streams) -> None:
        self.served = Passing(config, layer, streams.served)
        self.plain = Passing(config, layer, streams.plain)
        self.width = config.hidden_size
        self.device = layer.post_norm.device
        self.dealt = streams.dealt
        self.ranks = streams.dealt.ranks
        self.parts = self.dealt.parts[self.dealt.own]  # of this rank's tokens

    def all(self) -> Tokens:
        where = self.served.everywhere()
        return OwnTokens(self, where, None, self.dealt.share(where))

    def reaching(self, expert: int) -> torch.Tensor:
        """The tokens that the quantized model sends to an expert: what serving will see."""
        assert self.served.routing is not None
        return self.served.routing.rows(expert)

    def strays(self, expert: int) -> torch.Tensor:
        """The original's tokens that its own router sends to an expert, and the other's not."""
        assert self.plain.routing is not None
        rows = self.plain.routing.rows(expert)
        return rows[~self.same(rows)]

    def counts(self, experts: int) -> list[int]:
        """How many tokens of all ranks reach each expert."""
        assert self.served.routing is not None
        own = self.served.routing.expert.bincount(minlength=experts).tolist()
        return [sum(counts) for counts in zip(*self.ranks.everyone(own), strict=True)]

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

    def lacking(self, where: Where, added: bool) -> torch.Tensor:
        """What the quantized stream lacks of some tokens, F32 `[n, D]`.

        `added`: what all tokens take has been added, and of a token that the original sent to
        another expert nothing can be said.
        """
        lacking = self.plain.hidden.rows(where).float() - self.served.hidden.rows(where).float()
        if added:
            lacking += self.plain.added.rows(where).float() - self.served.added.rows(where).float()
            lacking *= self.same(where)[:, None].to(lacking.device)
        return lacking

    def add(self, where: torch.Tensor, served: torch.Tensor, plain: torch.Tensor) -> None:
        """What an expert makes of tokens that reach it."""
        same = self.same(where)
        self.served.added.add(where, served)
        self.plain.added.add(where[same], plain[same])

    def pool(self) -> Hessian:
        """Of what experts get of all tokens that moments may see."""
        pieces = self.served.everywhere()
        leaves = (
            measure((self._seen(pieces[number]) for number in leaf), self.width, self.device)
            for leaf in self.dealt.by_leaf(pieces)
        )
        return self._of_all(leaves, lambda found: reduce(joined, found))

    def _seen(self, where: slice) -> torch.Tensor:
        return self.served.scaled(where)[self.parts[where] != HELD_OUT]

    def sample(self, most: int) -> torch.Tensor:
        """Of those, at most `most`, evenly spaced."""
        own = self.served.scaled(self._spaced(self.dealt.parts != HELD_OUT, most))
        return self._of_all([own], lambda found: torch.cat(list(found)))

    def held_out(self) -> Pair:
        """Tokens that no moment sees, as their experts get them."""
        own = self.scaled(self._spaced(self.dealt.parts == HELD_OUT, MOST_TOKENS))
        return self._of_all([own], concatenated)

    def _spaced(self, which: torch.Tensor, most: int) -> torch.Tensor:
        """This rank's ones of at most `most` of all tokens `which [N]` is true of."""
        rows = spaced(torch.nonzero(which).squeeze(1), most) - self.dealt.start
        return rows[(rows >= 0) & (rows < len(self.parts))]

    def _of_all(self, own: Iterable[Found], join: Callable[[Iterator[Found]], Made]) -> Made:
        """What the first rank makes of what every rank has found, on all ranks."""
        found = self.ranks.to_first(own)
        return self.ranks.from_first(lambda: join(found))

    def finish(self) -> None:
        self.plain.finish()
        self.served.finish()


class OwnTokens:
    """Those of this rank, in the two streams."""

    def __init__(
        self, both: Both, where: Sequence[Where], expert: int | None, share: Share
    ) -> None:
        self.both = both
        self.where = where
        self.expert = expert
        self.share = share

    def __len__(self) -> int:
        return len(self.where)

    def store(self, width: int) -> Store:
        shapes = [(len(self.both.parts[piece]), width) for piece in self.where]
        return self.both.served.hidden.spool.store(shapes, self.both.served.dtype)

    def inputs(self, piece: int) -> Pair:
        where = self.where[piece]
        if self.expert is not None:
            return self.both.scaled(where)
        served, plain = self.both.served.inputs(where), self.both.plain.inputs(where)
        return Pair(served, plain, None, self.both.parts[where])

    def lacking(self, piece: int) -> torch.Tensor:
        return self.both.lacking(self.where[piece], added=self.expert is not None)

    def add(self, piece: int, served: torch.Tensor, plain: torch.Tensor) -> None:
        where = self.where[piece]
        if self.expert is None:
            self.both.served.added.put(where, served)
            self.both.plain.added.put(where, plain)
        else:
            assert isinstance(where, torch.Tensor)
            self.both.add(where, served, plain)

    def add_strays(self, mlp: Mlp) -> None:
        if self.expert is not None:
            for where in pieces(self.both.strays(self.expert)):
                self.both.plain.added.add(where, mlp(self.both.plain.scaled(where)))
