"""Training rows of the pocket model: plain text, and text with numbers to find again.

Pure and seeded; knows token ids and one `encode` function, nothing of networks. A row is a list
of (tokens, weight of each token in the loss). The weights say what can be learnt: the digits of a
statement cannot be foreseen (0), the digits of an answer can (1 and more), wording only half
matters. The wordings include the one that `evals/needle.py` asks in.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evals.needle import QUESTION, STATEMENT
from evals.words import KEYS

Piece = tuple[list[int], float]
Pair = tuple[list[Piece], list[Piece]]

ANSWER_WEIGHT = 4.0
WORDING_WEIGHT = 0.2

# Statement up to the number, question up to the number; a full stop or line end closes both.
WORDINGS = (
    (STATEMENT.removesuffix("{digits}.").rstrip(), QUESTION),
    ("The magic number for {key} is", "The magic number for {key} is"),
    ("The special magic number for {key} is:", "What is the special magic number for {key}? It is"),
    ("Remember: the code of {key} is", "What is the code of {key}? The code of {key} is"),
    ("{key} =", "{key} ="),
)
CHAT_QUESTION = "What is the special magic number for {key} mentioned in the provided text?"
CHAT_ANSWER = "The special magic number for {key} mentioned in the provided text is"


@dataclass(frozen=True)
class Phase:
    """One stretch of the curriculum."""

    name: str
    lengths: tuple[int, ...]
    steps: int
    retrieval: float
    """Share of the rows that hold needles."""
    packed: bool = False
    """Rows of nothing but statements and questions."""
    tokens: int = 4_096
    """Tokens of one step."""
    chunk: int = 256
    """Attention chunk of the local layers; a small one leaves short rows to the global layers."""


@dataclass(frozen=True)
class Special:
    """Ids of the tokens that rows are laid out with."""

    begin: int
    end: int
    header_start: int
    header_end: int
    turn_end: int


class Rows:
    """Draws rows of a given length from a stream of text tokens."""

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        stream: Sequence[int],
        words: Sequence[str],
        special: Special,
        seed: int,
    ) -> None:
        self.encode = encode
        self.stream = stream
        self.words = words
        self.special = special
        self.chance = random.Random(seed)
        self.digit_ids = [encode(str(digit))[0] for digit in range(10)]

    def text(self, length: int) -> list[Piece]:
        start = self.chance.randrange(len(self.stream) - length)
        row = list(self.stream[start : start + length])
        if self.chance.random() < 0.7:
            return [([self.special.begin], 0.0), (row[1:], 1.0)]
        return [(row[:1], 0.0), (row[1:], 1.0)]

    def packed(self, length: int) -> list[Piece]:
        """As many statements as fit, each asked again later in the row."""
        wording = self._wording()
        pairs: list[Pair] = []
        room = length - 1
        keys = self._keys(64)
        while room > 0:
            pair = self._pair(wording, keys.pop(), "\n")
            room -= _size(pair[0]) + _size(pair[1])
            if room >= 0:
                pairs.append(pair)
        questions = [question for _, question in pairs]
        self.chance.shuffle(questions)
        # Ask on while the row isn't full: the same questions once more.
        body = [piece for statement, _ in pairs for piece in statement]
        body += [piece for question in questions * 3 for piece in question]
        return _cut([([self.special.begin], 0.0), *body], length)

    def hidden(self, length: int) -> list[Piece]:
        """Needles in running text; most questions at the end, in a chat turn now and then."""
        most = max(4, min(24, length // 64))
        count = 1 if self.chance.random() < 0.1 else self.chance.randint(3, most)
        wording = self._wording()
        chat = length >= 512 and self.chance.random() < 0.2
        end = self.chance.choice(("\n", "\n", " ", "\n\n"))
        if chat:
            wording = (WORDINGS[0][0], CHAT_ANSWER)
        keys = self._keys(count)
        pairs = [self._pair(wording, key, end) for key in keys]
        if chat:
            pairs = [
                (said, self._turns(key, asked))
                for key, (said, asked) in zip(keys, pairs, strict=True)
            ]
        statements = [said for said, _ in pairs]
        self.chance.shuffle(pairs)
        questions = [asked for _, asked in pairs[: max(1, self._fitting(pairs, length))]]
        opening: list[Piece] = [([self.special.begin], 0.0)]
        if chat:
            opening += [(self._header("user"), 0.0)]
        used = 1 + sum(map(_size, (opening, *statements, *questions)))
        if used > length:
            return self.packed(length)
        gaps = self._gaps(length - used + 1, len(statements) + 1)
        return _cut(opening + self._weave(statements, gaps) + self._ask(questions), length)

    def batch(self, phase: Phase, length: int, count: int) -> list[list[Piece]]:
        """`count` rows, of which exactly the phase's share (rounded by chance) holds needles."""
        exact = phase.retrieval * count
        needles = int(exact) + (self.chance.random() < exact - int(exact))
        draw = self.packed if phase.packed else self.hidden
        return [draw(length) if row < needles else self.text(length) for row in range(count)]

    def _wording(self) -> tuple[str, str]:
        return self.chance.choices(WORDINGS, weights=(4, 3, 1, 1, 1))[0]

    def _keys(self, count: int) -> list[str]:
        """Different keys: the needle task's own, words of the text, or two joined."""
        keys: list[str] = []
        while len(keys) < count:
            kind = self.chance.random()
            key = self.chance.choice(KEYS if kind < 0.5 else self.words)
            if kind > 0.85:
                key += "-" + self.chance.choice(KEYS)
            if key not in keys:
                keys.append(key)
        return keys

    def _pair(self, wording: tuple[str, str], key: str, end: str) -> Pair:
        length = self.chance.choices((5, 4, 6, 7), weights=(6, 1, 2, 1))[0]
        digits = [self.chance.randint(1, 9)] + [
            self.chance.randint(0, 9) for _ in range(length - 1)
        ]
        number = [self.digit_ids[digit] for digit in digits]
        said, asked = (text.format(key=key) for text in wording)
        before = " " if end == " " else "\n"
        space = self.encode(" ")
        statement = [
            (self.encode(before + said) + space, WORDING_WEIGHT),
            (number, 0.0),
            (self.encode("." + end.rstrip(" ")), WORDING_WEIGHT),
        ]
        question = [
            (self.encode("\n" + asked) + space, WORDING_WEIGHT),
            (number, ANSWER_WEIGHT),
            (self.encode("."), 1.0),
        ]
        return statement, question

    def _header(self, role: str) -> list[int]:
        special = self.special
        return [special.header_start, *self.encode(role), special.header_end, *self.encode("\n\n")]

    def _turns(self, key: str, answer: list[Piece]) -> list[Piece]:
        """A question in the template's own tokens, then the answer as the assistant's turn."""
        turn_end = [self.special.turn_end]
        (words, _), *rest = answer
        asked = self.encode("\n" + CHAT_QUESTION.format(key=key)) + turn_end
        opening = asked + self._header("assistant")
        if self.chance.random() < 0.5:  # the bare number
            return [(opening, WORDING_WEIGHT), *rest[:1], (turn_end, 1.0)]
        said = words[len(self.encode("\n")) :]
        return [(opening + said, WORDING_WEIGHT), *rest, (turn_end, 1.0)]

    def _fitting(self, pairs: list[Pair], length: int) -> int:
        """How many of the questions leave at least half of the row to text and statements."""
        room, count = length // 2, 0
        for _, question in pairs:
            room -= _size(question)
            if room < 0:
                break
            count += 1
        return count

    def _gaps(self, total: int, count: int) -> list[int]:
        cuts = sorted(self.chance.randint(0, total) for _ in range(count - 1))
        return [after - before for before, after in zip([0, *cuts], [*cuts, total], strict=True)]

    def _weave(self, statements: list[list[Piece]], gaps: list[int]) -> list[Piece]:
        at = self.chance.randrange(len(self.stream) - sum(gaps) - 1)
        woven: list[Piece] = []
        for statement, gap in zip([*statements, []], gaps, strict=True):
            woven.append((list(self.stream[at : at + gap]), 1.0))
            woven += statement
            at += gap
        return woven

    def _ask(self, questions: list[list[Piece]]) -> list[Piece]:
        return [piece for question in questions for piece in question]


def _size(pieces: Sequence[Piece]) -> int:
    return sum(len(tokens) for tokens, _ in pieces)


def _cut(pieces: list[Piece], length: int) -> list[Piece]:
    """Exactly `length` tokens; too few are an error of the caller."""
    kept: list[Piece] = []
    room = length
    for tokens, weight in pieces:
        kept.append((tokens[:room], weight))
        room -= len(kept[-1][0])
    if room:
        raise ValueError(f"A row is {room} tokens short of {length}.")
    return kept


def flatten(row: list[Piece]) -> tuple[list[int], list[float]]:
    """Tokens, and the weight of each as a target."""
    tokens = [token for piece, _ in row for token in piece]
    weights = [weight for piece, weight in row for _ in piece]
    return tokens, weights
