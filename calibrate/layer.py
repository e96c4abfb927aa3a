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
from llama4q.model import DecoderLayer, Linear, Mlp, Routing, attention, feed_forward_input, route
from llama4q.packing import pack
from llama4q.recipe import Method, Recipe, Solver
from llama4q.schemes import (
    Kind,
    QuantizedWeight,
    Scheme,
    fake_float8_tokens,
    round_to_nearest,
)
from llama4q.weights import DOWN, GATE, UP, Component

from .gptq import choose_scales, factorize, solve
from .hessian import Hessian, measure, shrink

POOL_ROWS = 2  # times the inputs: rows of other tokens that a blend is estimated from
ERROR_ROWS = 1024  # rows that the reported error is measured on

Rows = list[torch.Tensor]  # one [N, I] a batch


@dataclass(frozen=True)
class GroupReport:
    """What became of one weight, or of a gate and up pair that share their Hessian."""

    name: str
    scheme: str
    tokens: int  # rows that its Hessian was measured on
    error: float | None  # |X (W - Q)|^2 / |X W|^2 on calibration rows; None without any
    shrinkage: float  # share of the pooled Hessian
    damping: float  # of the mean diagonal; 0 where nothing was factored
    seconds: float


@dataclass(frozen=True)
class Rescue:
    """A matrix that did not go the usual way, and what was done instead."""

    tensor: str
    kind: str  # "damping", "fallback" or "no tokens"
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

    def quantize(self, layer: DecoderLayer, batches: Rows) -> LayerResult:
        """Find the codes of `layer` for hidden states `[S, T, D]` that enter it, in batches."""
        mixed = [attention(self.config, layer, hidden) for hidden in batches]
        output = self._o_proj(layer.o, mixed)
        inputs = [
            feed_forward_input(self.config, layer, hidden + output(rows))
            for hidden, rows in zip(batches, mixed, strict=True)
        ]
        del mixed
        feed_forward = layer.feed_forward
        name = f"{self.prefix}feed_forward"
        if isinstance(feed_forward, Mlp):
            self._mlp(name, feed_forward, inputs, Component.DENSE)
            return self.result
        self._mlp(f"{name}.shared_expert", feed_forward.shared, inputs, Component.SHARED_EXPERT)
        routings = [route(feed_forward, rows) for rows in inputs]
        scaled = [rows * routing.score for rows, routing in zip(inputs, routings, strict=True)]
        pool = self._pool(scaled)
        for number, expert in enumerate(feed_forward.experts):
            mine = [rows[where] for rows, where in _routed(scaled, routings, number)]
            self.result.expert_tokens.append(sum(len(rows) for rows in mine))
            self._mlp(f"{name}.experts.{number}", expert, mine, Component.EXPERTS, scaled, pool)
        return self.result

    def _o_proj(self, linear: Linear, mixed: Rows) -> Linear:
        """Quantize the attention's output projection; returns it as an engine will apply it."""
        scheme = self.schemes[Component.O_PROJ]
        if not scheme.quantizes:
            return linear
        name = f"{self.prefix}self_attn.o_proj"
        found = self._weight(name, linear.weight, [rows.flatten(0, 1) for rows in mixed], scheme)
        self.result.tensors += pack(name, found)
        return as_served(found, linear.weight.dtype)

    def _pool(self, scaled: Rows) -> Hessian | None:
        """The moments of all tokens, which experts with few tokens are blended with."""
        scheme = self.schemes[Component.EXPERTS]
        if not (_uses_hessian(scheme, self.solver) and self.solver.shrinkage):
            return None
        return measure(scaled, self.config.hidden_size)

    def _mlp(
        self,
        name: str,
        mlp: Mlp,
        rows: Rows,
        component: Component,
        everyone: Rows | None = None,
        pool: Hessian | None = None,
    ) -> None:
        """Quantize gate and up together, then down on what the quantized pair makes of `rows`."""
        scheme = self.schemes[component]
        if not scheme.quantizes:
            if component is Component.EXPERTS:
                self.result.tensors += _unfused(name, mlp)
            return
        pair = self._weight(f"{name}.gate_up_proj", mlp.gate_up.weight, rows, scheme, pool)
        served = Mlp(as_served(pair, mlp.gate_up.weight.dtype), mlp.down)
        hidden = [served.hidden(batch) for batch in rows]
        down_pool = None
        if pool is not None and everyone is not None:
            down_pool = self._down_pool(served, everyone)
        down = self._weight(f"{name}.{DOWN}", mlp.down.weight, hidden, scheme, down_pool)
        gate, up = _halves(pair)
        self.result.tensors += [
            *pack(f"{name}.{GATE}", gate),
            *pack(f"{name}.{UP}", up),
            *pack(f"{name}.{DOWN}", down),
        ]

    def _down_pool(self, served: Mlp, everyone: Rows) -> Hessian:
        """Moments of down's input if a sample of all tokens went through this expert."""
        size = self.config.expert_size
        return measure((served.hidden(rows) for rows in _spaced(everyone, POOL_ROWS * size)), size)

    def _weight(
        self,
        name: str,
        weight: torch.Tensor,
        batches: Rows,
        scheme: Scheme,
        pool: Hessian | None = None,
    ) -> QuantizedWeight:
        """Codes of one in-major weight for its input rows, with a report of how they were found."""
        began = time.perf_counter()
        exact = weight.float()
        rows = torch.cat(batches)
        shrinkage = damping = 0.0
        if _uses_hessian(scheme, self.solver):
            hessian = measure([rows], len(weight))
            if pool is not None:
                hessian = shrink(hessian, pool, rows)
            found, damping = self._solve(name, exact, hessian, scheme)
            shrinkage = hessian.shrinkage
        else:
            found = round_to_nearest(exact, scheme)
        report = GroupReport(
            name=name,
            scheme=scheme.name,
            tokens=len(rows),
            error=output_error(exact, found.dequantize(), rows),
            shrinkage=shrinkage,
            damping=damping,
            seconds=time.perf_counter() - began,
        )
        self.result.groups.append(report)
        self.report(report)
        return found

    def _solve(
        self, name: str, weight: torch.Tensor, hessian: Hessian, scheme: Scheme
    ) -> tuple[QuantizedWeight, float]:
        if hessian.tokens == 0 and hessian.shrinkage:
            self._rescue(name, "no tokens", "no calibration token reached it; pooled Hessian used")
        factor = factorize(hessian.matrix, self.solver.damping, self.solver.act_order)
        if factor is None:
            self._rescue(name, "fallback", "its Hessian does not factor; rounded to nearest")
            return round_to_nearest(weight, scheme), 0.0
        if factor.attempts > 1:
            self._rescue(name, "damping", f"raised to {factor.damping:g} before it factored")
        scales = choose_scales(weight, factor.importance, scheme, self.solver.scale_points)
        return solve(weight, factor, scales, scheme), factor.damping

    def _rescue(self, name: str, kind: str, detail: str) -> None:
        self.result.rescues.append(Rescue(name, kind, detail))


def _uses_hessian(scheme: Scheme, solver: Solver) -> bool:
    return scheme.kind is Kind.INT and solver.method is Method.GPTQ


def as_served(found: QuantizedWeight, dtype: torch.dtype) -> Linear:
    """A quantized weight as an engine applies it, in the run's `dtype`."""
    activations = fake_float8_tokens if found.scheme.kind is Kind.FLOAT8 else None
    return Linear(found.dequantize().to(dtype), activations)


def output_error(weight: torch.Tensor, found: torch.Tensor, rows: torch.Tensor) -> float | None:
    """The share of the output's energy that quantizing loses, on at most ERROR_ROWS rows."""
    if not len(rows):
        return None
    sample = torch.cat(_spaced([rows], ERROR_ROWS)).float()
    total = (sample @ weight).square().sum()
    return float((sample @ (weight - found)).square().sum() / total) if total > 0 else 0.0


def _routed(
    scaled: Rows, routings: list[Routing], number: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for rows, routing in zip(scaled, routings, strict=True):
        yield rows, routing.rows(number)


def _spaced(batches: Rows, count: int) -> Rows:
    """About `count` rows, evenly spaced over all batches; all of them when there are fewer."""
    stride = max(1, sum(len(rows) for rows in batches) // count)
    return [rows[::stride] for rows in batches]


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
