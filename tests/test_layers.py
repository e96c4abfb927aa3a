"""Who may import whom, read from the sources themselves: the import rule of docs/design.md."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("llama4q", "calibrate", "evals", "commands")

# package -> what none of its modules may import
FORBIDDEN = {
    "llama4q": ("calibrate", "evals", "commands", "cli"),
    "calibrate": ("evals", "commands", "cli"),
    "evals": ("calibrate", "commands", "cli"),
    "commands": ("cli",),
}
# module -> what it may not reach, not even through others
UNKNOWING = {
    "llama4q.checkpoint": ("writer", "config", "model", "weights", "recipe", "schemes", "packing"),
    "llama4q.writer": ("config", "model", "weights", "recipe", "schemes", "packing"),
    "llama4q.config": ("checkpoint", "model", "weights"),
    "llama4q.model": ("checkpoint", "schemes", "packing", "weights", "recipe"),
    "llama4q.schemes": ("checkpoint", "model", "packing", "weights", "recipe"),
    "llama4q.bnb": ("checkpoint", "config", "model", "packing", "weights", "recipe"),
    "llama4q.stream": ("checkpoint", "schemes", "packing", "weights"),
    "llama4q.machine": ("checkpoint", "model", "weights", "recipe"),
    "llama4q.tokens": ("checkpoint", "model", "config", "weights"),
    "llama4q.text": ("tokens", "checkpoint", "model", "config", "weights"),
    "calibrate.gptq": ("model", "checkpoint", "weights", "config", "recipe"),
    "calibrate.hessian": ("model", "checkpoint", "weights", "config", "recipe"),
    "calibrate.eta": ("model", "checkpoint", "weights", "config", "recipe"),
    "calibrate.data": ("model", "checkpoint", "weights", "config"),
    "evals.figures": ("policy", "gate", "verdict"),
    "evals.policy": ("gate", "verdict", "report"),
    "evals.gate": ("verdict", "report", "model", "checkpoint", "weights", "config"),
    "evals.verdict": ("report", "model", "checkpoint", "weights", "config"),
    "evals.report": ("model", "checkpoint", "weights", "config"),
}

Sources = Mapping[str, str]  # module -> its text


def sources() -> dict[str, str]:
    """Every module of the product."""
    found = {"cli": (ROOT / "cli.py").read_text()}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path.read_text()
    return found


def imported(module: str, text: str, known: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """The modules that `module` imports anywhere in its text, and whether relatively."""
    package = module if module in PACKAGES else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = ".".join(parts[: len(parts) + 1 - node.level]) if node.level else ""
            base = ".".join(part for part in (above, node.module or "") if part)
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                yield (submodule if submodule in known else base), bool(node.level)


def reached(module: str, modules: Sources) -> set[str]:
    """What `module` imports of the product, directly and through others."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        for other, _ in imported(name, modules[name], modules):
            if other in modules and other not in found:
                found.add(other)
                waiting.append(other)
    return found


def offences(modules: Sources) -> list[str]:
    """Every breach of the rule, in words."""
    found = []
    for module, text in modules.items():
        package = module.partition(".")[0]
        for other, relative in imported(module, text, modules):
            top = other.partition(".")[0]
            if top in FORBIDDEN.get(package, ()):
                found.append(f"{module} imports {other}")
            if top == package and top in PACKAGES and not relative:
                found.append(f"{module} imports {other} by its full name")
            if relative and top != package:
                found.append(f"{module} imports {other} relatively")
    for module, names in UNKNOWING.items():
        if module in modules:
            beyond = reached(module, modules) & {f"llama4q.{name}" for name in names}
            found += [f"{module} reaches {other}" for other in sorted(beyond)]
    return found


def test_the_import_rule() -> None:
    assert offences(sources()) == []


def test_every_module_is_looked_at() -> None:
    modules = sources()
    assert set(UNKNOWING) <= set(modules)
    assert {"cli", *PACKAGES} <= set(modules)
    # the program's parts are found to know each other at all
    assert "llama4q.checkpoint" in reached("llama4q.weights", modules)
    assert "calibrate.gptq" in reached("calibrate.run", modules)
    assert "llama4q.model" in reached("evals.evaluation", modules)
    assert {"calibrate.run", "evals.evaluation"} <= reached("cli", modules)


@pytest.mark.parametrize(
    ("modules", "offence"),
    [
        ({"llama4q.model": "import evals.gate"}, "llama4q.model imports evals.gate"),
        (
            {"llama4q.hub": "def f():\n    from calibrate import run", "calibrate.run": ""},
            "llama4q.hub imports calibrate.run",
        ),
        ({"llama4q.hub": "from cli import main"}, "llama4q.hub imports cli"),
        ({"llama4q": "import calibrate"}, "llama4q imports calibrate"),
        ({"evals.gate": "from calibrate.run import X"}, "evals.gate imports calibrate.run"),
        (
            {"calibrate.run": "if TYPE_CHECKING:\n    import evals.report as r"},
            "calibrate.run imports evals.report",
        ),
        (
            {"llama4q.hub": "from llama4q.errors import UserError", "llama4q.errors": ""},
            "llama4q.hub imports llama4q.errors by its full name",
        ),
        (
            {"calibrate.run": "from calibrate import layer", "calibrate.layer": ""},
            "calibrate.run imports calibrate.layer by its full name",
        ),
        (
            {"llama4q.model": "from . import packing", "llama4q.packing": ""},
            "llama4q.model reaches llama4q.packing",
        ),
        (
            {
                "calibrate.gptq": "from .hessian import h",
                "calibrate.hessian": "from llama4q.weights import x",
                "llama4q.weights": "from .checkpoint import Checkpoint",
                "llama4q.checkpoint": "",
            },
            "calibrate.gptq reaches llama4q.checkpoint",
        ),
    ],
)
def test_a_breach_is_found(modules: dict[str, str], offence: str) -> None:
    assert offence in offences(modules)


def test_what_is_allowed_is_no_breach() -> None:
    modules = {
        "cli": "from calibrate.run import quantize\nfrom evals import gate\nimport llama4q",
        "calibrate.run": "from llama4q.model import X\nfrom .layer import Y\nfrom . import layer",
        "calibrate.layer": "import torch",
        "evals.gate": "from llama4q import __version__",
        "llama4q": "",
        "llama4q.model": "from .config import ModelConfig",
        "llama4q.config": "import json",
    }
    assert offences(modules) == []


def test_the_program_starts_in_one_place() -> None:
    assert not list(ROOT.glob("*/__main__.py"))


@pytest.mark.parametrize("module", sorted(sources()))
def test_every_module_says_what_it_is_about(module: str) -> None:
    about = ast.get_docstring(ast.parse(sources()[module]))
    assert about
    assert 20 <= len(about.splitlines()[0]) <= 100
