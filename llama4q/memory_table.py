"""A MemoryPlan as a table for the terminal. GB are 10^9 bytes. Knows no arithmetic of its own."""

from __future__ import annotations

import math

from .memory import MemoryPlan


def render_plan(plan: MemoryPlan) -> str:
    """The table and, as its last line, the verdict: `fits: yes, …` or `fits: no, …`."""
    serving = plan.serving
    kv = f"{serving.kv_dtype} KV cache of {serving.context:,} tokens"
    rows = [
        ("weights", plan.weight_bytes, "as in the files"),
        ("KV cache, global layers", plan.kv_global_bytes, kv),
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


def _chunked_note(plan: MemoryPlan) -> str:
    if not plan.serving.hybrid:
        return "kept in full, without the hybrid manager"
    return f"the chunk and 2 batches of {plan.serving.batched_tokens:,} tokens at most"


def verdict(plan: MemoryPlan) -> str:
    """One line: whether it fits, and the largest context or what would do."""
    if not plan.fits:
        missing = math.ceil(plan.short_bytes / 1e6) / 1e3  # never "short by 0.000"
        return f"fits: no, short by {missing:.3f} GB; would do: {' | '.join(plan.remedies)}"
    limit = " (the model's own)" if plan.largest_context == plan.context_limit else ""
    return (
        f"fits: yes, largest context {plan.largest_context:,} tokens{limit}; "
        f"{plan.max_concurrency:.2f} requests of {plan.serving.context:,} tokens at once"
    )
