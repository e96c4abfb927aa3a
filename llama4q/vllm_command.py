"""A plan as the options that start vLLM with it. Knows no arithmetic."""

from __future__ import annotations

import json
import shlex

from .config import ModelConfig
from .kv_cache import BLOCK_TOKENS, KVDtype
from .memory import UTILIZATION, MemoryPlan

Option = tuple[str, ...]  # its name and its value, if it takes one


def serve_command(name: str, options: list[Option]) -> str:
    return shlex.join(["vllm", "serve", name, *(word for option in options for word in option)])


def engine_options(config: ModelConfig, plan: MemoryPlan) -> list[Option]:
    """What the plan counts on, in vLLM 0.32's spelling; nothing that is its default."""
    serving = plan.serving
    options: list[Option] = [("--max-model-len", str(serving.context))]
    if config.moe_layers:  # other experts apply the router's score twice (docs/format.md)
        options.append(("--moe-backend", "triton"))
    if serving.cards > 1:
        options.append(("--tensor-parallel-size", str(serving.cards)))
    if serving.kv_dtype is KVDtype.FP8:
        options.append(("--kv-cache-dtype", "fp8"))
    if serving.batched_tokens != plan.device.default_batched_tokens:
        options.append(("--max-num-batched-tokens", str(serving.batched_tokens)))
    if serving.utilization != UTILIZATION:
        options.append(("--gpu-memory-utilization", str(serving.utilization)))
    if serving.block_tokens != BLOCK_TOKENS:
        options.append(("--block-size", str(serving.block_tokens)))
    if not serving.hybrid:
        options.append(("--disable-hybrid-kv-cache-manager",))
    if serving.positions:
        limit = {"max_position_embeddings": serving.positions}
        nested = {"text_config": limit} if config.prefix else limit
        options.append(("--hf-overrides", json.dumps(nested)))
    return options
