"""One decoder layer, quantized while both streams of hidden states pass it.

The inputs are those that the already quantized part of the model produces. An expert sees only the
rows routed to it, scaled as the model scales them; gate and up share one factor. A layer is done in
parts, each of which may have been written by an earlier run: then its codes are taken and not found
again, and the streams get the same bits. Of several ranks each finds the codes of some experts, and
the first one those of what all tokens take. Knows nothing of files or other layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from llama4q.bnb import BnbWeight
from llama4q.config import ModelConfig
from llama4q.float8_cache import Float8Cache, covering
from llama4q.hidden import Store
from llama4q.kv_cache import KVDtype
from llama4q.model import DecoderLayer, Linear, Mlp, Moe, attention, largest_keys_values
from llama4q.packing import StoredWeight, pack
from llama4q.prefetch import prefetched
from llama4q.recipe import Recipe
from llama4q.schemes import QuantizedWeight, Scheme
from llama4q.stream import TOKENS_AT_ONCE, attend
from llama4q.weights import DOWN, GATE, UP, Component, served_inputs

from .codes import Coder, GroupReport, Others, Rescue, Task
from .exchange import Wave, waves
from .hessian import measure, shrink
from .outputs import Turn, turns
from .routing import output_metric
from .streams import Both, Streams, Tokens
from .target import Pair
from .weighting import output_energy, token_weights

POOL_ROWS = 1  # times the inputs: rows of other tokens that a blend is estimated from
EXPERTS_AT_ONCE = 8  # in a part: what a killed run loses at most


@dataclass
class Part:
    """The tensors of a part of a layer as they go to disk, and what is to be said of them."""

    tensors: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    groups: list[GroupReport] = field(default_factory=list)
    rescues: list[Rescue] = field(default_factory=list)


def joined(parts: Iterable[Part]) -> Part:
    """All of them as one."""
    every = Part()
    for part in parts:
        every.tensors += part.tensors
        every.groups += part.groups
        every.rescues += part.rescues
    return every


class Written(Protocol):
    """Reads what earlier runs have written of a layer."""

    def cache(self, index: int) -> Float8Cache | None: ...
    def linear(self, name: str, inputs: int, outputs: int) -> Linear: ...
    def mlp(self, prefix: str, size: int) -> Mlp: ...
    def expert(self, index: int, number: int) -> Mlp: ...


class Parts(Protocol):
    """Where the parts of a layer go, by number: the attention and what all tokens take is first."""

    def written(self, number: int) -> Written | None: ...
    def write(self, number: int, part: Part) -> None: ...


def part_count(config: ModelConfig, index: int) -> int:
    """In how many parts layer `index` is done."""
    experts = config.num_experts if index in config.moe_layers else 0
    return 1 + -(-experts // EXPERTS_AT_ONCE)


class LayerQuantizer:
    """Quantizes one layer by a recipe; `report` is called for each group as it is done.

    `router_views` is what the routers of all layers see of the stream (routing.py).
    """

    def __init__(
        self,
        config: ModelConfig,
        recipe: Recipe,
        layer: DecoderLayer,
        router_views: Mapping[int, torch.Tensor],
        report: Callable[[GroupReport], None],
        rescue: Callable[[Rescue], None],
    ) -> None:
        self.config = config
        self.layer = layer
        self.kv_cache = recipe.kv_cache
        self.dtype = layer.post_norm.dtype
        self.solver = recipe.solver
        self.prefix = config.layer_prefix(layer.index)
        self.schemes = {
            component: recipe.scheme(component, layer.index, config.num_layers)
            for component in Component
        }
        self.router_views = router_views
        self.order = self._order(layer.index)  # once for all of the layer's experts
        self.cache: Float8Cache | None = None  # known when the layer is done
        self.part = Part()
        self.coder = Coder(recipe.solver, self._report, self._rescue)
        self.progress = report, rescue

    def _report(self, group: GroupReport) -> None:
        self.part.groups.append(group)
        self.progress[0](group)

    def _rescue(self, rescue: Rescue) -> None:
        self.part.rescues.append(rescue)
        self.progress[1](rescue)

    def quantize(self, streams: Streams, parts: Parts) -> list[int]:
        """Find the codes, part by part, and move both streams through the layer as written.

        Returns how many tokens reached each routed expert.
        """
        written = parts.written(0)
        self._attend(streams, written)
        passing = Both(self.config, self.layer, streams)
        network = self.layer.feed_forward
        name = f"{self.prefix}feed_forward"
        counts: list[int] = []
        if isinstance(network, Mlp):
            size = self.config.dense_size
            found = None if written is None else written.mlp(name, size)
            self._mlp(name, network, Component.DENSE, passing.all(), found)
            self._done(parts, 0, written)
        else:
            size = self.config.expert_size
            shared = f"{name}.shared_expert"
            found = None if written is None else written.mlp(shared, size)
            self._mlp(shared, network.shared, Component.SHARED_EXPERT, passing.all(), found)
            self._done(parts, 0, written)
            counts = self._experts(f"{name}.experts", network, passing, parts)
        passing.finish()
        return counts

    def _done(self, parts: Parts, number: int, written: Written | None) -> None:
        if written is None:
            parts.write(number, self.part)
        self.part = Part()

    def _experts(self, name: str, moe: Moe, passing: Both, parts: Parts) -> list[int]:
        """Part after part, and of each part wave after wave."""
        every = range(len(moe.experts))
        counts = passing.counts(len(every))
        planned = [
            waves(every[at : at + EXPERTS_AT_ONCE], counts, passing.ranks)
            for at in every[::EXPERTS_AT_ONCE]
        ]
        rank = passing.ranks.number
        own = [wave[rank] for part in planned for wave in part if rank < len(wave)]
        networks = prefetched(moe.experts.__getitem__, own)
        others = None
        for number, waves_of_part in enumerate(planned, start=1):
            written = parts.written(number)
            if written is None and others is None:
                others = self._others(passing)
            done: dict[int, Part] = {}
            for experts in waves_of_part:
                done |= self._wave(name, experts, networks, passing, written, others)
            self.part = joined(done[expert] for expert in sorted(done))
            self._done(parts, number, written)
        return counts

    def _wave(
        self,
        name: str,
        experts: list[int],
        networks: Iterator[Mlp],
        passing: Both,
        written: Written | None,
        others: Others | None,
    ) -> dict[int, Part]:
        """Experts that are handled at the same time, one by each rank; on the first rank what is to
        be written of them."""
        wave = Wave(passing, experts, written is None)
        self.part = Part()
        if wave.expert is not None:
            before = None
            if written is not None:
                before = written.expert(self.layer.index, wave.expert)
            tokens, label = wave.tokens(), f"{name}.{wave.expert}"
            self._mlp(label, next(networks), Component.EXPERTS, tokens, before, others)
        wave.end()
        own = [] if wave.expert is None else [self.part]
        found = list(passing.ranks.to_first(own))
        for part in found[1:]:  # of the others, whose progress nobody has seen
            self._tell(part)
        return dict(zip(experts, found, strict=False))  # none but on the first rank

    def _tell(self, part: Part) -> None:
        report, rescue = self.progress
        for group in part.groups:
            report(group)
        for one in part.rescues:
            rescue(one)

    def _attend(self, streams: Streams, written: Written | None) -> None:
        """Both streams through the attention, whose output projection is quantized on the way, and
        whose keys and values get their scales."""
        output = self.layer.o
        name = f"{self.prefix}self_attn.o_proj"
        scheme = self.schemes[Component.O_PROJ]
        served, plain = streams.served, streams.plain
        self.cache = self._cache(streams, written)
        mixed = self._mixed(dataclasses.replace(self.layer, cache=self.cache), served)
        mixed_plain = self._mixed(self.layer, plain)
        if written is not None:
            output = written.linear(name, *output.weight.shape)
        elif scheme.quantizes:
            kept = self._kept(mixed, served)
            kept_plain = self._kept(mixed_plain, plain)
            batches = served.slices()
            parts = streams.dealt.parts[streams.dealt.own]

            def batch(number: int) -> Pair:
                where = batches[number]
                lacking = plain.rows(where).float() - served.rows(where).float()
                return Pair(kept.rows(where), kept_plain.rows(where), lacking, parts[where])

            # The layer's own router sees what the attention adds, too.
            order = self._order(self.layer.index - 1)
            task = Task(name, output.weight, scheme, order=order, lacking=True)
            found = self.coder.codes(task, batch, streams.dealt.share(batches), None)
            self.part.tensors += pack(name, found)
            output = as_served(found, output.weight.dtype)
            mixed, mixed_plain = iter(kept), iter(kept_plain)
        attend(served, mixed, output)
        attend(plain, mixed_plain, self.layer.o)

    def _cache(self, streams: Streams, written: Written | None) -> Float8Cache | None:
        """The scales of keys and values at which none of any rank's tokens saturates."""
        if self.kv_cache is not KVDtype.FP8:
            return None
        if written is not None:
            return written.cache(self.layer.index)
        own = [largest_keys_values(self.config, self.layer, batch) for batch in streams.served]
        every = streams.dealt.ranks.everyone(own)
        cache = covering(pair for pairs in every for pair in pairs)
        self.part.tensors += cache.tensors(f"{self.prefix}self_attn")
        return cache

    def _mixed(self, layer: DecoderLayer, stream: Store) -> Iterator[torch.Tensor]:
        return (attention(self.config, layer, batch) for batch in stream)

    def _kept(self, mixed: Iterator[torch.Tensor], stream: Store) -> Store:
        """The attention's outputs for all of a stream, for two passes over them."""
        width = self.config.num_heads * self.config.head_dim
        kept = stream.spool.store([(*shape[:-1], width) for shape in stream.shapes], self.dtype)
        for number, batch in enumerate(mixed):
            kept[number] = batch
        return kept

    def _order(self, index: int) -> list[Turn] | None:
        """How errors in the stream count that routers after layer `index` see."""
        metric = output_metric(self.router_views, index, self.solver.routing_weight)
        return None if metric is None else turns(metric)

    def _others(self, passing: Both) -> Others | None:
        """What all tokens say, for experts that saw too few of their own."""
        if not self.coder.solves(self.schemes[Component.EXPERTS]):
            return None
        sample = passing.sample(POOL_ROWS * self.config.expert_size)
        pool = None
        if self.solver.shrinkage:
            pool = passing.pool()
            pool = shrink(pool, pool.alone(), [sample])
        return Others(sample, pool, passing.held_out())

    def _mlp(
        self,
        name: str,
        mlp: Mlp,
        component: Component,
        tokens: Tokens,
        written: Mlp | None,
        others: Others | None = None,
    ) -> None:
        """Quantize gate and up together, then down on what the quantized pair makes of the tokens,
        and add what both models make of them. Only down can make up for what the residual stream
        lacks.
        """
        scheme = self.schemes[component]
        if written is None and scheme.quantizes:
            self._solved(name, mlp, scheme, tokens, others)
            tokens.add_strays(mlp)
            return
        if written is None and component is Component.EXPERTS:
            self.part.tensors += _unfused(name, mlp)
        served = written or mlp
        for piece in range(len(tokens)):
            pair = tokens.inputs(piece)
            tokens.add(piece, served(pair.served), mlp(pair.original))
        tokens.add_strays(mlp)

    def _solved(
        self, name: str, mlp: Mlp, scheme: Scheme, tokens: Tokens, others: Others | None
    ) -> None:
        hidden_plain, hidden = (tokens.store(mlp.down.weight.shape[0]) for _ in range(2))

        energy = output_energy(mlp)

        def before_gate(piece: int) -> Pair:
            pair = tokens.inputs(piece)
            gate_up = mlp.gate_up(pair.original)
            hidden_plain[piece] = mlp.activated(gate_up)
            weights = token_weights(gate_up, energy) if self.solver.weighting else None
            return dataclasses.replace(pair, weights=weights)

        task = Task(f"{name}.gate_up_proj", mlp.gate_up.weight, scheme, linears=2)
        pair = self.coder.codes(task, before_gate, tokens.share, others)
        half = Mlp(as_served(pair, self.dtype), mlp.down)

        def before_down(piece: int) -> Pair:
            inputs = tokens.inputs(piece)
            hidden[piece] = half.hidden(inputs.served)
            return Pair(hidden[piece], hidden_plain[piece], tokens.lacking(piece), inputs.part)

        task = Task(f"{name}.{DOWN}", mlp.down.weight, scheme, order=self.order, lacking=True)
        through = None if others is None else _through(others, mlp, half)
        down = self.coder.codes(task, before_down, tokens.share, through)
        last = as_served(down, self.dtype)
        for piece in range(len(tokens)):
            tokens.add(piece, last(hidden[piece]), mlp.down(hidden_plain[piece]))
        gate, up = _halves(pair)
        self.part.tensors += [
            *pack(f"{name}.{GATE}", gate),
            *pack(f"{name}.{UP}", up),
            *pack(f"{name}.{DOWN}", down),
        ]


def _through(others: Others, original: Mlp, served: Mlp) -> Others:
    """What all tokens would say of down, if all of them went through one expert."""
    pool = None
    if others.pool is not None:
        rows = torch.cat([served.hidden(part) for part in others.sample.split(TOKENS_AT_ONCE)])
        pool = measure([rows], rows.shape[1], rows.device)
        pool = shrink(pool, pool.alone(), [rows])
    held = dataclasses.replace(
        others.held,
        served=served.hidden(others.held.served),
        original=original.hidden(others.held.original),
    )
    return Others(others.sample, pool, held)


def as_served(found: StoredWeight, dtype: torch.dtype) -> Linear:
    """A quantized weight as an engine applies it, in the run's `dtype`."""
    return Linear(found.dequantize().to(dtype), served_inputs(found.scheme))


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
    down = mlp.down.weight.to(torch.bfloat16)
    for part, weight in ((GATE, gate), (UP, up), (DOWN, down)):
        yield f"{name}.{part}.weight", weight.T.contiguous().cpu()
