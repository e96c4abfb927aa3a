"""lm-evaluation-harness on the streamed pocket model, against its own `hf` model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import cli
from llama4q.hub import POCKET_MODEL

ROOT = Path(__file__).parent.parent
CHOICES = """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
TEXT = """
task: text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/text.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
QUESTIONS = [
    ("The function returns the number of", [" items", " elephants in the house", " item"]),
    ("To open a file, call", [" open", " the door", " close() before that"]),
    ("A list is", [" a sequence", " never", " nothing of the kind"]),
    ("Exceptions are raised", [" when", " by kings", " if"]),
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": question, "choices": choices, "answer": number % len(choices)}
        for number, (question, choices) in enumerate(QUESTIONS)
    ]
    (folder / "choices.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    text = (ROOT / "llama4q/pocket/text/heldout.txt").read_text()
    parts = [text[start : start + 900] for start in (0, 20_000, 50_000)]
    (folder / "text.jsonl").write_text("".join(f"{json.dumps({'text': one})}\n" for one in parts))
    for name, task in (("choices", CHOICES), ("text", TEXT)):
        (folder / f"{name}.yaml").write_text(task.format(folder=folder))
    return folder


def results(tasks: Path, out: Path, command: list[str], model: str, arguments: str) -> Any:
    """What the harness's command line finds."""
    done = subprocess.run(
        [
            *command, "--model", model, "--model_args", arguments, "--tasks", "choices,text",
            "--include_path", str(tasks), "--output_path", str(out), "--device", "cpu",
            "--batch_size", "2", "--log_samples",
        ],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    [found] = out.rglob("results_*.json")
    samples = {
        task: [
            json.loads(line)["filtered_resps"]
            for line in next(out.rglob(f"samples_{task}_*.jsonl")).read_text().splitlines()
        ]
        for task in ("choices", "text")
    }
    return json.loads(found.read_text())["results"], samples


def test_the_same_numbers_as_the_harness_own_model(tasks: Path, tmp_path: Path) -> None:
    """Accuracy, perplexity, and the log-likelihood of each single answer, in float32."""
    ours, our_samples = results(
        tasks, tmp_path / "ours", [sys.executable, "-c", "import cli; cli.main()", "lm-eval"],
        "llama4q", "pretrained=pocket,dtype=float32,max_length=128",
    )  # fmt: skip
    theirs, their_samples = results(
        tasks, tmp_path / "theirs", [sys.executable, "-m", "lm_eval"],
        "hf", f"pretrained={POCKET_MODEL},dtype=float32,max_length=128",
    )  # fmt: skip
    for task, metrics in theirs.items():
        for name, value in metrics.items():
            expected = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert ours[task][name] == expected, (task, name)
    assert flat(our_samples) == pytest.approx(flat(their_samples), rel=1e-4, abs=1e-4)


def flat(found: Any) -> list[float]:
    """All numbers in it."""
    if isinstance(found, dict):
        return [number for one in found.values() for number in flat(one)]
    if isinstance(found, list):
        return [number for one in found for number in flat(one)]
    return [float(found == "True") if found in ("True", "False") else float(found)]


def test_what_it_cannot_do_is_one_line() -> None:
    from evals.harness import StreamedModel
    from llama4q.errors import UserError

    with pytest.raises(UserError, match="dtype 'int4': choose bfloat16 or float32"):
        StreamedModel("pocket", dtype="int4")
    with pytest.raises(UserError, match="--model_args parallelize: not known"):
        StreamedModel("pocket", parallelize=True)
    with pytest.raises(UserError, match="choose log-likelihood tasks"):
        StreamedModel("pocket").generate_until([])


def test_without_the_extra_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    found = CliRunner().invoke(cli.main, ["lm-eval", "--tasks", "arc_easy"])
    assert found.exit_code == 1
    assert "pip install 'llama4q[harness]'" in found.stderr
