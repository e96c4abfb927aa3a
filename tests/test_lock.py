"""The lock of a folder, between processes in tests/test_stopping.py: here what else may happen."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from llama4q.errors import UserError
from llama4q.lock import Lock, refuse_held
from llama4q.manifest import MANIFEST
from llama4q.writer import LOCK, WORK, CheckpointWriter, refuse_foreign_files

KEY = {"run": 1}
HOLDER = f"process {os.getpid()} on {socket.gethostname()}"


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, KEY):
        with pytest.raises(UserError) as refused:
            CheckpointWriter(tmp_path, KEY)
        with pytest.raises(UserError, match="another run is at work here"):
            refuse_foreign_files(tmp_path)
    assert str(refused.value) == (
        f"{tmp_path}: another run is at work here ({HOLDER}); wait for its end, stop it, "
        f"or choose another folder"
    )
    refuse_foreign_files(tmp_path)
    with CheckpointWriter(tmp_path, KEY):
        pass


def test_a_run_that_is_refused_holds_no_lock(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, KEY):
        pass
    with pytest.raises(UserError, match="with another run is here"):
        CheckpointWriter(tmp_path, {"run": 2})
    with CheckpointWriter(tmp_path, KEY):
        pass


def test_a_folder_with_nothing_but_the_lock_is_taken(tmp_path: Path) -> None:
    (tmp_path / WORK).mkdir()
    (tmp_path / WORK / LOCK).write_text("process 1 on another host, which is long gone")
    with CheckpointWriter(tmp_path, KEY):
        assert (tmp_path / WORK / LOCK).read_text() == HOLDER


def locking(happening: Callable[[], object]) -> Callable[[IO[str], int], None]:
    """`flock`, but that something happens just before."""
    flock = fcntl.flock

    def lock(file: IO[str], operation: int) -> None:
        happening()
        flock(file, operation)

    return lock


def test_a_run_that_ends_just_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the file away after it was opened: that is no lock to hold."""
    path = tmp_path / "lock"
    with monkeypatch.context() as patch:
        patch.setattr("llama4q.lock.fcntl.flock", locking(path.unlink))
        with pytest.raises(UserError, match="another run is at work here"):
            Lock(path, tmp_path)
    Lock(path, tmp_path).release()


def test_a_checkpoint_that_is_finished_just_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = (tmp_path / MANIFEST).touch
    monkeypatch.setattr("llama4q.lock.fcntl.flock", locking(publish))
    with pytest.raises(UserError, match="already holds a finished checkpoint"):
        CheckpointWriter(tmp_path, KEY)
    assert not (tmp_path / WORK / "run.json").exists()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("llama4q.lock.fcntl.flock", none)
    with CheckpointWriter(tmp_path, KEY):
        refuse_held(tmp_path / WORK / LOCK, tmp_path)
    assert capsys.readouterr().err == (
        f"Warning: {tmp_path}: this file system has no locks ({os.strerror(code)}); "
        f"start no second run in this folder\n"
    )


def test_a_lock_that_fails_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("llama4q.lock.fcntl.flock", failing)
    with pytest.raises(UserError, match="cannot be written \\(Input/output error\\)"):
        CheckpointWriter(tmp_path, KEY)
