"""How far a stored weight may be from its source: enough for honest codes, too little for others.

Knows nothing of files or models.

Plain rounding can be repeated, so what it loses is the bound. Codes that were solved for have no
bound of half a step, nor any on their distance: they carry each other's errors, and make up for
earlier layers in directions that few tokens use, on the pocket model by up to 2.4 times an output.
But nearly all of that is at right angles to the source. The gain, <source, found> / <source,
source>, stays near 1, and tells what must not happen: another expert, a transposed or a lost weight
has about 0, a wrong scale its factor. It is measured against 1 with what plain rounding loses of
this weight, `e` = |rounded - source| / |source|, as the unit, which makes one rule for all schemes:

    whole weight  |gain - 1| <= 0.5 e + 0.05        found at most 0.16 e + 0.012
    one output    |gain - 1| <= 2 e + 0.3           found at most 1.8 e

Found on all shipped recipes of the pocket model, 4,096 to 262,144 calibration tokens, and on random
models with 192. The summands are for fine schemes, which correct what coarse ones have damaged.
"""

from __future__ import annotations

import torch

from . import bnb
from .recipe import Method
from .schemes import Scheme, round_to_nearest

WHOLE = 0.5, 0.05
OUTPUT = 2.0, 0.3
TIES = 1.01  # a GPU may break them otherwise, and bitsandbytes has statistics of its own


def damage(weight: torch.Tensor, found: torch.Tensor, scheme: Scheme, method: Method) -> str | None:
    """What is wrong with `found` as the stored form of `weight`, both F32 `[I, O]`, or None."""
    if not scheme.quantizes:
        return None if torch.equal(weight, found) else "is not the source's"
    lost, wrong = _rounded(weight, scheme) - weight, found - weight
    if method is Method.GPTQ and scheme.calibrates:
        return _gain_damage(weight, lost, wrong)
    beyond = wrong.norm(dim=0) > TIES * lost.norm(dim=0)
    if not beyond.any():
        return None
    return f"is farther from the source than its rounding in output {int(beyond.nonzero()[0])}"


def _rounded(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    if scheme.bitsandbytes:
        return bnb.quantize(weight, scheme).dequantize()
    return round_to_nearest(weight, scheme).dequantize()


def _gain_damage(weight: torch.Tensor, lost: torch.Tensor, wrong: torch.Tensor) -> str | None:
    along = (weight * wrong).sum(dim=0)  # [O], the gain less 1 times |weight|^2
    sizes, losses = weight.norm(dim=0), lost.norm(dim=0)
    if _beyond(along.sum(), sizes.norm(), losses.norm(), WHOLE):
        gain = 1 + float(along.sum() / sizes.norm() ** 2)
        return f"has a gain of {gain:.3f} along the source, which is not near 1"
    beyond = _beyond(along, sizes, losses, OUTPUT)
    if beyond.any():
        first = int(beyond.nonzero()[0])
        gain = 1 + float(along[first] / sizes[first] ** 2)
        return f"has a gain of {gain:.3f} along the source in output {first}, which is not near 1"
    return None


def _beyond(
    along: torch.Tensor, size: torch.Tensor, lost: torch.Tensor, bound: tuple[float, float]
) -> torch.Tensor:
    """Without a division: an output of zeros may be given something to do."""
    times, share = bound
    return along.abs() > size * (times * lost + share * size)
