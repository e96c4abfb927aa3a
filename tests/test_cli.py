"""The commands as a person or a CI job uses them: help, exit codes, JSON, and that options count.

tests/test_bad_input.py has what is refused. The authority on evidence is a second measurement, by
`eval`, of what `quantize` wrote.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

import cli
from evals.card import markdown
from evals.figures import FIGURES
from evals.html.page import page
from llama4q import __version__
from llama4q.checkpoint import Checkpoint
from llama4q.hidden import Spool
from llama4q.recipe import shipped_recipes

from . import plain_reports, tiny
from .test_bad_input import QUICK, VARIANT, with_tokenizer
from .test_ruler import squad

ROOT = Path(__file__).parent.parent
MEASURED = QUICK[4:]  # what eval takes of it
HEAVY = ("torch", "transformers", "datasets", "safetensors", "numpy", "tqdm", "huggingface_hub")


def ran(*arguments: object) -> Result:
    """A command that ends without a traceback."""
    found = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise AssertionError(found.output) from found.exception
    return found


def parsed(*arguments: object) -> dict[str, Any]:
    """The JSON of a command that ends well; it alone is on stdout."""
    found = ran(*arguments, "--json")
    assert found.exit_code == 0, found.stderr
    report: dict[str, Any] = json.loads(found.stdout)
    return report


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer(tiny.write(tmp_path_factory.mktemp("cli") / "source", VARIANT))


@pytest.fixture(scope="module")
def output(source: Path) -> Path:
    """What `quantize` makes of the source."""
    return source.parent / "output"


@pytest.fixture(scope="module")
def report(source: Path, output: Path) -> dict[str, Any]:
    """What `quantize --json` prints."""
    return parsed("quantize", source, output, *QUICK)


def weights(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))


@pytest.mark.parametrize("name", [None, *cli.main.commands])
def test_help(name: str | None) -> None:
    """Of the program and of each command, and a line for each option."""
    command = cli.main.commands[name] if name else cli.main
    found = ran(*([name] if name else []), "--help")
    assert found.exit_code == 0
    assert command.help
    assert command.help.partition("\n")[0] in " ".join(found.stdout.split())
    for parameter in command.params:
        if parameter.param_type_name == "option":
            assert getattr(parameter, "help", None), parameter.name
            assert parameter.opts[0] in found.stdout


def test_the_program_names_every_command() -> None:
    assert set(cli.main.commands) == {
        "inspect", "pull", "quantize", "fit", "eval", "lm-eval", "check", "verify", "reproduce",
        "card", "push",
    }  # fmt: skip
    shown = ran("--help").stdout
    for name in cli.main.commands:
        assert f"llama4q {name} " in shown


def test_help_names_the_shipped_recipes() -> None:
    shown = " ".join(ran("quantize", "--help").stdout.split()).replace("- ", "-")  # broken lines
    [listed] = [part.partition(")")[0] for part in shown.split("shipped recipe (")[1:]]
    assert sorted(listed.split(", ")) == shipped_recipes()


def test_version() -> None:
    assert ran("--version").stdout == f"llama4q, version {__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["quantize", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys, cli\n"
        f"cli.main({arguments!r}, standalone_mode=False)\n"
        f"print(sorted(set(sys.modules) & set({HEAVY!r})), file=sys.stderr)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stderr == "[]\n"
    assert found.stdout


def test_a_mistyped_option_is_a_usage_error() -> None:
    """Click's own exit code 2, told apart from a verdict and from a mistake in the data."""
    assert ran("quantize", "--sample", "3").exit_code == 2
    assert ran("quantise").exit_code == 2
    assert ran("quantize", "--method", "awq").exit_code == 2


def test_quantize_reports(source: Path, output: Path, report: dict[str, Any]) -> None:
    assert json.loads((output / "report.json").read_text()) == report
    assert report["llama4q"] == __version__
    assert report["source"]["name"] == str(source)
    assert report["quantized"]["name"] == str(output)
    assert report["quantized"]["bytes"] < report["source"]["bytes"]
    assert report["recipe"]["name"] == "int4"
    assert report["calibration"]["tokens"] == 4 * 64
    assert report["dtype"] == "float32"
    assert [sum(layer["expert_tokens"]) for layer in report["layers"]] == [4 * 64, 4 * 64]
    assert set(report["files"]) == {path.name for path in output.glob("*.safetensors")}
    for side in ("source", "quantized"):
        assert sum(report[side]["components"].values()) == report[side]["bytes"]
    fit = report["fit"]
    assert fit["weight_bytes"] == parsed("fit", output, "--context", "4096")["weight_bytes"]
    held = fit["weight_bytes"] + fit["kv_bytes"] + fit["reserved_bytes"]
    assert held == fit["total_bytes"]
    assert (output / "report.html").read_text() == page(report)
    assert (output / "evaluation.md").read_text() == markdown(report)
    assert report["evidence"]["likelihood"]["tokens"] == 2 * 63
    [task] = report["evidence"]["retrieval"]["tasks"]
    assert [cell["length"] for cell in task["cells"]] == [128]
    assert Checkpoint(output).names()


def assert_close(ours: Any, theirs: Any, where: str = "") -> None:
    """The same JSON, numbers to 1e-6 of their size."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            assert_close(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_close(one, other, f"{where}[{number}]")
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-9), where
    else:
        assert ours == theirs, where


def test_eval_measures_what_quantize_said(
    source: Path, output: Path, report: dict[str, Any], tmp_path: Path
) -> None:
    """One reads the finished files, the other measured on the way."""
    files = ("--out", tmp_path / "r.json", "--html", tmp_path / "r.html")
    measured = parsed("eval", output, "--against", source, *MEASURED, *files)
    assert_close(measured["evidence"], report["evidence"])
    assert measured["evidence"]["likelihood"]["kl_mean"] > 1e-5
    assert measured["quantized"] == report["quantized"]
    assert measured["source"] == report["source"]
    assert json.loads((tmp_path / "r.json").read_text()) == measured
    assert (tmp_path / "r.html").read_text() == page(measured)


def test_eval_under_a_budget(source: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states go to files, and the evidence is the same; with less it says what it needs."""
    files: list[Any] = []
    made = Spool._file

    def file(spool: Spool) -> Any:
        files.append(made(spool))
        return files[-1]

    monkeypatch.setattr(Spool, "_file", file)
    command = ("eval", output, "--against", source, *MEASURED)
    refused = ran(*command, "--memory", "0.2GB")
    found = re.match(r"Error: memory: the evaluation needs ([0-9.]+) GB beside", refused.stderr)
    assert found
    in_memory = parsed(*command)["evidence"]
    assert not files
    least = float(found[1]) * 1e9 + 0.06e9  # the figure is rounded
    monkeypatch.setattr("evals.footprint.held", lambda config, questions: int(least - 1))
    assert parsed(*command, "--memory", f"{least:.0f}")["evidence"] == in_memory
    assert len(files) > 4


def test_eval_of_a_model_against_itself(source: Path) -> None:
    evidence = parsed("eval", source, "--against", source, *MEASURED)["evidence"]
    assert evidence["likelihood"]["kl_mean"] == pytest.approx(0, abs=1e-6)
    assert evidence["likelihood"]["top1_agreement"] == 1
    assert [layer["agreement"] for layer in evidence["layers"]] == [1, 1]


def test_a_table_for_people(source: Path, output: Path, report: dict[str, Any]) -> None:
    found = ran("eval", output, "--against", source, *MEASURED)
    assert found.exit_code == 0
    for word in ("perplexity", "KL, mean", "top-1 agreement", "routing agreement", "retrieval"):
        assert word in found.stdout


def test_quantize_without_source_takes_the_pocket_model(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama4q.hub.POCKET_MODEL", source)
    monkeypatch.chdir(tmp_path)
    found = ran("quantize", *QUICK)
    assert found.exit_code == 0, found.stderr
    assert found.stderr.startswith("No SOURCE named: quantizing the pocket Llama 4 that comes with")
    assert "Written to pocket-int4/, to look at as pocket-int4/report.html" in found.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["pocket-int4"]
    written = json.loads((tmp_path / "pocket-int4" / "report.json").read_text())
    assert written["source"]["name"] == "pocket"


def test_the_destination_is_named_after_source_and_recipe(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = ran("quantize", source, *QUICK, "--recipe", "fp8")
    assert found.exit_code == 0, found.stderr
    assert "No SOURCE named" not in found.stderr
    assert (tmp_path / f"{source.name}-fp8" / "config.json").exists()


@pytest.mark.parametrize(
    ("options", "drawn"),
    [
        (["--method", "rtn"], False),
        (["--recipe", "int8.toml"], False),
        (["--dtype", "bfloat16"], False),
        (["--seed", "1"], True),
        (["--samples", "5"], True),
        (["--length", "65"], True),
        (["--calibration", "own.txt"], True),
    ],
)
def test_options_change_what_is_written(
    options: list[str],
    drawn: bool,
    source: Path,
    output: Path,
    report: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "int8.toml").write_text('[schemes]\nexperts = "int8"\nshared_expert = "int4"\n')
    (tmp_path / "own.txt").write_text("One two three four five six seven. " * 200)
    changed = parsed("quantize", source, "out", *QUICK, *options)
    assert weights(tmp_path / "out") != weights(output)
    assert (changed["calibration"]["digest"] != report["calibration"]["digest"]) == drawn
    likelihood, before = changed["evidence"]["likelihood"], report["evidence"]["likelihood"]
    assert likelihood["digest"] == before["digest"]
    assert likelihood["kl_mean"] != before["kl_mean"]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (["--eval-windows", "3"], "likelihood"),
        (["--eval-length", "65"], "likelihood"),
        (["--eval-text", "own.txt"], "likelihood"),
        (["--lengths", "130"], "retrieval"),
        (["--depths", "0.1,0.9"], "retrieval"),
        (["--prompts", "2"], "retrieval"),
        (["--tasks", "niah_single_1,niah_multikey_1", "--lengths", "512"], "retrieval"),
        (["--tasks", "qa", "--qa", "squad.json", "--lengths", "256"], "retrieval"),
    ],
)
def test_options_change_what_is_measured(
    options: list[str],
    key: str,
    source: Path,
    output: Path,
    report: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.txt").write_text("One two three four five six seven. " * 200)
    (tmp_path / "squad.json").write_text(json.dumps(squad(4, 4)))
    evidence = parsed("eval", output, "--against", source, *MEASURED, *options)["evidence"]
    assert evidence[key]["digest"] != report["evidence"][key]["digest"]


def test_the_same_command_gives_the_same_bytes(
    source: Path, output: Path, report: dict[str, Any], tmp_path: Path
) -> None:
    again = parsed("quantize", source, tmp_path / "again", *QUICK)
    assert weights(tmp_path / "again") == weights(output)
    assert again["evidence"] == report["evidence"]
    assert again["files"] == report["files"]


def test_inspect(source: Path, output: Path, report: dict[str, Any]) -> None:
    found = parsed("inspect", source)
    assert (found["layers"], found["experts"], found["hidden_size"]) == (2, 2, 128)
    assert found["bytes"] == report["source"]["bytes"]
    assert parsed("inspect", output)["bytes"] == report["quantized"]["bytes"]
    assert "routed experts" in ran("inspect", source).stdout


def test_fit_answers_with_its_exit_code(source: Path) -> None:
    large = ("fit", source, "--context", "4096")
    small = (*large, "--gpu-memory", "1GB")
    assert parsed(*large)["fits"] is True
    assert ran(*large).exit_code == 0
    found = ran(*small, "--json")
    assert found.exit_code == 1
    assert json.loads(found.stdout)["fits"] is False
    assert ran(*small).exit_code == 1


LOOSE = ("min_tokens=0", "min_prompts=0", "strict=true")
EVERY_FIGURE = [
    f"{name}.min = -1e12" if figure.larger_is_better else f"{name}.max = 1e12"
    for name, figure in FIGURES.items()
]


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a good report, a better one, one with little in it, and a policy."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    better = {"evidence.layers.1.hidden_error": 0.0025}
    for name, report in (
        ("report", plain_reports.report()),
        ("baseline", plain_reports.altered(better)),
        ("little", plain_reports.altered({"evidence.retrieval": None})),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    (tmp_path / "gate.toml").write_text("[likelihood.kl_p99]\nmax = 0.09")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["report.json"], 0),
        (["report.json", "--baseline", "report.json"], 0),
        (["report.json", "--baseline", "baseline.json"], 1),
        (["report.json", "--policy", "gate.toml"], 1),
        (["report.json", "--policy", "gate.toml", "--limit", "likelihood.kl_p99.max=0.1"], 0),
        (["report.json", "--limit", "rescues.fallback.max = 0"], 0),
        (["report.json", "--limit", "likelihood.kl_p999.max = 0.2"], 1),
        (["little.json"], 3),
        (["little.json", "--limit", "likelihood.kl_max.max = 1"], 1),
    ],
)
@pytest.mark.usefixtures("judged")
def test_check_answers_with_its_exit_code(arguments: list[str], code: int) -> None:
    found = ran("check", *arguments)
    assert found.exit_code == code
    assert found.stderr == ""
    as_json = ran("check", *arguments, "--json")
    assert as_json.exit_code == code
    assert json.loads(as_json.stdout)["exit_code"] == code
    assert json.loads(as_json.stdout)["passed"] is (code == 0)


@pytest.mark.usefixtures("judged")
def test_check_writes_what_ci_systems_read(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("summary.md").write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    command = "check report.json --policy gate.toml --junit found.xml --markdown found.md"
    assert ran(*command.split()).exit_code == 1
    assert len(list(ElementTree.parse("found.xml").iter("failure"))) == 1
    assert Path("found.md").read_text().startswith("### llama4q check: failed: 1 of 1 limits")
    assert Path("summary.md").read_text() == f"before\n{Path('found.md').read_text()}"


def test_check_shows_the_policy_that_holds_by_default(tmp_path: Path) -> None:
    shown = ran("check", "--show-policy")
    assert (shown.exit_code, shown.stderr) == (0, "")
    (tmp_path / "gate.toml").write_text(shown.stdout)
    (tmp_path / "report.json").write_text(json.dumps(plain_reports.report()))
    verdicts = [
        ran("check", tmp_path / "report.json", "--json", *options).stdout
        for options in ([], ["--policy", tmp_path / "gate.toml"])
    ]
    assert verdicts[0] == verdicts[1]


def test_check_takes_the_report_of_a_run(output: Path, report: dict[str, Any]) -> None:
    """Every figure of a real report can be read, but for what it has too little of."""
    path = output / "report.json"
    options = [option for line in (*LOOSE, *EVERY_FIGURE) for option in ("--limit", line)]
    verdict = json.loads(ran("check", path, *options, "--baseline", path, "--json").stdout)
    answers = {line["figure"]: line["answer"] for line in verdict["lines"]}
    assert set(answers) == set(FIGURES)
    assert set(answers.values()) == {"pass"}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ([*LOOSE, *EVERY_FIGURE], "Passed"),
        ([*LOOSE, "likelihood.kl_mean.max=0"], "Failed"),
        ([], "Not enough data"),
    ],
)
def test_check_writes_the_page_with_its_verdict(
    output: Path, report: dict[str, Any], tmp_path: Path, changes: list[str], word: str
) -> None:
    written = tmp_path / "verdict.html"
    options = [option for line in changes for option in ("--limit", line)]
    ran("check", output / "report.json", *options, "--html", written)
    assert f"<strong>{word}</strong>" in written.read_text()
    lost = ran("check", output / "report.json", "--html", tmp_path / "none" / "r.html")
    assert lost.stderr.startswith(f"Error: {tmp_path / 'none' / 'r.html'}: cannot be written")


def test_ctrl_c_says_how_to_go_on(
    source: Path, output: Path, report: dict[str, Any], tmp_path: Path, signals_restored: None
) -> None:
    """Interrupted in the second layer; the same command then writes the same bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calibrate.layer.pack", interrupted_after(9))
        found = ran("quantize", source, tmp_path / "out", *QUICK)
    assert found.exit_code == 128 + signal.SIGINT
    assert found.stderr.splitlines()[-1] == (
        "Stopped by SIGINT: 1 of 2 layers are written; repeat the command, it goes on at layer 1."
    )
    again = ran("quantize", source, tmp_path / "out", *QUICK)
    assert again.exit_code == 0
    assert "layer 0, part 1 of 2 was written before: checked and replayed" in again.stderr
    assert weights(tmp_path / "out") == weights(output)


def interrupted_after(calls: int) -> Callable[..., Any]:
    """`pack`, until Ctrl-C is pressed."""
    from llama4q.packing import pack

    left = [calls]

    def pressed(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            signal.raise_signal(signal.SIGINT)
        return pack(*arguments)

    return pressed
