"""llama4q itself as a contestant: the same assignment as its peers get.

Mode "" is the default recipe's solver, "rtn" plain rounding. Runs in llama4q's own environment.
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
from llama4q.recipe import Method, Solver, load_recipe

DTYPES = {"": torch.float32, "rtn": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    assignment = Assignment.read(sys.argv[1])
    started_with = peak_bytes()
    tokens = assignment.calibration()
    suffix = "" if assignment.group == 128 else f"-g{assignment.group}"
    recipe = dataclasses.replace(
        load_recipe(f"int{assignment.bits}{suffix}"),
        solver=Solver(method=Method.RTN if assignment.mode == "rtn" else Method.GPTQ),
    )
    built = assignment.work / "checkpoint"
    digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    dtype = DTYPES[assignment.mode]
    job = Job(assignment.source, built, recipe, (tokens,), digest, dtype)
    unasked = Evaluation(
        read_config(assignment.source), Questions(tokens[:1, :64], "judged elsewhere", [], 0)
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
