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
from llama4q.verify import Untouched, kept_tensors, verify

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


def reshape_a_norm(tensors: Tensors) -> None:
    name = "language_model.model.layers.1.input_layernorm.weight"
    tensors[name] = tensors[name][1:].clone()


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
        (reshape_a_norm, r"layers.1.input_layernorm.weight is torch.bfloat16 \(127,\), expected"),
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
        return verify(
            written, kept_tensors(Checkpoint(source).infos, config, recipe), config, recipe
        )

    assert checked()["scales"] == 4 * 3 * 5  # layers, projections, experts and the shared one
    damage(tensors)
    with pytest.raises(UserError, match=words):
        checked()


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor + 0.01,
        lambda tensor: tensor.flatten(),
        lambda tensor: tensor.view(torch.float16),
        lambda tensor: torch.where(tensor == 0, -tensor, tensor),  # equal, but other bits
    ],
)
def test_a_tensor_that_arrives_with_other_bits_is_named(
    change: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    sent = {"zeros": torch.zeros(2, 2, dtype=torch.bfloat16), "ones": torch.ones(3)}
    kept = Untouched(sent.items())
    save_file(dict(kept), str(tmp_path / "all.safetensors"))
    told = kept.arrived(PartReader(tmp_path, ["all.safetensors"]))
    assert set(told["untouched"]) == set(sent)
    save_file({**sent, "zeros": change(sent["zeros"])}, str(tmp_path / "all.safetensors"))
    with pytest.raises(UserError, match="zeros differs from the source"):
        kept.arrived(PartReader(tmp_path, ["all.safetensors"]))
