"""The tokens of experts on their way to the ranks that handle them, and what comes of them back.

A wave is as many experts as there are ranks, one for each. The tokens of all ranks meet there in
the order in which one rank alone would have them, so an expert is handled as by one rank, to the
last bit. Knows nothing of codes or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from llama4q.hidden import Store
from llama4q.model import Mlp
from llama4q.ranks import Ranks
from llama4q.stream import TOKENS_AT_ONCE, pieces

from .leaves import Share
from .streams import Both, OwnTokens, Tokens
from .target import Pair


def waves(experts: Sequence[int], counts: Sequence[int], ranks: Ranks) -> list[list[int]]:
    """Experts that are handled at the same time: rank k takes the k-th one of each wave.

    Those of one wave have about as many tokens, `counts` by expert, so that no rank waits long.
    """
    alike = sorted(experts, key=lambda expert: -counts[expert]) if ranks.count > 1 else experts
    return [list(alike[at : at + ranks.count]) for at in range(0, len(alike), ranks.count)]


class Wave:
    """One wave: every rank begins it, takes the `tokens` of its expert, and ends it."""

    def __init__(self, both: Both, experts: Sequence[int], lacking: bool) -> None:
        """`lacking`: somebody will ask for what the quantized stream lacks."""
        self.both = both
        self.expert = dict(enumerate(experts)).get(both.ranks.number)  # None: none for this rank
        self.exchanged = Exchanged(both, experts, lacking) if both.ranks.count > 1 else None

    def tokens(self) -> Tokens:
        """Those that reach this rank's expert."""
        if self.exchanged is not None:
            return self.exchanged
        assert self.expert is not None
        where = pieces(self.both.reaching(self.expert))
        parts = torch.cat([self.both.parts[:0], *(self.both.parts[piece] for piece in where)])
        share = Share(parts, 0, [range(len(where))])
        return OwnTokens(self.both, where, self.expert, share)

    def end(self) -> None:
        """What experts have made of tokens goes to the ranks that these came from."""
        if self.exchanged is not None:
            self.exchanged.give_back()


class Route:
    """Some rows of this rank that go to each rank, and those of all ranks that come here."""

    def __init__(self, both: Both, sent: Sequence[torch.Tensor]) -> None:
        """`sent[k]`: which tokens of this rank go to rank k."""
        self.both = both
        self.sent = sent
        arrived = both.ranks.exchange([both.parts[rows] for rows in sent])
        self.parts = torch.cat(arrived)  # [N] int8, which part of the text each token is of
        self.sizes = [len(part) for part in arrived]

    def store(self, width: int, dtype: torch.dtype) -> Store:
        """Room for something of each token that comes here, in pieces."""
        shapes = [(len(piece), width) for piece in self.parts.split(TOKENS_AT_ONCE) if len(piece)]
        return self.both.served.hidden.spool.store(shapes, dtype)

    def there(self, made: Callable[[torch.Tensor], torch.Tensor]) -> Store:
        """What every rank makes of the tokens that it sends, `[n, D]`."""
        arrived = self.both.ranks.exchange([made(rows) for rows in self.sent])
        store = self.store(self.both.width, arrived[0].dtype)
        start = 0
        for rows in arrived:
            if len(rows):
                store.put(slice(start, start := start + len(rows)), rows)
        return store

    def back(self, results: Store) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Tokens of this rank, and what has been made of them where they were."""
        rows = results.rows(slice(0, results.tokens)).view(results.tokens, self.both.width)
        arrived = self.both.ranks.exchange(rows.split(self.sizes))
        return zip(self.sent, arrived, strict=True)


class Exchanged:
    """The tokens of all ranks that reach this rank's expert."""

    def __init__(self, both: Both, experts: Sequence[int], lacking: bool) -> None:
        self.both = both
        nobody = [torch.empty(0, dtype=torch.int64)] * (both.ranks.count - len(experts))
        self.route = Route(both, [*map(both.reaching, experts), *nobody])
        self.stray_route = Route(both, [*map(both.strays, experts), *nobody])
        self.served = self.route.there(lambda rows: both.scaled(rows).served)
        self.plain = self.route.there(lambda rows: both.scaled(rows).original)
        self.lacked = None
        if lacking:
            self.lacked = self.route.there(lambda rows: both.lacking(rows, added=True))
        self.strays = self.stray_route.there(both.plain.scaled)
        self.share = Share(self.route.parts, 0, [range(len(self.served))])

    def __len__(self) -> int:
        return len(self.served)

    def store(self, width: int) -> Store:
        return self.route.store(width, self.served.dtype)

    def inputs(self, piece: int) -> Pair:
        part = self.route.parts[self.served.slices()[piece]]
        return Pair(self.served[piece], self.plain[piece], None, part)

    def lacking(self, piece: int) -> torch.Tensor:
        assert self.lacked is not None
        return self.lacked[piece]

    def add(self, piece: int, served: torch.Tensor, plain: torch.Tensor) -> None:
        """In place of the inputs."""
        self.served[piece] = served
        self.plain[piece] = plain

    def add_strays(self, mlp: Mlp) -> None:
        for piece in range(len(self.strays)):
            self.strays[piece] = mlp(self.strays[piece])

    def give_back(self) -> None:
        """What has been added goes into the streams of the ranks that sent the tokens."""
        for (rows, served), (_, plain) in zip(
            self.route.back(self.served), self.route.back(self.plain), strict=True
        ):
            self.both.add(rows, served, plain)
        for rows, plain in self.stray_route.back(self.strays):
            self.both.plain.added.add(rows, plain)
