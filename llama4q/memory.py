"""Does it fit: bytes of weights, KV cache and workspace of one serving engine on one GPU.

The arithmetic is vLLM's (0.32), to the byte where it can be known: which layers share a block of
the KV cache, and how many blocks a request may hold. What an engine measures only when it starts
is reserved as a stated constant. Knows nothing of files, tensors or recipes: weights are a number.
"""

from __future__ import annotations

import bisect
import difflib
import math
import re
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from enum import StrEnum
from typing import Any

from .config import ModelConfig
from .errors import UserError

GIB = 2**30
UNITS = {
    "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip

BLOCK_TOKENS = 16  # vLLM's default; an attention backend may ask for larger blocks
BATCHES_IN_FLIGHT = 2  # asynchronous scheduling prepares one batch while another runs
UTILIZATION = 0.92  # vLLM's default gpu_memory_utilization
HIGH_UTILIZATION = 0.95  # proposed at most; the rest is the driver's and other processes'
SMALL_BATCH = 2048  # tokens; what vLLM takes on small cards, proposed when larger ones don't fit
CARDS = (1, 2, 4, 8)  # tensor parallel sizes that are proposed

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
class Device:
    """One GPU; `total_bytes` is what CUDA reports (`torch.cuda.mem_get_info`)."""

    name: str
    total_bytes: int

    @property
    def default_batched_tokens(self) -> int:
        """`vllm serve`'s max_num_batched_tokens here. Source: vLLM `engine/arg_utils.py`."""
        if self.total_bytes >= 160 * GIB:
            return 16384
        return 8192 if self.total_bytes >= 70 * GIB and "a100" not in self.name else 2048


# GiB that CUDA reports to a process, the number an engine multiplies with its utilization, as
# "total capacity" in public PyTorch logs. It is 0.5 to 0.8 GiB less than nvidia-smi's total (MiB,
# behind each), and moves by some 0.2 GiB with driver and ECC: the least number seen often is here.
_REPORTED_GIB = {
    "h100-80gb": 79.10,  # SXM and PCIe; up to 79.33; 81559
    "h100-nvl-94gb": 93.02,  # up to 93.11; 95830
    "h200-141gb": 139.72,  # SXM and NVL; up to 139.81; 143771
    "a100-80gb": 79.14,  # up to 79.25; 81920
    "a100-40gb": 39.39,  # up to 39.59; 40960
    "l40s-48gb": 44.32,  # with ECC on; up to 44.53; 46068
    "b200-192gb": 178.35,  # up to 178.36; 183359
    "rtx-pro-6000-96gb": 94.97,  # Blackwell; 97887
    "rtx4090-24gb": 23.52,  # up to 23.65, less what a display takes; 24564
    "rtx5090-32gb": 31.36,  # up to 31.40, less what a display takes; 32607
}
DEVICES = {name: Device(name, int(gib * GIB)) for name, gib in _REPORTED_GIB.items()}


def find_device(name: str) -> Device:
    """The known GPU of that name. Raises UserError with the nearest and all known names."""
    if name.lower() in DEVICES:
        return DEVICES[name.lower()]
    nearest = difflib.get_close_matches(name.lower(), DEVICES, n=1, cutoff=0.4)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ";"
    raise UserError(
        f"unknown GPU {name!r}{hint} known are {', '.join(DEVICES)}; "
        f"for any other GPU: llama4q fit --gpu-memory 80GB"
    )


def memory_bytes(text: str) -> int:
    """Bytes of "80GB" (10^9), "79.1GiB" (2^30), "81559MiB". Raises UserError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", text.strip().lower())
    unit = UNITS.get(match[2].upper()) if match else None
    size = int(Decimal(match[1]) * unit) if match and unit else 0
    if not size:
        raise UserError(
            f"memory size {text!r}: give a number above 0 and a unit, as in 80GB or 79.1GiB"
        )
    return size


class KVDtype(StrEnum):
    """How keys and values are stored (vLLM's `--kv-cache-dtype`)."""

    BF16 = "bf16"
    FP8 = "fp8"

    @property
    def nbytes(self) -> int:
        return 1 if self is KVDtype.FP8 else 2


@dataclass(frozen=True)
class Serving:
    """How the engine is started. Raises UserError for values that no engine takes."""

    context: int  # tokens of one request, prompt and answer (vLLM's `--max-model-len`)
    kv_dtype: KVDtype = KVDtype.BF16
    hybrid: bool = True  # chunked layers keep only what they still see (vLLM's default)
    batched_tokens: int | None = None  # `--max-num-batched-tokens`; None: vLLM's for the device
    utilization: float = UTILIZATION  # share of the device that the engine may use

    def __post_init__(self) -> None:
        if self.context < 1:
            raise UserError(f"context {self.context}: ask for at least 1 token")
        if self.batched_tokens is not None and self.batched_tokens < 1:
            raise UserError(f"batched tokens {self.batched_tokens}: give at least 1")
        if not 0 < self.utilization <= 1:
            raise UserError(f"GPU memory utilization {self.utilization}: give 0 to 1, as in 0.92")


@dataclass(frozen=True)
class KVGroup:
    """Layers that share one table of blocks. `limit`: the most blocks that one request holds."""

    global_layers: int
    chunked_layers: int
    limit: int | None = None

    def blocks(self, context: int) -> int:
        needed = _ceil_div(context, BLOCK_TOKENS)
        return needed if self.limit is None else min(needed, self.limit)


@dataclass(frozen=True)
class KVLayout:
    """vLLM's pool of KV blocks: any block may serve any group, so all have the same bytes."""

    groups: tuple[KVGroup, ...]
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
        lengths = range(BLOCK_TOKENS, limit + BLOCK_TOKENS, BLOCK_TOKENS)
        return min(limit, BLOCK_TOKENS * bisect.bisect_right(lengths, blocks, key=self.blocks))


def kv_layout(config: ModelConfig, device: Device, serving: Serving, cards: int = 1) -> KVLayout:
    """The KV blocks of one of `cards` tensor parallel devices.

    A chunked layer keeps its chunk and what is in flight. With the hybrid manager the rarer kind
    of layer sets the size of a group; the other kind fills as many groups as it needs, the last
    one padded. Source: vLLM 0.32 `v1/core/kv_cache_utils.py` and `v1/kv_cache_interface.py`.
    """
    heads = max(1, config.num_kv_heads // cards)
    page = BLOCK_TOKENS * heads * 2 * config.head_dim * serving.kv_dtype.nbytes
    batched = serving.batched_tokens or device.default_batched_tokens
    limit = _ceil_div(config.chunk_size + BATCHES_IN_FLIGHT * batched, BLOCK_TOKENS)
    chunked = len(config.chunked_layers)
    whole = config.num_layers - chunked
    if not (whole and chunked):  # one kind of layer is one group, whatever the manager
        groups = [KVGroup(whole, chunked, limit if chunked else None)]
    elif not serving.hybrid:
        groups = [KVGroup(whole, chunked)]
    else:
        size = _group_size(whole, chunked)
        groups = [KVGroup(size, 0)] * _ceil_div(whole, size)
        groups += [KVGroup(0, size, limit)] * _ceil_div(chunked, size)
    widest = max(group.global_layers + group.chunked_layers for group in groups)
    return KVLayout(tuple(groups), page * widest)


def _group_size(whole: int, chunked: int) -> int:
    """The rarer kind's layers; the other kind's if they are hardly more, which pads less."""
    fewer, more = sorted((whole, chunked))
    return more if more < 1.5 * fewer else fewer


@dataclass(frozen=True)
class MemoryPlan:
    """What one device must hold to serve one request of `serving.context` tokens, in bytes."""

    device: Device
    serving: Serving
    usable_bytes: int  # what the engine may use of the device
    weight_bytes: int
    kv_global_bytes: int  # of one request
    kv_chunked_bytes: int
    activation_bytes: int
    graph_bytes: int
    non_torch_bytes: int
    kv_block_bytes: int
    kv_blocks: int  # that the device has room for; 0 when not even the rest fits
    request_blocks: int  # that one request holds
    largest_context: int  # tokens of one request; 0 when there is room for none
    context_limit: int  # tokens; the model's own
    remedies: tuple[str, ...] = ()  # when it does not fit: what would do, each one alone

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
        return self.weight_bytes + self.kv_bytes + self.workspace_bytes + self.overhead_bytes

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

    def to_json(self) -> dict[str, Any]:
        """Every number and the verdict, for machines."""
        return {
            **asdict(self),
            "remedies": list(self.remedies),
            "workspace_bytes": self.workspace_bytes,
            "overhead_bytes": self.overhead_bytes,
            "kv_bytes": self.kv_bytes,
            "total_bytes": self.total_bytes,
            "fits": self.fits,
            "short_bytes": self.short_bytes,
            "max_concurrency": self.max_concurrency,
        }


def make_plan(
    config: ModelConfig, weight_bytes: int, device: Device, serving: Serving
) -> MemoryPlan:
    """The plan of one device; `weight_bytes` as the files hold them, vision and head included.

    Raises UserError for a context beyond the model's.
    """
    if serving.context > config.max_positions:
        raise UserError(
            f"context {serving.context:,}: the model knows {config.max_positions:,} positions; "
            f"ask for at most that"
        )
    batched = serving.batched_tokens or device.default_batched_tokens
    serving = replace(serving, batched_tokens=batched)
    layout = kv_layout(config, device, serving)
    usable = math.ceil(device.total_bytes * serving.utilization)
    blocks = max(0, (usable - weight_bytes - RESERVED_BYTES) // layout.block_bytes)
    in_global, in_chunked = layout.split_bytes(serving.context)
    plan = MemoryPlan(
        device=device,
        serving=serving,
        usable_bytes=usable,
        weight_bytes=weight_bytes,
        kv_global_bytes=in_global,
        kv_chunked_bytes=in_chunked,
        activation_bytes=ACTIVATION_BYTES,
        graph_bytes=GRAPH_BYTES,
        non_torch_bytes=NON_TORCH_BYTES,
        kv_block_bytes=layout.block_bytes,
        kv_blocks=blocks,
        request_blocks=layout.blocks(serving.context),
        # one block is vLLM's null block: it refuses to start when a request would need that too
        largest_context=layout.largest_context(blocks - 1, config.max_positions),
        context_limit=config.max_positions,
    )
    return plan if plan.fits else replace(plan, remedies=_remedies(config, plan))


def _remedies(config: ModelConfig, plan: MemoryPlan) -> tuple[str, ...]:
    """What would make `plan` fit, each one alone; the engine's flag where it has one."""
    fp8 = replace(plan.serving, kv_dtype=KVDtype.FP8)
    small_flag, fp8_flag = f"--max-num-batched-tokens {SMALL_BATCH}", "--kv-cache-dtype fp8"
    changes = {
        "the hybrid KV cache manager": replace(plan.serving, hybrid=True),
        f"smaller batches ({small_flag})": replace(plan.serving, batched_tokens=SMALL_BATCH),
        f"an FP8 KV cache ({fp8_flag})": fp8,
        f"both ({small_flag} {fp8_flag})": replace(fp8, batched_tokens=SMALL_BATCH),
    }
    fitting = [words for words, serving in changes.items() if _holds(config, plan, serving)]
    found = fitting[:-1] or fitting  # whatever fits alone, else both together
    share = math.ceil(100 * plan.total_bytes / plan.device.total_bytes) / 100
    if plan.serving.utilization < share <= HIGH_UTILIZATION:
        found.append(f"a larger share of the GPU (--gpu-memory-utilization {share})")
    if plan.largest_context:
        found.append(f"a context of at most {plan.largest_context:,} tokens")
    found.append(_cards(config, plan))
    budget = (plan.weight_bytes - plan.short_bytes) // 10**7  # hundredths of a GB, rounded down
    if budget > 0:
        found.append(f"a recipe with at most {budget / 100:.2f} GB of weights")
    return tuple(found)


def _cards(config: ModelConfig, plan: MemoryPlan) -> str:
    """The fewest cards that hold it, tensor parallel; the heads must divide evenly."""
    sizes = [size for size in CARDS if config.num_heads % size == 0]
    for size in sizes:
        if _holds(config, plan, plan.serving, size):
            return f"{size} cards (--tensor-parallel-size {size})"
    if plan.usable_bytes <= RESERVED_BYTES:  # no engine starts here, whatever the model
        return "a larger GPU"
    return f"more than {sizes[-1]} cards"


def _holds(config: ModelConfig, plan: MemoryPlan, serving: Serving, cards: int = 1) -> bool:
    """Whether each of `cards` devices would hold its share under `serving`. Weights divide evenly
    but for norms and routers, which every card holds: 10 MB of Scout's 215 GB."""
    layout = kv_layout(config, plan.device, serving, cards)
    kv = (layout.blocks(serving.context) + 1) * layout.block_bytes
    return _ceil_div(plan.weight_bytes, cards) + RESERVED_BYTES + kv <= plan.usable_bytes


def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)
