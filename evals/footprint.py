"""What an evaluation holds in memory beside the hidden states of both models, from sizes alone.

Knows nothing of budgets.
"""

from __future__ import annotations

from llama4q import footprint
from llama4q.config import ModelConfig

from . import retrieval
from .questions import Questions

SIDES = 2  # original and quantized: layers and experts are read for both, and ahead


def held(config: ModelConfig, questions: Questions) -> int:
    """Bytes at the worst moment: some layer's attention, or the predictions of a window."""
    batches = [questions.windows, *retrieval.batches(questions.prompts)]
    shapes = [(batch.shape[0], batch.shape[1]) for batch in batches]
    largest = max(footprint.layer(config, index) for index in range(config.num_layers))
    expert = footprint.expert(config) if config.moe_layers else 0
    # codes and F32 values of what is being decoded, beside the one in use and the next one
    decoded = 4 * max(largest, expert)
    layers = 2 * SIDES * largest + 2 * expert + decoded + footprint.attention(config, shapes)
    windows = [(len(questions.windows), questions.windows.shape[1])]
    heads = SIDES * footprint.table(config) + footprint.predictions(config, windows)
    return footprint.RUNTIME + max(layers, heads)
