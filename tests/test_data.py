"""Text sources, calibration samples and evaluation windows; files made on the fly, no network."""

from __future__ import annotations

import hashlib
import json
import random
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from calibrate import data
from calibrate.data import calibration_tokens, passages, shuffled
from llama4q import text
from llama4q.errors import UserError
from llama4q.text import (
    SHIPPED_FOLDER,
    TextSource,
    encode,
    evaluation_tokens,
    load_tokenizer,
    parse_source,
    token_set,
)

POCKET_MODEL = SHIPPED_FOLDER.parent / "model"
CHAT = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A list."}]
SHAREGPT = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A list."}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(POCKET_MODEL)


@pytest.fixture
def bare_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of one's own to take things away from."""
    return load_tokenizer(POCKET_MODEL)


def numbered(start: int, count: int) -> str:
    """A document in which every word occurs once in the whole test, so reuse can be seen."""
    return " ".join(f"<{number}>" for number in range(start, start + count))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def numbers_in(tokens: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    found = []
    for row in tokens.tolist():
        found += [int(number) for number in re.findall(r"<(\d+)>", tokenizer.decode(row))]
    return found


# --- naming a source ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (None, TextSource("pocket")),
        ("pocket", TextSource("pocket")),
        ("owner/name", TextSource("owner/name", (), "owner/name")),
        ("squad", TextSource("squad", (), "squad")),
        ("o/n:en@test", TextSource("o/n:en@test", (), "o/n", "en", "test")),
        ("o/n@test#body", TextSource("o/n@test#body", (), "o/n", None, "test", "body")),
        ("o/n:c-1.2", TextSource("o/n:c-1.2", (), "o/n", "c-1.2", "train")),
    ],
)
def test_a_source_is_understood(name: str | None, expected: TextSource) -> None:
    assert parse_source(name) == expected


def test_a_file_is_a_file_even_with_a_hash_in_its_name(tmp_path: Path) -> None:
    plain, odd = tmp_path / "rows.jsonl", tmp_path / "a#b.txt"
    plain.touch()
    odd.touch()
    assert parse_source(f"{plain}#body") == TextSource(f"{plain}#body", (plain,), column="body")
    assert parse_source(str(odd)) == TextSource(str(odd), (odd,))


def test_a_folder_is_its_text_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.jsonl", "deep/c.md", "LICENSE", "picture.png"):
        (tmp_path / name).touch()
    assert parse_source(str(tmp_path)).files == tuple(
        tmp_path / name for name in ("a.jsonl", "b.txt", "deep/c.md")
    )


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/no/such/folder", "a b", "", "#c"])
def test_what_is_no_source_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="no such file; name a file, a folder"):
        parse_source(name)


def test_unreadable_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.docx").touch()
    with pytest.raises(UserError, match=r"\.docx, but text is read from \.txt"):
        parse_source(str(tmp_path / "a.docx"))
    with pytest.raises(UserError, match=r"no \.txt, .* file here"):
        parse_source(str(tmp_path))


# --- reading documents ---


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    wanted = ["One.\n\nStill one.", "Two, naïve ☃.", "Three."]
    rows: list[dict[str, Any]] = [{"id": 1, "text": part} for part in wanted]
    rows.insert(1, {"id": 1, "text": None})
    rows.insert(2, {"id": 1, "text": "  \n"})
    (tmp_path / "t.txt").write_text("\f\n".join(wanted), encoding="utf-8-sig")
    (tmp_path / "t.json").write_text(json.dumps(rows, indent=1))
    write_rows(tmp_path / "t.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    for kind in ("txt", "json", "jsonl", "parquet"):
        source = parse_source(str(tmp_path / f"t.{kind}"))
        found = [str(document).strip() for document in text.documents(source, "")]
        assert found == wanted, kind


def test_a_column_can_be_named(tmp_path: Path) -> None:
    name = write_rows(tmp_path / "a.jsonl", [{"text": "not this", "story": "this"}])
    assert list(text.documents(parse_source(f"{name}#story"), "")) == ["this"]


def test_rows_may_differ_in_their_keys(tmp_path: Path) -> None:
    """datasets' own JSON reader fails on the second row."""
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    rows: list[dict[str, Any]] = [{"messages": CHAT}, {"messages": [CHAT[0], called], "extra": 1}]
    source = parse_source(write_rows(tmp_path / "a.jsonl", rows))
    assert list(text.documents(source, ""))[1] == [CHAT[0], {**called, "content": ""}]


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("messages", [CHAT, SHAREGPT])
def test_conversations_go_through_the_chat_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, column: str, messages: list[dict[str, str]]
) -> None:
    rows = [{"text": "not this", column: messages}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    (document,) = text.documents(parse_source(str(tmp_path / "t.parquet")), "")
    begin, *rest = tokenizer.apply_chat_template(CHAT)["input_ids"]
    assert begin == tokenizer.bos_token_id
    assert encode(document, tokenizer) == rest


BROKEN_FILES = [
    ("a.jsonl", b'{"text": "ok"}\n{"text": ', "line 2 is not valid JSON"),
    ("a.json", b'[{"text": "ok"},\n\n oops]', "line 3 is not valid JSON"),
    ("a.jsonl", b'{"text": "ok"}\n3\n', "a row is a int; rows must be objects"),
    ("a.jsonl", b'{"question": "?", "answer": "!"}', "found question, answer; name one as .*#COLU"),
    ("a.jsonl", b'{"text": ["a", "b"]}', "column 'text' holds a list, neither text nor messages"),
    ("a.jsonl", b'{"messages": [{"content": "hi"}]}', "has no role, only content"),
    ("a.txt", b"caf\xe9", "not UTF-8"),
    ("a.jsonl", b"\xff\xfe", "not UTF-8"),
    ("a.parquet", b"PAR1 and nonsense", "cannot be read as a dataset .*magic bytes"),
    ("a.txt", b"", "empty, there is no text in it"),
    ("a.jsonl", b"\n\n", "empty, there is no text in it"),
    ("a.json", b"[]", "empty, there is no text in it"),
    ("a.jsonl", b'{"text": ""}\n{"text": null}', "empty, there is no text in it"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN_FILES)
def test_broken_text_is_one_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    source = parse_source(str(tmp_path / name))
    with pytest.raises(UserError, match=message) as raised:
        calibration_tokens(source, tokenizer, samples=1, length=8, seed=0)
    assert "\n" not in str(raised.value)


def test_a_named_column_that_is_missing(tmp_path: Path) -> None:
    name = write_rows(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(UserError, match=r"no column 'body', found text; name one as .*jsonl#COL"):
        list(text.documents(parse_source(f"{name}#body"), ""))


# --- the Hub ---


def test_a_hub_dataset_is_streamed_and_read_no_further_than_needed(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, asked = [], []

    def rows() -> Iterator[dict[str, str]]:
        for number in range(10_000):
            read.append(number)
            yield {"body": numbered(100 * number, 20)}

    def load(*arguments: str, **options: object) -> datasets.IterableDataset:
        asked.append((arguments, options))
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(data, "SHUFFLED_CHARACTERS", 5_000)
    source = parse_source("o/n:en@test#body")
    drawn = calibration_tokens(source, tokenizer, samples=4, length=32, seed=0)
    assert drawn.tokens.shape == (4, 32)
    assert asked == [(("o/n", "en"), {"split": "test", "streaming": True})]
    assert len(read) < 200
    again = calibration_tokens(source, tokenizer, samples=4, length=32, seed=0)
    assert again.digest == drawn.digest


def test_the_hubs_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: str, **__: object) -> None:
        raise ValueError("Bad split: no.\nAvailable splits: ['train']")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"'o/n@no'.*Bad split: no\. Available splits: \['train'\]"):
        list(text.documents(parse_source("o/n@no"), ""))


# --- drawing samples ---


def test_samples_begin_with_begin_of_text_and_repeat_by_seed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"text": numbered(100 * row, 30)} for row in range(50)]
    source = parse_source(write_rows(tmp_path / "a.jsonl", rows))
    first, again, other = (
        calibration_tokens(source, tokenizer, samples=6, length=64, seed=seed) for seed in (0, 0, 1)
    )
    assert first.tokens.shape == (6, 64)
    assert first.tokens.dtype == torch.int64
    assert (first.tokens[:, 0] == tokenizer.bos_token_id).all()
    assert (first.tokens[:, 1:] != tokenizer.bos_token_id).all()
    assert first.digest == again.digest
    assert first.digest != other.digest
    assert first.description == f"{source.name}: 6 samples of 64 tokens, seed 0"


def test_all_of_a_small_text_can_be_used_and_nothing_twice(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Short rows and one long document: each of their tokens comes once, none is lost."""
    (tmp_path / "long.txt").write_text(numbered(10_000, 700))
    write_rows(tmp_path / "rows.jsonl", [{"text": numbered(100 * n, 9)} for n in range(20)])
    source = parse_source(str(tmp_path))
    with pytest.raises(UserError) as raised:
        calibration_tokens(source, tokenizer, samples=10**6, length=64, seed=3)
    (fitting,) = re.findall(r"\((\d+) of this length are there\)", str(raised.value))
    drawn = calibration_tokens(source, tokenizer, samples=int(fitting), length=64, seed=3)
    numbers = numbers_in(drawn.tokens[:, 1:].reshape(1, -1), tokenizer)
    expected = {100 * row + word for row in range(20) for word in range(9)}
    expected |= set(range(10_000, 10_700))
    assert len(set(numbers)) == len(numbers)
    assert len(expected - set(numbers)) < 63 / 3  # less than a sample is left over
    assert set(numbers) <= expected
    assert numbers != sorted(numbers)


def test_samples_of_one_long_document_come_from_all_over_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "long.txt").write_text(numbered(0, 9_000))
    source = parse_source(str(tmp_path / "long.txt"))
    seen = [
        numbers_in(
            calibration_tokens(source, tokenizer, samples=16, length=64, seed=seed).tokens,
            tokenizer,
        )
        for seed in (0, 1)
    ]
    for numbers in seen:
        assert len(set(numbers)) == len(numbers)
        thirds = [
            sum(third * 3_000 <= n < (third + 1) * 3_000 for n in numbers) for third in (0, 1, 2)
        ]
        assert min(thirds) > 0.1 * len(numbers)
    assert set(seen[0]) != set(seen[1])


def test_too_little_text_says_how_much_there_is(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "a.txt").write_text("One. Two. Three.")
    source = parse_source(str(tmp_path / "a.txt"))
    found = len(encode("One. Two. Three.", tokenizer)) + 1  # and end-of-text
    expected = rf"{found} tokens, but 5 samples of 4 need 15 .*\({found // 3} of this length"
    with pytest.raises(UserError, match=expected):
        calibration_tokens(source, tokenizer, samples=5, length=4, seed=0)
    with pytest.raises(UserError, match="5 samples of 1 tokens: at least 1 of 2"):
        calibration_tokens(source, tokenizer, samples=5, length=1, seed=0)


@pytest.mark.parametrize("size", [1, 7, 50, 10_000])
def test_passages_are_the_document_in_pieces(size: int) -> None:
    document = numbered(0, 100) + "\n\n" + "x" * 300 + "\n" + numbered(200, 5) + " "
    pieces = [str(piece) for piece in passages(document, size, random.Random(0))]
    assert "".join(pieces) == document
    assert all(0 < len(piece) <= size for piece in pieces)
    if size == 50:
        assert all(piece[0] in " \n" for piece in pieces[1:7])


def test_shuffling_keeps_every_piece_and_little_in_memory() -> None:
    given: list[int] = []

    def pieces() -> Iterator[str]:
        for number in range(1_000):
            given.append(number)
            yield f"{number:010d}"

    taken = []
    for piece in shuffled(pieces(), random.Random(0), 500):
        taken.append(int(str(piece)))
        assert len(given) - len(taken) <= 50
    assert sorted(taken) == list(range(1_000))
    assert taken != sorted(taken)


# --- evaluation windows ---


def test_evaluation_windows_are_the_text_in_order(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    parts = [numbered(0, 40), numbered(100, 3), numbered(200, 100)]
    (tmp_path / "a.txt").write_text("\f".join(parts))
    source = parse_source(str(tmp_path / "a.txt"))
    found = evaluation_tokens(source, tokenizer, windows=5, length=33)
    end = tokenizer.convert_tokens_to_ids("<|end_of_text|>")
    stream = [token for part in parts for token in [*encode(part, tokenizer), end]]
    expected = [
        [tokenizer.bos_token_id, *stream[32 * window : 32 * (window + 1)]] for window in range(5)
    ]
    assert found.tokens.tolist() == expected
    assert found.description == f"{source.name}: the first 5 windows of 33 tokens"
    with pytest.raises(UserError, match="500 samples of 33 need 16,000"):
        evaluation_tokens(source, tokenizer, windows=500, length=33)


def test_the_digest_is_of_shape_and_token_bytes() -> None:
    tokens = torch.tensor([[1, 2, 3], [4, 5, 600]])
    content = b"2 x 3 int64\n" + struct.pack("<6q", 1, 2, 3, 4, 5, 600)
    assert token_set(tokens, "").digest == hashlib.sha256(content).hexdigest()
    assert token_set(tokens.view(3, 2), "").digest != token_set(tokens, "").digest


def test_the_shipped_text_serves_both(tokenizer: PreTrainedTokenizerBase) -> None:
    drawn = calibration_tokens(parse_source(None), tokenizer, samples=64, length=256, seed=0)
    held = evaluation_tokens(parse_source(None), tokenizer, windows=16, length=512)
    end = tokenizer.convert_tokens_to_ids("<|end_of_text|>")
    # a draw touches many documents: nearly every sample holds the end of a passage
    assert (drawn.tokens == end).any(dim=1).float().mean() > 0.4
    start = (SHIPPED_FOLDER / "heldout.txt").read_text()[:200]
    assert tokenizer.decode(held.tokens[0, 1:].tolist()).startswith(start)


# --- the tokenizer ---


def test_a_tokenizer_without_a_chat_template(bare_tokenizer: PreTrainedTokenizerBase) -> None:
    bare_tokenizer.chat_template = None
    with pytest.raises(UserError, match="this tokenizer has none; add chat_template"):
        encode([dict(message) for message in CHAT], bare_tokenizer)


def test_a_chat_template_that_refuses(bare_tokenizer: PreTrainedTokenizerBase) -> None:
    bare_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"refuses .*\(roles must alternate\): \[\{\"role\""):
        encode([dict(message) for message in CHAT], bare_tokenizer)


def test_without_end_of_text_the_eos_token_stands_between_documents(
    tmp_path: Path, bare_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("One.\fTwo.\fThree.")
    source = parse_source(str(tmp_path / "a.txt"))
    monkeypatch.setattr(text, "END_OF_TEXT", "<|nowhere|>")
    found = evaluation_tokens(source, bare_tokenizer, windows=1, length=8)
    assert bare_tokenizer.eos_token_id in found.tokens
    bare_tokenizer.bos_token = None
    with pytest.raises(UserError, match="names no begin-of-text"):
        evaluation_tokens(source, bare_tokenizer, windows=1, length=8)


def test_a_missing_and_a_broken_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer here; copy the model's"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(
        (POCKET_MODEL / "tokenizer_config.json").read_bytes()
    )
    with pytest.raises(UserError, match="its tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)
    for broken in ("{", "{}"):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(UserError, match="its tokenizer cannot be loaded") as raised:
            load_tokenizer(tmp_path)
        assert "\n" not in str(raised.value)
