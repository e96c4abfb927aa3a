"""Tokens through a checkpoint, layer by layer, whatever its precision.

One layer of weights is in use while a thread reads the next one. Hidden states are a list of
batches `[S, T, D]`, so that prompts of several lengths travel together. Knows nothing of files,
bits or what its callers measure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import torch

from .config import ModelConfig
from .errors import UserError
from .model import DecoderLayer, Head, Routing, decoder_layer, feed_forward

Item = TypeVar("Item")

TOKENS_AT_ONCE = 16384  # bounds the workspace of one forward call, not its result


class LayerObserver(Protocol):
    """What rides along with a run over two checkpoints: it is shown each layer in both forms."""

    key: str  # what its findings depend on, beside the checkpoints

    def start(self, embedding: torch.Tensor) -> None:
        """Before the first layer; `embedding` is `[vocabulary, D]`."""

    def layer(self, original: DecoderLayer, quantized: DecoderLayer) -> None:
        """Once for each layer, in order."""

    def finish(self, original: Head, quantized: Head) -> dict[str, Any]:
        """After the last layer; what was seen, in JSON types."""


def prefetched(load: Callable[[int], Item], indices: Sequence[int]) -> Iterator[Item]:
    """`load(index)` for each index in order, the next one being read while one is in use."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as pool:
        coming = pool.submit(load, indices[0]) if indices else None
        for position in range(len(indices)):
            assert coming is not None
            item = coming.result()
            more = position + 1 < len(indices)
            coming = pool.submit(load, indices[position + 1]) if more else None
            yield item
            del item  # the caller's reference is the last one: two layers in memory, not three


def embed(embedding: torch.Tensor, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Token ids `[S, T]` -> hidden states `[S, T, D]`, split to TOKENS_AT_ONCE.

    Raises UserError for a token that the vocabulary does not have.
    """
    hidden = []
    for tokens in batches:
        check_tokens(embedding.shape[0], tokens)
        hidden += [embedding[part] for part in split_rows(tokens)]
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


def advance(
    config: ModelConfig, layer: DecoderLayer, batches: list[torch.Tensor]
) -> list[Routing | None]:
    """Move all batches through one layer, in place of the list; the routing of each batch.

    Raises UserError when the activations stop being finite.
    """
    return _moved(decoder_layer, config, layer, batches)


def advance_attended(
    config: ModelConfig, layer: DecoderLayer, batches: list[torch.Tensor]
) -> list[Routing | None]:
    """The same for batches that have passed the layer's attention already."""
    return _moved(feed_forward, config, layer, batches)


def _moved(
    through: Callable[
        [ModelConfig, DecoderLayer, torch.Tensor], tuple[torch.Tensor, Routing | None]
    ],
    config: ModelConfig,
    layer: DecoderLayer,
    batches: list[torch.Tensor],
) -> list[Routing | None]:
    routings = []
    for number, hidden in enumerate(batches):
        batches[number], routing = through(config, layer, hidden)
        check_activations(layer.index, batches[number])
        routings.append(routing)
    return routings


def check_activations(index: int, hidden: torch.Tensor) -> None:
    """Raises UserError with the layer's number when hidden states are NaN or Inf."""
    if not torch.isfinite(hidden).all():
        raise UserError(
            f"layer {index}: the hidden states are NaN or Inf after this layer; "
            f"its weights are damaged, download the checkpoint again"
        )
