"""A checkpoint is what a run finished: every fault that is planted is one line.

The authority on the faults are the faults: each is planted with manifest and report made to agree
with it, as somebody would who made the folder. Shipped recipes pass, whatever their codes.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from compressed_tensors.compressors.pack_quantized.helpers import (
    pack_to_int32,
    unpack_from_int32,
)
from safetensors.torch import load_file, save_file

import cli
from llama4q.checkpoint import INDEX, Checkpoint, sha256
from llama4q.hub import POCKET_MODEL
from llama4q.manifest import MANIFEST, manifest
from llama4q.recipe import shipped_recipes

from . import tiny
from .test_bad_input import QUICK, VARIANT, with_tokenizer

Tensors = dict[str, torch.Tensor]
EXPERTS = "language_model.model.layers.1.feed_forward.experts."


def ran(*arguments: object) -> Result:
    found = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exc_info
    return found


def quantized(source: Path, folder: Path, *options: str) -> Path:
    done = ran("quantize", source, folder, *QUICK, *options)
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = with_tokenizer(tiny.write(tmp_path_factory.mktemp("source"), VARIANT))
    shutil.copy(POCKET_MODEL / "processor_config.json", folder)
    return folder


@pytest.fixture(scope="module", params=["int4", "fp8"])
def sound(source: Path, request: pytest.FixtureRequest) -> Path:
    return quantized(source, source.parent / request.param, "--recipe", request.param)


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy to plant faults in."""
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def agreed(folder: Path) -> None:
    """Report and manifest say what is there."""
    path = folder / "report.json"
    report = json.loads(path.read_bytes())
    report["files"] = {name: sha256(folder / name) for name in report["files"]}
    path.write_text(json.dumps(report))
    (folder / MANIFEST).write_bytes(manifest(folder))


def planted(folder: Path, change: Callable[[Tensors], None]) -> None:
    """Change tensors where they lie."""
    index = json.loads((folder / INDEX).read_bytes())["weight_map"]
    every: Tensors = {}
    for shard in set(index.values()):
        every |= load_file(folder / shard)
    change(every)
    for shard in set(index.values()):
        part = {name: every[name].contiguous() for name, held in index.items() if held == shard}
        save_file(part, str(folder / shard))
    agreed(folder)


def wrong(folder: Path, *options: object) -> str:
    """The line that `verify` has for it."""
    found = ran("verify", folder, *options)
    assert found.exit_code == 1, found.output
    assert "OK" not in found.stdout
    [line] = [line for line in found.stderr.splitlines() if line.startswith("Error: ")]
    return line.removeprefix("Error: ")


@pytest.mark.parametrize("recipe", shipped_recipes())
def test_what_every_recipe_writes_is_in_order(recipe: str, source: Path, tmp_path: Path) -> None:
    made = quantized(source, tmp_path / "out", "--recipe", recipe)
    report = json.loads((made / "report.json").read_bytes())
    found = ran("verify", made, "--against", source, "--json")
    assert found.exit_code == 0, found.output
    checked = json.loads(found.stdout)["checked"]
    linears = VARIANT.layers * (1 + 3 * (1 + VARIANT.experts))  # o_proj, shared and routed experts
    assert checked == {
        "files": len(list(made.iterdir())) - 1,
        "tensors": report["verified"]["tensors"],
        "scales": report["verified"]["scales"],
        "linears": linears,
        "side files": len([path for path in made.iterdir() if path.suffix != ".safetensors"]) - 1,
        "source's files": 7,  # config.json, generation config, processor, four of the tokenizer
        "untouched": report["verified"]["untouched"],
        "weights": linears,
    }
    assert ran("verify", made).stdout.splitlines()[-1] == "OK"


def test_rounded_codes_are_held_to_what_rounding_gives(source: Path, tmp_path: Path) -> None:
    folder = quantized(source, tmp_path / "out", "--method", "rtn")
    assert ran("verify", folder, "--against", source).exit_code == 0

    def one_code_by_one_step(tensors: Tensors) -> None:
        tensors[f"{EXPERTS}0.up_proj.weight_packed"][5, 3] ^= 1

    planted(folder, one_code_by_one_step)
    assert ran("verify", folder).exit_code == 0
    said = wrong(folder, "--against", source)
    assert f"{EXPERTS}0.up_proj (int4) is farther from the source than its rounding in out" in said


def swap(one: str, other: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(f"{EXPERTS}{one}.")]:
            twin = f"{EXPERTS}{other}.{name.removeprefix(f'{EXPERTS}{one}.')}"
            tensors[name], tensors[twin] = tensors[twin], tensors[name]

    return change


def scale(tensors: Tensors) -> None:
    tensors[f"{EXPERTS}1.down_proj.weight_scale"] *= 1.5


def one_output_lost(tensors: Tensors) -> None:
    name = f"{EXPERTS}1.down_proj.weight"
    if name in tensors:
        tensors[name][7] = torch.zeros(128).to(tensors[name].dtype)
    else:
        tensors[f"{name}_packed"][7] = -0x77777778  # eight codes of 0, stored as 8


def transpose(tensors: Tensors) -> None:
    """As if somebody had forgotten it: the right shape, as the matrix is square."""
    name = f"{EXPERTS}0.gate_proj.weight"
    if name in tensors:
        tensors[name] = tensors[name].T
        return
    codes = unpack_from_int32(tensors[f"{name}_packed"], 4, torch.Size((128, 128)))
    tensors[f"{name}_packed"] = pack_to_int32(codes.T.contiguous(), 4)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (swap("0", "1"), r"0\.gate_proj .* has a gain of -?0\.[01]\d\d along the source, which"),
        (scale, r"1\.down_proj .* has a gain of 1\.[45]\d\d along the source, which"),
        (transpose, r"0\.gate_proj .* has a gain of -?0\.[01]\d\d along the source, which"),
        (one_output_lost, r"1\.down_proj .* has a gain of -?0\.000 along the source in output 7,"),
    ],
)
def test_a_weight_that_is_not_the_sources(
    fault: Callable[[Tensors], None], words: str, folder: Path, source: Path
) -> None:
    """What no hash tells when somebody made it so: only the source does."""
    planted(folder, fault)
    assert ran("verify", folder).exit_code == 0
    assert re.search(f"{re.escape(EXPERTS)}{words}", wrong(folder, "--against", source))


def test_what_was_left_alone_is_the_sources(folder: Path, source: Path) -> None:
    def one_bit(tensors: Tensors) -> None:
        tensors["vision_model.class_embedding"].view(torch.int16)[3] ^= 1

    planted(folder, one_bit)
    assert ran("verify", folder).exit_code == 0
    said = wrong(folder, "--against", source)
    assert f"vision_model.class_embedding differs from {source}" in said


def test_another_source(sound: Path, source: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(source, tmp_path / "other"))
    tiny.write(other, VARIANT, seed=1)
    assert "differs from" in wrong(sound, "--against", other)
    (other / "tokenizer.json").write_text("{}")
    assert "tokenizer.json: is not what" in wrong(sound, "--against", other)


def test_one_flipped_byte(folder: Path) -> None:
    shard = next(folder.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert wrong(folder).startswith(f"{shard}: is not as it was written")


def rename(old: str, new: str) -> Callable[[Path], None]:
    """A tensor under another name, in shard and index."""

    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_bytes())
        shard = index["weight_map"].pop(old)
        index["weight_map"][new] = shard
        (folder / INDEX).write_text(json.dumps(index))
        part = load_file(folder / shard)
        part[new] = part.pop(old)
        save_file(part, str(folder / shard))

    return change


def infinite_scale(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{EXPERTS}0.up_proj.weight_scale"][0, 0] = torch.inf

    planted(folder, change)


def config(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_bytes())
        change(raw["quantization_config"])
        (folder / "config.json").write_text(json.dumps(raw))

    return edit


def lose(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def forget_in_the_index(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_bytes())
    del index["weight_map"]["language_model.model.norm.weight"]
    (folder / INDEX).write_text(json.dumps(index))


def add_a_shard(folder: Path) -> None:
    save_file({"more": torch.zeros(1)}, str(folder / "more.safetensors"))


NORM = "language_model.model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (rename(NORM, f"{NORM}s"), f"tensor {NORM} is missing"),
        (
            rename("vision_model.class_embedding", f"{EXPERTS}up_proj"),
            "experts.up_proj is no tensor of a served Llama 4",
        ),
        (
            rename(f"{EXPERTS}1.up_proj.weight_scale", f"{EXPERTS}1.up_proj.scale"),
            "experts.1.up_proj.scale is no tensor of a served Llama 4",
        ),
        (infinite_scale, "up_proj.weight_scale holds scales that are not finite"),
        (forget_in_the_index, "language_model.model.norm.weight is not in both"),
        (add_a_shard, "more.safetensors is not the shard that report.json tells of"),
        (lose(INDEX), f"has no {INDEX}"),
        (lose("report.json"), "holds no report.json of 'llama4q quantize'"),
        (lose("tokenizer.json"), "has no tokenizer.json or tokenizer.model, which engines need"),
        (lose("processor_config.json"), "has no processor_config.json or preprocessor_config.json"),
        (config(lambda raw: raw.update(format="marlin")), 'quantization_config format is "marlin"'),
        (config(lambda raw: raw.pop("ignore")), "quantization_config ignore is null, engines need"),
        (
            config(lambda raw: raw["config_groups"]["group_0"]["weights"].update(actorder="group")),
            'config_groups group_0 weights actorder is "group", engines need null',
        ),
    ],
)
def test_what_engines_would_trip_over(
    fault: Callable[[Path], None], words: str, folder: Path
) -> None:
    assert ran("verify", folder).exit_code == 0
    fault(folder)
    if (folder / "report.json").exists():
        agreed(folder)
    else:
        (folder / MANIFEST).write_bytes(manifest(folder))
    said = wrong(folder)
    assert words in said, said
    assert str(folder) in said


def test_a_checkpoint_of_somebody_else(source: Path) -> None:
    said = wrong(source)
    assert said.startswith(f"{source}: not a finished llama4q checkpoint, it has no {MANIFEST}")


def test_experts_are_read_one_by_one(
    sound: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor is read whole that holds all experts."""
    read: list[str] = []
    get = Checkpoint.get

    def noted(self: Checkpoint, name: str) -> torch.Tensor:
        read.append(name)
        return get(self, name)

    monkeypatch.setattr(Checkpoint, "get", noted)
    assert ran("verify", sound, "--against", source).exit_code == 0
    assert read
    assert not any(name.endswith(("experts.gate_up_proj", "experts.down_proj")) for name in read)
