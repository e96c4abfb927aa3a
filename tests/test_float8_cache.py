"""Keys and values in FP8: scales against transformers' own cache, and what they change.

That transformers computes the same logits with them is tested in tests/test_export.py.
"""

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
from transformers import DynamicCache

import cli
from evals.evaluation import compare
from evals.questions import Questions
from llama4q.checkpoint import Checkpoint
from llama4q.config import read_config
from llama4q.export import has_float8_cache
from llama4q.kv_cache import KVDtype
from llama4q.recipe import load_recipe
from llama4q.weights import LayerReader

from . import runs, tiny
from .test_bad_input import QUICK, VARIANT, mistake, with_tokenizer
from .test_resume import StopAt, Stopped

FLOAT8 = dataclasses.replace(load_recipe("int4"), kv_cache=KVDtype.FP8)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("source"), tiny.SCOUT)


@pytest.fixture(scope="module")
def quantized(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "out"
    runs.run(source, folder, FLOAT8)
    return folder


def scales(folder: Path) -> list[tuple[float, float]]:
    """Of keys and of values, by layer."""
    config, checkpoint = read_config(folder), Checkpoint(folder)
    prefixes = [f"{config.layer_prefix(i)}self_attn" for i in range(config.num_layers)]
    return [
        (float(checkpoint.get(f"{name}.k_scale")), float(checkpoint.get(f"{name}.v_scale")))
        for name in prefixes
    ]


@torch.inference_mode()
def test_scales_cover_what_transformers_keeps(source: Path, quantized: Path) -> None:
    """The largest of its cached keys and values, by 448. Later layers of the quantized model see
    other hidden states than the original's, so a few per cent are left there."""
    calibration = runs.tokens(source, 4, 96, seed=7)
    cache = DynamicCache()  # without a configuration it forgets nothing
    tiny.transformers_model(source)(input_ids=calibration, past_key_values=cache)
    for index, found in enumerate(scales(quantized)):
        layer = cache.layers[index]
        expected = [float(x.abs().max()) / 448 for x in (layer.keys, layer.values)]
        assert found == pytest.approx(expected, rel=0.004 if index == 0 else 0.1)


@torch.inference_mode()
def test_they_change_the_result(source: Path, quantized: Path, tmp_path: Path) -> None:
    runs.run(source, tmp_path / "plain", "int4")
    inputs = runs.tokens(source, 2, 70, seed=3)
    plain, float8 = (runs.our_logits(folder, inputs) for folder in (tmp_path / "plain", quantized))
    assert (plain - float8).abs().max() > 1e-2
    codes = "language_model.model.layers.1.feed_forward.experts.0.down_proj.weight_packed"
    before, after = (Checkpoint(folder).get(codes) for folder in (tmp_path / "plain", quantized))
    assert not torch.equal(before, after)  # calibration has gone on with what is read back
    assert has_float8_cache(quantized)
    assert not has_float8_cache(tmp_path / "plain")


def evidence(source: Path, quantized: Path, windows: torch.Tensor) -> list[dict[str, Any]]:
    """Layer by layer."""
    original, other = (
        LayerReader(Checkpoint(folder), read_config(folder), torch.float32)
        for folder in (source, quantized)
    )
    questions = Questions(windows, "", [], 0, runs.words)
    layers: list[dict[str, Any]] = compare(original, other, questions, lambda: None)["layers"]
    return layers


def scaled(folder: Path, other: Path, factor: float) -> Path:
    """The same with scales that hold so many times of what calibration saw."""
    shutil.copytree(folder, other)
    for shard in sorted(other.glob("*.safetensors")):
        tensors = load_file(shard)
        for name in tensors:
            if name.endswith((".k_scale", ".v_scale")):
                tensors[name] *= factor
        save_file(tensors, shard, metadata={"format": "pt"})
    return other


@torch.inference_mode()
def test_cut_numbers_are_counted(source: Path, quantized: Path, tmp_path: Path) -> None:
    """In the first layer, where both models still see the same, against transformers' cache.
    What rounds to the largest number of E4M3, a step of 32 wide, is not cut."""
    windows = runs.tokens(source, 3, 96, seed=3)
    cache = DynamicCache()
    tiny.transformers_model(source)(input_ids=windows, past_key_values=cache)
    half = scaled(quantized, tmp_path / "half", 0.5)
    found = evidence(source, half, windows)
    kept = (cache.layers[0].keys, cache.layers[0].values)
    expected = [
        float((x.abs() / scale > 448 + 16).float().mean())
        for x, scale in zip(kept, scales(half)[0], strict=True)
    ]
    assert min(expected) > 0
    assert [found[0]["cut"]["keys"], found[0]["cut"]["values"]] == pytest.approx(expected, rel=1e-3)
    assert all(min(one["cut"].values()) > 0 for one in found)
    wide = evidence(source, scaled(quantized, tmp_path / "wide", 2.0), windows)
    assert all(one["cut"] == {"keys": 0, "values": 0} for one in wide)
    assert all(one["cut"] is None for one in evidence(source, source, windows))


def test_a_stopped_run_goes_on_with_its_scales(
    source: Path, quantized: Path, tmp_path: Path
) -> None:
    """Stopped among the experts of the second layer, whose scales are written already."""
    folder = tmp_path / "out"
    with pytest.raises(Stopped):
        runs.run(source, folder, FLOAT8, progress=StopAt(14))
    runs.run(source, folder, FLOAT8)
    ours, theirs = Checkpoint(folder), Checkpoint(quantized)
    assert set(ours.names()) == set(theirs.names())
    for name in ours.names():
        assert torch.equal(ours.get(name), theirs.get(name)), name


def test_the_command(tmp_path: Path) -> None:
    """`--kv fp8` writes them, reports them, and plans with half the bytes."""
    source = with_tokenizer(tiny.write(tmp_path / "source", VARIANT))
    reports: list[dict[str, Any]] = []
    for name, options in (("bf16", ()), ("fp8", ("--kv", "fp8"))):
        command = ["quantize", str(source), str(tmp_path / name), *QUICK, *options, "--json"]
        found = CliRunner().invoke(cli.main, command)
        assert found.exit_code == 0, found.output
        reports.append(json.loads(found.stdout))
    bf16, fp8 = reports
    assert bf16["fit"]["kv_bytes"] == 2 * fp8["fit"]["kv_bytes"]
    assert all(layer["kv_scales"] is None for layer in bf16["layers"])
    assert [
        (layer["kv_scales"]["key"], layer["kv_scales"]["value"]) for layer in fp8["layers"]
    ] == scales(tmp_path / "fp8")
    command = ["fit", str(tmp_path / "fp8"), "--context", "64", "--json"]
    plan = json.loads(CliRunner().invoke(cli.main, command).stdout)
    assert plan["serving"]["kv_dtype"] == "fp8"


def test_bitsandbytes_has_no_place_for_them(source: Path, tmp_path: Path) -> None:
    line = mistake("quantize", source, tmp_path / "out", "--recipe", "bnb-nf4", "--kv", "fp8")
    assert line.startswith("recipe bnb-nf4: bitsandbytes' checkpoints have no scales")


def test_an_unknown_kind_of_cache(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('kv_cache = "int8"\n[schemes]\nexperts = "int4"\n')
    line = mistake("quantize", source, tmp_path / "out", "--recipe", recipe)
    assert line == f"{recipe}: kv_cache is 'int8', which is none of bf16, fp8"
