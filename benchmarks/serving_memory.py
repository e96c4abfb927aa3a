"""Is `llama4q fit`'s arithmetic vLLM's? Our figures beside those of vLLM's own code, case by case.

    python benchmarks/engines/setup.py                    (once; its vLLM environment)
    python -m benchmarks.serving_memory [--cases 200] [--engines .engines]

Blocks of the KV cache: random configurations, and the published Scout on 80 GB at 131,072 tokens.
Weights: Scout and Maverick as published, plain and by shipped recipes, on 1, 2, 4 and 8 cards, and
with a rotary table cut by --hf-overrides. All must be equal, else the exit code is 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.make_giant import MAVERICK, SCOUT
from benchmarks.pocket.config import hub_config
from benchmarks.pocket.export import special_ids
from llama4q.checkpoint import TensorInfo
from llama4q.config import ModelConfig, parse_config
from llama4q.export import quantization_config
from llama4q.gpus import DEVICES
from llama4q.hub import POCKET_MODEL
from llama4q.kv_cache import KVDtype, KVLayout, kv_layout
from llama4q.memory import Serving, make_plan, position_bytes
from llama4q.predict import predicted_tensors
from llama4q.recipe import load_recipe
from llama4q.shards import sharded

HERE = Path(__file__).parent
RECIPES = (None, "int4", "int4-g64", "int4-g32", "int4-fp8", "mixed", "fp8", "int8")
CARDS = (1, 2, 4, 8)
SHORT_TABLE = 131072  # positions, by --hf-overrides
# of the vision towers, as published
VISION = {
    "model_type": "llama4_vision_model", "hidden_size": 1408, "num_hidden_layers": 34,
    "num_attention_heads": 16, "intermediate_size": 5632, "image_size": 336, "patch_size": 14,
    "vision_output_dim": 4096, "projector_input_dim": 4096, "projector_output_dim": 4096,
    "pixel_shuffle_ratio": 0.5,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, default=200, help="random configurations")
    parser.add_argument("--engines", type=Path, default=Path(".engines"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kv = [case_of(*drawn) for drawn in configurations(arguments.cases)]
        models = list(real_models(Path(folder)))
        asked = {
            "blocks": [given for given, _ in kv], "weights": [given for given, _ in models],
        }  # fmt: skip
        found = vllm_says(arguments.engines, asked, Path(folder))
    wrong = differing("KV cache", kv, found["blocks"]) + differing(
        "weights", models, found["weights"]
    )
    sys.exit(1 if wrong else 0)


def vllm_says(engines: Path, asked: dict[str, Any], folder: Path) -> dict[str, Any]:
    cases, result = folder / "cases.json", folder / "result.json"
    cases.write_text(json.dumps(asked))
    worker = HERE / "engines" / "memory_worker.py"
    python = engines.absolute() / "vllm" / "bin" / "python"
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run(
            [python, "-W", "ignore", worker, cases, result], stdout=log, stderr=log, check=False
        )
    if done.returncode:
        sys.exit(f"vLLM's worker failed:\n{(folder / 'log.txt').read_text()[-4000:]}")
    found: dict[str, Any] = json.loads(result.read_text())
    return found


Case = tuple[dict[str, Any], dict[str, Any]]  # what vLLM is asked, and our answer


def configurations(number: int) -> Iterator[tuple[ModelConfig, Serving, int]]:
    """A model, how it is served, and the bytes left for its KV cache."""
    chance = random.Random(0)
    scout = parse_config(config_json("scout"), "scout")
    h100 = DEVICES["h100-80gb"]
    weights = sharded(scout, predicted_tensors(tensors("scout"), scout, load_recipe("int4")))
    plan = make_plan(scout, weights, h100, Serving(131072))
    left = plan.usable_bytes - plan.total_bytes + plan.kv_bytes + plan.kv_block_bytes
    yield scout, plan.serving, left
    for _ in range(number - 1):
        layers = chance.randint(1, 60)
        share = chance.choice([0, 0.2, 0.5, 0.75, 0.75, 0.75, 1])
        heads = chance.choice([1, 2, 8])
        config = dataclasses.replace(
            scout,
            num_layers=layers,
            chunked_layers=frozenset(at for at in range(layers) if chance.random() < share),
            num_kv_heads=heads,
            head_dim=chance.choice([32, 64, 128]),
            chunk_size=chance.choice([256, 1024, 8192]),
            max_positions=chance.choice([8192, 131072, 1048576]),
        )
        serving = Serving(
            context=chance.randint(1, config.max_positions),
            cards=chance.choice(CARDS),
            kv_dtype=chance.choice(list(KVDtype)),
            hybrid=chance.random() < 0.8,
            batched_tokens=chance.choice([1, 100, 2048, 8192, 16384]),
            block_tokens=chance.choice([16, 16, 32, 64, 128]),
        )
        yield config, serving, chance.randint(2**24, 2 ** chance.randint(26, 37))


def case_of(config: ModelConfig, serving: Serving, available: int) -> Case:
    assert serving.batched_tokens
    layout = kv_layout(
        config, batched_tokens=serving.batched_tokens, kv_dtype=serving.kv_dtype,
        hybrid=serving.hybrid, cards=serving.cards, block_tokens=serving.block_tokens,
    )  # fmt: skip
    asked = {
        "num_layers": config.num_layers, "chunked_layers": sorted(config.chunked_layers),
        "heads_on_a_card": max(1, config.num_kv_heads // serving.cards),
        "head_dim": config.head_dim, "chunk_size": config.chunk_size,
        "max_positions": config.max_positions, "kv_dtype": str(serving.kv_dtype),
        "context": serving.context, "hybrid": serving.hybrid, "available": available,
        "batched_tokens": serving.batched_tokens, "block_tokens": serving.block_tokens,
    }  # fmt: skip
    return asked, in_bytes(layout, serving.context, config.max_positions, available)


def in_bytes(layout: KVLayout, context: int, limit: int, available: int) -> dict[str, Any]:
    number = available // layout.block_bytes
    concurrency = number / layout.blocks(context)
    return {
        "blocks": number, "tokens": int(concurrency * context), "concurrency": concurrency,
        "longest": layout.largest_context(number - 1, limit),
    }  # fmt: skip


def real_models(folder: Path) -> Iterator[Case]:
    for model in ("scout", "maverick"):
        raw, infos = config_json(model), tensors(model)
        config = parse_config(raw, model)
        for name in RECIPES:
            held, written = infos, dict(raw)
            if name is not None:
                recipe = load_recipe(name)
                held = predicted_tensors(infos, config, recipe)
                written["quantization_config"] = quantization_config(recipe, config)
            here = folder / f"{model}-{name}"
            here.mkdir()
            (here / "config.json").write_text(json.dumps(written))
            weights = sharded(config, held)
            for cards, positions in [*((cards, None) for cards in CARDS), (1, SHORT_TABLE)]:
                table = position_bytes(config, Serving(1, positions=positions))
                ours = {"weights": weights.on(cards), "positions": table}
                yield {"folder": str(here), "cards": cards, "positions": positions}, ours


def config_json(model: str) -> dict[str, Any]:
    """As published; vision, too."""
    sizes = {"scout": SCOUT, "maverick": MAVERICK}[model]
    return {**hub_config(sizes, special_ids(POCKET_MODEL)), "vision_config": VISION}


def tensors(model: str) -> dict[str, TensorInfo]:
    """Names and shapes from transformers on the meta device."""
    import torch
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    with torch.device("meta"):
        made = Llama4ForConditionalGeneration(Llama4Config(**config_json(model)))
    return {
        name: TensorInfo("", tuple(tensor.shape), torch.bfloat16, 0)
        for name, tensor in made.state_dict().items()
    }


def differing(what: str, cases: list[Case], theirs: list[dict[str, Any]]) -> int:
    """Prints the cases that differ, and how many are equal."""
    wrong = 0
    for (asked, ours), vllm in zip(cases, theirs, strict=True):
        if ours != vllm:
            wrong += 1
            print(f"{what}: {asked}\n  ours {ours}\n  vLLM {vllm}")
    print(f"{what}: {len(cases) - wrong} of {len(cases)} cases equal; the first: {cases[0][1]}")
    return wrong


if __name__ == "__main__":
    main()
