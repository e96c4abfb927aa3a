"""The codes of one weight, from the tokens that reach it, and a report of how they were found.

Whatever does not go the usual way is a Rescue with the tensor's name. Knows nothing of layers,
files or models.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from llama4q import bnb
from llama4q.packing import StoredWeight
from llama4q.recipe import Method, Solver
from llama4q.schemes import QuantizedWeight, Scheme, round_to_nearest

from .gather import Gathered, gather
from .gptq import choose_scales, factorize, solve
from .hessian import Hessian, damping_for, joined, shrink
from .judge import Judge
from .outputs import Turn, solve_in_turn
from .target import Moments, Pair, corrected


@dataclass(frozen=True)
class GroupReport:
    """What became of one weight, or of a gate and up pair that share their Hessian."""

    name: str
    scheme: str
    tokens: int  # calibration tokens that reached it
    error: float | None  # share of the wanted output's energy that is wrong; None without tokens
    rounding_error: float | None  # the same for plain rounding
    shrinkage: float  # share of the pooled Hessian
    damping: float  # of the mean diagonal; 0 where nothing was factored
    correction: float  # share of the correction for what earlier layers damaged; 0 to 1
    seconds: float


@dataclass(frozen=True)
class Rescue:
    """A matrix that did not go the usual way, and what was done instead."""

    tensor: str
    kind: str  # "damping", "fallback", "no tokens", "uncorrected" or "kept rounding"
    detail: str


@dataclass(frozen=True)
class Others:
    """What the tokens of all experts say of one that saw few."""

    sample: torch.Tensor  # [N, I] some that moments may see, as experts get them
    pool: Hessian | None  # None: no shrinkage
    held: Pair  # some that no moment saw


@dataclass(frozen=True)
class Task:
    """One in-major weight `[I, O]` and what is to become of it."""

    name: str
    weight: torch.Tensor
    scheme: Scheme
    linears: int = 1  # that lie in it beside each other, with as many outputs each
    order: list[Turn] | None = None  # of outputs whose errors matter together; None: all alike
    lacking: bool = False  # its outputs go into the residual stream, and can make up for it


@dataclass(frozen=True)
class _Solved:
    """The codes of a weight, the weight they aim at, and how they were found."""

    found: StoredWeight
    aim: torch.Tensor
    shrinkage: float = 0.0
    damping: float = 0.0
    correction: float = 0.0


class Coder:
    """Finds codes by a solver's settings; `report` and `rescue` are told what became of each."""

    def __init__(
        self,
        solver: Solver,
        report: Callable[[GroupReport], None],
        rescue: Callable[[Rescue], None],
    ) -> None:
        self.solver = solver
        self.report = report
        self.rescue = rescue

    def solves(self, scheme: Scheme) -> bool:
        """Whether codes of this scheme are calibrated, not rounded."""
        return self.solver.method is Method.GPTQ and scheme.calibrates

    def codes(
        self, task: Task, pieces: Iterable[Pair], parts: torch.Tensor, others: Others | None
    ) -> StoredWeight:
        """Codes for the tokens in `pieces`; `parts [N]` says which part of the text each is of."""
        began = time.perf_counter()
        exact = task.weight.float().contiguous()
        solves = self.solves(task.scheme)
        halves = None
        if solves:
            crossed = self.solver.correction
            halves = (
                Moments(exact, task.lacking, crossed),
                Moments(exact, task.lacking, crossed),
            )
        gathered = gather(pieces, parts, halves, others is not None)
        judge = Judge(exact, gathered.judge, None if others is None else others.held)
        solved = _Solved(_rounded(exact, task), exact)
        wrong = rounding = judge.error(exact, solved.found)
        if halves is not None:
            pool = None if others is None else others.pool
            candidate = self._solve(task, exact, halves, gathered, pool)
            wrong = judge.error(candidate.aim, candidate.found)
            if wrong is not None and rounding is not None and wrong > rounding:
                self._rescue(task, "kept rounding", f"error {wrong:.2e} against {rounding:.2e}")
                wrong = rounding
            else:
                solved = candidate
        self.report(
            GroupReport(
                name=task.name,
                scheme=task.scheme.name,
                tokens=len(parts),
                error=wrong,
                rounding_error=rounding,
                shrinkage=solved.shrinkage,
                damping=solved.damping,
                correction=solved.correction,
                seconds=time.perf_counter() - began,
            )
        )
        return solved.found

    def _solve(
        self,
        task: Task,
        weight: torch.Tensor,
        halves: tuple[Moments, Moments],
        gathered: Gathered,
        pool: Hessian | None,
    ) -> _Solved:
        """GPTQ on the corrected weight; whatever does not go the usual way is named."""
        hessian = joined(halves[0].hessian, halves[1].hessian)
        target = pool or hessian.alone()
        if self.solver.shrinkage:
            hessian = shrink(hessian, target, [] if gathered.rows is None else [gathered.rows])
            if hessian.tokens == 0:
                self._rescue(task, "no tokens", "no calibration token reached it: pooled Hessian")
        damping = damping_for(hessian, self.solver.damping, self.solver.token_damping)
        factor = factorize(hessian.matrix, damping, self.solver.act_order)
        if factor is None:
            self._rescue(task, "fallback", "its Hessian does not factor; rounded to nearest")
            return _Solved(round_to_nearest(weight, task.scheme), weight)
        if factor.attempts > 1:
            self._rescue(task, "damping", f"raised to {factor.damping:g} before it factored")
        share, tokens = hessian.shrinkage, hessian.tokens

        def blended(own: Hessian) -> Hessian:
            return own.blended(target, share) if share else own

        correction: float | None = 0.0
        if self.solver.correction:
            weight, correction = corrected(weight, halves, factor, blended)
        if correction is None and tokens:
            self._rescue(task, "uncorrected", "half of the calibration sequences say nothing")

        def codes(aim: torch.Tensor) -> QuantizedWeight:
            scales = choose_scales(
                aim,
                factor.importance,
                task.scheme,
                self.solver.scale_points,
                self.solver.signed_scales,
            )
            return solve(aim, factor, scales, task.scheme, self.solver.beams)

        order = task.order
        found = codes(weight) if order is None else solve_in_turn(weight, order, codes)
        return _Solved(found, weight, share, factor.damping, correction or 0.0)

    def _rescue(self, task: Task, kind: str, detail: str) -> None:
        self.rescue(Rescue(task.name, kind, detail))


def _rounded(weight: torch.Tensor, task: Task) -> StoredWeight:
    """Plain rounding. bitsandbytes keeps statistics of a whole matrix, so of each linear."""
    if task.scheme.bitsandbytes:
        return bnb.quantize(weight, task.scheme, task.linears)
    return round_to_nearest(weight, task.scheme)
