"""llama4q.inspect: component counts against transformers' own shapes, files and published sizes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llama4q.checkpoint import TensorInfo
from llama4q.config import parse_config
from llama4q.errors import UserError
from llama4q.inspect import Summary, inspect_checkpoint, render_summary, summarize
from llama4q.source import folder_source

from . import tiny

# Published sizes, as config.json on the Hub has them; the names and shapes come from transformers.
VISION = {
    "model_type": "llama4_vision_model", "hidden_size": 1408, "num_hidden_layers": 34,
    "num_attention_heads": 16, "intermediate_size": 5632, "image_size": 336, "patch_size": 14,
    "vision_output_dim": 4096, "projector_input_dim": 4096, "projector_output_dim": 4096,
    "pixel_shuffle_ratio": 0.5,
}  # fmt: skip
SCOUT_TEXT = {
    "model_type": "llama4_text", "vocab_size": 202048, "hidden_size": 5120,
    "intermediate_size": 8192, "intermediate_size_mlp": 16384, "num_hidden_layers": 48,
    "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "num_local_experts": 16,
    "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "attention_chunk_size": 8192,
    "max_position_embeddings": 10485760, "use_qk_norm": True, "rope_theta": 500000.0,
}  # fmt: skip
MAVERICK_TEXT = {
    **SCOUT_TEXT, "num_local_experts": 128, "interleave_moe_layer_step": 2, "use_qk_norm": False,
    "max_position_embeddings": 1048576,
}  # fmt: skip
SCOUT: dict[str, Any] = {"model_type": "llama4", "text_config": SCOUT_TEXT, "vision_config": VISION}
MAVERICK: dict[str, Any] = {**SCOUT, "text_config": MAVERICK_TEXT}
TEXT_PARTS = ("embeddings", "lm_head", "attention", "router", "routed_experts", "shared_experts",
              "dense_feed_forward", "norms")  # fmt: skip

Table = dict[str, TensorInfo]
Shape = tuple[int, ...]
Scheme = Callable[[str, int, int], Table]
WIDE = replace(tiny.SCOUT, width=256, expert_size=256)  # two groups of 128 a row


def bf16(config: dict[str, Any]) -> Table:
    """The original's tensors, without a byte of them."""
    return {name: tensor(shape) for name, shape in tiny.shapes(config).items()}


def tensor(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> TensorInfo:
    return TensorInfo("model.safetensors", shape, dtype, 0)


def int4(name: str, out: int, inputs: int) -> Table:
    """INT4 group 128 on disk, by the serving contract's table."""
    return {
        f"{name}.weight_packed": tensor((out, inputs // 8), torch.int32),
        f"{name}.weight_scale": tensor((out, inputs // 128)),
        f"{name}.weight_shape": tensor((2,), torch.int64),
    }


def fp8(name: str, out: int, inputs: int) -> Table:
    """FP8 with one F32 scale an output channel."""
    return {
        f"{name}.weight": tensor((out, inputs), torch.float8_e4m3fn),
        f"{name}.weight_scale": tensor((out, 1), torch.float32),
    }


def quantized(infos: Table, **schemes: Scheme) -> Table:
    """`infos` with experts unfused, and the linears whose name holds a key stored otherwise."""
    made: Table = {}
    for name, shape in unfused(infos).items():
        scheme = next((schemes[key] for key in schemes if f"{key}." in name), None)
        vision = name.startswith("vision_model")
        if scheme and len(shape) == 2 and not vision and "router" not in name:
            made |= scheme(name.removesuffix(".weight"), shape[0], shape[1])
        else:
            made[name] = tensor(shape)
    return made


def unfused(infos: Table) -> dict[str, Shape]:
    made: dict[str, Shape] = {}
    for name, info in infos.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            made[name] = info.shape
            continue
        stem, (experts, inputs, out) = name.rsplit(".", 1)[0], info.shape
        for expert in range(experts):
            if name.endswith("down_proj"):
                made[f"{stem}.{expert}.down_proj.weight"] = (out, inputs)
            else:
                made[f"{stem}.{expert}.gate_proj.weight"] = (out // 2, inputs)
                made[f"{stem}.{expert}.up_proj.weight"] = (out // 2, inputs)
    return made


def text_bytes(summary: Summary) -> int:
    return sum(part.nbytes for part in summary.components if part.name in TEXT_PARTS)


def parts(summary: Summary) -> dict[str, int]:
    return {part.name: part.parameters for part in summary.components}


@pytest.fixture(scope="module")
def scout() -> Table:
    return bf16(SCOUT)


@pytest.fixture(scope="module")
def maverick() -> Table:
    return bf16(MAVERICK)


def test_real_scout_against_transformers_shapes_and_published_sizes(scout: Table) -> None:
    """design.md: text 215.5 GB in BF16; serving-contract.md: 202.4 GiB with vision."""
    summary = summarize(parse_config(SCOUT, "scout"), scout)
    assert summary.parameters == sum(math.prod(info.shape) for info in scout.values())
    assert summary.nbytes == 2 * summary.parameters
    assert round(text_bytes(summary) / 1e9, 1) == 215.5
    assert round(summary.nbytes / 2**30, 1) == 202.4
    assert round(summary.active_parameters / 1e9) == 17  # "Scout 17B 16E"
    assert parts(summary)["routed_experts"] == 48 * 16 * 3 * 5120 * 8192
    assert parts(summary)["shared_experts"] == 48 * 3 * 5120 * 8192
    assert parts(summary)["attention"] == 48 * 5120 * (5120 + 1024 + 1024 + 5120)
    assert parts(summary)["embeddings"] == parts(summary)["lm_head"] == 202048 * 5120
    assert "other" not in parts(summary)
    assert (summary.quantized, summary.experts_layout) == (False, "fused")


MLPS = "gate_proj", "up_proj", "down_proj"
ATTENTION = "q_proj", "k_proj", "v_proj", "o_proj"
EXPERTS = tuple(f"experts.{expert}" for expert in range(16))


@pytest.mark.parametrize(("linears", "text_gb"), [(MLPS, 63.1), (MLPS + ATTENTION, 58.6)])
def test_int4_scout_is_as_large_as_the_design_says(
    scout: Table, linears: tuple[str, ...], text_gb: float
) -> None:
    config = parse_config(SCOUT, "scout")
    summary = summarize(config, quantized(scout, **dict.fromkeys(linears, int4)))
    assert text_bytes(summary) / 1e9 == pytest.approx(text_gb, abs=0.05)
    assert (summary.quantized, summary.experts_layout) == (True, "unfused")
    assert parts(summary) == parts(summarize(config, scout))


def test_fp8_scout_is_as_large_as_published_and_its_scales(scout: Table) -> None:
    """Both documents count the codes alone; an F32 scale for each output comes on top, 0.07 GB."""
    config = parse_config(SCOUT, "scout")
    everything = quantized(scout, **dict.fromkeys(MLPS + ATTENTION, fp8))
    text = text_bytes(summarize(config, everything)) - scale_bytes(everything)
    assert text / 1e9 == pytest.approx(109.8, abs=0.05)  # design.md
    mlps = quantized(scout, **dict.fromkeys(MLPS, fp8))
    codes = summarize(config, mlps).nbytes - scale_bytes(mlps)
    assert codes / 2**30 == pytest.approx(106.7, abs=0.05)  # serving-contract.md section 2
    assert scale_bytes(mlps) == 4 * 48 * 17 * (8192 + 8192 + 5120)


def scale_bytes(infos: Table) -> int:
    return sum(info.nbytes for name, info in infos.items() if name.endswith("_scale"))


@pytest.mark.parametrize(
    ("schemes", "gib"),
    [
        (dict.fromkeys(EXPERTS, int4), 68.8),
        ({**dict.fromkeys(EXPERTS, int4), "shared_expert": fp8}, 63.1),
        ({**dict.fromkeys(EXPERTS, int4), "shared_expert": int4}, 60.4),
    ],
)
def test_sizes_with_vision_against_the_contracts_table(
    scout: Table, schemes: dict[str, Scheme], gib: float
) -> None:
    """serving-contract.md section 2, in GiB."""
    size = summarize(parse_config(SCOUT, "scout"), quantized(scout, **schemes)).nbytes / 2**30
    assert size == pytest.approx(gib, abs=0.05)


def test_real_maverick_against_the_contracts_table(maverick: Table) -> None:
    config = parse_config(MAVERICK, "maverick")
    original = summarize(config, maverick)
    assert original.nbytes / 2**30 == pytest.approx(748.0, abs=0.05)
    assert round(original.active_parameters / 1e9) == 17
    assert parts(original)["dense_feed_forward"] == 24 * 3 * 5120 * 16384
    packed = summarize(config, quantized(maverick, **dict.fromkeys(MLPS, int4)))
    assert packed.nbytes / 2**30 == pytest.approx(201.1, abs=0.05)
    assert text_bytes(packed) / 1e9 == pytest.approx(214.2, abs=0.05)  # design.md
    assert parts(packed) == parts(original)


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_every_variant_adds_up_to_its_files(tmp_path: Path, name: str) -> None:
    """Authority: the size of the safetensors files without their headers."""
    folder = tiny.write(tmp_path / name, tiny.VARIANTS[name])
    summary = inspect_checkpoint(folder_source(folder))
    assert summary.nbytes == sum(data_bytes(path) for path in folder.glob("*.safetensors"))
    assert summary.parameters == sum(
        math.prod(shape) for shape in tiny.shapes(tiny.config_json(tiny.VARIANTS[name])).values()
    )
    assert "other" not in parts(summary)
    assert ("vision" in parts(summary)) is ("text-only" not in name)
    assert ("routed_experts" in parts(summary)) is (name != "guard")
    assert summary.experts_layout == ("none" if name == "guard" else "fused")
    assert not summary.quantized


def data_bytes(path: Path) -> int:
    header = int.from_bytes(path.read_bytes()[:8], "little")
    return path.stat().st_size - 8 - header


def write_quantized(folder: Path, extra: dict[str, torch.Tensor] | None = None) -> Path:
    """A small Scout: routed experts INT4, shared ones FP8, KV scales; all codes 0."""
    tiny.write(folder, WIDE)
    config = json.loads((folder / "config.json").read_text())
    experts = {f"experts.{expert}": int4 for expert in range(WIDE.experts)}
    made = {
        name: torch.zeros(info.shape, dtype=info.dtype)
        for name, info in quantized(bf16(config), **experts, shared_expert=fp8).items()
    }
    for layer in range(WIDE.layers):
        for scale in ("k_scale", "v_scale"):
            made[f"language_model.model.layers.{layer}.self_attn.{scale}"] = torch.ones(1)
    for path in folder.glob("model*"):
        path.unlink()
    save_file({**made, **(extra or {})}, str(folder / "model.safetensors"))
    return folder


def test_a_quantized_checkpoint_has_the_originals_weights(tmp_path: Path) -> None:
    original = inspect_checkpoint(folder_source(tiny.write(tmp_path / "source", WIDE)))
    folder = write_quantized(tmp_path / "quantized")
    summary = inspect_checkpoint(folder_source(folder))
    found = {part.name: part for part in summary.components}
    assert parts(summary) == {**parts(original), "kv_scales": 0}
    assert summary.nbytes == data_bytes(folder / "model.safetensors")
    assert dict(found["routed_experts"].formats) == {"INT4 g128": parts(original)["routed_experts"]}
    assert dict(found["shared_experts"].formats) == {
        "FP8 channel": parts(original)["shared_experts"]
    }
    assert list(found["attention"].formats) == ["BF16"]
    assert found["kv_scales"].nbytes == 2 * 4 * WIDE.layers
    assert summary.has_kv_scales
    assert not original.has_kv_scales
    assert summary.quantized
    assert summary.experts_layout == "unfused"


@pytest.mark.parametrize(
    ("words", "scales", "label"),
    [
        (640, 40, "INT4 g128"),
        (640, 80, "INT4 g64"),
        (640, 1, "INT4 channel"),
        (1280, 40, "INT8 g128"),
        (480, 40, "INT3 g128"),
    ],
)
def test_bits_and_groups_come_from_shapes_and_config(words: int, scales: int, label: str) -> None:
    """A row of 5,120 weights in 32-bit words. Words and scales alone would not tell INT4 g128 from
    INT8 g64; the width in config.json does."""
    name = "language_model.model.layers.0.feed_forward.shared_expert.up_proj"
    infos = {
        f"{name}.weight_packed": tensor((8192, words), torch.int32),
        f"{name}.weight_scale": tensor((8192, scales)),
    }
    summary = summarize(parse_config(SCOUT, "scout"), infos)
    assert dict(summary.components[0].formats) == {label: 8192 * 5120}


@pytest.mark.parametrize(
    ("linear", "out", "inputs", "label"),
    [
        ("q_proj", 128, 256, "INT4 g128"),
        ("k_proj", 64, 256, "INT4 g128"),
        ("v_proj", 64, 256, "INT4 g128"),
        ("o_proj", 256, 128, "INT4 channel"),  # one group of 128 is the whole channel
    ],
)
def test_packed_attention(linear: str, out: int, inputs: int, label: str) -> None:
    """4 heads and 2 key/value heads of 32, width 256."""
    infos = int4(f"language_model.model.layers.0.self_attn.{linear}", out, inputs)
    summary = summarize(parse_config(tiny.config_json(WIDE), "tiny"), infos)
    assert dict(summary.components[0].formats) == {label: out * inputs}


def test_other_tools_layouts() -> None:
    """Fused FP8 (NVIDIA ModelOpt), 4-bit floats and bitsandbytes: weights counted once each."""
    config = parse_config(tiny.config_json(tiny.SCOUT), "tiny")
    layer = "language_model.model.layers.0."
    infos = {
        f"{layer}feed_forward.experts.gate_up_proj": tensor((4, 128, 256), torch.float8_e4m3fn),
        f"{layer}feed_forward.experts.gate_up_proj_weight_scale": tensor((), torch.float32),
        f"{layer}feed_forward.experts.gate_up_proj_weight_scale_2": tensor((), torch.float32),
        f"{layer}feed_forward.shared_expert.up_proj.weight": tensor((128 * 64, 1), torch.uint8),
        f"{layer}feed_forward.shared_expert.up_proj.weight.absmax": tensor((256,), torch.uint8),
        f"{layer}self_attn.q_proj.weight_packed": tensor((128, 64), torch.uint8),
        f"{layer}self_attn.q_proj.weight_scale": tensor((128, 8), torch.float8_e4m3fn),
        f"{layer}self_attn.q_proj.weight_global_scale": tensor((1,), torch.float32),
        f"{layer}self_attn.k_proj.k_scale": tensor((), torch.float32),
        "language_model.model.rotary.inv_freq": tensor((64,), torch.float32),
    }
    summary = summarize(config, infos)
    found = {part.name: dict(part.formats) for part in summary.components}
    assert found["routed_experts"] == {"FP8": 4 * 128 * 256}
    assert found["shared_experts"] == {"FP4": 128 * 128}
    assert found["attention"] == {"FP4 g16": 128 * 128}
    assert found["kv_scales"] == {}
    assert found["other"] == {"F32": 64}
    assert (summary.quantized, summary.experts_layout) == (True, "fused")


def test_fused_and_unfused_layers_together_are_named(tmp_path: Path) -> None:
    fused = {
        "language_model.model.layers.0.feed_forward.experts.gate_up_proj": torch.zeros(4, 256, 512)
    }
    assert (
        inspect_checkpoint(folder_source(write_quantized(tmp_path, fused))).experts_layout
        == "mixed"
    )


def test_a_packed_vision_tower_needs_its_stored_shapes(tmp_path: Path) -> None:
    name = "vision_model.model.layers.0.mlp.fc1"
    packed = {f"{name}.weight_packed": torch.zeros(64, 4, dtype=torch.int32)}
    before = parts(inspect_checkpoint(folder_source(write_quantized(tmp_path / "before"))))[
        "vision"
    ]
    shape = {f"{name}.weight_shape": torch.tensor([64, 32])}
    summary = inspect_checkpoint(folder_source(write_quantized(tmp_path / "shape", packed | shape)))
    assert parts(summary)["vision"] == before + 64 * 32
    with pytest.raises(UserError, match=r"vision_model\.model\.layers\.0\.mlp\.fc1.*weight_shape"):
        inspect_checkpoint(folder_source(write_quantized(tmp_path / "none", packed)))


def test_json_is_json_and_adds_up(tmp_path: Path) -> None:
    summary = inspect_checkpoint(folder_source(write_quantized(tmp_path)))
    found = json.loads(json.dumps(summary.to_json()))
    components = found["components"].values()
    assert found["bytes"] == sum(part["bytes"] for part in components) == summary.nbytes
    assert found["parameters"] == sum(part["parameters"] for part in components)
    assert all(sum(part["formats"].values()) == part["parameters"] for part in components)
    assert (found["global_layers"], found["chunked_layers"]) == (1, 3)
    assert found["quantized"] is True


def test_table_is_aligned_and_shows_every_component(tmp_path: Path) -> None:
    text = render_summary(inspect_checkpoint(folder_source(write_quantized(tmp_path))))
    head, table = text.split("\n\n")
    assert "4 of width 256 and a shared one in 4 layers, top 1, unfused" in head
    assert "4: 1 global, 3 chunked by 32 tokens" in head
    lines = table.splitlines()
    stored_as = lines[0].index("stored as")
    assert all(line[stored_as - 2 : stored_as].strip() == "" for line in lines)
    assert [line[:14].strip() for line in lines] == [
        "component", "embeddings", "lm head", "kv scales", "attention", "router",
        "routed experts", "shared experts", "norms", "vision", "projector", "total",
    ]  # fmt: skip
    assert "INT4 g128" in table
    assert lines[-1].endswith("quantized")


def test_gigabytes_are_ten_to_the_ninth(scout: Table) -> None:
    text = render_summary(summarize(parse_config(SCOUT, "scout"), scout))
    assert "217.284" in text.splitlines()[-1]
    assert "not quantized" in text.splitlines()[-1]
    assert "17,1" in text  # active weights


def test_what_is_not_a_llama_4_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="not a Llama 4"):
        inspect_checkpoint(folder_source(tmp_path))
