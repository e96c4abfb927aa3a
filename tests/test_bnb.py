"""bitsandbytes' schemes against bitsandbytes and transformers themselves."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from calibrate.beforehand import predicted_bytes
from cli import main
from llama4q import bnb
from llama4q.checkpoint import Checkpoint, PartReader
from llama4q.config import parse_config, read_config
from llama4q.errors import UserError
from llama4q.export import quantization_config, quantized_already
from llama4q.hub import POCKET_MODEL
from llama4q.inspect import inspect_checkpoint
from llama4q.packing import pack, unpack
from llama4q.recipe import Recipe, load_recipe, parse_recipe, planned
from llama4q.schemes import BNB_INT8, BNB_NF4, Scheme
from llama4q.source import folder_source

from . import runs, test_inspect, tiny
from .test_export import MODELS, loaded
from .test_resume import SMALL, StopAt, Stopped

Tensors = dict[str, torch.Tensor]
SCHEMES = [BNB_NF4, BNB_INT8]
RECIPES = ["bnb-nf4", "bnb-int8"]
PARTS = """
[schemes]
experts = "bnb-nf4"
shared_expert = "bf16"
dense = "bnb-nf4"
o_proj = "bnb-nf4"
[[override]]
layers = [1]
experts = "bf16"
shared_expert = "bnb-nf4"
dense = "bf16"
o_proj = "bf16"
"""


def recipe_named(name: str) -> Recipe:
    """A shipped recipe, or one that leaves other linears in BF16 in each layer."""
    return parse_recipe(PARTS, "parts.toml") if name == "parts" else load_recipe(name)


def random_weight(inputs: int = 256, outputs: int = 96) -> torch.Tensor:
    """In-major, with an output of zeros and a large weight."""
    weight = torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[:, 3], weight[5, 7] = 0, 3
    return weight.to(torch.bfloat16)


def their_linear(weight: torch.Tensor, scheme: Scheme) -> Any:
    """bitsandbytes' own module of an in-major weight, which quantizes when it is moved."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    inputs, outputs = weight.shape
    if scheme is BNB_NF4:
        linear = Linear4bit(inputs, outputs, bias=False, quant_type="nf4")
        linear.weight = Params4bit(weight.T, quant_type="nf4", compress_statistics=True)
    else:
        linear = Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False, threshold=6.0)
        linear.weight = Int8Params(weight.T, requires_grad=False)
    return linear.to("cpu").eval()


def written(folder: Path, tensors: Tensors) -> PartReader:
    save_file(tensors, str(folder / "part.safetensors"))
    return PartReader(folder, ["part.safetensors"])


# --- one linear ---


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_tensors_are_those_that_bitsandbytes_saves(scheme: Scheme) -> None:
    ours = dict(pack("linear", bnb.quantize(random_weight(), scheme)))
    theirs = their_linear(random_weight(), scheme).state_dict(prefix="linear.")
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        other = torch.as_tensor(theirs[name])
        if name.endswith("bitsandbytes__nf4"):  # the same JSON, with spaces behind it
            assert bytes(tensor.tolist()).rstrip() == bytes(other.tolist())
        else:
            assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape)
            assert torch.equal(tensor, other), name


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_dequantized_equals_bitsandbytes_bit_for_bit(scheme: Scheme, tmp_path: Path) -> None:
    found = unpack(
        written(tmp_path, dict(pack("linear", bnb.quantize(random_weight(), scheme)))), "linear"
    )
    theirs = their_linear(random_weight(), scheme)
    expected = dequantize_bnb_weight(theirs.weight, getattr(theirs, "state", None))
    assert (found.scheme, found.shape) == (scheme, (256, 96))
    assert torch.equal(found.dequantize(), expected.float().T)
    lost = (found.dequantize() - random_weight().float()).square().mean()
    assert 0 < lost < 0.01 * random_weight().float().square().mean()


def test_nf4_bit_by_bit() -> None:
    """As docs/format.md says: two codes a byte, the first one high; absmax from a byte."""
    stored = dict(pack("linear", bnb.quantize(random_weight(), BNB_NF4)))
    state = json.loads(bytes(stored["linear.weight.quant_state.bitsandbytes__nf4"].tolist()))
    codes = stored["linear.weight"].flatten().long()
    values = stored["linear.weight.quant_map"][torch.stack((codes >> 4, codes & 15), 1).flatten()]
    nested = stored["linear.weight.nested_absmax"].repeat_interleave(256)
    absmax = stored["linear.weight.nested_quant_map"][stored["linear.weight.absmax"].long()]
    absmax = absmax * nested[: len(absmax)] + state["nested_offset"]
    expected = (values * absmax.repeat_interleave(64)).view(96, 256).T
    ours = bnb.quantize(random_weight(), BNB_NF4).dequantize()
    torch.testing.assert_close(ours, expected, rtol=2**-8, atol=1e-7)  # BF16's rounding


def test_int8_bit_by_bit() -> None:
    weight = random_weight()
    stored = dict(pack("linear", bnb.quantize(weight, BNB_INT8)))
    largest = weight.float().abs().amax(dim=0)
    assert torch.equal(stored["linear.SCB"], largest)
    assert stored["linear.SCB"][3] == 0
    codes = stored["linear.weight"].T.float()
    expected = torch.round(weight.float() * 127 / largest).nan_to_num(0)
    assert (codes - expected).abs().max() <= 1  # FP16's rounding at a tie
    assert (codes == expected).float().mean() > 0.999


def test_gate_and_up_have_statistics_of_their_own() -> None:
    weight = random_weight(128, 64)
    pair = bnb.quantize(weight, BNB_NF4, pieces=2)
    assert pair.shape == (128, 64)
    for half, alone in zip(pair.halves(), weight.chunk(2, dim=1), strict=True):
        single = bnb.quantize(alone, BNB_NF4)
        assert dict(pack("x", half)).keys() == dict(pack("x", single)).keys()
        for name, tensor in pack("x", half):
            assert torch.equal(tensor, dict(pack("x", single))[name])
    both = torch.cat([half.dequantize() for half in pair.halves()], dim=1)
    assert torch.equal(pair.dequantize(), both)


@torch.inference_mode()
def test_int8_activations_against_bitsandbytes() -> None:
    """One token a call is simulated exactly; of tokens that share a call, less is lost."""
    theirs = their_linear(random_weight(), BNB_INT8)
    weight = bnb.quantize(random_weight(), BNB_INT8).dequantize()
    rows = 3 * torch.randn(40, 256, generator=torch.Generator().manual_seed(1))
    assert (rows.abs() >= bnb.THRESHOLD).any()
    alone = torch.cat([theirs(row[None]) for row in rows])
    ours = bnb.fake_int8_tokens(rows) @ weight
    torch.testing.assert_close(ours, alone, rtol=1e-4, atol=5e-4)
    exact = rows @ weight
    assert (theirs(rows) - exact).square().mean() < (ours - exact).square().mean()
    assert bnb.fake_int8_tokens(rows[:0]).shape == (0, 256)
    assert bnb.fake_int8_tokens(rows.view(2, 20, 256)).shape == (2, 20, 256)
    assert torch.equal(bnb.fake_int8_tokens(torch.zeros(2, 8)), torch.zeros(2, 8))


def test_weights_beyond_fp16_are_refused_for_int8() -> None:
    weight = random_weight()
    weight[0, 0] = 1e5
    with pytest.raises(UserError, match=r"^some\.linear: weights beyond FP16's 65,504"):
        dict(pack("some.linear", bnb.quantize(weight, BNB_INT8)))


# --- whole checkpoints ---


def their_kind(module: Any) -> str:
    """ "bf16" for a plain linear, else the scheme of bitsandbytes that its class implements."""
    classes = {"Linear4bit": "bnb-nf4", "Linear8bitLt": "bnb-int8"}
    return classes.get(type(module).__name__, "bf16")


def with_plain_linears(model: Any) -> Any:
    """The model with each weight as transformers dequantizes it, all in F32."""
    for name, module in list(model.named_modules()):
        if their_kind(module) != "bf16":
            weight = dequantize_bnb_weight(module.weight, getattr(module, "state", None))
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight = torch.nn.Parameter(weight, requires_grad=False)
            model.set_submodule(name, plain)
    for parameter in model.parameters():  # transformers loads plain weights as stored, in BF16
        parameter.data = parameter.data.float()
    return model


@pytest.mark.parametrize("recipe", [*RECIPES, "parts"])
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_transformers_loads_it(
    name: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No key missing or left over, bitsandbytes' linears where the recipe says, logits as ours."""
    source, folder = tiny.write(tmp_path / "source", MODELS[name]), tmp_path / "quantized"
    chosen, config = recipe_named(recipe), read_config(source)
    runs.run(source, folder, chosen)
    inputs = runs.tokens(source, 2, 70, seed=3)
    monkeypatch.setattr("llama4q.bnb.fake_int8_tokens", None)
    ours = runs.our_logits(folder, inputs)
    kinds = [AutoModelForCausalLM]
    if not MODELS[name].text_only:
        kinds.append(AutoModelForImageTextToText)
    for kind in kinds:
        model = loaded(folder, kind)
        prefix = config.prefix if kind is AutoModelForImageTextToText else ""
        quantized = {
            key: their_kind(module)
            for key, module in model.named_modules()
            if their_kind(module) != "bf16"
        }
        assert quantized == {
            prefix + linear.name.removeprefix(config.prefix): scheme.name
            for layer in range(config.num_layers)
            for linear, scheme in planned(chosen, config, layer)
            if scheme.quantizes
        }
        theirs = with_plain_linears(model)(input_ids=inputs).logits
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    assert (ours - runs.our_logits(source, inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("recipe", RECIPES)
@torch.inference_mode()
def test_bitsandbytes_computes_with_it(recipe: str, tmp_path: Path) -> None:
    """Its own products, in BF16, on the whole model: the noise of two engines' BF16."""
    source = tiny.write(tmp_path / "source", tiny.SCOUT)
    runs.run(source, tmp_path / "out", recipe)
    inputs = runs.tokens(source, 2, 90, seed=3)
    model = loaded(tmp_path / "out", AutoModelForImageTextToText)
    theirs = functional.log_softmax(model(input_ids=inputs).logits.float(), dim=-1)
    ours = functional.log_softmax(runs.our_logits(tmp_path / "out", inputs), dim=-1)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1)
    assert 0 < divergence.median() < 6e-4


def test_load_in_4bit_leaves_the_experts_alone(tmp_path: Path) -> None:
    """What this format is for: transformers' own NF4 of the original keeps experts in BF16."""
    source = tiny.write(tmp_path / "source", tiny.SCOUT)
    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForImageTextToText.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=asked
    )
    layer = model.get_submodule("language_model.model.layers.0.feed_forward")
    assert layer.experts.gate_up_proj.dtype == layer.experts.down_proj.dtype == torch.bfloat16
    assert their_kind(layer.shared_expert.gate_proj) == "bnb-nf4"
    runs.run(source, tmp_path / "out", "bnb-nf4")
    ours = loaded(tmp_path / "out", AutoModelForImageTextToText)
    layer = ours.get_submodule("language_model.model.layers.0.feed_forward")
    assert layer.experts[3].down_proj.weight.dtype == torch.uint8


def test_bytes_counted_independently(tmp_path: Path) -> None:
    """Codes of 4 bits, a byte for 64, an F32 for 64 * 256, and 1,280 bytes of tables and state."""
    source, folder = tiny.write(tmp_path / "source", tiny.MAVERICK), tmp_path / "out"
    for recipe in RECIPES:
        shutil.rmtree(folder, ignore_errors=True)
        report = runs.run(source, folder, recipe)
        on_disk = sum(
            tensor.nbytes
            for shard in folder.glob("*.safetensors")
            for tensor in load_file(shard).values()
        )
        config = read_config(source)
        predicted = predicted_bytes(Checkpoint(source), config, load_recipe(recipe))
        assert report["quantized_bytes"] == on_disk == predicted
    expert = 5120 * 8192  # of Scout
    tables = 4 * (16 + 256) + 192
    assert BNB_NF4.stored_bytes(5120, 8192) == expert / 2 + expert / 64 + expert / 4096 + tables
    assert BNB_NF4.stored_bytes(5120, 8192) * 8 / expert == pytest.approx(4.127, abs=5e-4)
    assert BNB_INT8.stored_bytes(5120, 8192) == expert + 4 * 8192 + 1


def test_the_configuration_is_transformers_own() -> None:
    config = parse_config(test_inspect.SCOUT, "scout")
    for recipe, asked in {
        "bnb-nf4": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype="bfloat16",
        ),
        "bnb-int8": BitsAndBytesConfig(load_in_8bit=True),
    }.items():  # fmt: skip
        ours = quantization_config(load_recipe(recipe), config)
        asked.llm_int8_skip_modules = [
            "lm_head", "router", "vision_model", "multi_modal_projector",
            "q_proj", "k_proj", "v_proj", r".*model\.layers\.\d+\.self_attn\.o_proj$",
        ]  # fmt: skip
        assert ours == json.loads(json.dumps(asked.to_dict()))


def test_every_command(tmp_path: Path) -> None:
    """quantize, eval, check, inspect and fit, by the command line."""
    variant = dataclasses.replace(tiny.SCOUT, vocab_size=2048)
    source, folder = tiny.write(tmp_path / "source", variant), tmp_path / "out"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(POCKET_MODEL / name, source)
    (tmp_path / "gate.toml").write_text("[likelihood.kl_mean]\nmax = 9")
    measured = "--eval-windows 2 --eval-length 64 --lengths 80 --json"
    for command in (
        f"quantize {source} {folder} --recipe bnb-nf4 --samples 1 --length 64 {measured}",
        f"eval {folder} --against {source} {measured} --out {tmp_path / 'eval.json'}",
        f"check {folder}/report.json --policy {tmp_path / 'gate.toml'}",
        f"fit {folder} --context 4096",
    ):
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 0, done.output
    report = json.loads((folder / "report.json").read_text())
    again = json.loads((tmp_path / "eval.json").read_text())
    assert again["evidence"]["likelihood"] == report["evidence"]["likelihood"]
    assert report["versions"]["bitsandbytes"]
    assert {group["scheme"] for layer in report["layers"] for group in layer["groups"]} == {
        "bnb-nf4"
    }
    assert quantized_already(folder) == "bitsandbytes"
    refused = CliRunner().invoke(main, f"quantize {folder} {tmp_path / 'again'}")
    assert "is quantized already (bitsandbytes)" in refused.output


def test_inspect_names_the_format(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", tiny.SCOUT)
    before = inspect_checkpoint(folder_source(source))
    for recipe, label in zip(RECIPES, ("bnb NF4", "bnb INT8"), strict=True):
        runs.run(source, tmp_path / recipe, recipe)
        found = inspect_checkpoint(folder_source(tmp_path / recipe))
        assert (found.quantized, found.experts_layout) == (True, "unfused")
        assert found.parameters == before.parameters
        formats = {part.name: dict(part.formats) for part in found.components}
        assert formats["routed_experts"] == {label: 4 * 4 * 3 * 128 * 128}
        assert formats["attention"].keys() == {"BF16"}


def test_resumed_to_the_same_bytes(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", SMALL)
    runs.run(source, tmp_path / "whole", "bnb-nf4")
    progress = StopAt(9)
    with pytest.raises(Stopped):
        runs.run(source, tmp_path / "resumed", "bnb-nf4", progress=progress)
    assert progress.total == 18  # in each of 3 layers two groups of 2 experts and a shared one
    again = runs.Quiet()
    runs.run(source, tmp_path / "resumed", "bnb-nf4", progress=again)
    assert again.replayed_groups
    for shard in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert shard.read_bytes() == (tmp_path / "resumed" / shard.name).read_bytes()
