"""Evidence against transformers: its logits of both checkpoints, its generation for retrieval."""

from __future__ import annotations

import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evals import retrieval
from evals.evaluation import Evaluation, compare
from evals.likelihood import compared
from evals.prompt import Prompt
from evals.questions import Questions
from llama4q.checkpoint import Checkpoint
from llama4q.config import read_config
from llama4q.errors import UserError
from llama4q.weights import LayerReader

from . import runs, tiny
from .naive import naive


def reader(folder: Path) -> LayerReader:
    return LayerReader(Checkpoint(folder), read_config(folder), torch.float32)


def evidence(source: Path, quantized: Path, questions: Questions) -> dict[str, Any]:
    return compare(reader(source), reader(quantized), questions, lambda: None)


@pytest.mark.parametrize("kind", [tiny.SCOUT, tiny.MAVERICK])
@torch.inference_mode()
def test_every_figure_against_transformers(kind: tiny.Variant, tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", kind)
    report = runs.run(source, tmp_path / "out", "int4")
    windows = runs.tokens(source, 5, 90, seed=11)
    found = evidence(source, tmp_path / "out", Questions(windows, "digest", [], 0, runs.words))
    plain, served = naive(source, windows), naive(tmp_path / "out", windows)
    targets = windows[:, 1:, None]
    losses = [-each.logprobs.gather(2, targets).squeeze(2) for each in (plain, served)]
    divergence = (plain.logprobs.exp() * (plain.logprobs - served.logprobs)).sum(-1)
    best = [each.logprobs.topk(5, dim=-1).indices for each in (plain, served)]
    shared = (best[0][..., :, None] == best[1][..., None, :]).any(-1).double().mean()
    likelihood = found["likelihood"]
    for side, loss in zip(("original", "quantized"), losses, strict=True):
        assert likelihood[side]["perplexity"] == pytest.approx(float(loss.mean().exp()), rel=1e-4)
        length = len(runs.words(windows[:, 1:].flatten().tolist()))
        bits = float(loss.sum()) / math.log(2) / length
        assert likelihood[side]["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    increase = float((losses[1].mean() - losses[0].mean()).expm1())
    assert likelihood["perplexity_increase"] == pytest.approx(increase, rel=1e-3)
    assert likelihood["kl_mean"] == pytest.approx(float(divergence.mean()), rel=1e-3)
    for name, share in (("kl_median", 0.5), ("kl_p99", 0.99), ("kl_p999", 0.999), ("kl_max", 1)):
        expected = float(divergence.quantile(share))
        assert likelihood[name] == pytest.approx(expected, rel=1e-2), name
    same = float((best[0][..., 0] == best[1][..., 0]).double().mean())
    assert likelihood["top1_agreement"] == pytest.approx(same, abs=0.005)
    assert likelihood["top5_agreement"] == pytest.approx(float(shared), abs=0.002)
    assert likelihood["tokens"] == 5 * 89
    worst = likelihood["worst"][0]
    assert worst["kl"] == likelihood["kl_max"]
    place = divergence.argmax()
    assert (worst["window"], worst["position"] - 1) == divmod(int(place), 89)
    assert worst["token"] == str(int(targets.flatten()[place]))
    assert worst["original"] == str(int(best[0].flatten(0, 1)[place, 0]))
    assert worst["quantized"] == str(int(best[1].flatten(0, 1)[place, 0]))
    moe = sorted(read_config(source).moe_layers)
    assert [one["layer"] for one in found["layers"]] == [*range(read_config(source).num_layers)]
    for one, x, y in zip(found["layers"], plain.hidden, served.hidden, strict=False):
        energy, error = x.double().square().sum(), (x - y).double().square().sum()
        assert one["hidden_error"] == pytest.approx(float(error / energy), rel=1e-3)
    for one, x, y in zip(found["layers"], plain.added, served.added, strict=True):
        assert one["gain"] == pytest.approx(float((x * y).sum() / x.square().sum()), abs=2e-3)
    for index, x, y in zip(moe, plain.experts, served.experts, strict=True):
        one = found["layers"][index]
        assert one["agreement"] == pytest.approx(float((x == y).double().mean()), abs=0.005)
        for side, chosen in (("load_original", x), ("load_quantized", y)):
            loads = torch.bincount(chosen.flatten(), minlength=read_config(source).num_experts)
            assert (loads - torch.tensor(one[side])).abs().max() <= 2
        a, b = plain.added[index], served.added[index]
        for expert, gain in enumerate(one["expert_gain"]):
            rows = (x.flatten() == expert) & (y.flatten() == expert)
            expected = float((a[rows] * b[rows]).sum() / a[rows].square().sum())
            assert gain == pytest.approx(expected, abs=5e-3)
    dense = [one for one in found["layers"] if one["layer"] not in moe]
    assert all(one["agreement"] is None and one["load_original"] is None for one in dense)
    assert report["evidence"]["likelihood"]["kl_mean"] > 0


@torch.inference_mode()
def test_a_damaged_expert_is_named_by_its_gain(tmp_path: Path) -> None:
    """Scales a twentieth too large: hardly more divergence, and yet no doubt who it is."""
    source = tiny.write(tmp_path / "source", tiny.SCOUT)
    runs.run(source, tmp_path / "out", "int4")
    damaged = tmp_path / "damaged"
    shutil.copytree(tmp_path / "out", damaged)
    for shard in damaged.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if ".layers.2.feed_forward.experts.1." in name and name.endswith("weight_scale"):
                tensors[name] = tensor * 1.05
        save_file(tensors, shard, {"format": "pt"})
    found = evidence(source, damaged, Questions(runs.tokens(source, 4, 500), "", [], 0, runs.words))
    off = {
        (one["layer"], expert): abs(gain / statistics.median(one["expert_gain"]) - 1)
        for one in found["layers"]
        for expert, gain in enumerate(one["expert_gain"])
    }
    [(worst, most), (_, next_one), *_] = sorted(off.items(), key=lambda item: -item[1])
    assert worst == (2, 1)
    assert most > 2 * next_one


@torch.inference_mode()
def test_settings_that_differ_are_named_and_obeyed(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", tiny.SCOUT)
    other = tmp_path / "other"
    shutil.copytree(source, other)
    raw = (other / "config.json").read_text()
    (other / "config.json").write_text(
        raw.replace('"attn_temperature_tuning": true', '"attn_temperature_tuning": false')
    )
    questions = Questions(runs.tokens(source, 2, 100), "", [], 0, runs.words)
    found = evidence(source, other, questions)
    assert found["other_settings"] == [
        {"setting": "temperature_tuning", "original": "True", "quantized": "False"}
    ]
    errors = [one["hidden_error"] for one in found["layers"]]
    assert errors[:3] == [0, 0, 0]  # layer 3 is the first global one
    assert errors[3] > 0


def test_ties_are_no_disagreement() -> None:
    """Logits in BF16 have many; the same ones in both models must give the same choices."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (200, 50), generator=generator).float()
    window = compared([(scores, scores.clone(), torch.zeros(200, dtype=torch.int64))])
    assert window.same.min() == 1
    assert window.shared.min() == 1
    assert torch.equal(window.original_choice, scores.argmax(1))


@torch.inference_mode()
def test_windows_that_overlap_score_each_token_once(tmp_path: Path) -> None:
    """With what stands before it in its window, by transformers."""
    source = tiny.write(tmp_path / "source", tiny.SCOUT)
    runs.run(source, tmp_path / "out", "int4")
    stream = runs.tokens(source, 1, 1 + 99 + 2 * 25, seed=13)[0]
    windows = torch.stack(
        [torch.cat((stream[:1], stream[1 + at : 100 + at])) for at in (0, 25, 50)]
    )
    questions = Questions(windows, "digest", [], 0, runs.words, stride=25)
    found = evidence(source, tmp_path / "out", questions)["likelihood"]
    logprobs = naive(source, windows).logprobs.gather(2, windows[:, 1:, None]).squeeze(2)
    scored = [logprobs[0], logprobs[1, -25:], logprobs[2, -25:]]
    assert found["tokens"] == 99 + 25 + 25
    expected = float((-torch.cat(scored).mean()).exp())
    assert found["original"]["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert found["stride"] == 25


def test_a_checkpoint_against_itself_has_no_divergence(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", tiny.SCOUT)
    found = evidence(source, source, runs.questions(source))
    assert found["likelihood"]["kl_mean"] == 0
    assert found["likelihood"]["top1_agreement"] == 1
    assert found["likelihood"]["intervals"]["perplexity_increase"] == [0, 0]
    assert {record["agreement"] for record in found["layers"]} == {1.0}
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
        depth = (number % 2) / 2
        prompts.append(Prompt("needle", tuple(generated.tolist()), 50, ((50, 54),), depth))
    questions = Questions(runs.tokens(source, 1, 20), "digest", prompts, 0, runs.words)
    found = evidence(source, source, questions)["retrieval"]
    assert found["original"] == 0.5
    assert [(cell["depth"], cell["original"]) for cell in found["tasks"][0]["cells"]] == [
        (0.0, 1.0),
        (0.5, 0.0),
    ]
    assert found["prompts"] == 6


def test_prompts_of_several_lengths_keep_their_order() -> None:
    prompts = [
        Prompt("needle", tuple(range(length)), length - 2, ((length - 2, length),), 0.0)
        for length in (8, 8, 5, 9, 9)
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
    long = Questions(torch.zeros(1, 5000, dtype=torch.int64), "digest", [], 0, runs.words)
    with pytest.raises(UserError, match="reads at most 4096"):
        Evaluation(read_config(source), long)
    strange = Questions(torch.full((1, 9), 512), "digest", [], 0, runs.words)
    with pytest.raises(UserError, match="outside the model's vocabulary of 512"):
        evidence(source, source, strange)
