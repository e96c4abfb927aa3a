"""The duties of whoever publishes a quantization. The authority is the Llama 4 Community License
Agreement, section 1.b, and for other models the Apache License, section 4."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from evals.model_card import Subject, model_card
from llama4q.errors import UserError
from llama4q.export import side_files
from llama4q.hub import POCKET_MODEL
from llama4q.licence import (
    Card,
    Licence,
    Publication,
    State,
    base_model_of,
    described,
    duties,
    licence_of,
    notice,
)

from . import publishable

LLAMA4 = Licence("other", "llama4", "LICENSE", community=True)
REPO = f"me/{publishable.NAME}"
FILES = ("LICENSE", "USE_POLICY", "NOTICE", "repository name")
CARD = (
    "Built with Llama", "EU clause", "modification", "metadata: licence", "metadata: base model",
    "metadata: tags",
)  # fmt: skip


def publication(
    folder: Path,
    repo: str = REPO,
    card: str | None = None,
    base_model: str | None = publishable.BASE_MODEL,
    accepted: bool = True,
    multimodal: bool = True,
    licence: Licence = LLAMA4,
) -> Publication:
    """As push makes it; `card` is a README.md that is there."""
    written = model_card(publishable.report(), Subject(repo, licence, base_model, multimodal))
    shown = Card(written, there=False) if card is None else Card(card)
    return Publication(folder, repo, licence, base_model, multimodal, shown, accepted)


def states(asked: Publication) -> dict[str, State]:
    return {duty.name: duty.state for duty in duties(asked)}


def todo(asked: Publication) -> dict[str, str]:
    """What is to be done for each duty that is missing."""
    return {duty.name: duty.todo for duty in duties(asked) if duty.state is State.MISSING}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return publishable.scout(tmp_path / "scout")


# --- the Llama 4 Community License ---


def test_all_duties_of_a_new_card(folder: Path) -> None:
    assert states(publication(folder)) == {
        **dict.fromkeys((*FILES, "acceptance"), State.FULFILLED),
        **dict.fromkeys(CARD, State.WILL_BE_WRITTEN),
    }


def test_all_duties_of_a_card_that_is_there(folder: Path) -> None:
    written = publication(folder).card.text
    assert set(states(publication(folder, card=written)).values()) == {State.FULFILLED}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("LICENSE", lambda folder: (folder / "LICENSE").unlink()),
        ("LICENSE", lambda folder: (folder / "LICENSE").write_text(publishable.APACHE)),
        ("USE_POLICY", lambda folder: (folder / "USE_POLICY.md").unlink()),
        ("NOTICE", lambda folder: (folder / "NOTICE").unlink()),
        ("NOTICE", lambda folder: (folder / "NOTICE").write_text("Llama 4 is licensed.")),
    ],
)
def test_a_file_that_is_missing(name: str, change: Callable[[Path], object], folder: Path) -> None:
    change(folder)
    assert list(todo(publication(folder))) == [name]


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("Built with Llama", "**Built with Llama.** ", ""),
        ("EU clause", "European Union", "Union"),
        ("modification", "was modified", "is small"),
        ("metadata: licence", "license: other", "license: apache-2.0"),
        ("metadata: licence", "license_name: llama4", "license_name: llama3.1"),
        ("metadata: licence", "license_link: LICENSE\n", ""),
        ("metadata: base model", f"base_model: {publishable.BASE_MODEL}", "base_model: me/other"),
        ("metadata: base model", "relation: quantized", "relation: finetune"),
        ("metadata: tags", "- quantized\n", ""),
        ("metadata: tags", "library_name: transformers\n", ""),
    ],
)
def test_a_card_that_lacks_something(name: str, before: str, after: str, folder: Path) -> None:
    text = publication(folder).card.text
    assert before in text
    assert list(todo(publication(folder, card=text.replace(before, after)))) == [name]


def test_built_with_llama_is_prominent_above_the_first_section_only(folder: Path) -> None:
    text = publication(folder).card.text.replace("**Built with Llama.** ", "")
    assert "Built with Llama." in text  # in the section on the licence
    assert "Built with Llama" in todo(publication(folder, card=text))


def test_a_card_without_readable_metadata(folder: Path) -> None:
    body = publication(folder).card.body
    for text in (body, f"---\na: [\n---\n{body}", f"---\n- a\n---\n{body}"):
        missing = todo(publication(folder, card=text))
        assert list(missing) == [name for name in CARD if name.startswith("metadata")]


@pytest.mark.parametrize(
    ("name", "proposed"),
    [
        ("scout-int4", "Llama-4-Scout-17B-16E-Instruct-scout-int4"),
        ("my-llama-4-scout", "Llama-4-scout"),
        ("llama-4-scout-int4", "Llama-4-scout-int4"),
        ("llama4q-Scout", "Llama4q-Scout"),
    ],
)
def test_a_name_that_does_not_begin_with_llama(name: str, proposed: str, folder: Path) -> None:
    assert todo(publication(folder, f"me/{name}")) == {"repository name": f"name it me/{proposed}"}


def test_acceptance_is_asked_for(folder: Path) -> None:
    missing = todo(publication(folder, accepted=False))
    assert list(missing) == ["acceptance"]
    assert "--accept-license" in missing["acceptance"]


def test_the_eu_clause_is_of_multimodal_models(folder: Path) -> None:
    assert "EU clause" not in states(publication(folder, multimodal=False))


def test_a_source_that_was_a_folder_needs_a_name(folder: Path) -> None:
    missing = todo(publication(folder, base_model=None))
    assert list(missing) == ["metadata: base model"]
    assert "--base-model" in missing["metadata: base model"]


@pytest.mark.parametrize("name", ["NOTICE", "NOTICE.txt", "Notice"])
def test_names_of_a_notice(name: str, folder: Path) -> None:
    (folder / "NOTICE").rename(folder / name)
    assert not todo(publication(folder))


# --- which licence it is ---


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ({"name": "x/y", "metadata": {"license": "other", "license_name": "llama4"}}, ""),
        ({"name": "x/y", "metadata": {"license": "llama4"}}, ""),  # as some cards have it
        ({"name": "x/y", "metadata": {"license": "apache-2.0"}}, publishable.AGREEMENT),
        ({"name": "x/y"}, publishable.AGREEMENT),  # a report of before
        ({"name": publishable.BASE_MODEL, "metadata": {"license": None}}, ""),
    ],
)
def test_whatever_speaks_for_the_agreement_counts(
    source: dict[str, object], text: str, tmp_path: Path
) -> None:
    (tmp_path / "LICENSE.md").write_text(text)
    assert licence_of(source, tmp_path) == Licence("other", "llama4", "LICENSE.md", True)


def test_the_link_is_one_that_the_hub_takes(tmp_path: Path) -> None:
    source = {"name": publishable.BASE_MODEL}
    (tmp_path / "LICENSE.txt").write_text(publishable.AGREEMENT)
    assert licence_of(source, tmp_path).link == "https://www.llama.com/llama4/license"
    (tmp_path / "LICENSE").write_text(publishable.AGREEMENT)
    assert licence_of(source, tmp_path).link == "LICENSE"


def test_the_pocket_model_has_its_own_licence() -> None:
    source = {"name": "pocket", "metadata": described(POCKET_MODEL)}
    assert licence_of(source, POCKET_MODEL) == Licence("apache-2.0")


def test_what_a_source_says(tmp_path: Path) -> None:
    card = "---\nlicense: other\nlicense_name: own\nlicense_link: https://a.b\nlanguage: no\n---\n"
    (tmp_path / "README.md").write_text(card)
    assert described(tmp_path) == {
        "license": "other", "license_name": "own", "license_link": "https://a.b",
        "language": None,  # YAML takes Norwegian for false
        "pipeline_tag": None,
    }  # fmt: skip
    (tmp_path / "LICENSE").write_text(publishable.AGREEMENT)
    said = described(tmp_path)
    assert (said["license"], said["license_name"]) == ("other", "llama4")


def test_only_a_source_on_the_hub_has_a_name() -> None:
    found = {"name": "a/b", "revision": "c" * 40}
    assert base_model_of(found) == "a/b"
    assert base_model_of({"name": "a/b", "revision": None}) is None
    assert base_model_of(found, "c/d") == "c/d"
    with pytest.raises(UserError, match="--base-model scout: not a Hub id"):
        base_model_of(found, "scout")


# --- other licences ---


def test_duties_of_another_licence(tmp_path: Path) -> None:
    folder = publishable.other(tmp_path)
    asked = publication(folder, "me/any-name", licence=Licence("apache-2.0"), accepted=False)
    assert states(asked) == {
        "LICENSE": State.FULFILLED,
        **dict.fromkeys(
            ("modification", "metadata: licence", "metadata: base model", "metadata: tags"),
            State.WILL_BE_WRITTEN,
        ),
    }
    (folder / "LICENSE").unlink()
    text = asked.card.text.replace("license: apache-2.0", "license: mit")
    changed = publication(folder, "me/any-name", text, licence=Licence("apache-2.0"))
    assert list(todo(changed)) == ["LICENSE", "metadata: licence"]


def test_a_source_that_names_no_licence(tmp_path: Path) -> None:
    folder = publishable.other(tmp_path)
    asked = publication(folder, "me/x", licence=Licence(None))
    assert list(todo(asked)) == ["metadata: licence"]
    said = asked.card.text.replace("---\n", "---\nlicense: mit\n", 1)
    assert not todo(publication(folder, "me/x", said, licence=Licence(None)))


# --- the NOTICE that quantize writes ---


def test_quantize_adds_the_line_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text(publishable.AGREEMENT)
    assert side_files(tmp_path)["NOTICE"].decode() == publishable.NOTICE + "\n"
    (tmp_path / "NOTICE").write_text("Fine-tuned by someone.\n")
    said = side_files(tmp_path)["NOTICE"].decode()
    assert said == f"Fine-tuned by someone.\n\n{publishable.NOTICE}\n"
    (tmp_path / "NOTICE").write_text(said)
    assert side_files(tmp_path)["NOTICE"].decode() == said


def test_quantize_adds_none_to_other_models() -> None:
    assert notice(POCKET_MODEL) is None
    assert "NOTICE" not in side_files(POCKET_MODEL)
