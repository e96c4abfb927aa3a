"""The pocket Llama 4's training forward, on a dictionary of weights in the official layout.

Knows nothing of files, text or optimisers. The mathematics is that of transformers'
modeling_llama4.py, which `report.py` compares it with; two things are done differently for speed:
only the routed rows of an expert are computed (tokens are sorted by expert), and a local layer
attends within rows of one chunk each, so that no mask is ever built.

The names in the dictionary are the checkpoint's own, and so is the layout (expert matrices fused
and transposed), so that saving is a cast and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.pocket.config import PocketConfig

Weights = dict[str, Tensor]
TEXT = "language_model."


@dataclass(frozen=True)
class Output:
    """What one pass gives: last hidden states, balance loss, and tokens by MoE layer and expert."""

    hidden: Tensor
    balance: Tensor
    loads: Tensor


def layer_prefix(layer: int) -> str:
    return f"{TEXT}model.layers.{layer}."


def initial_weights(config: PocketConfig, deviation: float, seed: int) -> Weights:
    """Random text weights; what writes into the residual stream starts smaller."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * (deviation * scale)

    width = config.hidden
    query, key_value = config.query_heads * config.head, config.key_value_heads * config.head
    outward = 1 / math.sqrt(2 * config.layers)
    weights = {f"{TEXT}model.embed_tokens.weight": random(config.vocabulary, width)}
    for layer in range(config.layers):
        prefix = layer_prefix(layer)
        weights |= {
            f"{prefix}input_layernorm.weight": torch.ones(width),
            f"{prefix}self_attn.q_proj.weight": random(query, width),
            f"{prefix}self_attn.k_proj.weight": random(key_value, width),
            f"{prefix}self_attn.v_proj.weight": random(key_value, width),
            f"{prefix}self_attn.o_proj.weight": random(width, query, scale=outward),
            f"{prefix}post_attention_layernorm.weight": torch.ones(width),
        }
        weights |= _initial_feed_forward(config, layer, random, outward)
    weights[f"{TEXT}model.norm.weight"] = torch.ones(width)
    weights[f"{TEXT}lm_head.weight"] = random(config.vocabulary, width)
    return weights


def _initial_feed_forward(
    config: PocketConfig, layer: int, random: Callable[..., Tensor], outward: float
) -> Weights:
    prefix = f"{layer_prefix(layer)}feed_forward."
    width, expert = config.hidden, config.expert_width

    def mlp(prefix: str, inner: int) -> Weights:
        return {
            f"{prefix}gate_proj.weight": random(inner, width),
            f"{prefix}up_proj.weight": random(inner, width),
            f"{prefix}down_proj.weight": random(width, inner, scale=outward),
        }

    if not config.is_moe(layer):
        return mlp(prefix, config.dense_width)
    return {
        f"{prefix}router.weight": random(config.experts, width),
        f"{prefix}experts.gate_up_proj": random(config.experts, width, 2 * expert),
        f"{prefix}experts.down_proj": random(config.experts, expert, width, scale=outward),
        **mlp(f"{prefix}shared_expert.", expert),
    }


# Elementwise pieces. They cost more than the matrix products on a CPU, so that the trainer may
# replace them by their compiled selves (`compile_pieces`); each keeps its shape over a whole run.


def _norm(hidden: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    scaled = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)
    return (scaled * weight).to(dtype)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (functional.silu(gate) * up).to(gate_up.dtype)


def _rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """RoPE on interleaved pairs; [tokens, heads, head]."""
    pairs = states.float().unflatten(-1, (-1, 2))
    even, odd = pairs.unbind(-1)
    cosine, sine = cosine[:, None], sine[:, None]
    turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), -1).flatten(-2)
    return turned.to(states.dtype)


def _rotate_and_norm(states: Tensor, cosine: Tensor, sine: Tensor, eps: float) -> Tensor:
    """RoPE, then the L2 norm over the head."""
    turned = _rotate(states.float(), cosine, sine)
    scaled = turned * torch.rsqrt(turned.pow(2).mean(-1, keepdim=True) + eps)
    return scaled.to(states.dtype)


def _add(hidden: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return hidden + first + second


def _token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    scores = logits.float()
    own = scores.gather(1, targets[:, None])[:, 0]
    return scores.logsumexp(1) - own


_PIECES: dict[str, Callable[..., Tensor]] = {
    "norm": _norm,
    "swiglu": _swiglu,
    "rotate": _rotate,
    "rotate and norm": _rotate_and_norm,
    "add": _add,
    "losses": _token_losses,
}


def compile_pieces() -> None:
    """Fuse the elementwise pieces (needs a C++ compiler); about a third faster on two cores."""
    for name, piece in list(_PIECES.items()):
        _PIECES[name] = torch.compile(piece, dynamic=False)


class _GroupedMatmul(torch.autograd.Function):
    """Rows sorted by expert times each expert's own matrix [E, in, out]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrices: Tensor, ends: list[int]) -> Tensor:
        ctx.save_for_backward(rows, matrices)
        ctx.ends = ends
        out = rows.new_empty(rows.shape[0], matrices.shape[2])
        for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if end > start:
                torch.mm(rows[start:end], matrices[expert], out=out[start:end])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, matrices = ctx.saved_tensors
        grad = grad.contiguous()
        grad_rows = torch.empty_like(rows)
        grad_matrices = torch.zeros_like(matrices)
        for expert, (start, end) in enumerate(zip([0, *ctx.ends], ctx.ends, strict=False)):
            if end > start:
                torch.mm(grad[start:end], matrices[expert].t(), out=grad_rows[start:end])
                grad_matrices[expert] = rows[start:end].t() @ grad[start:end]
        return grad_rows, grad_matrices, None


class _Permute(torch.autograd.Function):
    """Rows in another order; the gradient is a plain gather too, not a scatter."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.back), None, None


_grouped_matmul: Callable[..., Tensor] = _GroupedMatmul.apply
_permute: Callable[..., Tensor] = _Permute.apply


def rope_tables(config: PocketConfig, length: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine [length, head / 2] with the llama3 scaling of low frequencies."""
    exponents = torch.arange(0, config.head, 2).float() / config.head
    frequencies = 1.0 / config.rope_theta**exponents
    # low_freq_factor and high_freq_factor are equal: a frequency is scaled or not, nothing between.
    slow = 2 * math.pi / frequencies > config.rope_original
    frequencies = torch.where(slow, frequencies / config.rope_factor, frequencies)
    angles = torch.arange(length).float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def _attention(
    weights: Weights,
    config: PocketConfig,
    layer: int,
    normed: Tensor,
    shape: tuple[int, int],
    rope: tuple[Tensor, Tensor],
) -> Tensor:
    prefix = f"{layer_prefix(layer)}self_attn."
    rows, length = shape
    widths = [config.query_heads * config.head] + 2 * [config.key_value_heads * config.head]
    stacked = torch.cat([weights[f"{prefix}{name}_proj.weight"] for name in "qkv"])
    query, key, value = functional.linear(normed, stacked).split(widths, dim=-1)
    query = query.unflatten(-1, (-1, config.head))
    key = key.unflatten(-1, (-1, config.head))
    value = value.unflatten(-1, (-1, config.head))
    if config.is_global(layer):
        steps = torch.arange(length) + 1.0
        heat = torch.log1p(torch.floor(steps / config.floor_scale)) * config.attention_scale + 1.0
        query = (query * heat.repeat(rows)[:, None, None]).to(normed.dtype)
        part = length
    else:
        both = torch.cat((query, key), dim=1)
        if config.qk_norm:
            both = _PIECES["rotate and norm"](both, *rope, config.norm_eps)
        else:
            both = _PIECES["rotate"](both, *rope)
        query, key = both.split((config.query_heads, config.key_value_heads), dim=1)
        part = min(config.chunk, length)
    if length % part:
        raise ValueError(f"{length} tokens are no whole number of chunks of {part}: pad the rows.")
    groups = config.query_heads // config.key_value_heads

    def by_part(states: Tensor, repeats: int) -> Tensor:
        states = states.unflatten(0, (-1, part)).transpose(1, 2)
        return states.repeat_interleave(repeats, dim=1) if repeats > 1 else states

    mixed = functional.scaled_dot_product_attention(
        by_part(query, 1), by_part(key, groups), by_part(value, groups), is_causal=True
    )
    mixed = mixed.transpose(1, 2).reshape(rows * length, -1)
    return functional.linear(mixed, weights[f"{prefix}o_proj.weight"])


def _experts(
    weights: Weights, config: PocketConfig, layer: int, normed: Tensor, router: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shared part, routed part, balance loss, tokens by expert."""
    prefix = f"{layer_prefix(layer)}feed_forward."
    scores = functional.linear(normed.float(), router)
    top, chosen = scores.max(dim=-1)
    counts = torch.bincount(chosen, minlength=config.experts)
    share = counts / counts.sum()
    balance = config.experts * (share * scores.softmax(-1).mean(0)).sum()

    order = chosen.argsort(stable=True)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    ends: list[int] = counts.cumsum(0).tolist()
    # The sigmoid of the winning score multiplies the expert's input, not its output.
    scaled = normed * top.sigmoid()[:, None].to(normed.dtype)
    sorted_rows = _permute(scaled, order, back)
    gate_up = _grouped_matmul(sorted_rows, weights[f"{prefix}experts.gate_up_proj"], ends)
    inner = _PIECES["swiglu"](gate_up)
    routed = _grouped_matmul(inner, weights[f"{prefix}experts.down_proj"], ends)
    routed = _permute(routed, back, order)

    return _mlp(weights, f"{prefix}shared_expert.", normed), routed, balance, counts


def _mlp(weights: Weights, prefix: str, normed: Tensor) -> Tensor:
    stacked = torch.cat([weights[f"{prefix}{name}_proj.weight"] for name in ("gate", "up")])
    inner = _PIECES["swiglu"](functional.linear(normed, stacked))
    return functional.linear(inner, weights[f"{prefix}down_proj.weight"])


def forward(
    weights: Weights, config: PocketConfig, tokens: Tensor, dtype: torch.dtype = torch.bfloat16
) -> Output:
    """Hidden states after the last norm, [rows * length, hidden]; matrix products in `dtype`.

    Residual stream, norms' inside and router stay in float32.
    """
    rows, length = tokens.shape
    cast = {
        name: weight.to(dtype) if weight.dim() > 1 and ".router." not in name else weight
        for name, weight in weights.items()
        if ".embed_tokens." not in name
    }
    cosine, sine = rope_tables(config, length)
    rope = (cosine.repeat(rows, 1), sine.repeat(rows, 1))
    hidden = functional.embedding(tokens.flatten(), weights[f"{TEXT}model.embed_tokens.weight"])
    balance = hidden.new_zeros(())
    loads = []
    norm = _PIECES["norm"]
    for layer in range(config.layers):
        prefix = layer_prefix(layer)
        normed = norm(hidden, cast[f"{prefix}input_layernorm.weight"], config.norm_eps, dtype)
        hidden = hidden + _attention(cast, config, layer, normed, (rows, length), rope)
        weight = cast[f"{prefix}post_attention_layernorm.weight"]
        normed = norm(hidden, weight, config.norm_eps, dtype)
        if not config.is_moe(layer):
            hidden = hidden + _mlp(cast, f"{prefix}feed_forward.", normed)
            continue
        router = weights[f"{prefix}feed_forward.router.weight"]
        shared, routed, layer_balance, counts = _experts(cast, config, layer, normed, router)
        hidden = _PIECES["add"](hidden, shared, routed)
        balance = balance + layer_balance / config.layers
        loads.append(counts)
    hidden = norm(hidden, cast[f"{TEXT}model.norm.weight"], config.norm_eps, dtype)
    found = torch.stack(loads) if loads else torch.ones(1, 1)
    return Output(hidden, balance, found)


def logits(weights: Weights, hidden: Tensor) -> Tensor:
    return functional.linear(hidden, weights[f"{TEXT}lm_head.weight"].to(hidden.dtype))


def token_losses(weights: Weights, hidden: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each row of `hidden` against its own target token."""
    return _PIECES["losses"](logits(weights, hidden), targets)
