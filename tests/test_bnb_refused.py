"""bitsandbytes' schemes: what is refused, and with which words."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from cli import main
from llama4q import bnb
from llama4q.checkpoint import Checkpoint, PartReader
from llama4q.config import read_config
from llama4q.errors import UserError
from llama4q.packing import pack, unpack
from llama4q.recipe import check_recipe, load_recipe, parse_recipe
from llama4q.schemes import BNB_NF4
from llama4q.verify import kept_tensors, verify

from . import runs, tiny
from .test_bnb import Tensors, random_weight, written
from .test_resume import SMALL


def test_recipes_that_mix(tmp_path: Path) -> None:
    config = read_config(tiny.write(tmp_path / "scout", tiny.SCOUT))
    for other in ("int4", "fp8", "bnb-int8"):
        mixed = parse_recipe(
            f"[schemes]\nexperts = 'bnb-nf4'\n[[override]]\nlayers = [0]\nexperts = '{other}'",
            "r.toml",
        )
        with pytest.raises(UserError, match=rf"^recipe r: mixes .*{other}.*; a checkpoint has one"):
            check_recipe(mixed, config)
    narrow = read_config(tiny.write(tmp_path / "narrow", tiny.Variant(expert_size=96)))
    with pytest.raises(UserError, match="96 inputs, no multiple of the group size 64 of bnb-nf4"):
        check_recipe(load_recipe("bnb-nf4"), narrow)
    check_recipe(load_recipe("bnb-int8"), narrow)


def test_without_the_package_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is read: SOURCE does not even exist; and when such a checkpoint is read."""
    source = tiny.write(tmp_path / "source", SMALL)
    runs.run(source, tmp_path / "out", "bnb-int8")
    bnb.functional.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    try:
        for command in (
            f"quantize {tmp_path / 'nothing'} {tmp_path / 'x'} --recipe bnb-nf4",
            f"eval {tmp_path / 'out'} --against {source}",
        ):
            done = CliRunner().invoke(main, command)
            assert done.exit_code == 1
            [line] = done.output.splitlines()
            assert line.startswith("Error: the schemes bnb-nf4 and bnb-int8 need bitsandbytes")
    finally:
        bnb.functional.cache_clear()


def lose_the_state(stored: Tensors) -> None:
    del stored["linear.weight.quant_state.bitsandbytes__nf4"]
    stored["linear.weight.quant_state.bitsandbytes__fp4"] = torch.zeros(3, dtype=torch.uint8)


def single_quantization(stored: Tensors) -> None:
    del stored["linear.weight.nested_absmax"]


def larger_blocks(stored: Tensors) -> None:
    name = "linear.weight.quant_state.bitsandbytes__nf4"
    text = bytes(stored[name].tolist()).replace(b'"blocksize": 64', b'"blocksize": 128', 1)
    stored[name] = torch.tensor(list(text), dtype=torch.uint8)


def fewer_codes(stored: Tensors) -> None:
    stored["linear.weight"] = stored["linear.weight"][:-1].clone()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lose_the_state, r"stored without weight\.quant_state"),
        (single_quantization, r"stored without weight\.nested_absmax"),
        (larger_blocks, "has the quant_state"),
        (fewer_codes, "weight is torch.uint8"),
    ],
)
def test_other_layouts_are_refused(
    change: Callable[[Tensors], None], words: str, tmp_path: Path
) -> None:
    stored = dict(pack("linear", bnb.quantize(random_weight(), BNB_NF4)))
    change(stored)
    with pytest.raises(UserError, match=rf"^linear: {words}.* are read$"):
        unpack(written(tmp_path, stored), "linear")


EXPERT = "language_model.model.layers.2.feed_forward.experts.1.up_proj."


def blow_up_a_scale(tensors: Tensors) -> None:
    tensors[f"{EXPERT}weight.nested_absmax"][0] = torch.inf


def spoil_the_table(tensors: Tensors) -> None:
    tensors[f"{EXPERT}weight.quant_map"][4] += 0.1


def spoil_the_state(tensors: Tensors) -> None:
    tensors[f"{EXPERT}weight.quant_state.bitsandbytes__nf4"][0] = 0


def swap_the_shape(tensors: Tensors) -> None:
    name = f"{EXPERT}weight.quant_state.bitsandbytes__nf4"
    text = bytes(tensors[name].tolist()).replace(b"[128, 128]", b"[256, 064]".replace(b"0", b" "))
    tensors[name] = torch.tensor(list(text), dtype=torch.uint8)


def lose_the_statistics(tensors: Tensors) -> None:
    del tensors[f"{EXPERT}weight.absmax"]


def blow_up_a_row(tensors: Tensors) -> None:
    tensors[f"{EXPERT}SCB"][5] = torch.nan


def another_format(tensors: Tensors) -> None:
    tensors[f"{EXPERT}weight_format"] += 1


@pytest.mark.parametrize(
    ("recipe", "damage", "words"),
    [
        ("bnb-nf4", blow_up_a_scale, "holds scales that are not finite or below 0"),
        ("bnb-nf4", spoil_the_table, "has another weight.quant_map"),
        ("bnb-nf4", spoil_the_state, "has an unreadable quant_state"),
        ("bnb-nf4", swap_the_shape, r"has the quant_state of shape \[256, 64\]"),
        ("bnb-nf4", lose_the_statistics, "missing"),
        ("bnb-int8", blow_up_a_row, "holds scales that are not finite or below 0"),
        ("bnb-int8", another_format, "weight_format"),
    ],
)
def test_damage_is_named(
    recipe: str, damage: Callable[[Tensors], None], words: str, tmp_path: Path
) -> None:
    source, folder = tiny.write(tmp_path / "source", tiny.SCOUT), tmp_path / "out"
    runs.run(source, folder, recipe)
    tensors: Tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
    chosen, config = load_recipe(recipe), read_config(source)

    def checked() -> dict[str, int]:
        save_file(tensors, str(tmp_path / "all.safetensors"))
        written = PartReader(tmp_path, ["all.safetensors"])
        return verify(
            written, kept_tensors(Checkpoint(source).infos, config, chosen), config, chosen
        )

    assert checked()["scales"] == 4 * 3 * 5  # layers, projections, experts and the shared one
    damage(tensors)
    with pytest.raises(UserError, match=words):
        checked()
