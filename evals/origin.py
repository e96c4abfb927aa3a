"""A model card's sections on how a checkpoint came about: what was changed, what each expert saw,
and all that it takes to make it again. Knows nothing of licences, engines or figures of quality."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .figures import Report
from .markdown import code, facts, plain, table
from .wording import (
    UNKNOWN,
    cards,
    count,
    drawn,
    measured,
    part,
    percent,
    requests,
    size,
)

SCHEMES = {
    "int3": "INT3, groups of 128",
    "int4": "INT4, groups of 128",
    "int4-g64": "INT4, groups of 64",
    "int4-g32": "INT4, groups of 32",
    "int8": "INT8, groups of 128",
    "fp8": "FP8, a scale for each output; activations FP8, a scale for each token",
    "bnb-nf4": "bitsandbytes NF4, double quantization",
    "bnb-int8": "bitsandbytes LLM.int8",
    "bf16": "BF16, as in the original",
}
PARTS = {  # what a recipe names -> the report's component
    "experts": "routed_experts",
    "shared_expert": "shared_experts",
    "dense": "dense_feed_forward",
}


def short_scheme(report: Report) -> str:
    """INT4, FP8 ...: what most of the weights are stored as."""
    chosen = part(report, "recipe", "schemes")
    held = part(report, "source", "components")
    there = [name for key, name in chosen.items() if held.get(PARTS.get(key, ""))]
    name = str((there or list(chosen.values()) or ["bf16"])[0])
    return {"bnb-nf4": "NF4", "bnb-int8": "INT8"}.get(name, name.partition("-")[0].upper())


def changed(report: Report) -> str:
    """What is stored how, with the bytes before and after."""
    before, after = (part(report, side, "components") for side in ("source", "quantized"))
    stored = {component: _stored(report, name) for name, component in PARTS.items()}
    rows = [
        (
            component.replace("_", " "),
            stored.get(component, SCHEMES["bf16"] if component != "attention" else _o_proj(report)),
            size(before[component]),
            size(after.get(component, 0)),
        )
        for component in before
    ]
    told = table(("part", "stored as", "original", "here"), rows, words=2)
    return "\n\n".join(filter(None, [told, _chosen(report), _cache(report)]))


def _chosen(report: Report) -> str:
    """How the schemes came about, where a goal did it."""
    budget = part(report, "budget")
    if not budget:
        return ""
    return (
        f"Precision was chosen part by part so that the model fits {cards(budget)} with "
        f"{requests(budget)} and loses least: {size(budget['weight_bytes'])} of weights on a card, "
        f"where there is room for {size(budget['room_bytes'])}."
    )


def _cache(report: Report) -> str:
    if part(report, "recipe").get("kv_cache") != "fp8":
        return ""
    return (
        "Keys and values are to be cached in FP8: each layer has a calibrated scale for both, with "
        "which vLLM turns that on by itself."
    )


def _stored(report: Report, name: str) -> str:
    """The scheme of one part, and where layers differ."""
    recipe = part(report, "recipe")
    told = [SCHEMES.get(found := part(recipe, "schemes").get(name, "bf16"), found)]
    for override in recipe.get("overrides") or []:
        if name in override:
            layers = ", ".join(map(str, override["layers"]))
            told.append(f"in layers {layers} {SCHEMES.get(override[name], override[name])}")
    return "; ".join(told)


def _o_proj(report: Report) -> str:
    stored = _stored(report, "o_proj")
    return stored if stored == SCHEMES["bf16"] else f"BF16, but for o_proj: {stored}"


def method(report: Report) -> str:
    """How codes were found, in a few sentences."""
    if not (recipe := part(report, "recipe")):
        return ""
    solver, calibration = part(recipe, "solver"), part(report, "calibration")
    used = {*part(recipe, "schemes").values()}
    if used & {"bnb-nf4", "bnb-int8"}:
        return "All codes are bitsandbytes' own rounding, from the original's weights."
    if solver.get("method") == "rtn":
        return "Weights were rounded to the nearest code; no calibration text had a part in it."
    corrected = ", and make up for what earlier layers had lost" if solver.get("correction") else ""
    return (
        f"Codes were found by GPTQ, expert by expert, from the tokens that the router sends to "
        f"each one{corrected}; where plain rounding did better on tokens held out, it was kept. "
        f"Calibration: {plain(drawn(calibration))}."
    )


def experts(report: Report) -> str:
    """Calibration tokens of each layer's experts, and whether they still get the same tokens."""
    counted = [layer for layer in report.get("layers") or [] if layer.get("expert_tokens")]
    agreement = {
        layer.get("layer"): layer["agreement"]
        for layer in part(report, "evidence").get("layers") or []
        if layer.get("agreement") is not None
    }
    if not counted:
        return ""
    rows = [
        (
            str(layer["layer"]),
            *_spread(layer["expert_tokens"]),
            percent(agreement[layer["layer"]], 2) if layer["layer"] in agreement else "",
        )
        for layer in counted
    ]
    header = ("layer", "fewest tokens", "median", "most", "same expert as the original")
    return "\n\n".join(
        [
            _covered(report, [held for layer in counted for held in layer["expert_tokens"]]),
            _folded(f"Layer by layer ({len(counted)})", table(header, rows)),
        ]
    )


def _spread(tokens: Sequence[int]) -> Iterator[str]:
    for value in (min(tokens), statistics.median(tokens), max(tokens)):
        yield count(round(value))


def _covered(report: Report, tokens: Sequence[int]) -> str:
    coverage = part(report, "calibration", "coverage")
    poor = sum(len(entry["experts"]) for entry in coverage.get("poor") or [])
    fewest, middle, most = _spread(tokens)
    told = [
        f"Each of the {count(len(tokens))} routed experts was calibrated on the tokens that the "
        f"router sends it: {fewest} at least, {middle} in the middle, {most} at most."
    ]
    if coverage.get("needed"):
        many = "None" if not poor else f"{count(poor)} of them"
        told.append(
            f"{many} saw fewer than the {count(coverage['needed'])} that determine its codes"
            + (", and leaned on their layer's statistics." if poor else ".")
        )
    if agreements := [
        layer["agreement"]
        for layer in part(report, "evidence").get("layers") or []
        if layer.get("agreement") is not None
    ]:
        told.append(
            f"On held-out text {percent(statistics.mean(agreements), 2)} of the tokens go to the "
            f"same expert as in the original, {percent(min(agreements), 2)} in the worst layer."
        )
    told.append(_rescued(report.get("rescues")))
    return " ".join(filter(None, told))


def _rescued(rescues: Sequence[Mapping[str, Any]] | None) -> str:
    if rescues is None:
        return ""
    kinds = Counter(str(rescue.get("kind")) for rescue in rescues)
    told = ", ".join(f"{count(held)} × {plain(kind)}" for kind, held in kinds.most_common())
    return f"Rescues: {told} (report.json names each)." if told else "No weight needed a rescue."


def provenance(report: Report) -> str:
    """Everything that the bytes depend on, and what vouches for them."""
    rows = facts("What went in", _facts(report))
    recipe = part(report, "recipe")
    settings = f"```json\n{json.dumps(recipe, indent=2)}\n```".replace("<", "\\u003c")
    return "\n\n".join([rows, _folded("The whole recipe", settings)] if recipe else [rows])


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    source, calibration = part(report, "source"), part(report, "calibration")
    likelihood = part(report, "evidence", "likelihood")
    retrieval = part(report, "evidence", "retrieval")
    verified, versions = part(report, "verified"), part(report, "versions")
    yield "original", plain(str(source.get("name", "")))
    yield "its commit", code(str(source["revision"])) if source.get("revision") else ""
    yield "recipe", plain(str(part(report, "recipe").get("name", "")))
    yield "calibration", plain(drawn(calibration)) + _digest(calibration) if calibration else ""
    yield "evaluation", plain(measured(likelihood)) + _digest(likelihood) if likelihood else ""
    yield "retrieval", _asked(retrieval) + _digest(retrieval) if retrieval else ""
    yield "arithmetic", plain("; ".join(str(report[key]) for key in _ARITHMETIC if key in report))
    yield "llama4q", plain(str(report.get("llama4q", "")))
    yield "versions", plain(", ".join(f"{name} {held}" for name, held in versions.items()))
    yield "made", plain(str(report.get("created", "")))
    yield "verified", _verified(verified) if verified else ""


_ARITHMETIC = ("dtype", "kernel", "products")


def _asked(retrieval: Mapping[str, Any]) -> str:
    return f"{count(retrieval.get('prompts'))} prompts, seed {retrieval.get('seed', UNKNOWN)}"


def _digest(held: Mapping[str, Any]) -> str:
    """The SHA-256 of the tokens."""
    return f"; SHA-256 of the tokens {code(str(held['digest']))}" if held.get("digest") else ""


def _verified(verified: Mapping[str, Any]) -> str:
    return (
        f"{count(verified.get('tensors'))} tensors, {count(verified.get('scales'))} scales finite "
        f"and not 0, {count(verified.get('untouched'))} tensors with the original's very bits"
    )


def _folded(title: str, inside: str) -> str:
    """Behind a line that opens it. Markdown inside needs the empty lines."""
    return f"<details>\n<summary>{title}</summary>\n\n{inside}\n\n</details>"
