"""What a serving engine reads beside the tensors: config.json's quantization_config, side files.

Regular expressions, never enumerated names: engines disagree about prefixes and about the vision
tower's names. See docs/format.md for the rules. Knows nothing of tensors' contents.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import bnb, licence
from .config import ModelConfig, read_config_json
from .errors import UserError
from .kv_cache import KVDtype
from .manifest import MANIFEST
from .recipe import Recipe, planned
from .schemes import Kind, Scheme
from .weights import Component
from .writer import to_json

# The version of compressed-tensors whose format this is: the oldest one that the engines pin.
FORMAT_VERSION = "0.17.0"

SIDE_FILES = (
    "*.json", "*.jinja", "*.model", "*.txt", "*.md", "LICENSE*", "USE_POLICY*", "NOTICE*",
    "tiktoken*", "merges*",
)  # fmt: skip
# what a run says of itself, beside the checkpoint
REPORTS = ("report.json", "report.html", "evaluation.md")
NOT_COPIED = ("config.json", "*.index.json", "README.md", MANIFEST, *REPORTS)

_PLACES = {
    Component.EXPERTS: r"feed_forward\.experts\.\d+\.(gate|up|down)_proj$",
    Component.SHARED_EXPERT: r"feed_forward\.shared_expert\.(gate|up|down)_proj$",
    Component.DENSE: r"feed_forward\.(gate|up|down)_proj$",
    Component.O_PROJ: r"self_attn\.o_proj$",
}
_ALWAYS_IGNORED = (
    "re:.*lm_head",
    "re:.*router",
    "re:.*vision_model.*",
    "re:.*multi_modal_projector.*",
    r"re:.*self_attn\.(q|k|v)_proj$",
)

LayersByScheme = dict[Component, dict[Scheme, list[int]]]


def quantization_config(recipe: Recipe, config: ModelConfig) -> dict[str, Any]:
    """The quantization_config of a model quantized by `recipe`.

    The top-level format is `pack-quantized` as soon as one group is INT: SGLang's expert path
    looks there, vLLM and transformers at the group's own format.
    """
    layers = _layers_by_scheme(recipe, config)
    used = {scheme for by_scheme in layers.values() for scheme in by_scheme if scheme.quantizes}
    if any(scheme.bitsandbytes for scheme in used):
        [scheme] = used  # check_recipe refuses others beside it
        return bnb.quantization_config(scheme, _left_in_bf16(layers))
    targets: dict[Scheme, list[str]] = {}
    ignore = list(_ALWAYS_IGNORED)
    for component, by_scheme in layers.items():
        for scheme, indices in by_scheme.items():
            pattern = _pattern(component, indices if len(by_scheme) > 1 else None)
            (targets.setdefault(scheme, []) if scheme.quantizes else ignore).append(pattern)
    groups = [_group(scheme, patterns) for scheme, patterns in targets.items()]
    packed = any(scheme.kind is Kind.INT for scheme in targets)
    return {
        "quant_method": "compressed-tensors",
        "version": FORMAT_VERSION,
        "quantization_status": "compressed",
        "format": "pack-quantized" if packed else "float-quantized",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": ignore,
        "kv_cache_scheme": _KV_CACHE if recipe.kv_cache is KVDtype.FP8 else None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


_KV_CACHE = {
    "num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True,
}  # fmt: skip


def _left_in_bf16(layers: LayersByScheme) -> list[str]:
    """Patterns of linears that a recipe leaves alone, as bitsandbytes' configuration has them."""
    return [
        _pattern(component, indices if len(by_scheme) > 1 else None).removeprefix("re:")
        for component, by_scheme in layers.items()
        for scheme, indices in by_scheme.items()
        if not scheme.quantizes
    ]


def _layers_by_scheme(recipe: Recipe, config: ModelConfig) -> LayersByScheme:
    found: LayersByScheme = {}
    for index in range(config.num_layers):
        schemes = {linear.component: scheme for linear, scheme in planned(recipe, config, index)}
        for component, scheme in schemes.items():
            found.setdefault(component, {}).setdefault(scheme, []).append(index)
    return found


def _pattern(component: Component, indices: list[int] | None) -> str:
    where = r"\d+" if indices is None else f"({'|'.join(map(str, indices))})"
    return rf"re:.*model\.layers\.{where}\.{_PLACES[component]}"


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    integer = scheme.kind is Kind.INT
    weights: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "int" if integer else "float",
        "symmetric": True,
        "strategy": "group" if integer else "channel",
        "group_size": scheme.group,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    activations = {
        **weights, "strategy": "token", "dynamic": True, "observer": None,
    }  # fmt: skip
    return {
        "format": "pack-quantized" if integer else "float-quantized",
        "targets": targets,
        "weights": weights,
        "input_activations": None if integer else activations,
        "output_activations": None,
    }


def config_with(source: Path, quantization: dict[str, Any]) -> bytes:
    """The source's config.json, byte for byte, with `quantization_config` as its last key.

    Re-serialising would respell rope_scaling and dtype, which older engines do not read.
    """
    text = (source / "config.json").read_text(encoding="utf-8")
    body = text.rstrip()
    if not body.endswith("}"):
        raise UserError(f"{source / 'config.json'}: does not end with a closing brace")
    added = to_json({"quantization_config": quantization}).decode().strip()
    result = body[:-1].rstrip() + "," + added[1:] + "\n"
    expected = {**read_config_json(source), "quantization_config": quantization}
    if json.loads(result) != expected:
        raise AssertionError("config.json with quantization_config does not read back")
    return result.encode()


def quantized_already(folder: Path) -> str | None:
    """The method that the checkpoint in `folder` is quantized with, None when it is not."""
    raw = read_config_json(folder)
    found = raw.get("quantization_config") or raw.get("text_config", {}).get("quantization_config")
    return str(found.get("quant_method", "an unnamed method")) if found else None


def refuse_quantized(folder: Path) -> None:
    """Raises UserError for a checkpoint that is no original."""
    method = quantized_already(folder)
    if method is not None:
        raise UserError(f"{folder}: is quantized already ({method}); name the BF16 original")


def refuse_other_tools(folder: Path) -> None:
    """Raises UserError for a checkpoint in a format that llama4q does not read: neither plain nor
    compressed-tensors nor bitsandbytes."""
    if any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: is GGUF, for llama.cpp; {NAME_ANOTHER}")
    method = quantized_already(folder)
    if method is None and (folder / "hf_quant_config.json").exists():
        method = "modelopt"
    if method == "modelopt":
        raise UserError(f"{folder}: is quantized by NVIDIA ModelOpt; {NAME_ANOTHER}")
    if method not in (None, *_METHODS):
        raise UserError(f"{folder}: is quantized with {method}; {NAME_ANOTHER}")


_METHODS = ("compressed-tensors", "bitsandbytes")
NAME_ANOTHER = (
    "name a plain checkpoint, or compressed-tensors as llama4q and llm-compressor write it"
)


def has_float8_cache(folder: Path) -> bool:
    """Whether vLLM keeps keys and values in FP8 without being asked."""
    found = read_config_json(folder).get("quantization_config") or {}
    return bool(found.get("kv_cache_scheme"))


def side_files(source: Path) -> dict[str, bytes]:
    """Tokenizer, processor, chat template, generation config, licence: copied as they are.

    A NOTICE is added, or a line to it, where the licence asks for one that the source lacks.
    """
    paths = sorted({path for pattern in SIDE_FILES for path in source.glob(pattern)})
    copied = {path.name: path.read_bytes() for path in paths if _is_side_file(path)}
    added = licence.notice(source)
    return copied if added is None else {**copied, licence.NOTICE: added}


def _is_side_file(path: Path) -> bool:
    return path.is_file() and not _matches(path, NOT_COPIED)


def _matches(path: Path, patterns: Iterable[str]) -> bool:
    return any(path.match(pattern) for pattern in patterns)
