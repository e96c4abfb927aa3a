"""The quantize run: what it writes, counts and says, and that every solver setting matters."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from calibrate.beforehand import predicted_bytes
from calibrate.hessian import Hessian
from calibrate.judge import parts_of
from calibrate.target import HELD_OUT
from llama4q.checkpoint import INDEX, Checkpoint
from llama4q.config import read_config
from llama4q.errors import UserError
from llama4q.machine import Memory
from llama4q.model import DecoderLayer, Mlp, Moe, attention, feed_forward_input
from llama4q.recipe import Calibration, Method, Recipe, Solver, load_recipe
from llama4q.schemes import Scheme, round_to_nearest
from llama4q.stream import advance, embed
from llama4q.weights import LayerReader

from . import runs, tiny

SMALL = tiny.Variant(layers=2, rope_scaling=tiny.SCOUT_ROPE)


def with_solver(**settings: Any) -> Recipe:
    return dataclasses.replace(load_recipe("int4"), solver=Solver(**settings))


def all_bytes(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))


@pytest.mark.parametrize("recipe", ["int4", "int4-fp8", "mixed"])
@pytest.mark.parametrize("kind", [tiny.SCOUT, tiny.MAVERICK, tiny.GUARD])
def test_what_is_written_and_counted(kind: tiny.Variant, recipe: str, tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", kind)
    progress = runs.Quiet()
    report = runs.run(source, tmp_path / "out", recipe, progress=progress)
    config, written = read_config(source), Checkpoint(tmp_path / "out")
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    counted = sum(info.nbytes for info in written.infos.values())
    assert report["quantized_bytes"] == counted
    assert counted == predicted_bytes(Checkpoint(source), config, load_recipe(recipe))
    assert counted < size < counted + 200_000  # headers
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == counted
    assert len(progress.groups) == progress.total
    for record in report["layers"]:
        assert sum(record["expert_tokens"]) == (4 * 96 if record["expert_tokens"] else 0)
        assert bool(record["expert_tokens"]) == (record["layer"] in config.moe_layers)
        assert 0 < record["hidden_error"] < 0.5
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == (
        source / "generation_config.json"
    ).read_bytes()


def test_expert_tokens_against_transformers(tmp_path: Path) -> None:
    """In the first layer both streams are the original's, so its router must agree."""
    source = tiny.write(tmp_path / "source", SMALL)
    calibration = runs.tokens(source, 4, 96, seed=7)
    report = runs.run(source, tmp_path / "out", calibration=calibration)
    model = tiny.transformers_model(source)
    with torch.inference_mode():
        scores = model.model.language_model if hasattr(model, "model") else model.language_model
        routed = scores(input_ids=calibration, output_router_logits=True).router_logits[0]
    counts = routed.argmax(-1).flatten().bincount(minlength=SMALL.experts)
    assert report["layers"][0]["expert_tokens"] == counts.tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"method": Method.RTN},
        {"damping": 0.3},
        {"token_damping": 0.0},
        {"act_order": False},
        {"scale_points": 1},
        {"signed_scales": False},
        {"beams": 1},
        {"shrinkage": False},
        {"weighting": False},
        {"routing_weight": 0.0},
        {"correction": False},
    ],
)
def test_each_setting_changes_the_codes(settings: dict[str, Any], tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", SMALL)
    runs.run(source, tmp_path / "default", with_solver())
    runs.run(source, tmp_path / "other", with_solver(**settings))
    assert all_bytes(tmp_path / "default") != all_bytes(tmp_path / "other")


def test_gptq_has_lower_error_than_rounding_at_the_same_bytes(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", SMALL)
    calibration = runs.tokens(source, 16, 128, seed=7)
    gptq = runs.run(source, tmp_path / "gptq", with_solver(), calibration)
    rtn = runs.run(source, tmp_path / "rtn", with_solver(method=Method.RTN), calibration)
    assert gptq["quantized_bytes"] == rtn["quantized_bytes"]
    for ours, theirs in zip(gptq["layers"], rtn["layers"], strict=True):
        for group, rounded in zip(ours["groups"], theirs["groups"], strict=True):
            assert group["error"] < 0.8 * rounded["error"], group["name"]
            assert rounded["rounding_error"] == rounded["error"]
    kl = [report["evidence"]["likelihood"]["kl_mean"] for report in (gptq, rtn)]
    assert kl[0] < 0.8 * kl[1]


def test_an_expert_without_tokens_is_named_and_not_zeroed(tmp_path: Path) -> None:
    """Three different tokens cannot reach four experts."""
    source = tiny.write(tmp_path / "source", SMALL)
    progress = runs.Quiet()
    calibration = runs.tokens(source, 1, 3, seed=1)
    report = runs.run(source, tmp_path / "out", "int4", calibration, progress)
    counts = report["layers"][0]["expert_tokens"]
    assert min(counts) == 0
    starved = f"layers.0.feed_forward.experts.{counts.index(0)}."
    rescued = [rescue for rescue in report["rescues"] if starved in rescue["tensor"]]
    assert [rescue["kind"] for rescue in rescued] == ["no tokens", "no tokens"]
    assert [dataclasses.asdict(rescue) for rescue in progress.rescues] == report["rescues"]
    config = read_config(source)
    reader = LayerReader(Checkpoint(tmp_path / "out"), config, torch.float32)
    original = LayerReader(Checkpoint(source), config, torch.float32)
    found = reader.expert(0, counts.index(0)).down.weight
    wanted = original.expert(0, counts.index(0)).down.weight
    assert (found - wanted).norm() < 0.2 * wanted.norm()


def test_a_hessian_that_never_factors_falls_back_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny.write(tmp_path / "source", SMALL)

    def indefinite(first: Hessian, second: Hessian) -> Hessian:
        inputs = len(first.matrix)
        return Hessian(torch.diag(torch.tensor([100.0, -99.0] * (inputs // 2))), 10**6)

    monkeypatch.setattr("calibrate.codes.joined", indefinite)
    unaided = with_solver(shrinkage=False, correction=False)
    report = runs.run(source, tmp_path / "out", unaided)
    assert {rescue["kind"] for rescue in report["rescues"]} == {"fallback"}
    assert len(report["rescues"]) == sum(len(record["groups"]) for record in report["layers"])
    monkeypatch.undo()
    runs.run(source, tmp_path / "rtn", with_solver(method=Method.RTN))
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "rtn")


def test_hidden_error_against_the_streams_themselves(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", SMALL)
    calibration = runs.tokens(source, 2, 80, seed=2)
    report = runs.run(source, tmp_path / "out", "int4", calibration)
    config = read_config(source)
    hidden = []
    with torch.inference_mode():
        for folder in (source, tmp_path / "out"):
            reader = LayerReader(Checkpoint(folder), config, torch.float32)
            batches = embed(reader.embedding(), [calibration])
            advance(config, reader.layer(0), batches)
            hidden.append(batches[0].double())
    expected = (hidden[0] - hidden[1]).square().sum() / hidden[0].square().sum()
    assert report["layers"][0]["hidden_error"] == pytest.approx(float(expected), rel=1e-5)


def test_defaults_are_those_of_the_issue() -> None:
    """Recipes leave out what they do not change; the defaults live in one place."""
    for name in ("int4", "mixed"):
        assert load_recipe(name).calibration == Calibration()
        assert load_recipe(name).solver == Solver()


def test_a_misshapen_last_layer_is_refused_before_any_work(tmp_path: Path) -> None:
    name = "language_model.model.layers.1.feed_forward.experts.down_proj"
    wrong = torch.zeros(4, 64, 128, dtype=torch.bfloat16)
    source = tiny.write(tmp_path / "source", SMALL, replace={name: wrong})
    with pytest.raises(UserError, match=rf"{name} has shape \(4, 64, 128\)"):
        runs.run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_single_sequence_corrects_nothing_and_says_so(tmp_path: Path) -> None:
    """The share is judged by the other half of the sequences; here there is none."""
    source = tiny.write(tmp_path / "source", SMALL)
    calibration = runs.tokens(source, 1, 96, seed=7)
    spoken = runs.run(source, tmp_path / "out", "int4", calibration)["rescues"]
    report = runs.run(source, tmp_path / "plain", with_solver(correction=False), calibration)
    groups = [group["name"] for record in report["layers"] for group in record["groups"]]
    assert [rescue["tensor"] for rescue in spoken if rescue["kind"] == "uncorrected"] == groups
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "plain")


def test_codes_worse_than_rounding_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A solver gone wrong: every weight falls back to rounding, is counted and named."""
    source = tiny.write(tmp_path / "source", SMALL)

    def ruined(weight: torch.Tensor, factor: Any, scales: Any, scheme: Scheme, beams: int) -> Any:
        found = round_to_nearest(weight, scheme)
        return dataclasses.replace(found, codes=found.codes.flip(0).contiguous())

    monkeypatch.setattr("calibrate.codes.solve", ruined)
    report = runs.run(source, tmp_path / "out", with_solver())
    monkeypatch.undo()
    groups = [group for record in report["layers"] for group in record["groups"]]
    kept = [rescue for rescue in report["rescues"] if rescue["kind"] == "kept rounding"]
    assert [rescue["tensor"] for rescue in kept] == [group["name"] for group in groups]
    assert all(group["error"] == group["rounding_error"] for group in groups)
    runs.run(source, tmp_path / "rtn", with_solver(method=Method.RTN))
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "rtn")


def test_errors_against_held_out_tokens_themselves(tmp_path: Path) -> None:
    """The reported errors of the first layer's shared gate and up, from the files alone."""
    source = tiny.write(tmp_path / "source", SMALL)
    calibration = runs.tokens(source, 16, 128, seed=7)
    report = runs.run(source, tmp_path / "out", with_solver(weighting=False), calibration)
    runs.run(source, tmp_path / "rtn", with_solver(method=Method.RTN), calibration)
    config = read_config(source)
    folders = (source, tmp_path / "out", tmp_path / "rtn")
    with torch.inference_mode():
        layers = [
            LayerReader(Checkpoint(folder), config, torch.float32).layer(0) for folder in folders
        ]
        embedding = LayerReader(Checkpoint(source), config, torch.float32).embedding()
        hidden = embed(embedding, [calibration])[0]
        hidden = hidden + layers[0].o(attention(config, layers[0], hidden))
        inputs = feed_forward_input(config, layers[0], hidden)
        held = parts_of([(16, 128)]) == HELD_OUT
        products = [inputs[held] @ _shared(layer).gate_up.weight for layer in layers]
    energy = products[0].square().sum()
    expected = [float((found - products[0]).square().sum() / energy) for found in products[1:]]
    [group] = [one for one in report["layers"][0]["groups"] if "shared_expert.gate" in one["name"]]
    assert 100 < int(held.sum()) < 150  # a sixteenth
    assert [group["error"], group["rounding_error"]] == pytest.approx(expected, rel=1e-3)


def _shared(layer: DecoderLayer) -> Mlp:
    assert isinstance(layer.feed_forward, Moe)
    return layer.feed_forward.shared


@pytest.mark.parametrize("recipe", ["int4", "int4-fp8"])
@pytest.mark.parametrize("kind", [tiny.SCOUT, tiny.MAVERICK])
def test_the_room_for_hidden_states_changes_no_byte(
    kind: tiny.Variant, recipe: str, tmp_path: Path
) -> None:
    """In memory, in files, and some of each; the evidence is the same, too."""
    source = tiny.write(tmp_path / "source", kind)
    reports, written = [], []
    for room in (float("inf"), 2_000_000, 500_000, 0):
        folder = tmp_path / f"{room}"
        reports.append(runs.run(source, folder, recipe, memory=Memory(room)))
        written.append(all_bytes(folder))
    assert written == written[:1] * 4
    assert [report["evidence"] for report in reports] == [reports[0]["evidence"]] * 4
