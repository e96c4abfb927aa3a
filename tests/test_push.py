"""push by the command line: huggingface_hub's real client against a Hub on 127.0.0.1.

Each push that may send something runs in a process of its own, as in tests/test_hub.py. No run may
show the token. Uploads go by LFS; Xet is switched off by the client's own setting.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import ModelCard

from cli import main
from llama4q.hub import POCKET_MODEL

from . import publishable, tiny
from .hub_home import COMMAND_LINE, Home
from .hub_server import GATED, NOT_YOURS, REPO, TOKEN, Hub, Refusal, git_hash, sha256
from .test_licence import CARD, FILES

# the client's own way of sending a file is deprecated by the library below it
PUSH = f"import warnings; warnings.filterwarnings('ignore', \"Use 'content\")\n{COMMAND_LINE}"
TARGET = f"me/{publishable.NAME}"
DUTIES = (*FILES, *CARD[:2], "acceptance", *CARD[2:])
DOWN = Refusal(503, "", "Hub is down")


def dry(folder: Path, *options: str, repo: str = TARGET) -> Result:
    """A push that sends nothing, in this process."""
    return CliRunner().invoke(main, ["push", str(folder), repo, "--dry-run", *options])


def push(
    home: Home, folder: Path, *options: str, repo: str = TARGET, token: str | None = TOKEN
) -> subprocess.CompletedProcess[str]:
    """A push by the command line; the token must not show."""
    environment = {"HF_HUB_DISABLE_XET": "1"} | ({"HF_TOKEN": token} if token else {})
    arguments = ["push", str(folder), repo, *options]
    done = home.run(PUSH, *arguments, **environment)
    assert "Traceback" not in done.stderr, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done


def sent(home: Home, folder: Path, *options: str, repo: str = TARGET) -> str:
    """The address that a push which goes well ends with."""
    done = push(home, folder, "--accept-license", *options, repo=repo)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def refused(home: Home, folder: Path, *options: str, **more: str | None) -> str:
    """The one line of a push that does not."""
    done = push(home, folder, "--accept-license", *options, **more)  # type: ignore[arg-type]
    assert done.returncode == 1, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    return line.removeprefix("Error: ")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def at_the_hub(hub: Hub, revision: str = "main", repo: str = TARGET) -> dict[str, bytes]:
    """The repository's files, but for the one that the Hub itself begins it with."""
    files = hub.repositories[repo].files(revision)
    return {name: content for name, content in files.items() if name != ".gitattributes"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return publishable.scout(tmp_path / "scout-int4")


@pytest.fixture
def home(tmp_path: Path, hub: Hub) -> Home:
    return Home(tmp_path / "hf", hub.address)


@pytest.fixture
def hub():  # type: ignore[no-untyped-def]
    with Hub({}) as running:
        yield running


# --- duties, before anything is sent ---


def test_dry_run_prints_every_duty_with_its_state(folder: Path) -> None:
    done = dry(folder, "--accept-license")
    assert done.exit_code == 0, done.output
    *lines, last = done.stdout.splitlines()
    assert [line[17:38].strip() for line in lines] == list(DUTIES)
    states = {line[17:38].strip(): line[:17].strip() for line in lines}
    assert states == {name: "will be written" if name in CARD else "fulfilled" for name in DUTIES}
    assert "European Union" in done.stdout
    assert "README.md" not in contents(folder)
    assert last == f"Nothing was sent: {len(contents(folder)) + 1} files would go to {TARGET}."


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def rewrite(before: str, after: str) -> Callable[[Path], object]:
    """In a README.md that is there."""

    def change(folder: Path) -> None:
        text = CliRunner().invoke(main, ["card", str(folder), "--repo", TARGET]).stdout
        assert before in text
        (folder / "README.md").write_text(text.replace(before, after))

    return change


@pytest.mark.parametrize(
    ("duty", "change"),
    [
        ("LICENSE", remove("LICENSE")),
        ("USE_POLICY", remove("USE_POLICY.md")),
        ("NOTICE", remove("NOTICE")),
        ("Built with Llama", rewrite("**Built with Llama.**", "")),
        ("EU clause", rewrite("European Union", "Union")),
        ("modification", rewrite("was modified", "is small")),
        ("metadata: licence", rewrite("license_name: llama4", "license_name: llama3.1")),
        ("metadata: base model", rewrite("base_model_relation: quantized\n", "")),
        ("metadata: tags", rewrite("- quantized\n", "")),
    ],
)
def test_each_duty_removed_by_hand_is_caught(
    duty: str, change: Callable[[Path], object], folder: Path
) -> None:
    change(folder)
    done = dry(folder, "--accept-license")
    assert done.exit_code == 1
    [line] = done.stderr.splitlines()
    assert line.startswith(f"Error: {duty}: ")
    assert f"{'missing':<17}{duty}" in done.stdout


def test_a_name_that_does_not_begin_with_llama(folder: Path) -> None:
    done = dry(folder, "--accept-license", repo="me/scout-int4")
    assert done.exit_code == 1
    assert done.stderr == (
        "Error: repository name: name it me/Llama-4-Scout-17B-16E-Instruct-scout-int4\n"
    )


def test_without_acceptance_nothing_is_sent(folder: Path, home: Home, hub: Hub) -> None:
    done = push(home, folder)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("Error: acceptance: read LICENSE and USE_POLICY in ")
    assert "European Union" in line
    assert not hub.requests


def test_another_licence_needs_neither_name_nor_acceptance(tmp_path: Path) -> None:
    done = dry(publishable.other(tmp_path / "small"), repo="me/small")
    assert done.exit_code == 0, done.output
    assert "Llama" not in done.stdout


def test_licence_files_of_a_source_that_had_none_may_be_added(folder: Path) -> None:
    (folder / "LICENSE").unlink()
    publishable.seal(folder)  # as quantize leaves it
    assert "Error: LICENSE: copy it" in dry(folder, "--accept-license").stderr
    (folder / "LICENSE").write_text(publishable.AGREEMENT)
    assert dry(folder, "--accept-license").exit_code == 0
    (folder / "else.txt").write_text("?")
    assert "else.txt" in dry(folder, "--accept-license").stderr


# --- what is no finished checkpoint, no repository ---


def test_a_folder_that_is_not_finished(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    done = dry(folder, "--accept-license")
    assert done.exit_code == 1
    assert "not a finished llama4q checkpoint" in done.stderr


def test_a_file_that_is_not_as_it_was_written(folder: Path) -> None:
    shard = folder / "model-00002-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[30_000] ^= 1
    shard.write_bytes(content)
    done = dry(folder, "--accept-license")
    assert done.exit_code == 1
    assert f"{shard}: is not as it was written" in done.stderr


@pytest.mark.parametrize(
    ("repo", "words"),
    [
        ("datasets/me/Llama-x", "a repository of another type"),
        ("spaces/me/Llama-x", "a repository of another type"),
        ("Llama-x", "not a model's repository; name it as owner/name"),
        ("me/Llama/x", "not a model's repository"),
        ("https://huggingface.co/me/Llama-x", "not a model's repository"),
        ("me/Llama--x", "not a name for a repository"),
        ("me/Llama x", "not a name for a repository"),
        ("me/" + "Llama" * 30, "not a name for a repository"),
    ],
)
def test_names_that_are_no_model_s_repository(repo: str, words: str, folder: Path) -> None:
    done = dry(folder, "--accept-license", repo=repo)
    assert done.exit_code == 1
    assert f"Error: {repo}: {words}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_pull_request_is_for_main(folder: Path) -> None:
    done = dry(folder, "--create-pr", "--revision", "next")
    assert "leave out one of the two" in done.stderr
    assert "no such folder" in dry(folder / "nowhere").stderr


# --- what arrives ---


def test_all_of_it_arrives_in_one_commit(folder: Path, home: Home, hub: Hub) -> None:
    address = sent(home, folder, "--private")
    repository = hub.repositories[TARGET]
    assert address == f"{hub.address}/{TARGET}/commit/{repository.heads['main']}"
    assert at_the_hub(hub) == contents(folder)
    assert len(repository.commits) == 2  # the Hub's own first one, and this
    assert repository.private
    card = ModelCard.load(folder / "README.md").data.to_dict()
    assert (card["license_name"], card["base_model"]) == ("llama4", publishable.BASE_MODEL)


def test_a_card_that_is_there_stays(folder: Path, home: Home, hub: Hub) -> None:
    rewrite("nothing was retrained", "we are fond of it")(folder)
    before = (folder / "README.md").read_bytes()
    sent(home, folder)
    assert (folder / "README.md").read_bytes() == before == at_the_hub(hub)["README.md"]


def test_shards_of_an_earlier_push_go_and_other_files_stay(
    folder: Path, home: Home, hub: Hub
) -> None:
    sent(home, publishable.scout(folder.parent / "first", seed=1, shards=5))
    there = hub.repositories[TARGET]
    there.add("main", {**there.files(), "notes.txt": b"ours", "onnx/a.safetensors": b"theirs"})
    sent(home, folder)
    others = {"notes.txt": b"ours", "onnx/a.safetensors": b"theirs"}
    assert at_the_hub(hub) == {**contents(folder), **others}


def test_a_branch_and_a_pull_request(folder: Path, home: Home, hub: Hub) -> None:
    sent(home, folder, "--revision", "next")
    assert at_the_hub(hub, "next") == contents(folder)
    assert at_the_hub(hub) == {}
    address = sent(home, folder, "--create-pr")
    assert address == f"{hub.address}/{TARGET}/discussions/1"
    assert at_the_hub(hub, "refs/pr/1") == contents(folder)
    assert at_the_hub(hub) == {}


def test_a_second_push_of_the_same_changes_nothing(folder: Path, home: Home, hub: Hub) -> None:
    first = sent(home, folder)
    before = list(hub.uploads)
    assert sent(home, folder) == first
    assert hub.uploads == before


# --- what breaks ---


def test_a_cut_push_leaves_the_remote_as_it_was_and_goes_on(
    folder: Path, home: Home, hub: Hub
) -> None:
    sent(home, publishable.scout(folder.parent / "first", seed=1))
    before, hub.uploads[:] = at_the_hub(hub), []
    hub.most_uploads = 2
    line = refused(home, folder)
    assert line.startswith(f"{TARGET}: upload failed (the Hub answers 403 (Request has expired))")
    assert "repeat the command" in line
    assert at_the_hub(hub) == before
    arrived, hub.most_uploads = set(hub.uploads), None
    assert len(arrived) == 2
    hub.uploads.clear()
    sent(home, folder)
    assert at_the_hub(hub) == contents(folder)
    large = {sha256(content) for content in contents(folder).values() if hub.is_lfs(content)}
    assert set(hub.uploads) == large - arrived - {sha256(content) for content in before.values()}


def test_a_commit_that_fails_changes_nothing(folder: Path, home: Home, hub: Hub) -> None:
    hub.refuse_commits = DOWN
    line = refused(home, folder)
    assert f"{TARGET}: the Hub answers 503 (Hub is down); repeat the command" in line
    assert at_the_hub(hub) == {}
    hub.refuse_commits = None
    hub.uploads.clear()
    sent(home, folder)
    assert at_the_hub(hub) == contents(folder)
    assert hub.uploads == []


def test_thirty_percent_of_requests_fail(tmp_path: Path, home: Home, hub: Hub) -> None:
    folder = publishable.scout(tmp_path / "scout-int4", shards=12)
    hub.failing, hub.lfs_from = 0.3, 2**10  # more files are objects: more requests
    for _ in range(30):
        done = push(home, folder, "--accept-license")
        if done.returncode == 0:
            break
        if TARGET in hub.repositories:  # a commit may be there whose answer broke off
            assert at_the_hub(hub) in ({}, contents(folder))
        [line] = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
        assert "repeat the command" in line
    assert done.returncode == 0
    assert {"429", "503", "cut"} == set(hub.failures)
    assert at_the_hub(hub) == contents(folder)
    assert len(hub.repositories[TARGET].commits) == 2


# --- what the Hub refuses ---


def test_no_token(folder: Path, home: Home, hub: Hub) -> None:
    assert refused(home, folder, token=None) == (
        "no token for the Hub here; run 'hf auth login' with one that may write"
    )
    assert not hub.requests


def test_a_token_that_nobody_knows(folder: Path, home: Home) -> None:
    line = refused(home, folder, token="hf_another")
    assert "the Hub answers 401 (Invalid credentials in Authorization header); run 'hf auth" in line
    assert "hf_another" not in line


def test_a_namespace_of_others(folder: Path, home: Home) -> None:
    line = refused(home, folder, repo="meta-llama/Llama-4-int4")
    assert f"the Hub answers 403 ({NOT_YOURS.message}); run 'hf auth login'" in line
    assert line.endswith("with a token that may write it")


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (GATED, "is gated; accept its licence on its Hub page"),
        (DOWN, "the Hub answers 503 (Hub is down); repeat the command to go on"),
        (Refusal(429, "", "Too Many Requests"), "the Hub answers 429 (Too Many Requests); repeat"),
    ],
)
def test_a_hub_that_refuses(
    refusal: Refusal, words: str, folder: Path, home: Home, hub: Hub
) -> None:
    hub.refuse_all = refusal
    assert f"{TARGET}: {words}" in refused(home, folder)


def test_no_network(folder: Path, tmp_path: Path) -> None:
    with Hub({}) as hub:
        gone = Home(tmp_path, hub.address)
    line = refused(gone, folder)
    assert f"{TARGET}: upload failed (" in line
    assert "Connection refused" in line


def test_private_does_not_hide_what_is_public(folder: Path, home: Home, hub: Hub) -> None:
    sent(home, folder)
    hub.requests.clear()
    assert "is there already, and public" in refused(home, folder, "--private")
    assert not [path for _, path, _ in hub.requests if "commit" in path]


def test_a_pull_request_for_a_repository_that_is_not_there(folder: Path, home: Home) -> None:
    assert "no such repository that this token may see" in refused(home, folder, "--create-pr")


def test_a_card_that_the_hub_does_not_take(folder: Path, home: Home, hub: Hub) -> None:
    rewrite("language:\n- en\n", "language:\n- Saxon\n")(folder)
    line = refused(home, folder)
    assert "README.md: the Hub refuses its metadata (" in line
    assert '"language" is not valid' in line
    assert TARGET not in hub.repositories


# --- from the Hub and back ---


def test_from_the_hub_and_back_without_a_trace_of_the_token(tmp_path: Path) -> None:
    """quantize takes the source's licence along; what is pulled again has the bytes of the run."""
    source = tiny.write(tmp_path / "source", tiny.Variant(layers=1, experts=2, vocab_size=2048))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(POCKET_MODEL / name, source)
    (source / "LICENSE").write_text(publishable.APACHE)
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\nSmall.\n")
    with Hub(contents(source), failing=0.1) as hub:
        home = Home(tmp_path / "hf", hub.address)
        environment = {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "HF_DEBUG": "1"}
        quantize = (
            "quantize", REPO, str(tmp_path / "out"), "--samples", "1", "--length", "64",
            "--eval-windows", "1", "--eval-length", "64", "--lengths", "",
        )  # fmt: skip
        for arguments in (quantize, ("push", str(tmp_path / "out"), "me/small-int4")):
            for _ in range(30):
                done = home.run(PUSH, *arguments, **environment)
                assert TOKEN not in done.stdout + done.stderr
                if done.returncode == 0:
                    break
            assert done.returncode == 0, done.stderr
        made = contents(tmp_path / "out")
        assert at_the_hub(hub, repo="me/small-int4") == made
        hub.failing = 0
        pulled = home.resolve("me/small-int4", HF_HUB_DISABLE_XET="1")
    assert contents(pulled.folder).items() <= made.items()
    assert not [name for name, content in made.items() if TOKEN.encode() in content]
    said = json.loads(made["report.json"])["source"]["metadata"]
    assert (said["license"], said["language"]) == ("apache-2.0", "en")
    card = ModelCard(made["README.md"].decode()).data.to_dict()
    assert (card["license"], card["base_model"]) == ("apache-2.0", REPO)


def test_objects_are_named_as_git_and_lfs_name_them() -> None:
    """The Hub of these tests, against git hash-object and sha256sum."""
    content = b"some words\n" * 9
    for command, name in (
        (["git", "hash-object", "--stdin"], git_hash(content)),
        (["sha256sum"], sha256(content)),
    ):
        done = subprocess.run(command, input=content, capture_output=True, check=True)
        assert done.stdout.decode().split()[0] == name
