"""calibrate.work: FLOPs against PyTorch's own counter, bytes against files, totals as published."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from calibrate import gptq
from calibrate.beforehand import predicted_bytes
from calibrate.gptq import solve
from calibrate.outputs import solve_in_turn, turns
from calibrate.work import (
    Amounts,
    Phase,
    Texts,
    Unit,
    causal,
    correction,
    divide,
    ending_unit,
    factor,
    forward,
    gptq_products,
    layer_bytes,
    layer_unit,
    moments,
    outside_bytes,
    product,
    turn_products,
    written_bytes,
)
from llama4q.checkpoint import Checkpoint
from llama4q.config import ModelConfig, parse_config, read_config
from llama4q.model import decoder_layer
from llama4q.products import SQUARE_BLOCK
from llama4q.recipe import Recipe, adjusted, load_recipe
from llama4q.schemes import SCHEMES, QuantizedWeight, round_to_nearest
from llama4q.weights import LayerReader, layer_of

from . import tiny
from .test_inspect import MAVERICK, SCOUT

INT4 = SCHEMES["int4"]


def units(config: ModelConfig, recipe: Recipe, texts: Texts) -> list[Unit]:
    layers = [layer_unit(config, recipe, index, texts) for index in range(config.num_layers)]
    return [*layers, ending_unit(config, texts, 0)]


def total(config: ModelConfig, recipe: Recipe, texts: Texts) -> Amounts:
    return sum((unit.amounts for unit in units(config, recipe, texts)), Amounts())


def counted(work: Callable[[], object]) -> int:
    """FLOPs that PyTorch counts: it does not see what MKL is asked for directly."""
    with (
        mock.patch("llama4q.products._bf16_product", return_value=None),
        FlopCounterMode(display=False) as counter,
    ):
        work()
    return int(counter.get_total_flops())


# --- FLOPs ---


@pytest.mark.parametrize("name", ["scout", "maverick", "guard"])
def test_forward_against_pytorchs_counter(name: str, tmp_path: Path) -> None:
    """Attention by plain products meets all T keys for each token; half of them are masked."""
    config = read_config(tiny.write(tmp_path, tiny.VARIANTS[name]))
    reader = LayerReader(Checkpoint(tmp_path), config, torch.float32)
    sequences, length = 3, 80  # two whole chunks of 32 and half of one
    width = config.num_heads * config.head_dim
    for index in range(config.num_layers):
        through = partial(decoder_layer, config, reader.layer(index))
        with sdpa_kernel(SDPBackend.MATH):
            found = counted(partial(through, torch.randn(sequences, length, config.hidden_size)))
        chunks = [32, 32, 16] if index in config.chunked_layers else [length]
        masked = sum(4 * width * (chunk**2 - sum(range(1, chunk + 1))) for chunk in chunks)
        assert forward(config, index, [(sequences, length)]) == found - sequences * masked


def test_causal_attention_looks_back() -> None:
    mask = torch.ones(50, 50).tril()
    assert causal(50, 64) == 2 * 2 * 64 * mask.sum()


@pytest.mark.parametrize("lacking", [False, True])
def test_moments_against_pytorchs_counter(lacking: bool) -> None:
    x, y, weight = torch.randn(200, 64), torch.randn(200, 64), torch.randn(64, 48)
    square = counted(lambda: y.T @ y)
    cross = counted(lambda: y.T @ ((x - y) @ weight + 1.0) if lacking else y.T @ (x - y))
    assert moments(200, 64, 48, lacking, correction=True) == square + cross
    assert moments(200, 64, 48, lacking, correction=False) == square


def test_products_of_the_solver_against_pytorchs_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done inside of a block is replaced: it has a unit of its own."""
    monkeypatch.setattr(gptq, "solve_block", lambda wanted, rows, scheme, beams: wanted.round())
    inputs, outputs = 384, 40
    weight, hessian = torch.randn(inputs, outputs), torch.eye(inputs)
    factored = gptq.factorize(hessian, 0.01, act_order=True)
    assert factored is not None
    scales = round_to_nearest(weight, INT4).scales
    found = counted(lambda: solve(weight, factored, scales, INT4))
    assert gptq_products(inputs, outputs) == found


def test_products_of_outputs_in_turn_against_pytorchs_counter() -> None:
    weight = torch.randn(128, 80)

    def rounded(aim: torch.Tensor) -> QuantizedWeight:
        return round_to_nearest(aim, INT4)

    order = turns(torch.eye(80) + 0.01)
    found = counted(lambda: solve_in_turn(weight, order, rounded))
    assert turn_products(128, 80) == found


def test_factors_and_solves_against_a_count_of_a_textbook() -> None:
    """Golub and Van Loan, algorithms 4.2.1 and 3.1.1, a multiply-add at a time."""
    size, columns = 150, 3
    of_factor = sum(2 * column for row in range(size) for column in range(row + 1))
    of_solve = 2 * columns * sum(2 * row for row in range(size))
    assert factor(size) == pytest.approx(of_factor, rel=0.02)
    assert divide(size, columns) == pytest.approx(of_solve, rel=0.02)


def test_correction_of_a_narrow_weight_adds_up() -> None:
    """All of its columns take part in alpha: three solves, and both halves' costs."""
    inputs, outputs = 64, 48
    with_residual = 3 * divide(inputs, outputs) + 2 * product(inputs, inputs, outputs)
    assert correction(inputs, outputs, lacking=True) == with_residual
    cross = 3 * product(inputs, inputs, outputs)
    assert correction(inputs, outputs, lacking=False) == with_residual + cross


def test_what_is_not_asked_for_is_not_counted() -> None:
    config, texts = parse_config(SCOUT, "scout"), Texts(((1, 2048),))
    rounded = total(config, adjusted(load_recipe("int4"), method="rtn"), texts)
    assert set(rounded) == {Phase.ORIGINAL, Phase.SERVED, Phase.JUDGE}
    assert Phase.CORRECTION in total(config, load_recipe("int4"), texts)


# --- bytes ---


@pytest.mark.parametrize("name", tiny.VARIANTS)
@pytest.mark.parametrize("recipe", ["int4", "fp8", "int4-fp8", "bnb-nf4"])
def test_bytes_against_files(name: str, recipe: str, tmp_path: Path) -> None:
    source = Checkpoint(tiny.write(tmp_path, tiny.VARIANTS[name]))
    config, chosen = read_config(tmp_path), load_recipe(recipe)
    in_files: dict[int | None, int] = {}
    beside = 0
    for tensor in source.names():
        layer, size = layer_of(config, tensor), source.info(tensor).nbytes
        in_files[layer] = in_files.get(layer, 0) + size
        if tensor.startswith(("vision_model.", "multi_modal_projector.")):
            beside += size
    layers = range(config.num_layers)
    assert [layer_bytes(config, layer) for layer in layers] == [in_files[one] for one in layers]
    assert outside_bytes(config) + beside == in_files[None]
    ending = ending_unit(config, Texts(()), beside)
    assert ending.read == ending.written == in_files[None]
    written = sum(written_bytes(config, chosen, layer) for layer in layers)
    assert written + ending.written == predicted_bytes(source, config, chosen)


# --- totals ---


def test_scout_and_maverick_as_derived_and_published() -> None:
    """BF16 text weights and INT4 results of the serving contract, in GB of 10^9 bytes; forwards and
    Hessians of 512 x 2048 tokens as derived by hand: active weights and half of the attention's
    scores, 2 N (D^2 + F^2) for the shared and again for the routed experts."""
    texts, recipe = Texts(((512, 2048),)), load_recipe("int4")
    scout, maverick = parse_config(SCOUT, "scout"), parse_config(MAVERICK, "maverick")
    for config, source, result in ((scout, 215.5, 63.1), (maverick, 801.4, 214.2)):
        found = units(config, recipe, texts)
        assert sum(unit.read for unit in found) / 1e9 == pytest.approx(source, abs=0.05)
        assert sum(unit.written for unit in found) / 1e9 == pytest.approx(result, abs=0.05)
        forwards = total(config, recipe, texts)[Phase.ORIGINAL]
        assert forwards == pytest.approx(3.275e16, rel=2e-3)
    rows, width, size = 512 * 2048, 5120, 8192
    hessians = 48 * 2 * sum(moments(rows, one, 1, False, False) for one in (width, size))
    half = sum((one + SQUARE_BLOCK) * one for one in (width, size)) / 2  # and the diagonal's blocks
    share = half / (width**2 + size**2)
    assert hessians == pytest.approx(1.88e16 * share, rel=1e-3)
    # a sixteenth of the tokens is held out; the correction's cross moments count besides
    cross = 48 * 2 * (product(rows, width, width) + 2 * product(rows, size, width))
    assert total(scout, recipe, texts)[Phase.MOMENTS] == pytest.approx((hessians + cross) * 15 / 16)


def test_solving_scales_with_experts_and_not_with_tokens() -> None:
    few, many = Texts(((128, 2048),)), Texts(((512, 2048),))
    config, recipe = parse_config(SCOUT, "scout"), load_recipe("int4")
    once, again = total(config, recipe, few), total(config, recipe, many)
    for phase in Phase:
        if phase in (Phase.FACTOR, Phase.CORRECTION, Phase.SCALES, Phase.PRODUCTS, Phase.CODES):
            assert once[phase] == again[phase], phase
        elif phase in (Phase.ORIGINAL, Phase.SERVED, Phase.MOMENTS):
            assert 4 * once[phase] == again[phase], phase
    weights = 48 * 17 * 3 * 5120 * 8192
    assert once[Phase.CODES] == weights * recipe.solver.beams
    assert once[Phase.SCALES] == weights * recipe.solver.scale_points
    factors = 48 * 17 * (factor(5120) + factor(8192)) * 3
    assert once[Phase.FACTOR] == pytest.approx(factors, rel=0.03)  # and a metric for each down


def test_schemes_are_named() -> None:
    def kinds(config: dict[str, object], recipe: str) -> list[tuple[str, str]]:
        found = units(parse_config(config, "here"), load_recipe(recipe), Texts(((1, 2048),)))
        return [(unit.network, unit.schemes) for unit in found]

    assert kinds(SCOUT, "int4-fp8")[0] == ("MoE", "fp8, int4")
    assert kinds(MAVERICK, "mixed")[:3] == [("dense", "fp8"), ("MoE", "fp8"), ("dense", "int4")]
    assert kinds(MAVERICK, "int4")[-1] == ("ending", "bf16")


def test_o_proj_is_counted_where_it_is_quantized() -> None:
    config, texts = parse_config(SCOUT, "scout"), Texts(((1, 2048),))
    without, with_it = (
        total(config, load_recipe(name), texts)[Phase.CODES] for name in ("int4", "int4-fp8")
    )
    assert with_it - without == 48 * 5120 * 5120 * load_recipe("int4").solver.beams
