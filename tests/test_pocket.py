"""The shipped pocket model: it is what its card says, and GPTQ serves it better than rounding."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from calibrate.data import calibration_tokens
from evals.evaluation import compare
from evals.questions import Questions, ask
from evals.tasks import Ladder
from llama4q.checkpoint import Checkpoint
from llama4q.config import read_config
from llama4q.hub import POCKET_MODEL
from llama4q.recipe import Calibration, Method, Solver, load_recipe
from llama4q.text import evaluation_tokens, load_tokenizer, parse_source
from llama4q.weights import LayerReader

from . import runs, tiny

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
