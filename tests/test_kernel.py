"""The compiled inner loops against the same search in PyTorch."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from calibrate import kernel
from calibrate.gptq import scale_errors
from calibrate.lookahead import Rows, solve_block
from llama4q.schemes import FP8, SCHEMES, Scheme

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
ROWS, OUTPUTS = 100, 83  # neither a multiple of what is done at once


def a_block(scheme: Scheme) -> tuple[torch.Tensor, Rows]:
    """Weights in the grid's range but for a few that saturate, and strong corrections."""
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(ROWS, OUTPUTS, generator=generator)
    largest = 448.0 if scheme is FP8 else scheme.code_max
    steps = torch.rand(ROWS, OUTPUTS, generator=generator).add(2) / largest
    steps[:, ::2] *= -1
    upper = torch.triu(0.2 * torch.randn(ROWS, ROWS, generator=generator), 1)
    importance = torch.rand(ROWS, generator=generator) + 0.2
    return target, Rows(target, steps, importance, upper + torch.eye(ROWS))


@pytest.mark.parametrize("beams", [1, 2, 5, 8, 16])
@pytest.mark.parametrize("name", ["int3", "int4", "int8", "fp8"])
def test_the_same_codes(name: str, beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for sequences that cost nearly the same, where the order of a sum decides."""
    scheme = SCHEMES[name]
    wanted, rows = a_block(scheme)
    assert kernel.kernel(scheme, beams, wanted.device) is not None, kernel.description(beams)
    compiled = solve_block(wanted, rows, scheme, beams)
    monkeypatch.setenv("CC", "no-such-compiler")
    assert kernel.kernel(scheme, beams, wanted.device) is None
    plain = solve_block(wanted, rows, scheme, beams)
    assert (compiled == plain).float().mean() > 0.99
    costs = [cost(wanted, rows, codes) for codes in (compiled, plain)]
    torch.testing.assert_close(costs[0], costs[1], rtol=1e-3, atol=0)


def cost(wanted: torch.Tensor, rows: Rows, codes: torch.Tensor) -> torch.Tensor:
    """sum_j D_j eps_j^2 over all outputs; `wanted` is the target itself."""
    epsilon = rows.correction @ (wanted - codes * rows.steps)
    return (rows.importance[:, None] * epsilon.square()).sum()


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
    assert torch.equal(solve_block(values, alone, scheme, 1), nearest)
    # A row that is rounded later, and counts for far more, is a code only if this one is second.
    second = scheme.second_nearest(values, nearest)
    target = torch.cat((second - values, values))
    steps = torch.cat((1e6 * ones, ones))
    rows = Rows(target, steps, torch.tensor([1e12, 1]), torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    assert torch.equal(solve_block(target, rows, scheme, 2)[1:], second)


@pytest.mark.parametrize("name", ["int3", "int8", "fp8"])
def test_the_same_errors_of_scales(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = SCHEMES[name]
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(OUTPUTS, 300, generator=generator).T
    importance = torch.rand(300, generator=generator)
    scales = torch.rand(7, OUTPUTS, generator=generator) / scheme.code_max - 0.5 / scheme.code_max
    compiled = scale_errors(weight, importance, scales, scheme)
    monkeypatch.setenv("CC", "no-such-compiler")
    plain = scale_errors(weight, importance, scales, scheme)
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=0)


def test_compiled_once_for_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel in the cache is used as it is; another compiler's would have another name."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = ["cc", *kernel.defines(2, float8=False)]
    first = kernel.compiled(command)
    written = first.stat().st_mtime_ns
    assert kernel.compiled(command) == first
    assert first.stat().st_mtime_ns == written
    assert list(first.parent.iterdir()) == [first]
    assert kernel.compiled(["cc", *kernel.defines(3, float8=False)]) != first


def test_a_report_can_say_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel.description(8) == "C kernel"
    assert "16 beams" in kernel.description(17)
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "PyTorch" in kernel.description(8)
    assert "no-such-compiler" in kernel.description(8)
    monkeypatch.setenv("CC", f"{sys.executable} -c exit(3)")
    assert "exit status 3" in kernel.description(8)
