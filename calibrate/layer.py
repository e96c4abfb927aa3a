"""The codes of one decoder layer, from the hidden states that reach it.

The inputs are those that the already quantized part of the model produces. An expert sees only the
rows routed to it, scaled as the model scales them; gate and up share one factor. Knows nothing of
files, other layers or the original stream.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from llama4q import bnb
from llama4q.bnb import BnbWeight
from llama4q.config import ModelConfig
from llama4q.model import DecoderLayer, Linear, Mlp, Moe, attention, feed_forward_input, route
from llama4q.packing import StoredWeight, pack
from llama4q.recipe import Method, Recipe
from llama4q.schemes import (
    QuantizedWeight,
    Scheme,
    round_to_nearest,
)
from llama4q.stream import TOKENS_AT_ONCE
from llama4q.weights import DOWN, GATE, UP, Component, served_inputs

from .gptq import choose_scales, factorize, solve
from .hessian import Hessian, damping_for, joined, measure, shrink
from .judge import error, held_out, parts_of
from .outputs import solve_in_turn
from .routing import output_metric
from .target import HELD_OUT, Moments, Pair, corrected
from .weighting import hidden_and_weights

POOL_ROWS = 2  # times the inputs: rows of other tokens that a blend is estimated from


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


@dataclass
class LayerResult:
    """The tensors of a layer as they go to disk, and what is to be said of them."""

    tensors: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    groups: list[GroupReport] = field(default_factory=list)
    rescues: list[Rescue] = field(default_factory=list)
    expert_tokens: list[int] = field(default_factory=list)


class LayerQuantizer:
    """Quantizes one layer by a recipe; `report` is called for each group as it is done.

    `router_views` is what the routers of all layers see of the stream (routing.py).
    """

    def __init__(
        self,
        config: ModelConfig,
        recipe: Recipe,
        index: int,
        router_views: Mapping[int, torch.Tensor],
        report: Callable[[GroupReport], None],
    ) -> None:
        self.config = config
        self.solver = recipe.solver
        self.prefix = config.layer_prefix(index)
        self.schemes = {
            component: recipe.scheme(component, index, config.num_layers) for component in Component
        }
        self.router_views = router_views
        self.metric = self._metric(index)
        self.report = report
        self.result = LayerResult()

    def quantize(
        self, layer: DecoderLayer, served: list[torch.Tensor], plain: list[torch.Tensor]
    ) -> LayerResult:
        """Find the codes of `layer`, given the hidden states `[S, T, D]` that enter it.

        `served` are those of the quantized model, `plain` those of the original, in batches. Both
        are moved, in place of the lists, through the attention as an engine will apply it.
        """
        parts = parts_of([(batch.shape[0], batch.shape[1]) for batch in served])
        self._attend(layer, served, plain, parts)
        entering, entering_plain = (
            torch.cat([feed_forward_input(self.config, layer, batch) for batch in stream])
            for stream in (served, plain)
        )
        inputs = Pair(entering, entering_plain, None, parts)
        lacking = torch.cat([(x - y).flatten(0, 1) for x, y in zip(plain, served, strict=True)])
        name = f"{self.prefix}feed_forward"
        if isinstance(layer.feed_forward, Mlp):
            self._mlp(name, layer.feed_forward, inputs, lacking, Component.DENSE)
        else:
            self._moe(name, layer.feed_forward, inputs, lacking)
        return self.result

    def _attend(
        self,
        layer: DecoderLayer,
        served: list[torch.Tensor],
        plain: list[torch.Tensor],
        parts: torch.Tensor,
    ) -> None:
        """Both streams through the attention, whose output projection is quantized on the way."""
        output = layer.o
        scheme = self.schemes[Component.O_PROJ]
        if scheme.quantizes:
            mixed, mixed_plain, hidden, hidden_plain = (
                torch.cat([batch.flatten(0, 1) for batch in stream])
                for stream in (self._mixed(layer, served), self._mixed(layer, plain), served, plain)
            )
            pair = Pair(mixed, mixed_plain, hidden_plain.sub_(hidden), parts)
            name = f"{self.prefix}self_attn.o_proj"
            # The layer's own router sees what the attention adds, too.
            found = self._weight(name, layer.o.weight, pair, scheme, self._metric(layer.index - 1))
            self.result.tensors += pack(name, found)
            output = as_served(found, layer.o.weight.dtype)
        # Batch by batch and in the order of the model, so that a resumed run gets the same bits.
        for stream, linear in ((served, output), (plain, layer.o)):
            for number, mixed in enumerate(self._mixed(layer, stream)):
                stream[number] = stream[number] + linear(mixed)

    def _mixed(self, layer: DecoderLayer, stream: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        return (attention(self.config, layer, batch) for batch in stream)

    def _metric(self, index: int) -> torch.Tensor | None:
        """How errors in the stream count that routers after layer `index` see."""
        return output_metric(self.router_views, index, self.solver.routing_weight)

    def _moe(self, name: str, moe: Moe, inputs: Pair, lacking: torch.Tensor) -> None:
        """The shared expert, then the routed ones on what the served stream sends them."""
        shared = self._mlp(
            f"{name}.shared_expert", moe.shared, inputs, lacking, Component.SHARED_EXPERT
        )
        lacking.add_(in_parts(moe.shared, inputs.original))
        lacking.sub_(in_parts(shared, inputs.served))
        served, plain = route(moe, inputs.served), route(moe, inputs.original)
        # A token that the original sent to another expert has no original input to this one.
        same = (served.expert == plain.expert)[:, None]
        lacking.mul_(same)
        # In place: as large as a whole stream each, and unscaled they are not needed any more.
        inputs.served.mul_(served.score)
        inputs.original.mul_(plain.score)
        torch.where(same, inputs.original, inputs.served, out=inputs.original)
        others = self._others(inputs)
        for number, expert in enumerate(moe.experts):
            where = served.rows(number)
            mine = inputs.rows(where)
            self.result.expert_tokens.append(len(mine.part))
            self._mlp(
                f"{name}.experts.{number}",
                expert,
                mine,
                lacking[where],
                Component.EXPERTS,
                others,
            )

    def _others(self, scaled: Pair) -> _Others | None:
        """What all tokens say, for experts that saw too few of their own."""
        scheme = self.schemes[Component.EXPERTS]
        if not (scheme.calibrates and self.solver.method is Method.GPTQ):
            return None
        seen = torch.nonzero(scaled.part != HELD_OUT).squeeze(1)
        sample = scaled.served[_spaced(seen, POOL_ROWS * self.config.expert_size)]
        pool = None
        if self.solver.shrinkage:
            pool = measure(scaled.seen(), self.config.hidden_size)
            pool = shrink(pool, pool.alone(), scaled.seen())
        return _Others(sample, pool, held_out(scaled))

    def _mlp(
        self,
        name: str,
        mlp: Mlp,
        rows: Pair,
        lacking: torch.Tensor,
        component: Component,
        others: _Others | None = None,
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
        original, weights = hidden_and_weights(mlp, rows.original)
        if self.solver.weighting:
            rows = dataclasses.replace(rows, weights=weights)
        pair = self._weight(
            f"{name}.gate_up_proj", mlp.gate_up.weight, rows, scheme, None, others, pieces=2
        )
        served = Mlp(as_served(pair, dtype), mlp.down)
        hidden = Pair(
            in_parts(served.hidden, rows.served),
            original,
            lacking,
            rows.part,
        )
        through = None if others is None else others.through(mlp, served)
        down = self._weight(f"{name}.{DOWN}", mlp.down.weight, hidden, scheme, self.metric, through)
        gate, up = _halves(pair)
        self.result.tensors += [
            *pack(f"{name}.{GATE}", gate),
            *pack(f"{name}.{UP}", up),
            *pack(f"{name}.{DOWN}", down),
        ]
        return Mlp(served.gate_up, as_served(down, dtype))

    def _weight(
        self,
        name: str,
        weight: torch.Tensor,
        pair: Pair,
        scheme: Scheme,
        metric: torch.Tensor | None,
        others: _Others | None = None,
        pieces: int = 1,
    ) -> StoredWeight:
        """Codes of one in-major weight for its input rows, with a report of how they were found.

        `pieces` linears lie in it beside each other, with as many outputs each. `metric` weighs the
        errors of its outputs; None: all alike.
        """
        began = time.perf_counter()
        exact = weight.float()
        solved = _Solved(_rounded(exact, scheme, pieces), exact)
        stand_in = None if others is None else others.held
        wrong = rounding = error(exact, exact, solved.found, pair, stand_in)
        if self.solver.method is Method.GPTQ and scheme.calibrates:
            candidate = self._solve(name, exact, pair, others, scheme, metric)
            wrong = error(exact, candidate.aim, candidate.found, pair, stand_in)
            if wrong is not None and rounding is not None and wrong > rounding:
                self._rescue(name, "kept rounding", f"error {wrong:.2e} against {rounding:.2e}")
                wrong = rounding
            else:
                solved = candidate
        report = GroupReport(
            name=name,
            scheme=scheme.name,
            tokens=len(pair.part),
            error=wrong,
            rounding_error=rounding,
            shrinkage=solved.shrinkage,
            damping=solved.damping,
            correction=solved.correction,
            seconds=time.perf_counter() - began,
        )
        self.result.groups.append(report)
        self.report(report)
        return solved.found

    def _solve(
        self,
        name: str,
        weight: torch.Tensor,
        pair: Pair,
        others: _Others | None,
        scheme: Scheme,
        metric: torch.Tensor | None,
    ) -> _Solved:
        """GPTQ on the corrected weight; whatever does not go the usual way is named."""
        halves = None
        if self.solver.correction:
            halves = Moments.of(weight, pair, 0), Moments.of(weight, pair, 1)
            hessian = joined(halves[0].hessian, halves[1].hessian)
        else:
            hessian = measure(pair.seen(), len(weight))
        pool = others.pool if others is not None and others.pool is not None else hessian.alone()
        if self.solver.shrinkage:
            hessian = shrink(hessian, pool, pair.seen())
            if hessian.tokens == 0:
                self._rescue(name, "no tokens", "no calibration token reached it: pooled Hessian")
        damping = damping_for(hessian, self.solver.damping, self.solver.token_damping)
        factor = factorize(hessian.matrix, damping, self.solver.act_order)
        if factor is None:
            self._rescue(name, "fallback", "its Hessian does not factor; rounded to nearest")
            return _Solved(round_to_nearest(weight, scheme), weight)
        if factor.attempts > 1:
            self._rescue(name, "damping", f"raised to {factor.damping:g} before it factored")
        share = hessian.shrinkage

        def blended(own: Hessian) -> Hessian:
            return own.blended(pool, share) if share else own

        correction: float | None = 0.0
        if halves is not None:
            weight, correction = corrected(weight, halves, factor, blended)
        if correction is None and hessian.tokens:
            self._rescue(name, "uncorrected", "half of the calibration sequences say nothing")

        def codes(aim: torch.Tensor) -> QuantizedWeight:
            scales = choose_scales(
                aim, factor.importance, scheme, self.solver.scale_points, self.solver.signed_scales
            )
            return solve(aim, factor, scales, scheme, self.solver.beams)

        found = codes(weight) if metric is None else solve_in_turn(weight, metric, codes)
        return _Solved(found, weight, share, factor.damping, correction or 0.0)

    def _rescue(self, name: str, kind: str, detail: str) -> None:
        self.result.rescues.append(Rescue(name, kind, detail))


@dataclass(frozen=True)
class _Others:
    """What the tokens of all experts say of one that saw few."""

    sample: torch.Tensor  # [N, D] some that moments may see, as experts get them
    pool: Hessian | None  # None: no shrinkage
    held: Pair  # some that no moment saw

    def through(self, original: Mlp, served: Mlp) -> _Others:
        """The same for down, if all of them went through one expert."""
        pool = None
        if self.pool is not None:
            rows = served.hidden(self.sample)
            pool = measure([rows], rows.shape[1])
            pool = shrink(pool, pool.alone(), [rows])
        held = dataclasses.replace(
            self.held,
            served=served.hidden(self.held.served),
            original=original.hidden(self.held.original),
        )
        return _Others(self.sample, pool, held)


@dataclass(frozen=True)
class _Solved:
    """The codes of a weight, the weight they aim at, and how they were found."""

    found: StoredWeight
    aim: torch.Tensor
    shrinkage: float = 0.0
    damping: float = 0.0
    correction: float = 0.0


def _rounded(weight: torch.Tensor, scheme: Scheme, pieces: int) -> StoredWeight:
    """Plain rounding. bitsandbytes keeps statistics of a whole matrix, so of each linear."""
    if scheme.bitsandbytes:
        return bnb.quantize(weight, scheme, pieces)
    return round_to_nearest(weight, scheme)


def as_served(found: StoredWeight, dtype: torch.dtype) -> Linear:
    """A quantized weight as an engine applies it, in the run's `dtype`."""
    return Linear(found.dequantize().to(dtype), served_inputs(found.scheme))


def in_parts(function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """`function` of rows `[N, I]`, TOKENS_AT_ONCE of them at a time."""
    return torch.cat([function(part) for part in rows.split(TOKENS_AT_ONCE)])


def _spaced(rows: torch.Tensor, count: int) -> torch.Tensor:
    """About `count` rows, evenly spaced; all of them when there are fewer."""
    return rows[:: max(1, len(rows) // count)]


def _halves(pair: StoredWeight) -> tuple[StoredWeight, StoredWeight]:
    """Gate and up of a quantized pair `[D, 2F]`."""
    if isinstance(pair, BnbWeight):
        return pair.halves()
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
