"""What did not go the usual way, and what made the report: enough to make it again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..figures import Report
from ..wording import count, drawn, measured, number, part, size
from .element import Child, Markup, element
from .section import Section, said, section
from .table import Row, behind, table

LISTED = 200  # rescues in the page; a report may have thousands


def rescues(report: Report) -> Section | None:
    """Rescues by kind and tensor, and warnings; None for a report that knows of neither."""
    found = report.get("rescues")
    warnings = [
        part(report, "calibration", "coverage").get("warning"),
        _settings(part(report, "evidence").get("other_settings") or []),
    ]
    if found is None and not any(warnings):
        return None
    return section(
        "Rescues and warnings",
        [element("p", warning, class_="warning") for warning in warnings if warning],
        _rescued(found) if found else None,
        said("No weight needed a rescue.") if found == [] else None,
    )


def _settings(differing: Sequence[Mapping[str, Any]]) -> str | None:
    """Where the two config.json differ: the checkpoints are then not the same model."""
    told = [f"{one['setting']} is {one['original']}, then {one['quantized']}" for one in differing]
    return f"The two config.json differ: {'; '.join(told)}." if told else None


def _rescued(found: Sequence[Mapping[str, Any]]) -> list[Markup]:
    kinds = Counter(str(rescue.get("kind")) for rescue in found)
    told = ", ".join(f"{count(held)} × {kind}" for kind, held in kinds.most_common())
    rows = [
        (str(rescue.get("tensor")), rescue.get("kind"), rescue.get("detail"))
        for rescue in found[:LISTED]
    ]
    more = len(found) - LISTED
    return [
        said(f"Weights that did not go the usual way: {told}."),
        behind(
            table("Rescues by tensor", ("tensor", "kind", "detail"), rows, "words sortable"),
            f"Which weights ({count(len(found))})",
        ),
        *([said(f"{count(more)} more are in report.json.")] if more > 0 else []),
    ]


def provenance(report: Report) -> Section:
    """What was read, with which settings, versions, seeds and digests."""
    facts = [(name, value) for name, value in _facts(report) if value]
    files = part(report, "files")
    return section(
        "Provenance",
        element(
            "dl",
            [element("div", element("dt", name), element("dd", value)) for name, value in facts],
            class_="facts",
        ),
        behind(
            table("SHA-256 of the shards", ("file", "SHA-256"), _digests(files), "words"),
            f"SHA-256 of {count(len(files))} shards",
        )
        if files
        else None,
    )


def _digests(files: Mapping[str, str]) -> list[Row]:
    return [(name, element("code", digest)) for name, digest in files.items()]


def _facts(report: Report) -> Iterable[tuple[str, Child]]:
    calibration = part(report, "calibration")
    likelihood = part(report, "evidence", "likelihood")
    retrieval = part(report, "evidence", "retrieval")
    verified = part(report, "verified")
    yield "original", _checkpoint(part(report, "source"))
    yield "quantized", _checkpoint(part(report, "quantized"))
    yield "recipe", _recipe(part(report, "recipe"))
    yield "calibration", drawn(calibration) if calibration else None
    yield "calibration digest", _code(calibration.get("digest"))
    yield "evaluation text", measured(likelihood) if likelihood else None
    yield "evaluation digest", _code(likelihood.get("digest"))
    yield "retrieval", _asked(retrieval) if retrieval else None
    yield "retrieval digest", _code(retrieval.get("digest"))
    yield "arithmetic", report.get("dtype")
    yield "solver", report.get("kernel")
    yield "products", report.get("products")
    yield "verified", _verified(verified) if verified else None
    seconds = part(report, "seconds").get("total")
    yield "time", None if seconds is None else f"{number(seconds)} s for the layers"
    yield "versions", ", ".join(f"{name} {v}" for name, v in part(report, "versions").items())
    yield "llama4q", report.get("llama4q")
    yield "created", report.get("created")
    yield "command", _code(report.get("command"))


def _code(text: str | None) -> Markup | None:
    return element("code", text) if text else None


def _checkpoint(side: Mapping[str, Any]) -> str | None:
    if not side.get("name"):
        return None
    revision = f" at {side['revision']}" if side.get("revision") else ""
    nbytes = f", {size(side['bytes'])}" if side.get("bytes") else ""
    return f"{side['name']}{revision}{nbytes}"


def _recipe(recipe: Mapping[str, Any]) -> str | None:
    if not recipe:
        return None
    schemes = ", ".join(f"{name} {scheme}" for name, scheme in part(recipe, "schemes").items())
    return f"{recipe.get('name')}: {schemes.replace('_', ' ')}"


def _asked(retrieval: Mapping[str, Any]) -> str:
    return f"{count(retrieval.get('prompts'))} prompts, seed {retrieval.get('seed')}"


def _verified(verified: Mapping[str, Any]) -> str:
    return (
        f"{count(verified.get('tensors'))} tensors, {count(verified.get('scales'))} scales, "
        f"{count(verified.get('untouched'))} tensors bit for bit the original's"
    )
