"""What one run has to compute and to move, from sizes alone: FLOPs by phase, bytes by layer.

A multiply-add counts as two FLOPs. Each formula is written once, here; what is linear in rows takes
all rows of a layer's experts together. Elementwise work is not counted, but for the two searches,
which have units of their own. Knows nothing of memory, machines or tensors' contents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from llama4q.config import ModelConfig
from llama4q.footprint import Shape
from llama4q.products import SQUARE_BLOCK
from llama4q.recipe import Method, Recipe, Solver, planned
from llama4q.schemes import Scheme
from llama4q.weights import Component, linears

from .gptq import BLOCK
from .judge import HELD_EVERY, LEAST_TOKENS, MOST_TOKENS
from .layer import POOL_ROWS
from .outputs import BLOCKS
from .target import COLUMNS, HALVES

BF16_BYTES = 2  # of a weight in the source


class Phase(StrEnum):
    """What time is spent on; in FLOPs unless said otherwise."""

    ORIGINAL = "forward, original"
    SERVED = "forward, served"
    MOMENTS = "moments"
    POOL = "shrinkage pools"
    FACTOR = "factors"
    CORRECTION = "correction"
    SCALES = "scale search"  # weights times points
    PRODUCTS = "GPTQ products"
    CODES = "code search"  # weights times beams
    JUDGE = "judging"
    EVALUATION = "evaluation"


Amounts = Counter[Phase]


@dataclass(frozen=True)
class Texts:
    """The sequences that travel through the layers."""

    calibration: tuple[Shape, ...]
    windows: tuple[Shape, ...] = ()  # of which every position is compared
    prompts: tuple[Shape, ...] = ()  # of which a few are

    @property
    def evaluation(self) -> tuple[Shape, ...]:
        return self.windows + self.prompts


@dataclass(frozen=True)
class Unit:
    """One layer, or what follows the last one."""

    network: str  # "MoE", "dense" or "ending"
    schemes: str  # that its weights get
    amounts: Amounts
    read: int  # bytes of the source
    written: int  # bytes of the result


@dataclass(frozen=True)
class Alike:
    """Weights `[I, O]` of one size, one for each expert, which `rows` tokens reach in all."""

    component: Component
    inputs: int
    outputs: int
    rows: int
    count: int = 1
    lacking: bool = False  # outputs go into the residual stream and can make up for what it lacks


# --- FLOPs of one operation ---


def product(rows: int, inputs: int, outputs: int) -> int:
    """Of `[rows, I] @ [I, O]`: a multiply and an add for each of the rows * I * O terms."""
    return 2 * rows * inputs * outputs


def causal(length: int, width: int) -> int:
    """Of attention over `length` tokens with heads of `width` together.

    Token t meets t keys, in `q k^T` and again in the sum over values: sum_t 4 t width.
    """
    return 2 * length * (length + 1) * width


def gated(rows: int, width: int, size: int) -> int:
    """Of a gated feed-forward: gate and up side by side, then down."""
    return product(rows, width, 2 * size) + product(rows, size, width)


def moments(rows: int, inputs: int, outputs: int, lacking: bool, correction: bool) -> int:
    """Of H = y^T y and of what the correction needs besides.

    That is y^T (x - y) `[I, I]`, or, where the output should make up for r, y^T [(x - y) W + r]
    `[I, O]`.
    """
    found = square(rows, inputs)
    if not correction:
        return found
    crosses = 2 * product(rows, inputs, outputs) if lacking else product(rows, inputs, inputs)
    return found + crosses


def square(rows: int, inputs: int) -> int:
    """Of y^T y, above the diagonal of blocks alone: it is symmetric."""
    blocks = range(0, inputs, SQUARE_BLOCK)
    return sum(product(rows, min(SQUARE_BLOCK, inputs - at), inputs - at) for at in blocks)


def factor(size: int) -> int:
    """Of a Cholesky factor: column j updates a triangle of (I - j)^2 / 2 terms."""
    return size**3 // 3


def divide(inputs: int, outputs: int) -> int:
    """Of H^-1 B with H = L L^T: two triangular solves of I^2 / 2 terms for each of O columns."""
    return 2 * inputs**2 * outputs


def correction(inputs: int, outputs: int, lacking: bool) -> int:
    """Of H^-1 B, and of alpha: the same for a few columns in each half, and what they cost there.

    Without `lacking`, B = M W is a product of its own.
    """
    columns = min(COLUMNS, outputs)
    cross = 0 if lacking else product(inputs, inputs, outputs + len(HALVES) * columns)
    alpha = divide(inputs, columns) + product(inputs, inputs, columns)
    return cross + divide(inputs, outputs) + len(HALVES) * alpha


def gptq_products(inputs: int, outputs: int) -> int:
    """Of what each block of rows gathers from all rows behind it: about I^2 O."""
    return sum(
        product(min(BLOCK, stop), inputs - stop, outputs) for stop in range(inputs, 0, -BLOCK)
    )


def turn_products(inputs: int, outputs: int) -> int:
    """Of outputs solved in turn (outputs.py): each block asks all those behind it, I O^2 7/8.

    The small triangular solves that say what for are left out.
    """
    width = outputs // BLOCKS
    return sum(product(inputs, number * width, width) for number in range(BLOCKS))


# --- a layer ---


def forward(config: ModelConfig, index: int, shapes: Sequence[Shape]) -> int:
    """FLOPs of one model's tokens through layer `index`."""
    rows, width = tokens(shapes), config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    size = config.hidden_size
    found = product(rows, size, width + 2 * kv) + product(rows, width, size)
    for sequences, length in shapes:
        chunk = min(length, config.chunk_size) if index in config.chunked_layers else length
        whole, rest = divmod(length, chunk)
        found += sequences * (whole * causal(chunk, width) + causal(rest, width))
    if index not in config.moe_layers:
        return found + gated(rows, size, config.dense_size)
    routed_and_shared = 2 * gated(rows, size, config.expert_size)
    return found + product(rows, size, config.num_experts) + routed_and_shared


def tokens(shapes: Sequence[Shape]) -> int:
    return sum(sequences * length for sequences, length in shapes)


def weights_of(config: ModelConfig, index: int, rows: int) -> Iterator[Alike]:
    """The weights of layer `index` as the solver gets them, gate and up as one."""
    width = config.num_heads * config.head_dim
    yield Alike(Component.O_PROJ, width, config.hidden_size, rows, lacking=True)
    if index not in config.moe_layers:
        yield from _gated_weights(Component.DENSE, config.hidden_size, config.dense_size, rows, 1)
        return
    for component, count in ((Component.SHARED_EXPERT, 1), (Component.EXPERTS, config.num_experts)):
        yield from _gated_weights(component, config.hidden_size, config.expert_size, rows, count)


def _gated_weights(
    component: Component, width: int, size: int, rows: int, count: int
) -> Iterator[Alike]:
    yield Alike(component, width, 2 * size, rows, count)
    yield Alike(component, size, width, rows, count, lacking=True)


def solving(alike: Alike, scheme: Scheme, solver: Solver, metric: bool) -> Amounts:
    """What finding their codes takes; `metric`: later routers weigh errors of outputs."""
    inputs, outputs, count = alike.inputs, alike.outputs, alike.count
    if not scheme.quantizes:
        return Amounts()
    judged = product(count * _judged(alike), inputs, outputs)
    if not _solves(scheme, solver):
        return Amounts({Phase.JUDGE: 2 * judged})  # what is wanted, what rounding gives
    halves = len(HALVES) if solver.correction else 0
    in_turn, weighing = 0, 0
    if metric and alike.lacking:
        in_turn, weighing = turn_products(inputs, outputs), factor(outputs)
    found = Amounts(
        {
            Phase.MOMENTS: moments(
                seen(alike.rows), inputs, outputs, alike.lacking, solver.correction
            ),
            Phase.FACTOR: count * (1 + halves) * factor(inputs) + weighing,
            Phase.SCALES: count * inputs * outputs * solver.scale_points,
            Phase.PRODUCTS: count * (gptq_products(inputs, outputs) + in_turn),
            Phase.CODES: count * inputs * outputs * solver.beams,
            Phase.JUDGE: 3 * judged,
        }
    )
    if solver.correction:
        found[Phase.CORRECTION] = count * correction(inputs, outputs, alike.lacking)
    return found


def seen(rows: int) -> int:
    """Of so many tokens, those that moments may see."""
    return rows - rows // HELD_EVERY


def _judged(alike: Alike) -> int:
    """Tokens that codes are judged on; other experts' stand in for too few."""
    held = alike.rows // alike.count // HELD_EVERY
    return min(held, MOST_TOKENS) if held >= LEAST_TOKENS else MOST_TOKENS


def pools(config: ModelConfig, solver: Solver, rows: int) -> Amounts:
    """What experts with few tokens lean on: the moments of all tokens before gate and up, and of a
    sample of them behind each expert's own gate and up; held-out tokens that stand in."""
    width, size, count = config.hidden_size, config.expert_size, config.num_experts
    found = Amounts({Phase.JUDGE: 2 * count * product(MOST_TOKENS, width, 2 * size)})
    if solver.shrinkage:
        sample = min(POOL_ROWS * size, seen(rows))
        behind = product(sample, width, 2 * size) + square(sample, size)
        found[Phase.POOL] = square(seen(rows), width) + count * behind
    return found


def layer_unit(config: ModelConfig, recipe: Recipe, index: int, texts: Texts) -> Unit:
    """All of layer `index`."""
    rows, solver = tokens(texts.calibration), recipe.solver
    once = forward(config, index, texts.calibration)
    amounts = Amounts({Phase.ORIGINAL: once, Phase.SERVED: once})
    amounts[Phase.EVALUATION] = 2 * forward(config, index, texts.evaluation)
    schemes = {}
    for alike in weights_of(config, index, rows):
        scheme = recipe.scheme(alike.component, index, config.num_layers)
        schemes[alike.component] = scheme
        after = index - 1 if alike.component is Component.O_PROJ else index
        metric = solver.routing_weight > 0 and any(later > after for later in config.moe_layers)
        amounts += solving(alike, scheme, solver, metric)
    if Component.EXPERTS in schemes and _solves(schemes[Component.EXPERTS], solver):
        amounts += pools(config, solver, rows)
    names = dict.fromkeys(one.name for one in schemes.values() if one.quantizes)
    return Unit(
        "MoE" if index in config.moe_layers else "dense",
        ", ".join(names) or "bf16",
        amounts,
        layer_bytes(config, index),
        written_bytes(config, recipe, index),
    )


def _solves(scheme: Scheme, solver: Solver) -> bool:
    return scheme.calibrates and solver.method is Method.GPTQ


def ending_unit(config: ModelConfig, texts: Texts, beside: int) -> Unit:
    """What is in no layer is copied, and predictions compared; `beside` bytes are vision's."""
    rows = tokens(texts.windows)
    amounts = Amounts({Phase.EVALUATION: 2 * product(rows, config.hidden_size, config.vocab_size)})
    outside = outside_bytes(config) + beside
    return Unit("ending", "bf16", amounts, outside, outside)


# --- bytes ---


def layer_bytes(config: ModelConfig, index: int) -> int:
    """Bytes of layer `index` in the source."""
    quantizable = sum(linear.inputs * linear.outputs for linear in linears(config, index))
    return BF16_BYTES * (quantizable + _kept_elements(config, index))


def written_bytes(config: ModelConfig, recipe: Recipe, index: int) -> int:
    """Bytes of layer `index` in the result."""
    kept = BF16_BYTES * _kept_elements(config, index)
    return kept + sum(
        scheme.stored_bytes(linear.inputs, linear.outputs)
        for linear, scheme in planned(recipe, config, index)
    )


def _kept_elements(config: ModelConfig, index: int) -> int:
    """What no recipe names: norms, q, k, v and the router."""
    heads = config.num_heads + 2 * config.num_kv_heads
    router = config.num_experts if index in config.moe_layers else 0
    return config.hidden_size * (2 + heads * config.head_dim + router)


def outside_bytes(config: ModelConfig) -> int:
    """Bytes of the embedding, the last norm and the head."""
    tables = 1 if config.tied_embeddings else 2
    return BF16_BYTES * config.hidden_size * (tables * config.vocab_size + 1)
