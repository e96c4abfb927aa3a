"""A MemoryPlan as a table for the terminal. GB are 10^9 bytes. Knows no arithmetic of its own."""

from __future__ import annotations

import math

from .memory import MemoryPlan


def render_plan(plan: MemoryPlan) -> str:
    """The table and, as its last line, the verdict: `fits: yes, …` or `fits: no, …`."""
    serving = plan.serving
    rows = [
        ("weights", plan.weight_bytes, _weights_note(plan)),
        ("rotary positions", plan.position_bytes, "a table that vLLM makes for all of them"),
        ("KV cache, global layers", plan.kv_global_bytes, _kv_note(plan)),
        ("KV cache, chunked layers", plan.kv_chunked_bytes, _chunked_note(plan)),
        ("workspace", plan.workspace_bytes, "activation peak and CUDA graphs, reserved"),
        ("overhead", plan.overhead_bytes, "CUDA context and libraries, reserved"),
        ("total", plan.total_bytes, ""),
        ("usable", plan.usable_bytes, f"{serving.utilization:.0%} of {plan.device.name}"),
    ]
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{'':{width}}  {'GB':>9}"]
    lines += [f"{name:{width}}  {size / 1e9:9.3f}  {note}".rstrip() for name, size, note in rows]
    return "\n".join([*lines, verdict(plan)])


def _weights_note(plan: MemoryPlan) -> str:
    cards = plan.serving.cards
    return "as vLLM holds them" + (f", on each of {cards} GPUs" if cards > 1 else "")


def _kv_note(plan: MemoryPlan) -> str:
    serving = plan.serving
    requests = f"{serving.concurrency} x " if serving.concurrency > 1 else ""
    return f"{serving.kv_dtype} KV cache of {requests}{serving.context:,} tokens"


def _chunked_note(plan: MemoryPlan) -> str:
    if not plan.serving.hybrid:
        return "kept in full, without the hybrid manager"
    return f"the chunk and 2 batches of {plan.serving.batched_tokens:,} tokens at most"


def verdict(plan: MemoryPlan) -> str:
    """One line: whether it fits, the largest context or what is missing, and vLLM's own figures."""
    serving = plan.serving
    asked = f"{plan.max_concurrency:.2f} requests of {serving.context:,} tokens at once"
    figures = f"{plan.kv_blocks:,} KV blocks: {asked}"
    if not plan.fits:
        missing = math.ceil(plan.short_bytes / 1e6) / 1e3  # never "short by 0.000"
        each = " on each GPU" if serving.cards > 1 else ""
        return f"fits: no, short by {missing:.3f} GB{each}; {figures}"
    limit = " (the model's own)" if plan.largest_context == plan.context_limit else ""
    return f"fits: yes, largest context {plan.largest_context:,} tokens{limit}; {figures}"
