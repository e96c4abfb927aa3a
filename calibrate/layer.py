"""The codes of one decoder layer, from the hidden states that reach it.

The inputs are those that the already quantized part of the model produces. An expert sees only the
rows routed to it, scaled as the model scales them; gate and up share one factor. Knows nothing of
files, other layers or the original stream.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from llama4q.config import ModelConfig
from llama4q.model import DecoderLayer, Linear, Mlp, Moe, attention, feed_forward_input, route
from llama4q.packing import pack
from llama4q.recipe import Method, Recipe, Solver
from llama4q.schemes import (
    Kind,
    QuantizedWeight,
    Scheme,
    fake_float8_tokens,
    round_to_nearest,
)
from llama4q.stream import TOKENS_AT_ONCE
from llama4q.weights import DOWN, GATE, UP, Component

from .gptq import choose_scales, factorize, solve
from .hessian import Hessian, measure, shrink
from .target import Pair, corrected

POOL_ROWS = 2  # times the inputs: rows of other tokens that a blend is estimated from
ERROR_ROWS = 1024  # rows that the reported error is measured on


@dataclass(frozen=True)
class GroupReport:
    """What became of one weight, or of a gate and up pair that share their Hessian."""

    name: str
    scheme: str
    tokens: int  # rows that its Hessian was measured on
    error: float | None  # |X (W - Q)|^2 / |X W|^2 for the W aimed at; None without rows
    shrinkage: float  # share of the pooled Hessian
    damping: float  # of the mean diagonal; 0 where nothing was factored
    correction: float  # share of the correction for what earlier layers damaged; 0 to 1
    seconds: float


@dataclass(frozen=True)
class Rescue:
    """A matrix that did not go the usual way, and what was done instead."""

    tensor: str
    kind: str  # "damping", "fallback", "no tokens" or "uncorrected"
    detail: str


@dataclass
class LayerResult:
    """The tensors of a layer as they go to disk, and what is to be said of them."""

    tensors: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    groups: list[GroupReport] = field(default_factory=list)
    rescues: list[Rescue] = field(default_factory=list)
    expert_tokens: list[int] = field(default_factory=list)


class LayerQuantizer:
    """Quantizes one layer by a recipe; `report` is called for each group as it is done."""

    def __init__(
        self, config: ModelConfig, recipe: Recipe, index: int, report: Callable[[GroupReport], None]
    ) -> None:
        self.config = config
        self.solver = recipe.solver
        self.prefix = config.layer_prefix(index)
        self.schemes = {
            component: recipe.scheme(component, index, config.num_layers) for component in Component
        }
        self.report = report
        self.result = LayerResult()

    def quantize(
        self, layer: DecoderLayer, served: list[torch.Tensor], plain: list[torch.Tensor]
    ) -> LayerResult:
        """Find the codes of `layer`, given the hidden states `[S, T, D]` that enter it.

        `served` are those of the quantized model, `plain` those of the original, in batches.
        """
        half = torch.cat([_halves_of(hidden) for hidden in served])
        # Copies, so that they can be added to: each is as large as a whole stream.
        hidden, hidden_plain = (
            torch.cat([batch.flatten(0, 1) for batch in stream]) for stream in (served, plain)
        )
        mixed, original = (
            torch.cat([attention(self.config, layer, batch).flatten(0, 1) for batch in stream])
            for stream in (served, plain)
        )
        output = self._o_proj(layer.o, Pair(mixed, original, hidden_plain - hidden, half))
        hidden.add_(output(mixed))
        hidden_plain.add_(layer.o(original))
        del mixed, original
        inputs = Pair(
            feed_forward_input(self.config, layer, hidden[None]),
            feed_forward_input(self.config, layer, hidden_plain[None]),
            None,
            half,
        )
        lacking = hidden_plain.sub_(hidden)
        del hidden
        name = f"{self.prefix}feed_forward"
        if isinstance(layer.feed_forward, Mlp):
            self._mlp(name, layer.feed_forward, inputs, lacking, Component.DENSE)
        else:
            self._moe(name, layer.feed_forward, inputs, lacking)
        return self.result

    def _moe(self, name: str, moe: Moe, inputs: Pair, lacking: torch.Tensor) -> None:
        """The shared expert, then the routed ones on what the served stream sends them."""
        shared = self._mlp(
            f"{name}.shared_expert", moe.shared, inputs, lacking, Component.SHARED_EXPERT
        )
        lacking.add_(in_parts(moe.shared, inputs.original))
        lacking.sub_(in_parts(shared, inputs.served))
        served, plain = route(moe, inputs.served), route(moe, inputs.original)
        rows = inputs.served * served.score
        # A token that the original sent to another expert has no original input to this one.
        same = (served.expert == plain.expert)[:, None]
        scaled = Pair(
            rows,
            torch.where(same, inputs.original * plain.score, rows),
            None,
            inputs.half,
        )
        lacking.mul_(same)
        pool = self._pool(scaled.served)
        for number, expert in enumerate(moe.experts):
            where = served.rows(number)
            mine = scaled.rows(where)
            self.result.expert_tokens.append(len(mine.half))
            self._mlp(
                f"{name}.experts.{number}",
                expert,
                mine,
                lacking[where],
                Component.EXPERTS,
                scaled.served,
                pool,
            )

    def _o_proj(self, linear: Linear, pair: Pair) -> Linear:
        """Quantize the attention's output projection; returns it as an engine will apply it."""
        scheme = self.schemes[Component.O_PROJ]
        if not scheme.quantizes:
            return linear
        name = f"{self.prefix}self_attn.o_proj"
        found = self._weight(name, linear.weight, pair, scheme)
        self.result.tensors += pack(name, found)
        return as_served(found, linear.weight.dtype)

    def _pool(self, scaled: torch.Tensor) -> Hessian | None:
        """The moments of all tokens, which experts with few tokens are blended with."""
        scheme = self.schemes[Component.EXPERTS]
        if not (_uses_hessian(scheme, self.solver) and self.solver.shrinkage):
            return None
        return measure([scaled], self.config.hidden_size)

    def _mlp(
        self,
        name: str,
        mlp: Mlp,
        rows: Pair,
        lacking: torch.Tensor,
        component: Component,
        everyone: torch.Tensor | None = None,
        pool: Hessian | None = None,
    ) -> Mlp:
        """Quantize gate and up together, then down on what the quantized pair makes of `rows`.

        Returns the feed-forward as an engine will apply it. Only down can make up for what the
        residual stream lacks.
        """
        scheme = self.schemes[component]
        if not scheme.quantizes:
            if component is Component.EXPERTS:
                self.result.tensors += _unfused(name, mlp)
            return mlp
        dtype = mlp.down.weight.dtype
        pair = self._weight(f"{name}.gate_up_proj", mlp.gate_up.weight, rows, scheme, pool)
        served = Mlp(as_served(pair, dtype), mlp.down)
        down_pool = None
        if pool is not None and everyone is not None:
            down_pool = self._down_pool(served, everyone)
        hidden = Pair(
            in_parts(served.hidden, rows.served),
            in_parts(mlp.hidden, rows.original),
            lacking,
            rows.half,
        )
        down = self._weight(f"{name}.{DOWN}", mlp.down.weight, hidden, scheme, down_pool)
        gate, up = _halves(pair)
        self.result.tensors += [
            *pack(f"{name}.{GATE}", gate),
            *pack(f"{name}.{UP}", up),
            *pack(f"{name}.{DOWN}", down),
        ]
        return Mlp(served.gate_up, as_served(down, dtype))

    def _down_pool(self, served: Mlp, everyone: torch.Tensor) -> Hessian:
        """Moments of down's input if a sample of all tokens went through this expert."""
        size = self.config.expert_size
        return measure([served.hidden(_spaced(everyone, POOL_ROWS * size))], size)

    def _weight(
        self,
        name: str,
        weight: torch.Tensor,
        pair: Pair,
        scheme: Scheme,
        pool: Hessian | None = None,
    ) -> QuantizedWeight:
        """Codes of one in-major weight for its input rows, with a report of how they were found."""
        began = time.perf_counter()
        exact = weight.float()
        if _uses_hessian(scheme, self.solver):
            solved = self._solve(name, exact, pair, pool, scheme)
        else:
            solved = _Solved(round_to_nearest(exact, scheme), exact)
        report = GroupReport(
            name=name,
            scheme=scheme.name,
            tokens=len(pair.half),
            error=output_error(solved.aim, solved.found.dequantize(), pair.served),
            shrinkage=solved.shrinkage,
            damping=solved.damping,
            correction=solved.correction,
            seconds=time.perf_counter() - began,
        )
        self.result.groups.append(report)
        self.report(report)
        return solved.found

    def _solve(
        self, name: str, weight: torch.Tensor, pair: Pair, pool: Hessian | None, scheme: Scheme
    ) -> _Solved:
        """GPTQ on the corrected weight; whatever does not go the usual way is named."""
        hessian = measure([pair.served], len(weight))
        if pool is not None:
            hessian = shrink(hessian, pool, pair.served)
            if hessian.tokens == 0:
                self._rescue(name, "no tokens", "no calibration token reached it: pooled Hessian")
        factor = factorize(hessian.matrix, self.solver.damping, self.solver.act_order)
        if factor is None:
            self._rescue(name, "fallback", "its Hessian does not factor; rounded to nearest")
            return _Solved(round_to_nearest(weight, scheme), weight)
        if factor.attempts > 1:
            self._rescue(name, "damping", f"raised to {factor.damping:g} before it factored")
        share = hessian.shrinkage

        def blended(own: Hessian) -> Hessian:
            return own if pool is None else own.blended(pool, share)

        correction = 0.0
        if self.solver.correction:
            weight, share_taken = corrected(weight, pair, factor, blended)
            if share_taken is None and hessian.tokens:
                self._rescue(name, "uncorrected", "half of the calibration sequences say nothing")
            correction = share_taken or 0.0
        scales = choose_scales(weight, factor.importance, scheme, self.solver.scale_points)
        found = solve(weight, factor, scales, scheme)
        return _Solved(found, weight, share, factor.damping, correction)

    def _rescue(self, name: str, kind: str, detail: str) -> None:
        self.result.rescues.append(Rescue(name, kind, detail))


@dataclass(frozen=True)
class _Solved:
    """The codes of a weight, the weight they aimed at, and how they were found."""

    found: QuantizedWeight
    aim: torch.Tensor
    shrinkage: float = 0.0
    damping: float = 0.0
    correction: float = 0.0


def _uses_hessian(scheme: Scheme, solver: Solver) -> bool:
    return scheme.kind is Kind.INT and solver.method is Method.GPTQ


def as_served(found: QuantizedWeight, dtype: torch.dtype) -> Linear:
    """A quantized weight as an engine applies it, in the run's `dtype`."""
    activations = fake_float8_tokens if found.scheme.kind is Kind.FLOAT8 else None
    return Linear(found.dequantize().to(dtype), activations)


def in_parts(function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """`function` of rows `[N, I]`, TOKENS_AT_ONCE of them at a time."""
    return torch.cat([function(part) for part in rows.split(TOKENS_AT_ONCE)])


def output_error(weight: torch.Tensor, found: torch.Tensor, rows: torch.Tensor) -> float | None:
    """The share of the output's energy that quantizing loses, on at most ERROR_ROWS rows."""
    if not len(rows):
        return None
    sample = _spaced(rows, ERROR_ROWS).float()
    total = (sample @ weight).square().sum()
    return float((sample @ (weight - found)).square().sum() / total) if total > 0 else 0.0


def _spaced(rows: torch.Tensor, count: int) -> torch.Tensor:
    """About `count` rows, evenly spaced; all of them when there are fewer."""
    return rows[:: max(1, len(rows) // count)]


def _halves_of(hidden: torch.Tensor) -> torch.Tensor:
    """Which half each token of `[S, T, D]` belongs to, `[S * T]` bool: every other sequence."""
    sequences, length = hidden.shape[:2]
    return (torch.arange(sequences) % 2 == 1).repeat_interleave(length)


def _halves(pair: QuantizedWeight) -> tuple[QuantizedWeight, QuantizedWeight]:
    """Gate and up of a quantized pair `[D, 2F]`."""
    gate, up = pair.codes.chunk(2, dim=1)
    gate_scales, up_scales = pair.scales.chunk(2, dim=1)
    return (
        QuantizedWeight(pair.scheme, gate, gate_scales),
        QuantizedWeight(pair.scheme, up, up_scales),
    )


def _unfused(name: str, mlp: Mlp) -> Iterator[tuple[str, torch.Tensor]]:
    """A BF16 expert in the quantized checkpoint's layout: engines load no fused one beside it."""
    gate, up = mlp.gate_up.weight.to(torch.bfloat16).chunk(2, dim=1)
    yield f"{name}.{GATE}.weight", gate.T.contiguous()
    yield f"{name}.{UP}.weight", up.T.contiguous()
    yield f"{name}.{DOWN}.weight", mlp.down.weight.to(torch.bfloat16).T.contiguous()
