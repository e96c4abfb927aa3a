"""Original and quantized model side by side in one streamed pass, and what sets them apart.

Rides along with a quantize run, or with `compare` over any two checkpoints. Both models see the
same windows of text and the same needle prompts. Knows nothing of how codes are found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llama4q.config import ModelConfig
from llama4q.errors import UserError
from llama4q.hidden import Spool, Store
from llama4q.model import DecoderLayer, Head, Routing, logits
from llama4q.prefetch import prefetched
from llama4q.stream import POSITIONS_AT_ONCE, advance, embed
from llama4q.weights import LayerReader

from . import retrieval
from .likelihood import Likelihood
from .questions import Questions


class Evaluation:
    """A LayerObserver that carries two streams of hidden states and compares them."""

    def __init__(self, config: ModelConfig, questions: Questions) -> None:
        """Raises UserError for windows or prompts longer than the model reads."""
        longest = max([questions.windows.shape[1], *(p.length for p in questions.prompts)])
        if longest > config.max_positions:
            raise UserError(
                f"evaluation on {longest} tokens, but the model reads at most "
                f"{config.max_positions}; choose shorter windows and prompts"
            )
        self.config = config
        self.questions = questions
        self.key = f"{questions.digest} {retrieval.digest(questions.prompts)}"
        self.routing: list[dict[str, Any]] = []

    def start(self, embedding: torch.Tensor, spool: Spool) -> None:
        inputs = [self.questions.windows, *retrieval.batches(self.questions.prompts)]
        self.plain = embed(embedding, inputs, spool)
        self.served = spool.copy(self.plain)

    def layer(self, original: DecoderLayer, quantized: DecoderLayer) -> None:
        plain = advance(self.config, original, self.plain)
        served = advance(self.config, quantized, self.served)
        agreement = _agreement(plain, served)
        if agreement is not None:
            self.routing.append({"layer": original.index, "agreement": agreement})

    def finish(self, original: Head, quantized: Head) -> dict[str, Any]:
        """The report's `evidence`."""
        plain, served = _Rows(self.plain), _Rows(self.served)
        return {
            "likelihood": self._likelihood(original, quantized, plain, served),
            "routing": self.routing,
            "retrieval": self._retrieval(original, quantized, plain, served),
        }

    def _likelihood(
        self, original: Head, quantized: Head, plain: _Rows, served: _Rows
    ) -> dict[str, Any]:
        collected = Likelihood()
        device = original.norm.device
        for window in self.questions.windows:
            parts = [
                part.split(POSITIONS_AT_ONCE)
                for part in (next(plain)[:-1], next(served)[:-1], window[1:].to(device))
            ]
            collected.add(
                (_scores(self.config, original, x), _scores(self.config, quantized, y), targets)
                for x, y, targets in zip(*parts, strict=True)
            )
        return collected.summary(self.questions.digest)

    def _retrieval(
        self, original: Head, quantized: Head, plain: _Rows, served: _Rows
    ) -> dict[str, Any] | None:
        prompts = self.questions.prompts
        if not prompts:
            return None

        def answers(head: Head, rows: _Rows) -> list[bool]:
            found = []
            for prompt in prompts:
                hidden = next(rows)[retrieval.answer_positions(prompt)]
                predicted = _scores(self.config, head, hidden).argmax(dim=-1)
                found.append(retrieval.exact(predicted, prompt))
            return found

        return retrieval.summary(
            prompts, answers(original, plain), answers(quantized, served), self.questions.seed
        )


class _Rows:
    """The sequences of all batches, one after the other, each `[T, D]`."""

    def __init__(self, batches: Store) -> None:
        self._rows = (row for batch in batches for row in batch)

    def __next__(self) -> torch.Tensor:
        row: torch.Tensor = next(self._rows)
        return row


def _scores(config: ModelConfig, head: Head, hidden: torch.Tensor) -> torch.Tensor:
    """Logits `[N, vocabulary]`; raises UserError when they are not finite."""
    scores = logits(config, head, hidden)
    if not torch.isfinite(torch.stack(scores.aminmax())).all():
        raise UserError(
            "lm_head: the logits are NaN or Inf; the values of model.norm or lm_head are too "
            "large, download the checkpoint again"
        )
    return scores


def _agreement(plain: Routing | None, served: Routing | None) -> float | None:
    """The share of tokens that both models send to the same expert; None in a dense layer."""
    if plain is None or served is None:
        return None
    return float((plain.expert == served.expert).double().mean())


@torch.inference_mode()
def compare(
    original: LayerReader,
    quantized: LayerReader,
    questions: Questions,
    layer_done: Callable[[], None],
) -> dict[str, Any]:
    """The evidence for any two checkpoints of one architecture, streamed beside each other.

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
    evaluation.start(embedding, Spool(device=embedding.device))
    del embedding

    def both(index: int) -> tuple[DecoderLayer, DecoderLayer]:
        return original.layer(index), quantized.layer(index)

    for plain, served in prefetched(both, range(config.num_layers)):
        evaluation.layer(plain, served)
        layer_done()
    return evaluation.finish(original.head(), quantized.head())
