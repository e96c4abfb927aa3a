"""Does it fit: bytes of weights, KV cache and workspace of one serving engine on each of its GPUs.

The arithmetic is vLLM's (0.32), to the byte where it can be known: what a card holds of the
weights (`shards`), and how many blocks of the KV cache a request may hold (`kv_cache`). What an
engine measures only when it starts is reserved as a stated constant. Knows nothing of files,
tensors or recipes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from .config import ModelConfig
from .errors import UserError
from .gpus import GIB, Device
from .kv_cache import BLOCK_TOKENS, KVDtype, KVLayout, kv_layout
from .shards import ShardedWeights

UTILIZATION = 0.92  # vLLM's default gpu_memory_utilization

# An engine measures these three when it starts and no formula predicts them, so they are reserved.
# Scout's widest moments, one after the other: 8,192 tokens through an expert layer (1.0 GB),
# logits of 1,024 requests in BF16 and twice in FP32 (2.1 GB), a batch of images (1.2 GB). The
# largest, and half of it again for the gaps between allocations.
ACTIVATION_BYTES = 3 * GIB
# About 90 captured graphs: vLLM's own logs name 0.1 to 0.75 GiB.
GRAPH_BYTES = 1 * GIB
# CUDA context, library workspaces and the engine's own buffers: 0.2 to 1.8 GiB in vLLM's logs.
NON_TORCH_BYTES = 1 * GIB
RESERVED_BYTES = ACTIVATION_BYTES + GRAPH_BYTES + NON_TORCH_BYTES


@dataclass(frozen=True)
class Serving:
    """How the engine is started. Raises UserError for values that no engine takes."""

    context: int  # tokens of one request, prompt and answer (vLLM's `--max-model-len`)
    concurrency: int = 1  # such requests at once
    cards: int = 1  # `--tensor-parallel-size`
    kv_dtype: KVDtype = KVDtype.BF16
    hybrid: bool = True  # chunked layers keep only what they still see (vLLM's default)
    batched_tokens: int | None = None  # `--max-num-batched-tokens`; None: vLLM's for the device
    utilization: float = UTILIZATION  # share of the device that the engine may use
    positions: int | None = None  # that the rotary table has; None: all that the model knows
    block_tokens: int = BLOCK_TOKENS  # `--block-size`

    def __post_init__(self) -> None:
        for name, least in (
            ("context", self.context), ("concurrency", self.concurrency), ("GPUs", self.cards),
            ("batched tokens", self.batched_tokens), ("block size", self.block_tokens),
        ):  # fmt: skip
            if least is not None and least < 1:
                raise UserError(f"{name} {least}: give at least 1")
        if not 0 < self.utilization <= 1:
            raise UserError(f"GPU memory utilization {self.utilization}: give 0 to 1, as in 0.92")
        if self.positions is not None and self.positions < self.context:
            raise UserError(
                f"{self.positions:,} positions for a context of {self.context:,} tokens: "
                f"give as many as the context"
            )


@dataclass(frozen=True)
class MemoryPlan:
    """What each card must hold to serve so many requests of `serving.context`, in bytes."""

    device: Device
    serving: Serving
    usable_bytes: int  # what the engine may use of the device
    weight_bytes: int
    position_bytes: int  # the table of rotary positions
    kv_global_bytes: int  # of all requests
    kv_chunked_bytes: int
    activation_bytes: int
    graph_bytes: int
    non_torch_bytes: int
    kv_block_bytes: int
    kv_blocks: int  # that the device has room for; 0 when not even the rest fits
    request_blocks: int  # that one request holds
    largest_context: int  # tokens of so many requests; 0 when there is room for none
    context_limit: int  # tokens; the model's own

    @property
    def workspace_bytes(self) -> int:
        """Activation peak and CUDA graphs."""
        return self.activation_bytes + self.graph_bytes

    @property
    def overhead_bytes(self) -> int:
        """What is not torch's, and the one KV block that vLLM never hands out."""
        return self.non_torch_bytes + self.kv_block_bytes

    @property
    def kv_bytes(self) -> int:
        return self.kv_global_bytes + self.kv_chunked_bytes

    @property
    def total_bytes(self) -> int:
        model = self.weight_bytes + self.position_bytes
        return model + self.kv_bytes + self.workspace_bytes + self.overhead_bytes

    @property
    def weight_room(self) -> int:
        """The most bytes of weights with which it fits."""
        return self.usable_bytes - (self.total_bytes - self.weight_bytes)

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.usable_bytes

    @property
    def short_bytes(self) -> int:
        """Bytes that are missing; 0 when it fits."""
        return max(0, self.total_bytes - self.usable_bytes)

    @property
    def max_concurrency(self) -> float:
        """Requests of this context at once, as vLLM logs it ("Maximum concurrency")."""
        return self.kv_blocks / self.request_blocks

    @property
    def requests(self) -> int:
        """Whole requests of this context for which there are blocks: one block is vLLM's null
        block, which it never hands out."""
        return max(0, self.kv_blocks - 1) // self.request_blocks

    def to_json(self) -> dict[str, Any]:
        """Every number and the verdict, for machines."""
        return {
            **asdict(self),
            "workspace_bytes": self.workspace_bytes,
            "overhead_bytes": self.overhead_bytes,
            "kv_bytes": self.kv_bytes,
            "total_bytes": self.total_bytes,
            "fits": self.fits,
            "short_bytes": self.short_bytes,
            "max_concurrency": self.max_concurrency,
            "requests": self.requests,
        }


def make_plan(
    config: ModelConfig, weights: ShardedWeights, device: Device, serving: Serving
) -> MemoryPlan:
    """The plan of one of the cards, which all hold the same.

    Raises UserError for a context beyond the model's, and for a number of cards that vLLM cannot
    divide the model into.
    """
    if serving.context > config.max_positions:
        raise UserError(
            f"context {serving.context:,}: the model knows {config.max_positions:,} positions; "
            f"ask for at most that"
        )
    if serving.cards not in weights.sizes:
        raise UserError(
            f"{serving.cards} GPUs: vLLM cannot divide this model into so many; "
            f"choose {', '.join(map(str, weights.sizes))}"
        )
    batched = serving.batched_tokens or device.default_batched_tokens
    serving = replace(serving, batched_tokens=batched)
    layout = serving_layout(config, serving, batched)
    usable = math.ceil(device.total_bytes * serving.utilization)
    held, table = weights.on(serving.cards), position_bytes(config, serving)
    blocks = max(0, (usable - held - table - RESERVED_BYTES) // layout.block_bytes)
    in_global, in_chunked = layout.split_bytes(serving.context)
    limit = serving.positions or config.max_positions
    return MemoryPlan(
        device=device,
        serving=serving,
        usable_bytes=usable,
        weight_bytes=held,
        position_bytes=table,
        kv_global_bytes=serving.concurrency * in_global,
        kv_chunked_bytes=serving.concurrency * in_chunked,
        activation_bytes=ACTIVATION_BYTES,
        graph_bytes=GRAPH_BYTES,
        non_torch_bytes=NON_TORCH_BYTES,
        kv_block_bytes=layout.block_bytes,
        kv_blocks=blocks,
        request_blocks=layout.blocks(serving.context),
        # one block is vLLM's null block: it refuses to start when a request would need that too
        largest_context=layout.largest_context((blocks - 1) // serving.concurrency, limit),
        context_limit=limit,
    )


def serving_layout(config: ModelConfig, serving: Serving, batched_tokens: int) -> KVLayout:
    return kv_layout(
        config, batched_tokens=batched_tokens, kv_dtype=serving.kv_dtype, hybrid=serving.hybrid,
        cards=serving.cards, block_tokens=serving.block_tokens,
    )  # fmt: skip


def position_bytes(config: ModelConfig, serving: Serving) -> int:
    """vLLM makes one table of cosines and sines in BF16 for all layers that rotate, with a row for
    each position that the model knows, whatever `--max-model-len` is.

    Source: vLLM 0.32 `layers/rotary_embedding/base.py`, `models/llama4.py`.
    """
    positions = serving.positions or config.max_positions
    return 2 * positions * config.head_dim if config.rope_layers else 0
