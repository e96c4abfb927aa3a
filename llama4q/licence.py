"""The licence of a model, and its duties for whoever publishes a quantization of it, as data.

Source: Llama 4 Community License Agreement, section 1.b, and its Acceptable Use Policy, as Meta
publishes them with the models; of other licences what Apache-2.0 asks in its section 4, which is
as much as any. A reading, not legal advice. Knows nothing of tensors, nor how a card is made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import UserError
from .manifest import CARD

AGREEMENT = "LLAMA 4 COMMUNITY LICENSE AGREEMENT"  # its title
NOTICE = "NOTICE"
NOTICE_LINE = (
    "Llama 4 is licensed under the Llama 4 Community License, Copyright © Meta Platforms, Inc. "
    "All Rights Reserved."
)
BUILT_WITH = "Built with Llama"
BEGINNING = "Llama"  # of a derived model's name
EU_CLAUSE = (
    "the rights of section 1(a) are not granted for multimodal models to individuals domiciled "
    "in, and companies with their principal place of business in, the European Union"
)
COMMUNITY = {"license": "other", "license_name": "llama4"}  # as the Hub's metadata spells it
LINKED = ("LICENSE", "LICENSE.md")  # files that the Hub's license_link may name
META_S = "https://www.llama.com/llama4/license"
META = re.compile(r"meta-llama/Llama-4-", re.IGNORECASE)
KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class Card:
    """A README.md: what is in a folder already, or what will be written."""

    text: str
    there: bool = True

    @cached_property
    def _parts(self) -> tuple[Mapping[str, Any], str]:
        import yaml

        block = re.match(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", self.text, re.DOTALL)
        if block is None:
            return {}, self.text
        try:
            found = yaml.safe_load(block[1])
        except yaml.YAMLError:
            found = None
        return found if isinstance(found, dict) else {}, self.text[block.end() :]

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The YAML at its start; empty where there is none, or none that can be read."""
        return self._parts[0]

    @property
    def body(self) -> str:
        return self._parts[1]


@dataclass(frozen=True)
class Licence:
    """Under which licence a model is, as the Hub's metadata spells it."""

    identifier: str | None  # as apache-2.0; None: its source does not say
    name: str | None = None  # where the identifier is "other"
    link: str | None = None  # to its text
    community: bool = False  # the Llama 4 Community License

    @property
    def metadata(self) -> dict[str, str]:
        """What a card says of it."""
        found = {
            "license": self.identifier, "license_name": self.name, "license_link": self.link
        }  # fmt: skip
        return {key: value for key, value in found.items() if value}


def described(folder: Path) -> dict[str, Any]:
    """What a report keeps of its source's card: licence, languages, task; None what is not said."""
    found = _read_card(folder).metadata
    kept = {key: _text(found.get(key)) for key in KEPT}
    return {**kept, **COMMUNITY} if _holds_agreement(folder) else kept


def _text(value: Any) -> str | list[str] | None:
    """What YAML made of a text or several; None for anything else, as the `no` of Norwegian."""
    if isinstance(value, list):
        return [one for one in value if isinstance(one, str)]
    return value if isinstance(value, str) else None


def licence_of(source: Mapping[str, Any], folder: Path) -> Licence:
    """Of a quantized checkpoint in `folder`, from the `source` of its report and its files.

    Whatever speaks for the Llama 4 Community License counts: Meta's name, its text, a card.
    """
    said = source.get("metadata") or described(folder)
    identifier, name = said.get("license"), said.get("license_name")
    if (
        "llama4" in (identifier, name)
        or META.match(str(source.get("name")))
        or _holds_agreement(folder)
    ):
        names = [path.name for path in _files(folder, "LICENSE") if path.name in LINKED]
        link = names[0] if names else META_S
        return Licence(COMMUNITY["license"], COMMUNITY["license_name"], link, community=True)
    return Licence(identifier, name, said.get("license_link"))


def notice(folder: Path) -> bytes | None:
    """The NOTICE that a quantization of the model in `folder` must have and the model has not.

    What its own one says stays. None where nothing is to be written.
    """
    said = described(folder)
    if "llama4" not in (said["license"], said["license_name"]) or _noticed(folder):
        return None
    path = folder / NOTICE
    before = path.read_text(encoding="utf-8").rstrip() + "\n\n" if path.is_file() else ""
    return f"{before}{NOTICE_LINE}\n".encode()


def base_model_of(source: Mapping[str, Any], named: str | None = None) -> str | None:
    """The original's Hub id: as `named`, else a report's `source`; None where that was a folder.

    Raises UserError when what is named is none.
    """
    if named is not None and not _HUB_ID.fullmatch(named):
        raise UserError(f"--base-model {named}: not a Hub id; name the original as owner/name")
    return named or (str(source["name"]) if source.get("revision") else None)


# --- duties ---


class State(StrEnum):
    """How a duty stands."""

    FULFILLED = "fulfilled"
    WILL_BE_WRITTEN = "will be written"  # into the card, which is not there yet
    MISSING = "missing"


@dataclass(frozen=True)
class Duty:
    """One thing that the licence, or the Hub's custom, asks for."""

    name: str
    state: State
    what: str  # is asked for
    todo: str  # when it is missing


@dataclass(frozen=True)
class Publication:
    """What is to be published, and how."""

    folder: Path
    repo: str  # owner/name
    licence: Licence
    base_model: str | None  # the source's Hub id
    multimodal: bool
    card: Card
    accepted: bool = False  # the Llama 4 Community License, by whoever publishes


def duties(publication: Publication) -> list[Duty]:
    """Every duty with its state, those of the licence first."""
    licence = publication.licence
    own = _community_duties if licence.community else _other_duties
    return [*own(publication), *_card_duties(publication)]


def _community_duties(publication: Publication) -> Iterator[Duty]:
    folder, card = publication.folder, publication.card
    owner, _, name = publication.repo.partition("/")
    again = "copy it from the source's repository"
    yield _held("LICENSE", _holds_agreement(folder), "the agreement itself", again)
    yield _held(
        "USE_POLICY", bool(_files(folder, "USE_POLICY")), "the Acceptable Use Policy", again
    )
    yield _held(
        NOTICE, _noticed(folder), "a file with Meta's line",
        f"write a file {NOTICE} with this line: {NOTICE_LINE}",
    )  # fmt: skip
    yield _held(
        "repository name", name.startswith(BEGINNING), f"begins with {BEGINNING!r}",
        f"name it {owner}/{_proper(name, publication.base_model)}",
    )  # fmt: skip
    yield _told(
        card, BUILT_WITH, BUILT_WITH in _opening(card), "stands at the card's top",
        f"write {BUILT_WITH!r} into {CARD}, above its first section",
    )  # fmt: skip
    if publication.multimodal:
        yield _told(
            card, "EU clause", "European Union" in card.body, f"the card warns: {EU_CLAUSE}",
            f"say in {CARD} that {EU_CLAUSE}",
        )  # fmt: skip
    warning = f"; note that {EU_CLAUSE}" if publication.multimodal else ""
    yield _held(
        "acceptance", publication.accepted, "--accept-license, by whoever publishes",
        f"read LICENSE and USE_POLICY in {folder}, and when you agree to the Llama 4 Community "
        f"License add --accept-license{warning}",
    )  # fmt: skip


def _other_duties(publication: Publication) -> Iterator[Duty]:
    yield _held(
        "LICENSE", bool(_files(publication.folder, "LICENSE")), "the source's, copied",
        "copy it from the source",
    )  # fmt: skip


def _card_duties(publication: Publication) -> Iterator[Duty]:
    card, said = publication.card, publication.card.metadata
    yield _told(
        card, "modification", bool(re.search(r"\bmodif(ied|ication)", card.body, re.IGNORECASE)),
        "the card says what was changed",
        f"say in {CARD} that the model was modified, and how",
    )  # fmt: skip
    yield _licence_named(publication)
    if publication.base_model or publication.licence.community:
        yield _base_model_named(publication)
    tags = said.get("tags")
    yield _told(
        card, "metadata: tags",
        bool(said.get("library_name")) and isinstance(tags, list) and "quantized" in tags,
        "the library, and that it is quantized",
        f"write library_name, and tags with 'quantized', into the metadata of {CARD}",
    )  # fmt: skip


def _licence_named(publication: Publication) -> Duty:
    """The card's licence is the source's; where nobody knows that one, the card has to say."""
    wanted, said = publication.licence.metadata, publication.card.metadata
    if publication.licence.community:
        right = all(said.get(key) == value for key, value in COMMUNITY.items())
        right = right and bool(said.get("license_link"))
    elif wanted:
        right = all(
            said.get(key) == wanted[key] for key in ("license", "license_name") if key in wanted
        )
    else:
        right = bool(said.get("license"))
    shown = ", ".join(f"{key}: {value}" for key, value in wanted.items())
    todo = f"write {shown} into the metadata of {CARD}"
    if not wanted:
        todo = f"the source names no licence; find it, and write license: into {CARD}"
    return _told(publication.card, "metadata: licence", right, shown or "of the source", todo)


def _base_model_named(publication: Publication) -> Duty:
    said, wanted = publication.card.metadata, publication.base_model
    named = said.get("base_model")
    bases = named if isinstance(named, list) else [named]
    right = wanted in bases if wanted else any(_HUB_ID.fullmatch(str(base)) for base in bases)
    todo = (
        f"write base_model: {wanted} and base_model_relation: quantized into the metadata of {CARD}"
        if wanted
        else "the source was a folder; name its repository with --base-model OWNER/NAME"
    )
    return _told(
        publication.card, "metadata: base model",
        right and said.get("base_model_relation") == "quantized",
        f"{wanted or 'the source'}, quantized", todo,
    )  # fmt: skip


def _held(name: str, right: bool, what: str, todo: str) -> Duty:
    return Duty(name, State.FULFILLED if right else State.MISSING, what, todo)


def _told(card: Card, name: str, right: bool, what: str, todo: str) -> Duty:
    """A duty that the card has to fulfil."""
    fulfilled = State.FULFILLED if card.there else State.WILL_BE_WRITTEN
    return Duty(name, fulfilled if right else State.MISSING, what, todo)


def _opening(card: Card) -> str:
    """What a reader sees before the card's first section."""
    return re.split(r"^## ", card.body, maxsplit=1, flags=re.MULTILINE)[0]


def _proper(name: str, base_model: str | None) -> str:
    """A name for the repository that begins as it must, and is as like `name` as can be."""
    base = (base_model or "").rpartition("/")[2]
    within = re.search(r"llama.*", name, re.IGNORECASE)
    if within:
        return BEGINNING + within[0][len(BEGINNING) :]
    return f"{base}-{name}" if base.startswith(BEGINNING) else f"{BEGINNING}-{name}"


# --- files ---


def licence_files(folder: Path) -> list[str]:
    """The names of the files that duties ask for."""
    beginnings = ("LICENSE", "USE_POLICY", NOTICE)
    return [path.name for beginning in beginnings for path in _files(folder, beginning)]


def _read_card(folder: Path) -> Card:
    path = folder / CARD
    return Card(path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "")


def _files(folder: Path, beginning: str) -> list[Path]:
    """Those whose names begin so, in any case: Meta writes "Notice", others NOTICE.txt."""
    return [path for path in sorted(folder.iterdir()) if path.name.upper().startswith(beginning)]


def _words(path: Path) -> str:
    return " ".join(path.read_text(encoding="utf-8", errors="replace").split())


def _holds_agreement(folder: Path) -> bool:
    return any(AGREEMENT in _words(path).upper() for path in _files(folder, "LICENSE"))


def _noticed(folder: Path) -> bool:
    return any(NOTICE_LINE in _words(path) for path in _files(folder, NOTICE))
