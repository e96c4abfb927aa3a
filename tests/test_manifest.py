"""A manifest tells a whole copy of a checkpoint from any other. The authority is sha256sum."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from llama4q.errors import UserError
from llama4q.manifest import MANIFEST, check_manifest, manifest

FILES = {"model.safetensors": b"weights" * 400_000, "config.json": b"{}", "licence é.txt": b""}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / MANIFEST).write_bytes(manifest(tmp_path))
    return tmp_path


def by_sha256sum(folder: Path) -> dict[str, str]:
    said = subprocess.run(
        ["sha256sum", *FILES], cwd=folder, capture_output=True, text=True, check=True
    ).stdout
    return {name: digest for digest, name in (line.split("  ") for line in said.splitlines())}


def test_it_says_what_sha256sum_says(folder: Path) -> None:
    pieces: list[int] = []
    assert check_manifest(folder, pieces.append) == by_sha256sum(folder)
    assert sum(pieces) == sum(map(len, FILES.values()))
    assert len(pieces) > 2  # also while a file is read
    listed = json.loads((folder / MANIFEST).read_bytes())["files"]
    assert {name: entry["size"] for name, entry in listed.items()} == {
        name: len(content) for name, content in FILES.items()
    }


def test_known_digests_are_not_taken_again(folder: Path) -> None:
    said = json.loads(manifest(folder, {"config.json": "known"}))["files"]
    assert said["config.json"]["sha256"] == "known"
    assert said["model.safetensors"]["sha256"] == by_sha256sum(folder)["model.safetensors"]


@pytest.mark.parametrize("name", ["README.md", ".gitattributes", ".cache", ".llama4q"])
def test_cards_and_what_tools_leave_are_free_to_change(name: str, folder: Path) -> None:
    before = manifest(folder)
    (folder / name).write_text("edited")
    check_manifest(folder)
    assert manifest(folder) == before


def test_links_are_files_as_in_the_cache_of_the_hub(folder: Path, tmp_path: Path) -> None:
    (tmp_path / ".blob").write_bytes(FILES["config.json"])
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / ".blob")
    check_manifest(folder)


def lose(folder: Path) -> None:
    (folder / "config.json").unlink()


def add(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("hello")


def add_a_folder(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()  # transformers reads what is in there


def change(folder: Path) -> None:
    content = bytearray(FILES["model.safetensors"])
    content[1_500_000] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def truncate(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(FILES["model.safetensors"][:-1])


def lengthen(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"{} ")


def replace_by_a_folder(folder: Path) -> None:
    lose(folder)
    (folder / "config.json").mkdir()


def lose_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def says(content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / MANIFEST).write_text(content)

    return write


def names(name: str) -> Callable[[Path], None]:
    return says(json.dumps({"files": {name: {"size": 2, "sha256": "0"}}}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose, r"config\.json: is missing"),
        (add, r"chat_template\.jinja and 0 more are not in manifest\.json"),
        (add_a_folder, "additional_chat_templates and 0 more are not in"),
        (change, r"model\.safetensors: is not as it was written"),
        (truncate, r"model\.safetensors: is truncated \(2,799,999 bytes, 2,800,000 in"),
        (lengthen, r"config\.json: is changed \(3 bytes, 2 in"),
        (replace_by_a_folder, r"config\.json: is missing"),
        (lose_the_manifest, r"not a finished llama4q checkpoint, it has no manifest\.json"),
        (says("{"), "not a manifest"),
        (says("[]"), "not a manifest"),
        (says('{"files": {"config.json": {"size": "many", "sha256": ""}}}'), "not a manifest"),
        (says('{"files": {"config.json": 2}}'), "not a manifest"),
        (names("../config.json"), r"names '\.\./config\.json', outside the folder"),
        (names("/etc/hostname"), "outside the folder"),
        (names("original/config.json"), "outside the folder"),
        (names(".."), "outside the folder"),
        (names(""), "outside the folder"),
        (names("config.json\0"), "outside the folder"),
    ],
)
def test_a_copy_that_is_not_whole_is_one_line(
    damage: Callable[[Path], None], words: str, folder: Path
) -> None:
    check_manifest(folder)
    damage(folder)
    with pytest.raises(UserError, match=words) as raised:
        check_manifest(folder)
    assert "\n" not in str(raised.value)


def test_a_folder_has_no_place_in_a_manifest(folder: Path) -> None:
    add_a_folder(folder)
    with pytest.raises(UserError, match="additional_chat_templates: is no file"):
        manifest(folder)
