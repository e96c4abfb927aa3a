"""The one judge of all contestants: a decoded checkpoint against its source, window by window.

Both are streamed in float32 by llama4q's own forward, which its tests prove equal to transformers';
`by_transformers` asks transformers itself. What the original says is computed once for a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evals import retrieval
from evals.likelihood import compared, summary
from evals.questions import Questions
from llama4q.checkpoint import Checkpoint
from llama4q.config import ModelConfig, read_config
from llama4q.model import Head, Routing, logits
from llama4q.stream import advance, embed
from llama4q.weights import LayerReader

Routings = list[Routing | None]


@dataclass(frozen=True)
class Seen:
    """A model's last hidden states on one set of questions, and where it routed each token."""

    hidden: list[torch.Tensor]  # of each window and prompt, [T, D]
    routings: Routings  # by layer
    head: Head
    config: ModelConfig


def see(folder: Path, questions: Questions) -> Seen:
    """A whole checkpoint on all windows and prompts."""
    config = read_config(folder)
    reader = LayerReader(Checkpoint(folder), config, torch.float32)
    inputs = [questions.windows, *retrieval.batches(questions.prompts)]
    with torch.inference_mode():
        batches = embed(reader.embedding(), inputs)
        routings: Routings = [
            advance(config, reader.layer(index), batches) for index in range(config.num_layers)
        ]
    hidden = [row for batch in batches for row in batch]
    return Seen(hidden, routings, reader.head(), config)


def verdict(original: Seen, contestant: Seen, questions: Questions) -> dict[str, Any]:
    """The figures of one contestant; `kl` and `loss` have one mean for each window."""
    windows = []
    with torch.inference_mode():
        for number, window in enumerate(questions.windows):
            plain, served = (_scores(seen, number)[:-1] for seen in (original, contestant))
            windows.append(compared([(plain, served, window[1:])]))
    figures = summary(windows)
    return {
        "kl": [float(window.divergence.double().mean()) for window in windows],
        "loss": [float(window.quantized.double().mean()) for window in windows],
        "kl_mean": figures["kl_mean"],
        "kl_p99": figures["kl_p99"],
        "top1": figures["top1_agreement"],
        "perplexity": figures["quantized"]["perplexity"],
        "original_perplexity": figures["original"]["perplexity"],
        "routing": _routing(original.routings, contestant.routings),
        "needles": [_found(contestant, questions, number) for number in _prompts(questions)],
    }


def all_found(seen: Seen, questions: Questions) -> bool:
    """Whether a model answers every prompt."""
    return all(_found(seen, questions, number) for number in _prompts(questions))


def _scores(seen: Seen, number: int) -> torch.Tensor:
    return logits(seen.config, seen.head, seen.hidden[number])


def _prompts(questions: Questions) -> range:
    return range(len(questions.prompts))


def _found(seen: Seen, questions: Questions, number: int) -> bool:
    prompt = questions.prompts[number]
    hidden = seen.hidden[len(questions.windows) + number][retrieval.answer_positions(prompt)]
    scores = logits(seen.config, seen.head, hidden)
    return retrieval.score(scores.argmax(dim=-1), prompt).exact


def _routing(original: Routings, contestant: Routings) -> float | None:
    """The share of tokens that keep their expert, in the layer where fewest do."""
    shares = [
        float((plain.expert == served.expert).double().mean())
        for plain, served in zip(original, contestant, strict=True)
        if plain is not None and served is not None
    ]
    return min(shares, default=None)


def by_transformers(source: Path, folder: Path, windows: torch.Tensor) -> float:
    """The mean KL on `windows` of two checkpoints, by transformers alone, in float32."""
    from transformers import Llama4ForConditionalGeneration

    models = [
        Llama4ForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
        for path in (source, folder)
    ]
    total = []
    with torch.inference_mode():
        for window in windows:
            plain, served = (
                torch.log_softmax(model(input_ids=window[None]).logits[0, :-1].double(), dim=-1)
                for model in models
            )
            total.append((plain.exp() * (plain - served)).sum(dim=-1).mean())
    return float(torch.stack(total).mean())
