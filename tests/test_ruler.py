"""RULER's tasks: a plain reader of the published wording finds the answer in every prompt.

With a tokenizer of one token a character, so that every text can be read back; at the end with the
pocket model's own.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from evals.answering import read_documents
from evals.counting import FEWEST_WORDS, frequencies
from evals.prompt import Material, Prompt
from evals.questions import ask
from evals.tasks import TASKS, Ladder, parse_depths, parse_lengths, parse_tasks, prompts
from llama4q.errors import UserError
from llama4q.hub import POCKET_MODEL
from llama4q.tokens import load_tokenizer

BOS = 7
TEXT = " ".join(f"Sentence number {chr(97 + n % 26)} is\nshort." for n in range(600))
CHUNK = 256
RULER = [name for name in TASKS if name != "needle"]
NIAH = [name for name in RULER if name.startswith("niah")]
ONE_NEEDLE = [name for name in NIAH if TASKS[name].has_depth]
NEEDLE = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.")
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
LENGTHS = (3_001, 9_000)
DEPTHS = (0.0, 0.4, 1.0)


def squad(articles: int, paragraphs: int) -> dict[str, Any]:
    """A data set in SQuAD form, its last question of each paragraph without an answer."""
    return {
        "data": [
            {
                "title": f"Subject {article}",
                "paragraphs": [
                    {
                        "context": f"In town {article} street {number} has {number + 7} houses. "
                        + "It is long and dull. " * (number + 3),
                        "qas": [
                            {
                                "question": f"How many houses has street {number} of {article}?",
                                "answers": [{"text": f"{number + 7}"}, {"text": "many"}],
                                "is_impossible": False,
                            },
                            {"question": "Why?", "answers": [], "is_impossible": True},
                        ],
                    }
                    for number in range(paragraphs)
                ],
            }
            for article in range(articles)
        ]
    }


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    path = tmp_path_factory.mktemp("squad") / "dev.json"
    path.write_text(json.dumps(squad(20, 6)))
    return Material(encode, decode, BOS, encode(TEXT), CHUNK, read_documents(path))


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]


def decode(tokens: Sequence[int]) -> str:
    return "".join(map(chr, tokens))


def parts(prompt: Prompt) -> tuple[str, str]:
    """What the model reads, without begin-of-text, and what it should write."""
    return decode(prompt.tokens[1 : prompt.answer_start]), decode(
        prompt.tokens[prompt.answer_start :]
    )


def asked(prompt: Prompt) -> list[str]:
    return [decode(prompt.tokens[first:stop]).strip() for first, stop in prompt.answers]


def one(material: Material, task: str, length: int = 9_000, seed: int = 0) -> Prompt:
    return prompts(material, Ladder([length], [0.4], 1, [task], seed))[0]


# What every task promises


@pytest.mark.parametrize("task", RULER)
def test_every_prompt_is_as_long_as_asked(task: str, material: Material) -> None:
    made = prompts(material, Ladder(LENGTHS, DEPTHS, 2, [task]))
    assert [prompt.length for prompt in made] == [n for n in LENGTHS for _ in range(6)]
    assert {prompt.depth for prompt in made} == (set(DEPTHS) if TASKS[task].has_depth else {None})
    assert {prompt.tokens[0] for prompt in made} == {BOS}
    assert len({prompt.tokens for prompt in made}) == len(made)


@pytest.mark.parametrize("task", RULER)
def test_a_prompt_depends_on_seed_and_cell_alone(task: str, material: Material) -> None:
    several = prompts(material, Ladder(LENGTHS, DEPTHS, 2, ["needle", task]))
    alone = prompts(material, Ladder(LENGTHS[1:], [0.4], 1, [task]))
    other = prompts(material, Ladder(LENGTHS[1:], [0.4], 1, [task], seed=1))
    assert set(alone) <= set(several)
    assert not set(alone) & set(other)


@pytest.mark.parametrize("task", RULER)
def test_the_length_that_a_refusal_names_would_do(task: str, material: Material) -> None:
    with pytest.raises(UserError, match=f"^{task}: 9 tokens are too few") as refused:
        one(material, task, length=9)
    enough = re.search(r"lengths of (\d+) or more", str(refused.value))
    assert enough is not None
    length = int(enough[1])
    made = prompts(material, Ladder([length], DEPTHS, 5, [task], seed=1))
    assert {prompt.length for prompt in made} == {length}


# A plain reader


@pytest.mark.parametrize("task", NIAH)
def test_needles_are_where_the_question_looks(task: str, material: Material) -> None:
    for prompt in prompts(material, Ladder(LENGTHS, DEPTHS, 2, [task])):
        text, answer = parts(prompt)
        context, question = text.rsplit("\n", 1)
        kind, keys = re.findall(r"the special magic (\w+) for (.+?) mentioned", question)[0]
        wanted = re.split(", and |, ", keys)
        values: dict[str, list[str]] = {}
        for needle in NEEDLE.finditer(context):
            assert needle[1].startswith(kind)
            values.setdefault(needle[2], []).append(needle[3])
        found = [value for key in wanted for value in values[key]]
        assert asked(prompt) == found
        assert re.split(", and |, ", answer.strip()) == found
        if task.startswith("niah_multikey_2") or task.startswith("niah_multikey_3"):
            assert len(values) > len(context) // 200
        else:
            assert (len(values), *map(len, values.values())) == {
                "niah_multikey_1": (4, 1, 1, 1, 1),
                "niah_multivalue": (1, 4),
                "niah_multiquery": (4, 1, 1, 1, 1),
            }.get(task, (1, 1))
        form = r"\d{7}" if kind.startswith("number") else r"[\da-f]{8}-[\da-f]{4}-4[-\da-f]{21}"
        assert all(re.fullmatch(form, value) for value in found)
        key = r"[-\da-f]{36}" if task == "niah_multikey_3" else "[a-z]+-[a-z]+"
        assert all(re.fullmatch(key, name) for name in values)


def test_haystacks(material: Material) -> None:
    """Noise line by line, or the text on one line."""
    noise, _ = parts(one(material, "niah_single_1"))
    lines = noise.splitlines()[2:-2]
    assert {NOISE} >= {line for line in lines if not NEEDLE.fullmatch(line)}
    essay, _ = parts(one(material, "niah_single_2"))
    context = essay.splitlines()[1]
    assert len(essay.splitlines()) == 3
    assert " ".join(TEXT.split())[200:1000] in " ".join(NEEDLE.sub("", context).split())


def test_the_wording_of_one_needle(material: Material) -> None:
    """As RULER's template comes out for a single number."""
    text, _ = parts(one(material, "niah_multikey_1"))
    assert text.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n"
    )
    key = text.rsplit(" for ", 1)[1].split()[0]
    assert text.endswith(
        f"\nWhat is the special magic number for {key} mentioned in the provided text? "
        f"The special magic number for {key} mentioned in the provided text is"
    )


def test_the_wording_of_several_needles(material: Material) -> None:
    text, answer = parts(one(material, "niah_multivalue"))
    assert text.startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize "
        "it. I will quiz you about the numbers afterwards.\n"
    )
    key = text.rsplit(" for ", 1)[1].split()[0]
    assert text.endswith(
        f"\nWhat are all the special magic numbers for {key} mentioned in the provided text? "
        f"The special magic numbers for {key} mentioned in the provided text are"
    )
    assert re.fullmatch(r" \d{7}, \d{7}, \d{7}, and \d{7}", answer)


@pytest.mark.parametrize("length", LENGTHS)
def test_variables_are_tracked(length: int, material: Material) -> None:
    text, answer = parts(one(material, "vt", length))
    start = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    )
    _, example, rest = text.split(start)
    for part, letters in ((example, 3), (rest, 5)):
        context, question = part.split("\nQuestion: ")
        value = re.findall(r"assigned the value (\d{5}) in the text above\. Answer: ", question)[0]
        holding: list[str] = []
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", context):
            assert source == value if not holding else source == holding[-1]
            holding.append(name)
        assert {len(name) for name in holding} == {letters}
        assert len(set(holding)) == 5
        names = re.findall(r"they are:((?: [A-Z]+)*)", question)[0] if part is example else answer
        assert names.split() == holding
        assert f"5 variables are assgined the value {value}, they are:" in question
    assert asked(one(material, "vt", length)) == answer.split()
    assert NOISE in rest


@pytest.mark.parametrize(
    ("length", "example", "common", "others"), [(3_001, (3, 1), 6, 1), (20_000, (10, 3), 30, 3)]
)
def test_words_are_counted(
    length: int, example: tuple[int, int], common: int, others: int, material: Material
) -> None:
    prompt = one(material, "cwe", length)
    text, answer = parts(prompt)
    start = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
    )
    question = (
        "\nQuestion: What are the 10 most common words in the above list? "
        "Answer: The top 10 words that appear most often in the list are:"
    )
    _, first, second = text.split(start)
    context, shown = first.split(question)
    listed = re.findall(r"\d+\. (\S+)", context)
    assert sorted(Counter(listed).values())[-10:] == [example[0]] * 10
    assert set(Counter(listed).values()) == set(example)
    assert_named_in_order(listed, shown.strip())
    context, shown = second.split(question)
    assert shown == ""
    numbered = re.findall(r"(\d+)\. (\S+)", context)
    numbers = [int(number) for number, _ in numbered]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert numbers[0] <= 2 * others + 1
    listed = [word for _, word in numbered]
    counts = Counter(listed)
    assert sorted(counts.values())[-10:] == [common] * 10
    assert Counter(counts.values())[others] >= len(counts) - 12  # the words at the cut have fewer
    assert asked(prompt) == assert_named_in_order(listed, answer.strip())


def assert_named_in_order(listed: list[str], answer: str) -> list[str]:
    """The ten most common words, numbered, in the order in which the list has them first."""
    top = [word for word, _ in Counter(listed).most_common(10)]
    expected = [word for word in dict.fromkeys(listed) if word in top]
    assert answer == " ".join(f"{n}. {word}" for n, word in enumerate(expected, start=1))
    return expected


def test_a_long_list_has_enough_words(material: Material) -> None:
    """More than there are single ones: pairs; all of them of one kind."""
    text, answer = parts(one(material, "cwe", 200_000))
    listed = re.findall(r"\d+\. (\S+)", text.rsplit("often.\n", 1)[1])
    assert all("-" in word for word in listed[1:])
    assert_named_in_order(listed, answer.strip())


@pytest.mark.parametrize("length", LENGTHS)
def test_code_words_are_counted(length: int, material: Material) -> None:
    prompt = one(material, "fwe", length)
    text, answer = parts(prompt)
    assert text.startswith(
        "Read the following coded text and track the frequency of each coded word. Find the three "
        "most frequently appeared coded words."
    )
    assert text.endswith(
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
        "three most frequently appeared words in the above coded text? Answer: According to the "
        "coded text above, the three most frequently appeared words are:"
    )
    code = text.split("coded words.", 1)[1].split("\n")[0].split()
    counts = Counter(word for word in code if re.fullmatch("[a-z]{6}", word))
    first, second, third, fourth = counts.most_common(4)
    assert third[1] > fourth[1]
    assert asked(prompt) == [first[0], second[0], third[0]]
    assert answer == f" {first[0]}, {second[0]}, and {third[0]}"
    dots = len(code) - sum(counts.values())
    assert dots > first[1]
    # zeta with exponent 2: the k-th word, dots being the first, comes total / (zeta(2) k^2) times
    assert [n for _, n in counts.most_common(4)] == pytest.approx(
        [first[1] * 4 / k**2 for k in (2, 3, 4, 5)], abs=1
    )


def test_three_words_always_stand_out() -> None:
    for total in range(FEWEST_WORDS, 5_000):
        counts = frequencies(total, 5)
        assert counts == sorted(counts, reverse=True)
        assert counts[3] > counts[4]
    assert frequencies(FEWEST_WORDS - 1, 5)[3] == frequencies(FEWEST_WORDS - 1, 5)[4]


def test_documents_answer_the_question(material: Material) -> None:
    spread = 0
    for prompt in prompts(material, Ladder(LENGTHS, DEPTHS, 2, ["qa"])):
        text, answer = parts(prompt)
        told = (
            "Answer the question based on the given documents. Only give me the answer and do not "
            "output any other words."
        )
        assert text.startswith(f"{told}\n\nThe following are given documents.\n\n")
        context, question = text.split(f"\n\n{told}\n\nQuestion: ")
        street, town = re.findall(r"street (\d+) of (\d+)\? Answer:$", question)[0]
        found = re.findall(rf"Document (\d+):\nIn town {town} street {street} has (\d+)", context)
        [(number, houses)] = found
        assert answer == f" {houses}"
        last = int(re.findall(r"Document (\d+):\n", context)[-1])
        shown = (int(number) - 2) / (last - 2)  # the first one is cut
        assert shown == pytest.approx(prompt.depth, abs=0.6 / (last - 2))
        near = re.findall(rf"Document (\d+):\nIn town {town} street", context)
        assert len(near) == 6  # all of the article, wherever they stand
        spread += max(map(int, near)) - min(map(int, near)) > 6
    assert spread > 3


# Another reading of the same definitions


def harness(file: str, name: str) -> Any:
    """A constant of lm-evaluation-harness's port of RULER, read from its source."""
    found = importlib.util.find_spec("lm_eval")
    if found is None or found.origin is None:
        pytest.skip("lm-evaluation-harness is not installed")
    source = (Path(found.origin).parent / "tasks/ruler" / file).read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"no {name} in {file}")


@pytest.mark.parametrize(
    ("task", "file"),
    [
        ("vt", "vt_utils.py"),
        ("cwe", "cwe_utils.py"),
        ("fwe", "fwe_utils.py"),
        ("qa", "qa_utils.py"),
    ],
)
def test_the_wording_against_the_harness(task: str, file: str, material: Material) -> None:
    text, _ = parts(one(material, task))
    found = harness(file, "CONFIG")
    found = found.get("variable_tracking", found)
    before, behind = found["template"].split("{context}")
    query = re.findall(r"assigned the value (\d+)|Question: (How .*\?) Answer:", text)
    blanks = {"query": "".join(query[-1]) if query else "", "num_v": 5}
    told = f"{behind.format(**blanks)} {found['answer_prefix'].format(**blanks).strip()}"
    assert text.endswith(told)
    assert text.startswith(before.rstrip(" "))
    assert text.count(before.rstrip(" ")) == (2 if task in ("vt", "cwe") else 1)  # an example


@pytest.mark.parametrize("task", ["niah_multivalue", "niah_multiquery"])
def test_the_wording_of_needles_against_the_harness(task: str, material: Material) -> None:
    text, _ = parts(one(material, task))
    keys = re.findall(r"numbers for (.+?) mentioned", text)[-1]
    before, behind = harness("niah_utils.py", "TEMPLATE").split("{context}")
    assert text.startswith(before.format(type_needle_v="numbers"))
    assert behind.format(type_needle_v="numbers", query=keys) in text
    needle = harness("prepare_niah.py", "NEEDLE").format(
        type_needle_v="numbers", key=keys.split(",")[0], value=""
    )
    assert needle.rstrip(".") in text


# Where needles stand


@pytest.mark.parametrize("task", ONE_NEEDLE)
def test_a_needle_stands_at_its_depth_behind_a_sentence(task: str, material: Material) -> None:
    for prompt in prompts(material, Ladder([9_000], (0.0, 0.25, 0.5, 1.0), 1, [task])):
        text, answer = parts(prompt)
        context = text[text.index("afterwards.\n") + 12 : text.rindex("\nWhat is")]
        [at] = [one.start() for one in NEEDLE.finditer(context) if one[3] == answer.strip()]
        size = len(NEEDLE.search(context, at).group())  # type: ignore[union-attr]
        near = 0.02 if task == "niah_multikey_1" else 2e-4  # there other needles stand before it
        assert at / (len(context) - size - 1) == pytest.approx(prompt.depth, abs=near)
        assert context[:at].rstrip()[-1:] in ("", ".")


@pytest.mark.parametrize("task", ONE_NEEDLE)
def test_every_second_needle_lies_across_a_chunk_border(task: str, material: Material) -> None:
    made = prompts(material, Ladder([9_000], (0.0, 0.3, 0.6, 1.0), 4, [task]))
    across = []
    for prompt in made:
        text, answer = parts(prompt)
        [found] = [one for one in NEEDLE.finditer(text) if one[3] == answer.strip()]
        # one token is begin-of-text, and the space or line end beside a needle belongs to it
        first, last = found.start() + 1, found.end() + 1
        across.append((first - 1) // CHUNK < last // CHUNK)
        assert prompt.depth is not None
        share = found.start() / 9_000
        assert share == pytest.approx(prompt.depth, abs=0.06)
    inner = [number for number, p in enumerate(made) if p.depth in (0.3, 0.6)]
    assert all(across[number] for number in inner if number % 2)
    assert not all(across[number] for number in inner)


# Options


def test_ruler_is_all_tasks_that_can_be_made() -> None:
    assert parse_tasks("ruler", True) == RULER
    assert parse_tasks("ruler", False) == [name for name in RULER if name != "qa"]
    assert parse_tasks(" vt,needle, vt", False) == ["vt", "needle"]
    assert len(RULER) == 12


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("1024,4096", [1024, 4096]),
        ("4k..32K", [4096, 8192, 16384, 32768]),
        ("4k..1M", [1 << power for power in range(12, 21)]),
        ("1000, 1k..3000", [1000, 1024, 2048]),
        ("", []),
    ],
)
def test_lengths(text: str, lengths: list[int]) -> None:
    assert parse_lengths(text) == lengths


@pytest.mark.parametrize("text", ["long", "1.5", "0", "-4", "4k..", "k", "4kk"])
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match=r"^lengths '.*': give numbers of tokens with commas"):
        parse_lengths(text)


def test_depths() -> None:
    assert parse_depths("0, 0.5,1,0.5") == [0, 0.5, 1]
    with pytest.raises(UserError, match=r"^depths 'deep': give numbers"):
        parse_depths("deep")


# Data sets for question answering


def test_a_data_set_in_squad_form(tmp_path: Path) -> None:
    (tmp_path / "dev.json").write_text(json.dumps(squad(2, 3)))
    documents = read_documents(tmp_path / "dev.json")
    assert len(documents.texts) == len(documents.questions) == 6
    last = documents.questions[-1]
    assert (last.text, last.answer) == ("How many houses has street 2 of 1?", "9")
    assert documents.texts[last.document].startswith("In town 1 street 2 has 9 houses.")
    assert last.near == (3, 4)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "not in SQuAD form"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', "not in SQuAD form (KeyError: 'context')"),
        ('{"data": []}', "no question with an answer"),
        (json.dumps({"data": [{"paragraphs": [{"context": "a", "qas": []}]}]}), "no question with"),
    ],
)
def test_a_file_of_another_form(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "dev.json").write_text(content)
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        read_documents(tmp_path / "dev.json")
    assert str(refused.value).startswith(str(tmp_path / "dev.json"))
    assert "\n" not in str(refused.value)


def test_a_data_set_that_is_too_small(material: Material) -> None:
    with pytest.raises(UserError, match=r"^qa: the data set has 1\d,\d+ tokens .* not 99,999"):
        one(material, "qa", 99_999)


# The pocket model's tokenizer


def test_prompts_longer_than_the_windows_hide_in_more_of_the_text() -> None:
    """And know where chunks of the model's attention end."""
    tokenizer = load_tokenizer(POCKET_MODEL)
    ladder = Ladder([4_096], [0.5], 2, ["niah_single_2"])
    found = ask(tokenizer, None, 1, 64, ladder, chunk=512)
    text = tokenizer.decode(found.prompts[0].tokens)
    sentences = re.findall(r"[A-Z][^.]{40,200}\.", text)
    assert len(set(sentences)) == len(sentences) > 10, Counter(sentences).most_common(3)
    without = ask(tokenizer, None, 1, 64, ladder)
    assert without.prompts[0] == found.prompts[0]
    assert without.prompts[1] != found.prompts[1]


@pytest.mark.parametrize("task", [name for name in RULER if name != "qa"])
def test_pieces_are_tokenized_as_the_whole_would_be(task: str) -> None:
    """But for the few tokens at the cut, the encoding of the whole text is the prompt."""
    tokenizer = load_tokenizer(POCKET_MODEL)

    def pieces(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def text_of(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    own = Material(pieces, text_of, tokenizer.bos_token_id, pieces(TEXT))
    prompt = one(own, task, 2_048)
    whole = [tokenizer.bos_token_id, *pieces(text_of(prompt.tokens))]
    same = sum((Counter(whole) & Counter(prompt.tokens)).values())
    assert max(len(whole), 2_048) - same <= 6
