"""Passes over the original before anything is quantized: which text reaches its experts, what its
parts lose. Each shows how far it is, and goes on where a start that was stopped has come to. Knows
nothing of codes or recipes."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama4q.errors import UserError
from llama4q.stopping import Stopped

if TYPE_CHECKING:
    import torch

    from calibrate.budget import Goal
    from calibrate.data import CalibrationSet
    from calibrate.sensitivity import Sensitivity
    from llama4q.config import ModelConfig
    from llama4q.hidden import Spool
    from llama4q.kept import Kept
    from llama4q.machine import Memory
    from llama4q.recipe import Calibration
    from llama4q.source import Source
    from llama4q.weights import LayerReader

PROBE_SEQUENCES, PROBE_LENGTH = 2, 512  # tokens; more changes little (NOTES.md, 2026-11-28)
MEASURED = "sensitivity.json"  # in the work folder


@dataclass(frozen=True)
class Original:
    """A model to be read, for a run in `folder` with so much memory for rows of tokens."""

    source: Source
    config: ModelConfig
    folder: Path
    dtype: str
    device: torch.device
    memory: Memory

    @property
    def work(self) -> Path:
        from llama4q.writer import WORK

        return self.folder / WORK

    def reader(self) -> LayerReader:
        from calibrate.run import DTYPES
        from llama4q.weights import LayerReader

        return LayerReader(self.source.checkpoint(self.device), self.config, DTYPES[self.dtype])

    def spool(self) -> Spool:
        """For hidden states."""
        from llama4q.hidden import Spool

        return Spool(self.memory.rows, self.work, self.device, self.memory.on_device)

    def key(self, tokens: torch.Tensor) -> dict[str, Any]:
        """What all figures found with these tokens depend on."""
        from llama4q import __version__

        return {
            "llama4q": __version__,
            "source": self.source.identity(),
            "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
            "dtype": self.dtype,
            "device": self.device.type,
        }


def chosen_tokens(
    original: Original, drawn: CalibrationSet, settings: Calibration
) -> CalibrationSet:
    """The sequences that cover the experts best, where more were drawn than are wanted."""
    config = original.config
    if settings.candidates == 1 or not config.moe_layers:
        return drawn
    from calibrate.choose import best_covering, expert_counts
    from calibrate.data import kept
    from llama4q.kept import Kept

    if len(drawn.drawn) > 1:
        raise UserError(
            f"--candidates {settings.candidates} with a mix of {len(drawn.drawn)} texts would "
            f"change their shares; name one text, or leave out --candidates"
        )
    tokens = drawn.tokens[0]
    spool, reached = original.spool(), Kept(original.work, "choosing", original.key(tokens))
    with told("choosing calibration text", [1.0] * config.num_layers, reached) as layer_done:
        counts = expert_counts(original.reader(), tokens, layer_done, spool, reached)
    reached.forget()
    return kept(drawn, best_covering(counts, settings.samples))


def measured(original: Original, goal: Goal, tokens: torch.Tensor) -> Sensitivity:
    """What each part loses in each scheme, on a few of the calibration tokens `[S, T]`; from the
    work folder, where an earlier start of the same run has measured it."""
    import json

    from calibrate.sensitivity import measure, sensitivity_from_json, work
    from llama4q.kept import Kept
    from llama4q.writer import to_json, write_atomically, writing

    length = min(PROBE_LENGTH, tokens.shape[1])
    probe = tokens[: -(-PROBE_SEQUENCES * PROBE_LENGTH // length), :length]
    schemes = goal.schemes()
    key = {**original.key(probe), "schemes": [scheme.name for scheme in schemes]}
    path = original.work / MEASURED
    if path.exists() and (found := json.loads(path.read_bytes()))["key"] == key:
        return sensitivity_from_json(found["sensitivity"])
    spool, reached = original.spool(), Kept(original.work, "measuring", key)
    with told("measuring what parts lose", work(goal.config, schemes), reached) as layer_done:
        sensitivity = measure(original.reader(), probe, schemes, spool, layer_done, reached)
    with writing(original.folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, to_json({"key": key, "sensitivity": sensitivity.to_json()}))
    reached.forget()
    return sensitivity


@contextlib.contextmanager
def told(what: str, work: Sequence[float], reached: Kept) -> Iterator[Callable[[int], None]]:
    """A bar that is told the number of layers done, each of which has so much `work`.

    A pass that is stopped says where it goes on.
    """
    from tqdm import tqdm

    with tqdm(
        total=sum(work), desc=what,
        bar_format="{l_bar}{bar}| {postfix[0]}/{postfix[1]} layers [{elapsed}<{remaining}]",
        postfix=[0, len(work)],
    ) as bar:  # fmt: skip

        def layer_done(count: int) -> None:
            done = sum(work[:count])
            if bar.postfix[0] == bar.n == 0:
                bar.initial = done  # by an earlier start, and says nothing of this one's pace
            bar.postfix[0] = count
            bar.update(done - bar.n)

        try:
            yield layer_done
        except Stopped as stop:
            at = found.layers if (found := reached.reached()) else 0
            stop.add_note(
                f"{what} goes on at layer {at} of {len(work)} when you repeat the command"
            )
            raise
