"""The inner loops of lookahead.py and gptq.py in Triton: one kernel for a whole block of rows.

A program holds some outputs, which do not depend on each other, and all of their beams. Rows come
in strips, the last one first. Within a strip each row is made up for at once, in registers; a strip
begins by gathering what all rows behind it ask for, along the path of each beam. Codes and paths of
finished strips lie in memory between. TRITON_INTERPRET=1 runs it without a GPU. Knows no models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

STRIP = 16  # rows between two products, as few as tensor cores take
VALUES = 256  # beams times outputs of one program: with STRIP rows 32 registers a thread
MOST_OUTPUTS = 128  # of one program
OPTIONS = {"enable_fp_fusion": False}  # each operation rounds, as PyTorch's do
ROUND = tl.constexpr(1.5 * 2**23)  # added and taken away, leaves integers: ties to even
INFINITE = tl.constexpr(0x7F800000)  # the bits of infinity


@dataclass(frozen=True)
class TritonKernel:
    """The loops for one grid and number of beams, in F32."""

    beams: int
    float8: bool
    least: float
    most: float

    def solve_block(
        self,
        wanted: torch.Tensor,
        target: torch.Tensor,
        steps: torch.Tensor,
        importance: torch.Tensor,
        correction: torch.Tensor,
    ) -> torch.Tensor:
        """lookahead.solve_block for `[B, O]`."""
        rows, outputs = wanted.shape
        given = (wanted, target, steps, importance, correction)
        wanted, target, steps, importance, correction = (one.contiguous() for one in given)
        beams = triton.next_power_of_2(self.beams)
        width = min(MOST_OUTPUTS, VALUES // beams)
        strips = triton.cdiv(rows, STRIP)
        codes = torch.empty_like(wanted)
        # Every code is exact in BF16. [strips, STRIP, beams, O]; beams before each strip.
        tried = wanted.new_empty(strips * STRIP * beams, outputs, dtype=torch.bfloat16)
        origin = wanted.new_empty(strips * beams, outputs, dtype=torch.int32)
        _solve_block[(triton.cdiv(outputs, width),)](
            wanted, target, steps, importance, correction, codes, tried, origin,
            rows, outputs, strips, self.least, self.most,
            self.beams, beams, width, STRIP, 2 * beams - 1, self.float8, **OPTIONS,
        )  # fmt: skip
        return codes

    def scale_errors(
        self, weight: torch.Tensor, importance: torch.Tensor, scales: torch.Tensor
    ) -> torch.Tensor:
        """gptq.scale_errors: `[points, O]` for the `[group, O]` of one group."""
        rows, outputs = weight.shape
        weight, importance, scales = (one.contiguous() for one in (weight, importance, scales))
        errors = torch.empty_like(scales)
        _scale_errors[(triton.cdiv(outputs, MOST_OUTPUTS), len(scales))](
            weight, importance, scales, errors, rows, outputs, self.least, self.most,
            MOST_OUTPUTS, STRIP, self.float8, **OPTIONS,
        )  # fmt: skip
        return errors


@triton.jit
def _nearest(value, least, most, float8: tl.constexpr):
    """Scheme.nearest: ties to even, saturating."""
    value = tl.minimum(tl.maximum(value, least), most)
    if float8:
        bits = value.to(tl.int32, bitcast=True)
        normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF
        subnormal = (value * 512 + ROUND - ROUND) * 0.001953125  # below 2^-5 they are 2^-9 apart
        return tl.where(tl.abs(value) < 0.015625, subnormal, normal.to(tl.float32, bitcast=True))
    return value + ROUND - ROUND


@triton.jit
def _second_nearest(value, near, least, most, float8: tl.constexpr):
    """Scheme.second_nearest: the code on the other side of `value`, or `near` at the grid's end."""
    up = tl.where(value > near, 1.0, -1.0)
    second = near + up
    if float8:
        outwards = tl.where(near * up > 0, 0x100000, -0x100000)
        normal = (near.to(tl.int32, bitcast=True) + outwards).to(tl.float32, bitcast=True)
        second = tl.where(tl.abs(near) < 0.03125, near + up * 0.001953125, normal)
    return tl.where((second < least) | (second > most), near, second)


@triton.jit
def _solve_block(
    wanted, target, steps, importance, correction, codes, tried, origin,
    rows, outputs, strips, least, most,
    kept: tl.constexpr, beams: tl.constexpr, width: tl.constexpr, strip_rows: tl.constexpr,
    name: tl.constexpr, float8: tl.constexpr,
):  # fmt: skip
    """`kept` of the `beams` are in the race; `beams` is a power of two. `name` are the bits of a
    cost where a candidate's number goes."""
    lane = tl.program_id(0) * width + tl.arange(0, width)
    there = lane < outputs
    beam = tl.arange(0, beams)[:, None]
    place = tl.arange(0, strip_rows)
    cost = tl.zeros((beams, width), tl.float32)
    cost = tl.where(beam == 0, cost, float("inf"))
    for back in range(strips):
        strip = strips - 1 - back
        start = strip * strip_rows
        row = start + place
        real = row < rows
        inside = real[:, None] & there[None, :]
        at = row[:, None] * outputs + lane[None, :]
        begin = tl.load(wanted + at, mask=inside, other=0.0)
        goals = tl.load(target + at, mask=inside, other=0.0)
        widths = tl.load(steps + at, mask=inside, other=1.0)
        weights = tl.load(importance + row, mask=real, other=0.0)
        factors = tl.load(
            correction + row[:, None] * rows + row[None, :],
            mask=real[None, :] & (row[:, None] < row[None, :]), other=0.0,
        )  # fmt: skip
        ahead = tl.broadcast_to(begin[:, None, :], (strip_rows, beams, width))
        # What all rows behind ask for, along each beam's path
        path = tl.broadcast_to(beam, (beams, width))
        for before in range(strip + 1, strips):
            other = before * strip_rows + place
            known = (other < rows)[:, None] & there[None, :]
            behind = other[:, None] * outputs + lane[None, :]
            goal = tl.load(target + behind, mask=known, other=0.0)
            step = tl.load(steps + behind, mask=known, other=1.0)
            taken = tl.load(
                tried + (other[:, None, None] * beams + path[None]) * outputs + lane[None, None, :],
                mask=known[:, None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            residual = goal[:, None, :] - taken * step[:, None, :]
            factor = tl.load(
                correction + row[:, None] * rows + other[None, :],
                mask=real[:, None] & (other < rows)[None, :], other=0.0,
            )  # fmt: skip
            asked = tl.dot(
                factor, tl.reshape(residual, (strip_rows, beams * width)), input_precision="tf32x3"
            )
            ahead += tl.reshape(asked, (strip_rows, beams, width))
            path = tl.load(
                origin + (before * beams + path) * outputs + lane[None, :],
                mask=there[None, :], other=0,
            )  # fmt: skip
        # Row after row: `ahead` turns into codes from its end on
        first = tl.broadcast_to(beam, (beams, width))
        for done in range(strip_rows):
            here = place == strip_rows - 1 - done
            step = tl.sum(tl.where(here[:, None], widths, 0.0), axis=0)[None, :]
            goal = tl.sum(tl.where(here[:, None], goals, 0.0), axis=0)[None, :]
            column = tl.sum(tl.where(here[None, :], factors, 0.0), axis=1)
            weight = tl.sum(tl.where(here[:, None], weights[:, None], 0.0), axis=0)[None, :]
            exact = tl.sum(tl.where(here[:, None, None], ahead, 0.0), axis=0)
            exact *= tl.math.div_rn(1.0, step)
            near = _nearest(exact, least, most, float8)
            if kept > 1:
                far = _second_nearest(exact, near, least, most, float8)
                lost, more = (exact - near) * step, (exact - far) * step
                one = cost + weight * (lost * lost)
                two = cost + weight * (more * more)
                # A row that is not there weighs nothing and has one code
                two = tl.where((far == near) | (weight == 0), float("inf"), two)
                one_key = (one.to(tl.int32, bitcast=True) & ~name) | (2 * beam)
                two_key = (two.to(tl.int32, bitcast=True) & ~name) | (2 * beam + 1)
                # A candidate's place is how many are cheaper; no two keys are the same
                one_place = tl.sum((one_key[None] < one_key[:, None]).to(tl.int32), axis=1)
                one_place += tl.sum((two_key[None] < one_key[:, None]).to(tl.int32), axis=1)
                two_place = tl.sum((one_key[None] < two_key[:, None]).to(tl.int32), axis=1)
                two_place += tl.sum((two_key[None] < two_key[:, None]).to(tl.int32), axis=1)
                one_goes = one_place[None] == beam[:, None]
                two_goes = two_place[None] == beam[:, None]
                key = tl.sum(tl.where(one_goes, one_key[None], 0), axis=1)
                key += tl.sum(tl.where(two_goes, two_key[None], 0), axis=1)
                near = tl.sum(tl.where(one_goes, near[None], 0.0), axis=1)
                near += tl.sum(tl.where(two_goes, far[None], 0.0), axis=1)
                key = tl.where(beam < kept, key, (INFINITE & ~name) | (key & name))
                cost = (key & ~name).to(tl.float32, bitcast=True)
                parent = (key & name) >> 1
                first = tl.gather(first, parent, 0)
                ahead = tl.gather(
                    ahead, tl.broadcast_to(parent[None], (strip_rows, beams, width)), 1
                )
            residual = goal - near * step
            ahead += column[:, None, None] * residual[None]
            ahead = tl.where(here[:, None, None], near[None], ahead)
        strip_at = (row[:, None, None] * beams + beam[None]) * outputs + lane[None, None, :]
        tl.store(tried + strip_at, ahead.to(tl.bfloat16), mask=there[None, None, :])
        tl.store(
            origin + (strip * beams + beam) * outputs + lane[None, :], first, mask=there[None, :]
        )
        tl.debug_barrier()  # the next strips read along other beams' paths
    best = tl.argmin(cost, axis=0)
    for strip in range(strips):
        row = strip * strip_rows + place
        found = tl.load(
            tried + (row[:, None] * beams + best[None, :]) * outputs + lane[None, :],
            mask=there[None, :], other=0.0,
        )  # fmt: skip
        tl.store(
            codes + row[:, None] * outputs + lane[None, :], found.to(tl.float32),
            mask=(row < rows)[:, None] & there[None, :],
        )  # fmt: skip
        best = tl.load(origin + (strip * beams + best) * outputs + lane, mask=there, other=0)


@triton.jit
def _scale_errors(
    weight, importance, scales, errors, rows, outputs, least, most,
    width: tl.constexpr, at_once: tl.constexpr, float8: tl.constexpr,
):  # fmt: skip
    """One of the scales of some outputs."""
    lane = tl.program_id(0) * width + tl.arange(0, width)
    there = lane < outputs
    at = tl.program_id(1) * outputs + lane
    step = tl.load(scales + at, mask=there, other=1.0)[None, :]
    total = tl.zeros((width,), tl.float32)
    for start in range(0, rows, at_once):
        row = start + tl.arange(0, at_once)
        value = tl.load(
            weight + row[:, None] * outputs + lane[None, :],
            mask=(row < rows)[:, None] & there[None, :], other=0.0,
        )  # fmt: skip
        lost = value - _nearest(value * tl.math.div_rn(1.0, step), least, most, float8) * step
        counts = tl.load(importance + row, mask=row < rows, other=0.0)[:, None]
        total += tl.sum(counts * lost * lost, axis=0)
    tl.store(errors + at, total, mask=there)
