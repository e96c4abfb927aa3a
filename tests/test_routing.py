"""Errors weighed by what later routers see of them: against the routers' own logits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from calibrate.data import calibration_tokens
from calibrate.routing import output_metric, view, views
from evals.questions import ask
from evals.tasks import Ladder
from llama4q.checkpoint import Checkpoint
from llama4q.config import read_config
from llama4q.hub import resolve
from llama4q.model import Moe, feed_forward_input
from llama4q.recipe import Solver, load_recipe
from llama4q.text import parse_source
from llama4q.tokens import load_tokenizer
from llama4q.weights import LayerReader

from . import runs, tiny


def reader_of(folder: Path) -> LayerReader:
    return LayerReader(Checkpoint(folder), read_config(folder), torch.float32)


@pytest.mark.parametrize("kind", [tiny.SCOUT, tiny.MAVERICK])
def test_the_metric_against_the_logits_of_later_routers(kind: tiny.Variant, tmp_path: Path) -> None:
    """Of an error that leaves the norm alone, so that logits move linearly."""
    reader = reader_of(tiny.write(tmp_path / "source", kind))
    config = reader.config
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 1, config.hidden_size, generator=generator)
    size = hidden.square().mean().sqrt()
    error = torch.randn(config.hidden_size, generator=generator)
    small = 1e-3 * (error - (error @ hidden[0, 0]) / hidden.square().sum() * hidden[0, 0])
    expected = small.square().sum()
    for index in sorted(config.moe_layers):
        layer = reader.layer(index)
        moe = layer.feed_forward
        assert isinstance(moe, Moe)
        before, after = (
            (feed_forward_input(config, layer, states) @ moe.router)[0]
            for states in (hidden, hidden + small)
        )
        moved = (after - before) * size
        if index > 0:
            plain = layer.post_norm[:, None] * moe.router
            total = (plain - plain.mean(dim=1, keepdim=True)).square().sum()
            centred = moved - moved.mean()
            expected = expected + 0.3 * config.hidden_size * centred.square().sum() / total
    metric = output_metric(views(reader), 0, 0.3)
    assert metric is not None
    assert float(small @ metric @ small) == pytest.approx(float(expected), rel=1e-2)


def test_no_later_router_or_no_weight_is_no_metric(tmp_path: Path) -> None:
    reader = reader_of(tiny.write(tmp_path / "source", tiny.SCOUT))
    last = reader.config.num_layers - 1
    assert output_metric(views(reader), last, 0.3) is None
    assert output_metric(views(reader), 0, 0.0) is None
    assert output_metric({}, 0, 0.3) is None


def test_a_router_that_tells_no_experts_apart_counts_nothing() -> None:
    same = view(torch.ones(8), torch.ones(8, 4))
    assert torch.equal(same, torch.zeros(8, 4))


def test_more_tokens_keep_their_expert_on_the_pocket_model(tmp_path: Path) -> None:
    source = resolve("pocket").folder
    tokenizer = load_tokenizer(source)
    drawn = calibration_tokens(parse_source(None), tokenizer, samples=16, length=512, seed=0)
    asked = ask(tokenizer, None, 8, 512, Ladder([], [], 0))
    agreed = []
    for weight in (0.0, Solver().routing_weight):
        solver = Solver(beams=1, routing_weight=weight)
        recipe = dataclasses.replace(load_recipe("int3"), solver=solver)
        report = runs.run(source, tmp_path / str(weight), recipe, drawn.tokens, asked=asked)
        routing = report["evidence"]["layers"]
        agreed.append(sum(record["agreement"] for record in routing) / len(routing))
    assert 1 - agreed[1] < 0.95 * (1 - agreed[0])


def test_the_attention_answers_to_its_own_layers_router(tmp_path: Path) -> None:
    """In a model of one layer no router comes after down, but one after o_proj."""
    source = tiny.write(tmp_path / "source", tiny.Variant(layers=1, rope_scaling=tiny.SCOUT_ROPE))
    for weight in (0.0, 1.0):
        recipe = dataclasses.replace(load_recipe("int4-fp8"), solver=Solver(routing_weight=weight))
        runs.run(source, tmp_path / str(weight), recipe)
    name = "language_model.model.layers.0.self_attn.o_proj.weight"
    codes = [Checkpoint(tmp_path / str(weight)).get(name).float() for weight in (0.0, 1.0)]
    assert not torch.equal(codes[0], codes[1])
