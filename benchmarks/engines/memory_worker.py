"""What vLLM's own code says of memory: blocks of the KV cache, and bytes of a model's parameters.

Runs in the vLLM environment that `setup.py` makes, on any CPU; reads cases as JSON and writes what
vLLM makes of each as JSON. Blocks come from the functions that vLLM calls when it starts.
Parameters are those of vLLM's model class, made on the meta device with the tensor parallel size
set to what a case says, so that the real Scout and Maverick need no memory; linears' and experts'
kernels are replaced as in `vllm_reference.py`, the creation of their parameters is not. Written
for vLLM 0.32.
Knows nothing of llama4q.
"""

import argparse
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
)
# Of a quantized KV cache: vLLM takes them away again when it has loaded.
PASSING = ("k_scale", "v_scale", "q_scale", "prob_scale", "k_zero_point", "v_zero_point",
           "q_zero_point")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", type=Path)
    parser.add_argument("result", type=Path)
    arguments = parser.parse_args()
    cases = json.loads(arguments.cases.read_text())
    found = {
        "blocks": [blocks(case) for case in cases.get("blocks", [])],
        "weights": [
            weights(number, **case) for number, case in enumerate(cases.get("weights", []))
        ],
    }
    arguments.result.write_text(json.dumps(found))
    os._exit(0)  # vLLM's own threads would keep the process for a while


def blocks(case: dict[str, Any]) -> dict[str, Any]:
    """Blocks in `available` bytes, requests at once, and the longest request's tokens."""
    import torch
    from vllm.config.cache import _layout_from_name
    from vllm.v1.core import kv_cache_utils as utils
    from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec

    shared = {
        "block_size": case["block_tokens"],
        "num_kv_heads": case["heads_on_a_card"],
        "head_size": case["head_dim"],
        "dtype": torch.float8_e4m3fn if case["kv_dtype"] == "fp8" else torch.bfloat16,
    }
    specs = {
        f"layers.{layer}": ChunkedLocalAttentionSpec(
            **shared, attention_chunk_size=case["chunk_size"]
        )
        if layer in case["chunked_layers"]
        else FullAttentionSpec(**shared)
        for layer in range(case["num_layers"])
    }
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=not case["hybrid"]),
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: _layout_from_name("NHD"),
            num_gpu_blocks_override=None,
            prefix_cache_retention_interval=None,
        ),
        attention_config=SimpleNamespace(hisparse_config=None),
        model_config=SimpleNamespace(max_model_len=case["context"]),
        max_in_flight_tokens=2 * case["batched_tokens"],  # asynchronous scheduling
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
        speculative_config=None,
    )
    groups = utils.get_kv_cache_groups(config, specs)
    cache = utils.get_kv_cache_config_from_groups(config, groups, case["available"])
    tokens, concurrency = utils.get_kv_cache_capacity(config, cache)
    # as get_kv_cache_configs does it: the null block is off, and the model's own length the most
    usable = case["available"] - utils._pool_bytes_per_block(config, groups)
    config.model_config.max_model_len = case["max_positions"]
    longest = utils._estimate_max_model_len_from_groups(config, groups, usable)
    return {
        "blocks": cache.num_blocks, "tokens": tokens, "concurrency": concurrency,
        "longest": longest,
    }  # fmt: skip


def weights(number: int, folder: str, cards: int, positions: int | None) -> dict[str, int]:
    """Bytes of the parameters on one of `cards`, and of the text model's rotary table.

    `folder` holds a config.json, no tensor; `positions` goes to `--hf-overrides`."""
    import torch
    import vllm_reference
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers import rotary_embedding
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    if number == 0:
        vllm_reference.replace_linears()
        vllm_reference.replace_experts()
    rotary_embedding._ROPE_DICT.clear()
    config = EngineArgs(
        model=folder, skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True,
        max_model_len=1024, load_format="dummy",
        hf_overrides={"text_config": {"max_position_embeddings": positions}} if positions else {},
    ).create_engine_config()  # fmt: skip
    with set_current_vllm_config(config):
        if number == 0:
            file = f"file://{folder}/rendezvous"
            parallel_state.init_distributed_environment(1, 0, file, 0, "gloo")
            parallel_state.initialize_model_parallel(1, 1)
        parallel_state._TP.world_size = cards
        with set_default_torch_dtype(torch.bfloat16), torch.device("meta"):
            model = initialize_model(vllm_config=config)
    parameters = {
        id(parameter): parameter.nbytes
        for name, parameter in model.named_parameters()
        if not name.endswith(PASSING)
    }
    tables = {
        id(table): table.nbytes
        for name, table in model.named_buffers()
        if name.endswith("rotary_emb.cos_sin_cache") and not name.startswith("vision_model.")
    }
    return {"weights": sum(parameters.values()), "positions": sum(tables.values())}


if __name__ == "__main__":
    main()
