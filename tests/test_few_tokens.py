"""Experts that hardly any calibration token reached, in a layer of the trained pocket model.

The measure is the one that counts: KL(original || model with only those experts quantized) on
held-out text, against the same experts rounded to nearest.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from calibrate.data import calibration_tokens
from calibrate.layer import LayerQuantizer, Part
from calibrate.leaves import deal
from calibrate.routing import views
from calibrate.streams import Streams
from evals.likelihood import compared, summary
from llama4q.checkpoint import INDEX, Checkpoint
from llama4q.config import ModelConfig, read_config
from llama4q.hidden import Spool
from llama4q.hub import resolve
from llama4q.model import (
    DecoderLayer,
    Linear,
    Mlp,
    Moe,
    attention,
    feed_forward_input,
    logits,
    route,
)
from llama4q.recipe import Method, Solver, load_recipe
from llama4q.stream import advance, embed
from llama4q.text import parse_source
from llama4q.tokens import evaluation_tokens, load_tokenizer
from llama4q.weights import LayerReader

LAYER = 2
STARVED = (0, 1, 2, 3, 4, 5)


@dataclasses.dataclass(frozen=True)
class Scene:
    """The pocket model, and the hidden states that reach one layer's feed-forward."""

    source: Path
    config: ModelConfig
    reader: LayerReader
    layer: DecoderLayer  # whose attention adds nothing: the states have passed it
    hidden: torch.Tensor  # [N, D]
    expert: torch.Tensor  # [N]


@pytest.fixture(scope="module")
def scene() -> Scene:
    source = resolve("pocket").folder
    config = read_config(source)
    reader = LayerReader(Checkpoint(source), config, torch.float32)
    drawn = calibration_tokens(
        parse_source(None), load_tokenizer(source), samples=8, length=512, seed=1
    )
    with torch.inference_mode():
        batches = embed(reader.embedding(), drawn.tokens)
        for index in range(LAYER):
            advance(config, reader.layer(index), batches)
        layer = reader.layer(LAYER)
        states = torch.cat(
            [batch + layer.o(attention(config, layer, batch)) for batch in batches]
        ).flatten(0, 1)
        silent = dataclasses.replace(layer, o=Linear(torch.zeros_like(layer.o.weight)))
        moe = layer.feed_forward
        assert isinstance(moe, Moe)
        expert = route(moe, feed_forward_input(config, layer, states[None])).expert
    return Scene(source, config, reader, silent, states, expert)


class Collected:
    """Parts of a layer that nobody has written before, kept in memory."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def written(self, number: int) -> None:
        return None

    def write(self, number: int, part: Part) -> None:
        self.tensors |= part.tensors


def ignore(_: object) -> None:
    return None


def quantized(scene: Scene, tokens: int, method: Method, folder: Path) -> Checkpoint:
    """The layer, quantized when each STARVED expert sees `tokens` of its tokens."""
    keep = torch.ones_like(scene.expert, dtype=torch.bool)
    for number in STARVED:
        keep[torch.nonzero(scene.expert == number).squeeze(1)[tokens:]] = False
    dealt = deal([torch.nonzero(keep)])  # sequences of one token each
    batches = [scene.hidden[rows] for rows in dealt.batches]
    recipe = dataclasses.replace(load_recipe("int4"), solver=Solver(method=method))
    with torch.inference_mode():
        seen = views(scene.reader)
        quantizer = LayerQuantizer(scene.config, recipe, scene.layer, seen, ignore, ignore)
        spool, parts = Spool(), Collected()
        shapes = [batch.shape for batch in batches]
        served = spool.store(shapes, scene.hidden.dtype)
        for number, batch in enumerate(batches):
            served[number] = batch
        counts = quantizer.quantize(Streams(served, spool.copy(served), dealt), parts)
    assert [counts[number] for number in STARVED] == [tokens] * len(STARVED)
    folder.mkdir()
    tensors = parts.tensors
    save_file(tensors, str(folder / "layer.safetensors"))
    where = {"weight_map": dict.fromkeys(tensors, "layer.safetensors")}
    (folder / INDEX).write_text(json.dumps(where))
    return Checkpoint(folder)


def divergence(scene: Scene, checkpoint: Checkpoint) -> float:
    """KL in nats a token when just the STARVED experts come from `checkpoint`."""
    served = LayerReader(checkpoint, scene.config, torch.float32)
    tokenizer = load_tokenizer(scene.source)
    windows = evaluation_tokens(parse_source(None), tokenizer, windows=16, length=512)
    collected = []
    with torch.inference_mode():
        streams = [embed(scene.reader.embedding(), [windows.tokens]) for _ in range(2)]
        for index in range(scene.config.num_layers):
            layer = scene.reader.layer(index)
            advance(scene.config, layer, streams[0])
            if index == LAYER:
                taken = {number: served.expert(index, number) for number in STARVED}
                layer = with_experts(layer, taken)
            advance(scene.config, layer, streams[1])
        head = scene.reader.head()
        for window, original, other in zip(
            windows.tokens, streams[0][0], streams[1][0], strict=True
        ):
            scores = [logits(scene.config, head, hidden[:-1]) for hidden in (original, other)]
            collected.append(compared([(scores[0], scores[1], window[1:])]))
    return float(summary(collected)["kl_mean"])


def with_experts(layer: DecoderLayer, taken: Mapping[int, Mlp]) -> DecoderLayer:
    moe = layer.feed_forward
    assert isinstance(moe, Moe)
    experts = tuple(taken.get(number, expert) for number, expert in enumerate(moe.experts))
    return dataclasses.replace(layer, feed_forward=dataclasses.replace(moe, experts=experts))


@pytest.mark.parametrize("tokens", [0, 3, 50])
def test_no_worse_than_rounding_and_not_zeroed(tokens: int, scene: Scene, tmp_path: Path) -> None:
    ours = quantized(scene, tokens, Method.GPTQ, tmp_path / "ours")
    rounding = quantized(scene, tokens, Method.RTN, tmp_path / "rounding")
    reader = LayerReader(ours, scene.config, torch.float32)
    for number in STARVED:
        expert = reader.expert(LAYER, number)
        assert expert.gate_up.weight.abs().mean() > 0.01
        assert expert.down.weight.abs().mean() > 0.001
    print(divergence(scene, ours), divergence(scene, rounding))
    assert divergence(scene, ours) <= divergence(scene, rounding)
