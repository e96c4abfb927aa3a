"""Verification notices what serving engines do not: each kind of damage, done on purpose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama4q.checkpoint import Checkpoint, PartReader
from llama4q.config import read_config
from llama4q.errors import UserError
from llama4q.recipe import load_recipe
from llama4q.verify import verify

from . import runs, tiny

Tensors = dict[str, torch.Tensor]
EXPERT = "language_model.model.layers.2.feed_forward.experts.1."


def lose_an_expert(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith(EXPERT)]:
        del tensors[name]


def zero_a_scale(tensors: Tensors) -> None:
    tensors[f"{EXPERT}up_proj.weight_scale"][3, 0] = 0


def blow_up_a_scale(tensors: Tensors) -> None:
    tensors[f"{EXPERT}up_proj.weight_scale"][3, 0] = torch.inf


def touch_a_norm(tensors: Tensors) -> None:
    tensors["language_model.model.layers.1.input_layernorm.weight"][7] += 0.01


def touch_the_vision_tower(tensors: Tensors) -> None:
    tensors["multi_modal_projector.linear_1.weight"][0, 0] = 0


def add_a_tensor(tensors: Tensors) -> None:
    tensors["language_model.model.layers.1.extra"] = torch.zeros(1)


def change_a_dtype(tensors: Tensors) -> None:
    name = f"{EXPERT}down_proj.weight_scale"
    tensors[name] = tensors[name].float()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose_an_expert, "missing"),
        (zero_a_scale, "are 0"),
        (blow_up_a_scale, "not finite"),
        (touch_a_norm, "layers.1.input_layernorm.weight differs from the source"),
        (touch_the_vision_tower, "linear_1.weight differs from the source"),
        (add_a_tensor, "layers.1.extra and 0 more are unexpected"),
        (change_a_dtype, "is torch.float32"),
    ],
)
def test_damage_is_named(damage: Callable[[Tensors], None], words: str, tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", tiny.SCOUT)
    runs.run(source, tmp_path / "quantized", "int4")
    tensors: Tensors = {}
    for shard in sorted((tmp_path / "quantized").glob("*.safetensors")):
        tensors |= load_file(shard)
    recipe, config = load_recipe("int4"), read_config(source)

    def checked() -> dict[str, int]:
        save_file(tensors, str(tmp_path / "all.safetensors"))
        written = PartReader(tmp_path, ["all.safetensors"])
        return verify(written, Checkpoint(source), config, recipe)

    assert checked()["scales"] == 4 * 3 * 5  # layers, projections, experts and the shared one
    damage(tensors)
    with pytest.raises(UserError, match=words):
        checked()
