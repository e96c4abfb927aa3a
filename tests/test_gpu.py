"""Runs on a GPU that is none (fake_gpu.py): the same bytes as on the CPU, and nothing left behind.

Both sides run the PyTorch path of the solver and PyTorch's own products, so that equal means equal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional

from benchmarks import gpu as benchmark
from calibrate import gptq, kernel, outputs, target
from calibrate.choose import expert_counts
from calibrate.lookahead import Rows, solve_block
from calibrate.plan import check_memory
from cli import main
from evals.evaluation import compare
from llama4q import products
from llama4q.checkpoint import Checkpoint
from llama4q.config import read_config
from llama4q.device import use_device
from llama4q.errors import UserError
from llama4q.hidden import Spool
from llama4q.machine import Budget, Memory
from llama4q.recipe import Recipe, load_recipe
from llama4q.schemes import FP8, SCHEMES, Scheme
from llama4q.weights import LayerReader

from . import runs, test_lookahead, tiny
from .fake_gpu import GPU, OnGpu, fake_gpu
from .test_inspect import SCOUT
from .test_plan import GB, planned
from .test_resume import StopAt, Stopped

ROOMS = {"on the GPU": (0, 1e9), "in memory": (1e9, 0), "in files": (0, 0), "some": (2e5, 2e5)}


def summed(
    total: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    keep: float = 1.0,
    times: float = 1.0,
) -> None:
    """What products.py does on a GPU, on any device."""
    if not keep:
        total.zero_()
    total.add_(left.bfloat16().float() @ right.bfloat16().float(), alpha=times)


@pytest.fixture
def alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both devices compute by the same operations."""
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(kernel, "_triton", lambda: None)
    monkeypatch.setattr(products, "_add", summed)
    monkeypatch.setattr(products, "rounds_sums", lambda device: False)
    modules: list[ModuleType] = [products, gptq, outputs, target]
    for module in modules:
        monkeypatch.setattr(module, "factor_dtype", lambda device: torch.bfloat16)


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    with fake_gpu() as device, torch.inference_mode():
        yield device


def small(recipe: str) -> Recipe:
    """One beam: a hundred operations a row take their time when each is looked at."""
    found = load_recipe(recipe)
    return replace(found, solver=replace(found.solver, beams=1, scale_points=4))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


# --- the fake itself ---


def test_it_computes_what_the_cpu_does(gpu: torch.device) -> None:
    rows = torch.arange(12.0).view(3, 4)
    there = rows.to(gpu)
    assert there.device == gpu
    made = torch.full((4, 2), 0.5, device=gpu)
    assert torch.equal((there @ made).cpu(), rows @ torch.full((4, 2), 0.5))
    there[1:] *= 2  # through a view
    assert torch.equal(there.cpu()[1], 2 * rows[1])
    assert there[torch.tensor([2, 0])].device == gpu  # numbers of the host's are looked up


def test_a_move_is_a_copy(gpu: torch.device) -> None:
    rows = torch.zeros(3)
    there = rows.to(gpu)
    back = there.cpu()
    there += 1
    assert rows.sum() == back.sum() == 0
    assert there.to(gpu) is there


def test_it_refuses_what_a_gpu_does(gpu: torch.device) -> None:
    here, there = torch.ones(3, 4), torch.ones(3, 4, device=gpu)
    number = torch.zeros(1, dtype=torch.int64, device=gpu)
    for mixed in (
        lambda: there + here,
        lambda: torch.cat([there, here]),
        lambda: here.addmm_(there, here),
        lambda: here[number],
        lambda: there.clamp(torch.tensor(0.0), torch.tensor(1.0)),  # one scalar is the most
        lambda: here.index_put_((torch.tensor([0]),), there[0]),
        lambda: there.numpy(),
        lambda: there.data_ptr(),
    ):
        with pytest.raises(RuntimeError):
            mixed()
    assert torch.equal((there + torch.tensor(1.0)).cpu(), here + 1)


def test_threads_have_it_too(gpu: torch.device) -> None:
    from llama4q.prefetch import prefetched

    found = list(prefetched(lambda number: torch.full((2,), number, device=GPU), range(3)))
    assert [one.tolist() for one in found] == [[0, 0], [1, 1], [2, 2]]


# --- runs ---


@pytest.mark.usefixtures("alike")
@pytest.mark.parametrize(
    ("variant", "recipe"),
    [("scout", "int4"), ("maverick", "int4-fp8"), ("guard", "fp8"), ("scout", "bnb-nf4")],
)
def test_a_run_writes_the_same_bytes(variant: str, recipe: str, tmp_path: Path) -> None:
    """BF16, as engines serve it; evidence and report of each weight are the same, too."""
    source = tiny.write(tmp_path / "source", replace(tiny.VARIANTS[variant], experts=2))
    progress = runs.Quiet()
    here = runs.run(source, tmp_path / "here", small(recipe), dtype=torch.bfloat16)
    with fake_gpu() as gpu:
        there = runs.run(
            source, tmp_path / "there", small(recipe), dtype=torch.bfloat16, progress=progress,
            device=gpu, memory=Memory(on_device=1e6),
        )  # fmt: skip
    assert files(tmp_path / "there") == files(tmp_path / "here")
    assert there["evidence"] == here["evidence"]
    for layers in (here["layers"], there["layers"]):
        for group in [group for layer in layers for group in layer["groups"]]:
            del group["seconds"]
    assert there["layers"] == here["layers"]
    assert there["rescues"] == here["rescues"]
    assert any("PyTorch on Fake GPU" in phase for phase in progress.phases)


@pytest.mark.usefixtures("alike")
@pytest.mark.parametrize("scheme", [FP8, SCHEMES["int4"]], ids=["fp8", "int4"])
def test_several_beams_find_the_same_codes(scheme: Scheme, gpu: torch.device) -> None:
    block = test_lookahead.a_block()[1]
    there = Rows(*(getattr(block, field.name).to(gpu) for field in fields(block)))
    found = solve_block(there.target, there, scheme, beams=3)
    assert torch.equal(found.cpu(), solve_block(block.target, block, scheme, beams=3))


def test_another_device_does_not_go_on(tmp_path: Path) -> None:
    """What one has written the other would not write."""
    source = tiny.write(tmp_path / "source", replace(tiny.VARIANTS["scout"], experts=2))
    with pytest.raises(Stopped):
        runs.run(source, tmp_path / "out", small("int4"), progress=StopAt(2))
    with (
        fake_gpu() as gpu,
        pytest.raises(UserError, match=r'another device is here \("cpu" then, "cuda" now\)'),
    ):
        runs.run(source, tmp_path / "out", small("int4"), device=gpu)


@pytest.mark.usefixtures("alike")
def test_a_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """Half of it written by a run that was stopped, and replayed."""

    class Stop(runs.Quiet):
        def layer(self, seconds: float | None) -> None:
            super().layer(seconds)
            if len(self.layers) == 1:
                raise KeyboardInterrupt

    source = tiny.write(tmp_path / "source", replace(tiny.GUARD, layers=2))
    recipe = small("fp8")
    runs.run(source, tmp_path / "here", recipe, dtype=torch.bfloat16)
    with fake_gpu() as gpu:
        with pytest.raises(KeyboardInterrupt):
            runs.run(
                source, tmp_path / "there", recipe, dtype=torch.bfloat16, progress=Stop(),
                device=gpu,
            )  # fmt: skip
        runs.run(source, tmp_path / "there", recipe, dtype=torch.bfloat16, device=gpu)
    assert files(tmp_path / "there") == files(tmp_path / "here")


def test_evaluation_and_routing_are_the_same(tmp_path: Path) -> None:
    config = read_config(tiny.write(tmp_path, tiny.MAVERICK))

    def found(device: torch.device) -> tuple[object, torch.Tensor]:
        reader = LayerReader(Checkpoint(tmp_path, device), config, torch.float32)
        evidence = compare(reader, reader, runs.questions(tmp_path), lambda: None)
        return evidence, expert_counts(reader, runs.tokens(tmp_path, 3, 40), lambda _: None)

    here = found(torch.device("cpu"))
    with fake_gpu() as gpu:
        there = found(gpu)
    assert there[0] == here[0]
    assert torch.equal(there[1], here[1])


@pytest.mark.parametrize("place", ROOMS)
def test_rows_lie_where_there_is_room(place: str, gpu: torch.device, tmp_path: Path) -> None:
    """And come to the GPU from wherever they lie."""
    spool = Spool(ROOMS[place][0], tmp_path, gpu, ROOMS[place][1])
    rows = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    stores = [spool.store([(2, 10, 16), (3, 10, 16)], torch.float32) for _ in range(2)]
    which = torch.tensor([1, 2, 30])
    for store in stores:
        store[0], store[1] = rows[:20].view(2, 10, 16).to(gpu), rows[20:].view(3, 10, 16).to(gpu)
        store.add(which, torch.ones(3, 16, device=gpu))
        assert isinstance(store.rows(slice(3, 9)), OnGpu)
        assert isinstance(store[1], OnGpu)
        assert torch.equal(store.rows(slice(3, 9)).cpu(), rows[3:9])
        assert torch.equal(store.rows(which).cpu(), rows[which] + 1)
    assert spool.spilled == (2 * rows.nbytes if place == "in files" else 0)
    left = [room.left for room in spool.rooms]
    del store, stores
    assert [room.left for room in spool.rooms] == [ROOMS[place][1], ROOMS[place][0]]
    assert (left[0] < ROOMS[place][1]) == (place in ("on the GPU", "some"))


def test_no_scores_of_all_pairs_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch may only choose among kernels that hold none."""
    folder = tiny.write(tmp_path, tiny.SCOUT)
    allowed = []
    plain = functional.scaled_dot_product_attention

    def spied(*args: Any, **options: Any) -> torch.Tensor:
        allowed.append(torch.backends.cuda.math_sdp_enabled())
        return plain(*args, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spied)
    with fake_gpu() as gpu:
        reader = LayerReader(Checkpoint(folder, gpu), read_config(folder), torch.float32)
        expert_counts(reader, runs.tokens(folder, 2, 40), lambda _: None)
    assert len(allowed) > tiny.SCOUT.layers  # chunks of 32 and what is left
    assert not any(allowed)
    assert torch.backends.cuda.math_sdp_enabled()


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_the_benchmark_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On small sizes; every path of the solver leaves the same loss."""
    monkeypatch.setattr(kernel, "_triton", lambda: None)
    monkeypatch.setattr(benchmark, "PIECE", (256, 32))
    sizes = ["--experts", "1", "--tokens", "320", "--width", "128", "--size", "128"]
    with fake_gpu() if name == "cuda" else nullcontext():
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 10**9)
        found = CliRunner().invoke(
            benchmark.main, [*sizes, "--beams", "1", "--device", name], catch_exceptions=False
        )
    for phase in ("forward", "moments", "factor", "correction", "scales", "codes", "judge", "pack"):
        assert re.search(rf"^{phase}.* \d\.\d\de\+\d\d", found.output, re.MULTILINE)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", found.output)]
    assert losses == pytest.approx(3 * [losses[0]], rel=0.01)
    assert ("of the GPU 1.00 GB" in found.output) == (name == "cuda")


def test_products_of_rows_sum_in_f32(gpu: torch.device) -> None:
    """Against double precision; what is not in the buffer yet is not read."""
    left, right = torch.randn(2, 64, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = left.double().T @ right.double()
    there = left.to(gpu), right.to(gpu)
    total = torch.ones(40, 40, device=gpu)
    products.add_product(total, there[0].T, there[1], times=-2.0)
    torch.testing.assert_close(total.cpu().double(), 1 - 2 * expected, rtol=0, atol=1e-4)
    with mock.patch.object(torch.Tensor, "new_empty", lambda one, *size, **kind: one.new_full(
        size, torch.nan, **kind
    )):  # fmt: skip
        found = products.product(there[0].T, there[1])
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=1e-4)


# --- what a user says ---


def test_devices_by_name() -> None:
    assert use_device("cpu") == torch.device("cpu")
    with fake_gpu():
        assert use_device(None) == use_device("cuda") == use_device("cuda:0") == GPU
        assert use_device("cpu") == torch.device("cpu")
        with pytest.raises(UserError, match=r"'cuda:3': 1 GPU here; name one below cuda:1"):
            use_device("cuda:3")


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:x", "", "cpu:0:0"])
def test_unknown_devices(name: str) -> None:
    with pytest.raises(UserError, match="unknown; name cpu, cuda, or one of several as cuda:1"):
        use_device(name)


def test_f32_products_are_exact_on_a_gpu() -> None:
    """Whatever was set before: a TF32 factor loses the small eigenvalues."""
    torch.set_float32_matmul_precision("high")
    try:
        with fake_gpu():
            use_device("cuda")
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True


def cli(*arguments: str) -> str:
    """The one line that a command ends with."""
    found = CliRunner().invoke(main, [*arguments])
    assert found.exit_code == 1
    [line] = found.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    "command", [["quantize", "pocket", "out"], ["eval", "x", "--against", "y"]]
)
def test_a_gpu_that_is_not_there(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = cli(*command, "--device", "cuda")
    assert line.startswith("Error: device 'cuda': PyTorch ")
    assert "finds no GPU here; leave it out to compute on the CPU" in line


@pytest.mark.usefixtures("alike")
def test_the_commands_take_a_device(tmp_path: Path) -> None:
    """The pocket model, by the command line: the same bytes; and the same evidence once more."""
    options = ["--eval-windows", "1", "--eval-length", "64", "--lengths", "", "--json"]
    small = ["--method", "rtn", "--samples", "2", "--length", "64", "--candidates", "2"]

    def done(*arguments: str) -> dict[str, Any]:
        found = CliRunner().invoke(main, [*arguments, *options], catch_exceptions=False)
        assert found.exit_code == 0, found.output
        report: dict[str, Any] = json.loads(found.stdout)
        return report

    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    done("quantize", "pocket", here, *small, "--device", "cpu")
    with fake_gpu():
        written = done("quantize", "pocket", there, *small, "--memory", "2GB,1GB")
        compared = done("eval", there, "--against", "pocket", "--device", "cuda")
    assert files(Path(there)) == files(Path(here))
    assert written["evidence"]["likelihood"] == compared["evidence"]["likelihood"]
    assert written["kernel"].startswith("PyTorch on Fake GPU")


def test_memory_of_a_gpu_that_is_not_used() -> None:
    line = cli("quantize", "pocket", "out", "--device", "cpu", "--memory", "1GB,1GB")
    assert line.startswith("Error: memory '1GB,1GB': gives some of a GPU to a run on the CPU")


def test_rows_on_the_gpu_are_planned() -> None:
    """Hidden states first; what is left over lies on the host as before."""
    plan = planned(SCOUT)
    alone = plan.fits(Budget(100 * GB))
    helped = plan.fits(Budget(100 * GB, 60 * GB))
    assert alone.on_device == ()
    assert helped.on_device[:2] == plan.stores[:2]
    assert helped.device <= 60 * GB
    room = check_memory(plan, Budget(100 * GB, 60 * GB), named=True)
    assert sum(store.nbytes for store in helped.on_device) <= room.on_device
    with pytest.raises(UserError, match=r"needs .* GB of the GPU at its peak .* gives it 1\.0 GB"):
        check_memory(plan, Budget(100 * GB, GB), named=True)
