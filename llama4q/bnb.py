"""bitsandbytes: its two formats, with its own arithmetic and under the names that it saves.

`load_in_4bit` and `load_in_8bit` leave Llama 4's fused experts as they are. Written one linear an
expert, in the layout of bitsandbytes' `state_dict`, transformers loads them. Weights here are
in-major `[I, O]`, on disk `[O, I]`; see docs/format.md. Knows nothing of models or files.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .errors import UserError
from .schemes import BNB_INT8, BNB_NF4, NF4_BLOCK, Kind, Scheme

NESTED_BLOCK = 256  # absmax bytes that share an F32
THRESHOLD = 6.0  # of LLM.int8: inputs this large keep their precision
STATE = "weight.quant_state.bitsandbytes__nf4"
# The state is JSON with a float whose length differs; spaces behind it, which JSON allows, give
# each the same length, so that sizes are known beforehand. bitsandbytes' own are at most 177 long.
STATE_BYTES = 192
NOT_QUANTIZED = (
    "lm_head", "router", "vision_model", "multi_modal_projector", "q_proj", "k_proj", "v_proj",
)  # fmt: skip
_MARKS = {
    "SCB": "bnb INT8",
    STATE: "bnb NF4",
    "weight.quant_state.bitsandbytes__fp4": "bnb FP4",
}

Tensors = dict[str, torch.Tensor]  # of one linear, by what follows the module's name
Read = Callable[[str], torch.Tensor]  # a tensor by its name
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@cache
def functional() -> Any:
    """`bitsandbytes.functional`. Raises UserError when it is not installed."""
    # Without the package `kernels` it warns of a product on the CPU that is not needed here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional as found
    except ModuleNotFoundError as error:
        if error.name != "bitsandbytes":
            raise
        raise UserError(
            "the schemes bnb-nf4 and bnb-int8 need bitsandbytes, which is not installed; "
            "run: pip install bitsandbytes"
        ) from None
    return found


@dataclass(frozen=True)
class BnbWeight:
    """Linears beside each other, of which each has statistics of its own: a gate and up pair, or
    a single one."""

    scheme: Scheme
    linears: tuple[Tensors, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """`(I, O)`."""
        shapes = [_stored_shape(self.scheme, tensors) for tensors in self.linears]
        return shapes[0][1], sum(outputs for outputs, _ in shapes)

    def dequantize(self) -> torch.Tensor:
        """The weight that bitsandbytes multiplies with, F32 `[I, O]`: NF4 has BF16's values."""
        return torch.cat([_dequantized(self.scheme, one) for one in self.linears]).T

    def halves(self) -> tuple[BnbWeight, BnbWeight]:
        """Gate and up of a pair."""
        gate, up = self.linears
        return BnbWeight(self.scheme, (gate,)), BnbWeight(self.scheme, (up,))


def quantize(weight: torch.Tensor, scheme: Scheme, pieces: int = 1) -> BnbWeight:
    """Plain rounding of an in-major weight `[I, O]`, as `pieces` linears of as many outputs each.

    From BF16 (INT8: from FP16, as bitsandbytes does), so that the codes are those that it would
    find itself in the original.
    """
    store = _nf4 if scheme.kind is Kind.NF4 else _int8
    linears = (store(piece.T.contiguous()) for piece in weight.chunk(pieces, dim=1))
    return BnbWeight(scheme, tuple(linears))


def _nf4(weight: torch.Tensor) -> Tensors:
    codes, state = functional().quantize_4bit(
        weight.to(torch.bfloat16), blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4"
    )
    stored = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    text = bytes(stored[STATE].tolist()).ljust(STATE_BYTES)
    assert len(text) == STATE_BYTES
    stored[STATE] = torch.tensor(list(text), dtype=torch.uint8)
    # Copies: bitsandbytes shares its tables among weights, and safetensors writes no shared memory.
    return {"weight": codes, **{key: value.clone() for key, value in stored.items()}}


def _int8(weight: torch.Tensor) -> Tensors:
    codes, scales, _ = functional().int8_vectorwise_quant(weight.to(torch.float16))
    row_major = torch.tensor(0, dtype=torch.uint8)
    return {"weight": codes, "SCB": scales, "weight_format": row_major}


def _dequantized(scheme: Scheme, tensors: Tensors) -> torch.Tensor:
    """F32 `[O, I]`, by bitsandbytes."""
    if scheme.kind is Kind.LLM_INT8:
        found = functional().int8_vectorwise_dequant(tensors["weight"], tensors["SCB"])
    else:
        parts = {key: value for key, value in tensors.items() if key != "weight"}
        state = functional().QuantState.from_dict(parts, device=tensors["weight"].device)
        found = functional().dequantize_4bit(tensors["weight"], state)
    return torch.as_tensor(found).float()


def fake_int8_tokens(inputs: torch.Tensor) -> torch.Tensor:
    """Activations as LLM.int8 sees a token that is alone in its call, `[..., I]` -> same shape.

    Tokens that share a call also share their outliers' columns, so each can only lose less.
    Source: bitsandbytes 0.50, MatMul8bitLt in `autograd/_functions.py`.
    """
    rows = inputs.flatten(0, -2)
    half = rows.to(torch.float16)
    outliers = half.abs() >= THRESHOLD
    codes, scales, _ = functional().int8_vectorwise_quant(half.masked_fill(outliers, 0))
    rounded = functional().int8_vectorwise_dequant(codes, scales).to(rows.dtype)
    return torch.where(outliers, rows, rounded).view_as(inputs)


def _stored_shape(scheme: Scheme, tensors: Tensors) -> tuple[int, int]:
    """`(O, I)`."""
    if scheme.kind is Kind.LLM_INT8:
        outputs, inputs = tensors["weight"].shape
    else:
        outputs, inputs = _state(tensors)["shape"]
    return int(outputs), int(inputs)


def _state(tensors: Tensors) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(bytes(tensors[STATE].tolist()))
    return state


def layout(scheme: Scheme, inputs: int, outputs: int) -> Layout:
    """Dtypes and shapes of the tensors of one linear, by what follows the module's name."""
    if scheme.kind is Kind.LLM_INT8:
        return {
            "weight": (torch.int8, (outputs, inputs)),
            "SCB": (torch.float32, (outputs,)),
            "weight_format": (torch.uint8, ()),
        }
    blocks = -(-inputs * outputs // NF4_BLOCK)
    return {
        "weight": (torch.uint8, (-(-inputs * outputs // 2), 1)),
        "weight.absmax": (torch.uint8, (blocks,)),
        "weight.quant_map": (torch.float32, (16,)),
        "weight.nested_absmax": (torch.float32, (-(-blocks // NESTED_BLOCK),)),
        "weight.nested_quant_map": (torch.float32, (256,)),
        STATE: (torch.uint8, (STATE_BYTES,)),
    }


def tensors(name: str, weight: BnbWeight) -> Iterable[tuple[str, torch.Tensor]]:
    """The tensors of module `name` on disk. Raises UserError for weights that INT8 cannot hold."""
    [stored] = weight.linears
    if "SCB" in stored and not torch.isfinite(stored["SCB"]).all():
        raise UserError(
            f"{name}: weights beyond FP16's 65,504, which bnb-int8 quantizes from; "
            f"choose another scheme"
        )
    return [(f"{name}.{key}", tensor) for key, tensor in stored.items()]


def stored_as(names: Container[str], module: str) -> str | None:
    """How bitsandbytes stored a module, "bnb NF4"; None when it did not."""
    return next((label for mark, label in _MARKS.items() if f"{module}.{mark}" in names), None)


def require_for(names: Iterable[str]) -> None:
    """Raises UserError when tensors of these names cannot be read without bitsandbytes."""
    if any(name.endswith(tuple(f".{mark}" for mark in _MARKS)) for name in names):
        functional()


def read(names: Container[str], get: Read, name: str) -> BnbWeight:
    """Module `name` from the tensors called `names`. Raises UserError for another layout."""
    scheme = BNB_INT8 if f"{name}.SCB" in names else BNB_NF4
    expected = layout(scheme, 1, 1)
    missing = [key for key in expected if f"{name}.{key}" not in names]
    if missing:
        raise _unread(name, f"stored without {missing[0]}")
    stored = {key: get(f"{name}.{key}") for key in expected}
    problem = damage(scheme, stored)
    if problem is not None:
        raise _unread(name, problem)
    outputs, inputs = _stored_shape(scheme, stored)
    for key, (dtype, shape) in layout(scheme, inputs, outputs).items():
        found = stored[key].dtype, tuple(stored[key].shape)
        if found != (dtype, shape) and key != STATE:
            raise _unread(name, f"{key} is {found[0]} {found[1]}, expected {dtype} {shape}")
    return BnbWeight(scheme, (stored,))


def _unread(name: str, what: str) -> UserError:
    return UserError(
        f"{name}: {what}; of bitsandbytes LLM.int8 and NF4 with blocks of {NF4_BLOCK} and "
        f"double quantization are read"
    )


def damage(scheme: Scheme, statistics: Tensors) -> str | None:
    """What is wrong with a linear's statistics (all of its tensors but `weight`), or None."""
    scales = statistics["SCB" if scheme.kind is Kind.LLM_INT8 else "weight.nested_absmax"]
    if not (torch.isfinite(scales).all() and (scales >= 0).all()):
        return "holds scales that are not finite or below 0"
    if scheme.kind is Kind.LLM_INT8:
        return "has a weight_format that is not 0" if statistics["weight_format"].any() else None
    for key, table in _tables().items():
        # As tolerant as QuantState.__eq__: the larger table is computed, in F32
        if statistics[key].shape != table.shape or not torch.allclose(
            statistics[key].cpu(), table, rtol=0, atol=1e-6
        ):
            return f"has another {key}"
    return _state_damage(statistics)


def damage_on_disk(get: Read, name: str, scheme: Scheme, inputs: int, outputs: int) -> str | None:
    """What is wrong with what was written for module `name`, its codes unread, or None."""
    keys = [key for key in layout(scheme, inputs, outputs) if key != "weight"]
    statistics = {key: get(f"{name}.{key}") for key in keys}
    problem = damage(scheme, statistics)
    if problem is None and scheme.kind is Kind.NF4:
        shape = _state(statistics)["shape"]
        problem = None if shape == [outputs, inputs] else f"has the quant_state of shape {shape}"
    return problem


def _state_damage(statistics: Tensors) -> str | None:
    try:
        state = _state(statistics)
        outputs, inputs = state.pop("shape")
        offset = float(state.pop("nested_offset"))
        whole = int(outputs) > 0 and int(inputs) > 0 and 0 <= offset < float("inf")
        dtype = state.pop("dtype")
    except (ValueError, KeyError, TypeError, AttributeError):
        return "has an unreadable quant_state"
    fixed = {
        "quant_type": "nf4", "blocksize": NF4_BLOCK,
        "nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32",
    }  # fmt: skip
    if not whole or state != fixed or dtype not in ("bfloat16", "float16", "float32"):
        return f"has the quant_state {bytes(statistics[STATE].tolist()).decode().strip()}"
    return None


@cache
def _tables() -> Mapping[str, torch.Tensor]:
    """The 16 values of NF4 and the 256 of an absmax byte."""
    return {
        "weight.quant_map": functional().get_4bit_type("nf4", device="cpu"),
        "weight.nested_quant_map": functional().create_dynamic_map(),
    }


def quantization_config(scheme: Scheme, not_quantized: Sequence[str]) -> dict[str, Any]:
    """config.json's quantization_config, as transformers' BitsAndBytesConfig writes it.

    `not_quantized` holds names or patterns of modules that stay in BF16: transformers gives every
    other linear the tensors of `layout` to load, so each one must be named.
    """
    nf4 = scheme.kind is Kind.NF4
    return {
        "quant_method": "bitsandbytes",
        "_load_in_8bit": not nf4,
        "_load_in_4bit": nf4,
        "llm_int8_threshold": THRESHOLD,
        "llm_int8_skip_modules": [*NOT_QUANTIZED, *not_quantized],
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_quant_type": "nf4" if nf4 else "fp4",
        "bnb_4bit_use_double_quant": nf4,
        "bnb_4bit_compute_dtype": "bfloat16" if nf4 else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "load_in_4bit": nf4,
        "load_in_8bit": not nf4,
    }
