"""The Triton kernels, run by Triton's interpreter (conftest.py), against the search in PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from calibrate import kernel
from calibrate.gptq import scale_errors
from calibrate.lookahead import Rows, solve_block
from llama4q.schemes import FLOAT8_MAX, FP8, SCHEMES, Scheme

from .fake_gpu import fake_gpu
from .test_kernel import cost

triton = pytest.importorskip("triton")

from calibrate.kernel_triton import TritonKernel  # noqa: E402


def compiled(scheme: Scheme, beams: int) -> TritonKernel:
    """As `kernel` makes it for a GPU."""
    with fake_gpu() as gpu:
        found = kernel.kernel(scheme, beams, gpu)
    assert isinstance(found, TritonKernel)
    return found


def a_block(scheme: Scheme, rows: int, outputs: int) -> Rows:
    """Weights in the grid's range but for a few that saturate, and strong corrections."""
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(rows, outputs, generator=generator)
    largest = FLOAT8_MAX if scheme is FP8 else scheme.code_max
    steps = torch.rand(rows, outputs, generator=generator).add(2) / largest
    steps[:, ::2] *= -1
    upper = torch.triu(0.2 * torch.randn(rows, rows, generator=generator), 1)
    importance = torch.rand(rows, generator=generator) + 0.2
    return Rows(target, steps, importance, upper + torch.eye(rows))


def solved(scheme: Scheme, beams: int, wanted: torch.Tensor, rows: Rows) -> torch.Tensor:
    return compiled(scheme, beams).solve_block(
        wanted, rows.target, rows.steps, rows.importance, rows.correction
    )


@pytest.fixture(autouse=True)
def in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is held against is not the C kernel."""
    monkeypatch.setenv("CC", "no-such-compiler")


@pytest.mark.parametrize(
    ("name", "beams", "rows", "outputs"),
    [("int4", 1, 50, 40), ("int4", 8, 50, 40), ("int3", 5, 33, 35), ("fp8", 2, 40, 20),
     ("fp8", 8, 16, 33), ("int8", 16, 20, 17), ("int8", 3, 7, 5)],
)  # fmt: skip
def test_the_same_codes(name: str, beams: int, rows: int, outputs: int) -> None:
    """But for sequences that cost nearly the same, where the order of a sum decides. Neither rows
    nor outputs are what is done at once."""
    scheme = SCHEMES[name]
    block = a_block(scheme, rows, outputs)
    found = solved(scheme, beams, block.target, block)
    plain = solve_block(block.target, block, scheme, beams)
    assert (found == plain).float().mean() > 0.99
    costs = [cost(block.target, block, codes) for codes in (found, plain)]
    torch.testing.assert_close(costs[0], costs[1], rtol=1e-3, atol=0)


@pytest.mark.parametrize("scheme", [FP8, SCHEMES["int4"]], ids=["fp8", "int4"])
def test_every_code_and_its_second_nearest(scheme: Scheme) -> None:
    """Codes themselves, values between them and beyond, against Scheme's own two functions."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()].unique()
    values = torch.cat((codes, codes * 1.01, codes * 0.99, codes + 1e-4, codes - 1e-4))
    values = torch.cat((values, (codes[1:] + codes[:-1]) / 2))[None]
    nearest = scheme.nearest(values)
    ones = torch.ones_like(values)
    alone = Rows(values, ones, torch.ones(1), torch.ones(1, 1))
    assert torch.equal(solved(scheme, 1, values, alone), nearest)
    # A row that is rounded later, and counts for far more, is a code only if this one is second.
    second = scheme.second_nearest(values, nearest)
    target = torch.cat((second - values, values))
    steps = torch.cat((1e6 * ones, ones))
    rows = Rows(target, steps, torch.tensor([1e12, 1]), torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    assert torch.equal(solved(scheme, 2, target, rows)[1:], second)


@pytest.mark.parametrize("name", ["int3", "int8", "fp8"])
def test_the_same_errors_of_scales(name: str) -> None:
    scheme = SCHEMES[name]
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(150, 90, generator=generator).T
    importance = torch.rand(90, generator=generator)
    scales = torch.rand(7, 150, generator=generator) / scheme.code_max - 0.5 / scheme.code_max
    found = compiled(scheme, 1).scale_errors(weight, importance, scales)
    plain = scale_errors(weight, importance, scales, scheme)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=0)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from calibrate.kernel_triton import _scale_errors, _solve_block

tensors = "wanted target steps importance correction codes weight scales errors".split()
types = dict.fromkeys(tensors, "*fp32") | {"tried": "*bf16", "origin": "*i32", "rows": "i32",
         "outputs": "i32", "strips": "i32", "least": "fp32", "most": "fp32"}
fixed = dict(kept=8, beams=8, width=32, strip_rows=16, name=15, at_once=16, float8=True)
for kernel in (_solve_block, _scale_errors):
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    given = {name: fixed[name] for name in kernel.arg_names if name in fixed}
    source = ASTSource(kernel, signature, given)
    done = compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    approximate = "div.full" in done.asm["ptx"]  # what a plain / becomes
    print(len(done.asm["cubin"]) > 0, done.metadata.shared <= 48 * 1024, approximate)
"""


def test_it_compiles_for_an_h100(tmp_path: Path) -> None:
    """By Triton and the ptxas that comes with it, which need no GPU for that."""
    found = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert found.stdout == "True True False\n" * 2, found.stderr


def test_a_report_can_say_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_gpu() as gpu:
        assert kernel.description(8, gpu) == "Triton kernel on Fake GPU"
        assert "PyTorch on Fake GPU, as the Triton kernel takes at most 16 beams" in (
            kernel.description(17, gpu)
        )
        assert kernel.kernel(FP8, 17, gpu) is None
        monkeypatch.setattr(kernel, "_triton", lambda: None)
        assert kernel.description(8, gpu).endswith("could not be had: triton is not installed")
        assert kernel.kernel(FP8, 8, gpu) is None
