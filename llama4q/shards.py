"""What each of several tensor parallel cards holds of a checkpoint's tensors, in bytes.

As vLLM 0.32 creates its parameters: `model_executor/models/llama4.py` and `mllama4.py` say which
layer class a linear is, `layers/linear.py` and `layers/vocab_parallel_embedding.py` how that class
is cut, `layers/quantization/compressed_tensors/` which parameters a scheme has. Triton's experts
keep them as they are created; Marlin's repacked ones have the same bytes. Knows names, shapes and
dtypes only: nothing of values, KV caches or GPUs.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch

from .checkpoint import TensorInfo
from .config import ModelConfig
from .schemes import FLOAT8

MOST_CARDS = 8  # of one tensor parallel group; more are as many machines, mostly
VOCABULARY_ROWS = 64  # vLLM pads the vocabulary to a multiple of it
PLAIN = (torch.bfloat16, torch.float16, torch.float32)


class Cut(Enum):
    """How a tensor is divided among cards."""

    WHOLE = "whole"  # every card has all of it
    EVEN = "even"
    HEADS = "heads"  # of keys and values: when there are more cards, several have the same one
    VOCABULARY = "vocabulary"  # rows, padded first


@dataclass(frozen=True)
class Piece:
    """`count` neighbouring parts of `nbytes` each, between which it may be cut."""

    cut: Cut
    count: int
    nbytes: int

    def on(self, cards: int) -> int:
        """Bytes on each of `cards`."""
        if self.cut is Cut.WHOLE:
            return self.count * self.nbytes
        if self.cut is Cut.HEADS:
            return max(1, self.count // cards) * self.nbytes
        if self.cut is Cut.VOCABULARY:
            padded = -(-self.count // VOCABULARY_ROWS) * VOCABULARY_ROWS
            return -(-padded // cards) * self.nbytes
        return -(-self.count // cards) * self.nbytes

    def divides(self, cards: int) -> bool:
        """Whether vLLM cuts it into so many; heads are the configuration's concern."""
        return self.cut is not Cut.EVEN or self.count % cards == 0


@dataclass(frozen=True)
class ShardedWeights:
    """All weights of a model, and the tensor parallel sizes that vLLM takes it with."""

    pieces: Mapping[Piece, int]  # how many there are of each
    sizes: tuple[int, ...]

    def on(self, cards: int) -> int:
        """Bytes on each of `cards`."""
        return sum(number * piece.on(cards) for piece, number in self.pieces.items())


def sharded(config: ModelConfig, infos: Mapping[str, TensorInfo]) -> ShardedWeights:
    """The weights of the tensors in `infos`, fused or unfused, plain or compressed-tensors'."""
    pieces: Counter[Piece] = Counter()
    for name, info in infos.items():
        piece = _piece(config, name, info, infos)
        if piece is not None:
            pieces[piece] += 1
    sizes = tuple(
        cards
        for cards in range(1, MOST_CARDS + 1)
        if _heads_divide(config, cards) and all(piece.divides(cards) for piece in pieces)
    )
    return ShardedWeights(pieces, sizes)


def _heads_divide(config: ModelConfig, cards: int) -> bool:
    """Source: the assertions of `Llama4Attention`."""
    fewer, more = sorted((config.num_kv_heads, cards))
    return config.num_heads % cards == 0 and more % fewer == 0


# The last names of linears. Columns are cut along the outputs, rows along the inputs.
_COLUMNS = {"q_proj", "gate_proj", "up_proj", "fc1", "linear", "linear_1"}
_ROWS = {"o_proj", "down_proj", "fc2"}
_KEYS_AND_VALUES = {"k_proj", "v_proj"}
_VOCABULARY = {"embed_tokens", "lm_head"}
_PART = re.compile(
    r"\.(bias|SCB|input_(global_)?scale|[kv]_scale|weight(_packed|_scale|_scale_2|_shape"
    r"|_zero_point|_global_scale|_format|\..+)?)$"
)


def _piece(
    config: ModelConfig, name: str, info: TensorInfo, infos: Mapping[str, TensorInfo]
) -> Piece | None:
    """One tensor of a checkpoint as a card holds it; None for what becomes part of another."""
    found = _PART.search(name)
    if found is None:  # fused experts, and vision's class and position embeddings
        return _fused(name, info)
    module, part = name[: found.start()], found[1]
    linear = module.rsplit(".", 1)[-1]
    if part in ("k_scale", "v_scale"):  # loaded into buffers that are there anyhow
        return None
    if part == "weight_shape":
        return _weight_shape(linear, ".experts." in module)
    size = _held_size(module, part, info, infos)
    if len(info.shape) == 0 or math.prod(info.shape) == 1 or part.startswith(("input_", "weight.")):
        return Piece(Cut.WHOLE, 1, math.prod(info.shape) * size)
    return _cut(config, linear, module, info.shape, size)


def _cut(config: ModelConfig, linear: str, module: str, shape: tuple[int, ...], size: int) -> Piece:
    """A weight `[O, I]`, its codes or scales, or a bias `[O]`; `size` bytes an element."""
    elements = math.prod(shape)
    rows = Piece(Cut.EVEN, shape[0], elements // shape[0] * size)
    if linear in _VOCABULARY:
        return Piece(Cut.VOCABULARY, shape[0], rows.nbytes)
    if linear in _KEYS_AND_VALUES:
        if module.startswith("vision_model."):
            return rows
        heads = config.num_kv_heads
        return Piece(Cut.HEADS, heads, elements * size // heads)
    if linear in _COLUMNS:
        return rows
    if linear in _ROWS and len(shape) == 2 and shape[1] > 1:  # not a scale an output, nor a bias
        return Piece(Cut.EVEN, shape[1], elements // shape[1] * size)
    return Piece(Cut.WHOLE, 1, elements * size)


def _fused(name: str, info: TensorInfo) -> Piece:
    """Experts `[E, D, 2F]` and `[E, F, D]`, cut along F; anything else is whole."""
    size, elements = 2, math.prod(info.shape)
    if name.endswith(".experts.gate_up_proj"):
        return Piece(Cut.EVEN, info.shape[2] // 2, 2 * size * elements // info.shape[2])
    if name.endswith(".experts.down_proj"):
        return Piece(Cut.EVEN, info.shape[1], size * elements // info.shape[1])
    return Piece(Cut.WHOLE, 1, size * elements)


def _weight_shape(linear: str, routed: bool) -> Piece | None:
    """Two numbers for each merged linear: integers of 8 bytes, but for experts BF16."""
    if linear in ("up_proj", *_KEYS_AND_VALUES):
        return None
    return Piece(Cut.WHOLE, 2, 2 if routed else 8)


def _held_size(module: str, part: str, info: TensorInfo, infos: Mapping[str, TensorInfo]) -> int:
    """Bytes of one element: what is plain has the model's dtype, BF16, but scales of FP8 codes
    are F32."""
    if info.dtype not in PLAIN or part.startswith(("weight_global", "input_", "weight.", "SCB")):
        return info.dtype.itemsize
    codes = infos.get(f"{module}.weight")
    float8 = part == "weight_scale" and codes is not None and codes.dtype is FLOAT8
    return 4 if float8 else 2
