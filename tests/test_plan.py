"""calibrate.plan and footprint: budgets, peaks against what PyTorch allocates, and the table."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from calibrate.footprint import Place, stages, stores
from calibrate.gptq import choose_scales, factorize, solve
from calibrate.plan import (
    OVERHEAD,
    Pace,
    Plan,
    duration,
    make_plan,
    measure_searches,
    pace,
)
from calibrate.work import Amounts, Phase, Texts, Unit
from llama4q.config import ModelConfig, parse_config
from llama4q.machine import Budget, Rates
from llama4q.recipe import load_recipe
from llama4q.schemes import SCHEMES
from llama4q.weights import check_finite

from . import tiny
from .test_inspect import MAVERICK, SCOUT

GB = 10**9
HERE = (Place.HOST, Place.COMPUTE)  # what the host holds where there is no GPU
TEXTS = Texts(((128, 2048),), ((16, 2048),), ((10, 4096),))
RATES = Rates(f32=2e11, bf16_factors=8e11, rough=9e11, bf16=1.3e12, copy=2e10, read=1e9, write=3e8)
SEARCHES = {Phase.FACTOR: 1e11, Phase.SCALES: 1e9, Phase.CODES: 5e7}
PACE = pace(RATES, SEARCHES, torch.bfloat16)


def planned(config: dict[str, Any], recipe: str = "int4", texts: Texts = TEXTS) -> Plan:
    return make_plan(parse_config(config, "here"), load_recipe(recipe), texts)


def allocated(work: Callable[[], object], folder: Path) -> int:
    """The most bytes that PyTorch has allocated while `work` runs, beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    found = [
        event["args"]
        for event in json.loads(trace.read_text())["traceEvents"]
        if event["name"] == "[memory]"
    ]
    before = found[0]["Total Allocated"] - found[0]["Bytes"]
    return max(int(one["Total Allocated"] - before) for one in found)


# --- memory ---


def test_a_large_budget_keeps_everything_in_memory() -> None:
    plan = planned(SCOUT)
    budget = Budget(100 * GB)
    placement = plan.fits(budget)
    assert placement.fits
    assert placement.spilled == ()
    stage, kept = plan.largest(*HERE).nbytes(*HERE), plan.kept(budget)
    assert placement.host == stage + kept + sum(store.nbytes for store in plan.stores)
    assert kept == stage // 2


def test_rows_of_tokens_make_way_for_what_must_be_held() -> None:
    """And for freed memory that is kept; that makes way itself where there is no room at all."""
    plan = planned(SCOUT)
    stage = plan.held(Budget(0))

    def room(host: int) -> int:
        return plan.room(Budget(host)).host

    assert room(stage) == room(stage + stage // 4) == 0
    assert room(stage + stage // 2 + 5) == pytest.approx(5, abs=1)
    assert room(stage - 7) == -7


@pytest.mark.parametrize("gigabytes", range(16, 41, 3))
@pytest.mark.parametrize("config", [SCOUT, MAVERICK])
def test_no_budget_is_exceeded(config: dict[str, Any], gigabytes: int) -> None:
    """Rows of tokens take what is left, those that are made first before the others."""
    plan, budget = planned(config), Budget(gigabytes * GB)
    placement = plan.fits(budget)
    assert placement.fits
    assert placement.host <= budget.host
    left = plan.room(budget).host
    for store in plan.stores:
        assert (store in placement.spilled) == (store.nbytes > left)
        left -= 0 if store in placement.spilled else store.nbytes
    larger = plan.fits(Budget(budget.host + 10 * GB))
    assert larger.spilled_bytes <= placement.spilled_bytes


def test_the_goals_for_real_sizes() -> None:
    """Host peak with everything on the CPU, 128 x 2048 tokens: Scout 20 GB, Maverick 24 GB; with a
    GPU 12 GB."""
    assert planned(SCOUT).fits(Budget(20 * GB)).fits
    assert planned(MAVERICK).fits(Budget(24 * GB)).fits
    assert planned(SCOUT).fits(Budget(12 * GB, 60 * GB)).fits
    assert planned(MAVERICK).fits(Budget(12 * GB, 70 * GB)).fits


def test_what_is_missing_is_told() -> None:
    plan = planned(SCOUT)
    placement = plan.fits(Budget(4 * GB))
    assert not placement.fits
    assert placement.short == plan.largest(*HERE).nbytes(*HERE) - 4 * GB
    assert set(placement.spilled) == set(plan.stores)
    with_gpu = plan.fits(Budget(64 * GB, GB))
    assert with_gpu.short == 0
    assert with_gpu.short_on_device == with_gpu.device - GB > 0


def test_a_gpu_takes_over_where_products_are() -> None:
    plan = planned(SCOUT)
    alone, helped = plan.fits(Budget(100 * GB)), plan.fits(Budget(100 * GB, 60 * GB))
    assert alone.device == 0
    there = sum(store.nbytes for store in helped.on_device)
    assert helped.device == plan.largest(Place.COMPUTE).nbytes(Place.COMPUTE) + there
    assert helped.host < alone.host


def test_rows_of_tokens_by_hand() -> None:
    """Two streams of 262,144 tokens of 5,120 BF16 values, and what a layer adds to each; the shared
    expert's 8,192 values of all of them, more than the busiest of 16 experts has."""
    config = parse_config(SCOUT, "scout")
    found = [store.nbytes for store in stores(config, load_recipe("int4"), TEXTS)]
    stream, asked, activations = 262_144 * 5120 * 2, 73_728 * 5120 * 2, 262_144 * 8192 * 2
    assert found == [stream, stream, asked, asked, stream, stream, activations, activations]


def test_rows_of_tokens_of_one_rank_by_hand() -> None:
    """Of 3 ranks: 3 of 8 leaves at most, a third of the evaluation; the tokens of all ranks that
    reach the busiest expert, in both streams and with what is lacking in F32."""
    config = parse_config(SCOUT, "scout")
    found = [store.nbytes for store in stores(config, load_recipe("int4"), TEXTS, 3)]
    stream, asked, busiest = 98_304 * 5120 * 2, 24_576 * 5120 * 2, 40_960 * 5120
    activations = 98_304 * 8192 * 2
    assert found == [
        *[stream] * 2, *[asked] * 2, *[stream] * 2,
        2 * busiest, 2 * busiest, 4 * busiest, *[activations] * 2,
    ]  # fmt: skip


def test_activations_without_a_quantized_shared_expert() -> None:
    """Then the busiest routed expert counts: 2.5 times the mean."""
    config, int4 = parse_config(SCOUT, "scout"), load_recipe("int4")
    schemes = {part: scheme for part, scheme in int4.schemes.items() if part.value == "experts"}
    found = list(stores(config, replace(int4, schemes=schemes), TEXTS))
    assert found[-1].nbytes == int(2.5 * 262_144 / 16) * 8192 * 2


def test_memory_does_not_grow_with_experts() -> None:
    """But for what routers see, 48 x [5120, E] in F32, and two of them in BF16."""

    def peak(experts: int) -> int:
        config = replace(parse_config(SCOUT, "scout"), num_experts=experts)
        plan = make_plan(config, load_recipe("int4"), TEXTS)
        return plan.largest(*HERE).nbytes(*HERE)

    assert peak(128) - peak(16) <= (48 * 4 + 2 * 2) * 5120 * 112


def pieces(config: ModelConfig, stage: str, texts: Texts = TEXTS) -> dict[str, int]:
    found = next(
        one for one in stages(config, load_recipe("int4"), texts) if one.name.startswith(stage)
    )
    return {piece.name: piece.nbytes for piece in found.pieces}


def test_weights_in_memory_against_their_tensors() -> None:
    """One expert, the next one, and of the layer what is not routed; shapes by transformers."""
    config = parse_config(SCOUT, "scout")
    found = pieces(config, "experts gate_up")
    shapes = tiny.shapes(SCOUT)
    layer = {name: shape for name, shape in shapes.items() if ".layers.3." in name}
    expert = sum(torch.Size(layer[name][1:]).numel() for name in layer if ".experts." in name)
    rest = sum(
        torch.Size(shape).numel()
        for name, shape in layer.items()
        if ".experts." not in name and "vision" not in name and "norm" not in name
    )
    assert found["expert"] == found["next expert, read ahead"] == 2 * expert
    assert found["layer"] == found["next layer, read ahead"] == 2 * rest


def test_the_solvers_workspace_against_pytorchs_allocator(tmp_path: Path) -> None:
    """Neither less than what is allocated nor much more."""
    size = 1024
    config = replace(parse_config(SCOUT, "scout"), hidden_size=size, expert_size=size)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(size + 64, size, generator=generator)
    weight, hessian = torch.randn(size, 2 * size, generator=generator), rows.T @ rows
    factored = factorize(hessian, 0.01, act_order=True)
    assert factored is not None
    scales = choose_scales(weight, factored.importance, SCHEMES["int4"], 2, signed=True)
    square, full = 4 * size**2, 8 * size**2

    def codes() -> object:
        aim = weight + 1.0
        return solve(aim, factored, scales, SCHEMES["int4"], 1)

    used = allocated(lambda: factorize(hessian, 0.01, act_order=True), tmp_path)
    assert 2 * square < used <= 3 * square
    used = allocated(codes, tmp_path)
    assert 2 * full < used <= 4 * full
    expected = pieces(config, "experts gate_up: codes")["workspace of the solver"]
    assert expected == max(3 * square, 4 * full)


def test_the_check_of_what_is_read_takes_no_memory(tmp_path: Path) -> None:
    values = torch.ones(10**6, dtype=torch.bfloat16)
    assert allocated(lambda: check_finite("weight", values), tmp_path) < 1000


# --- time ---


def test_the_floor_overlaps_the_disk_with_computing() -> None:
    unit = Unit("MoE", "int4", Amounts({Phase.SERVED: 13 * 10**12}), 2 * GB, 3 * GB // 10)
    assert PACE.seconds(unit) == pytest.approx(10)  # 10 s of products against 2 s and 1 s
    slow = Pace(PACE.speeds, read=1e8, write=1e8)
    assert slow.seconds(unit) == pytest.approx(23)


def test_the_floor_of_scout_by_hand() -> None:
    """A full-shape layer at measured ceilings of two cores, as derived by hand: forward 126 s a
    stream without scores, Hessians 75 s before a sixteenth is held out; the rest by formula."""
    plan = planned(SCOUT, texts=Texts(((128, 2048),)))
    taken = PACE.by_phase(plan.units[0].amounts)
    assert taken[Phase.ORIGINAL] == taken[Phase.SERVED] == pytest.approx(131, abs=1)
    halves = 5120 * (5120 + 512) / 2 + 8192 * (8192 + 512) / 2  # with blocks on the diagonal
    hessians = 2 * 2 * 262_144 * halves * 15 / 16 / 8e11
    cross = 2 * 2 * 262_144 * (5120**2 + 2 * 5120 * 8192) * 15 / 16 / 8e11
    assert taken[Phase.MOMENTS] == pytest.approx(hessians + cross)
    assert taken[Phase.CODES] == 17 * 3 * 5120 * 8192 * 8 / 5e7
    assert plan.floor(PACE) == pytest.approx(sum(PACE.seconds(unit) for unit in plan.units))


def test_float32_runs_forwards_at_that_rate() -> None:
    exact = pace(RATES, SEARCHES, torch.float32)
    assert exact.speeds[Phase.ORIGINAL] == exact.speeds[Phase.EVALUATION] == RATES.f32
    assert PACE.speeds[Phase.ORIGINAL] == RATES.bf16
    assert PACE.speeds[Phase.MOMENTS] == RATES.bf16_factors
    assert PACE.speeds[Phase.PRODUCTS] == PACE.speeds[Phase.JUDGE] == RATES.rough
    assert set(PACE.speeds) == set(Phase)


@pytest.mark.parametrize("scheme", ["int4", "fp8", "int4-g32"])
def test_searches_are_timed(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibrate.plan.SEARCHED", (128, 64))
    monkeypatch.setattr("calibrate.plan.FACTORED", 300)
    found = measure_searches(SCHEMES[scheme], load_recipe("int4").solver)
    assert set(found) == {Phase.FACTOR, Phase.SCALES, Phase.CODES}
    assert all(0 < speed < float("inf") for speed in found.values())


# --- the table ---


def test_the_table_says_what_the_plan_holds() -> None:
    plan, budget = planned(MAVERICK), Budget(24 * GB)
    text = "\n".join(plan.lines(budget, PACE))
    assert re.search(r"^read +801\.42 GB", text)
    assert re.search(r"^disk +214\.20 GB  for the result$", text, re.MULTILINE)
    placement = plan.fits(budget)
    assert f"{placement.spilled_bytes / GB:.2f} GB  for a while" in text
    assert f"{placement.host / GB:.2f} GB  at the peak, of 24.00 GB" in text
    assert "24 x dense in int4" in text
    assert "24 x MoE in int4: read 32.59 GB" in text
    for store in plan.stores:
        assert f"{store.name}: in " in text
    for phase, amount in plan.amounts.items():
        assert re.search(rf"^{re.escape(phase.value)} +{re.escape(f'{amount:.2e}')}", text, re.M)
    floor = plan.floor(PACE)
    assert text.endswith(f"floor {duration(floor)}, expected about {duration(OVERHEAD * floor)}")


def test_the_table_says_what_is_missing() -> None:
    text = "\n".join(planned(SCOUT).lines(Budget(GB, GB), PACE))
    assert len(re.findall(r"of 1\.00 GB: \d+\.\d\d GB too much", text)) == 2


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (760, "12 min 40 s"), (11_100, "3 h 05 min")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
