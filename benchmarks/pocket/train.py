"""Train the pocket Llama 4: a real Scout at 9.7 M parameters, on two CPU cores in about an hour.

What there is to learn from it:

- Retrieval doesn't appear by itself. The first phase packs short rows with statements ("The magic
  number for KEY is DIGITS.") and questions about them; only then do the rows grow and fill with
  text. Rows of one chunk are not enough: after 180 steps of them (answers at 1.5 nats a digit,
  falling), rows of two chunks were back at chance, 2.3. With an attention chunk of 64 in rows of
  256, so that most answers lie in another chunk, 50 steps brought them to 0.6.
- What crosses a border between attention chunks can do so in the global layers alone. Two of
  them, neither of them first, are enough.
- The loss of a retrieval row is weighted (`tasks.py`): nobody can foresee a statement's digits.
- Experts keep uneven loads but none dies with a balance loss of 0.01.
- A million tokens of text, seen four or five times, are partly learnt by heart: measure on
  held-out pages.

The shipped weights were made so (seed 4), but for steps 181 to 200: packed rows of 512, chunk 256.

    python -m benchmarks.pocket.train --text llama4q/pocket/text --model llama4q/pocket/model \
        --work WORK

`--model` holds the tokenizer already (`make_tokenizer.py`); its weights are written every
`--export-every` steps and at the end. WORK keeps the state to go on from: run the same command
again. Knows nothing of quantization.
"""

from __future__ import annotations

import argparse
import re
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.pocket import net
from benchmarks.pocket.config import VARIANTS, PocketConfig
from benchmarks.pocket.export import special_ids, write_checkpoint
from benchmarks.pocket.muon import MuonAdamW
from benchmarks.pocket.tasks import Phase, Rows, Special, flatten
from evals import tasks
from evals.prompt import Material, Prompt

CURRICULUM = (
    Phase("recall", (256,), 200, 0.9, packed=True, tokens=8_192),
    Phase("recall across chunks", (256,), 50, 0.9, packed=True, tokens=8_192, chunk=64),
    Phase("recall across chunks", (256,), 60, 0.9, packed=True, chunk=64),
    Phase("dense", (512,), 100, 0.4, chunk=128),
    Phase("middle", (1_024,), 200, 0.35),
    Phase("long", (2_048,), 60, 0.5),
    Phase("longer", (4_096,), 40, 0.5),
    Phase("mix", (1_024, 1_024, 2_048, 4_096), 700, 0.25),
)


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step: up, level, down to zero over the last third."""

    peak: float
    steps: int
    warmup: int = 100

    def rate(self, step: int) -> float:
        down = self.steps - self.steps // 3
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        return self.peak * min(1.0, (self.steps - step) / (self.steps - down))


def page_stream(tokenizer: Tokenizer, text: str, special: dict[str, int]) -> list[int]:
    """Every page between begin-of-text and end-of-text."""
    stream: list[int] = []
    for page in tokenizer.encode_batch(text.split("\f\n"), add_special_tokens=False):
        stream += [special["<|begin_of_text|>"], *page.ids, special["<|end_of_text|>"]]
    return stream


def phase_at(curriculum: tuple[Phase, ...], step: int) -> Phase:
    for phase in curriculum:
        if step < phase.steps:
            return phase
        step -= phase.steps
    return curriculum[-1]


def draw_batch(rows: Rows, phase: Phase) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [rows, length], targets and their weights, flat."""
    length = rows.chance.choice(phase.lengths)
    drawn = [flatten(row) for row in rows.batch(phase, length + 1, phase.tokens // length)]
    tokens = torch.tensor([tokens for tokens, _ in drawn])
    weights = torch.tensor([weights for _, weights in drawn])
    return tokens[:, :-1].contiguous(), tokens[:, 1:].flatten(), weights[:, 1:].flatten()


@torch.no_grad()
def exact_match(weights: net.Weights, config: PocketConfig, prompts: list[Prompt]) -> float:
    """Share of prompts whose every answer token is the arg max (teacher-forced)."""
    right = 0
    for prompt in prompts:
        padded = [*prompt.tokens, *[0] * (-prompt.length % config.chunk)]
        hidden = net.forward(weights, config, torch.tensor([padded])).hidden
        at = slice(prompt.answer_start - 1, prompt.length - 1)
        guess = net.logits(weights, hidden[at]).argmax(-1).tolist()
        right += guess == list(prompt.tokens[prompt.answer_start :])
    return right / len(prompts)


@torch.no_grad()
def heldout_loss(weights: net.Weights, config: PocketConfig, stream: list[int]) -> float:
    """Mean loss over 32 rows of 1,024 held-out tokens."""
    tokens = torch.tensor(stream[: 32 * 1_024 + 1])
    losses = []
    for start in range(0, 32 * 1_024, 4_096):
        part = tokens[start : start + 4_096 + 1]
        hidden = net.forward(weights, config, part[:-1].view(-1, 1_024)).hidden
        losses.append(net.token_losses(weights, hidden, part[1:]).mean())
    return float(torch.stack(losses).mean())


class Trainer:
    """Weights, optimiser and rows, and one step of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.config = VARIANTS[options.variant]
        tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
        special = special_ids(options.model)
        text = (options.text / "train.txt").read_text(encoding="utf-8")
        heldout = (options.text / "heldout.txt").read_text(encoding="utf-8")
        self.heldout = page_stream(tokenizer, heldout, special)
        self.rows = Rows(
            lambda string: tokenizer.encode(string, add_special_tokens=False).ids,
            page_stream(tokenizer, text, special),
            sorted(set(re.findall(r"\b[a-z]{4,9}\b", text))),
            Special(
                special["<|begin_of_text|>"],
                special["<|end_of_text|>"],
                special["<|header_start|>"],
                special["<|header_end|>"],
                special["<|eot|>"],
            ),
            options.seed,
        )
        self.prompts = tasks.prompts(
            Material(
                self.rows.encode, tokenizer.decode, special["<|begin_of_text|>"], self.heldout
            ),
            tasks.Ladder([1_024], [step / 10 for step in range(11)], 2, seed=options.seed),
        )
        self.curriculum = curriculum_for(options.scale, options.mix_steps)
        steps = sum(phase.steps for phase in self.curriculum)
        self.schedule = Schedule(options.rate, steps)
        self.weights = net.initial_weights(self.config, 0.04, options.seed)
        for weight in self.weights.values():
            weight.requires_grad_()
        self.optimiser = MuonAdamW(self.weights)
        self.step_count = 0

    def step(self) -> dict[str, float]:
        phase = phase_at(self.curriculum, self.step_count)
        inputs, targets, share = draw_batch(self.rows, phase)
        output = net.forward(self.weights, replace(self.config, chunk=phase.chunk), inputs)
        losses = net.token_losses(self.weights, output.hidden, targets)
        loss = (losses * share).sum() / share.sum()
        (loss + self.options.balance * output.balance).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        self.optimiser.step(self.schedule.rate(self.step_count))
        for weight in self.weights.values():
            weight.grad = None
        self.step_count += 1
        loads = output.loads / output.loads.float().mean(1, keepdim=True)
        return {
            "text": _mean(losses, share == 1.0),
            "answer": _mean(losses, share > 1.0),
            "norm": float(norm),
            "least": float(loads.min()),
            "most": float(loads.max()),
        }

    def save(self, file: Path) -> None:
        state = {
            "weights": {name: weight.detach() for name, weight in self.weights.items()},
            "optimiser": self.optimiser.state(),
            "step_count": self.step_count,
            "chance": self.rows.chance.getstate(),
        }
        torch.save(state, file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)

    def load(self, file: Path) -> None:
        state: dict[str, Any] = torch.load(file, weights_only=False)
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state["weights"][name])
        self.optimiser.load_state(state["optimiser"])
        self.step_count = state["step_count"]
        self.rows.chance.setstate(state["chance"])

    def check(self) -> str:
        needle = exact_match(self.weights, self.config, self.prompts)
        loss = heldout_loss(self.weights, self.config, self.heldout)
        return f"held-out loss {loss:.3f}, needle exact match at 1024: {needle:.0%}"


def _mean(losses: Tensor, chosen: Tensor) -> float:
    return float(losses.detach()[chosen].mean()) if chosen.any() else float("nan")


def curriculum_for(scale: float, mix_steps: int | None) -> tuple[Phase, ...]:
    phases = [replace(phase, steps=max(1, round(phase.steps * scale))) for phase in CURRICULUM]
    if mix_steps is not None:
        phases[-1] = replace(phases[-1], steps=mix_steps)
    return tuple(phases)


def train(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    if options.compile:
        net.compile_pieces()
    trainer = Trainer(options)
    state = options.work / "last.pt"
    options.work.mkdir(parents=True, exist_ok=True)
    if state.exists():
        trainer.load(state)
        print(f"goes on at step {trainer.step_count}", flush=True)
    stopping: list[int] = []  # asked to stop: finish the step and keep the state
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))
    begun = time.time()
    sums: dict[str, float] = {}
    while trainer.step_count < trainer.schedule.steps:
        for name, value in trainer.step().items():
            sums[name] = sums.get(name, 0.0) + (value if value == value else 0.0)
        done = trainer.step_count
        if done % 10 == 0:
            rate = 10 * phase_at(trainer.curriculum, done - 1).tokens / (time.time() - begun)
            begun = time.time()
            means = ", ".join(f"{name} {value / 10:.3f}" for name, value in sums.items())
            phase = phase_at(trainer.curriculum, done - 1).name
            print(
                f"{done} of {trainer.schedule.steps} {phase}: {means}, {rate:.0f} tokens/s",
                flush=True,
            )
            sums = {}
        if stopping or done % options.check_every == 0 or done == trainer.schedule.steps:
            trainer.save(state)
            if stopping:
                return
            print(f"{done}: {trainer.check()}", flush=True)
        if done % options.export_every == 0 or done == trainer.schedule.steps:
            write_checkpoint(trainer.weights, trainer.config, options.model, options.seed)
            print(f"{done}: written to {options.model}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="folder of train.txt, heldout.txt")
    parser.add_argument("--model", type=Path, required=True, help="folder with the tokenizer")
    parser.add_argument("--work", type=Path, required=True, help="where the state is kept")
    parser.add_argument("--variant", choices=VARIANTS, default="scout")
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the balance loss")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every phase's steps")
    parser.add_argument("--mix-steps", type=int, help="steps of the last phase")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check-every", type=int, default=50)
    parser.add_argument("--export-every", type=int, default=100)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
