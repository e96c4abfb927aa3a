"""Checkpoints in the layouts of others, as compressed-tensors itself makes them.

The authority is transformers, which loads most of them with compressed-tensors: the same logits,
inputs rounded where a layout says so. What it cannot load is decoded by hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file

from evals.evaluation import compare
from llama4q.checkpoint import SINGLE, Checkpoint
from llama4q.config import ModelConfig, read_config
from llama4q.errors import UserError
from llama4q.foreign import fake_int8_tokens
from llama4q.model import decoder_layer, logits
from llama4q.weights import LayerReader, linears

from . import runs, tiny

WIDE = tiny.Variant(layers=2, rope_scaling=tiny.SCOUT_ROPE, width=256, expert_size=256)
FORMATS = {
    "W4A16_ASYM": "pack-quantized",
    "W8A16": "pack-quantized",
    "W8A8": "int-quantized",
    "FP8": "float-quantized",
    "FP8_BLOCK": "float-quantized",
    "NVFP4A16": "nvfp4-pack-quantized",
    "MXFP4A16": "mxfp4-pack-quantized",
}
INPUT_SCALE = 0.01


def scales(weight: torch.Tensor, scheme: QuantizationScheme) -> dict[str, torch.Tensor]:
    """What a tool without data takes: minima and maxima of what shares a scale."""
    args = scheme.weights
    outputs, inputs = weight.shape
    shapes = {
        "tensor": ((1, outputs, 1, inputs), (1,)),
        "channel": ((outputs, 1, 1, inputs), (outputs, 1)),
        "block": ((outputs // 128, 128, inputs // 128, 128), (outputs // 128, inputs // 128)),
    }
    group = args.group_size or inputs
    whole, stored = shapes.get(
        args.strategy, ((outputs, 1, inputs // group, group), (outputs, inputs // group))
    )
    parts = weight.float().view(whole)
    low, high = parts.amin((1, 3)).view(stored), parts.amax((1, 3)).view(stored)
    found = {}
    if args.strategy == "tensor_group":
        found["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
    scale, zero = calculate_qparams(low, high, args, found.get("weight_global_scale"))
    found["weight_scale"] = scale.bfloat16() if args.type == "int" else scale.float()
    return found if args.symmetric else {**found, "weight_zero_point": zero}


def written(folder: Path, source: Path, preset: str) -> Path:
    """`source` with all that can be quantized by a preset of compressed-tensors."""
    config, ours = read_config(source), Checkpoint(source)
    scheme = QuantizationScheme(
        **preset_name_to_scheme(preset, ["Linear"]).model_dump(exclude={"format"}),
        format=FORMATS[preset],
    )
    compressor = BaseCompressor.get_value_from_registry(FORMATS[preset])
    reader = LayerReader(ours, config, torch.float32)
    tensors = {name: ours.get(name) for name in ours.names() if ".experts." not in name}
    for name, weight in dense(reader, config).items():
        tensors.pop(f"{name}.weight", None)
        state = {"weight": weight, **scales(weight, scheme)}
        if scheme.input_activations is not None and not scheme.input_activations.dynamic:
            state["input_scale"] = torch.tensor([INPUT_SCALE])
        packed = compressor.compress(state, scheme)
        tensors |= {f"{name}.{key}": value.clone() for key, value in packed.items()}
    folder.mkdir()
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    raw = json.loads((source / "config.json").read_bytes())
    raw["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": FORMATS[preset],
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
        "ignore": [
            "re:.*lm_head", "re:.*router", "re:.*vision_model.*", "re:.*multi_modal_projector.*",
            "re:.*self_attn\\.(q|k|v)_proj$",
        ],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def dense(reader: LayerReader, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Every quantizable weight by its name, `[O, I]`."""
    found: dict[str, torch.Tensor] = {}
    for index in range(config.num_layers):
        layer = reader.layer(index)
        weights = [layer.o.weight.T]
        moe: Any = layer.feed_forward
        for mlp in (moe.shared, *moe.experts):
            weights += [*mlp.gate_up.weight.T.chunk(2), mlp.down.weight.T]
        names = [linear.name for linear in linears(config, index)]
        found |= {name: weight.contiguous() for name, weight in zip(names, weights, strict=True)}
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("foreign") / "source", WIDE)


@torch.inference_mode()
@pytest.mark.parametrize("preset", ["W8A16", "FP8", "FP8_BLOCK"])
def test_logits_against_transformers(preset: str, source: Path, tmp_path: Path) -> None:
    folder = written(tmp_path / preset, source, preset)
    config = read_config(folder)
    reader = LayerReader(Checkpoint(folder), config, torch.float32)
    tokens = runs.tokens(folder, 2, 50)
    hidden = reader.embedding()[tokens]
    for index in range(config.num_layers):
        hidden, _ = decoder_layer(config, reader.layer(index), hidden)
    found = logits(config, reader.head(), hidden)
    expected = tiny.transformers_model(folder)(input_ids=tokens).logits
    assert (found - expected).abs().max() < 1e-2 * expected.abs().max()
    plain = tiny.transformers_model(source)(input_ids=tokens).logits
    assert (found - expected).square().mean() < 1e-3 * (plain - expected).square().mean()


@pytest.mark.parametrize("preset", ["W4A16_ASYM", "NVFP4A16", "MXFP4A16"])
def test_weights_decoded_by_hand(preset: str, source: Path, tmp_path: Path) -> None:
    folder = written(tmp_path / preset, source, preset)
    stored, config = Checkpoint(folder), read_config(folder)
    name = f"{config.layer_prefix(1)}feed_forward.experts.2.down_proj"
    found = LayerReader(stored, config, torch.float32).linear(name, 256, 256)
    packed, scale = (stored.get(f"{name}.weight_{part}") for part in ("packed", "scale"))
    if preset == "W4A16_ASYM":
        codes, zeros = (
            torch.stack([(words >> 4 * step) & 15 for step in range(8)], dim=-1) - 8
            for words in (packed, stored.get(f"{name}.weight_zero_point").T)
        )
        zeros = zeros.flatten(1).T.repeat_interleave(128, dim=1)
        expected = (codes.flatten(1) - zeros) * scale.float().repeat_interleave(128, dim=1)
    else:
        steps = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
        values = steps[(nibbles & 7).long()] * torch.where(nibbles >= 8, -1.0, 1.0)
        if preset == "NVFP4A16":
            steps_of = scale.float() / stored.get(f"{name}.weight_global_scale")
        else:
            steps_of = torch.exp2(scale.float() - 127)
        expected = values * steps_of.repeat_interleave(256 // scale.shape[1], dim=1)
    torch.testing.assert_close(found.weight.T, expected, rtol=2**-8, atol=1e-6)
    assert found.quantize_input is None


def test_int8_inputs_have_a_scale_a_token(source: Path, tmp_path: Path) -> None:
    """transformers takes one for all tokens of an expert, so vLLM's formula is the authority."""
    folder = written(tmp_path / "W8A8", source, "W8A8")
    reader = LayerReader(Checkpoint(folder), read_config(folder), torch.float32)
    down: Any = reader.layer(0).feed_forward.experts[1].down  # type: ignore[union-attr]
    assert down.quantize_input is fake_int8_tokens
    rows = torch.randn(5, 256)
    expected = [(row * 127 / row.abs().max()).round() * row.abs().max() / 127 for row in rows]
    torch.testing.assert_close(fake_int8_tokens(rows), torch.stack(expected))
    stored = Checkpoint(folder)
    name = f"{reader.config.layer_prefix(0)}feed_forward.experts.1.down_proj"
    codes, scale = stored.get(f"{name}.weight"), stored.get(f"{name}.weight_scale")
    torch.testing.assert_close(down.weight.T, codes.float() * scale.float())


def test_others_checkpoints_are_compared(source: Path, tmp_path: Path) -> None:
    config = read_config(source)
    kl = {}
    for preset in ("FP8_BLOCK", "W4A16_ASYM"):
        readers = [
            LayerReader(Checkpoint(folder), config, torch.float32)
            for folder in (source, written(tmp_path / preset, source, preset))
        ]
        found = compare(readers[0], readers[1], runs.questions(source), lambda: None)
        kl[preset] = found["likelihood"]["kl_mean"]
    assert 0 < kl["FP8_BLOCK"] < kl["W4A16_ASYM"]


def test_what_is_not_stored_as_it_says_is_refused(source: Path, tmp_path: Path) -> None:
    folder = written(tmp_path / "odd", source, "FP8")
    raw = json.loads((folder / "config.json").read_bytes())
    raw["quantization_config"]["config_groups"]["group_0"]["format"] = "pack-quantized"
    (folder / "config.json").write_text(json.dumps(raw))
    reader = LayerReader(Checkpoint(folder), read_config(folder), torch.float32)
    with pytest.raises(UserError, match=r"is not stored as config.json says, pack-quantized"):
        reader.layer(0)
    raw["quantization_config"]["config_groups"]["group_0"]["weights"]["type"] = "ternary"
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="does not know this quantization_config"):
        LayerReader(Checkpoint(folder), read_config(folder), torch.float32)
