"""How much an error in the residual stream matters: more in the directions that routers look in.

Most of what quantization costs a mixture of experts is tokens that a later router sends to another
expert: on the pocket Scout, 0.53 of the divergence goes when the original's routing is forced. The
router of layer k sees U_k^T h, U_k = diag(norm_k) R_k less its mean over experts, as only
differences of logits count. An error e of an output that goes into the residual stream before
layer l + 1 is still there at all later routers, so it is weighed by

    e^T M_l e,    M_l = I + weight D sum_{k>l} U_k U_k^T / |U_k|^2.

The idea of an output metric is YAQA's (arXiv 2505.22988), which takes it from gradients of the
whole model; this one needs the routers alone. Knows nothing of how codes are found.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from llama4q.weights import LayerReader


def views(reader: LayerReader) -> dict[int, torch.Tensor]:
    """What the router of each layer that has one sees of the stream: `[D, E]` F32 of norm 1."""
    return {index: view(*reader.router(index)) for index in sorted(reader.config.moe_layers)}


def view(norm: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
    """Of a router `[D, E]` behind a norm `[D]`; all zeros where it tells no experts apart."""
    seen = norm.float()[:, None] * router.float()
    seen = seen - seen.mean(dim=1, keepdim=True)
    size = seen.norm()
    return seen / size if size > 0 else seen


def output_metric(
    seen: Mapping[int, torch.Tensor], index: int, weight: float
) -> torch.Tensor | None:
    """M `[D, D]` for outputs of layer `index`; None where no later router counts."""
    later = [one for layer, one in seen.items() if layer > index]
    if not later or not weight:
        return None
    joined = torch.cat(later, dim=1)
    width = len(joined)
    return torch.eye(width, device=joined.device).addmm_(joined, joined.T, alpha=weight * width)
