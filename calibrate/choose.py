"""Of more sequences than are needed, those that reach the experts best.

The original model reads all candidates once and tells which expert each token goes to. Sequences
are then taken greedily so that the sum over all experts of the root of their tokens grows most: an
expert that has few gains most by one more, and nothing is gained by drowning the popular ones. The
idea of balancing text over experts is MoEQuant's (arXiv 2505.03804). Knows nothing of codes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from llama4q.prefetch import prefetched
from llama4q.stream import advance, embed
from llama4q.weights import LayerReader


@torch.inference_mode()
def expert_counts(
    reader: LayerReader, tokens: torch.Tensor, layer_done: Callable[[], None]
) -> torch.Tensor:
    """How many tokens of each sequence `[S, T]` go to each expert, `[S, layers * E]` int64."""
    config = reader.config
    hidden = embed(reader.embedding(), [tokens])
    counts = []
    for layer in prefetched(reader.layer, range(config.num_layers)):
        routing = advance(config, layer, hidden)
        if routing is not None:
            chosen = routing.expert.view(len(tokens), -1)
            found = torch.zeros(len(tokens), config.num_experts, dtype=torch.int64)
            counts.append(found.scatter_add_(1, chosen, torch.ones_like(chosen)))
        layer_done()
    return torch.cat(counts, dim=1)


def best_covering(counts: torch.Tensor, keep: int) -> list[int]:
    """The numbers of `keep` sequences, in order, given `counts [S, experts]`."""
    left = list(range(len(counts)))
    have = torch.zeros(counts.shape[1], dtype=torch.float64)
    chosen = []
    for _ in range(keep):
        gains = ((have + counts[left]).sqrt() - have.sqrt()).sum(dim=1)
        best = left.pop(int(gains.argmax()))
        have += counts[best]
        chosen.append(best)
    return sorted(chosen)
