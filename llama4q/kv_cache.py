"""vLLM's pool of KV blocks: what a block takes, and how many of them a request may hold.

The arithmetic is vLLM 0.32's (`v1/core/kv_cache_utils.py`, `v1/kv_cache_interface.py`), to the
byte. Knows nothing of weights, GPUs or utilization.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from enum import StrEnum

from .config import ModelConfig

BLOCK_TOKENS = 16  # vLLM's default; an attention backend may ask for larger blocks
BATCHES_IN_FLIGHT = 2  # asynchronous scheduling prepares one batch while another runs


class KVDtype(StrEnum):
    """How keys and values are stored (vLLM's `--kv-cache-dtype`)."""

    BF16 = "bf16"
    FP8 = "fp8"

    @property
    def nbytes(self) -> int:
        return 1 if self is KVDtype.FP8 else 2


@dataclass(frozen=True)
class KVGroup:
    """Layers that share one table of blocks. `limit`: the most blocks that one request holds."""

    global_layers: int
    chunked_layers: int
    block_tokens: int
    limit: int | None = None

    def blocks(self, context: int) -> int:
        needed = _ceil_div(context, self.block_tokens)
        return needed if self.limit is None else min(needed, self.limit)


@dataclass(frozen=True)
class KVLayout:
    """Any block may serve any group, so all have the same bytes."""

    groups: tuple[KVGroup, ...]
    block_tokens: int
    block_bytes: int

    def blocks(self, context: int) -> int:
        """The most blocks that one request of `context` tokens holds."""
        return sum(group.blocks(context) for group in self.groups)

    def split_bytes(self, context: int) -> tuple[int, int]:
        """Bytes of one request in global and in chunked layers, padding included."""
        in_global = in_chunked = 0
        for group in self.groups:
            held = group.blocks(context) * self.block_bytes
            layers = group.global_layers + group.chunked_layers
            in_global += held * group.global_layers // layers
            in_chunked += held * group.chunked_layers // layers
        return in_global, in_chunked

    def largest_context(self, blocks: int, limit: int) -> int:
        """Tokens of the longest request, at most `limit`, that needs no more than `blocks`."""
        step = self.block_tokens
        lengths = range(step, limit + step, step)
        return min(limit, step * bisect.bisect_right(lengths, blocks, key=self.blocks))


def kv_layout(
    config: ModelConfig,
    *,
    batched_tokens: int,
    kv_dtype: KVDtype = KVDtype.BF16,
    hybrid: bool = True,
    cards: int = 1,
    block_tokens: int = BLOCK_TOKENS,
) -> KVLayout:
    """The KV blocks of one of `cards` tensor parallel devices.

    A chunked layer keeps its chunk and what is in flight, `batched_tokens` a batch. With the
    hybrid manager the rarer kind of layer sets the size of a group; the other kind fills as many
    groups as it needs, the last one padded.
    """
    heads = max(1, config.num_kv_heads // cards)
    page = block_tokens * heads * 2 * config.head_dim * kv_dtype.nbytes
    limit = _ceil_div(config.chunk_size + BATCHES_IN_FLIGHT * batched_tokens, block_tokens)
    chunked = len(config.chunked_layers)
    whole = config.num_layers - chunked
    if not (whole and chunked):  # one kind of layer is one group, whatever the manager
        groups = [KVGroup(whole, chunked, block_tokens, limit if chunked else None)]
    elif not hybrid:
        groups = [KVGroup(whole, chunked, block_tokens)]
    else:
        size = _group_size(whole, chunked)
        groups = [KVGroup(size, 0, block_tokens)] * _ceil_div(whole, size)
        groups += [KVGroup(0, size, block_tokens, limit)] * _ceil_div(chunked, size)
    widest = max(group.global_layers + group.chunked_layers for group in groups)
    return KVLayout(tuple(groups), block_tokens, page * widest)


def _group_size(whole: int, chunked: int) -> int:
    """The rarer kind's layers; the other kind's if they are hardly more, which pads less."""
    fewer, more = sorted((whole, chunked))
    return more if more < 1.5 * fewer else fewer


def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)
