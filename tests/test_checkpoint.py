"""Reading sharded safetensors by name, and writing them so that nothing half-written counts.

The authority on contents is safetensors' own `load_file`; the disk that is full is a real one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama4q.checkpoint import INDEX, SINGLE, Checkpoint
from llama4q.errors import UserError
from llama4q.writer import WORK, CheckpointWriter

ROOT = Path(__file__).parent.parent
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
KEY = {"run": 1}
NOBODY = 65534
MEND = "mend that and repeat the command"


def tensors() -> dict[str, torch.Tensor]:
    """One tensor of each kind that checkpoints hold."""
    generator = torch.Generator().manual_seed(0)
    floats = torch.randn(4, 6, generator=generator)
    return {
        "bfloat16": floats.bfloat16(),
        "float32": floats,
        "float16": floats.half(),
        "float8": floats.to(torch.float8_e4m3fn),
        "packed": torch.arange(-6, 6, dtype=torch.int32).view(3, 4),
        "shape": torch.tensor([4, 6]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "fused": torch.randn(3, 4, 5, generator=generator).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two shards with an index."""
    made = tensors()
    names = list(made)
    save_file({name: made[name] for name in names[::2]}, tmp_path / FIRST)
    save_file({name: made[name] for name in names[1::2]}, tmp_path / SECOND)
    weight_map = {name: (FIRST, SECOND)[at % 2] for at, name in enumerate(names)}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Type, shape and bits."""
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    return ours.flatten().view(torch.uint8).equal(theirs.flatten().view(torch.uint8))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def write_all(writer: CheckpointWriter, units: dict[str, dict[str, torch.Tensor]]) -> None:
    """Every unit, then the finished checkpoint."""
    for unit, made in units.items():
        writer.write(unit, made.items(), {"unit": unit})
    written, _ = writer.assemble(units)
    writer.publish(written, {"config.json": b"{}", "report.json": b"[]", "tokenizer.json": b"1"})


UNITS = {
    "layer-00000": {"a": torch.ones(4, 8), "b": torch.zeros(2, dtype=torch.bfloat16)},
    "layer-00001": {"c": torch.arange(12.0)},
    "nothing": {},
}


def test_reading_against_safetensors(folder: Path) -> None:
    theirs = load_file(folder / FIRST) | load_file(folder / SECOND)
    ours = Checkpoint(folder)
    assert set(ours.names()) == set(theirs)
    for name, tensor in theirs.items():
        assert name in ours
        info = ours.info(name)
        assert (info.dtype, info.shape, info.nbytes) == (
            tensor.dtype, tuple(tensor.shape), tensor.nbytes,
        )  # fmt: skip
        assert same(ours.get(name), tensor)
    for row in range(3):
        assert same(ours.get_row("fused", row), theirs["fused"][row])
    assert "other" not in ours


def test_tensors_outlive_the_shard_they_came_from(folder: Path) -> None:
    """A tensor is a copy, a row of its own size: no shard stays mapped because of it."""
    ours = Checkpoint(folder)
    row, whole = ours.get_row("fused", 1), ours.get("bfloat16")
    assert row.untyped_storage().nbytes() == row.nbytes
    for shard in (FIRST, SECOND):
        with (folder / shard).open("r+b") as file:  # in place: a mapping would see it
            file.write(b"\0" * (folder / shard).stat().st_size)
    assert same(row, tensors()["fused"][1])
    assert same(whole, tensors()["bfloat16"])


def test_one_file_without_an_index(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / SINGLE)
    ours = Checkpoint(tmp_path)
    theirs = load_file(tmp_path / SINGLE)
    assert set(ours.names()) == set(theirs)
    assert all(same(ours.get(name), theirs[name]) for name in theirs)


def test_shards_that_the_index_does_not_name_are_not_read(folder: Path) -> None:
    save_file({"float32": torch.zeros(1)}, folder / "model-00003-of-00003.safetensors")
    assert Checkpoint(folder).info("float32").shape == (4, 6)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def no_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def no_json(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:8] + b"X" + content[9:])


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [truncate, empty, no_header, no_json, a_folder, Path.unlink])
def test_a_damaged_shard_is_named(damage: Callable[[Path], None], folder: Path) -> None:
    damage(folder / SECOND)
    with pytest.raises(UserError) as refused:
        Checkpoint(folder)
    message = str(refused.value)
    assert message.startswith(f"{folder / SECOND}: ")
    assert any(word in message for word in ("truncated or corrupted", "missing", "cannot be read"))
    assert "\n" not in message


def grown(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def rewritten(path: Path) -> None:
    """The same size, another time."""
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def replaced(path: Path) -> None:
    """By an older file of the same size."""
    path.with_suffix(".new").write_bytes(path.read_bytes())
    os.utime(path.with_suffix(".new"), (0, 0))
    os.replace(path.with_suffix(".new"), path)


@pytest.mark.parametrize("change", [truncate, empty, grown, rewritten, replaced])
def test_a_shard_that_changes_later_is_named(change: Callable[[Path], None], folder: Path) -> None:
    """Cut short, too: of a mapping the kernel would have killed this process by SIGBUS."""
    ours = Checkpoint(folder)
    name = next(name for name in ours.names() if ours.info(name).shard == SECOND)
    ours.get(name)
    size = (folder / SECOND).stat().st_size
    change(folder / SECOND)
    with pytest.raises(UserError) as refused:
        ours.get(name)
    message = str(refused.value)
    assert message.startswith(f"{folder / SECOND}: was changed while in use ({size} bytes of ")
    assert message.endswith("let nothing write to it, and repeat the command")
    assert "\n" not in message


def test_a_shard_cut_short_while_a_tensor_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Checkpoint(folder)
    cut = tampered(lambda: os.truncate(folder / ours.info("fused").shard, 9))
    monkeypatch.setattr("llama4q.checkpoint.PIECE", 16)
    monkeypatch.setattr("llama4q.checkpoint.os.preadv", cut)
    with pytest.raises(UserError, match=r"was changed while in use \(.* now\); let nothing"):
        ours.get("fused")


def test_a_disk_that_fails_is_named_with_the_tensor(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    ours = Checkpoint(folder)
    monkeypatch.setattr("llama4q.checkpoint.PIECE", 16)
    monkeypatch.setattr("llama4q.checkpoint.os.preadv", tampered(failing))
    with pytest.raises(UserError) as refused:
        ours.get("fused")
    shard = folder / ours.info("fused").shard
    assert (
        str(refused.value)
        == f"{shard}: cannot be read at tensor fused (Input/output error); {MEND}"
    )


def tampered(happening: Callable[[], object]) -> Callable[[int, list[memoryview], int], int]:
    """`os.preadv`, but that something happens before its second call."""
    preadv, calls = os.preadv, iter([lambda: None, happening])

    def read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        next(calls, happening)()
        return preadv(descriptor, buffers, offset)

    return read


def test_a_shard_that_is_gone_later_is_named_with_the_tensor(folder: Path) -> None:
    ours = Checkpoint(folder)
    name = next(name for name in ours.names() if ours.info(name).shard == SECOND)
    (folder / SECOND).unlink()
    with pytest.raises(UserError, match=f"{SECOND}: cannot be read at tensor {name}"):
        ours.get(name)


def test_a_row_that_there_is_not(folder: Path) -> None:
    with pytest.raises(IndexError):
        Checkpoint(folder).get_row("fused", 3)


def test_threads_read_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One reads ahead while another one reads what is copied."""
    monkeypatch.setattr("llama4q.checkpoint.PIECE", 7)
    ours, wanted = Checkpoint(folder), tensors()
    with ThreadPoolExecutor(4) as pool:
        names = list(wanted) * 20
        for name, tensor in zip(names, pool.map(ours.get, names), strict=True):
            assert same(tensor, wanted[name])


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/x", "sub/x.safetensors", "..", ".", "", "../", "a/"]
)
def test_an_index_that_leads_outside_is_refused(shard: str, folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["float32"] = shard
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError) as refused:
        Checkpoint(folder)
    assert str(refused.value) == f"{folder / INDEX}: names {shard!r}, outside the folder; refused"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"{}", b'{"weight_map": []}', b'{"weight_map": 3}', b"\xff"]
)
def test_a_broken_index_is_named(content: bytes, folder: Path) -> None:
    (folder / INDEX).write_bytes(content)
    with pytest.raises(UserError) as refused:
        Checkpoint(folder)
    assert str(refused.value) == f"{folder / INDEX}: not a safetensors index; download it again"


def test_a_tensor_that_is_not_in_its_shard(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["float32"] = FIRST  # it is in the other one
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"{FIRST}: tensor float32 of the index is not in it"):
        Checkpoint(folder)


def test_neither_index_nor_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"neither {INDEX} nor {SINGLE} here"):
        Checkpoint(tmp_path)
    with pytest.raises(UserError, match="neither"):
        Checkpoint(tmp_path / "missing")


def test_an_unknown_tensor_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match="tensor other is missing"):
        Checkpoint(folder).get("other")


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    units = {"one": tensors(), **UNITS}
    write_all(CheckpointWriter(tmp_path / "out", KEY), units)
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
    write_all(CheckpointWriter(tmp_path / "out", KEY), {"one": made, "two": {"g": torch.ones(1)}})
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    # in order, never above the limit unless one tensor is; each unit starts a shard of its own
    assert [sorted(load_file(shard)) for shard in shards] == [
        ["a", "b"], ["c"], ["d"], ["e", "f"], ["g"],
    ]  # fmt: skip
    assert [shard.name for shard in shards] == [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]


def test_the_index_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every final file appears by a rename; before the last one the folder is no checkpoint."""
    out = tmp_path / "out"
    appeared: list[str] = []
    rename = os.replace

    def recorded(before: Path, after: Path) -> None:
        with pytest.raises(UserError):
            Checkpoint(out)
        rename(before, after)
        if after.parent == out:
            appeared.append(after.name)

    monkeypatch.setattr("llama4q.writer.os.replace", recorded)
    write_all(CheckpointWriter(out, KEY), UNITS)
    assert appeared[-2:] == ["config.json", INDEX]
    assert set(appeared) == {path.name for path in out.iterdir()}
    assert len(appeared) == len(set(appeared))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_whom_the_umask_lets_read_may_read(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_all(CheckpointWriter(tmp_path / "out", KEY), UNITS)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {mode}, modes


def test_a_unit_counts_when_its_record_is_there_and_its_files_are_whole(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out", KEY)
    assert writer.done("one") is None
    files = writer.write_files("one", UNITS["layer-00000"].items())
    assert writer.done("one") is None
    writer.record("one", files, {"note": [1, None]})
    [(name, digest)] = files.items()
    part = tmp_path / "out" / WORK / name
    assert digest == hashlib.sha256(part.read_bytes()).hexdigest()
    again = CheckpointWriter(tmp_path / "out", KEY).done("one")
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
    writer = CheckpointWriter(tmp_path / "out", KEY)
    for unit, made in UNITS.items():
        assert not writer.finishing(UNITS)
        writer.write(unit, made.items(), {})
    assert not writer.finishing(UNITS)
    one = writer.assemble(UNITS)[1]
    assert writer.finishing(UNITS)
    before = contents(tmp_path / "out")
    assert CheckpointWriter(tmp_path / "out", KEY).assemble(UNITS)[1] == one
    assert contents(tmp_path / "out") == before
    assert {name: hashlib.sha256(content).hexdigest() for name, content in before.items()} == one


def test_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    key = {"recipe": {"name": "a", "solver": {"damping": 0.1, "order": True}}, "tokens": "x"}
    CheckpointWriter(tmp_path / "out", key)
    CheckpointWriter(tmp_path / "out", key)
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
    (tmp_path / WORK / "run.json.tmp").write_text("{")
    write_all(CheckpointWriter(tmp_path, KEY), UNITS)
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
    assert INDEX in wanted
    too_small = [attempt for attempt in attempts if attempt["said"]]
    assert len(too_small) >= 12
    for attempt in too_small:
        assert "\n" not in attempt["said"]
        assert attempt["said"].startswith(f"{tmp_path / 'out'}: cannot be written (")
        assert "No space left on device" in attempt["said"]
        assert attempt["said"].endswith("the run goes on where it stopped")
        assert not attempt["index"]
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
        write_all(CheckpointWriter(locked / "out", KEY), UNITS)
