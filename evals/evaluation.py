"""Original and quantized model side by side in one streamed pass, and what sets them apart.

Rides along with a quantize run, or with `compare` over any two checkpoints. Both models see the
same windows of text and the same needle prompts, of which several ranks take turns. Knows nothing
of how codes are found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from llama4q.config import ModelConfig
from llama4q.errors import UserError
from llama4q.hidden import Spool, Store
from llama4q.model import DecoderLayer, Head, Routing, logits
from llama4q.prefetch import prefetched
from llama4q.ranks import ALONE, Ranks
from llama4q.stream import POSITIONS_AT_ONCE, advance, embed, pieces_of, split_rows
from llama4q.weights import LayerReader

from . import retrieval
from .likelihood import Window, bits_per_byte, compared, summary
from .needle import NeedlePrompt
from .passages import worst
from .questions import Questions

# tokens that both models send to the same expert, and how many each one sends to each
RoutedTokens = tuple[int, torch.Tensor, torch.Tensor]


class Evaluation:
    """A LayerObserver that carries two streams of hidden states and compares them."""

    def __init__(self, config: ModelConfig, questions: Questions, ranks: Ranks = ALONE) -> None:
        """Raises UserError for windows or prompts longer than the model reads."""
        longest = max([questions.windows.shape[1], *(p.length for p in questions.prompts)])
        if longest > config.max_positions:
            raise UserError(
                f"evaluation on {longest} tokens, but the model reads at most "
                f"{config.max_positions}; choose shorter windows and prompts"
            )
        self.config = config
        self.questions = questions
        self.ranks = ranks
        asked = retrieval.digest(questions.prompts)
        self.key = f"{questions.digest} {questions.stride} {asked}"
        self.layers: list[dict[str, Any]] = []

    def start(self, embedding: torch.Tensor, spool: Spool) -> None:
        """Every rank takes every so-manyth batch."""
        every = [self.questions.windows, *retrieval.batches(self.questions.prompts)]
        batches = [part for batch in every for part in split_rows(batch)]
        numbers = torch.arange(sum(map(len, batches))).split([len(batch) for batch in batches])
        own = slice(self.ranks.number, None, self.ranks.count)
        self.numbers = [number for some in numbers[own] for number in some.tolist()]
        self.plain = embed(embedding, batches[own], spool)
        self.served = spool.copy(self.plain)

    def layer(self, original: DecoderLayer, quantized: DecoderLayer) -> None:
        plain = advance(self.config, original, self.plain)
        served = advance(self.config, quantized, self.served)
        found = self.ranks.everyone((self._errors(), self._routing(plain, served)))
        # exact sums, so that they do not depend on who found what
        energies, errors = zip(*(pair for errors, _ in found for pair in errors), strict=True)
        self.layers.append(
            {
                "layer": original.index,
                "hidden_error": math.fsum(errors) / math.fsum(energies),
                **_routed([routing for _, routing in found if routing is not None]),
            }
        )

    def _errors(self) -> list[tuple[float, float]]:
        """Energy of the hidden states, piece by piece, and of what sets the models' apart."""
        return [
            (_energy(x), _energy(x.double() - y.double()))
            for x, y in (
                (self.plain.rows(piece), self.served.rows(piece)) for piece in pieces_of(self.plain)
            )
        ]

    def _routing(self, plain: Routing | None, served: Routing | None) -> RoutedTokens | None:
        if plain is None or served is None:
            return None
        experts = self.config.num_experts
        return (
            int((plain.expert == served.expert).sum()),
            torch.bincount(plain.expert, minlength=experts),
            torch.bincount(served.expert, minlength=experts),
        )

    def finish(self, original: Head, quantized: Head) -> dict[str, Any]:
        """The report's `evidence`."""
        own: dict[int, Any] = {}  # by the number of the sequence
        windows = len(self.questions.windows)
        for number, plain, served in zip(
            self.numbers, _sequences(self.plain), _sequences(self.served), strict=True
        ):
            if number < windows:
                targets = self.questions.scored(number)
                own[number] = self._window(original, quantized, plain, served, targets)
            else:
                prompt = self.questions.prompts[number - windows]
                own[number] = [
                    self._answers(head, hidden, prompt)
                    for head, hidden in ((original, plain), (quantized, served))
                ]
        found = {number: one for rank in self.ranks.everyone(own) for number, one in rank.items()}
        return {
            "likelihood": self._likelihood([found[number] for number in range(windows)]),
            "layers": self.layers,
            "retrieval": self._retrieval([found[number] for number in range(windows, len(found))]),
        }

    def _window(
        self,
        original: Head,
        quantized: Head,
        plain: torch.Tensor,
        served: torch.Tensor,
        targets: torch.Tensor,
    ) -> Window:
        there = targets.to(plain.device)
        before = slice(-len(targets) - 1, -1)  # the positions that predict them
        parts = [part.split(POSITIONS_AT_ONCE) for part in (plain[before], served[before], there)]
        return compared(
            (_scores(self.config, original, x), _scores(self.config, quantized, y), wanted)
            for x, y, wanted in zip(*parts, strict=True)
        )

    def _answers(self, head: Head, hidden: torch.Tensor, prompt: NeedlePrompt) -> bool:
        """Whether a model answers exactly."""
        scores = _scores(self.config, head, hidden[retrieval.answer_positions(prompt)])
        return retrieval.exact(scores.argmax(dim=-1), prompt)

    def _likelihood(self, windows: Sequence[Window]) -> dict[str, Any]:
        asked = self.questions
        found = summary(windows)
        for side, bits in bits_per_byte(windows, asked.nbytes()).items():
            found[side]["bits_per_byte"] = bits
        return {
            **found,
            "digest": asked.digest,
            "text": asked.text,
            "stride": asked.stride or asked.windows.shape[1] - 1,
            "worst": worst(windows, list(asked.windows), asked.decode),
        }

    def _retrieval(self, answers: Sequence[Sequence[bool]]) -> dict[str, Any] | None:
        if not answers:
            return None
        plain, served = zip(*answers, strict=True)
        return retrieval.summary(self.questions.prompts, plain, served, self.questions.seed)


def _energy(values: torch.Tensor) -> float:
    return float(values.double().square().sum())


def _routed(found: Sequence[RoutedTokens]) -> dict[str, Any]:
    """The report's lines on one layer's router, from those of all ranks; none of a dense one."""
    if not found:
        return {"agreement": None, "load_original": None, "load_quantized": None}
    same, plain, served = (sum(parts) for parts in zip(*found, strict=True))
    return {
        "agreement": same / int(plain.sum()),
        "load_original": plain.tolist(),
        "load_quantized": served.tolist(),
    }


def _sequences(batches: Store) -> Iterator[torch.Tensor]:
    """Of all batches, one after the other, each `[T, D]`."""
    return (row for batch in batches for row in batch)


def _scores(config: ModelConfig, head: Head, hidden: torch.Tensor) -> torch.Tensor:
    """Logits `[N, vocabulary]`; raises UserError when they are not finite."""
    scores = logits(config, head, hidden)
    if not torch.isfinite(torch.stack(scores.aminmax())).all():
        raise UserError(
            "lm_head: the logits are NaN or Inf; the values of model.norm or lm_head are too "
            "large, download the checkpoint again"
        )
    return scores


@torch.inference_mode()
def compare(
    original: LayerReader,
    quantized: LayerReader,
    questions: Questions,
    layer_done: Callable[[], None],
    spool: Spool | None = None,
) -> dict[str, Any]:
    """The evidence for any two checkpoints of one architecture, streamed beside each other.

    Hidden states lie in `spool`; without one, in memory.

    Raises UserError when the two are not of the same sizes.
    """
    config = original.config
    if (config.num_layers, config.hidden_size, config.vocab_size, config.moe_layers) != (
        quantized.config.num_layers,
        quantized.config.hidden_size,
        quantized.config.vocab_size,
        quantized.config.moe_layers,
    ):
        raise UserError(
            f"{quantized.checkpoint.folder} and {original.checkpoint.folder} are models of "
            f"different sizes; compare a checkpoint with the one that it was made from"
        )
    evaluation = Evaluation(config, questions)
    embedding = original.embedding()
    evaluation.start(embedding, spool or Spool(device=embedding.device))
    del embedding

    def both(index: int) -> tuple[DecoderLayer, DecoderLayer]:
        return original.layer(index), quantized.layer(index)

    for plain, served in prefetched(both, range(config.num_layers)):
        evaluation.layer(plain, served)
        layer_done()
    return evaluation.finish(original.head(), quantized.head())
