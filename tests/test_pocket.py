"""The shipped pocket model: it is what its card says, and GPTQ serves it better than rounding."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from calibrate.data import calibration_tokens
from evals.evaluation import compare
from evals.prompt import Prompt
from evals.questions import Questions, ask
from evals.tasks import Ladder
from llama4q.checkpoint import Checkpoint
from llama4q.config import read_config
from llama4q.hub import POCKET_MODEL
from llama4q.recipe import Calibration, Method, Solver, load_recipe
from llama4q.text import parse_source
from llama4q.tokens import evaluation_tokens, load_tokenizer
from llama4q.weights import LayerReader

from . import runs, tiny
from .naive import naive

CALIBRATION = Calibration(samples=32, length=512)


@pytest.fixture(scope="module")
def questions() -> Questions:
    """Eight held-out windows and eleven prompts of 1,024 tokens: four attention chunks."""
    depths = [step / 10 for step in range(11)]
    return ask(load_tokenizer(POCKET_MODEL), None, 8, 1024, Ladder([1024], depths, 2, seed=1))


def quantized(folder: Path, solver: Solver) -> Path:
    recipe = dataclasses.replace(load_recipe("int4"), solver=solver, calibration=CALIBRATION)
    drawn = calibration_tokens(
        parse_source(None), load_tokenizer(POCKET_MODEL), samples=32, length=512, seed=0
    )
    runs.run(POCKET_MODEL, folder, recipe, drawn.tokens)
    return folder


def reader(folder: Path) -> LayerReader:
    return LayerReader(Checkpoint(folder), read_config(folder), torch.float32)


def test_gptq_against_rounding_at_the_same_bytes(questions: Questions, tmp_path: Path) -> None:
    """Also what the model's card claims: perplexity far below a unigram model's, needles found."""
    solvers = {
        "rounded": Solver(method=Method.RTN),
        "uncorrected": Solver(correction=False),
        "default": Solver(),
    }
    evidence, size = {}, set()
    for name, solver in solvers.items():
        folder = quantized(tmp_path / name, solver)
        evidence[name] = compare(reader(POCKET_MODEL), reader(folder), questions, lambda: None)
        size.add(sum(path.stat().st_size for path in folder.glob("*.safetensors")))
    divergence = {name: found["likelihood"]["kl_mean"] for name, found in evidence.items()}
    assert divergence["uncorrected"] < 0.75 * divergence["rounded"]
    assert divergence["default"] < 0.9 * divergence["uncorrected"]
    assert len(size) == 1
    found = evidence["default"]
    assert found["likelihood"]["original"]["perplexity"] < 45  # a unigram model's is 665
    assert found["retrieval"]["original"] >= 0.9
    assert found["retrieval"]["quantized"] >= 0.9


@torch.inference_mode()
def test_logits_against_transformers() -> None:
    """Beyond several chunks of 256 tokens and the temperature's floor of 1,024."""
    tokenizer = load_tokenizer(POCKET_MODEL)
    tokens = evaluation_tokens(parse_source(None), tokenizer, windows=2, length=1500).tokens
    theirs = tiny.transformers_model(POCKET_MODEL)(input_ids=tokens).logits
    torch.testing.assert_close(runs.our_logits(POCKET_MODEL, tokens), theirs, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_the_evidence_is_what_transformers_says(tmp_path: Path) -> None:
    """Both models loaded whole, in float32: every figure of a pair, and answers by generation."""
    other = quantized(tmp_path / "rounded", Solver(method=Method.RTN))
    ladder = Ladder([600], [0.0, 0.5, 1.0], 2, seed=3)
    asked = ask(load_tokenizer(POCKET_MODEL), None, 4, 700, ladder)
    found = compare(reader(POCKET_MODEL), reader(other), asked, lambda: None)
    plain, served = (naive(folder, asked.windows) for folder in (POCKET_MODEL, other))
    targets = asked.windows[:, 1:, None]
    likelihood = found["likelihood"]
    losses = [-each.logprobs.gather(2, targets) for each in (plain, served)]
    for side, loss in zip(("original", "quantized"), losses, strict=True):
        assert likelihood[side]["perplexity"] == pytest.approx(float(loss.mean().exp()), rel=1e-4)
    divergence = (plain.logprobs.exp() * (plain.logprobs - served.logprobs)).sum(-1)
    assert likelihood["kl_mean"] == pytest.approx(float(divergence.mean()), rel=1e-4)
    assert likelihood["kl_p99"] == pytest.approx(float(divergence.quantile(0.99)), rel=1e-3)
    choices = [each.logprobs.argmax(-1) for each in (plain, served)]
    same = float((choices[0] == choices[1]).double().mean())
    assert likelihood["top1_agreement"] == pytest.approx(same, abs=2 / likelihood["tokens"])

    # its routing on the windows alone, where transformers has seen no prompts
    alone = Questions(asked.windows, asked.digest, [], 0, asked.decode)
    layers = compare(reader(POCKET_MODEL), reader(other), alone, lambda: None)["layers"]
    for one, x, y in zip(layers, plain.experts, served.experts, strict=True):
        agreement = float((x == y).double().mean())
        assert one["agreement"] == pytest.approx(agreement, abs=3 / asked.windows.numel())

    answers = [
        [generated(tiny.transformers_model(folder), prompt) for prompt in asked.prompts]
        for folder in (POCKET_MODEL, other)
    ]
    retrieval = found["retrieval"]
    for side, right in zip(("original", "quantized"), answers, strict=True):
        assert retrieval[side] == pytest.approx(sum(right) / len(right))
    cells = retrieval["tasks"][0]["cells"]
    changed = [served - plain for plain, served in zip(*answers, strict=True)]
    assert sum(cell["lost"] for cell in cells) == changed.count(-1)
    assert sum(cell["gained"] for cell in cells) == changed.count(1)


def generated(model: Any, prompt: Prompt) -> bool:
    """Whether greedy generation writes the answer."""
    start = torch.tensor([prompt.tokens[: prompt.answer_start]])
    wanted = prompt.tokens[prompt.answer_start :]
    written = model.generate(
        start, max_new_tokens=len(wanted), do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    return tuple(written[0, prompt.answer_start :].tolist()) == wanted
