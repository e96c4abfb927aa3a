"""Quantizing while it downloads, over a real socket: the same bytes as from a folder, and never
more on the disk than was said."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama4q.export import REPORTS
from llama4q.manifest import MANIFEST, check_manifest

from . import runs, tiny
from .hub_home import COMMAND_LINE, Home
from .hub_server import REPO, Hub

LAYERS, SHARDS = 6, 9
VARIANT = tiny.Variant(layers=LAYERS, experts=2, rope_scaling=tiny.SCOUT_ROPE)

# what a run says of itself and of its time
STREAM = """
import json, sys
from pathlib import Path
from llama4q.errors import UserError
from llama4q.hub import resolve_remote
from calibrate.beforehand import reading_order
from llama4q.config import read_config
from tests import runs
class Loud(runs.Quiet):
    def phase(self, what):
        print(what, file=sys.stderr, flush=True)
    def replayed(self, part, groups):
        print(part, "was written before", file=sys.stderr, flush=True)
source = resolve_remote(sys.argv[1])
steps = reading_order(read_config(source.folder), source.checkpoint().names())
print(source.held(steps), flush=True)
try:
    runs.run(source, Path(sys.argv[2]), progress=Loud())
except UserError as error:
    sys.exit("Error: " + str(error))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A checkpoint whose layers lie in shards of their own, but for one that two layers share, and
    those of no layer in the first and the last one, as on the Hub."""
    folder = tmp_path_factory.mktemp("model") / "source"
    tiny.write(folder, VARIANT, shards=SHARDS, scattered=False)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def local(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """SHA-256 of the files of a run from a folder."""
    folder = tmp_path_factory.mktemp("local")
    source = folder / "source"
    source.mkdir()
    for name, content in files.items():
        (source / name).write_bytes(content)
    runs.run(source, folder / "out")
    return digests(folder / "out")


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    with Hub(files, lfs_from=4096) as running:
        yield running


@pytest.fixture
def home(hub: Hub, tmp_path: Path) -> Home:
    return Home(tmp_path / "hf", hub.address)


def digests(folder: Path) -> dict[str, str]:
    found = check_manifest(folder)
    return {name: digest for name, digest in found.items() if name not in (*REPORTS, MANIFEST)}


def shards_asked(hub: Hub) -> list[str]:
    """Whole shards, in order; ranges are headers and routers."""
    return [
        name
        for method, name, part in hub.requests
        if method == "GET" and name.endswith(".safetensors") and part is None
    ]


class Watch(threading.Thread):
    """The most bytes that shards took in a folder, looked at all the time."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.most, self.done = folder, 0, threading.Event()

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.join()

    def run(self) -> None:
        while not self.done.is_set():
            with contextlib.suppress(FileNotFoundError):  # dropped, or the folder removed, just now
                held = 0
                for pattern in ("*.safetensors", "*.incomplete"):
                    held += sum(path.stat().st_size for path in self.folder.rglob(pattern))
                self.most = max(self.most, held)
            time.sleep(0.001)


def test_the_same_bytes_and_never_more_than_was_said(
    home: Home, hub: Hub, local: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with Watch(out / ".llama4q" / "source") as watch:
        done = home.run(STREAM, REPO, str(out))
    assert done.returncode == 0, done.stderr
    assert digests(out) == local
    shards = sorted(name for name in hub.files if name.endswith(".safetensors"))
    assert sorted(shards_asked(hub)) == shards  # each once
    said = int(done.stdout)
    assert 0 < watch.most <= said < sum(len(hub.files[name]) for name in shards)
    assert not (out / ".llama4q").exists()


def test_a_killed_run_goes_on(home: Home, hub: Hub, local: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for layer in (0, 3):  # written when it is killed
        with home.start(STREAM, REPO, str(out)) as process:
            while not (out / ".llama4q" / f"layer-{layer:05d}.json").exists():
                assert process.poll() is None
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
    with Watch(out / ".llama4q" / "source") as watch:
        done = home.run(STREAM, REPO, str(out))
    assert done.returncode == 0, done.stderr
    assert "was written before" in done.stderr
    assert digests(out) == local
    assert watch.most <= int(done.stdout)


def test_wrong_bytes_are_fetched_again(
    home: Home, hub: Hub, local: dict[str, str], tmp_path: Path
) -> None:
    shard = "model-00004-of-00009.safetensors"
    hub.wrong[shard] = 1
    with Watch(tmp_path / "out" / ".llama4q" / "source") as watch:
        done = home.run(STREAM, REPO, str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert watch.most <= int(done.stdout)
    assert f"{shard}: has SHA-256" in done.stderr
    assert "fetching it again" in done.stderr
    assert digests(tmp_path / "out") == local


def test_a_range_that_says_otherwise_than_its_shard_ends_the_run(
    home: Home, hub: Hub, tmp_path: Path
) -> None:
    """No digest covers a range: what the solver took from it is compared when the shard is here."""
    shard = "model-00005-of-00009.safetensors"
    hub.wrong_ranges.add(shard)
    done = home.run(STREAM, REPO, str(tmp_path / "out"))
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert f"was read otherwise than {shard} has it" in line


def test_bytes_that_stay_wrong(home: Home, hub: Hub, tmp_path: Path) -> None:
    shard = "model-00004-of-00009.safetensors"
    hub.wrong[shard] = 2
    done = home.run(STREAM, REPO, str(tmp_path / "out"))
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert shard in line
    assert "and so when fetched again" in line


def test_headers_tell_what_it_is(home: Home, hub: Hub, tmp_path: Path) -> None:
    inspected = home.run(COMMAND_LINE, "inspect", REPO, "--json")
    fits = home.run(COMMAND_LINE, "fit", REPO, "--json")
    assert not shards_asked(hub)
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in hub.files.items():
        (folder / name).write_bytes(content)
    assert inspected.stdout == home.run(COMMAND_LINE, "inspect", str(folder), "--json").stdout
    assert fits.stdout == home.run(COMMAND_LINE, "fit", str(folder), "--json").stdout


def test_an_index_that_leads_out(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    index = json.loads(files["model.safetensors.index.json"])
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "../../evil.safetensors"
    wrong = {**files, "model.safetensors.index.json": json.dumps(index).encode()}
    with Hub(wrong, lfs_from=4096) as other:
        done = Home(tmp_path / "hf", other.address).run(COMMAND_LINE, "inspect", REPO)
    assert done.returncode == 1
    assert "outside the folder; refused" in done.stderr
