"""What a streamed forward holds in memory, in bytes, from sizes alone.

Each figure says of what the code holds at its worst moment. Knows nothing of calibration, of
evaluation or of budgets.
"""

from __future__ import annotations

from collections.abc import Sequence

from .config import ModelConfig
from .model import POSITIONS_TOGETHER
from .stream import POSITIONS_AT_ONCE, TOKENS_AT_ONCE

Shape = tuple[int, int]  # sequences, tokens of each

BF16, F32 = 2, 4  # bytes of a value

# Interpreter, PyTorch and the product libraries' own buffers, tokenizer and text: 0.36 GB before
# the first token was drawn; and what freed memory in pieces of other sizes takes, up to 0.1 GB
# more when the machine is busy with other things.
RUNTIME = 650 * 10**6


def table(config: ModelConfig) -> int:
    """Embedding or head."""
    return BF16 * config.vocab_size * config.hidden_size


def layer(config: ModelConfig, index: int) -> int:
    """A layer without its routed experts."""
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    size = config.dense_size
    if index in config.moe_layers:
        heads += config.num_experts
        size = config.expert_size
    return BF16 * config.hidden_size * (heads + 3 * size)


def expert(config: ModelConfig) -> int:
    """A routed expert."""
    return 3 * BF16 * config.hidden_size * config.expert_size


def attention(config: ModelConfig, shapes: Sequence[Shape]) -> int:
    """One call: 18 bytes a value of the stream, in BF16 and once in F32 for the norm; 24 for each
    of queries and outputs, rotated in F32, and of keys and values, repeated for all heads.

    Of what is longer than one piece all keys and values, outputs and sums, each joined once.
    """
    heads, pairs = config.num_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
    longest = max(length for _, length in shapes)
    rows = max(
        min(length, POSITIONS_TOGETHER) * max(1, TOKENS_AT_ONCE // length) for _, length in shapes
    )
    nbytes = rows * (18 * config.hidden_size + 24 * heads)
    if longest > POSITIONS_TOGETHER:
        nbytes += 2 * BF16 * longest * (pairs + heads + 2 * config.hidden_size)
    return nbytes


def predictions(config: ModelConfig, windows: Sequence[Shape]) -> int:
    """Of some positions: logits of both models, in BF16, F32 and as logarithms, and their KL."""
    longest = max((length for _, length in windows), default=0)
    return 24 * min(longest, POSITIONS_AT_ONCE) * config.vocab_size
