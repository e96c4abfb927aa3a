"""Outputs of the shipped recipes, loaded by transformers itself: names, shapes, and logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from llama4q.config import read_config
from llama4q.export import config_with, quantization_config
from llama4q.recipe import Recipe, load_recipe, parse_recipe, shipped_recipes
from llama4q.schemes import fake_float8_tokens

from . import runs, tiny

MODELS = {
    "scout": tiny.SCOUT,
    "maverick": tiny.MAVERICK,
    "text-only": tiny.VARIANTS["scout-text-only"],
    "guard": tiny.GUARD,
}
# The others are bitsandbytes': tests/test_bnb.py.
RECIPES = [name for name in shipped_recipes() if not name.startswith("bnb-")]


def loaded(folder: Path, kind: Any) -> Any:
    """The model as transformers loads it; not a key missing, unexpected or of another shape.

    The causal class has no vision tower: it reports the tower's tensors as unexpected for the
    original, too. The other one makes up scales for the vision tower's keys and values, which the
    engines have none of, and does without.
    """
    model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    vision = ("vision_model.", "multi_modal_projector.")
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = info[problem]
        if kind is AutoModelForCausalLM:
            keys = [key for key in keys if not key.startswith(vision)]
        made_up = ("self_attn.k_scale", "self_attn.v_scale")
        keys = [key for key in keys if not ("vision_model." in key and key.endswith(made_up))]
        assert not keys, (problem, keys)
    return model.eval()


def without_activation_quantization(model: Any) -> Any:
    """Weights alone. compressed-tensors 0.20 takes one scale for a whole 2-D input, as experts and
    shared experts get it, where `strategy: token` and the engines take one for each token."""
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and not hasattr(module, "kv_cache"):  # which would go as well
            scheme.input_activations = None
    return model


EVERYTHING = """
[schemes]
experts = "int8"
shared_expert = "bf16"
dense = "int4-g64"
o_proj = "int4"
[[override]]
layers = [1]
experts = "bf16"
shared_expert = "fp8"
o_proj = "bf16"
"""


FLOAT8_CACHE = """
kv_cache = "fp8"
[schemes]
experts = "int4"
dense = "int4"
"""
WRITTEN = {"everything": EVERYTHING, "float8-cache": FLOAT8_CACHE}


def recipe_named(name: str) -> Recipe:
    """A shipped recipe, or one with what those lack: INT8, g64, BF16 experts, INT o_proj, a cache
    of FP8."""
    return parse_recipe(WRITTEN[name], "r.toml") if name in WRITTEN else load_recipe(name)


@pytest.mark.parametrize("recipe", [*RECIPES, *WRITTEN])
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_logits_against_transformers(
    name: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny.write(tmp_path / "source", MODELS[name])
    folder = tmp_path / "quantized"
    runs.run(source, folder, recipe_named(recipe))
    inputs = runs.tokens(source, 2, 70, seed=3)
    monkeypatch.setattr("llama4q.weights.fake_float8_tokens", None)
    ours = runs.our_logits(folder, inputs)
    kinds = [AutoModelForCausalLM]
    if not MODELS[name].text_only:
        kinds.append(AutoModelForImageTextToText)
    for kind in kinds:
        model = without_activation_quantization(loaded(folder, kind))
        torch.testing.assert_close(model(input_ids=inputs).logits, ours, atol=1e-3, rtol=0)
    assert (ours - runs.our_logits(source, inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["scout", "maverick"])
@torch.inference_mode()
def test_bfloat16_against_transformers(name: str, tmp_path: Path) -> None:
    """Both in BF16: apart by no more than BF16's noise, a median KL of 6e-4 between engines."""
    source = tiny.write(tmp_path / "source", MODELS[name])
    runs.run(source, tmp_path / "out", "int4")
    inputs = runs.tokens(source, 4, 90, seed=3)
    theirs = tiny.transformers_model(tmp_path / "out", torch.bfloat16)(input_ids=inputs).logits
    ours = runs.our_logits(tmp_path / "out", inputs, torch.bfloat16)
    log_ours, log_theirs = (functional.log_softmax(x.float(), dim=-1) for x in (ours, theirs))
    divergence = (log_theirs.exp() * (log_theirs - log_ours)).sum(-1)
    assert divergence.median() < 6e-4


@pytest.mark.parametrize("recipe", [*RECIPES, *WRITTEN])
@pytest.mark.parametrize("name", MODELS)
def test_config_json_against_compressed_tensors(name: str, recipe: str, tmp_path: Path) -> None:
    """Its own classes accept the quantization_config; the rest is the source's text."""
    source = tiny.write(tmp_path, MODELS[name])
    ours = quantization_config(recipe_named(recipe), read_config(source))
    QuantizationConfig.model_validate(ours)
    written = config_with(source, ours).decode()
    before = (source / "config.json").read_text().rstrip().removesuffix("}").rstrip()
    assert written.startswith(before)
    assert json.loads(written) == {**json.loads(before + "}"), "quantization_config": ours}


def test_token_activations_against_compressed_tensors(tmp_path: Path) -> None:
    """On 3-D inputs, where compressed-tensors does take one scale a token."""
    config = read_config(tiny.write(tmp_path, tiny.SCOUT))
    groups = QuantizationConfig.model_validate(
        quantization_config(load_recipe("fp8"), config)
    ).config_groups
    args = groups["group_0"].input_activations
    inputs = torch.randn(3, 50, 64, generator=torch.Generator().manual_seed(0)) * 5
    scales, zeros = compute_dynamic_scales_and_zp(inputs, args, torch.nn.Identity())
    theirs = fake_quantize(inputs, scales, zeros, args)
    torch.testing.assert_close(fake_float8_tokens(inputs), theirs, atol=1e-6, rtol=1e-6)
