"""What one run holds in memory, piece by piece, from sizes alone.

Stages follow each other, so the peak is the largest one. What is counted per row or per matrix is
what the code holds at its worst moment; each figure says of what. Knows nothing of budgets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from llama4q import footprint
from llama4q.config import ModelConfig
from llama4q.recipe import Method, Recipe
from llama4q.schemes import Scheme
from llama4q.stream import TOKENS_AT_ONCE
from llama4q.weights import Component

from .gather import MOST_ROWS
from .layer import EXPERTS_AT_ONCE, POOL_ROWS
from .leaves import LEAVES
from .target import HALVES
from .work import Alike, Texts, tokens, weights_of

ROW, EXACT = footprint.BF16, footprint.F32  # of weights and streams, and of all the rest
SKEW = 2.5  # tokens of the busiest expert over the mean


class Place(Enum):
    """Where a piece lies."""

    HOST = "host"
    COMPUTE = "compute"  # where products are: the GPU if there is one, else the host
    STAGING = "staging"  # on the host, and only where there is a GPU


@dataclass(frozen=True)
class Piece:
    """Something in memory, in bytes."""

    name: str
    nbytes: int
    place: Place = Place.COMPUTE


@dataclass(frozen=True)
class Stage:
    """What is held at one time, besides the rows of many tokens."""

    name: str
    pieces: tuple[Piece, ...]

    def nbytes(self, *places: Place) -> int:
        return sum(piece.nbytes for piece in self.pieces if piece.place in places)


# --- rows of many tokens, which may lie in files ---


def stores(config: ModelConfig, recipe: Recipe, texts: Texts, ranks: int = 1) -> Iterator[Piece]:
    """One for each set of rows, in the order in which one of so many ranks makes them."""
    rows, asked = share(tokens(texts.calibration), ranks), -(-tokens(texts.evaluation) // ranks)
    width = config.hidden_size * ROW
    for stream in ("original", "served"):
        yield Piece(f"hidden states, {stream}", rows * width, Place.HOST)
    for stream in ("original", "served"):
        yield Piece(f"evaluation's hidden states, {stream}", asked * width, Place.HOST)
    for stream in ("served", "original"):
        yield Piece(f"outputs of the layer, {stream}", max(rows, asked) * width, Place.HOST)
    every = [
        alike
        for index in range(config.num_layers)
        for alike in weights_of(config, index, tokens(texts.calibration))
        if recipe.scheme(alike.component, index, config.num_layers).quantizes
    ]
    if ranks > 1:
        most = max((busiest(one) for one in every if one.component is Component.EXPERTS), default=0)
        for rows_of in ("served", "original"):
            yield Piece(f"an expert's tokens of all ranks, {rows_of}", most * width, Place.HOST)
        lacking = most * config.hidden_size * EXACT
        yield Piece("what the stream lacks of them", lacking, Place.HOST)
    behind_gate = [one for one in every if one.lacking and one.component is not Component.O_PROJ]
    most = max((_together(one, ranks) * one.inputs for one in behind_gate), default=0)
    for stream in ("original", "served"):
        yield Piece(f"activations before down, {stream}", most * ROW, Place.HOST)


def share(rows: int, ranks: int) -> int:
    """The most of all rows that one rank has: whole leaves."""
    return rows * -(-LEAVES // ranks) // LEAVES


def _together(alike: Alike, ranks: int) -> int:
    """Rows of a weight that one rank has at a time: all of an expert, its share of all tokens."""
    return busiest(alike) if alike.component is Component.EXPERTS else share(alike.rows, ranks)


def busiest(alike: Alike) -> int:
    """Rows of the expert that sees most of them."""
    return min(alike.rows, int(SKEW * alike.rows / alike.count))


# --- stages ---


def stages(config: ModelConfig, recipe: Recipe, texts: Texts, ranks: int = 1) -> Iterator[Stage]:
    """Everything that one of so many ranks goes through; layers that are alike come again."""
    always = (
        Piece("runtime", footprint.RUNTIME, Place.HOST),
        Piece("routers of all layers", _router_views(config)),
        Piece("tensors on their way to the GPU", _staging(config), Place.STAGING),
    )
    table = Piece("embedding or head", footprint.table(config))
    predictions = Piece("predictions", footprint.predictions(config, texts.windows))
    yield Stage("embedding", (*always, table))
    yield Stage("predictions", (*always, table, predictions))
    for index in range(config.num_layers):
        resident = (*always, *_resident(config, index))
        attention = footprint.attention(config, texts.calibration + texts.evaluation)
        yield Stage("attention", (*resident, Piece("workspace of the forward", attention)))
        for stage in _solving(config, recipe, index, tokens(texts.calibration), ranks):
            yield Stage(stage.name, (*resident, *stage.pieces))


def _router_views(config: ModelConfig) -> int:
    return EXACT * config.hidden_size * config.num_experts * len(config.moe_layers)


def _staging(config: ModelConfig) -> int:
    """Pinned buffers, which PyTorch keeps, one for each size that is a power of two."""
    width = config.hidden_size
    outputs = {config.vocab_size, config.num_heads * config.head_dim}
    if config.moe_layers:
        outputs |= {config.expert_size, 2 * config.expert_size}
    if len(config.moe_layers) < config.num_layers:
        outputs.add(config.dense_size)
    return sum({1 << (ROW * width * size - 1).bit_length() for size in outputs})


def _resident(config: ModelConfig, index: int) -> Iterator[Piece]:
    """The layer in work and what is read ahead: the next layer, or an expert and the next one."""
    yield Piece("layer", footprint.layer(config, index))
    following = min(index + 1, config.num_layers - 1)
    yield Piece("next layer, read ahead", footprint.layer(config, following))
    if index in config.moe_layers:
        yield Piece("expert", footprint.expert(config))
        yield Piece("next expert, read ahead", footprint.expert(config))


def _solving(
    config: ModelConfig, recipe: Recipe, index: int, rows: int, ranks: int
) -> Iterator[Stage]:
    """Both stages of each of a layer's weights: its moments are gathered, then it is solved."""
    crossed = recipe.solver.correction
    pooled = recipe.solver.shrinkage and recipe.solver.method is Method.GPTQ
    for alike in weights_of(config, index, rows):
        scheme = recipe.scheme(alike.component, index, config.num_layers)
        if not scheme.quantizes:
            continue
        held = [
            Piece("weight in F32", EXACT * alike.inputs * alike.outputs),
            Piece("sampled rows", ROW * min(alike.rows, MOST_ROWS) * alike.inputs),
        ]
        gathered = []
        if scheme.calibrates and recipe.solver.method is Method.GPTQ:
            held += _moments(alike, crossed)
            gathered = [_leaves(alike, crossed, ranks)]
        if alike.component is Component.EXPERTS:
            held += _others(config, alike, pooled)
            held.append(Piece("codes to be written", _waiting(config, scheme), Place.HOST))
        name = f"{alike.component.value} {'down' if alike.lacking else 'gate_up'}"
        if alike.component is Component.O_PROJ:
            name = alike.component.value
        if alike.component is Component.EXPERTS and ranks > 1:
            buffers = 2 * EXACT * busiest(alike) * config.hidden_size
            yield Stage(f"{name}: exchange", (Piece("tokens that travel", buffers, Place.HOST),))
        yield Stage(f"{name}: moments", (*held, *gathered, _forward(config, alike)))
        yield Stage(f"{name}: codes", (*held, *_solver(alike)))


def _waiting(config: ModelConfig, scheme: Scheme) -> int:
    """Codes of the experts that are written together."""
    width, size = config.hidden_size, config.expert_size
    both = scheme.stored_bytes(width, 2 * size) + scheme.stored_bytes(size, width)
    return EXPERTS_AT_ONCE * both


def _moments(alike: Alike, crossed: bool) -> Iterator[Piece]:
    yield Piece("Hessians of both halves", len(HALVES) * EXACT * alike.inputs**2)
    if crossed:
        yield Piece("cross moments of both halves", len(HALVES) * _cross(alike))


def _leaves(alike: Alike, crossed: bool, ranks: int) -> Piece:
    """Sums that are not in those of the halves yet: of one leaf, or, before they travel, of all
    that a rank has."""
    one = EXACT * alike.inputs**2 + (_cross(alike) if crossed else 0)
    count = 1 if ranks == 1 else max(1, -(-LEAVES // ranks) - len(HALVES))
    return Piece("sums by leaf", 0 if alike.component is Component.EXPERTS else count * one)


def _cross(alike: Alike) -> int:
    return EXACT * alike.inputs * (alike.outputs if alike.lacking else alike.inputs)


def _others(config: ModelConfig, alike: Alike, pooled: bool) -> Iterator[Piece]:
    """What stands behind experts with few tokens."""
    yield Piece("sample of all tokens", ROW * POOL_ROWS * config.expert_size * config.hidden_size)
    if pooled:
        widths = {config.hidden_size, alike.inputs}  # down's own pool beside the layer's
        yield Piece("pooled Hessians", EXACT * sum(width**2 for width in widths))


def _forward(config: ModelConfig, alike: Alike) -> Piece:
    """A piece of tokens on its way to a weight, and into its moments.

    Before gate and up: both of them in BF16 and F32 and seven values more, for tokens' weights.
    Before down: hidden values of both streams and their F32 copies, and what the stream lacks.
    """
    rows = min(TOKENS_AT_ONCE, busiest(alike))
    if alike.lacking:
        return Piece(
            "workspace of the forward", rows * (22 * alike.inputs + 24 * config.hidden_size)
        )
    return Piece("workspace of the forward", rows * (20 * alike.outputs + 8 * config.hidden_size))


def _solver(alike: Alike) -> Iterator[Piece]:
    """Factoring, correcting and solving follow each other: three matrices of the Hessian's shape
    (in order, lower, upper), or four of the weight's (what is wanted, its quotient, share, sum)."""
    square, full = EXACT * alike.inputs**2, EXACT * alike.inputs * alike.outputs
    yield Piece("joined and blended Hessian, its factor", 3 * square)
    yield Piece("workspace of the solver", max(3 * square, 4 * full))
