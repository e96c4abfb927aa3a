"""What the documents say about commands, recipes, files and modules, against the code itself."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from click.testing import CliRunner
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from calibrate.beforehand import predicted_bytes
from calibrate.codes import Rescue
from cli import main
from evals.figures import FIGURES
from evals.policy import KEYS, SETTINGS, load_policy
from llama4q.checkpoint import Checkpoint
from llama4q.config import parse_config, read_config
from llama4q.export import quantization_config
from llama4q.gpus import DEVICES
from llama4q.hub import POCKET_MODEL
from llama4q.recipe import Calibration, Solver, load_recipe, parse_recipe, shipped_recipes
from llama4q.schemes import SCHEMES
from llama4q.weights import Component

from . import test_inspect, tiny

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs/guide.md").read_text()
CI = (ROOT / "docs/ci.md").read_text()
FORMAT = (ROOT / "docs/format.md").read_text()
DESIGN = (ROOT / "docs/design.md").read_text()
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
REAL = {"Scout": test_inspect.SCOUT, "Maverick": test_inspect.MAVERICK}


def blocks(text: str, language: str) -> list[str]:
    """The contents of fenced code blocks."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def section(text: str, title: str) -> str:
    """From a heading to the next one of its level."""
    start = text.index(f"\n{title}\n") + 1
    level = title.partition(" ")[0]
    end = re.search(rf"^{level} ", text[start + len(title) :], re.MULTILINE)
    return text[start:] if end is None else text[start : start + len(title) + end.start()]


def rows(text: str) -> dict[str, list[str]]:
    """The table rows of a text by their first cell."""
    cells = [re.split(r"\s*\|\s*", line.strip("| ")) for line in text.splitlines() if "|" in line]
    return {first: others for first, *others in cells}


def options() -> Iterator[tuple[str, click.Option]]:
    for name, command in main.commands.items():
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                yield name, parameter


# --- the guide ---


@pytest.mark.parametrize("name", main.commands)
def test_guide_names_every_command(name: str) -> None:
    assert f"\n### {name}\n" in GUIDE


@pytest.mark.parametrize(
    ("name", "option"),
    [pytest.param(name, option, id=f"{name} {option.opts[0]}") for name, option in options()],
)
def test_guide_explains_every_option_of_a_command(name: str, option: click.Option) -> None:
    text = section(GUIDE, f"### {name}")
    if name == "eval":  # it refers to the table of quantize
        text += section(GUIDE, "### quantize")
    for spelling in option.opts:
        assert f"`{spelling}`" in text
    row = rows(text).get(", ".join(f"`{spelling}`" for spelling in option.opts))
    shown = option.default
    if row is not None and isinstance(shown, str | int) and not isinstance(shown, bool):
        assert row[0].strip("`") == str(shown)


def test_guide_has_every_figure_and_key_of_a_policy() -> None:
    text = section(section(GUIDE, "## Commands"), "### check")
    table = rows(text)
    for name, figure in FIGURES.items():
        meaning, kind, *_ = table[f"`{name}`"]
        assert meaning
        assert kind == ("`min`" if figure.larger_is_better else "`max`")
    [example] = blocks(text, "toml")
    for key in (*KEYS, *SETTINGS):
        assert key in example or f"`{key}`" in text, key


def test_guide_shows_a_policy(tmp_path: Path) -> None:
    [example] = blocks(section(section(GUIDE, "## Commands"), "### check"), "toml")
    (tmp_path / "gate.toml").write_text(example)
    assert len(load_policy(tmp_path / "gate.toml").limits) == 6


def test_guide_shows_commands_that_parse() -> None:
    lines = "\n".join(blocks(GUIDE, "sh")).splitlines()
    shown = parsed(line for line in lines if "[options]" not in line)
    assert shown >= set(main.commands)


def test_the_page_on_ci_shows_commands_that_parse() -> None:
    """And so do the steps of the workflow that it comes with."""
    [job] = yaml.safe_load((ROOT / "docs/workflows/accuracy.yml").read_text())["jobs"].values()
    assert parsed(step["run"] for step in job["steps"] if "run" in step) == {"eval", "check"}
    lines = "\n".join(blocks(CI, "sh")).splitlines()
    assert parsed(lines) == {"quantize", "eval", "check"}


def parsed(lines: Iterable[str]) -> set[str]:
    """The commands of llama4q among some lines of a shell, each with arguments that it takes."""
    names = set()
    for line in lines:
        words = shlex.split(line.partition(" > ")[0], comments=True)
        if words[:1] == ["llama4q"] and not words[1].startswith("-"):
            name, *arguments = words[1:]
            names.add(name)
            if "--show-policy" not in arguments:  # which prints and ends
                main.commands[name].make_context(name, arguments)
    return names


def test_guide_names_every_device() -> None:
    assert [name for name in DEVICES if f"`{name}`" not in section(GUIDE, "### fit")] == []


def test_guide_teaches_the_whole_recipe() -> None:
    [example] = blocks(section(GUIDE, "## Recipes"), "toml")
    recipe = parse_recipe(example, "the guide")
    assert recipe.calibration == Calibration()
    assert recipe.solver == Solver()
    assert set(recipe.schemes) == set(Component)
    keys = [field.name for kind in (Calibration, Solver) for field in dataclasses.fields(kind)]
    for key in ("name", "description", "layers", *keys):
        assert re.search(rf"^{key} = ", example, re.MULTILINE), key
    assert [name for name in SCHEMES if not re.search(rf"\b{name}\b", example)] == []


@pytest.mark.parametrize("model", REAL)
def test_guide_has_the_sizes_of_shipped_recipes(model: str) -> None:
    table = rows(section(GUIDE, "## Recipes"))
    column = table["recipe"].index(model)
    source = Checkpoint.__new__(Checkpoint)
    source.infos = test_inspect.bf16(REAL[model])
    config = parse_config(REAL[model], model)
    for name in shipped_recipes():
        size = predicted_bytes(source, config, load_recipe(name))
        assert table[f"`{name}`"][column] == f"{size / 1e9:.1f} GB"
    original = sum(info.nbytes for info in source.infos.values())
    assert f"{original / 1e9:.1f}" in section(GUIDE, "## Recipes")


def test_guide_lists_the_keys_of_a_report(tmp_path: Path) -> None:
    variant = dataclasses.replace(tiny.SCOUT, vocab_size=2048)
    source, destination = tiny.write(tmp_path / "source", variant), tmp_path / "out"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(POCKET_MODEL / name, source)
    command = (
        f"quantize {source} {destination} --samples 1 --length 64 "
        "--eval-windows 1 --eval-length 64 --lengths 80"
    )
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    report = json.loads((destination / "report.json").read_text())
    found = keys(report) | {field.name for field in dataclasses.fields(Rescue)}
    listed = section(GUIDE, "## The report")
    assert {key for key in found if f"`{key}`" not in listed} == set()


def keys(value: Any) -> set[str]:
    """All keys of a report, but those of parts that other documents and files list."""
    if isinstance(value, list):
        return set().union(*(keys(entry) for entry in value))
    if not isinstance(value, dict):
        return set()
    within = {
        key: {} if key in ("versions", "units", "recipe", "files", "components") else value[key]
        for key in value
    }
    return set(value).union(*(keys(part) for part in within.values()))


# --- format and design ---


def test_format_shows_the_quantization_config() -> None:
    [example] = blocks(FORMAT, "json")
    ours = quantization_config(load_recipe("int4"), read_config(POCKET_MODEL))
    assert json.loads("{" + example + "}") == {"quantization_config": ours}


def test_format_shows_a_packed_word() -> None:
    found = re.search(r"q: +([-\d ]+)  inputs 0 to 7\n.*\n +weight_packed\[o, 0\]: +(\w+)", FORMAT)
    assert found is not None
    codes = torch.tensor([[int(code) for code in found[1].split()]], dtype=torch.int8)
    assert pack_to_int32(codes, 4).item() == int(found[2], 16)


def test_design_maps_every_module() -> None:
    [tree] = blocks(DESIGN, "")
    for package in ("llama4q", "calibrate", "evals", "evals/html"):
        listed = re.search(rf"^{package}/.*\n((  .*\n)+)", tree, re.MULTILINE)
        assert listed is not None
        names = {line.split()[0] for line in listed[1].splitlines()}
        assert names == {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_paths_lead_somewhere(document: Path) -> None:
    text = document.read_text()
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert "://" in link or (document.parent / link).exists(), link
    for path in re.findall(r"`((?:llama4q|calibrate|evals|tests|docs|benchmarks)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
