"""The wheel, built as it is published: what is in it, and nothing else.

`calibrate`, `evals`, `commands` and `cli` are generic names; a stray file beside them would be
installed too.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email.parser import HeaderParser
from pathlib import Path

import pytest

from llama4q import __version__

ROOT = Path(__file__).parent.parent
PACKAGES = ("llama4q", "calibrate", "evals", "commands")
INFO = f"llama4q-{__version__}.dist-info"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the wheel."""
    folder = tmp_path_factory.mktemp("dist")
    built = subprocess.run(
        [
            sys.executable, "-m", "build", "--wheel", "--no-isolation",
            "--outdir", str(folder), str(ROOT),
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    [path] = folder.iterdir()
    assert path.name == f"llama4q-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def shipped(folder: Path) -> set[str]:
    """Every file below a folder of the repository, as the wheel names it."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_only_the_program_is_in_it(wheel: dict[str, bytes]) -> None:
    tops = {name.partition("/")[0] for name in wheel}
    assert tops == {*PACKAGES, "cli.py", INFO}
    assert not [name for name in wheel if "__pycache__" in name or name.endswith(".pyc")]


def test_the_whole_program_is_in_it(wheel: dict[str, bytes]) -> None:
    wanted = {"cli.py"}.union(*(shipped(ROOT / package) for package in PACKAGES))
    assert {name for name in wheel if not name.startswith(INFO)} == wanted
    for package in PACKAGES:
        assert f"{package}/__init__.py" in wheel
        assert f"{package}/py.typed" in wheel


def test_recipes_and_the_pocket_model_are_in_it(wheel: dict[str, bytes]) -> None:
    for recipe in (
        "int3", "int4", "int4-g64", "int4-g32", "int4-fp8", "fp8", "int8", "mixed",
        "bnb-nf4", "bnb-int8",
    ):  # fmt: skip
        assert f"llama4q/recipes/{recipe}.toml" in wheel
    pocket = [
        "model/config.json", "model/model.safetensors.index.json", "model/tokenizer.json",
        "model/tokenizer_config.json", "model/chat_template.jinja", "model/LICENSE",
        "text/train.txt", "text/heldout.txt", "text/LICENSE",
    ]  # fmt: skip
    for name in pocket:
        assert f"llama4q/pocket/{name}" in wheel
    assert [name for name in wheel if name.endswith(".safetensors")]
    assert sum(map(len, wheel.values())) < 26 * 10**6


def test_what_pip_reads(wheel: dict[str, bytes]) -> None:
    entries = ConfigParser()
    entries.read_string(wheel[f"{INFO}/entry_points.txt"].decode())
    assert dict(entries["console_scripts"]) == {"llama4q": "cli:main"}
    metadata = HeaderParser().parsestr(wheel[f"{INFO}/METADATA"].decode())
    assert metadata["Name"] == "llama4q"
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "torch>=2.8" in metadata.get_all("Requires-Dist", [])
    assert f"{INFO}/licenses/LICENSE" in wheel
    assert b"Apache License" in wheel[f"{INFO}/licenses/LICENSE"]
