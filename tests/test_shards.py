"""llama4q.shards and llama4q.predict: vLLM's own parameters, the contract's table, written files.

The bytes of vLLM are those of its model class on the meta device, as
`benchmarks/serving_memory.py` prints them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama4q.checkpoint import Checkpoint, TensorInfo
from llama4q.config import ModelConfig, parse_config, read_config
from llama4q.hub import POCKET_MODEL
from llama4q.predict import alternatives, predicted_tensors
from llama4q.recipe import Method, adjusted, load_recipe, parse_recipe, shipped_recipes
from llama4q.shards import sharded

from . import runs, test_inspect, tiny

Table = Mapping[str, TensorInfo]
REAL = {"scout": test_inspect.SCOUT, "maverick": test_inspect.MAVERICK}


@pytest.fixture(scope="module")
def originals() -> dict[str, Table]:
    return {name: test_inspect.bf16(raw) for name, raw in REAL.items()}


def predicted(infos: Table, model: str, recipe: str | None) -> tuple[ModelConfig, Table]:
    config = parse_config(REAL[model], model)
    return config, predicted_tensors(infos, config, load_recipe(recipe)) if recipe else infos


@pytest.mark.parametrize(
    ("model", "recipe", "nbytes"),
    [
        ("scout", None, (217283587072, 108647329024, 54329200000, 27170135488)),
        ("scout", "int4", (64873073152, 32442075904, 16226577280, 8118827968)),
        ("scout", "int4-fp8", (66545419264, 33279231232, 16646137216, 8329590208)),
        ("scout", "mixed", (71708934656, 35861152512, 17937261440, 8975315904)),
        ("scout", "fp8", (114677214208, 57352498432, 28690140544, 14358961600)),
        ("maverick", None, (803167562752, 401601113344, 200817888640, 100426276288)),
        ("maverick", "int4", (215938814464, 107986752256, 54010721152, 27022705600)),
        ("maverick", "mixed", (233272567488, 116656515008, 58348488768, 29194475648)),
    ],
)
def test_bytes_on_each_card_are_those_of_vllms_own_model(
    originals: dict[str, Table], model: str, recipe: str | None, nbytes: tuple[int, ...]
) -> None:
    """vLLM 0.32's Llama4ForConditionalGeneration with a tensor parallel size of 1, 2, 4 and 8."""
    weights = sharded(*predicted(originals[model], model, recipe))
    assert weights.sizes == (1, 2, 4, 8)
    assert tuple(weights.on(cards) for cards in weights.sizes) == nbytes


EXPERTS_ONLY = '[schemes]\nexperts = "int4"'
FP8_REST = EXPERTS_ONLY + '\nshared_expert = "fp8"\ndense = "fp8"'
INT4_REST = EXPERTS_ONLY + '\nshared_expert = "int4"\ndense = "int4"'


@pytest.mark.parametrize(
    ("model", "recipe", "gib"),
    [
        ("scout", None, 202.4), ("scout", EXPERTS_ONLY, 68.8), ("scout", FP8_REST, 63.1),
        ("scout", INT4_REST, 60.4), ("scout", INT4_REST.replace("int4", "fp8"), 106.7),
        ("maverick", None, 748.0), ("maverick", EXPERTS_ONLY, 213.6),
        ("maverick", FP8_REST, 205.2), ("maverick", INT4_REST, 201.1),
        ("maverick", INT4_REST.replace("int4", "fp8"), 379.5),
    ],
)  # fmt: skip
def test_predicted_weights_are_those_of_the_contracts_table(
    originals: dict[str, Table], model: str, recipe: str | None, gib: float
) -> None:
    """serving-contract.md section 2, to 0.1 GiB; it counts the codes of FP8, not their scales."""
    config, infos = parse_config(REAL[model], model), originals[model]
    if recipe:
        infos = predicted_tensors(infos, config, parse_recipe(recipe, "here"))
    scales = sum(
        info.nbytes
        for name, info in infos.items()
        if name.endswith(".weight_scale") and info.dtype is torch.float32
    )
    assert (sharded(config, infos).on(1) - scales) / 2**30 == pytest.approx(gib, abs=0.1)


def kinds(infos: Table) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (info.dtype, info.shape) for name, info in infos.items()}


def check_prediction(source: Path, destination: Path, name: str) -> None:
    """What is written has the predicted names, dtypes, shapes and bytes, on any number of cards."""
    config, recipe = read_config(source), load_recipe(name)
    foreseen = predicted_tensors(Checkpoint(source).infos, config, recipe)
    runs.run(source, destination, adjusted(recipe, method=Method.RTN.value))
    written = Checkpoint(destination).infos
    assert kinds(foreseen) == kinds(written)
    assert sharded(config, foreseen) == sharded(config, written)
    whole = sharded(config, foreseen).on(1)
    shapes = sum(info.nbytes for info in written.values() if info.dtype is torch.int64)
    assert 0 <= Checkpoint(destination).nbytes - whole <= shapes  # vLLM merges weight_shapes


@pytest.mark.parametrize("variant", ["scout", "maverick", "guard", "scout-text-only"])
@pytest.mark.parametrize("name", shipped_recipes())
def test_prediction_and_written_files_agree(variant: str, name: str, tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", tiny.VARIANTS[variant])
    check_prediction(source, tmp_path / "out", name)


@pytest.mark.parametrize("name", shipped_recipes())
def test_prediction_and_written_files_agree_on_the_pocket_model(name: str, tmp_path: Path) -> None:
    check_prediction(POCKET_MODEL, tmp_path / "out", name)


def test_sizes_are_those_that_vllm_asserts(originals: dict[str, Table]) -> None:
    """`Llama4Attention`: heads divide by the cards, and key/value heads by them or they by those;
    `CompressedTensorsWNA16MoE`: groups of down_proj's scales don't cross cards."""
    config, infos = predicted(originals["scout"], "scout", "int4")
    assert sharded(replace(config, num_heads=30), infos).sizes == (1, 2)
    assert sharded(replace(config, num_kv_heads=4), infos).sizes == (1, 2, 4, 8)
    variant = replace(tiny.SCOUT, width=256, expert_size=256)
    small = parse_config(tiny.config_json(variant), "tiny")
    plain = test_inspect.bf16(tiny.config_json(variant))
    assert sharded(small, plain).sizes == (1, 2, 4)  # 4 heads
    assert sharded(small, predicted_tensors(plain, small, load_recipe("int4"))).sizes == (1, 2)


def test_more_cards_than_key_value_heads_repeat_them(originals: dict[str, Table]) -> None:
    """`QKVParallelLinear`: a head cannot be halved."""
    config, infos = parse_config(REAL["scout"], "scout"), originals["scout"]
    [piece] = sharded(config, {name: info for name, info in infos.items()
                               if name.endswith("layers.0.self_attn.k_proj.weight")
                               and name.startswith("language")}).pieces  # fmt: skip
    head = 128 * 5120 * 2
    assert [piece.on(cards) for cards in (1, 4, 8, 16)] == [8 * head, 2 * head, head, head]


def test_the_vocabulary_is_padded_as_in_vllm() -> None:
    """`vocab_parallel_embedding.py`: rows up to a multiple of 64."""
    config = parse_config(REAL["scout"], "scout")
    embedding = {"language_model.model.embed_tokens.weight": test_inspect.tensor((1000, 10))}
    assert [sharded(config, embedding).on(cards) for cards in (1, 2, 8)] == [
        1024 * 20, 512 * 20, 128 * 20
    ]  # fmt: skip


def test_alternatives_are_the_same_from_the_original_and_from_any_result(
    originals: dict[str, Table],
) -> None:
    """Each is what its recipe makes of the original; what vLLM does not serve is left out."""
    config, infos = parse_config(REAL["scout"], "scout"), originals["scout"]
    found = alternatives(config, infos)
    assert list(found) == [
        "int8", "fp8", "mixed", "int4-g32", "int4-fp8", "int4-g64", "int4"
    ]  # fmt: skip
    for name, weights in found.items():
        assert weights == sharded(*predicted(infos, "scout", name))
    for name in ("mixed", "bnb-nf4"):
        assert alternatives(config, predicted_tensors(infos, config, load_recipe(name))) == found
