"""Measure the pocket model with transformers in float32, and print a table.

Knows the finished checkpoint and the held-out text, nothing of the training but its forward,
which must give the same logits. Four questions: does it model text far better than counting
tokens, does it find needles across attention chunks, do its experts all work, and does plain
rounding hurt it visibly?

    python -m benchmarks.pocket.report --text llama4q/pocket/text --model llama4q/pocket/model
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.pocket import net
from benchmarks.pocket.config import PocketConfig
from benchmarks.pocket.export import special_ids
from benchmarks.pocket.train import page_stream
from evals import tasks
from evals.prompt import Material, Prompt

WINDOW = 1_024
CHUNK = 256
GROUP = 128
DEPTHS = [step / 10 for step in range(11)]


@dataclass(frozen=True)
class Text:
    """Text scores over the same windows: perplexity, and divergence from the reference if any."""

    perplexity: float
    divergence: float | None
    agreement: float | None


@dataclass(frozen=True)
class Retrieval:
    """Exact match, over all prompts and over those whose needle stands in an earlier chunk."""

    length: int
    prompts: int
    exact: float
    crossing: int
    crossing_exact: float


def load_model(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens).logits
    return logits


def windows_of(stream: Sequence[int], limit: int | None) -> Tensor:
    count = (len(stream) - 1) // WINDOW
    count = min(count, limit) if limit else count
    return torch.tensor(stream[: count * WINDOW]).view(count, WINDOW)


def unigram_perplexity(train: Sequence[int], heldout: Sequence[int], vocabulary: int) -> float:
    counts = torch.bincount(torch.tensor(train), minlength=vocabulary) + 1.0
    return float(torch.exp(-(counts / counts.sum()).log()[torch.tensor(heldout)].mean()))


def text_scores(model: Any, windows: Tensor, reference: Any = None) -> Text:
    """Perplexity; with a reference also the mean KL(reference || model) and top-1 agreement."""
    loss = divergence = same = 0.0
    for window in windows:
        scores = logits_of(model, window[None])[0, :-1].log_softmax(-1)
        loss -= float(scores.gather(1, window[1:, None]).sum())
        if reference is not None:
            true = logits_of(reference, window[None])[0, :-1].log_softmax(-1)
            divergence += float((true.exp() * (true - scores)).sum())
            same += float((true.argmax(-1) == scores.argmax(-1)).sum())
    tokens = windows.shape[0] * (WINDOW - 1)
    if reference is None:
        return Text(math.exp(loss / tokens), None, None)
    return Text(math.exp(loss / tokens), divergence / tokens, same / tokens)


def crosses(prompt: Prompt) -> bool:
    """Whether the number stands in an earlier attention chunk than the place it is asked at."""
    answer = prompt.tokens[prompt.answer_start :]
    places = range(prompt.answer_start - len(answer))
    end = next(at + len(answer) for at in places if prompt.tokens[at : at + len(answer)] == answer)
    return (end - 1) // CHUNK < (prompt.answer_start - 1) // CHUNK


def retrieval(model: Any, prompts: list[Prompt]) -> Retrieval:
    right, crossing, crossing_right = 0, 0, 0
    for prompt in prompts:
        logits = logits_of(model, torch.tensor([prompt.tokens]))[0]
        guess = logits[prompt.answer_start - 1 : prompt.length - 1].argmax(-1).tolist()
        hit = guess == list(prompt.tokens[prompt.answer_start :])
        right += hit
        if crosses(prompt):
            crossing += 1
            crossing_right += hit
    share = crossing_right / crossing if crossing else float("nan")
    return Retrieval(prompts[0].length, len(prompts), right / len(prompts), crossing, share)


def expert_loads(model: Any, windows: Tensor) -> Tensor:
    """Tokens by layer and expert, [layers, experts], relative to the layer's mean."""
    counts: dict[int, Tensor] = {}

    def count(layer: int) -> Any:
        def hook(module: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
            found = torch.bincount(output[1].argmax(-1), minlength=module.num_experts)
            counts[layer] = counts.get(layer, torch.zeros_like(found)) + found

        return hook

    layers = model.get_decoder().model.layers
    hooks = [
        layer.feed_forward.router.register_forward_hook(count(number))
        for number, layer in enumerate(layers)
    ]
    for window in windows:
        logits_of(model, window[None])
    for hook in hooks:
        hook.remove()
    loads = torch.stack([counts[number] for number in range(len(layers))]).float()
    return loads.div(loads.mean(1, keepdim=True))


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Symmetric round-to-nearest in groups of 128 along the last dimension."""
    groups = weight.unflatten(-1, (-1, GROUP))
    top = 2 ** (bits - 1)
    scales = groups.abs().amax(-1, keepdim=True) / (top - 0.5)
    scales = scales.clamp(min=1e-12).bfloat16().float()
    values: Tensor = (groups / scales).round().clamp(-top, top - 1) * scales
    return values.flatten(-2)


@torch.no_grad()
def round_experts(model: Any, bits: int) -> None:
    """Routed and shared experts to `bits`, in place; everything else stays."""
    for name, weight in model.named_parameters():
        if ".experts." in name:  # [experts, in, out]: the groups run along the inputs
            weight.copy_(rounded(weight.mT, bits).mT)
        elif ".shared_expert." in name:
            weight.copy_(rounded(weight, bits))


def largest_difference(model: Any, folder: Path, windows: Tensor) -> float:
    """Between transformers' logits and the training net's, both float32 on the saved weights."""
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= {n: w.float() for n, w in load_file(file).items() if n.startswith(net.TEXT)}
    with torch.no_grad():
        hidden = net.forward(weights, PocketConfig(), windows, torch.float32).hidden
        ours = net.logits(weights, hidden).view(*windows.shape, -1)
    return float((ours - logits_of(model, windows)).abs().max())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    special = special_ids(options.model)
    streams = {
        name: page_stream(
            tokenizer, (options.text / f"{name}.txt").read_text(encoding="utf-8"), special
        )
        for name in ("train", "heldout")
    }
    heldout = streams["heldout"]
    windows = windows_of(heldout, options.windows)

    def prompts(length: int, per_cell: int) -> list[Prompt]:
        material = Material(
            lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
            tokenizer.decode,
            special["<|begin_of_text|>"],
            heldout,
        )
        ladder = tasks.Ladder([length], DEPTHS, per_cell, seed=options.seed)
        return tasks.prompts(material, ladder)

    model = load_model(options.model)
    found: dict[str, Any] = {
        "largest logit difference from the training net": largest_difference(
            model, options.model, windows[:2].reshape(1, -1)
        ),
        "unigram perplexity": unigram_perplexity(
            streams["train"], heldout, tokenizer.get_vocab_size()
        ),
        "text": vars(text_scores(model, windows)),
        "loads": expert_loads(model, windows[:32]).tolist(),
        "needles": [
            vars(
                retrieval(
                    model, prompts(length, max(1, options.per_cell * 1_024 // max(length, 1_024)))
                )
            )
            for length in options.lengths
        ],
        "rounded": {},
    }
    for bits in (4, 3):
        worse = load_model(options.model)
        round_experts(worse, bits)
        found["rounded"][bits] = {
            **vars(text_scores(worse, windows[:32], model)),
            "needles": vars(retrieval(worse, prompts(1_024, options.per_cell))),
        }
    found["text of the rounded rows"] = vars(text_scores(model, windows[:32]))
    return found


def print_table(found: dict[str, Any]) -> None:
    print(
        f"largest logit difference   {found['largest logit difference from the training net']:.2e}"
    )
    print(f"held-out perplexity        {found['text']['perplexity']:.2f} per token")
    print(f"unigram perplexity         {found['unigram perplexity']:.1f}")
    print("\nneedles   prompts   exact match   across chunks")
    for row in found["needles"]:
        print(
            f"{row['length']:7d}   {row['prompts']:7d}   {row['exact']:11.1%}"
            f"   {row['crossing_exact']:.1%} of {row['crossing']}"
        )
    print("\nlayer   least and most loaded expert, relative to the mean")
    for layer, loads in enumerate(found["loads"]):
        print(f"{layer:5d}   {min(loads):5.2f}   {max(loads):5.2f}")
    first = found["text of the rounded rows"]["perplexity"]
    print("\nexperts   perplexity   KL       top-1 same   needles at 1,024")
    print(f"bf16      {first:10.2f}")
    for bits, row in found["rounded"].items():
        print(
            f"{bits} bits    {row['perplexity']:10.2f}   {row['divergence']:.4f}"
            f"   {row['agreement']:10.1%}   {row['needles']['exact']:.1%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="folder of train.txt, heldout.txt")
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint")
    parser.add_argument("--windows", type=int, help="at most so many windows of 1,024 tokens")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1_024, 2_048, 4_096])
    parser.add_argument("--per-cell", type=int, default=8, help="prompts per depth at 1,024 tokens")
    parser.add_argument("--seed", type=int, default=2_026)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(options)
    print_table(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
