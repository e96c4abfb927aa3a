"""Reports with round figures and few of them, so that a verdict can be worked out by hand."""

from __future__ import annotations

import copy
from typing import Any

from evals.gate import SCHEMA

ERRORS = (0.002, 0.003, 0.004, 0.007)  # hidden_error by layer; layer 0 is dense


def report() -> dict[str, Any]:
    """A good quantization of four layers: 16 windows, two retrieval tasks at two lengths."""
    return copy.deepcopy(_GOOD)


def altered(changes: dict[str, Any]) -> dict[str, Any]:
    """`report()` with the entries at dotted paths replaced, or gone where the value is None."""
    found = report()
    for path, value in changes.items():
        *parents, last = path.split(".")
        place: Any = found
        for key in parents:
            place = place[int(key) if isinstance(place, list) else key]
        if value is None:
            del place[last]
        else:
            place[int(last) if isinstance(place, list) else last] = value
    return found


def faulty(layer: int, factor: float) -> dict[str, Any]:
    """What a fault in one layer does: its error grows, and the layers behind it carry that on."""
    found = report()
    added = 0.0
    for entry in found["evidence"]["layers"]:
        if entry["layer"] == layer:
            added = (factor - 1) * entry["hidden_error"]
        entry["hidden_error"] += added
    return found


def task(name: str, original: float, quantized: float, low: float, high: float) -> dict[str, Any]:
    """20 prompts at 1,024 and at 4,096 tokens; all that is lost is lost at 4,096."""
    lost = original - quantized
    return {
        "task": name,
        "metric": "exact",
        "prompts": 40,
        "original": original,
        "quantized": quantized,
        "difference": {"value": -lost, "low": low, "high": high, "p_value": 0.5},
        "cells": [
            {
                "length": length,
                "depth": None,
                "prompts": 20,
                "original": original,
                "quantized": original - share * lost,
                "lost": round(20 * share * lost),
                "gained": 0,
            }
            for length, share in ((1024, 0), (4096, 2))
        ],
    }


def _layer(layer: int, error: float) -> dict[str, Any]:
    if not layer:
        dense = dict.fromkeys(("agreement", "expert_gain"))
        return {"layer": 0, "hidden_error": error, "gain": 0.99, "cut": None, **dense}
    gains = [0.97, 0.99, None, 0.98 + 0.005 * layer, 0.96]
    return {
        "layer": layer,
        "hidden_error": error,
        "gain": 0.98,
        "agreement": 0.99 - layer / 100,
        "expert_gain": gains,
        "cut": {"keys": 0.0, "values": layer / 1024},
    }


_GOOD: dict[str, Any] = {
    "schema": SCHEMA,
    "llama4q": "0.1.0",
    "quantized": {"name": "out", "bytes": 9_000_000},
    "rescues": [{"tensor": "a", "kind": "damping", "detail": "0.01 to 0.1"}],
    "evidence": {
        "likelihood": {
            "tokens": 32736,
            "windows": 16,
            "digest": "aaaaaaaaaaaaaaaa",
            "original": {"perplexity": 10.0, "standard_error": 0.2},
            "quantized": {"perplexity": 10.1, "standard_error": 0.2, "bits_per_byte": 1.6},
            "kl_mean": 0.01,
            "kl_median": 0.002,
            "kl_p99": 0.1,
            "kl_p999": 0.3,
            "kl_max": 1.5,
            "top1_agreement": 0.95,
            "top5_agreement": 0.96,
            "perplexity_increase": 0.01,
            "intervals": {
                "kl_mean": [0.009, 0.011],
                "top1_agreement": [0.945, 0.955],
                "top5_agreement": [0.955, 0.965],
                "perplexity_increase": [0.005, 0.015],
            },
        },
        "layers": [_layer(layer, error) for layer, error in enumerate(ERRORS)],
        "other_settings": [],
        "retrieval": {
            "prompts": 80,
            "seed": 0,
            "digest": "bbbbbbbbbbbbbbbb",
            "original": 0.975,
            "quantized": 0.9625,
            "difference": {"value": -0.0125, "low": -0.04, "high": 0.02, "p_value": 1.0},
            "tasks": [
                task("niah_single_1", 1.0, 1.0, 0.0, 0.0),
                task("cwe", 0.95, 0.925, -0.075, 0.025),
            ],
        },
    },
}
