"""Tokens through a checkpoint, layer by layer, whatever its precision.

Hidden states travel in batches `[S, T, D]`, so that prompts of several lengths go together. A layer
takes all of them through its attention, batch by batch, and then through its feed-forward, expert
by expert, so that no more than one of its experts need be in memory. Knows nothing of files, bits
or what its callers measure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from .config import ModelConfig
from .errors import UserError
from .hidden import Spool, Store, Where
from .model import (
    DecoderLayer,
    Head,
    Linear,
    Mlp,
    Routing,
    attention,
    feed_forward_input,
    route,
)

TOKENS_AT_ONCE = 8192  # bounds the workspace of one forward call, not its result
POSITIONS_AT_ONCE = 256  # of whose predictions the whole vocabulary's logits are in memory


class LayerObserver(Protocol):
    """What rides along with a run over two checkpoints: it is shown each layer in both forms."""

    key: str  # what its findings depend on, beside the checkpoints

    def start(self, embedding: torch.Tensor, spool: Spool) -> None:
        """Before the first layer; `embedding` is `[vocabulary, D]`."""

    def layer(self, original: DecoderLayer, quantized: DecoderLayer) -> None:
        """Once for each layer, in order."""

    def finish(self, original: Head, quantized: Head) -> dict[str, Any]:
        """After the last layer; what was seen, in JSON types."""


def embed(
    embedding: torch.Tensor, batches: Sequence[torch.Tensor], spool: Spool | None = None
) -> Store:
    """Token ids `[S, T]` -> hidden states `[S, T, D]`, split to TOKENS_AT_ONCE.

    They lie in `spool`; without one, in the host's memory, and come to the embedding's device.

    Raises UserError for a token that the vocabulary does not have.
    """
    for tokens in batches:
        check_tokens(embedding.shape[0], tokens)
    parts = [part for tokens in batches for part in split_rows(tokens)]
    hidden = (spool or Spool(device=embedding.device)).store(
        [(*part.shape, embedding.shape[1]) for part in parts], embedding.dtype
    )
    for number, part in enumerate(parts):
        hidden[number] = embedding[part]
    return hidden


def check_tokens(vocab_size: int, tokens: torch.Tensor) -> None:
    """Raises UserError for a token that the vocabulary does not have."""
    if tokens.numel() and int(tokens.max()) >= vocab_size:
        raise UserError(
            f"token {int(tokens.max())} is outside the model's vocabulary of {vocab_size}; "
            f"use this checkpoint's own tokenizer"
        )


def split_rows(tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`[S, T, ...]` in batches of whole sequences, of about TOKENS_AT_ONCE tokens each."""
    parts: tuple[torch.Tensor, ...] = tokens.split(max(1, TOKENS_AT_ONCE // tokens.shape[1]))
    return parts


def advance(config: ModelConfig, layer: DecoderLayer, hidden: Store) -> Routing | None:
    """Move all tokens through one layer; where an expert layer sent them.

    Raises UserError when the activations stop being finite.
    """
    return passed(config, layer, hidden).routing


def passed(config: ModelConfig, layer: DecoderLayer, hidden: Store) -> Passing:
    """The same; with what the feed-forward has added."""
    attend(hidden, (attention(config, layer, batch) for batch in hidden), layer.o)
    passing = Passing(config, layer, hidden)
    passing.advance()
    return passing


def attend(hidden: Store, mixed: Iterator[torch.Tensor], output: Linear) -> None:
    """Add what the attention's output projection makes of `mixed`, `[S, T, H * head_dim]` each."""
    for number, batch in enumerate(mixed):
        hidden[number] = hidden[number] + output(batch)


class Passing:
    """Hidden states on their way through the feed-forward of one layer.

    `hidden` is what enters, `added` what its parts have added so far; experts read the first while
    the second grows. Whoever takes the same parts of the same pieces gets the same bits.
    """

    def __init__(self, config: ModelConfig, layer: DecoderLayer, hidden: Store) -> None:
        self.config = config
        self.layer = layer
        self.hidden = hidden
        self.dtype = layer.post_norm.dtype
        self.added = hidden.spool.store(hidden.shapes, self.dtype)
        self.routing = self._routed()

    def _routed(self) -> Routing | None:
        moe = self.layer.feed_forward
        if isinstance(moe, Mlp):
            return None
        nothing = Routing(torch.empty(0, dtype=torch.int64), self.layer.post_norm.new_empty(0, 1))
        routed = [nothing, *(route(moe, self.inputs(piece)) for piece in self.everywhere())]
        return Routing(  # row numbers are the host's, as in hidden.py
            torch.cat([one.expert.cpu() for one in routed]),
            torch.cat([one.score for one in routed]),
        )

    def everywhere(self) -> list[slice]:
        """All tokens, in pieces of at most TOKENS_AT_ONCE."""
        return pieces_of(self.hidden)

    def reaching(self, expert: int) -> list[Where]:
        """The tokens that are routed to an expert, in such pieces."""
        assert self.routing is not None
        return pieces(self.routing.rows(expert))

    def inputs(self, where: Where) -> torch.Tensor:
        """What router, shared expert and dense feed-forward see of some tokens, `[n, D]`."""
        return feed_forward_input(self.config, self.layer, self.hidden.rows(where))

    def scaled(self, where: Where) -> torch.Tensor:
        """What their expert sees of them."""
        assert self.routing is not None
        return self.inputs(where) * self.routing.score[where]

    def advance(self) -> None:
        """Through the whole feed-forward."""
        network = self.layer.feed_forward
        if isinstance(network, Mlp):
            self.through(network)
        else:
            self.through(network.shared)
            for number, expert in enumerate(network.experts):
                self.through(expert, number)
        self.finish()

    def through(self, mlp: Mlp, expert: int | None = None) -> None:
        """Through a part that all tokens take, or those that are routed to `expert`."""
        if expert is None:
            for where in self.everywhere():
                self.add(where, mlp(self.inputs(where)), first=True)
        else:
            for piece in self.reaching(expert):
                self.add(piece, mlp(self.scaled(piece)))

    def add(self, where: Where, values: torch.Tensor, first: bool = False) -> None:
        """What a part makes of some tokens; `first` for the part that all tokens take."""
        if first:
            self.added.put(where, values)
        else:
            self.added.add(where, values)

    def finish(self) -> None:
        """Hidden states behind the layer; raises UserError when they are not finite."""
        for number in range(len(self.hidden)):
            moved = self.hidden[number] + self.added[number]
            check_activations(self.layer.index, moved)
            self.hidden[number] = moved


def pieces_of(hidden: Store) -> list[slice]:
    """All rows, at most TOKENS_AT_ONCE of one batch together."""
    return [
        slice(start, min(start + TOKENS_AT_ONCE, batch.stop))
        for batch in hidden.slices()
        for start in range(batch.start, batch.stop, TOKENS_AT_ONCE)
    ]


def pieces(rows: torch.Tensor) -> list[Where]:
    """Row numbers `[N]`, TOKENS_AT_ONCE at a time; none when there are none."""
    return [piece for piece in rows.split(TOKENS_AT_ONCE) if len(piece)]


def check_activations(index: int, hidden: torch.Tensor) -> None:
    """Raises UserError with the layer's number when hidden states are NaN or Inf."""
    if not torch.isfinite(hidden).all():
        raise UserError(
            f"layer {index}: the hidden states are NaN or Inf after this layer; "
            f"its weights are damaged, download the checkpoint again"
        )
