"""SOURCE from the Hub: the real huggingface_hub client against a server on 127.0.0.1.

Each download runs in a process of its own, as a user's does, told of the server by environment
variables alone. An audit hook ends it at the first connection to any other machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub.constants import DOWNLOAD_CHUNK_SIZE

from llama4q.errors import UserError
from llama4q.hub import POCKET_MODEL, Source, resolve

from . import tiny
from .hub_server import (
    BAD_TOKEN,
    COMMIT,
    GATED,
    HIDDEN_REPO,
    REPO,
    UNKNOWN_REPO,
    Hub,
    Refusal,
)

NEEDED_BESIDE_WEIGHTS = {
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer.model": b"pieces",
    "merges.txt": b"a b",
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE": b"terms",
    "USE_POLICY.md": b"policy",
    "README.md": b"card",
}
NOT_NEEDED = {
    ".gitattributes": b"*",
    "pytorch_model.bin": b"pickle",
    "model.pth": b"pickle",
    "consolidated.safetensors": b"again",
    "original/params.json": b"{}",
    "original/consolidated.00.pth": b"pickle",
    "original/tokenizer.model": b"pieces",
    "onnx/config.json": b"{}",
    "onnx/model.safetensors": b"again",
}
SHARD = "model-00002-of-00002.safetensors"

STAY_HOME = """
import os, sys
def stay_home(event, arguments):
    hosts = {"socket.connect": arguments[1:2], "socket.getaddrinfo": [arguments[:1]]}.get(event, [])
    if any(host[0] != "127.0.0.1" for host in hosts):
        print(event, hosts, file=sys.stderr, flush=True)
        os._exit(99)
sys.addaudithook(stay_home)
"""
RESOLVE = """
import json, sys
from llama4q.errors import UserError
from llama4q.hub import resolve
try:
    found = resolve(sys.argv[1])
except UserError as error:
    sys.exit("Error: " + str(error))
print(json.dumps([str(found.folder), found.name, found.revision]))
"""
COMMAND_LINE = "from cli import main; main(prog_name='llama4q')"


@dataclass(frozen=True)
class Home:
    """A user's machine: HF_HOME of its own, and the Hub at some address."""

    folder: Path
    endpoint: str

    def run(
        self, code: str, *arguments: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        # nothing of the tester's own settings, tokens or proxies
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", STAY_HOME + code, *arguments],
            cwd=Path(__file__).parent.parent,
            env={
                **kept,
                "HF_ENDPOINT": self.endpoint,
                "HF_HOME": str(self.folder),
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_ETAG_TIMEOUT": "60",  # seconds, for a machine that is busy
                "HF_HUB_DOWNLOAD_TIMEOUT": "60",
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=120,
        )

    def resolve(self, name: str, **environment: str) -> Source:
        done = self.run(RESOLVE, name, **environment)
        assert done.returncode == 0, done.stderr
        folder, repo, revision = json.loads(done.stdout)
        return Source(Path(folder), repo, revision)

    def error(self, name: str, **environment: str) -> str:
        """The one line of a run that fails."""
        done = self.run(RESOLVE, name, **environment)
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith("Error: ")
        return last.removeprefix("Error: ")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tiny.write(tmp_path_factory.mktemp("hub") / "model", tiny.SCOUT)
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    return files | NEEDED_BESIDE_WEIGHTS


@pytest.fixture
def hub(checkpoint: dict[str, bytes]) -> Iterator[Hub]:
    with Hub(checkpoint | NOT_NEEDED) as running:
        yield running


@pytest.fixture
def home(hub: Hub, tmp_path: Path) -> Home:
    return Home(tmp_path / "hf", hub.address)


# --- what comes ---


@pytest.mark.parametrize("name", [REPO, f"{REPO}@main", f"{REPO}@{COMMIT}"])
def test_only_needed_files_come(
    name: str, home: Home, hub: Hub, checkpoint: dict[str, bytes]
) -> None:
    found = home.resolve(name)
    assert (found.name, found.revision) == (REPO, COMMIT)
    assert {path.name: path.read_bytes() for path in found.folder.iterdir()} == checkpoint
    assert sorted(hub.downloads()) == sorted(checkpoint)
    assert hub.downloads()[0] == "config.json"


def test_cache_serves_a_second_call(home: Home, hub: Hub) -> None:
    first = home.resolve(REPO)
    hub.requests.clear()
    assert home.resolve(REPO) == first
    asked = [path for _, path, _ in hub.requests if path != "/api/agent-harnesses"]
    assert asked == [f"/api/models/{REPO}/revision/main"]  # whether main has moved


@pytest.mark.parametrize("offline", [False, True])
def test_cache_without_a_hub(offline: bool, checkpoint: dict[str, bytes], tmp_path: Path) -> None:
    with Hub(checkpoint) as hub:
        home = Home(tmp_path, hub.address)
        first = home.resolve(REPO)
    environment = {"HF_HUB_OFFLINE": "1"} if offline else {}
    assert home.resolve(REPO, **environment) == first
    assert home.resolve(f"{REPO}@{COMMIT}", **environment) == first


def test_inspect_reads_a_hub_id(home: Home) -> None:
    done = home.run(COMMAND_LINE, "inspect", f"{REPO}@main", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["layers"] == tiny.SCOUT.layers


def test_a_folder_and_the_pocket_model_need_no_hub(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == Source(tmp_path, str(tmp_path))
    assert resolve("pocket") == Source(POCKET_MODEL, "pocket")


# --- what breaks ---


def test_cut_connection_goes_on_where_it_broke(
    checkpoint: dict[str, bytes], tmp_path: Path
) -> None:
    content = bytes(range(256)) * 50_000
    with Hub({**checkpoint, "extra.safetensors": content}) as hub:
        hub.cuts["extra.safetensors"] = [11_000_000, 0, 12_000_000]
        found = Home(tmp_path, hub.address).resolve(REPO)
    assert (found.folder / "extra.safetensors").read_bytes() == content
    ranges = [asked for method, path, asked in hub.requests if "GET extra" in f"{method} {path}"]
    assert ranges == [None] + 3 * [f"bytes={DOWNLOAD_CHUNK_SIZE}-"]  # whole chunks are kept


def test_repeated_call_finishes_a_broken_download(
    home: Home, hub: Hub, checkpoint: dict[str, bytes]
) -> None:
    hub.cuts[SHARD] = [100_000] * 20
    assert "download failed" in (line := home.error(REPO))
    assert "repeat the command to go on" in line
    there = set(hub.downloads()) - {SHARD}
    hub.cuts.clear()
    hub.requests.clear()
    found = home.resolve(REPO)
    assert {path.name: path.read_bytes() for path in found.folder.iterdir()} == checkpoint
    assert set(hub.downloads()) == set(checkpoint) - there


def test_part_of_a_checkpoint_in_the_cache_is_not_taken_for_one(
    checkpoint: dict[str, bytes], tmp_path: Path
) -> None:
    with Hub(checkpoint) as hub:
        home = Home(tmp_path, hub.address)
        (home.resolve(REPO).folder / SHARD).unlink()
    line = home.error(REPO, HF_HUB_OFFLINE="1")
    assert "not all of it is in the cache, and the Hub cannot be reached" in line


# --- what the Hub refuses ---


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (GATED, "is gated; accept its licence on its Hub page, then run 'hf auth login'"),
        (UNKNOWN_REPO, "neither a folder here nor a repository on the Hub"),
        (HIDDEN_REPO, "neither a folder here nor a repository on the Hub"),
        (BAD_TOKEN, "the Hub answers 401 (Invalid credentials in Authorization header); run 'hf a"),
        (Refusal(403, "", "This token may not"), "the Hub answers 403 (This token may not); run"),
        (Refusal(503, "", "Hub is down"), "the Hub answers 503 (Hub is down); repeat the command"),
    ],
)
def test_refused_repository(refusal: Refusal, words: str, home: Home, hub: Hub) -> None:
    hub.refuse_all = refusal
    assert words in (line := home.error(REPO))
    assert line.startswith(f"{REPO}: ")


@pytest.mark.parametrize("status", [401, 403])
def test_gated_files_of_a_public_listing(status: int, home: Home, hub: Hub) -> None:
    hub.refuse_files = Refusal(status, GATED.code, GATED.message)
    assert "is gated" in home.error(REPO)


def test_another_name(home: Home) -> None:
    assert "nobody/nothing: neither a folder here nor" in home.error("nobody/nothing")


def test_unknown_revision(home: Home) -> None:
    assert f"{REPO}: has no revision 'nowhere'" in home.error(f"{REPO}@nowhere")


def test_unreachable_hub(checkpoint: dict[str, bytes], tmp_path: Path) -> None:
    with Hub(checkpoint) as hub:
        gone = hub.address
    line = Home(tmp_path, gone).error(REPO)
    assert "the Hub cannot be reached" in line
    assert "Connection refused" in line
    assert line.endswith("connect, or name a folder")


def test_offline_says_so(home: Home, hub: Hub) -> None:
    line = home.error(REPO, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in line
    assert not hub.requests


def test_an_endpoint_that_is_no_hub(tmp_path: Path) -> None:
    assert "download failed" in Home(tmp_path, "nonsense://127.0.0.1").error(REPO)


@pytest.mark.parametrize("host", ["10.255.255.1", "hub.invalid"])
def test_the_tests_stay_on_this_machine(host: str, tmp_path: Path) -> None:
    assert Home(tmp_path, f"http://{host}").run(RESOLVE, REPO).returncode == 99


# --- what is no checkpoint ---


def test_other_models_are_refused_before_their_weights_come(
    checkpoint: dict[str, bytes], tmp_path: Path
) -> None:
    with Hub({**checkpoint, "config.json": b'{"model_type": "qwen3"}'}) as hub:
        line = Home(tmp_path, hub.address).error(REPO)
        assert f"{REPO}/config.json: not a Llama 4 but model_type 'qwen3'" in line
        assert hub.downloads() == ["config.json"]


def test_repository_without_a_checkpoint(tmp_path: Path) -> None:
    with Hub({"README.md": b"card"}) as hub:
        line = Home(tmp_path, hub.address).error(REPO)
    assert line == f"{REPO}: has no config.json; name a repository with a checkpoint"


@pytest.mark.parametrize("name", ["../gone", "./gone", "a--b/c", "/no/such/folder", "gone", "a b"])
def test_neither_folder_nor_hub_id(name: str) -> None:
    with pytest.raises(UserError, match="no such folder"):
        resolve(name)
