"""Where a figure's loss comes from: the layer, or the task and the length.

Knows nothing of limits or verdicts.
"""

from __future__ import annotations

import math
import statistics
from itertools import pairwise

from .figures import FIGURES, Figure, Report, Section, entries, gains_of, same_sample

STANDS_OUT = 10  # times the usual distance of an expert's gain from its neighbours'


def where_to_look(figure: Figure, report: Report, baseline: Report) -> str:
    """What stands out behind a figure, in a line; empty where the report tells no more.

    A baseline about the same tokens tells a fault from what is large in any case; `{}` for none.
    """
    if figure.name == "other_settings":
        found = [_setting(one) for one in entries(report, "evidence.other_settings") or []]
    elif figure.section is Section.LIKELIHOOD:
        known = same_sample(figure.section, report, baseline)
        expert = _expert(report)
        # without a baseline a jump may be what is usual there
        jump = "" if expert and not known else _jump(report, baseline if known else {})
        found = [jump, expert, _routing(report)]
    elif figure.section is Section.RETRIEVAL:
        found = [
            _fell_most(report, f"retrieval.{parts}.difference") for parts in ("tasks", "lengths")
        ]
    else:
        found = []
    return "; ".join(part for part in found if part)


def _jump(report: Report, baseline: Report) -> str:
    """The layer in which the error of the hidden states grows most, or most beyond the baseline."""
    errors, usual = (_by_place("layers.hidden_error", one) for one in (report, baseline))
    if not errors:
        return ""
    if errors.keys() == usual.keys():
        jumps, before = (_by_place("layers.jump", one) for one in (report, baseline))
        growth = {layer: _ratio(jump, before[layer]) for layer, jump in jumps.items()}
    else:
        steps = pairwise([0.0, *errors.values()])
        growth = {layer: now - then for layer, (then, now) in zip(errors, steps, strict=True)}
    layer = max(growth, key=growth.__getitem__)
    compared = f", in the baseline {usual[layer]:.4g}" if layer in usual else ""
    return f"layer {layer}: hidden_error jumps to {errors[layer]:.4g}{compared}"


def _expert(report: Report) -> str:
    """The expert whose gain is far from those of its neighbours; empty where there is none."""
    off = _by_place("layers.expert_gain", report)
    place = max(off, key=off.__getitem__, default="")
    if not place or off[place] <= STANDS_OUT * statistics.median(off.values()):
        return ""
    layer, _, expert = place.rpartition(".")
    layers = entries(report, "evidence.layers") or []
    [gains] = [gains_of(one) for one in layers if str(one.get("layer")) == layer]
    gain, middle = gains[int(expert)], statistics.median(gains.values())
    return f"layer {layer}, expert {expert}: gain {gain:.3f}, median of the layer {middle:.3f}"


def _setting(one: Report) -> str:
    return f"{one.get('setting')}: {one.get('quantized')}, in the original {one.get('original')}"


def _routing(report: Report) -> str:
    agreement = _by_place("layers.agreement", report)
    if not agreement:
        return ""
    layer = min(agreement, key=agreement.__getitem__)
    return f"routing agrees least in layer {layer}: {100 * agreement[layer]:.1f} %"


def _fell_most(report: Report, name: str) -> str:
    differences = _by_place(name, report)
    if not differences:
        return ""
    place = min(differences, key=differences.__getitem__)
    return f"{FIGURES[name].at(place)} fell most: {100 * differences[place]:+.1f} points"


def _by_place(name: str, report: Report) -> dict[str, float]:
    readings = FIGURES[name].read(report)
    return {one.place: one.value for one in readings if one.value is not None}


def _ratio(now: float, before: float) -> float:
    if before:
        return now / before
    return math.inf if now else 1.0
