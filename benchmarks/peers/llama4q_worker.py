"""llama4q itself as a contestant: the same assignment as its peers get.

Mode "" is the default recipe's solver, "rtn" plain rounding, "bf16" the default with activations
and products in BF16, as a user runs it; any other is a setting of the solver in TOML, such as
"correction = false". Runs in llama4q's own environment.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.accuracy import Silent
from benchmarks.peers.common import Assignment, hand_back, peak_bytes, stored_bytes
from calibrate.run import Job, Outcome, quantize
from evals.evaluation import Evaluation
from evals.questions import Questions
from llama4q import __version__
from llama4q.checkpoint import Checkpoint
from llama4q.config import read_config
from llama4q.packing import is_quantized, unpack
from llama4q.recipe import load_recipe, parse_recipe
from llama4q.source import folder_source

MODES = {"": "", "bf16": "", "rtn": 'method = "rtn"'}


def main() -> None:
    assignment = Assignment.read(sys.argv[1])
    started_with = peak_bytes()
    tokens = assignment.calibration()
    setting = MODES.get(assignment.mode, assignment.mode)
    asked = parse_recipe(f"[schemes]\n[solver]\n{setting}", assignment.mode)
    recipe = dataclasses.replace(load_recipe(assignment.grid), solver=asked.solver)
    built = assignment.work / "checkpoint"
    digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    dtype = torch.bfloat16 if assignment.mode == "bf16" else torch.float32
    job = Job(folder_source(assignment.source), built, recipe, (tokens,), digest, dtype)
    unasked = Evaluation(
        read_config(assignment.source), Questions(tokens[:1, :64], "judged elsewhere", [], 0, str)
    )
    began = time.perf_counter()

    def report(outcome: Outcome) -> Mapping[str, Any]:
        return dataclasses.asdict(outcome)

    found = quantize(job, unasked, Silent(), report)
    seconds = time.perf_counter() - began
    hand_back(
        assignment,
        decoded(Checkpoint(built)),
        seconds=seconds,
        stored=stored_bytes(built),
        version=f"llama4q {__version__}",
        started_with=started_with,
        notes=[f"{rescue['tensor']}: {rescue['kind']}" for rescue in found["rescues"]],
    )


def decoded(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Every quantized linear as `[out, in]`, by the name of its weight."""
    names = {name.rpartition(".")[0] for name in checkpoint.names() if name.endswith("_scale")}
    return {
        f"{name}.weight": unpack(checkpoint, name).dequantize().T
        for name in sorted(names)
        if is_quantized(checkpoint, name)
    }


if __name__ == "__main__":
    main()
