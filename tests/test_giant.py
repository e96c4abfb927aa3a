"""Random checkpoints of true shapes: tensors against transformers' classes, and statistics."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import make_giant
from benchmarks.make_giant import Weights, giant_config, main, shapes_of, shards, write_giant
from llama4q.checkpoint import Checkpoint
from llama4q.config import parse_config, read_config
from llama4q.inspect import inspect_checkpoint
from llama4q.source import folder_source
from llama4q.stream import advance, embed
from llama4q.text import parse_source
from llama4q.tokens import evaluation_tokens, load_tokenizer
from llama4q.weights import LayerReader, check_layout

from . import runs, test_inspect, tiny

WIDE = tiny.Variant(experts=16, width=512, vocab_size=2048, rope_scaling=tiny.SCOUT_ROPE)
SPARSE = dataclasses.replace(WIDE, experts=32, moe_step=2, qk_norm=False, rope_scaling=None)


@pytest.fixture(autouse=True)
def small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices need no 16 million values; drawing them is most of the time."""
    monkeypatch.setattr(make_giant, "POOL", 2**19)


def model(folder: Path, variant: tiny.Variant) -> str:
    """A config.json of `variant`, as --model takes it."""
    raw = tiny.config_json(dataclasses.replace(variant, vocab_size=2048))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    return str(folder / "config.json")


def written(folder: Path, variant: tiny.Variant, seed: int = 0) -> Path:
    write_giant(folder / "giant", giant_config(model(folder, variant)), seed)
    return folder / "giant"


def text_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """What transformers' own class of the whole model has, without vision and projector."""
    vision = ("vision_model.", "multi_modal_projector.")
    found = tiny.shapes(config)
    return {name: shape for name, shape in found.items() if not name.startswith(vision)}


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_every_variant_opens_and_has_transformers_tensors(name: str, tmp_path: Path) -> None:
    variant = dataclasses.replace(tiny.VARIANTS[name], vocab_size=2048)
    folder = written(tmp_path, variant)
    checkpoint, config = Checkpoint(folder), read_config(folder)
    check_layout(checkpoint, config)
    found = {name: info.shape for name, info in checkpoint.infos.items()}
    assert found == text_shapes(tiny.config_json(variant))
    assert {info.dtype for info in checkpoint.infos.values()} == {torch.bfloat16}
    summary = inspect_checkpoint(folder_source(folder))
    assert not summary.config.has_vision
    assert summary.experts_layout == ("fused" if config.moe_layers else "none")
    wanted = parse_config(tiny.config_json(variant), "config.json")
    assert dataclasses.replace(wanted, has_vision=False) == config


@pytest.mark.parametrize("name", ["scout-text-only", "maverick-text-only"])
@torch.inference_mode()
def test_transformers_loads_it(name: str, tmp_path: Path) -> None:
    folder = written(tmp_path, tiny.VARIANTS[name])
    tokens = runs.tokens(folder, 2, 48)
    theirs = tiny.transformers_model(folder)(input_ids=tokens).logits
    torch.testing.assert_close(runs.our_logits(folder, tokens), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("model", "published"), [("scout", test_inspect.SCOUT), ("maverick", test_inspect.MAVERICK)]
)
def test_true_shapes_against_transformers(model: str, published: dict[str, Any]) -> None:
    text = published["text_config"]
    assert text.items() <= giant_config(model)["text_config"].items()
    two = {**published, "text_config": {**text, "num_hidden_layers": 2}}
    assert shapes_of(giant_config(model, 2)) == text_shapes(two)


def test_which_layers_are_there() -> None:
    whole = parse_config(giant_config("maverick"), "whole")
    for first, layers in ((0, 2), (1, 1), (3, 1), (2, 7)):
        part = parse_config(giant_config("maverick", layers, first), "part")
        for kind in ("moe_layers", "rope_layers", "chunked_layers"):
            kept = {layer - first for layer in getattr(whole, kind) if layer >= first}
            assert getattr(part, kind) == kept & set(range(layers)), kind
    experts = shapes_of(giant_config("maverick", 1, 1, vocab=4096))
    name = "language_model.model.layers.0.feed_forward.experts.gate_up_proj"
    assert experts[name] == (128, 5120, 16384)
    assert experts["language_model.lm_head.weight"] == (4096, 5120)


def test_layer_types_of_a_config_are_cut_too(tmp_path: Path) -> None:
    named = model(tmp_path, tiny.SCOUT)
    raw = json.loads(Path(named).read_text())
    raw["text_config"]["layer_types"] = ["full_attention", "chunked_attention"] * 2
    Path(named).write_text(json.dumps(raw))
    assert parse_config(giant_config(named, 2, 1), "part").chunked_layers == {0}


def test_bytes_follow_from_the_seed_and_the_name(tmp_path: Path) -> None:
    first, again = (written(tmp_path / name, tiny.MAVERICK) for name in ("first", "again"))
    other = written(tmp_path / "other", tiny.MAVERICK, seed=1)
    shard = "model-00001-of-00001.safetensors"
    assert (first / shard).read_bytes() == (again / shard).read_bytes()
    here, there = load_file(first / shard), load_file(other / shard)
    assert [name for name in here if torch.equal(here[name], there[name])] == []
    for name, values in here.items():
        alone = torch.cat(list(Weights(0).pieces(name, tuple(values.shape))))
        assert torch.equal(alone.flatten(), values.flatten()), name
        if "experts." in name:
            assert len(values.flatten(1).unique(dim=0)) == len(values)


def test_pieces_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards as small as a tensor, pieces as small as a row: every tensor has its size."""
    monkeypatch.setattr(make_giant, "PIECE", 100)
    monkeypatch.setattr(make_giant, "SHARD_BYTES", 300_000)
    folder = written(tmp_path, tiny.SCOUT)
    checkpoint = Checkpoint(folder)
    check_layout(checkpoint, read_config(folder))
    shapes = {name: info.shape for name, info in checkpoint.infos.items()}
    parts = shards(shapes)
    assert len(parts) == len(list(folder.glob("*.safetensors"))) > 2
    assert all(len(part) == 1 or make_giant.nbytes(part) <= 300_000 for part in parts)


@pytest.mark.parametrize("variant", [WIDE, SPARSE], ids=["scout", "maverick"])
@torch.inference_mode()
def test_experts_share_tokens_unevenly_and_none_is_left_out(
    variant: tiny.Variant, tmp_path: Path
) -> None:
    folder = written(tmp_path, variant)
    config = read_config(folder)
    reader = LayerReader(Checkpoint(folder), config, torch.float32)
    batches = embed(reader.embedding(), [runs.tokens(folder, 32, 128)])
    for index in range(config.num_layers):
        routing = advance(config, reader.layer(index), batches)
        assert 0.9 < batches[0].square().mean().sqrt() < 3
        if routing is not None:
            counts = torch.bincount(routing.expert, minlength=config.num_experts).float()
            shares = counts / counts.mean()
            assert 0.2 < shares.min() < 0.9
            assert 1.1 < shares.max() < 4


def test_statistics_of_a_weight_and_of_embeddings() -> None:
    """Scales by channel, some of them large, tails heavier than a normal's, few directions."""
    weights = Weights(0)
    weight = torch.cat(list(weights.pieces("q_proj.weight", (1024, 2048)))).float()
    assert weight.square().mean() * 2048 == pytest.approx(1, rel=0.1)
    for dimension in (0, 1):
        scales = weight.square().mean(dimension).sqrt()
        assert (scales > 4 * scales.median()).sum() in range(2, 17)
        assert 0.2 < scales.log().std() < 0.6
        weight = weight / scales.unsqueeze(dimension)
    assert weight.pow(4).mean() == pytest.approx(3 * 2.71828 ** (4 * make_giant.TAIL**2), rel=0.1)
    tokens = torch.cat(list(weights.pieces("embed_tokens.weight", (2048, 1024)))).float()
    tokens = tokens / tokens.square().mean(0).sqrt()
    energy = torch.linalg.svdvals(tokens).square()
    assert energy[:128].sum() > 0.5 * energy.sum()  # an eighth of it were they independent


def test_the_tokenizer_fits(tmp_path: Path) -> None:
    folder = written(tmp_path, tiny.SCOUT)
    drawn = evaluation_tokens(parse_source(None), load_tokenizer(folder), windows=2, length=64)
    assert int(drawn.tokens.max()) < read_config(folder).vocab_size


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("out --model behemoth", "behemoth: choose scout, maverick, or the path of a config.json"),
        ("out --model scout --layers 49", "has layers 0 to 47, asked for 49 from 0 on"),
        ("out --model scout --layers 0", "asked for 0 from 0 on"),
        ("out --model scout --layers 2 --first-layer 47", "asked for 2 from 47 on"),
        ("out --model scout --vocab 2000", "--vocab 2000: the tokenizer .* has 2048 tokens"),
        (". --model scout --layers 1", "is there already; choose another folder or delete it"),
        ("out --model scout --layers 1", r"needs 8\.5 GB, the disk has 0\.0 GB free; ask for"),
    ],
)
def test_what_is_refused_in_one_line(
    arguments: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr(sys, "argv", ["make_giant", *arguments.split()])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=words) as refusal:
        main()
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = model(tmp_path, tiny.MAVERICK)
    words = f"{tmp_path}/out --model {named} --layers 2 --first-layer 1 --vocab 3000 --seed 7"
    monkeypatch.setattr(sys, "argv", ["make_giant", *words.split()])
    main()
    write_giant(tmp_path / "same", giant_config(named, 2, 1, 3000), 7)
    for path in (tmp_path / "same").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
