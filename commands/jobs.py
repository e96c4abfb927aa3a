"""A run from its settings: the text drawn, the job, and its report."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama4q.stopping import Stopped

from .shared import provenance

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from calibrate.budget import Choice
    from calibrate.data import CalibrationSet
    from calibrate.run import Job, Outcome
    from llama4q.config import ModelConfig
    from llama4q.gpus import Device
    from llama4q.memory import Serving
    from llama4q.recipe import Calibration, Recipe
    from llama4q.source import Source

UNITS = {
    "bytes": "of all tensors",
    "tokens": "calibration tokens that reached an expert or a weight",
    "share": "of the calibration tokens, as asked for, 0 to 1",
    "needed": "calibration tokens, as many as an expert's widest matrix has inputs",
    "error": "share of the wanted output's energy, on calibration tokens held out of the solver",
    "rounding_error": "the same for plain rounding",
    "hidden_error": "|x - y|^2 / |x|^2 of the hidden states after the layer",
    "kv_scales": "what one step of E4M3's 1 stands for in a layer's stored keys and values",
    "shrinkage": "share of the Hessian of all tokens, or of the diagonal, 0 to 1",
    "damping": "of the Hessian's mean diagonal",
    "correction": "share taken of the correction for what earlier layers damaged, 0 to 1",
    "seconds": "wall time",
}


def drawn_tokens(settings: Calibration, tokenizer: PreTrainedTokenizerBase) -> CalibrationSet:
    """Calibration tokens as named, candidates among them."""
    from calibrate.data import calibration_tokens
    from calibrate.mix import parse_mix

    return calibration_tokens(
        parse_mix(settings.text), tokenizer,
        samples=settings.samples * settings.candidates, length=settings.length, seed=settings.seed,
    )  # fmt: skip


def job_of(
    source: Source,
    folder: Path,
    recipe: Recipe,
    drawn: CalibrationSet,
    dtype: str,
    device: torch.device,
) -> Job:
    """What a run depends on."""
    from calibrate.run import DTYPES, Job

    return Job(source, folder, recipe, drawn.tokens, drawn.digest, DTYPES[dtype], device)


def run_report(
    job: Job,
    drawn: CalibrationSet,
    config: ModelConfig,
    device: Device,
    serving: Serving,
    outcome: Outcome,
    choice: Choice | None = None,
) -> dict[str, Any]:
    """The report of a finished run, to be served so; `choice` is how its recipe came about."""
    from calibrate.coverage import coverage
    from calibrate.kernel import description
    from llama4q import products
    from llama4q.checkpoint import PartReader
    from llama4q.fit import fit_line
    from llama4q.inspect import component_bytes
    from llama4q.machine import properties
    from llama4q.shards import sharded

    settings = job.recipe.calibration
    written = PartReader(job.destination, list(outcome.files))
    return {
        **provenance(job.source, config),
        "quantized": {
            "name": str(job.destination),
            "bytes": outcome.quantized_bytes,
            "components": component_bytes(config, written.infos),
        },
        "recipe": job.recipe.to_json(),
        "calibration": {
            "source": settings.text,
            "samples": settings.samples,
            "length": settings.length,
            "seed": settings.seed,
            "candidates": settings.candidates,
            "tokens": sum(batch.numel() for batch in drawn.tokens),
            "digest": drawn.digest,
            "mix": [part.to_json() for part in drawn.drawn],
            "coverage": coverage(job.recipe, config, outcome.layers),
        },
        "machine": properties(job.device),
        "kernel": description(job.recipe.solver.beams, job.device),
        "products": products.description(job.device),
        "dtype": str(job.dtype).removeprefix("torch."),
        "units": UNITS,
        "layers": outcome.layers,
        "rescues": outcome.rescues,
        "evidence": outcome.evidence,
        "fit": fit_line(config, sharded(config, written.infos), device, serving),
        "budget": None if choice is None else choice.to_json(),
        "verified": outcome.checked,
        "files": outcome.files,
        "seconds": {"total": outcome.seconds},
    }


def shapes(batches: Iterable[torch.Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple((batch.shape[0], batch.shape[1]) for batch in batches)


@contextlib.contextmanager
def told_what_stands(folder: Path, layers: int) -> Iterator[None]:
    """Adds to `Stopped` how much of a quantize run is written and how it goes on."""
    from calibrate.run import layers_written
    from llama4q.manifest import MANIFEST

    try:
        yield
    except Stopped as stop:
        written = layers_written(folder)
        if (folder / MANIFEST).exists():
            stop.add_note(f"{folder} is finished")
        elif written == layers:
            stop.add_note(f"all {layers} layers are written; repeat the command to finish")
        else:
            stop.add_note(
                f"{written} of {layers} layers are written; "
                f"repeat the command, it goes on at layer {written}"
            )
        raise
