"""Passes over the original that are stopped: they go on, to the same bits, or say why not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import cli
from calibrate.choose import expert_counts
from calibrate.sensitivity import measure
from llama4q.checkpoint import Checkpoint
from llama4q.config import read_config
from llama4q.errors import UserError
from llama4q.hidden import Spool
from llama4q.kept import Kept, Reached
from llama4q.schemes import SCHEMES
from llama4q.weights import LayerReader
from llama4q.writer import WORK

from . import runs, tiny
from .test_bad_input import QUICK, VARIANT, with_tokenizer
from .test_precision import size_for

SCHEMES_TRIED = [SCHEMES["int4"], SCHEMES["fp8"]]


class Killed(BaseException):
    """Nothing runs after it."""


def killed_after(layers: int, seen: list[int]) -> Callable[[int], None]:
    def layer_done(count: int) -> None:
        seen.append(count)
        if count == layers:
            raise Killed

    return layer_done


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer is kept."""
    monkeypatch.setattr(Kept, "every", 0.0)
    monkeypatch.setattr(Kept, "share", float("inf"))


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("budget", [0, float("inf")], ids=["in files", "in memory"])
def test_measuring_goes_on(tmp_path: Path, budget: float) -> None:
    source = tiny.write(tmp_path / "source", tiny.MAVERICK)
    reader = LayerReader(Checkpoint(source), read_config(source), torch.bfloat16)
    tokens = runs.tokens(source, 2, 70, seed=5)
    whole = measure(reader, tokens, SCHEMES_TRIED, Spool(), lambda _: None)
    seen: list[int] = []
    spool = Spool(budget, tmp_path)
    kept = Kept(tmp_path, "measuring", {"a": 1})
    with pytest.raises(Killed):
        measure(reader, tokens, SCHEMES_TRIED, spool, killed_after(2, seen), kept)
    kept, spool = Kept(tmp_path, "measuring", {"a": 1}), Spool(budget, tmp_path)
    assert measure(reader, tokens, SCHEMES_TRIED, spool, seen.append, kept) == whole
    assert seen == [0, 1, 2, 2, 3, 4]


@pytest.mark.usefixtures("at_once")
def test_choosing_goes_on(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", tiny.SCOUT)
    reader = LayerReader(Checkpoint(source), read_config(source), torch.bfloat16)
    tokens = runs.tokens(source, 5, 40)
    seen: list[int] = []
    kept, spool = Kept(tmp_path, "choosing", 1), Spool(0, tmp_path)
    with pytest.raises(Killed):
        expert_counts(reader, tokens, killed_after(3, seen), spool, kept)
    found = expert_counts(reader, tokens, seen.append, Spool(), Kept(tmp_path, "choosing", 1))
    assert torch.equal(found, expert_counts(reader, tokens, lambda _: None))
    assert seen == [0, 1, 2, 3, 3, 4]


@pytest.mark.usefixtures("at_once")
def test_what_another_pass_kept_is_not_taken(tmp_path: Path) -> None:
    store = Spool().store([(2, 3, 4)], torch.bfloat16)
    store[0] = torch.ones(2, 3, 4)
    Kept(tmp_path, "a", {"seed": 0}).keep(Reached(3, []), [store])
    assert Kept(tmp_path, "a", {"seed": 0}).reached() == Reached(3, [])
    assert Kept(tmp_path, "a", {"seed": 1}).reached() is None
    assert Kept(tmp_path, "b", {"seed": 0}).reached() is None


@pytest.mark.usefixtures("at_once")
def test_only_the_last_is_on_the_disk(tmp_path: Path) -> None:
    """And nothing when the pass is done."""
    store = Spool().store([(2, 3, 4)], torch.float32)
    store[0] = torch.ones(2, 3, 4)
    kept = Kept(tmp_path, "a", 0)
    for layers in (1, 2, 3):
        kept.keep(Reached(layers, []), [store])
        assert len(list(tmp_path.iterdir())) == 2
    kept.forget()
    assert not list(tmp_path.iterdir())


def test_keeping_costs_little(tmp_path: Path) -> None:
    """Not every layer of a short pass, and a twentieth of the time of one that has much to keep."""
    store = Spool().store([(2, 3, 4)], torch.float32)
    kept = Kept(tmp_path, "a", 0)
    kept.keep(Reached(1, []), [store])
    assert kept.reached() is None


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("harm", ["changed", "short", "gone"])
def test_a_harmed_file_is_one_line(tmp_path: Path, harm: str) -> None:
    store = Spool().store([(2, 3, 4)], torch.bfloat16)
    store[0] = torch.ones(2, 3, 4)
    Kept(tmp_path, "a", 0).keep(Reached(1, []), [store])
    [rows] = tmp_path.glob("a-*.rows")
    raw = bytearray(rows.read_bytes())
    raw[7] ^= 1
    if harm == "gone":
        rows.unlink()
    else:
        rows.write_bytes(raw if harm == "changed" else raw[:-1])
    kept = Kept(tmp_path, "a", 0)
    assert kept.reached() is not None
    with pytest.raises(UserError, match=r"a-1.rows: not what was kept there .* delete .*a.json"):
        kept.take([store])


def test_the_command_goes_on(tmp_path: Path) -> None:
    """Stopped by a signal while it measures; the same bytes as without."""
    source = with_tokenizer(tiny.write(tmp_path / "source", VARIANT))
    options = [*QUICK, "--context", "64", "--fit", size_for(source, 0.5)]
    every = "from llama4q.kept import Kept; Kept.every = 0.0; import cli; cli.main()"
    command = ["quantize", str(source), str(tmp_path / "out"), *options]
    process = subprocess.Popen(
        [sys.executable, "-c", every, *command], stderr=subprocess.PIPE, text=True
    )
    record = tmp_path / "out" / WORK / "measuring.json"
    while not record.exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    assert process.returncode == 143
    assert "measuring what parts lose goes on at layer " in said.splitlines()[-1]
    layers = json.loads(record.read_bytes())["layers"]
    found = CliRunner().invoke(cli.main, command)
    assert found.exit_code == 0, found.output
    assert layers > 0
    plain = ["quantize", str(source), str(tmp_path / "plain"), *options]
    assert CliRunner().invoke(cli.main, plain).exit_code == 0
    ours, theirs = (Checkpoint(tmp_path / name) for name in ("out", "plain"))
    assert set(ours.names()) == set(theirs.names())
    for name in ours.names():
        assert torch.equal(ours.get(name), theirs.get(name)), name
