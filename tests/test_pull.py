"""`llama4q pull` over a real socket: every byte as the Hub has it, or one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from . import tiny
from .hub_home import COMMAND_LINE, Home
from .hub_server import COMMIT, REPO, TOO_MANY, Hub

SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tiny.write(tmp_path_factory.mktemp("hub") / "model", tiny.SCOUT)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    with Hub(files) as running:
        yield running


@pytest.fixture
def home(hub: Hub, tmp_path: Path) -> Home:
    return Home(tmp_path / "hf", hub.address)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_prints_the_folder_of_the_commit(home: Home, files: dict[str, bytes]) -> None:
    done = home.run(COMMAND_LINE, "pull", REPO)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert contents(folder) == files
    (folder / ".DS_Store").write_bytes(b"of a desktop, not of the repository")
    assert home.run(COMMAND_LINE, "pull", REPO).returncode == 0
    assert folder.name == COMMIT
    assert f"{REPO} at {COMMIT}: " in done.stderr


def test_wrong_bytes_on_the_way_are_fetched_once_more(
    home: Home, hub: Hub, files: dict[str, bytes]
) -> None:
    hub.wrong[SHARD] = 1
    done = home.run(COMMAND_LINE, "pull", REPO)
    assert done.returncode == 0, done.stderr
    assert f"{SHARD}: has SHA-256" in done.stderr
    assert contents(Path(done.stdout.strip())) == files


@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_bytes_that_stay_wrong_are_refused(name: str, home: Home, hub: Hub) -> None:
    home.run(COMMAND_LINE, "pull", REPO)
    spoil(home, name)
    hub.wrong[name] = 10
    done = home.run(COMMAND_LINE, "pull", REPO)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"Error: {name}: has ")
    assert line.endswith(
        "and so when fetched again; check disk and network, then repeat the command"
    )


@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_a_file_that_a_disk_spoiled_is_found(
    name: str, home: Home, files: dict[str, bytes]
) -> None:
    """config.json is no LFS file: the Hub has git's SHA-1 of it."""
    home.run(COMMAND_LINE, "pull", REPO)
    spoil(home, name)
    done = home.run(COMMAND_LINE, "pull", REPO)
    assert done.returncode == 0, done.stderr
    assert f"{name}: has " in done.stderr
    assert contents(Path(done.stdout.strip())) == files


def spoil(home: Home, name: str) -> None:
    """A byte of it is another in the cache: in a tensor, or a space in JSON."""
    [path] = home.folder.rglob(name)
    content = bytearray(path.read_bytes())
    place = content.rindex(b"\n") if name == "config.json" else len(content) - 1
    content[place] = ord(" ") if name == "config.json" else content[place] ^ 1
    path.write_bytes(content)


def test_a_disk_that_is_too_small_is_told_before(files: dict[str, bytes], tmp_path: Path) -> None:
    """The listing has the size; 2^60 bytes are more than any disk."""
    with Hub(files, sizes={SHARD: 2**60}) as hub:
        done = Home(tmp_path, hub.address).run(COMMAND_LINE, "pull", REPO)
    assert done.returncode == 1
    assert "GB are to be downloaded, the disk of the cache has " in done.stderr
    assert not [name for name in hub.downloads() if name.endswith(".safetensors")]


def test_a_rate_limit_says_what_to_do(home: Home, hub: Hub) -> None:
    hub.refuse_all = TOO_MANY
    done = home.run(COMMAND_LINE, "pull", REPO)
    assert done.returncode == 1
    assert "the Hub answers 429" in done.stderr
    assert "wait some minutes, or run 'hf auth login' to be let more" in done.stderr


@pytest.mark.parametrize("name", ["../../evil.json", "/etc/evil.json", "a\\..\\evil.json"])
def test_a_listing_that_leads_out_is_refused(
    name: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    with Hub({**files, name: b"{}"}) as hub:
        home = Home(tmp_path / "hf" / "home", hub.address)
        done = home.run(COMMAND_LINE, "pull", REPO)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert not list(tmp_path.rglob("*evil.json"))


def test_what_lies_here_needs_no_pull(home: Home) -> None:
    done = home.run(COMMAND_LINE, "pull", "pocket")
    assert "lies on this machine; name a Hub id" in done.stderr
