"""What one run will take: memory, disk and time, told before a tensor is read.

The floor is what the arithmetic alone takes at the rates of this machine, while its disk works
beside it. Sizes come from work.py and footprint.py; what is done with a budget is decided here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from llama4q.checkpoint import Checkpoint
from llama4q.config import ModelConfig
from llama4q.device import HOST
from llama4q.errors import UserError
from llama4q.machine import Budget, Memory, Rates, best_rate
from llama4q.recipe import Recipe, Solver
from llama4q.schemes import Scheme

from .cholesky import factor_upper
from .eta import Eta, Planned
from .footprint import Piece, Place, Stage, stages, stores
from .gptq import BLOCK, choose_scales
from .lookahead import OUTPUTS_AT_ONCE, Rows, solve_block
from .work import (
    Amounts,
    Phase,
    Texts,
    Unit,
    ending_unit,
    factor,
    layer_bytes,
    layer_unit,
    outside_bytes,
)

FULL = 0.95  # of a budget: freed memory goes back to the system
KEPT = 0.5  # of what is held: 8.4 GB grew to 11.7 when nothing went back (Scout's shapes)
UNCOUNTED = 10**8  # bytes beyond a budget: gaps of the allocator; 17 to 65 MB in tests/budgets.py
NOMINAL = 1e12  # amounts a second: cancels out between units that are alike
# Times the floor that runs take, for elementwise work and products that are small: a layer of
# Scout's shapes on 128 x 2,048 tokens took 1.67 times its floor on two idle cores.
OVERHEAD = 1.7
SEARCHED = (8 * BLOCK, OUTPUTS_AT_ONCE)  # the piece of a weight on which both searches are timed
FACTORED = 4096  # rows; fewer take twice as long for what they are, 5,120 hardly less


@dataclass(frozen=True)
class Pace:
    """How fast this machine does what a plan counts."""

    speeds: Mapping[Phase, float]  # a second, in the unit of each phase
    read: float  # bytes a second
    write: float

    def seconds(self, unit: Unit) -> float:
        """The floor of a unit: the disk works while products are computed."""
        moved = unit.read / self.read + unit.written / self.write
        return max(sum(self.by_phase(unit.amounts).values()), moved)

    def by_phase(self, amounts: Amounts) -> dict[Phase, float]:
        return {phase: amounts[phase] / self.speeds[phase] for phase in Phase if amounts[phase]}


def pace(rates: Rates, searches: Mapping[Phase, float], dtype: torch.dtype) -> Pace:
    """`searches` are what measure_searches found, `dtype` is the one in which forwards are."""
    forward = rates.bf16 if dtype is torch.bfloat16 else rates.f32
    speeds = {
        Phase.ORIGINAL: forward,
        Phase.SERVED: forward,
        Phase.EVALUATION: forward,
        Phase.MOMENTS: rates.bf16_factors,
        Phase.POOL: rates.bf16_factors,
        Phase.CORRECTION: rates.rough,
        Phase.PRODUCTS: rates.rough,
        Phase.JUDGE: rates.rough,
        **searches,
    }
    return Pace(speeds, rates.read, rates.write)


def measure_searches(
    scheme: Scheme, solver: Solver, device: torch.device = HOST
) -> dict[Phase, float]:
    """What the solver's own loops reach on a small piece: factors in FLOP/s, weights times points
    and weights times beams a second."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SEARCHED, generator=generator).to(device)
    importance = (torch.rand(len(weight), generator=generator) + 0.5).to(device)
    scales = choose_scales(weight, importance, scheme, 1, signed=True).float()
    steps = scales.repeat_interleave(len(weight) // len(scales), dim=0)
    alone = torch.eye(BLOCK, device=device)
    block = Rows(weight[:BLOCK], steps[:BLOCK], importance[:BLOCK], alone)

    def search_scales() -> None:
        choose_scales(weight, importance, scheme, solver.scale_points, signed=True)

    def search_codes() -> None:
        solve_block(block.target, block, scheme, solver.beams)

    dominant = torch.rand(FACTORED, FACTORED, device=device)
    dominant.diagonal().add_(FACTORED)
    factored = torch.empty_like(dominant)
    points, beams = weight.numel() * solver.scale_points, block.target.numel() * solver.beams
    return {
        Phase.FACTOR: best_rate(
            lambda: factor_upper(factored.copy_(dominant)), factor(FACTORED), device
        ),
        Phase.SCALES: best_rate(search_scales, points, device),
        Phase.CODES: best_rate(search_codes, beams, device),
    }


@dataclass(frozen=True)
class Placement:
    """Where things lie under a budget."""

    host: int  # bytes at the peak
    device: int  # 0 without a GPU
    on_device: tuple[Piece, ...]  # rows of tokens that stay on the GPU
    spilled: tuple[Piece, ...]  # those that go to files
    short: int  # bytes that are missing on the host, even so
    short_on_device: int

    @property
    def fits(self) -> bool:
        return not (self.short or self.short_on_device)

    @property
    def spilled_bytes(self) -> int:
        return sum(piece.nbytes for piece in self.spilled)


@dataclass(frozen=True)
class Plan:
    """One run, in sizes."""

    units: tuple[Unit, ...]  # layers in order, and the ending
    stages: tuple[Stage, ...]
    stores: tuple[Piece, ...]  # rows of many tokens, in the order in which they are made

    @property
    def read(self) -> int:
        return sum(unit.read for unit in self.units)

    @property
    def written(self) -> int:
        return sum(unit.written for unit in self.units)

    @property
    def amounts(self) -> Amounts:
        """All that is computed, by phase."""
        return sum((unit.amounts for unit in self.units), Amounts())

    def expected(self) -> list[Planned]:
        """The units for an Eta, which learns how fast the machine is from the first ones."""
        return [
            Planned(unit.network, unit.schemes, unit.amounts.total() / NOMINAL)
            for unit in self.units
        ]

    def floor(self, pace: Pace) -> float:
        """Seconds."""
        return sum(pace.seconds(unit) for unit in self.units)

    def largest(self, *places: Place) -> Stage:
        """The stage that holds most in these places."""
        return max(self.stages, key=lambda stage: stage.nbytes(*places))

    def eta(self, pace: Pace) -> Eta:
        units = [Planned(unit.network, unit.schemes, pace.seconds(unit)) for unit in self.units]
        return Eta(units, OVERHEAD)

    def room(self, budget: Budget) -> Budget:
        """What a budget leaves for rows of tokens; below 0 where nothing else fits."""
        left = budget.host - self.held(budget)
        host = left - min(self.kept(budget), max(0, left))
        if budget.device is None:
            return Budget(host)
        return Budget(host, budget.device - self.largest(Place.COMPUTE).nbytes(Place.COMPUTE))

    def held(self, budget: Budget) -> int:
        """Bytes of the host at the peak, but for rows of tokens."""
        places = _on_host(budget)
        return self.largest(*places).nbytes(*places)

    def kept(self, budget: Budget) -> int:
        """What the host should keep of freed memory, for speed (machine.keep_freed_memory)."""
        return 0 if budget.device is not None else int(KEPT * self.held(budget))

    def fits(self, budget: Budget) -> Placement:
        """Rows of tokens stay on the GPU, then in memory, in the order in which they are made,
        while there is room: first hidden states, which each part of a layer reads, last what it
        keeps for a moment."""
        room = self.room(budget)
        host, device = room.host, room.device or 0
        on_device, spilled = [], []
        for store in self.stores:
            if store.nbytes <= device:
                device -= store.nbytes
                on_device.append(store)
            elif store.nbytes <= host:
                host -= store.nbytes
            else:
                spilled.append(store)
        return Placement(
            budget.host - host,
            (budget.device or 0) - device,
            tuple(on_device),
            tuple(spilled),
            max(0, -room.host),
            max(0, -(room.device or 0)),
        )

    def lines(self, budget: Budget, pace: Pace) -> Iterator[str]:
        """For the terminal. GB are 10^9 bytes."""
        placement = self.fits(budget)
        spilled = placement.spilled_bytes
        yield f"read   {_gb(self.read)}  of the source, once"
        yield f"disk   {_gb(self.written)}  for the result"
        if spilled:
            yield f"       {_gb(spilled)}  for a while, for rows of tokens beyond memory"
        yield f"host   {_gb(placement.host)}  {_peak_note(budget.host, placement.short)}"
        yield from self._pieces(*_on_host(budget))
        kept = min(self.kept(budget), max(0, budget.host - self.held(budget)))
        if kept:
            yield f"         {_gb(kept)}  freed, and kept for what follows"
        for store in self.stores:
            where = "in a file" if store in placement.spilled else "in memory"
            where = "on the GPU" if store in placement.on_device else where
            yield f"         {_gb(store.nbytes)}  {store.name}: {where}"
        if budget.device is not None:
            note = _peak_note(budget.device, placement.short_on_device)
            yield f"GPU    {_gb(placement.device)}  {note}"
            yield from self._pieces(Place.COMPUTE)
        yield from self._kinds(pace)
        yield from self._times(pace)

    def _pieces(self, *places: Place) -> Iterator[str]:
        """Of the stage that holds most."""
        stage = self.largest(*places)
        for piece in stage.pieces:
            if piece.place in places and piece.nbytes:
                yield f"         {_gb(piece.nbytes)}  {piece.name} ({stage.name})"

    def _kinds(self, pace: Pace) -> Iterator[str]:
        """What a layer of each kind takes; attention alone may differ between those of one."""
        kinds = {(unit.network, unit.schemes): unit for unit in self.units}
        for kind, unit in kinds.items():
            count = sum((unit.network, unit.schemes) == kind for unit in self.units)
            yield (
                f"{count:3} x {unit.network} in {unit.schemes}: read {unit.read / 1e9:.2f} GB, "
                f"write {unit.written / 1e9:.2f} GB, at least {duration(pace.seconds(unit))}"
            )

    def _times(self, pace: Pace) -> Iterator[str]:
        yield f"{'':20}{'amount':>10}{'a second':>10}{'time':>14}"
        amounts = self.amounts
        for phase, taken in pace.by_phase(amounts).items():
            speed = pace.speeds[phase]
            yield f"{phase.value:20}{amounts[phase]:10.2e}{speed:10.2e}{duration(taken):>14}"
        moved = self.read / pace.read + self.written / pace.write
        yield f"{'disk, beside it':20}{self.read + self.written:10.2e}{'':10}{duration(moved):>14}"
        floor = self.floor(pace)
        yield f"floor {duration(floor)}, expected about {duration(OVERHEAD * floor)}"


def make_plan(
    config: ModelConfig, recipe: Recipe, texts: Texts, beside: int = 0, ranks: int = 1
) -> Plan:
    """`beside` are the bytes of tensors that are copied and belong to no text model.

    Of several ranks memory is that of one, all else that of all together.
    """
    layers = [layer_unit(config, recipe, index, texts) for index in range(config.num_layers)]
    return Plan(
        (*layers, ending_unit(config, texts, beside)),
        tuple(stages(config, recipe, texts, ranks)),
        tuple(stores(config, recipe, texts, ranks)),
    )


def plan_for(
    source: Checkpoint, config: ModelConfig, recipe: Recipe, texts: Texts, ranks: int = 1
) -> Plan:
    """The plan for a source whose headers have been read."""
    text = outside_bytes(config) + sum(
        layer_bytes(config, index) for index in range(config.num_layers)
    )
    return make_plan(config, recipe, texts, max(0, source.nbytes - text), ranks)


def check_memory(plan: Plan, budget: Budget, named: bool) -> Memory:
    """What the run may hold under a budget; `named` says that a person chose it.

    Raises UserError when a run needs more, whatever goes to files.
    """
    placement = plan.fits(budget)
    for where, given, short, places in (
        ("the host", budget.host, placement.short, _on_host(budget)),
        ("the GPU", budget.device or 0, placement.short_on_device, (Place.COMPUTE,)),
    ):
        if short:
            limit = "--memory gives it" if named else "no more is free than"
            raise UserError(
                f"memory: the run needs {(given + short) / 1e9:.1f} GB of {where} at its peak "
                f"({plan.largest(*places).name}), and {limit} {given / 1e9:.1f} GB; free some, or "
                f"take a machine that has more"
            )
    room = plan.room(budget)
    return Memory(room.host, room.device or 0, FULL * budget.host)


def _on_host(budget: Budget) -> tuple[Place, ...]:
    return (Place.HOST, Place.COMPUTE if budget.device is None else Place.STAGING)


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:8.2f} GB"


def _peak_note(allowed: int, short: int) -> str:
    missing = f": {short / 1e9:.2f} GB too much" if short else ""
    return f"at the peak, of {allowed / 1e9:.2f} GB{missing}"


def duration(seconds: float) -> str:
    """Two units: "3 h 05 min", "12 min 40 s", "8 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
