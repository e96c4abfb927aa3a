"""Large F32 products from BF16 factors, where the processor has them in hardware.

A sum over thousands of rows forgets how its factors were rounded: the Hessian of BF16 rows comes
out closer than in F32 (1e-7 against 6e-7 of its norm, 5,120 inputs, AMX), as their products are
exact. Rough products may have their sums rounded to BF16 as well. Where the processor multiplies no
BF16, F32 stays. Knows nothing of what is multiplied.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch

SQUARE_BLOCK = 512  # rows of a symmetric product that are taken at a time, from the diagonal on
ROW_MAJOR, PLAIN, TRANSPOSED = 101, 111, 112  # as CBLAS calls them


@cache
def factor_dtype(device: torch.device) -> torch.dtype:
    """Of the factors of products: BF16 where the processor has it, as every GPU, else F32."""
    if device.type == "cuda":
        return torch.bfloat16
    has_it = torch.backends.mkldnn.is_available() and (
        torch.ops.mkldnn._is_mkldnn_bf16_supported()  # what torch itself asks; it has no other name
    )
    return torch.bfloat16 if has_it else torch.float32


def description(device: torch.device) -> str:
    """How products are made on a device, for a report."""
    if factor_dtype(device) is torch.float32:
        return "F32, as the processor multiplies no BF16"
    if device.type == "cuda":
        return "BF16 factors, F32 sums"
    if _bf16_product() is None:
        rough = ", or rounded sums by oneDNN" if rounds_sums(device) else ""
        return f"BF16 factors in F32 products, as PyTorch is built without MKL{rough}"
    if rounds_sums(device):
        return "BF16 factors, F32 sums by MKL, or rounded ones by oneDNN"
    return "BF16 factors, F32 sums by MKL"


@cache
def rounds_sums(device: torch.device) -> bool:
    """Whether rough products have sums of BF16: where a processor multiplies BF16 without AMX.

    There PyTorch's own product, whose result is BF16, has 2.3 to 2.8 times the speed of MKL's with
    F32 sums, which is that of F32 (128 rows, 2,560 inputs, 16,384 outputs; AMD EPYC).
    """
    if device.type == "cuda" or factor_dtype(device) is torch.float32:
        return False
    return not torch.cpu._is_amx_tile_supported()  # it has no other name


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`[N, I] @ [I, O]` in F32."""
    total = left.new_empty(left.shape[0], right.shape[1], dtype=torch.float32)
    _add(total, left, right, keep=0.0)
    return total


def add_product(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, times: float = 1.0
) -> None:
    """Add `times` the product of `[N, I]` and `[I, O]` to an F32 `[N, O]`."""
    _add(total, left, right, times=times)


def rough_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`product`, of which each element may be off by 0.4 %."""
    if rounds_sums(left.device):
        return torch.mm(_factor(left), _factor(right)).float()
    return product(left, right)


def add_rough_product(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, times: float = 1.0
) -> None:
    """`add_product`; what is added may be off by 0.4 % in each element."""
    if rounds_sums(left.device):
        total.add_(torch.mm(_factor(left), _factor(right)), alpha=times)
    else:
        add_product(total, left, right, times)


def add_square(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add the second moments of rows `[N, I]` to an F32 `[I, I]`, above its diagonal alone.

    `mirror` fills in the rest when all have been added: half of the work is saved.
    """
    factor = _factor(rows).contiguous()
    for block in _blocks(len(total)):
        here = slice(block.start, None)
        _add(total[block, here], factor[:, block].T, factor[:, here])


def mirror(total: torch.Tensor) -> None:
    """What is below the diagonal, from what is above, in place."""
    for block in _blocks(len(total)):
        total[block.stop :, block] = total[block, block.stop :].T
        corner = total[block, block].triu()
        total[block, block] = corner + corner.triu(1).T


def _factor(rows: torch.Tensor) -> torch.Tensor:
    return rows.to(factor_dtype(rows.device))


def _blocks(size: int) -> list[slice]:
    return [slice(start, min(start + SQUARE_BLOCK, size)) for start in range(0, size, SQUARE_BLOCK)]


def _add(
    total: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    keep: float = 1.0,
    times: float = 1.0,
) -> None:
    """`keep` times the F32 `total`, and `times` the product."""
    left, right = _factor(left), _factor(right)
    if total.device.type == "cuda":
        if not keep:
            total.zero_()
        # not in one: the addmm of some versions takes no F32 total with BF16 factors
        total.add_(torch.mm(left, right, out_dtype=torch.float32), alpha=times)
        return
    compiled = _bf16_product()
    if compiled is None or left.dtype is not torch.bfloat16 or not left.numel():
        torch.addmm(total, left.float(), right.float(), beta=keep, alpha=times, out=total)
        return
    (left, left_form), (right, right_form) = _form(left), _form(right)
    rows, columns = total.shape
    inputs = left.shape[0 if left_form == TRANSPOSED else 1]
    compiled(
        *map(ctypes.c_int, (ROW_MAJOR, left_form, right_form, rows, columns, inputs)),
        ctypes.c_float(times),
        *_matrix(left),
        *_matrix(right),
        ctypes.c_float(keep),
        *_matrix(total),
    )


def _form(matrix: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The matrix by rows, and whether that is its transpose."""
    for taken, form in ((matrix, PLAIN), (matrix.T, TRANSPOSED)):
        if taken.stride(1) == 1 and taken.stride(0) >= taken.shape[1]:
            return taken, form
    return matrix.contiguous(), PLAIN


def _matrix(matrix: torch.Tensor) -> tuple[ctypes.c_void_p, ctypes.c_int]:
    """As CBLAS takes one: where it is, and how far its rows are apart."""
    return ctypes.c_void_p(matrix.data_ptr()), ctypes.c_int(matrix.stride(0))


@cache
def _bf16_product() -> Any:
    """MKL's product of BF16 matrices into an F32 one, from the copy that PyTorch brings along.

    PyTorch calls it for no tensors: its own product of BF16 is BF16, too, and that of F32 with
    factors rounded on the way takes 2 to 3 times as long (5,120 inputs, AMX). None where PyTorch is
    built without MKL, so on other processors. Reference: cblas_gemm_bf16bf16f32 of oneMKL.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.CDLL(str(library)).cblas_gemm_bf16bf16f32
    except (OSError, AttributeError):
        return None
