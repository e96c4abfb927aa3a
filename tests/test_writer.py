"""Writing checkpoints so that nothing half-written counts, and nobody else writes there.

The authority on contents is safetensors' own `load_file`; the disk that is full is a real one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llama4q.checkpoint import INDEX, SINGLE, Checkpoint
from llama4q.errors import UserError
from llama4q.manifest import MANIFEST, check_manifest
from llama4q.writer import WORK, CheckpointWriter

from .test_checkpoint import same, tensors

ROOT = Path(__file__).parent.parent
KEY = {"run": 1}
NOBODY = 65534


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def write_all(folder: Path, units: dict[str, dict[str, torch.Tensor]]) -> None:
    """Every unit, then the finished checkpoint."""
    with CheckpointWriter(folder, KEY) as writer:
        for unit, made in units.items():
            writer.write(unit, made.items(), {"unit": unit})
        written, digests = writer.assemble(units)
        side_files = {"config.json": b"{}", "report.json": b"[]", "tokenizer.json": b"1"}
        writer.publish(written, digests, side_files)


def opened(folder: Path, key: dict[str, Any]) -> None:
    """A run that begins and is stopped at once."""
    with CheckpointWriter(folder, key):
        pass


UNITS = {
    "layer-00000": {"a": torch.ones(4, 8), "b": torch.zeros(2, dtype=torch.bfloat16)},
    "layer-00001": {"c": torch.arange(12.0)},
    "nothing": {},
}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    units = {"one": tensors(), **UNITS}
    write_all(tmp_path / "out", units)
    ours = Checkpoint(tmp_path / "out")
    wanted = {name: tensor for made in units.values() for name, tensor in made.items()}
    assert set(ours.names()) == set(wanted)
    assert all(same(ours.get(name), wanted[name]) for name in wanted)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in wanted.values())
    assert not (tmp_path / "out" / WORK).exists()


def test_shards_stay_below_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama4q.writer.MAX_SHARD_BYTES", 100)
    sizes = {"a": 40, "b": 60, "c": 1, "d": 400, "e": 40, "f": 60}
    made = {name: torch.zeros(size, dtype=torch.uint8) for name, size in sizes.items()}
    write_all(tmp_path / "out", {"one": made, "two": {"g": torch.ones(1)}})
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    # in order, never above the limit unless one tensor is; each unit starts a shard of its own
    assert [sorted(load_file(shard)) for shard in shards] == [
        ["a", "b"], ["c"], ["d"], ["e", "f"], ["g"],
    ]  # fmt: skip
    assert [shard.name for shard in shards] == [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]


def test_index_and_manifest_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every final file appears by a rename; before the index the folder is no checkpoint, and
    before the manifest none that passes for a whole one."""
    out = tmp_path / "out"
    appeared: list[str] = []
    rename = os.replace

    def recorded(before: Path, after: Path) -> None:
        if after.name != MANIFEST:
            with pytest.raises(UserError):
                Checkpoint(out)
        with pytest.raises(UserError, match="not a finished llama4q checkpoint"):
            check_manifest(out)
        rename(before, after)
        if after.parent == out:
            appeared.append(after.name)

    monkeypatch.setattr("llama4q.writer.os.replace", recorded)
    write_all(out, UNITS)
    assert appeared[-3:] == ["config.json", INDEX, MANIFEST]
    assert set(check_manifest(out)) == set(appeared) - {MANIFEST}
    assert set(appeared) == {path.name for path in out.iterdir()}
    assert len(appeared) == len(set(appeared))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_whom_the_umask_lets_read_may_read(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_all(tmp_path / "out", UNITS)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {mode}, modes


def test_a_unit_counts_when_its_record_is_there_and_its_files_are_whole(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", KEY) as writer:
        assert writer.done("one") is None
        files = writer.write_files("one", UNITS["layer-00000"].items())
        assert writer.done("one") is None
        writer.record("one", files, {"note": [1, None]})
    [(name, digest)] = files.items()
    part = tmp_path / "out" / WORK / name
    assert digest == hashlib.sha256(part.read_bytes()).hexdigest()
    with CheckpointWriter(tmp_path / "out", KEY) as writer:
        again = writer.done("one")
    assert again is not None
    assert (again.files, again.memory) == (files, {"note": [1, None]})
    content = part.read_bytes()
    for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), content + b"\0"):
        part.write_bytes(damaged)
        assert writer.done("one") is None
    part.write_bytes(content)
    assert writer.done("one") is not None
    part.unlink()
    assert writer.done("one") is None


def test_final_names_can_be_given_twice(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", KEY) as writer:
        for unit, made in UNITS.items():
            assert not writer.finishing(UNITS)
            writer.write(unit, made.items(), {})
        assert not writer.finishing(UNITS)
        one = writer.assemble(UNITS)[1]
        assert writer.finishing(UNITS)
    before = contents(tmp_path / "out")
    with CheckpointWriter(tmp_path / "out", KEY) as writer:
        assert writer.assemble(UNITS)[1] == one
    assert contents(tmp_path / "out") == before
    assert {name: hashlib.sha256(content).hexdigest() for name, content in before.items()} == one


def test_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    key = {"recipe": {"name": "a", "solver": {"damping": 0.1, "order": True}}, "tokens": "x"}
    opened(tmp_path / "out", key)
    opened(tmp_path / "out", key)
    others: list[tuple[dict[str, Any], str]] = [
        ({**key, "tokens": "y" * 99}, f'tokens is here ("x" then, "{"y" * 56}... now)'),
        ({"recipe": key["recipe"]}, 'tokens is here ("x" then, null now)'),
        (
            {**key, "recipe": {"name": "a", "solver": {"damping": 0.2, "order": True}}},
            "recipe solver damping is here (0.1 then, 0.2 now)",
        ),
    ]
    for other, words in others:
        with pytest.raises(UserError) as refused:
            CheckpointWriter(tmp_path / "out", other)
        assert f"an unfinished run with another {words}" in str(refused.value)
        assert str(refused.value).endswith("repeat its command, or delete the folder")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (INDEX, "already holds a finished checkpoint"),
        (SINGLE, "already holds a finished checkpoint"),
        (MANIFEST, "already holds a finished checkpoint"),
        ("letters.txt", "is not empty and holds no unfinished run"),
    ],
)
def test_a_folder_of_somebody_else_is_not_touched(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=words):
        CheckpointWriter(tmp_path, KEY)
    assert contents(tmp_path) == {name: b"mine"}
    with pytest.raises(UserError, match="is a file; choose a folder"):
        CheckpointWriter(tmp_path / name, KEY)


def test_an_empty_folder_and_a_run_killed_at_once_are_taken(tmp_path: Path) -> None:
    (tmp_path / WORK).mkdir()
    (tmp_path / WORK / ".run.json.tmp").write_text("{")
    write_all(tmp_path, UNITS)
    assert Checkpoint(tmp_path).names()


def own_mounts(folder: Path) -> list[str] | None:
    """The command that gives a mount namespace of its own, None where that is not allowed."""
    for flags in ("-m", "-rm"):
        command = ["unshare", flags]
        mounting = [*command, "mount", "-t", "tmpfs", "tmpfs", str(folder)]
        with contextlib.suppress(FileNotFoundError):
            if subprocess.run(mounting, capture_output=True).returncode == 0:
                return command
    return None


def test_a_disk_full_at_any_place(tmp_path: Path) -> None:
    """Real disks, one page larger each: one line each time, and once there is room the same files
    without writing again what was written."""
    command = own_mounts(tmp_path)
    if command is None:
        pytest.skip("mounting a memory disk is not allowed here")
    found = subprocess.run(
        [*command, sys.executable, "-m", "tests.full_disk", str(tmp_path), "20"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    attempts = json.loads(found.stdout)
    wanted = attempts[-1]["files"]
    assert attempts[-1]["said"] == ""
    assert MANIFEST in wanted
    too_small = [attempt for attempt in attempts if attempt["said"]]
    assert len(too_small) >= 12
    for attempt in too_small:
        assert "\n" not in attempt["said"]
        assert attempt["said"].startswith(f"{tmp_path / 'out'}: cannot be written (")
        assert "No space left on device" in attempt["said"]
        assert attempt["said"].endswith("the run goes on where it stopped")
        assert not attempt["finished"]
        assert attempt["files"] == wanted
    redone = [len(attempt["solved"]) for attempt in too_small]
    assert set(redone) == {3, 2, 1, 0}  # full in each of the units, and while finishing
    assert redone == sorted(redone, reverse=True)


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Root may write anywhere, so become somebody who may not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_no_permission(mode: int) -> None:
    # not tmp_path, which is root's alone
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        locked = Path(name) / "locked"
        locked.mkdir()
        locked.chmod(mode)
        try:
            with as_nobody(), pytest.raises(UserError) as refused:
                CheckpointWriter(locked / "out", KEY)
        finally:
            locked.chmod(0o755)
        assert str(refused.value).startswith(f"{locked / 'out'}: cannot be written (Permission")
        assert list(locked.iterdir()) == []
        write_all(locked / "out", UNITS)
