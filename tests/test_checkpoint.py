"""Reading sharded safetensors by name, and writing them so that nothing half-written counts.

The authority on contents is safetensors' own `load_file`; the disk that is full is a real one.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama4q.checkpoint import INDEX, SINGLE, Checkpoint
from llama4q.errors import UserError

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
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
