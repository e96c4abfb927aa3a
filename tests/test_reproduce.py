"""A checkpoint made again from its own report. The authority is the first run's bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file

from llama4q.checkpoint import INDEX
from llama4q.export import REPORTS
from llama4q.hub import POCKET_MODEL
from llama4q.manifest import MANIFEST, manifest

from . import tiny
from .test_bad_input import VARIANT, with_tokenizer
from .test_custody import planted, quantized, ran


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = with_tokenizer(tiny.write(tmp_path_factory.mktemp("source"), VARIANT))
    shutil.copy(POCKET_MODEL / "processor_config.json", folder)
    return folder


@pytest.fixture(scope="module")
def first(source: Path) -> Path:
    """With an evaluation, and text chosen from more than is needed."""
    return quantized(source, source.parent / "first", "--candidates", "2", "--seed", "3")


@pytest.fixture
def folder(first: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(first, tmp_path / "copy"))


def reported(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the report, and the manifest with it."""
    report = json.loads((folder / "report.json").read_bytes())
    change(report)
    (folder / "report.json").write_text(json.dumps(report))
    (folder / MANIFEST).write_bytes(manifest(folder))


def refused(folder: Path, *options: object) -> str:
    found = ran("reproduce", folder, *options)
    assert found.exit_code == 1, found.output
    line = found.stderr.splitlines()[-1]
    assert line.startswith("Error: ")
    return line.removeprefix("Error: ")


def test_the_same_bytes(first: Path, source: Path, tmp_path: Path) -> None:
    """Of every file but the reports; that the first run was evaluated leaves no trace."""
    again = tmp_path / "again"
    found = ran("reproduce", first, "--into", again, "--memory", "2GB")
    assert found.exit_code == 0, found.output
    shards = len(list(first.glob("*.safetensors")))
    assert found.stdout == f"same bytes: {shards} shards and config.json\n"
    names = {path.name for path in first.iterdir()} - {*REPORTS, MANIFEST}
    assert names < {path.name for path in again.iterdir()}
    for name in names:
        assert (again / name).read_bytes() == (first / name).read_bytes(), name
    assert ran("verify", again, "--against", source).exit_code == 0


def test_what_differs_is_measured(folder: Path, tmp_path: Path) -> None:
    """Another solver's codes: exactly the weights that differ, by as much as they do."""

    def change(report: dict[str, Any]) -> None:
        report["recipe"]["solver"]["beams"] = 1
        report["versions"]["torch"] = "0.1"
        report["machine"]["processor"] = "Abacus"

    reported(folder, change)
    again = tmp_path / "again"
    found = ran("reproduce", folder, "--into", again, "--json")
    assert found.exit_code == 1, found.stderr
    said = json.loads(found.stdout)
    assert not said["same"]
    ours, theirs = (weights(side) for side in (folder, again))
    gaps = {name: (ours[name] - theirs[name]).abs().max().item() for name in ours}
    assert {one["name"]: one["largest"] for one in said["weights"]} == {
        name: pytest.approx(gap) for name, gap in gaps.items() if gap
    }
    assert len(said["weights"]) > 5
    shares = [one["share"] for one in said["weights"]]
    assert shares == sorted(shares, reverse=True)
    there = {one["what"]: one["recorded"] for one in said["circumstances"]}
    assert there == {"versions torch": "0.1", "machine processor": "Abacus"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """What compressed-tensors makes of the codes."""
    index = json.loads((folder / INDEX).read_bytes())["weight_map"]
    stored: dict[str, torch.Tensor] = {}
    for shard in set(index.values()):
        stored |= load_file(folder / shard)
    found = {}
    for name in [name for name in stored if name.endswith(".weight_packed")]:
        module = name.removesuffix(".weight_packed")
        scale = stored[f"{module}.weight_scale"].float()
        shape = torch.Size(stored[f"{module}.weight_shape"].tolist())
        codes = unpack_from_int32(stored[name], 4, shape).float()
        found[module] = codes * scale.repeat_interleave(shape[1] // scale.shape[1], dim=1)
    return found


def test_differences_are_shown(folder: Path, tmp_path: Path) -> None:
    """Also of a tensor that was left alone."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["language_model.model.norm.weight"][0] += 1
        tensors["language_model.model.layers.0.feed_forward.experts.0.up_proj.weight_scale"] *= 2

    planted(folder, change)
    found = ran("reproduce", folder, "--into", tmp_path / "again")
    assert found.exit_code == 1
    first, _, scaled, norm, *rest = found.stdout.splitlines()
    assert first.endswith("files differ, in 2 weights:")
    assert scaled.startswith("language_model.model.layers.0.feed_forward.experts.0.up_proj  int4 ")
    assert scaled.endswith(" 50.00%")
    assert norm.startswith("language_model.model.norm.weight ")
    assert rest[-1] == "versions, processor, threads and kernels are those of the recorded run"


def test_a_run_that_cannot_be_repeated(folder: Path, source: Path, tmp_path: Path) -> None:
    into = ("--into", tmp_path / "again")

    def other_tokens(report: dict[str, Any]) -> None:
        report["calibration"]["digest"] = "0" * 64

    def older(report: dict[str, Any]) -> None:
        del report["machine"]

    def moved(report: dict[str, Any]) -> None:
        report["source"]["name"] = str(tmp_path / "gone")

    reported(folder, other_tokens)
    said = refused(folder, *into)
    assert said.startswith("calibration text pocket: gives other tokens than those of the recorded")
    assert f"{'0' * 12}... then" in said
    reported(folder, moved)
    assert refused(folder, *into).startswith(f"{tmp_path / 'gone'}: no such folder")
    assert "gives other tokens" in refused(folder, "--source", source, *into)  # found, then
    reported(folder, older)
    assert "is of an older llama4q" in refused(folder, *into)
    (folder / "config.json").write_text("{}")
    assert f"{folder / 'config.json'}: is truncated" in refused(folder, *into)
    assert not (tmp_path / "again").exists()
