"""Which tensors make up a layer, in an original and in a quantized checkpoint alike.

The source stores experts fused and in-major (`gate_up_proj [E, D, 2F]`); quantized checkpoints
store one linear an expert, `[O, I]`. Both become the in-major `DecoderLayer` of `model`.
Every floating-point tensor is checked to be finite. Knows nothing of calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import overload

import torch

from . import bnb, foreign
from .checkpoint import Checkpoint, TensorInfo
from .config import ModelConfig
from .errors import UserError
from .float8_cache import KEY, Float8Cache, read_cache
from .foreign import ForeignSchemes
from .model import DecoderLayer, Head, Linear, Mlp, Moe
from .packing import is_quantized, unpack
from .prefetch import prefetched
from .schemes import Kind, Scheme, fake_float8_tokens

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"


class LayerReader:
    """Reads layers of one checkpoint as `dtype`; a tensor that is missing, misshapen or not finite
    raises UserError with its name, and so does a missing bitsandbytes that its tensors need."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype) -> None:
        bnb.require_for(checkpoint.names())
        self.checkpoint = checkpoint
        self.config = config
        self.dtype = dtype
        self.foreign = ForeignSchemes(checkpoint.folder)

    def layer(self, index: int) -> DecoderLayer:
        config, prefix = self.config, self.config.layer_prefix(index)
        width, heads = config.hidden_size, config.num_heads * config.head_dim
        kv = config.num_kv_heads * config.head_dim
        return DecoderLayer(
            index=index,
            input_norm=self.vector(f"{prefix}input_layernorm.weight", width),
            q=self.linear(f"{prefix}self_attn.q_proj", width, heads).weight,
            k=self.linear(f"{prefix}self_attn.k_proj", width, kv).weight,
            v=self.linear(f"{prefix}self_attn.v_proj", width, kv).weight,
            o=self.linear(f"{prefix}self_attn.o_proj", heads, width),
            post_norm=self.vector(f"{prefix}post_attention_layernorm.weight", width),
            feed_forward=self.feed_forward(index),
            cache=self.cache(index),
        )

    def cache(self, index: int) -> Float8Cache | None:
        """How an engine keeps keys and values; None where it keeps them as they are."""
        attention = attention_name(self.config, index)
        if f"{attention}.{KEY}" not in self.checkpoint:
            return None
        return read_cache(self.checkpoint.get, attention)

    def feed_forward(self, index: int) -> Mlp | Moe:
        prefix = f"{self.config.layer_prefix(index)}feed_forward"
        if index not in self.config.moe_layers:
            return self.mlp(prefix, self.config.dense_size)
        return Moe(
            router=self.router(index)[1],
            experts=Experts(self, index),
            shared=self.mlp(f"{prefix}.shared_expert", self.config.expert_size),
        )

    def router(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm `[D]` before an expert layer's feed-forward, and its router `[D, E]`."""
        config = self.config
        norm, router = router_names(config, index)
        name = router.removesuffix(".weight")
        return (
            self.vector(norm, config.hidden_size),
            self.linear(name, config.hidden_size, config.num_experts).weight,
        )

    def expert(self, index: int, number: int) -> Mlp:
        """One routed expert, from the fused tensors or from its own."""
        prefix = f"{self.config.layer_prefix(index)}feed_forward.experts"
        fused = f"{prefix}.gate_up_proj"
        if fused not in self.checkpoint:
            return self.mlp(f"{prefix}.{number}", self.config.expert_size)
        count, width, size = (
            self.config.num_experts,
            self.config.hidden_size,
            self.config.expert_size,
        )
        self._check_shape(fused, (count, width, 2 * size))
        self._check_shape(f"{prefix}.down_proj", (count, size, width))
        return Mlp(
            Linear(self._cast(fused, self.checkpoint.get_row(fused, number))),
            Linear(
                self._cast(
                    f"{prefix}.down_proj", self.checkpoint.get_row(f"{prefix}.down_proj", number)
                )
            ),
        )

    def mlp(self, prefix: str, size: int) -> Mlp:
        """A gated feed-forward stored as three linears."""
        width = self.config.hidden_size
        gate = self.linear(f"{prefix}.{GATE}", width, size)
        up = self.linear(f"{prefix}.{UP}", width, size)
        return Mlp(
            Linear(self._beside(gate.weight, up.weight), gate.quantize_input),
            self.linear(f"{prefix}.{DOWN}", size, width),
        )

    def linear(self, name: str, inputs: int, outputs: int) -> Linear:
        """A linear `[O, I]` on disk, plain or quantized, as in-major `[I, O]`."""
        if not is_quantized(self.checkpoint, name):
            self._check_shape(f"{name}.weight", (outputs, inputs))
            weight = self._cast(f"{name}.weight", self.checkpoint.get(f"{name}.weight"))
            return Linear(weight.T)
        if (scheme := self.foreign.of(name)) is not None:
            read, served = foreign.read(self.checkpoint, name, scheme)
            self._check_codes(name, (read.shape[1], read.shape[0]), (inputs, outputs))
            return Linear(self._cast(f"{name}.weight_scale", read).T, served)
        stored = unpack(self.checkpoint, name)
        self._check_codes(name, stored.shape, (inputs, outputs))
        scale = "weight" if stored.scheme.bitsandbytes else "weight_scale"
        weight = self._cast(f"{name}.{scale}", stored.dequantize())
        return Linear(weight, served_inputs(stored.scheme))

    def embedding(self) -> torch.Tensor:
        """`[vocabulary, D]`."""
        name = embedding_name(self.config)
        self._check_shape(name, (self.config.vocab_size, self.config.hidden_size))
        return self._cast(name, self.checkpoint.get(name))

    def head(self) -> Head:
        norm = self.vector(f"{self.config.prefix}model.norm.weight", self.config.hidden_size)
        if self.config.tied_embeddings:
            return Head(norm, self.embedding().T)
        name = f"{self.config.prefix}lm_head"
        return Head(norm, self.linear(name, self.config.hidden_size, self.config.vocab_size).weight)

    def vector(self, name: str, size: int) -> torch.Tensor:
        self._check_shape(name, (size,))
        return self._cast(name, self.checkpoint.get(name))

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        found = self.checkpoint.info(name).shape
        if found != shape:
            raise UserError(
                f"{self.checkpoint.folder}: {name} has shape {found}, config.json says {shape}"
            )

    def _check_codes(self, name: str, found: tuple[int, int], shape: tuple[int, int]) -> None:
        if found != shape:
            raise UserError(
                f"{self.checkpoint.folder}: {name} has codes for {found}, config.json says {shape}"
            )

    def _cast(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        check_finite(name, tensor)
        return tensor.to(self.dtype)

    def _beside(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.cat((gate, up), dim=1)


class Experts(Sequence[Mlp]):
    """The routed experts of a layer, each read when it is asked for; there may be 32 GB of them.

    Whoever goes through them finds the next one read already.
    """

    def __init__(self, reader: LayerReader, layer: int) -> None:
        self.reader, self.layer = reader, layer

    def __len__(self) -> int:
        return self.reader.config.num_experts

    @overload
    def __getitem__(self, number: int) -> Mlp: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Mlp]: ...
    def __getitem__(self, number: int | slice) -> Mlp | Sequence[Mlp]:
        if isinstance(number, slice):
            return [self[one] for one in range(len(self))[number]]
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self.reader.expert(self.layer, number)

    def __iter__(self) -> Iterator[Mlp]:
        return prefetched(self.__getitem__, range(len(self)))


def served_inputs(scheme: Scheme) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What an engine makes of the inputs of a linear of this scheme; None when it takes them as
    they are."""
    found = {Kind.FLOAT8: fake_float8_tokens, Kind.LLM_INT8: bnb.fake_int8_tokens}
    return found.get(scheme.kind)


class _Headers(Checkpoint):
    """A checkpoint's tensors without their values, on the meta device."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.folder, self.infos = checkpoint.folder, checkpoint.infos
        self.asked: set[str] = set()

    def info(self, name: str) -> TensorInfo:
        self.asked.add(name)
        return super().info(name)

    def get(self, name: str) -> torch.Tensor:
        info = self.info(name)
        return torch.empty(info.shape, dtype=info.dtype, device="meta")

    def get_row(self, name: str, row: int) -> torch.Tensor:
        return self.get(name)[row]


class _LayoutReader(LayerReader):
    """Reads headers of an original alone, so there is nothing to decode, check or cast."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self.checkpoint, self.config = checkpoint, config

    def _cast(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        del name
        return tensor

    def _beside(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        del up
        return gate  # on the meta device `cat` would import TorchDynamo: seconds


def check_layout(checkpoint: Checkpoint, config: ModelConfig) -> set[str]:
    """The names of an original's text model. Raises UserError for the first of its tensors that is
    missing or misshapen.

    Reads headers only, so that hours of work are not lost to the last layer's.
    """
    headers = _Headers(checkpoint)
    reader = _LayoutReader(headers, config)
    reader.embedding()
    reader.head()
    for index in range(config.num_layers):
        network = reader.layer(index).feed_forward
        if isinstance(network, Moe):
            for number in range(len(network.experts)):
                network.experts[number]
    return headers.asked


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raises UserError with the tensor's name when it holds NaN or Inf."""
    if tensor.numel() and not torch.isfinite(torch.stack(tensor.aminmax())).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise UserError(
            f"tensor {name} holds {bad} values that are NaN or Inf; download the checkpoint again"
        )


class Component(Enum):
    """The parts of a decoder layer that a recipe names; everything else stays as it is."""

    EXPERTS = "experts"
    SHARED_EXPERT = "shared_expert"
    DENSE = "dense"
    O_PROJ = "o_proj"


@dataclass(frozen=True)
class LinearName:
    """One quantizable linear as the quantized checkpoint names it."""

    component: Component
    name: str
    inputs: int
    outputs: int


def linears(config: ModelConfig, index: int) -> Iterator[LinearName]:
    """The quantizable linears of layer `index`, experts unfused."""
    prefix = config.layer_prefix(index)
    heads = config.num_heads * config.head_dim
    yield LinearName(Component.O_PROJ, f"{prefix}self_attn.o_proj", heads, config.hidden_size)
    if index not in config.moe_layers:
        yield from _mlp_linears(
            Component.DENSE, f"{prefix}feed_forward", config.hidden_size, config.dense_size
        )
        return
    shared = f"{prefix}feed_forward.shared_expert"
    yield from _mlp_linears(Component.SHARED_EXPERT, shared, config.hidden_size, config.expert_size)
    for expert in range(config.num_experts):
        name = f"{prefix}feed_forward.experts.{expert}"
        yield from _mlp_linears(Component.EXPERTS, name, config.hidden_size, config.expert_size)


def _mlp_linears(component: Component, prefix: str, width: int, size: int) -> Iterator[LinearName]:
    yield LinearName(component, f"{prefix}.{GATE}", width, size)
    yield LinearName(component, f"{prefix}.{UP}", width, size)
    yield LinearName(component, f"{prefix}.{DOWN}", size, width)


def embedding_name(config: ModelConfig) -> str:
    return f"{config.prefix}model.embed_tokens.weight"


def router_names(config: ModelConfig, index: int) -> tuple[str, str]:
    """The norm before an expert layer's feed-forward, and its router."""
    prefix = config.layer_prefix(index)
    return f"{prefix}post_attention_layernorm.weight", f"{prefix}feed_forward.router.weight"


def attention_name(config: ModelConfig, index: int) -> str:
    return f"{config.layer_prefix(index)}self_attn"


def layer_of(config: ModelConfig, name: str) -> int | None:
    """The decoder layer that tensor `name` belongs to, None for embeddings, head and vision."""
    start = f"{config.prefix}model.layers."
    if not name.startswith(start):
        return None
    return int(name[len(start) :].split(".", 1)[0])
