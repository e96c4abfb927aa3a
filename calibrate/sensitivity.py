"""What each part of each layer loses in each scheme, from one pass over the original model.

Measured on a few tokens, with weights that are rounded to nearest: how far a part's output is off,
for every candidate, which is tr(dW H dW^T) of its weights together, without the Hessian; what such
an error does in the end, by copies of the hidden states that take the error of the coarsest
candidate in one part and go on through the original's later layers; and what the whole model loses
in each candidate, by streams through rounded layers. Knows nothing of bytes, budgets or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from llama4q.config import ModelConfig
from llama4q.errors import UserError
from llama4q.hidden import Spool, Store
from llama4q.kept import Kept, Reached
from llama4q.model import DecoderLayer, Head, Linear, Mlp, Moe, attention, logits
from llama4q.prefetch import prefetched
from llama4q.schemes import Scheme, round_to_nearest
from llama4q.stream import POSITIONS_AT_ONCE, Passing, attend, check_tokens
from llama4q.weights import Component, LayerReader, served_inputs

ROUNDING = 4.0  # streams that pass a layer while one candidate rounds it


@dataclass(frozen=True)
class PartLoss:
    """One part of one layer: by scheme the error of its output as a share of the output's energy,
    and the divergence of the predictions, in nats a token, that the coarsest one's makes alone."""

    layer: int
    component: Component
    divergence: float
    errors: Mapping[str, float]


@dataclass(frozen=True)
class Sensitivity:
    """All parts; `uniform` is the divergence of the whole model rounded to one scheme, the coarsest
    first."""

    parts: tuple[PartLoss, ...]
    uniform: Mapping[str, float]

    def shares(self, part: PartLoss) -> dict[str, float]:
        """A part's error in each scheme, as a share of the error of the coarsest model: those of
        all parts add up, as errors of different weights have nothing to do with each other."""
        total = sum(one.divergence for one in self.parts)
        share = part.divergence / total
        return {name: share * self._ratio(part, name) for name in part.errors}

    def divergence(self, error: float) -> float:
        """Nats a token that a model loses whose parts have shares of `error` together."""
        return float(self.uniform[self.coarsest] * error**self.power)

    @property
    def coarsest(self) -> str:
        return next(iter(self.uniform))

    @property
    def power(self) -> float:
        """Of the error, with which the divergence grows, by least squares over uniform models.

        It would be 1 if predictions were smooth, but a small error already sends some tokens to
        another expert; how many goes with its square root.
        """
        points = []
        for name, divergence in self.uniform.items():
            error = sum(self.shares(part)[name] for part in self.parts)
            if name != self.coarsest and error > 0 and divergence > 0:  # else below all noise
                points.append((math.log(error), math.log(divergence / self.uniform[self.coarsest])))
        if not points:  # a single candidate: nothing is ranked by it
            return 1.0
        return sum(x * y for x, y in points) / sum(x * x for x, _ in points)

    def _ratio(self, part: PartLoss, name: str) -> float:
        return part.errors[name] / (part.errors[self.coarsest] or 1.0)  # all 0 where one is

    def to_json(self) -> dict[str, Any]:
        parts = [{**asdict(part), "component": part.component.value} for part in self.parts]
        return {"parts": parts, "uniform": dict(self.uniform)}


def sensitivity_from_json(raw: Mapping[str, Any]) -> Sensitivity:
    """What `Sensitivity.to_json` has written."""
    parts = [
        PartLoss(**{**part, "component": Component(part["component"])}) for part in raw["parts"]
    ]
    return Sensitivity(tuple(parts), raw["uniform"])


def work(config: ModelConfig, candidates: Sequence[Scheme]) -> list[float]:
    """How long each layer takes, compared with the others: streams that pass it, and rounding."""
    found, begun = [], 1
    for index in range(config.num_layers):
        found.append(begun + ROUNDING * len(candidates))
        begun += parts(config, index)
    return found


def parts(config: ModelConfig, index: int) -> int:
    """How many a layer has: o_proj, and shared expert and experts or the dense feed-forward."""
    return 3 if index in config.moe_layers else 2


@torch.inference_mode()
def measure(
    reader: LayerReader,
    tokens: torch.Tensor,
    candidates: Sequence[Scheme],
    spool: Spool,
    layer_done: Callable[[int], None],
    kept: Kept | None = None,
) -> Sensitivity:
    """On tokens `[S, T]`, for all candidates, the coarsest first.

    `layer_done` is told the number of layers that are. With `kept` the pass goes on where an
    earlier start has come to.

    Raises UserError for a token that the vocabulary does not have, and for a model of which
    rounding changes nothing.
    """
    check_tokens(reader.config.vocab_size, tokens)
    probe = Probe(reader.config, candidates, reader.embedding()[tokens], spool)
    begun = probe.resume(kept) if kept is not None else 0
    layer_done(begun)
    for layer in prefetched(reader.layer, range(begun, reader.config.num_layers)):
        probe.layer(layer)
        if kept is not None:
            kept.keep(Reached(layer.index + 1, probe.found), probe.streams())
        layer_done(layer.index + 1)
    return probe.finish(reader.head())


class Probe:
    """Hidden states on their way: the original's, its copies with the error of one part each, and
    those of the model that is rounded to each candidate."""

    def __init__(
        self,
        config: ModelConfig,
        candidates: Sequence[Scheme],
        embedded: torch.Tensor,
        spool: Spool,
    ) -> None:
        """`embedded` is `[S, T, D]`."""
        self.config = config
        self.candidates = candidates
        copies = sum(parts(config, index) for index in range(config.num_layers))
        shape = tuple(embedded.shape)
        self.copies = spool.store([shape] * (1 + copies), embedded.dtype)  # the original is first
        self.copies[0] = embedded
        self.begun = 1
        self.rounded = {scheme: spool.store([shape], embedded.dtype) for scheme in candidates}
        for stream in self.rounded.values():
            stream[0] = embedded
        self.tokens = embedded.shape[0] * embedded.shape[1]
        self.found: list[tuple[int, str, dict[str, float]]] = []  # JSON types

    def streams(self) -> list[Store]:
        """All hidden states that there are by now."""
        return [self.copies.first(self.begun), *self.rounded.values()]

    def resume(self, kept: Kept) -> int:
        """Go on where an earlier start has come to: the number of layers behind it."""
        reached = kept.reached()
        if reached is None:
            return 0
        self.found = [tuple(one) for one in reached.found]
        self.begun += len(self.found)
        kept.take(self.streams())
        return reached.layers

    def layer(self, layer: DecoderLayer) -> None:
        """All of them through a layer; copies begin behind each of its parts."""
        self._attend(layer)
        passing = self._passing(layer, self.copies.first(self.begun))
        rounded = {scheme: self._passing(layer, stream) for scheme, stream in self.rounded.items()}
        differences: dict[Component, Differences] = {}
        for component, number, network in _networks(layer.feed_forward):
            passing.through(network, number)
            found = differences.setdefault(component, self._differences())
            rows = self._rows(passing, number)
            inputs = passing.inputs(rows) if number is None else passing.scaled(rows)
            found.begin(rows, _with(network, _exact)(inputs.float()))
            for scheme, stream in rounded.items():
                served = _with(network, partial(_rounded, scheme=scheme))
                found.add(scheme, served(inputs.float()))
                stream.through(_with(served, partial(_cast, dtype=passing.dtype)), number)
        passing.finish()
        for stream in rounded.values():
            stream.finish()
        for component, found in differences.items():
            self._begin(layer.index, component, found)

    def _passing(self, layer: DecoderLayer, hidden: Store) -> Passing:
        return Passing(self.config, layer, hidden)

    def _rows(self, passing: Passing, expert: int | None) -> torch.Tensor:
        """The original's tokens that a part sees."""
        if expert is None:
            return torch.arange(self.tokens)
        assert passing.routing is not None
        rows = passing.routing.rows(expert)
        return rows[rows < self.tokens]

    def _attend(self, layer: DecoderLayer) -> None:
        found = self._differences()
        inputs = self._mixed(layer, self.copies[0]).flatten(0, 1)
        found.begin(slice(None), _exact(layer.o)(inputs.float()))
        for scheme, stream in self.rounded.items():
            served = _rounded(layer.o, scheme)
            found.add(scheme, served(inputs.float()))
            self._through(layer, stream, _cast(served, inputs.dtype))
        self._through(layer, self.copies.first(self.begun), layer.o)
        self._begin(layer.index, Component.O_PROJ, found)

    def _through(self, layer: DecoderLayer, hidden: Store, output: Linear) -> None:
        attend(hidden, (self._mixed(layer, batch) for batch in hidden), output)

    def _mixed(self, layer: DecoderLayer, batch: torch.Tensor) -> torch.Tensor:
        return attention(self.config, layer, batch)

    def _differences(self) -> Differences:
        return Differences(self.candidates, self.copies[0].flatten(0, 1))

    def _begin(self, index: int, component: Component, found: Differences) -> None:
        """A copy of the original that is off by the coarsest candidate's error."""
        plain = self.copies[0]
        self.copies[self.begun] = plain + found.error.view_as(plain).to(plain.dtype)
        self.begun += 1
        self.found.append((index, component.value, found.errors()))

    def finish(self, head: Head) -> Sensitivity:
        """What came of each. Raises UserError when nothing came of any."""
        copies = [(self.copies, where.start) for where in self.copies.slices()[1:]]
        divergence = self._divergence(head, copies)
        parts = [
            PartLoss(index, Component(component), diverged, errors)
            for (index, component, errors), diverged in zip(self.found, divergence, strict=True)
        ]
        names = [scheme.name for scheme in self.rounded]
        uniform = self._divergence(head, [(stream, 0) for stream in self.rounded.values()])
        if not (uniform[0] > 0 and sum(part.divergence for part in parts) > 0):
            raise UserError(
                f"rounding to {names[0]} changes no prediction of the original, so nothing "
                f"tells precisions apart; its weights may be all 0: download it again, or name a "
                f"recipe instead of --fit"
            )
        return Sensitivity(tuple(parts), dict(zip(names, uniform, strict=True)))

    def _divergence(self, head: Head, others: Sequence[tuple[Store, int]]) -> list[float]:
        """KL(original || other), nats a token, of hidden states that begin at a row of a store."""
        totals = [0.0] * len(others)
        for start in range(0, self.tokens, POSITIONS_AT_ONCE):
            stop = min(start + POSITIONS_AT_ONCE, self.tokens)
            wanted = self._predicted(head, self.copies.rows(slice(start, stop)))
            for number, (store, first) in enumerate(others):
                found = self._predicted(head, store.rows(slice(first + start, first + stop)))
                lost = functional.kl_div(found, wanted, reduction="sum", log_target=True)
                totals[number] += float(lost)
        return [max(total, 0.0) / self.tokens for total in totals]  # F32 may end just below 0

    def _predicted(self, head: Head, hidden: torch.Tensor) -> torch.Tensor:
        return functional.log_softmax(logits(self.config, head, hidden).float(), dim=-1)


class Differences:
    """How far a part's output is off, in F32, for each candidate; the coarsest's error is kept."""

    def __init__(self, candidates: Sequence[Scheme], like: torch.Tensor) -> None:
        self.coarsest = candidates[0]
        self.error = torch.zeros_like(like, dtype=torch.float32)  # [N, D]
        self.squares = dict.fromkeys((scheme.name for scheme in candidates), 0.0)
        self.energy = 0.0

    def begin(self, rows: slice | torch.Tensor, wanted: torch.Tensor) -> None:
        """What the original's part makes of some rows, `[n, D]`."""
        self.rows, self.wanted = rows, wanted
        self.energy += float(wanted.square().sum())

    def add(self, scheme: Scheme, found: torch.Tensor) -> None:
        """What it makes of them in a scheme."""
        off = found - self.wanted
        self.squares[scheme.name] += float(off.square().sum())
        if scheme is self.coarsest:
            self.error[self.rows] += off

    def errors(self) -> dict[str, float]:
        """By scheme, as a share of the output's energy."""
        return {name: squares / (self.energy or 1.0) for name, squares in self.squares.items()}


def _networks(network: Mlp | Moe) -> Iterator[tuple[Component, int | None, Mlp]]:
    """The parts of a feed-forward; an expert with its number."""
    if isinstance(network, Mlp):
        yield Component.DENSE, None, network
        return
    yield Component.SHARED_EXPERT, None, network.shared
    for number, expert in enumerate(network.experts):
        yield Component.EXPERTS, number, expert


def _with(mlp: Mlp, change: Callable[[Linear], Linear]) -> Mlp:
    return Mlp(change(mlp.gate_up), change(mlp.down))


def _exact(linear: Linear) -> Linear:
    return Linear(linear.weight.float())


def _rounded(linear: Linear, scheme: Scheme) -> Linear:
    """As an engine applies it when its weights are rounded to nearest; in F32."""
    found = round_to_nearest(linear.weight, scheme)
    return Linear(found.dequantize(), served_inputs(scheme))


def _cast(linear: Linear, dtype: torch.dtype) -> Linear:
    return Linear(linear.weight.to(dtype), linear.quantize_input)
