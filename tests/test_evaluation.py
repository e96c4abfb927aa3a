"""Evidence against transformers: its logits of both checkpoints, its generation for retrieval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from evals import retrieval
from evals.evaluation import Evaluation, compare
from evals.needle import NeedlePrompt
from evals.questions import Questions
from llama4q.checkpoint import Checkpoint
from llama4q.config import read_config
from llama4q.errors import UserError
from llama4q.weights import LayerReader

from . import runs, tiny


def reader(folder: Path) -> LayerReader:
    return LayerReader(Checkpoint(folder), read_config(folder), torch.float32)


def evidence(source: Path, quantized: Path, questions: Questions) -> dict[str, Any]:
    return compare(reader(source), reader(quantized), questions, lambda: None)


@pytest.mark.parametrize("kind", [tiny.SCOUT, tiny.MAVERICK])
@torch.inference_mode()
def test_likelihood_and_routing_against_transformers(kind: tiny.Variant, tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", kind)
    report = runs.run(source, tmp_path / "out", "int4")
    windows = runs.tokens(source, 5, 90, seed=11)
    found = evidence(source, tmp_path / "out", Questions(windows, "digest", [], 0))
    plain, served = [tiny.transformers_model(folder) for folder in (source, tmp_path / "out")]
    logprobs = [
        functional.log_softmax(model(input_ids=windows).logits[:, :-1].double(), dim=-1)
        for model in (plain, served)
    ]
    targets = windows[:, 1:, None]
    perplexities = [float(torch.exp(-each.gather(2, targets).mean())) for each in logprobs]
    divergence = (logprobs[0].exp() * (logprobs[0] - logprobs[1])).sum(-1)
    agree = (logprobs[0].argmax(-1) == logprobs[1].argmax(-1)).double().mean()
    likelihood = found["likelihood"]
    assert likelihood["original"]["perplexity"] == pytest.approx(perplexities[0], rel=1e-4)
    assert likelihood["quantized"]["perplexity"] == pytest.approx(perplexities[1], rel=1e-4)
    assert likelihood["kl_mean"] == pytest.approx(float(divergence.mean()), rel=1e-3)
    assert likelihood["kl_p99"] == pytest.approx(float(divergence.quantile(0.99)), rel=1e-2)
    assert likelihood["top1_agreement"] == pytest.approx(float(agree), abs=0.005)
    assert likelihood["tokens"] == 5 * 89
    assert [record["layer"] for record in found["routing"]] == sorted(
        read_config(source).moe_layers
    )
    assert all(0.5 < record["agreement"] <= 1 for record in found["routing"])
    assert report["evidence"]["likelihood"]["kl_mean"] > 0


def test_a_checkpoint_against_itself_has_no_divergence(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", tiny.SCOUT)
    found = evidence(source, source, runs.questions(source))
    assert found["likelihood"]["kl_mean"] == 0
    assert found["likelihood"]["top1_agreement"] == 1
    assert {record["agreement"] for record in found["routing"]} == {1.0}
    assert found["retrieval"]["original"] == found["retrieval"]["quantized"]


def test_retrieval_against_greedy_generation(tmp_path: Path) -> None:
    """Answers are what transformers generates for half of the prompts, and wrong for the rest."""
    source = tiny.write(tmp_path / "source", tiny.SCOUT)
    model = tiny.transformers_model(source)
    prompts = []
    for number, start in enumerate(runs.tokens(source, 6, 50, seed=12)):
        generated = model.generate(
            start[None], max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0
        )[0]
        if number % 2:
            generated[-1] = (generated[-1] + 1) % 512
        prompts.append(NeedlePrompt(tuple(generated.tolist()), 50, 54, (number % 2) / 2))
    questions = Questions(runs.tokens(source, 1, 20), "digest", prompts, 0)
    found = evidence(source, source, questions)["retrieval"]
    assert found["original"] == 0.5
    assert [(cell["depth"], cell["original"]) for cell in found["cells"]] == [
        (0.0, 1.0),
        (0.5, 0.0),
    ]
    assert found["prompts"] == 6


def test_prompts_of_several_lengths_keep_their_order() -> None:
    prompts = [
        NeedlePrompt(tuple(range(length)), length - 2, length, 0.0) for length in (8, 8, 5, 9, 9)
    ]
    batches = retrieval.batches(prompts)
    assert [tuple(batch.shape) for batch in batches] == [(2, 8), (1, 5), (2, 9)]
    assert [tuple(row.tolist()) for batch in batches for row in batch] == [
        prompt.tokens for prompt in prompts
    ]
    assert retrieval.digest(prompts) != retrieval.digest(prompts[:4])


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", tiny.SCOUT)
    other = tiny.write(tmp_path / "other", tiny.Variant(layers=2))
    with pytest.raises(UserError, match="models of different sizes"):
        evidence(source, other, runs.questions(source))
    long = Questions(torch.zeros(1, 5000, dtype=torch.int64), "digest", [], 0)
    with pytest.raises(UserError, match="reads at most 4096"):
        Evaluation(read_config(source), long)
    strange = Questions(torch.full((1, 9), 512), "digest", [], 0)
    with pytest.raises(UserError, match="outside the model's vocabulary of 512"):
        evidence(source, source, strange)
