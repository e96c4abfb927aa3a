"""A run that was stopped goes on where it was and ends with the very same bytes.

The authority is an undisturbed run. tests/kill_runs.py does the killing, in a process of its own.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from calibrate.codes import GroupReport
from llama4q.checkpoint import INDEX, Checkpoint
from llama4q.errors import UserError
from llama4q.hidden import _drain as drain
from llama4q.machine import Memory
from llama4q.manifest import check_manifest
from llama4q.recipe import Recipe, load_recipe
from llama4q.writer import WORK

from . import runs, tiny
from .kill_runs import (
    ANYWHERE,
    AT_INDEX,
    CHAIN,
    FINISHED,
    FINISHING,
    INDEXED,
    LAST_STEPS,
    LAYERS,
    differences,
)

ROOT = Path(__file__).parent.parent
SMALL = tiny.Variant(layers=3, experts=2, rope_scaling=tiny.SCOUT_ROPE)
PARTS = (2, 4)  # groups in each part of SMALL's layers
GROUPS = sum(PARTS)


class Stopped(BaseException):
    """As KeyboardInterrupt: nothing in the program may catch it."""


class StopAt(runs.Quiet):
    """A Progress that stops the run when so many groups are done."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.left = groups

    def group(self, report: GroupReport) -> None:
        super().group(report)
        self.left -= 1
        if not self.left:
            raise Stopped


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests/kill_runs.py saw."""
    folder = tmp_path_factory.mktemp("killed")
    # one thread: on a busy machine OpenMP's threads wait for each other at every step
    found = subprocess.run(
        [sys.executable, "-m", "tests.kill_runs", str(folder)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    seen: dict[str, Any] = json.loads(found.stdout)
    return seen


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("source"), SMALL)


@pytest.fixture(scope="module")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "out"
    runs.run(source, folder)
    return folder


def phase(kill: dict[str, Any]) -> str:
    named = {0: "no layer yet", LAST_STEPS: "last steps", INDEXED: "index", FINISHED: "finished"}
    return named.get(kill["progress"], "layers")


def stopped(source: Path, folder: Path, groups: int) -> Path:
    """A folder as a run leaves it that is stopped after so many groups."""
    with pytest.raises(Stopped):
        runs.run(source, folder, progress=StopAt(groups))
    return folder


def resumed(source: Path, folder: Path, reference: Path) -> runs.Quiet:
    """Go on to the end; the same files as the reference's, nothing left of the work folder."""
    progress = runs.Quiet()
    runs.run(source, folder, progress=progress)
    assert list(differences(reference, folder)) == []
    assert not (folder / WORK).exists()
    return progress


def flip_byte(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_killed_anywhere_and_resumed(killed: dict[str, Any]) -> None:
    """SIGKILL at random moments of the whole run, of its last steps, at the index and at the
    manifest: at least 20 before the run had ended."""
    kills = killed["kills"]
    phases = Counter(phase(kill) for kill in kills)
    print(f"killed in phase: {dict(phases)}")
    assert sum(phases.values()) == ANYWHERE + FINISHING + 2 * AT_INDEX
    assert sum(phases.values()) - phases["finished"] >= 20
    assert phases["no layer yet"] >= 1
    assert phases["layers"] >= 5
    assert phases["last steps"] + phases["index"] + phases["finished"] >= 2
    assert len({kill["progress"] for kill in kills}) >= LAYERS
    for kill in kills:
        assert kill["differences"] == [], kill
        assert kill["is_checkpoint"] == kill["has_index"], kill
        assert kill["has_manifest"] == kill["complete"], kill
        if kill["code"]:  # killed so late that the checkpoint was complete
            assert phase(kill) == "finished", kill
            assert kill["said"].endswith(
                "already holds a finished checkpoint; choose another folder or delete it"
            )


def test_killed_again_and_again(killed: dict[str, Any]) -> None:
    """One run, killed in each of its layers, is as far each time as it was before or further."""
    chain = killed["chain"]
    reached = [kill["progress"] for kill in chain]
    assert len(chain) == CHAIN
    assert reached == sorted(reached)
    assert reached[-1] >= CHAIN - 1
    assert chain[-1]["code"] == 0, chain[-1]["said"]
    assert chain[-1]["differences"] == []


@pytest.mark.parametrize("groups", [1, 3, GROUPS, GROUPS + 1, 2 * GROUPS + 3])
def test_parts_already_written_are_not_solved_again(
    groups: int, source: Path, reference: Path, tmp_path: Path
) -> None:
    folder = stopped(source, tmp_path / "out", groups)
    progress = resumed(source, folder, reference)
    ends = accumulate(PARTS * SMALL.layers)
    written = max((end for end in ends if end < groups), default=0)
    assert progress.replayed_groups == written
    assert len(progress.groups) == SMALL.layers * GROUPS - written


def test_finishing_needs_no_layer(source: Path, reference: Path, tmp_path: Path) -> None:
    """Stopped after the shards have their final names: no layer is read or run again."""
    folder = without_publishing(source, tmp_path / "out")
    progress = resumed(source, folder, reference)
    assert progress.total == 0
    assert not progress.groups
    assert not progress.replayed_groups


def without_publishing(source: Path, folder: Path) -> Path:
    """A folder as it is just before the side files and the index are written."""

    def stop(*_: object) -> None:
        raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama4q.writer.CheckpointWriter.publish", stop)
        with pytest.raises(Stopped):
            runs.run(source, folder)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) == SMALL.layers * len(PARTS) + 1
    with pytest.raises(UserError, match=r"neither .* here"):
        Checkpoint(folder)
    return folder


def test_stopped_between_index_and_manifest(source: Path, reference: Path, tmp_path: Path) -> None:
    """The folder opens, but passes for no whole one; the same command finishes it."""

    def stop(*_: object) -> None:
        raise Stopped

    folder = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama4q.writer.manifest", stop)
        with pytest.raises(Stopped):
            runs.run(source, folder)
    assert Checkpoint(folder).names()
    with pytest.raises(UserError, match="not a finished llama4q checkpoint"):
        check_manifest(folder)
    assert not resumed(source, folder, reference).groups
    check_manifest(folder)


@pytest.mark.parametrize("at", [0, 100, -1])
@pytest.mark.parametrize(("layer", "part"), [(0, 0), (0, 1), (1, 1)])
def test_a_damaged_part_is_noticed_and_done_again(
    layer: int, part: int, at: int, source: Path, reference: Path, tmp_path: Path
) -> None:
    folder = stopped(source, tmp_path / "out", 2 * GROUPS + 1)
    flip_byte(folder / WORK / f"layer-{layer:05d}.{part:02d}.000.safetensors", at)
    assert resumed(source, folder, reference).replayed_groups == 2 * GROUPS - PARTS[part]


def test_a_truncated_and_a_missing_part_are_done_again(
    source: Path, reference: Path, tmp_path: Path
) -> None:
    folder = stopped(source, tmp_path / "out", 2 * GROUPS + 1)
    part = folder / WORK / "layer-00000.00.000.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    (folder / WORK / "layer-00001.01.000.safetensors").unlink()
    assert resumed(source, folder, reference).replayed_groups == GROUPS


def test_a_disk_too_full_for_hidden_states(
    source: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full once layer 0 is recorded: that layer is kept."""
    folder = tmp_path / "out"

    def full(file: Any, raw: memoryview) -> None:
        if (folder / WORK / "layer-00000.json").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        drain(file, raw)

    with monkeypatch.context() as patch:
        patch.setattr("llama4q.hidden._drain", full)
        with pytest.raises(UserError, match=r"hidden states do not fit \(No space left on device"):
            runs.run(source, folder, memory=Memory(rows=0))
    assert resumed(source, folder, reference).replayed_groups == GROUPS


def test_a_shard_damaged_while_finishing_is_refused(source: Path, tmp_path: Path) -> None:
    folder = without_publishing(source, tmp_path / "out")
    flip_byte(folder / "model-00002-of-00007.safetensors", -1)
    with pytest.raises(UserError, match=r"model-00002-of-00007.safetensors changed after it was"):
        runs.run(source, folder)
    assert not (folder / INDEX).exists()


def with_seed(recipe: Recipe, seed: int) -> Recipe:
    drawn = dataclasses.replace(recipe.calibration, seed=seed)
    return dataclasses.replace(recipe, calibration=drawn)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda source: {"recipe": "int4-g32"}, r'recipe name .*"int4" then, "int4-g32" now'),
        (
            lambda source: {"recipe": with_seed(load_recipe("int4"), 5)},
            r"recipe calibration seed .*0 then, 5 now",
        ),
        (
            lambda source: {"calibration": runs.tokens(source, 4, 96, seed=8)},
            r"calibration tokens .* then, .* now",
        ),
        (lambda source: {"dtype": torch.bfloat16}, r'dtype .*"float32" then, "bfloat16" now'),
    ],
)
def test_other_settings_are_refused_by_name(
    change: Callable[[Path], dict[str, Any]],
    named: str,
    source: Path,
    reference: Path,
    tmp_path: Path,
) -> None:
    folder = stopped(source, tmp_path / "out", GROUPS + 1)
    with pytest.raises(UserError, match=rf"an unfinished run with another {named}"):
        runs.run(source, folder, **change(source))
    assert resumed(source, folder, reference).replayed_groups == GROUPS


def test_another_source_is_refused(source: Path, tmp_path: Path) -> None:
    folder = stopped(source, tmp_path / "out", GROUPS + 1)
    other = tiny.write(tmp_path / "other", dataclasses.replace(SMALL, experts=3))
    with pytest.raises(UserError, match="an unfinished run with another source is here"):
        runs.run(other, folder)


def test_another_source_is_refused_at_once(source: Path, tmp_path: Path) -> None:
    folder = stopped(source, tmp_path / "out", GROUPS + 1)
    other = tiny.write(tmp_path / "other", SMALL, seed=1)
    with pytest.raises(UserError, match="unfinished run with another source is here"):
        runs.run(other, folder)


def test_a_byte_changed_in_the_source_is_noticed(source: Path, tmp_path: Path) -> None:
    """Only a sample of the weights is read at the start; what was copied is compared when its layer
    is replayed."""
    folder = stopped(source, tmp_path / "out", GROUPS + 1)
    name = "language_model.model.layers.0.input_layernorm.weight"
    other = shutil.copytree(source, tmp_path / "other")
    shard = other / Checkpoint(source).info(name).shard
    content = bytearray(shard.read_bytes())
    header = int.from_bytes(content[:8], "little")
    start = 8 + header + json.loads(content[8 : 8 + header])[name]["data_offsets"][0]
    assert not 0 <= start - len(content) // 2 < 65536  # outside of the sample
    content[start] ^= 1
    shard.write_bytes(content)
    with pytest.raises(
        UserError, match=r"layers\.0\.input_layernorm\.weight has changed since it was"
    ):
        runs.run(other, folder)
    assert not (folder / INDEX).exists()


def test_a_finished_checkpoint_is_not_touched(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    runs.run(source, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(UserError, match="already holds a finished checkpoint"):
        runs.run(source, folder)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
