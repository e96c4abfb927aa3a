"""Sequences that reach the experts best, against transformers' router and an exhaustive search."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from calibrate.choose import best_covering, expert_counts
from calibrate.data import calibration_tokens
from cli import main
from llama4q.checkpoint import Checkpoint
from llama4q.config import read_config
from llama4q.hub import resolve
from llama4q.text import parse_source
from llama4q.tokens import load_tokenizer
from llama4q.weights import LayerReader

from . import runs, tiny


def test_counts_against_transformers(tmp_path: Path) -> None:
    variant = tiny.Variant(layers=2, rope_scaling=tiny.SCOUT_ROPE)
    source = tiny.write(tmp_path / "source", variant)
    tokens = runs.tokens(source, 5, 40, seed=3)
    reader = LayerReader(Checkpoint(source), read_config(source), torch.float32)
    layers: list[int] = []
    found = expert_counts(reader, tokens, layers.append)
    model = tiny.transformers_model(source)
    with torch.inference_mode():
        routed = model.language_model(input_ids=tokens, output_router_logits=True)
    expected = [
        logits.view(5, 40, -1).argmax(-1)[number].bincount(minlength=variant.experts)
        for number in range(5)
        for logits in routed.router_logits
    ]
    assert torch.equal(found, torch.cat(expected).view(5, -1))
    assert layers == [0, 1, 2]


def test_choice_against_exhaustive_search() -> None:
    """Greedy choice for a submodular sum; the bound of 1 - 1/e is Nemhauser's (1978)."""
    counts = torch.randint(0, 30, (9, 6), generator=torch.Generator().manual_seed(1))
    counts[3] = torch.tensor([0, 0, 0, 0, 0, 200])
    counts[:3, 5] = 0

    def worth(which: tuple[int, ...] | list[int]) -> float:
        return float(counts[list(which)].sum(dim=0).double().sqrt().sum())

    chosen = best_covering(counts, 4)
    best = max(worth(which) for which in itertools.combinations(range(9), 4))
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 4
    assert worth(chosen) > 0.97 * best


def test_the_least_served_expert_gets_more_on_the_pocket_model() -> None:
    source = resolve("pocket").folder
    drawn = calibration_tokens(
        parse_source(None), load_tokenizer(source), samples=32, length=128, seed=0
    )
    reader = LayerReader(Checkpoint(source), read_config(source), torch.float32)
    counts = expert_counts(reader, drawn.tokens[0], lambda _: None)
    chosen, first = counts[best_covering(counts, 8)].sum(0), counts[:8].sum(0)
    least_served = first.argsort()[:8]
    assert chosen[least_served].sum() > 1.1 * first[least_served].sum()


def test_the_option_changes_what_is_drawn_and_goes_into_the_report(tmp_path: Path) -> None:
    digests = []
    for times in ("1", "3"):
        out = tmp_path / times
        command = f"quantize pocket {out} --method rtn --samples 2 --length 64 --eval-windows 1"
        options = [*command.split(), "--eval-length", "64", "--lengths", "96"]
        done = CliRunner().invoke(main, [*options, "--prompts", "1", "--candidates", times])
        assert done.exit_code == 0, done.output
        report = json.loads((out / "report.json").read_text())["calibration"]
        assert (report["candidates"], report["tokens"]) == (int(times), 128)
        digests.append(report["digest"])
    assert digests[0] != digests[1]


def test_a_mix_is_refused(tmp_path: Path) -> None:
    command = ["quantize", "pocket", str(tmp_path / "out"), "--candidates", "2", "--samples", "4"]
    mix = ["--calibration", "pocket:0.5,pocket:0.5x32", "--length", "64"]
    done = CliRunner().invoke(main, [*command, *mix])
    assert done.exit_code == 1
    assert "--candidates 2 with a mix of 2 texts would change their shares" in done.output


@pytest.mark.parametrize("keep", [0, 3])
def test_all_and_none(keep: int) -> None:
    assert best_covering(torch.ones(3, 2), keep) == list(range(keep))
