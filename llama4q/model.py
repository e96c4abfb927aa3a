"""One Llama 4 decoder layer's forward, the embedding and the head, in plain functions of tensors.

Weights are in-major, `[I, O]`, so that `x @ weight` applies them. No `[T, T]` mask is built: local
layers attend inside chunks of positions, global ones causally. Only the rows routed to an expert
pass through it. Knows nothing of files or bits. Proven equal to transformers' `modeling_llama4.py`
in tests/test_model.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from .config import ModelConfig

POSITIONS_TOGETHER = 8192  # of one sequence in attention
QUERIES_TOGETHER = 1024  # of them where a mask is made: [queries, T]


@dataclass(frozen=True)
class Linear:
    """A weight `[I, O]`, and what an engine does to its input first (None: nothing)."""

    weight: torch.Tensor
    quantize_input: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.quantize_input is not None:
            inputs = self.quantize_input(inputs)
        return inputs @ self.weight


@dataclass(frozen=True)
class Mlp:
    """A gated feed-forward: `gate_up [D, 2F]` holds gate and up side by side, `down [F, D]`."""

    gate_up: Linear
    down: Linear

    def hidden(self, inputs: torch.Tensor) -> torch.Tensor:
        """What `down` is applied to, `[N, F]`."""
        return self.activated(self.gate_up(inputs))

    def activated(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Gate and up `[N, 2F]` combined, `[N, F]`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return up * functional.silu(gate)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.down(self.hidden(inputs))


@dataclass(frozen=True)
class Moe:
    """A top-1 router `[D, E]`, its experts, and the shared expert that sees every token."""

    router: torch.Tensor
    experts: Sequence[Mlp]
    shared: Mlp


class Cache(Protocol):
    """What an engine makes of keys and values when it stores them."""

    def keys(self, keys: torch.Tensor) -> torch.Tensor: ...
    def values(self, values: torch.Tensor) -> torch.Tensor: ...
    def cut(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[int, int]: ...


@dataclass(frozen=True)
class DecoderLayer:
    """The weights of one decoder layer; `feed_forward` is dense or a mixture of experts."""

    index: int
    input_norm: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: Linear
    post_norm: torch.Tensor
    feed_forward: Mlp | Moe
    cache: Cache | None = None  # None: keys and values are kept as they are


@dataclass(frozen=True)
class Head:
    """The final norm `[D]` and the output projection `[D, vocabulary]`."""

    norm: torch.Tensor
    output: torch.Tensor


@dataclass(frozen=True)
class Routing:
    """Which expert each of N tokens goes to, and the score that multiplies the expert's input."""

    expert: torch.Tensor  # [N], int64
    score: torch.Tensor  # [N, 1]

    def rows(self, expert: int) -> torch.Tensor:
        """The indices of the tokens routed to `expert`."""
        return torch.nonzero(self.expert == expert).squeeze(1)


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root mean square norm over the last dimension, computed in F32."""
    return _normalized(hidden, eps) * weight


def _normalized(hidden: torch.Tensor, eps: float) -> torch.Tensor:
    exact = hidden.float()
    return (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)).to(hidden.dtype)


def decoder_layer(
    config: ModelConfig, layer: DecoderLayer, hidden: torch.Tensor
) -> tuple[torch.Tensor, Routing | None]:
    """Hidden states `[S, T, D]` through one layer; with the routing of an expert layer."""
    return feed_forward(config, layer, hidden + layer.o(attention(config, layer, hidden)))


def feed_forward(
    config: ModelConfig, layer: DecoderLayer, hidden: torch.Tensor
) -> tuple[torch.Tensor, Routing | None]:
    """The second half of a layer, for hidden states `[S, T, D]` that its attention has passed."""
    normed = feed_forward_input(config, layer, hidden)
    if isinstance(layer.feed_forward, Mlp):
        return hidden + layer.feed_forward(normed).view_as(hidden), None
    routing = route(layer.feed_forward, normed)
    return hidden + experts(layer.feed_forward, normed, routing).view_as(hidden), routing


def feed_forward_input(
    config: ModelConfig, layer: DecoderLayer, hidden: torch.Tensor
) -> torch.Tensor:
    """What the router, the experts or the dense feed-forward see: `[S, T, D]` -> `[S*T, D]`."""
    return rms_norm(hidden, layer.post_norm, config.rms_eps).flatten(0, -2)


def attention(config: ModelConfig, layer: DecoderLayer, hidden: torch.Tensor) -> torch.Tensor:
    """What `o` is applied to: `[S, T, D]` -> `[S, T, H * head_dim]`.

    Of a long sequence POSITIONS_TOGETHER are in work at a time; a global layer holds the keys and
    values of all.
    """
    length = hidden.shape[1]
    if layer.index in config.chunked_layers:
        step = max(POSITIONS_TOGETHER // config.chunk_size, 1) * config.chunk_size
        return _joined(
            _chunked_attention(*_heads(config, layer, hidden, span), config.chunk_size)
            for span in _spans(0, length, step)
        )
    whole = slice(0, min(length, POSITIONS_TOGETHER))
    first = _heads(config, layer, hidden, whole)
    mixed = [_causal_attention(*first)]
    if whole.stop == length:
        return mixed[0]

    def normed(span: slice) -> torch.Tensor:
        return rms_norm(hidden[:, span], layer.input_norm, config.rms_eps)

    pairs = [
        first[1:],
        *(
            _keys_values(config, layer, normed(span), span)
            for span in _spans(whole.stop, length, POSITIONS_TOGETHER)
        ),
    ]
    k, v = (torch.cat(parts, dim=1).transpose(1, 2) for parts in zip(*pairs, strict=True))
    for span in _spans(whole.stop, length, QUERIES_TOGETHER):
        q = _queries(config, layer, normed(span), span).transpose(1, 2)
        mixed.append(_last_attention(q, k[:, :, : span.stop], v[:, :, : span.stop]))
    return torch.cat(mixed, dim=1)


def _joined(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """Along the positions; a single part is not copied."""
    every = list(parts)
    return every[0] if len(every) == 1 else torch.cat(every, dim=1)


def _spans(start: int, stop: int, step: int) -> list[slice]:
    """Positions, so many at a time."""
    return [slice(at, min(at + step, stop)) for at in range(start, stop, step)]


def _heads(
    config: ModelConfig, layer: DecoderLayer, hidden: torch.Tensor, span: slice
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries `[S, n, H, head_dim]`, keys and values `[S, n, KV, head_dim]` of some positions."""
    normed = rms_norm(hidden[:, span], layer.input_norm, config.rms_eps)
    return _queries(config, layer, normed, span), *_keys_values(config, layer, normed, span)


def _queries(
    config: ModelConfig, layer: DecoderLayer, normed: torch.Tensor, span: slice
) -> torch.Tensor:
    q: torch.Tensor = (normed @ layer.q).unflatten(-1, (config.num_heads, config.head_dim))
    positions = torch.arange(span.start, span.stop, device=normed.device)
    if layer.index in config.rope_layers:
        return _with_positions(config, q, positions)
    if config.temperature_tuning:
        q = (q * temperature(config, positions)[:, None, None]).to(q.dtype)
    return q


def _keys_values(
    config: ModelConfig, layer: DecoderLayer, normed: torch.Tensor, span: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    k = (normed @ layer.k).unflatten(-1, (config.num_kv_heads, config.head_dim))
    v = (normed @ layer.v).unflatten(-1, (config.num_kv_heads, config.head_dim))
    if layer.index in config.rope_layers:
        positions = torch.arange(span.start, span.stop, device=normed.device)
        k = _with_positions(config, k, positions)
    if layer.cache is not None:
        return layer.cache.keys(k), layer.cache.values(v)
    return k, v


def largest_keys_values(
    config: ModelConfig, layer: DecoderLayer, hidden: torch.Tensor
) -> tuple[float, float]:
    """The largest size of a key and of a value that hidden states `[S, T, D]` give."""
    found = [(float(k.abs().max()), float(v.abs().max())) for k, v in _kept(config, layer, hidden)]
    keys, values = zip(*found, strict=True)
    return max(keys), max(values)


def cut_keys_values(
    config: ModelConfig, layer: DecoderLayer, hidden: torch.Tensor
) -> tuple[int, int, int]:
    """Of the keys that hidden states `[S, T, D]` give how many numbers are too large for the
    layer's cache, of the values, and how many there are of either."""
    keys = values = every = 0
    if layer.cache is not None:
        for k, v in _kept(config, replace(layer, cache=None), hidden):
            found = layer.cache.cut(k, v)
            keys, values, every = keys + found[0], values + found[1], every + k.numel()
    return keys, values, every


def _kept(
    config: ModelConfig, layer: DecoderLayer, hidden: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values as attention reads them, POSITIONS_TOGETHER at a time."""
    for span in _spans(0, hidden.shape[1], POSITIONS_TOGETHER):
        normed = rms_norm(hidden[:, span], layer.input_norm, config.rms_eps)
        yield _keys_values(config, layer, normed, span)


def _with_positions(
    config: ModelConfig, heads: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Queries or keys of a layer with rotary positions."""
    turned = rotate(heads, rotary_angles(config, positions))
    return _normalized(turned, config.rms_eps) if config.qk_norm else turned


def _chunked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunk: int
) -> torch.Tensor:
    """Each position sees those before it in its own chunk; the last chunk may be shorter."""
    length = q.shape[1]
    whole = length - length % chunk
    parts = []
    if whole:
        folded = [x[:, :whole].unflatten(1, (-1, chunk)).flatten(0, 1) for x in (q, k, v)]
        parts.append(_causal_attention(*folded).unflatten(0, (q.shape[0], -1)).flatten(1, 2))
    if whole < length:
        parts.append(_causal_attention(q[:, whole:], k[:, whole:], v[:, whole:]))
    return _joined(parts)


def _causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`[S, T, heads, head_dim]` each -> `[S, T, H * head_dim]`; the kernel builds no mask."""
    repeats = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
    with _fused(q.device):
        mixed = functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
    return mixed.transpose(1, 2).flatten(2)


def _last_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Queries `[S, H, n, head_dim]` of the last positions that keys and values
    `[S, KV, T, head_dim]` have -> `[S, n, H * head_dim]`."""
    from torch.nn.attention.bias import causal_lower_right  # which imports TorchDynamo: seconds

    seen = causal_lower_right(q.shape[2], k.shape[2])
    with _fused(q.device):
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    return mixed.transpose(1, 2).flatten(2)


def _fused(device: torch.device) -> AbstractContextManager[None]:
    """On a GPU the kernels that hold no `[T, T]` scores; where none fits, an error tells so.

    The CPU's own choice is such a one for every shape that Llama 4 has.
    """
    if device.type == "cpu":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION])


def temperature(config: ModelConfig, positions: torch.Tensor) -> torch.Tensor:
    """The factor on queries of layers without positions, `[T]` F32 (arXiv 2501.19399)."""
    steps = torch.floor((positions.float() + 1.0) / config.floor_scale)
    return torch.log1p(steps) * config.attn_scale + 1.0


def rotary_angles(config: ModelConfig, positions: torch.Tensor) -> torch.Tensor:
    """Angles `[T, head_dim / 2]` in radians.

    Source: transformers' `_compute_llama3_parameters`.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device).float()
    frequencies = 1.0 / config.rope_theta ** (exponents / config.head_dim)
    return positions.float()[:, None] * _scaled_frequencies(config, frequencies)


def _scaled_frequencies(config: ModelConfig, frequencies: torch.Tensor) -> torch.Tensor:
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    longest = scaling.original_max_position / scaling.low_freq_factor
    shortest = scaling.original_max_position / scaling.high_freq_factor
    slowed = torch.where(wavelengths > longest, frequencies / scaling.factor, frequencies)
    if longest == shortest:  # Scout: no band in between
        return slowed
    weight = (scaling.original_max_position / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - weight) * frequencies / scaling.factor + weight * frequencies
    return torch.where((wavelengths >= shortest) & (wavelengths <= longest), between, slowed)


def rotate(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring pairs of `[S, T, H, head_dim]` as complex numbers, in F32."""
    pairs = torch.view_as_complex(heads.float().unflatten(-1, (-1, 2)))
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None, :]
    return torch.view_as_real(turned).flatten(-2).to(heads.dtype)


def route(moe: Moe, inputs: torch.Tensor) -> Routing:
    """Top-1 routing of `[N, D]`: the arg max expert and the sigmoid of its logit."""
    best, expert = (inputs @ moe.router).max(dim=-1)
    return Routing(expert, torch.sigmoid(best.float()).to(inputs.dtype)[:, None])


def experts(moe: Moe, inputs: torch.Tensor, routing: Routing) -> torch.Tensor:
    """The shared expert on all rows of `[N, D]` plus each row's own expert on its scaled row."""
    out = moe.shared(inputs)
    for number, expert in enumerate(moe.experts):
        rows = routing.rows(number)
        if len(rows):
            out[rows] += expert(inputs[rows] * routing.score[rows])
    return out


def logits(config: ModelConfig, head: Head, hidden: torch.Tensor) -> torch.Tensor:
    """Scores of the next token, `[N, D]` -> `[N, vocabulary]`."""
    return rms_norm(hidden, head.norm, config.rms_eps) @ head.output
