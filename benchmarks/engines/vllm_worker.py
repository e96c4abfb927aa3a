"""Serve one checkpoint with vLLM on the CPU and write what happened as JSON.

Runs in the vLLM environment that `setup.py` makes, one checkpoint per process. Natively, vLLM's
own CPU kernels compute, where it has any for the scheme. With --reference, vLLM's configuration
parsing, target matching and weight loading stay as they are, and plain arithmetic takes the place
of the kernels: see `vllm_reference.py`. It doesn't know transformers, and judges nothing; a
refusal is a result like any other. The vision tower is not loaded.
"""

import argparse
import json
import os
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, so that our replacements hold
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
BLOCK_SIZES = (128, 64, 32)  # multiples of 32 only, on the CPU; one must divide a chunk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--logprobs", type=Path, required=True)
    parser.add_argument("--reference", action="store_true", help="plain arithmetic, any scheme")
    arguments = parser.parse_args()
    os.environ.update({key: os.environ.get(key, value) for key, value in SETTINGS.items()})
    prompts = json.loads(arguments.prompts.read_text())
    try:
        report = serve(arguments.checkpoint, prompts, arguments.logprobs, arguments.reference)
    except BaseException as error:  # vLLM ends some refusals with SystemExit
        traceback.print_exc()
        report = {"served": False, "reason": f"{type(error).__name__}: {error}".splitlines()[0]}
    if arguments.reference:
        import vllm_reference

        report |= {"unset": vllm_reference.UNSET, "digests": vllm_reference.DIGESTS}
    arguments.result.write_text(json.dumps(report, indent=1))
    sys.stdout.flush()
    os._exit(0)  # vLLM's own threads would keep the process for a while


def serve(
    checkpoint: Path, prompts: list[list[int]], logprobs: Path, reference: bool
) -> dict[str, Any]:
    import numpy as np
    from vllm import LLM, SamplingParams

    if reference:
        import vllm_reference

        vllm_reference.install()
    else:
        weigh_inputs_once()
    engine = LLM(**engine_options(checkpoint, max(map(len, prompts))))
    kinds = Counter(engine.apply_model(layer_kinds)[0])
    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, logprobs=-1),
        use_tqdm=False,
    )
    np.savez(logprobs, *[all_logprobs(output) for output in outputs])
    return {"served": True, "kinds": dict(sorted(kinds.items()))}


def engine_options(checkpoint: Path, longest: int) -> dict[str, Any]:
    config = json.loads((checkpoint / "config.json").read_text())
    text = config.get("text_config", config)
    chunk = text.get("attention_chunk_size") or BLOCK_SIZES[0]
    options: dict[str, Any] = {
        "model": str(checkpoint),
        "dtype": "bfloat16",
        "enforce_eager": True,
        "max_model_len": longest + 8,
        "max_num_seqs": 4,
        "max_logprobs": -1,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "block_size": next((size for size in BLOCK_SIZES if chunk % size == 0), BLOCK_SIZES[0]),
        "skip_tokenizer_init": not (checkpoint / "tokenizer.json").exists(),
        # transformers always tunes the temperature of global layers, vLLM only above 32,768
        # tokens: below the configuration's floor_scale they agree, beyond it only like this.
        "override_generation_config": {
            "attn_temperature_tuning": bool(text.get("attn_temperature_tuning", True))
        },
    }
    if "vision_config" in config:
        options["limit_mm_per_prompt"] = {"image": 0}
    return options


def layer_kinds(model: Any) -> list[str]:
    """'what: which method serves it', one entry per Linear and per layer's experts."""
    kinds = []
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is not None and not name.endswith((".attn", "embed_tokens", "lm_head")):
            scheme = getattr(module, "scheme", None) or method
            kind = "experts" if ".experts" in name else name.rsplit(".", 1)[-1]
            kinds.append(f"{kind}: {type(scheme).__name__}")
    return kinds


def all_logprobs(output: Any) -> Any:
    """Array [T, V]: after every prompt token, the log-probability of every next token."""
    import numpy as np

    steps = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
    rows = np.full((len(steps), max(map(max, steps)) + 1), -np.inf, np.float32)
    for row, step in zip(rows, steps, strict=True):
        row[list(step)] = [entry.logprob for entry in step.values()]
    return rows


def weigh_inputs_once() -> None:
    """Let vLLM's quantized CPU experts serve Llama 4, whose router weighs the experts' inputs.

    They refuse it, because they would weigh the outputs too. The inputs are weighed before they
    are called, so calling them with output weights of one is exact (one expert per token)."""
    import inspect

    import torch
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    def with_unit_weights(apply: Any) -> Any:
        signature = inspect.signature(apply)

        def applied(*positional: Any, **named: Any) -> Any:
            arguments = signature.bind(*positional, **named).arguments
            if arguments["apply_router_weight_on_input"]:
                arguments["topk_weights"] = torch.ones_like(arguments["topk_weights"])
                arguments["apply_router_weight_on_input"] = False
            return apply(**arguments)

        return applied

    for name in ("CPUExpertsInt4", "CPUExpertsFp8", "CPUExpertsInt8"):
        experts = getattr(cpu_moe, name, None)
        if experts is not None:
            experts.apply = with_unit_weights(experts.apply)


if __name__ == "__main__":
    main()
