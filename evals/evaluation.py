"""Original and quantized model side by side in one streamed pass, and what sets them apart.

Rides along with a quantize run, or with `compare` over any two checkpoints. Both models see the
same windows of text and the same prompts, of which several ranks take turns. Knows nothing of how
codes are found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from llama4q.config import ModelConfig
from llama4q.errors import UserError
from llama4q.hidden import Spool, Store
from llama4q.model import DecoderLayer, Head, cut_keys_values, logits
from llama4q.prefetch import prefetched
from llama4q.ranks import ALONE, Ranks
from llama4q.stream import POSITIONS_AT_ONCE, embed, passed, split_rows
from llama4q.weights import LayerReader

from . import retrieval
from .layers import Sums, cut_share, sums
from .likelihood import Window, bits_per_byte, compared, summary
from .passages import worst
from .prompt import Prompt
from .questions import Questions
from .retrieval import Score
from .settings import other_settings


class Evaluation:
    """A LayerObserver that carries two streams of hidden states and compares them."""

    def __init__(
        self,
        config: ModelConfig,
        questions: Questions,
        ranks: Ranks = ALONE,
        served_config: ModelConfig | None = None,
    ) -> None:
        """`served_config` is the quantized model's, where it may be another one.

        Raises UserError for windows or prompts longer than the model reads.
        """
        refuse_long(config, [questions.windows.shape[1], *(p.length for p in questions.prompts)])
        self.config = config
        self.served_config = served_config or config
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
        cut = [cut_keys_values(self.served_config, quantized, batch) for batch in self.served]
        plain = passed(self.config, original, self.plain)
        served = passed(self.served_config, quantized, self.served)
        # sums are exact, so that they do not depend on who found what
        found = Sums([part for rank in self.ranks.everyone(sums(plain, served)) for part in rank])
        lost = cut_share(one for rank in self.ranks.everyone(cut) for one in rank)
        self.layers.append({"layer": original.index, **found.to_json(), "cut": lost})

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
            "other_settings": other_settings(self.config, self.served_config),
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
            (_scores(self.config, original, x), _scores(self.served_config, quantized, y), wanted)
            for x, y, wanted in zip(*parts, strict=True)
        )

    def _answers(self, head: Head, hidden: torch.Tensor, prompt: Prompt) -> Score:
        """How well a model answers; logits are made of the answer's positions alone."""
        scores = _scores(self.config, head, hidden[retrieval.answer_positions(prompt)])
        return retrieval.score(scores.argmax(dim=-1), prompt)

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

    def _retrieval(self, answers: Sequence[Sequence[Score]]) -> dict[str, Any] | None:
        if not answers:
            return None
        plain, served = zip(*answers, strict=True)
        return retrieval.summary(self.questions.prompts, plain, served, self.questions.seed)


def refuse_long(config: ModelConfig, lengths: Iterable[int]) -> None:
    """Raises UserError for windows or prompts, by their tokens, longer than the model reads."""
    longest = max(lengths)
    if longest > config.max_positions:
        raise UserError(
            f"evaluation on {longest} tokens, but the model reads at most "
            f"{config.max_positions}; choose shorter windows and prompts"
        )


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
    evaluation = Evaluation(config, questions, served_config=quantized.config)
    embedding = original.embedding()
    evaluation.start(embedding, spool or Spool(device=embedding.device))
    del embedding

    def both(index: int) -> tuple[DecoderLayer, DecoderLayer]:
        return original.layer(index), quantized.layer(index)

    for plain, served in prefetched(both, range(config.num_layers)):
        evaluation.layer(plain, served)
        layer_done()
    return evaluation.finish(original.head(), quantized.head())
