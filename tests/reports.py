"""Reports of every size, as `quantize` and `eval` write them, from a seed: no model is run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

TASKS = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2",
    "niah_multikey_3", "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
)  # fmt: skip
SCOUT = {
    "routed_experts": (193_273_528_320, 49_900_000_000),
    "shared_experts": (12_079_595_520, 3_200_000_000),
    "attention": (6_039_797_760, 6_039_797_760),
    "embeddings": (2_068_971_520, 2_068_971_520),
    "lm_head": (2_068_971_520, 2_068_971_520),
    "vision": (1_750_000_000, 1_750_000_000),
    "router": (7_864_320, 7_864_320),
    "norms": (993_280, 993_280),
}
EVIL = '<script>alert("1")</script> & <b>\x00\x1b[31m\ud800'


def evaluated(
    layers: int = 8,
    experts: int = 8,
    tasks: Sequence[str] = ("needle",),
    lengths: int = 3,
    depths: int = 5,
    dense_every: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """What `eval` writes; every `dense_every`-th layer is dense, `experts=0` makes all dense."""
    chance = random.Random(seed)
    return {
        "schema": 2,
        "llama4q": "0.1.0",
        "created": "2026-01-01T00:00:00+00:00",
        "command": "llama4q eval out --against o/scout",
        "source": {
            "name": "meta-llama/Llama-4-Scout-17B-16E-Instruct",
            "revision": "92f3b1597a195b523d8d9e5700e57e4fbb8f20d3",
            "bytes": sum(before for before, _ in SCOUT.values()),
            "components": {name: before for name, (before, _) in SCOUT.items()},
        },
        "quantized": {
            "name": "scout-int4",
            "bytes": sum(after for _, after in SCOUT.values()),
            "components": {name: after for name, (_, after) in SCOUT.items()},
        },
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "dtype": "bfloat16",
        "evidence": {
            "likelihood": _likelihood(chance),
            "layers": _layers(chance, layers, experts, dense_every),
            "retrieval": _retrieval(chance, tasks, lengths, depths) if tasks else None,
            "other_settings": [],
        },
    }


def quantized(
    layers: int = 8,
    experts: int = 8,
    poor: int = 0,
    dense_every: int = 0,
    fitted: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """What `quantize` writes: the same, and how the codes were found. `poor` experts saw too few
    tokens; `fitted`: its precision was chosen."""
    report = evaluated(layers, experts, dense_every=dense_every, **more)
    chance = random.Random(1)
    records = [
        _weights(chance, entry["layer"], 0 if entry["load_original"] is None else experts)
        for entry in report["evidence"]["layers"]
    ]
    held = [record for record in records if record["expert_tokens"]]
    for number in range(poor):
        held[number % len(held)]["expert_tokens"][number // len(held)] = 17
    by_layer = [
        {
            "layer": record["layer"],
            "experts": [at for at, tokens in enumerate(record["expert_tokens"]) if tokens == 17],
        }
        for record in held
    ]
    return {
        **report,
        "command": "llama4q quantize o/scout scout-int4 --recipe int4",
        "recipe": {"name": "int4", "schemes": {"experts": "int4", "shared_expert": "int4"}},
        "calibration": {
            "source": "pocket", "samples": 128, "length": 2048, "seed": 0, "candidates": 1,
            "tokens": 262144, "digest": "c" * 64,
            "mix": [{"source": "pocket", "share": 1.0, "samples": 128, "length": 2048}],
            "coverage": {
                "needed": 100, "experts": experts * len(held),
                "poor": [entry for entry in by_layer if entry["experts"]],
                "worst": None,
                "warning": f"{poor} experts saw too few tokens; give more" if poor else None,
            } if held else None,
        },
        "kernel": "C kernel", "products": "BF16 factors with F32 sums by MKL",
        "layers": records,
        "rescues": [],
        "fit": {
            "device": "h100-80gb", "cards": 1, "context": 131072, "concurrency": 1, "kv": "bf16",
            "fits": True, "largest_context": 262144,
            "total_bytes": report["quantized"]["bytes"] + 5_100_000_000 + 5_368_709_120,
            "usable_bytes": 78_138_340_016,
            "weight_bytes": report["quantized"]["bytes"],
            "kv_bytes": 5_100_000_000, "reserved_bytes": 5_368_709_120,
            "served": {
                "cards": 1, "context": 131072,
                "options": [["--max-model-len", "131072"], ["--moe-backend", "triton"]],
            },
        },
        "budget": _budget(chance, layers) if fitted else None,
        "verified": {"tensors": 2749, "scales": 2304, "untouched": 301},
        "files": {f"model-{at:05d}-of-00017.safetensors": "e" * 64 for at in range(1, 18)},
        "seconds": {"total": 8123.4},
    }  # fmt: skip


def _likelihood(chance: random.Random) -> dict[str, Any]:
    edges = [10 ** (-7 + 9 * at / 72) for at in range(73)]
    counts = [0] * 72
    for _ in range(20_000):
        value = 10 ** chance.gauss(-2.3, 0.8)
        at = next((at for at in range(72) if value < edges[at + 1]), 71)
        counts[at] += 1
    before = "he opened the door of the old house and looked into a room that nobody had entered "
    return {
        "tokens": 32736, "windows": 32, "digest": "d" * 64, "text": "wikitext-2", "stride": 1024,
        "original": {"perplexity": 7.4142, "standard_error": 0.2122, "bits_per_byte": 0.6512},
        "quantized": {"perplexity": 7.4319, "standard_error": 0.2121, "bits_per_byte": 0.6517},
        "kl_mean": 0.01177, "kl_standard_error": 0.00034, "kl_median": 0.00418, "kl_p99": 0.1532,
        "kl_p999": 0.714, "kl_max": 4.31,
        "top1_agreement": 0.95356, "top5_agreement": 0.8912,
        "perplexity_increase": 0.00239,
        "intervals": {
            "kl_mean": [0.01112, 0.01249], "top1_agreement": [0.9512, 0.9561],
            "top5_agreement": [0.8871, 0.8951], "perplexity_increase": [-0.0011, 0.0058],
        },
        "histogram": {"edges": edges, "counts": counts},
        "worst": [
            {
                "kl": 4.31 / (at + 1), "window": at, "position": 100 * at + 7,
                "before": EVIL if at == 1 else before, "token": "\nthe" if at == 2 else " since",
                "after": " the war began, and\nthe dust lay thick on table, chair and bed.",
                "original": " since", "quantized": "<td>" if at == 1 else " for",
            }
            for at in range(20)
        ],
    }  # fmt: skip


def _layers(
    chance: random.Random, layers: int, experts: int, dense_every: int
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    error = 0.0006
    for layer in range(layers):
        error *= 1.045 * chance.uniform(0.98, 1.04)
        dense = not experts or (dense_every and layer % dense_every == 0)
        load: list[int] | None = None if dense else _loads(chance, experts, 32736)
        found.append(
            {
                "layer": layer,
                "hidden_error": error,
                "gain": chance.uniform(0.975, 0.995),
                "agreement": None if dense else 1 - 0.04 * layer / layers * chance.uniform(0.7, 1),
                "load_original": load,
                "load_quantized": [round(held * chance.uniform(0.96, 1.04)) for held in load or []]
                or None,
                "expert_gain": load and [chance.gauss(0.985, 0.004) for _ in load],
            }
        )
    return found


def _loads(chance: random.Random, experts: int, tokens: int) -> list[int]:
    parts = [chance.lognormvariate(0, 0.6) for _ in range(experts)]
    return [round(tokens * part / sum(parts)) for part in parts]


def _difference(chance: random.Random, before: float, after: float) -> dict[str, float]:
    room = chance.uniform(0.004, 0.03)
    value = after - before
    return {
        "value": value, "low": value - room, "high": value + room,
        "p_value": 1.0 if abs(value) < room else 0.0078,
    }  # fmt: skip


def _retrieval(
    chance: random.Random, tasks: Sequence[str], lengths: int, depths: int
) -> dict[str, Any]:
    found = []
    for hard, task in enumerate(tasks):
        places: list[float | None] = [at / max(1, depths - 1) for at in range(depths)]
        cells: list[dict[str, Any]] = []
        for at in range(lengths):
            for depth in places if task not in ("cwe", "fwe", "vt") else [None]:
                right = max(0.0, 1 - 0.004 * hard * at - 0.005 * at * chance.random())
                before = round(20 * right) / 20
                after = round(20 * max(0.0, right - 0.0015 * hard * at * chance.random())) / 20
                cells.append(
                    {
                        "length": 4096 * 2**at, "depth": depth, "prompts": 20,
                        "original": before, "quantized": after,
                        "lost": round(20 * (before - after)), "gained": 0,
                    }
                )  # fmt: skip
        before, after = (
            sum(cell[side] for cell in cells) / len(cells) for side in ("original", "quantized")
        )
        found.append(
            {
                "task": task, "metric": "exact", "prompts": 20 * len(cells), "original": before,
                "quantized": after, "difference": _difference(chance, before, after),
                "cells": cells,
            }
        )  # fmt: skip
    sides = [sum(task[side] for task in found) / len(found) for side in ("original", "quantized")]
    return {
        "prompts": sum(task["prompts"] for task in found), "seed": 0, "digest": "f" * 64,
        "original": sides[0], "quantized": sides[1],
        "difference": _difference(chance, *sides), "tasks": found,
    }  # fmt: skip


def _budget(chance: random.Random, layers: int) -> dict[str, Any]:
    """Half of the experts in INT8, and what else there was."""
    parts = []
    for layer in range(layers):
        for component, nbytes in (("o_proj", 10**7), ("experts", 10**9), ("shared_expert", 10**8)):
            error = chance.uniform(0.1, 1) / (3 * layers)
            parts.append({
                "layer": layer, "component": component, "pinned": component == "o_proj",
                "scheme": "int8" if layer % 2 else "int4",
                "options": [
                    {"scheme": "int4", "bytes": nbytes, "error": error},
                    {"scheme": "int8", "bytes": 2 * nbytes, "error": error / 200},
                ],
            })  # fmt: skip
    sizes = [10**9 * layers * (1 + step / 4) for step in range(5)]
    return {
        "device": "h100-80gb", "cards": 2, "context": 131072, "concurrency": 4, "kv": "fp8",
        "room_bytes": 1.6e9 * layers, "weight_bytes": 1.5e9 * layers, "expected": 0.0072,
        "parts": parts,
        "frontier": [{"bytes": size, "expected": 0.02 / 2**at} for at, size in enumerate(sizes)],
        "recipes": [
            {"name": "int4", "bytes": 1.1e9 * layers, "expected": 0.021},
            {"name": "int8", "bytes": 2.1e9 * layers, "expected": 0.0011},
        ],
    }  # fmt: skip


def _weights(chance: random.Random, layer: int, experts: int) -> dict[str, Any]:
    stem = f"language_model.model.layers.{layer}.feed_forward"
    names = [f"{stem}.{part}_proj" for part in ("gate_up", "down")]
    if experts:
        paths = ["shared_expert", *(f"experts.{at}" for at in range(experts))]
        names = [f"{stem}.{path}.{part}_proj" for path in paths for part in ("gate_up", "down")]
    groups = []
    for name in names:
        rounded = 0.006 * chance.lognormvariate(0, 0.25)
        error = rounded * chance.uniform(0.12, 0.5)
        groups.append(
            {
                "name": name, "scheme": "int4", "tokens": 16372, "error": error,
                "rounding_error": rounded, "shrinkage": 0.01, "damping": 0.004,
                "correction": 0.5, "seconds": 0.7,
            }
        )  # fmt: skip
    return {
        "layer": layer,
        "expert_tokens": _loads(chance, experts, 262144) if experts else [],
        "hidden_error": 0.001,
        "groups": groups,
    }
