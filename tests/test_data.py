"""Text sources, calibration samples, mixes, evaluation windows; files made here, no network."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
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
from calibrate.mix import Mix, Portion, parse_mix, rows_of
from llama4q import text
from llama4q import tokens as token_rows
from llama4q.errors import UserError
from llama4q.text import SHIPPED_FOLDER, TextSource, parse_source
from llama4q.tokens import encode, evaluation_tokens, load_tokenizer, opening_tokens, token_set

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
    assert [batch.shape for batch in drawn.tokens] == [(4, 32)]
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
    [tokens] = first.tokens
    assert tokens.shape == (6, 64)
    assert tokens.dtype == torch.int64
    assert (tokens[:, 0] == tokenizer.bos_token_id).all()
    assert (tokens[:, 1:] != tokenizer.bos_token_id).all()
    assert first.digest == again.digest
    assert first.digest != other.digest


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
    numbers = numbers_in(drawn.tokens[0][:, 1:].reshape(1, -1), tokenizer)
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
            calibration_tokens(source, tokenizer, samples=16, length=64, seed=seed).tokens[0],
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


# --- mixes ---


def test_a_single_source_is_drawn_as_documented(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Done by hand: passages of a sample's length, shuffled, joined by end-of-text, cut."""
    parts = [numbered(1_000 * part, 300) for part in range(3)]
    (tmp_path / "a.txt").write_text("\f".join(parts))
    chance = random.Random(5)
    pieces = [piece for part in parts for piece in passages(part, 4 * 48, chance)]
    end = tokenizer.convert_tokens_to_ids("<|end_of_text|>")
    stream = [
        token
        for piece in shuffled(pieces, chance, 10**9)
        for token in [*encode(piece, tokenizer), end]
    ]
    expected = [[tokenizer.bos_token_id, *stream[47 * row : 47 * (row + 1)]] for row in range(7)]
    for given in (parse_source(str(tmp_path / "a.txt")), parse_mix(str(tmp_path / "a.txt"))):
        drawn = calibration_tokens(given, tokenizer, samples=7, length=48, seed=5)
        assert [batch.tolist() for batch in drawn.tokens] == [expected]
        assert drawn.digest == token_set(drawn.tokens[0], "").digest


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("pocket", [("pocket", 1, None)]),
        ("o/n:2024", [("o/n:2024", 1, None)]),  # a configuration, as a source alone has no share
        ("pocket:3x99", [("pocket", 1, 99)]),
        ("a.txt:0.6,pocket:.4", [("a.txt", 0.6, None), ("pocket", 0.4, None)]),
        ("a.txt:3,pocket:1x8192", [("a.txt", 0.75, None), ("pocket", 0.25, 8192)]),
        ("pocket:1,pocket:1e0x2048", [("pocket", 0.5, None), ("pocket", 0.5, 2048)]),
        ("o/n:c@s#body:1,o/n:3", [("o/n:c@s#body", 0.25, None), ("o/n", 0.75, None)]),
        ("o/n:3.0.0:1,o/n:2024:1", [("o/n:3.0.0", 0.5, None), ("o/n:2024", 0.5, None)]),
        ("b,c:1.txt", [("b,c:1.txt", 1, None)]),
        ("b,c:1.txt#x", [("b,c:1.txt#x", 1, None)]),
        ("a.jsonl#x,y", [("a.jsonl#x,y", 1, None)]),
        ("a.txt:1,b,c:1.txt#x:1", [("a.txt", 0.5, None), ("b,c:1.txt#x", 0.5, None)]),
        ("odd:0.5", [("odd:0.5", 1, None)]),
        ("a.jsonl#x:1,b,c:1.txt:1", [("a.jsonl#x", 0.5, None), ("b,c:1.txt", 0.5, None)]),
        ("b,c:1.txt:1,odd:0.5:1", [("b,c:1.txt", 0.5, None), ("odd:0.5", 0.5, None)]),
    ],
)
def test_a_mix_is_understood(
    spec: str,
    expected: list[tuple[str, float, int | None]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd:0.5").mkdir()
    for name in ("a.txt", "a.jsonl", "b,c:1.txt", "odd:0.5/d.md"):
        (tmp_path / name).touch()
    mix = parse_mix(spec)
    assert [(part.source.name, float(part.share), part.length) for part in mix] == expected
    assert [part.source for part in mix] == [parse_source(name) for name, _, _ in expected]
    assert sum(part.share for part in mix) == 1


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("pocket:0,pocket:1", "'pocket:0': a share of 0; shares are numbers above 0"),
        ("pocket:-1,pocket:1", "'pocket:-1': a share of -1; shares are numbers above 0"),
        ("pocket:nan,pocket:1", "'pocket:nan': a share of nan; shares are numbers above 0"),
        ("pocket:inf,pocket:1", "'pocket:inf': a share of inf; shares are numbers above 0"),
        ("pocket:1e999,pocket:1", "a share of 1e999; shares are numbers above 0"),
        ("pocket:1e-999,pocket:1", "a share of 1e-999; shares are numbers above 0"),
        ("pocket:0", "'pocket:0': a share of 0; shares are numbers above 0"),
        ("pocket:1,pocket:1x1", "sequences of 1 tokens; at least 2 are needed"),
        ("pocket,a.txt:1", "'pocket' has no share; write each as SOURCE:SHARE"),
        ("pocket:1,a.txt", "'a.txt' has no share; write each as SOURCE:SHARE"),
        ("pocket:1,a.txt:1x8k", "'a.txt:1x8k' has no share; write each as SOURCE:SHARE"),
        ("pocket:1,", "'' has no share; write each as SOURCE:SHARE"),
        ("pocket,o/n", "no such file, and as a mix 'pocket' has no share"),
        ("pocket:1,missing.txt:1", "text 'missing.txt': no such file; name a file, a folder"),
        ("pocket:1,a.pdf:1", "a.pdf: .pdf, but text is read from"),
        (".:1,a.txt:2", "texts '.' and 'a.txt' both hold"),
    ],
)
def test_a_mix_that_is_none_is_one_line(
    spec: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "a.pdf"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=re.escape(words)) as raised:
        parse_mix(spec)
    assert "\n" not in str(raised.value)


def mix_of(*shares: int, lengths: Sequence[int | None]) -> Mix:
    source = parse_source(None)
    return tuple(
        Portion(source, Fraction(share, sum(shares)), length)
        for share, length in zip(shares, lengths, strict=True)
    )


def hamilton(shares: Sequence[int], seats: int) -> list[int]:
    """Largest remainders as the textbook has them, in whole numbers."""
    rows = [share * seats // sum(shares) for share in shares]
    remainders = [share * seats % sum(shares) for share in shares]
    for place in sorted(range(len(shares)), key=lambda place: -remainders[place]):
        if sum(rows) < seats:
            rows[place] += 1
    return rows


def test_rows_of_one_length_against_the_textbook() -> None:
    # 4.7, 1.6, 1.59, 1.2 and 0.91 of ten: three more after the whole ones, to .91, .7 and .6
    assert hamilton([470, 160, 159, 120, 91], 10) == [5, 2, 1, 1, 1]
    chance = random.Random(0)
    for _ in range(200):
        shares = [chance.randint(50, 1_000) for _ in range(chance.randint(1, 6))]
        samples = chance.randint(120, 300)  # every share is worth a row
        mix = mix_of(*shares, lengths=[None] * len(shares))
        assert rows_of(mix, samples, 512) == hamilton(shares, samples)


def test_rows_of_several_lengths_come_as_near_as_whole_rows_can() -> None:
    chance = random.Random(1)
    for _ in range(200):
        lengths = [chance.choice([None, 64, 300, 512, 2_048]) for _ in range(chance.randint(1, 5))]
        shares = [chance.randint(200, 1_000) for _ in lengths]
        sizes = [length or 1_024 for length in lengths]
        rows = rows_of(mix_of(*shares, lengths=lengths), 128, 1_024)
        total = sum(count * size for count, size in zip(rows, sizes, strict=True))
        assert abs(total - 128 * 1_024) <= min(sizes) / 2
        for count, size, share in zip(rows, sizes, shares, strict=True):
            assert abs(count * size - 128 * 1_024 * share / sum(shares)) < 2 * max(sizes)


def test_every_source_gives_a_row() -> None:
    assert rows_of(mix_of(998, 1, 1, lengths=[None] * 3), 4, 64) == [2, 1, 1]
    assert rows_of(mix_of(1, 1, 1, lengths=[None] * 3), 1, 64) == [1, 1, 1]
    assert rows_of(mix_of(99, 1, lengths=[None, 512]), 4, 64) == [1, 1]


def chat_about(number: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"What is {numbered(number, 6)}?"},
        {"role": "assistant", "content": f"A list of {numbered(number + 6, 6)}."},
    ]


@pytest.fixture
def two_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents with the numbers below 100,000, and conversations with those above."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.txt").write_text("\f".join(numbered(5_000 * part, 900) for part in range(4)))
    rows = [{"messages": chat_about(100_000 + 100 * row)} for row in range(90)]
    write_rows(tmp_path / "chat.jsonl", rows)


@pytest.mark.usefixtures("two_texts")
def test_chats_and_plain_text_in_their_shares(tokenizer: PreTrainedTokenizerBase) -> None:
    mix = parse_mix("plain.txt:0.6,chat.jsonl:0.4")
    drawn, again, other = (
        calibration_tokens(mix, tokenizer, samples=20, length=64, seed=seed) for seed in (3, 3, 4)
    )
    [tokens] = drawn.tokens
    numbers = [numbers_in(row[None], tokenizer) for row in tokens]
    turn = tokenizer.convert_tokens_to_ids("<|header_start|>")
    from_chat = [min(found) >= 100_000 for found in numbers]
    assert all(max(found) < 100_000 or chat for found, chat in zip(numbers, from_chat, strict=True))
    assert [bool((row == turn).any()) for row in tokens] == from_chat
    assert sum(from_chat) == 8
    for half in (from_chat[::2], from_chat[1::2]):  # what the solver's two halves are made of
        assert sum(half) == 4
    assert from_chat != sorted(from_chat)
    assert from_chat != sorted(from_chat, reverse=True)
    used = [number for found in numbers for number in found]
    assert len(set(used)) == len(used)
    assert drawn.digest == again.digest
    assert torch.equal(tokens, again.tokens[0])
    assert drawn.digest != other.digest
    assert [part.to_json() for part in drawn.drawn] == [
        {"source": "plain.txt", "share": 0.6, "samples": 12, "length": 64, "tokens": 768},
        {"source": "chat.jsonl", "share": 0.4, "samples": 8, "length": 64, "tokens": 512},
    ]


@pytest.mark.usefixtures("two_texts")
def test_a_source_gives_the_same_whatever_stands_beside_it(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    mixed = calibration_tokens(
        parse_mix("chat.jsonl:1,plain.txt:1"), tokenizer, samples=10, length=64, seed=0
    )
    alone = calibration_tokens(parse_source("plain.txt"), tokenizer, samples=5, length=64, seed=0)
    rows = {tuple(row) for row in mixed.tokens[0].tolist()}
    assert {tuple(row) for row in alone.tokens[0].tolist()} < rows


@pytest.mark.usefixtures("two_texts")
def test_two_lengths_of_one_text_use_nothing_twice(tokenizer: PreTrainedTokenizerBase) -> None:
    """Long sequences hold long runs of the text; the short ones are from all over the rest."""
    mix = parse_mix("plain.txt:0.5x32,./plain.txt:0.5x512")
    short, long = calibration_tokens(mix, tokenizer, samples=64, length=64, seed=0).tokens
    assert short.shape == (64, 32)
    assert long.shape == (4, 512)
    numbers = [numbers_in(batch[:, 1:].reshape(1, -1), tokenizer) for batch in (short, long)]
    used = numbers[0] + numbers[1]
    assert len(set(used)) == len(used) > 400
    runs = [
        len(found) / sum(after != before + 1 for before, after in itertools.pairwise(found))
        for found in numbers
    ]
    assert runs[1] > 4 * runs[0]


@pytest.mark.usefixtures("two_texts")
def test_the_digest_of_a_mix_is_of_all_its_batches(tokenizer: PreTrainedTokenizerBase) -> None:
    mix = parse_mix("plain.txt:1x80,chat.jsonl:1,plain.txt:1x48")
    drawn = calibration_tokens(mix, tokenizer, samples=12, length=64, seed=0)
    assert [batch.shape[1] for batch in drawn.tokens] == [48, 64, 80]
    content = b"".join(
        b"%d x %d int64\n" % batch.shape + struct.pack(f"<{batch.numel()}q", *batch.flatten())
        for batch in drawn.tokens
    )
    assert drawn.digest == hashlib.sha256(content).hexdigest()


@pytest.mark.usefixtures("two_texts")
@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("plain.txt:1,chat.jsonl:9", r"text 'chat.jsonl': [\d,]+ tokens, but 360 samples of 64"),
        (
            "chat.jsonl:9x32,chat.jsonl:1x128",
            r"text 'chat.jsonl': [\d,]+ tokens after 20 samples of 128, but 720 samples of 32",
        ),
        ("plain.txt:1,empty.txt:1", "text 'empty.txt': empty, there is no text in it"),
    ],
)
def test_too_little_of_a_mix_names_the_text(
    spec: str, words: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    Path("empty.txt").touch()
    with pytest.raises(UserError, match=words) as raised:
        calibration_tokens(parse_mix(spec), tokenizer, samples=400, length=64, seed=0)
    assert "\n" not in str(raised.value)


def test_no_samples_are_refused_in_a_mix(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="0 samples of 64 tokens: at least 1"):
        calibration_tokens(
            parse_mix("pocket:1,pocket:1x32"), tokenizer, samples=0, length=64, seed=0
        )


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


def test_the_opening_of_a_text_is_what_windows_are_cut_from(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "a.txt").write_text("\f".join([numbered(0, 40), numbered(200, 100)]))
    source = parse_source(str(tmp_path / "a.txt"))
    windows = evaluation_tokens(source, tokenizer, windows=5, length=33).tokens
    assert opening_tokens(source, tokenizer, 160) == windows[:, 1:].flatten().tolist()
    end = tokenizer.convert_tokens_to_ids("<|end_of_text|>")
    parts = [*encode(numbered(0, 40), tokenizer), end, *encode(numbered(200, 100), tokenizer), end]
    assert opening_tokens(source, tokenizer, 1_000_000) == parts


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
    assert (drawn.tokens[0] == end).any(dim=1).float().mean() > 0.4
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
    monkeypatch.setattr(token_rows, "END_OF_TEXT", "<|nowhere|>")
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
