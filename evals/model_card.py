"""The model card of a published quantization: README.md, from its report, its licence and a name.

Everything in it is from the report; what the report does not have is left out. Knows nothing of
files, nor how a card is sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from llama4q.licence import BUILT_WITH, EU_CLAUSE, NOTICE_LINE, Licence

from .card import by_length, comparison, points, within
from .figures import Report
from .markdown import facts, plain, table
from .origin import changed, experts, method, provenance, short_scheme
from .serving import commands, engines, fit_line, schemes
from .wording import count, ends, measured, number, part, percent, signed, size

HUB = "https://huggingface.co"
TOOL = "llama4q"
RULER = "https://arxiv.org/abs/2404.06654"


@dataclass(frozen=True)
class Subject:
    """What a card is about, beside the report."""

    repo: str | None  # where it will be; None: not known yet
    licence: Licence
    base_model: str | None  # the original's Hub id
    multimodal: bool


def model_card(report: Report, subject: Subject) -> str:
    """The whole README.md."""
    sections = [
        _opening(report, subject),
        _section("Use it", _use(report, subject)),
        _section("Evaluation", _evaluation(report)),
        _section("What was changed", "\n\n".join(filter(None, [changed(report), method(report)]))),
        _section("Experts", experts(report)),
        _section("Limits", _limits(report, subject)),
        _section("Provenance", provenance(report)),
        _section("Make it again", _again(report, subject)),
        _section("Licence", _licence(subject)),
    ]
    body = "\n\n".join(section for section in sections if section)
    return f"---\n{_metadata(report, subject)}\n---\n\n{body}\n"


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _metadata(report: Report, subject: Subject) -> str:
    """YAML, by huggingface_hub."""
    from huggingface_hub import ModelCardData

    said = part(report, "source", "metadata")
    task = "image-text-to-text" if subject.multimodal else "text-generation"
    named: dict[str, Any] = dict(subject.licence.metadata)
    if subject.base_model:
        named |= {"base_model": subject.base_model, "base_model_relation": "quantized"}
    data = ModelCardData(
        **named,
        language=said.get("language"),
        library_name="transformers",
        pipeline_tag=said.get("pipeline_tag") or task,
        tags=list(_tags(report)),
    )
    return str(data.to_yaml())


def _tags(report: Report) -> Iterator[str]:
    used = schemes(report)
    yield from ("llama", "llama-4", "llama4", "moe", "quantized", TOOL)
    yield from sorted(used - {"bf16"})
    if used & {"bnb-nf4", "bnb-int8"}:
        yield "bitsandbytes"
    else:
        yield "compressed-tensors"
    if part(report, "recipe", "solver").get("method") == "gptq":
        yield "gptq"
    yield from (engine.lower() for engine in engines(report) if engine != "transformers")


# --- the sections ---


def _opening(report: Report, subject: Subject) -> str:
    """Title, what it is in two sentences, and the figures that decide."""
    original, scheme = _original(report, subject), short_scheme(report)
    built = f"**{BUILT_WITH}.** " if subject.licence.community else ""
    what = (
        f"{built}{original}, quantized to {scheme} with {TOOL}. This model was modified: most "
        f"weights were rounded to {scheme} codes as said [below](#what-was-changed); nothing was "
        f"retrained."
    )
    glance = facts("At a glance", _glance(report, subject))
    return f"# {plain(_title(report, subject))}\n\n{what}\n\n{glance}"


def _title(report: Report, subject: Subject) -> str:
    if subject.repo:
        return subject.repo.rpartition("/")[2]
    return PurePath(str(part(report, "quantized").get("name", "A quantized Llama 4"))).name


def _original(report: Report, subject: Subject) -> str:
    if subject.base_model:
        return f"[{plain(subject.base_model)}]({HUB}/{subject.base_model})"
    return plain(PurePath(str(part(report, "source").get("name", "A Llama 4"))).name)


def _glance(report: Report, subject: Subject) -> Iterator[tuple[str, str]]:
    before, after = (part(report, side).get("bytes") for side in ("source", "quantized"))
    if before and after:
        yield "**Size**", f"{size(after)}, the original has {size(before)}"
    yield "**Fits**", fit_line(report)
    yield "**Serve with**", ", ".join(engines(report))
    likelihood = part(report, "evidence", "likelihood")
    if likelihood.get("kl_mean") is not None:
        yield (
            "**Same next token**",
            f"{percent(likelihood['top1_agreement'], 2)} of the time; KL divergence "
            f"{number(likelihood['kl_mean'])} nats a token",
        )
    retrieval = part(report, "evidence", "retrieval")
    if retrieval.get("original") is not None:
        longest = max(cell["length"] for task in retrieval["tasks"] for cell in task["cells"])
        yield (
            "**Long contexts**",
            f"{percent(retrieval['quantized'], 1)} of {count(retrieval['prompts'])} retrieval "
            f"prompts of up to {count(longest)} tokens right, the original "
            f"{percent(retrieval['original'], 1)}",
        )
    yield "**Licence**", _licence_link(subject.licence)


def _licence_link(licence: Licence) -> str:
    name = "Llama 4 Community License" if licence.community else licence.name or licence.identifier
    if not name:
        return ""
    return f"[{plain(name)}]({licence.link})" if licence.link else plain(name)


def _use(report: Report, subject: Subject) -> str:
    model = subject.repo or f"./{_title(report, subject)}"
    parts = []
    for command in commands(report, model, subject.multimodal):
        block = "\n".join(command.lines)
        parts.append(
            f"**{command.engine}**\n\n```{command.language}\n{block}\n```\n\n{command.remark}"
        )
    return "\n\n".join(parts)


def _evaluation(report: Report) -> str:
    """Original against quantized: predictions, then retrieval by task and by length."""
    likelihood, retrieval = (part(report, "evidence", key) for key in ("likelihood", "retrieval"))
    parts = [
        f"Both models read the same tokens: {plain(measured(likelihood))}." if likelihood else "",
        comparison(report),
        "Intervals are 95 %, paired. Where one holds 0, no difference is seen.",
        _titled(_tasks_title(retrieval), _by_task(retrieval)),
        _titled("Retrieval by length of the prompt, all tasks:", by_length(retrieval)),
    ]
    return "\n\n".join(text for text in parts if text) if likelihood or retrieval else ""


def _titled(title: str, shown: str) -> str:
    return f"{title}\n\n{shown}" if shown else ""


def _tasks_title(retrieval: Mapping[str, Any]) -> str:
    own = all(task["task"] == "needle" for task in retrieval.get("tasks") or [])
    return f"Retrieval by task, exact answers{'' if own else f' ([RULER]({RULER}))'}:"


def _by_task(retrieval: Mapping[str, Any]) -> str:
    rows = []
    for task in retrieval.get("tasks") or []:
        change = f"{signed(100 * (task['quantized'] - task['original']), 1)} points"
        sides = (percent(task[side], 1) for side in ("original", "quantized"))
        difference = within(change, ends(part(task, "difference")), points(1))
        rows.append((str(task["task"]), count(task["prompts"]), *sides, difference))
    return table(("task", "prompts", "original", "quantized", "difference"), rows)


def _limits(report: Report, subject: Subject) -> str:
    told = [
        "The figures above are of the text and the prompts that are named there; other languages "
        "and tasks may lose more or less. What the original cannot do, this model cannot either."
    ]
    if subject.multimodal:
        told.append("The vision tower has the original's weights, and calibration saw no images.")
    if part(report, "fit"):
        told.append(
            "Which GPU holds it is arithmetic from the sizes of weights and KV cache, with room "
            "left for the engine; it was not measured on the card."
        )
    return "\n".join(f"- {one}" for one in told)


def _again(report: Report, subject: Subject) -> str:
    """By the command that reads the provenance, and by the one that was given."""
    where = subject.repo or f"./{_title(report, subject)}"
    parts = [
        "`manifest.json` has the SHA-256 of every file. To check a copy, and to build the model "
        "anew from the original and compare the bytes:",
        f"```sh\nllama4q verify {where}\nllama4q reproduce {where}\n```",
    ]
    if command := report.get("command"):
        parts.append(f"It was made with:\n\n```console\n$ {' '.join(command.split())}\n```")
    return "\n\n".join(parts)


def _licence(subject: Subject) -> str:
    licence = subject.licence
    if not licence.community:
        name = _licence_link(licence)
        return f"That of the original: {name}. A copy is in this repository." if name else ""
    parts = [
        f"{BUILT_WITH}. {NOTICE_LINE}",
        f"The [agreement]({licence.link}) and the Acceptable Use Policy are in this repository, "
        f"and hold for whoever uses or passes on this model. It is not from Meta, and Meta does "
        f"not endorse it.",
    ]
    if subject.multimodal:
        parts.append(f"Note that under the Acceptable Use Policy {EU_CLAUSE}.")
    return "\n\n".join(parts)
