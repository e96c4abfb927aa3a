"""Of more sequences than are needed, those that reach the experts best.

The original model reads all candidates once and tells which expert each token goes to. Sequences
are then taken greedily so that the sum over all experts of the root of their tokens grows most: an
expert that has few gains most by one more, and nothing is gained by drowning the popular ones. The
idea of balancing text over experts is MoEQuant's (arXiv 2505.03804). Knows nothing of codes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from llama4q.hidden import Spool
from llama4q.kept import Kept, Reached
from llama4q.prefetch import prefetched
from llama4q.stream import advance, embed
from llama4q.weights import LayerReader


@torch.inference_mode()
def expert_counts(
    reader: LayerReader,
    tokens: torch.Tensor,
    layer_done: Callable[[int], None],
    spool: Spool | None = None,
    kept: Kept | None = None,
) -> torch.Tensor:
    """How many tokens of each sequence `[S, T]` go to each expert, `[S, layers * E]` int64.

    `layer_done` is told the number of those that are. Hidden states lie in `spool`, without one in
    memory; with `kept` the pass goes on where an earlier start has come to.
    """
    config = reader.config
    hidden = embed(reader.embedding(), [tokens], spool)
    counts: list[list[list[int]]] = []  # by layer with experts, sequence, expert; JSON types
    begun = 0
    if kept is not None and (reached := kept.reached()) is not None:
        begun, counts = reached.layers, reached.found
        kept.take([hidden])
    layer_done(begun)
    for layer in prefetched(reader.layer, range(begun, config.num_layers)):
        routing = advance(config, layer, hidden)
        if routing is not None:
            chosen = routing.expert.view(len(tokens), -1)
            found = torch.zeros(len(tokens), config.num_experts, dtype=torch.int64)
            counts.append(found.scatter_add_(1, chosen, torch.ones_like(chosen)).tolist())
        if kept is not None:
            kept.keep(Reached(layer.index + 1, counts), [hidden])
        layer_done(layer.index + 1)
    return torch.cat([torch.tensor(found) for found in counts], dim=1)


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
