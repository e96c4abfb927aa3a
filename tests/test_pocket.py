"""The shipped pocket model: it is what its card says, and GPTQ serves it better than rounding."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from calibrate.data import calibration_tokens
from evals.evaluation import compare
from evals.questions import Needles, Questions, ask
from llama4q.checkpoint import Checkpoint
from llama4q.config import read_config
from llama4q.hub import POCKET_MODEL
from llama4q.recipe import Calibration, Method, Recipe, Solver, load_recipe
from llama4q.text import evaluation_tokens, load_tokenizer, parse_source
from llama4q.weights import LayerReader

from . import runs, tiny

CALIBRATION = Calibration(samples=32, length=512)


@pytest.fixture(scope="module")
def questions() -> Questions:
    """Eight held-out windows and eleven prompts of 1,024 tokens: four attention chunks."""
    depths = [step / 10 for step in range(11)]
    return ask(load_tokenizer(POCKET_MODEL), None, 8, 1024, Needles([1024], depths, 2, seed=1))


def quantized(folder: Path, method: Method) -> Path:
    solver = Solver(method=method)
    recipe: Recipe = dataclasses.replace(
        load_recipe("int4"), solver=solver, calibration=CALIBRATION
    )
    drawn = calibration_tokens(
        parse_source(None), load_tokenizer(POCKET_MODEL), samples=32, length=512, seed=0
    )
    runs.run(POCKET_MODEL, folder, recipe, drawn.tokens)
    return folder


def reader(folder: Path) -> LayerReader:
    return LayerReader(Checkpoint(folder), read_config(folder), torch.float32)


def test_gptq_against_rounding_at_the_same_bytes(questions: Questions, tmp_path: Path) -> None:
    """Also what the model's card claims: perplexity far below a unigram model's, needles found."""
    evidence = {}
    for method in Method:
        folder = quantized(tmp_path / method.value, method)
        evidence[method] = compare(reader(POCKET_MODEL), reader(folder), questions, lambda: None)
    gptq, rounded = evidence[Method.GPTQ], evidence[Method.RTN]
    assert gptq["likelihood"]["kl_mean"] < 0.75 * rounded["likelihood"]["kl_mean"]
    assert gptq["likelihood"]["original"]["perplexity"] < 45  # a unigram model's is 665
    assert gptq["retrieval"]["original"] >= 0.9
    assert gptq["retrieval"]["quantized"] >= 0.9


@torch.inference_mode()
def test_logits_against_transformers() -> None:
    """Beyond several chunks of 256 tokens and the temperature's floor of 1,024."""
    tokenizer = load_tokenizer(POCKET_MODEL)
    tokens = evaluation_tokens(parse_source(None), tokenizer, windows=2, length=1500).tokens
    theirs = tiny.transformers_model(POCKET_MODEL)(input_ids=tokens).logits
    torch.testing.assert_close(runs.our_logits(POCKET_MODEL, tokens), theirs, atol=1e-4, rtol=0)
