"""pull, quantize --stream, push, pull again, verify: over a socket on which 30 % of requests fail.

The pocket model, whose files the server has in more and smaller shards; each command is repeated
until it goes well, as its last line says.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from llama4q.checkpoint import INDEX, Checkpoint
from llama4q.hub import POCKET_MODEL
from llama4q.manifest import check_manifest

from .hub_home import COMMAND_LINE, Home
from .hub_server import OWNER, REPO, TOKEN, Hub
from .test_push import PUSH

SHARDS = 8
ATTEMPTS = 30
MINE = f"{OWNER}/pocket-int4"
SMALL_RUN = (
    "--samples", "8", "--length", "256", "--eval-windows", "2", "--eval-length", "256",
    "--lengths", "", "--dtype", "float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The pocket model, its tensors in the order of layers in SHARDS files."""
    folder = tmp_path_factory.mktemp("pocket")
    source = Checkpoint(POCKET_MODEL)
    names = source.names()
    weight_map: dict[str, str] = {}
    for number in range(SHARDS):
        mine = names[len(names) * number // SHARDS : len(names) * (number + 1) // SHARDS]
        shard = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        save_file({name: source.get(name) for name in mine}, folder / shard)
        weight_map |= dict.fromkeys(mine, shard)
    found = {
        path.name: path.read_bytes()
        for path in POCKET_MODEL.iterdir()
        if path.suffix != ".safetensors"
    }
    found |= {path.name: path.read_bytes() for path in folder.iterdir()}
    return found | {INDEX: json.dumps({"metadata": {}, "weight_map": weight_map}).encode()}


def until_it_goes_well(home: Home, *command: str) -> str:
    """What the command printed when it did; every failure before is one line, or the last test."""
    for _ in range(ATTEMPTS):
        done = home.run(PUSH, *command, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1")
        if done.returncode == 0:
            return done.stdout
        assert "Traceback" not in done.stderr, done.stderr
        assert "\nError: " in f"\n{done.stderr}", done.stderr
    raise AssertionError(f"{command} fails {ATTEMPTS} times: {done.stderr}")


def test_ends_with_the_same_bytes(files: dict[str, bytes], tmp_path: Path) -> None:
    with Hub(files, failing=0.3) as hub:
        one, other = (Home(tmp_path / name, hub.address) for name in ("one", "other"))
        pulled = Path(until_it_goes_well(one, "pull", REPO).strip())
        assert {path.name: path.read_bytes() for path in pulled.iterdir()} == files

        out = tmp_path / "pocket-int4"
        until_it_goes_well(other, "quantize", REPO, str(out), "--stream", *SMALL_RUN)
        check_manifest(out)
        plain = tmp_path / "plain"
        done = one.run(COMMAND_LINE, "quantize", str(pulled), str(plain), *SMALL_RUN)
        assert done.returncode == 0, done.stderr
        assert shards(out) == shards(plain)  # from a folder, undisturbed

        until_it_goes_well(other, "push", str(out), MINE)
        assert {n: c for n, c in hub.repositories[MINE].files().items() if n[0] != "."} == {
            path.name: path.read_bytes() for path in out.iterdir()
        }
        again = Path(until_it_goes_well(one, "pull", MINE).strip())
        assert contents(again) == contents(out)
        until_it_goes_well(one, "verify", MINE, "--against", REPO)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def shards(folder: Path) -> dict[str, bytes]:
    return {name: found for name, found in contents(folder).items() if "safetensors" in name}
