"""What the comparison with other quantizers rests on: hand-over, judge and intervals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from benchmarks.accuracy_vs_peers import OPTIONS, SETTINGS, Cell
from benchmarks.peers import llama4q_worker
from benchmarks.peers.common import Assignment, hand_back
from benchmarks.peers.judge import by_transformers, see, verdict
from benchmarks.peers.table import Difference, table
from evals.evaluation import compare
from llama4q.checkpoint import Checkpoint
from llama4q.config import read_config
from llama4q.recipe import Solver, parse_recipe
from llama4q.weights import LayerReader

from . import runs, tiny

VARIANT = tiny.Variant(layers=2, rope_scaling=tiny.SCOUT_ROPE)


def assignment(source: Path, dest: Path) -> Assignment:
    return Assignment(source, source / "tokens.npy", "int4", 4, 128, "", 0, source, dest)


def decoded(folder: Path, factor: float) -> dict[str, torch.Tensor]:
    """Every feed-forward linear `[out, in]` of a checkpoint, times `factor`."""
    config = read_config(folder)
    reader = LayerReader(Checkpoint(folder), config, torch.float32)
    found = {}
    for index in range(config.num_layers):
        prefix = f"{config.layer_prefix(index)}feed_forward"
        mlps = {
            f"{prefix}.shared_expert": reader.mlp(f"{prefix}.shared_expert", config.expert_size)
        }
        for number in range(config.num_experts):
            mlps[f"{prefix}.experts.{number}"] = reader.expert(index, number)
        for name, mlp in mlps.items():
            gate, up = mlp.gate_up.weight.T.chunk(2)
            for part, weight in (("gate", gate), ("up", up), ("down", mlp.down.weight.T)):
                found[f"{name}.{part}_proj.weight"] = weight * factor
    return found


def hand(job: Assignment, weights: dict[str, torch.Tensor]) -> None:
    hand_back(job, weights, seconds=1, stored=2, version="3", started_with=4, notes=[])


def test_what_is_handed_back_is_the_source_with_those_weights(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", VARIANT)
    hand(assignment(source, tmp_path / "same"), decoded(source, 1.0))
    before, after = Checkpoint(source), Checkpoint(tmp_path / "same")
    assert set(before.names()) == set(after.names())
    assert all(torch.equal(before.get(name), after.get(name)) for name in before.names())
    hand(assignment(source, tmp_path / "halved"), decoded(source, 0.5))
    halved = Checkpoint(tmp_path / "halved")
    for name in before.names():
        share = 0.5 if ".feed_forward." in name and "router" not in name else 1.0
        torch.testing.assert_close(halved.get(name).float(), before.get(name).float() * share)
    assert json.loads((tmp_path / "halved" / "peer.json").read_text())["stored_bytes"] == 2


def test_a_weight_that_is_missing_or_too_many_is_refused(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", VARIANT)
    weights = decoded(source, 1.0)
    name = "language_model.model.layers.1.feed_forward.experts.2.up_proj.weight"
    with pytest.raises(ValueError, match=f"the peer left {name} out"):
        hand(
            assignment(source, tmp_path / "out"),
            {key: value for key, value in weights.items() if key != name},
        )
    with pytest.raises(ValueError, match="not in the source"):
        hand(assignment(source, tmp_path / "out"), {**weights, "more": torch.zeros(1)})
    assert not (tmp_path / "out").exists()


def test_our_own_worker(tmp_path: Path) -> None:
    """As the arena starts it; what it hands back is about what it was given."""
    source = tiny.write(tmp_path / "source", VARIANT)
    (tmp_path / "work").mkdir()
    numpy.save(tmp_path / "tokens.npy", runs.tokens(source, 4, 96).numpy())
    job = {
        "source": source, "tokens": tmp_path / "tokens.npy", "grid": "int4", "bits": 4,
        "group": 128, "mode": "beams = 1", "seed": 0, "work": tmp_path / "work",
        "dest": tmp_path / "out",
    }  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(job, default=str))
    worker = Path(llama4q_worker.__file__)
    subprocess.run([sys.executable, str(worker), str(tmp_path / "job.json")], check=True)
    before, after = Checkpoint(source), Checkpoint(tmp_path / "out")
    for name in before.names():
        plain, found = before.get(name).float(), after.get(name).float()
        if ".feed_forward." in name and "router" not in name:
            assert 0 < (found - plain).norm() < 0.3 * plain.norm()
        else:
            assert torch.equal(plain, found)


def test_the_judge_against_eval_and_transformers(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", VARIANT)
    hand(assignment(source, tmp_path / "worse"), decoded(source, 0.9))
    questions = runs.questions(source)
    original, contestant = see(source, questions), see(tmp_path / "worse", questions)
    found = verdict(original, contestant, questions)
    readers = [
        LayerReader(Checkpoint(folder), read_config(folder), torch.float32)
        for folder in (source, tmp_path / "worse")
    ]
    evidence = compare(readers[0], readers[1], questions, lambda: None)
    assert found["kl_mean"] == pytest.approx(evidence["likelihood"]["kl_mean"], rel=1e-5)
    assert sum(found["kl"]) / len(found["kl"]) == pytest.approx(found["kl_mean"], rel=1e-5)
    agreement = min(record["agreement"] for record in evidence["layers"])
    # compare counts the prompts' tokens in one call, the judge in the same batches
    assert found["routing"] == pytest.approx(agreement)
    assert sum(found["needles"]) == round(2 * evidence["retrieval"]["quantized"])
    theirs = by_transformers(source, tmp_path / "worse", questions.windows)
    assert found["kl_mean"] == pytest.approx(theirs, rel=1e-3)


def test_the_interval_covers_the_mean_about_95_times_in_100() -> None:
    """The bootstrap's own promise, on 200 samples of 32 windows of a known mean."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        found = Difference.of(torch.randn(32, generator=generator, dtype=torch.float64) - 1)
        covered += found.low < -1 < found.high
    assert 175 <= covered <= 198


def record(kl: float, needles: list[bool]) -> dict[str, Any]:
    """A contestant's, with two windows that differ by 0.02."""
    figures = {
        "kl": [kl - 0.01, kl + 0.01], "loss": [3.0, 3.2], "kl_mean": kl, "kl_p99": 0.5,
        "top1": 0.9, "perplexity": 20.0, "routing": None, "needles": needles,
    }  # fmt: skip
    return {
        "same": figures, "other": figures, "stored_bytes": 5_000_000, "cpu_seconds": 7.0,
        "peak_bytes": 3_000_000,
    }  # fmt: skip


def test_the_table_pairs_seeds_and_says_what_failed() -> None:
    peer = {0: record(0.4, [True, False]), 1: record(0.6, [])}
    rounding = record(0.9, [True, True])
    records = {
        "us": {0: record(0.1, [True, True]), 1: record(0.2, [])},
        "peer": peer,
        "rounding": {0: rounding, 1: rounding},  # one run for all seeds
        "once": {1: record(0.4, [True])},
        "broken": {0: {"failure": "no such layer", "cpu_seconds": 1.0}},
    }
    lines = list(table("title", records, ours="us", yardstick="peer"))
    assert lines[0] == "### title"
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")] for line in lines[4:]
    }
    columns = lines[2].count("|")
    assert all(len(row) == columns + 1 for row in rows.values())
    assert rows["us"][2:7] == ["2", "5.00", "0.15000", "0.30", ""]
    assert rows["peer"][4:7] == ["0.50000", "1.00", "-0.35000 [-0.35000, -0.35000], 2/2 clear"]
    assert rows["peer"][12] == "50.0% of 2"
    assert rows["rounding"][12] == "100.0% of 2"
    # Only seed 1 is there: it is held against seed 1 of the others.
    assert rows["once"][2:7] == ["1", "5.00", "0.40000", "0.67", rows["once"][6]]
    assert rows["once"][6].startswith("-0.20000")
    assert "no such layer" in rows["broken"][3]


def test_each_option_is_a_setting_other_than_the_default() -> None:
    for setting in SETTINGS:
        assert parse_recipe(f"[schemes]\n[solver]\n{setting}", "setting").solver != Solver()
    assert len({Cell("model", "int4", 0, option).name for option in OPTIONS}) == len(OPTIONS)
