"""Policies: what TOML means, and each mistake in one line with what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from evals.figures import FIGURES
from evals.policy import Kind, Policy, default_policy, load_policy
from llama4q.errors import UserError


def policy(text: str, folder: Path) -> Policy:
    (folder / "gate.toml").write_text(text)
    return load_policy(folder / "gate.toml")


def test_what_a_policy_says(tmp_path: Path) -> None:
    found = policy(
        "min_tokens = 100\nmin_prompts = 5\nstrict = true\n"
        "[likelihood.kl_mean]\nmax = 0.05\nbaseline_ratio = 1.1\nstrict = false\n"
        "[layers]\njump.baseline_ratio = 1.04\nagreement.47.min = 0.9",
        tmp_path,
    )
    assert (found.min_tokens, found.min_prompts) == (100, 5)
    said = [(one.figure.name, one.place, one.kind, one.value, one.strict) for one in found.limits]
    assert said == [
        ("likelihood.kl_mean", "", Kind.MAX, 0.05, False),
        ("likelihood.kl_mean", "", Kind.BASELINE_RATIO, 1.1, False),
        ("layers.jump", "", Kind.BASELINE_RATIO, 1.04, True),
        ("layers.agreement", "47", Kind.MIN, 0.9, True),
    ]


def test_the_default_policy_is_the_file_that_is_shown(tmp_path: Path) -> None:
    assert load_policy(None) == policy(default_policy(), tmp_path)
    assert load_policy(None).min_tokens > 0


def test_a_change_replaces_one_line_and_adds_what_was_not_there(tmp_path: Path) -> None:
    changed = load_policy(None, ["likelihood.kl_mean.max = 0.03", "rescues.fallback.max=0"])
    expected = default_policy().replace("\nmax = 0.05\n", "\nmax = 0.03\n", 1)
    assert changed == policy(f"{expected}\n[rescues.fallback]\nmax = 0", tmp_path)
    assert load_policy(None, ["strict = true"]) == policy(
        f"strict = true\n{default_policy()}", tmp_path
    )


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_known_by_its_name(name: str, tmp_path: Path) -> None:
    key = "min" if FIGURES[name].larger_is_better else "max"
    [limit] = policy(f"[{name}]\n{key} = 1", tmp_path).limits
    assert limit.figure is FIGURES[name]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max = ", "not valid TOML"),
        ("", "limits nothing; `llama4q check --show-policy` shows how to"),
        ("[likelihood.kl_mean]", "limits nothing"),
        ("max_kl = 0.05", "unknown setting 'max_kl'"),
        ("min_token = 5", "unknown setting 'min_token'; did you mean 'min_tokens'?"),
        ("min_tokens = -1", "min_tokens is -1, no count"),
        ("min_tokens = 1.5", "min_tokens is 1.5, no count"),
        ("strict = 1", "strict is 1; write true or false"),
        (
            "[likelihood.kl_maen]\nmax = 1",
            "unknown figure [likelihood.kl_maen]; did you mean 'likelihood.kl_mean'?",
        ),
        ("[likelihood.kl_mean.cwe]\nmax = 1", "unknown figure [likelihood.kl_mean.cwe]"),
        ("[kl_mean]\nmax = 1", "unknown figure [kl_mean]; did you mean 'likelihood.kl_mean'?"),
        ("[unheard.of]", "unknown figure [unheard.of]"),
        ("likelihood = 3", "unknown setting 'likelihood'"),
        (
            "[likelihood.kl_mean]\nbaseline = 1",
            "[likelihood.kl_mean]: unknown key 'baseline'; did you mean 'baseline_ratio'?",
        ),
        ("[likelihood.kl_mean]\nmax = '5'", "[likelihood.kl_mean]: max is '5', no number"),
        ("[likelihood.kl_mean]\nmax = true", "max is True, no number"),
        ("[likelihood.kl_mean]\nmax = nan", "max is nan, no number"),
        ("[likelihood.kl_mean]\nmin = 0.1", "good when it is small; limit it with max"),
        ("[layers.agreement]\nmax = 0.9", "good when it is large; limit it with min"),
        ("[retrieval.difference]\nbaseline_ratio = 1", "limit it with baseline_margin"),
        ("[likelihood.kl_mean]\nbaseline_ratio = -1", "baseline_ratio = -1 is below 0"),
    ],
)
def test_a_mistake_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        policy(text, tmp_path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "gate.toml"))
    assert "\n" not in str(caught.value)


def test_a_mistaken_change_is_named() -> None:
    with pytest.raises(UserError, match="--limit 'likelihood': not valid TOML"):
        load_policy(None, ["likelihood"])


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--show-policy` prints a policy to start from"):
        load_policy(tmp_path / "gate.toml")
    (tmp_path / "gate.toml").write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8; a policy is a TOML file"):
        load_policy(tmp_path / "gate.toml")
