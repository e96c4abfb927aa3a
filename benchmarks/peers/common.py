"""What the workers of all peers share: the job they are given and the result they hand back.

A worker runs in its peer's own environment, where llama4q is not installed: only torch, numpy and
safetensors are taken for granted. It quantizes the feed-forward weights of a Llama 4 by its peer's
own method, and hands back a BF16 checkpoint of the source's layout in which just those weights are
replaced by what the peer's codes decode to. So that one judge reads all of them alike.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
QUANTIZED = re.compile(
    r"\.feed_forward\.(shared_expert\.|experts\.\d+\.)?(gate|up|down)_proj\.weight$"
)


@dataclass(frozen=True)
class Assignment:
    """What a worker is asked for; read from the JSON file that is its only argument."""

    source: Path  # BF16 Llama 4, fused experts, language_model. prefix
    tokens: Path  # .npy, int64 [S, T]: the calibration sequences
    grid: str  # llama4q's name for what follows, such as "int4"
    bits: int
    group: int
    mode: str  # the peer's own variants, such as "routed"; "" for its default
    seed: int
    work: Path  # for the peer's own files; emptied by the caller
    dest: Path  # where the decoded checkpoint goes; does not exist yet

    @classmethod
    def read(cls, file: str) -> Assignment:
        raw = json.loads(Path(file).read_text())
        for name in ("source", "tokens", "work", "dest"):
            raw[name] = Path(raw[name])
        return cls(**raw)

    def calibration(self) -> torch.Tensor:
        return torch.from_numpy(numpy.load(self.tokens))


def peak_bytes() -> int:
    """Largest resident memory of this program so far; getrusage counts the parent's, too."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)[0]) * 1024


def stored_bytes(folder: Path) -> int:
    """Bytes of all safetensors files that the peer itself wrote."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def hand_back(
    assignment: Assignment,
    decoded: Mapping[str, torch.Tensor],
    *,
    seconds: float,
    stored: int,
    version: str,
    started_with: int,
    notes: list[str],
) -> None:
    """Write the decoded checkpoint and `peer.json`.

    `decoded` maps the per-expert names of a quantized checkpoint
    (`language_model.model.layers.0.feed_forward.experts.3.gate_proj.weight`) to `[out, in]`
    weights. Raises ValueError unless it holds every feed-forward linear and nothing else.
    `started_with` is peak_bytes() after the imports.
    """
    source: dict[str, Any] = {}
    for file in sorted(assignment.source.glob("*.safetensors")):
        source |= load_file(str(file))
    result = _replaced(source, dict(decoded))
    building = assignment.dest.with_name(assignment.dest.name + ".new")
    shutil.rmtree(building, ignore_errors=True)
    shutil.copytree(
        assignment.source, building, ignore=shutil.ignore_patterns("*.safetensors", INDEX)
    )
    save_file(result, str(building / "model.safetensors"), metadata={"format": "pt"})
    facts: dict[str, Any] = {
        "seconds": seconds,
        "stored_bytes": stored,
        "version": version,
        "peak_bytes": peak_bytes(),
        "import_bytes": started_with,
        "notes": notes,
    }
    (building / "peer.json").write_text(json.dumps(facts, indent=2) + "\n")
    building.rename(assignment.dest)


def _replaced(
    source: dict[str, torch.Tensor], decoded: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    result = {}
    for name, tensor in source.items():
        if name.endswith(".experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            experts = [
                torch.cat(
                    [_take(decoded, f"{stem}{e}.{part}_proj.weight") for part in ("gate", "up")]
                )
                for e in range(len(tensor))
            ]
            new = torch.stack([expert.T for expert in experts])
        elif name.endswith(".experts.down_proj"):
            stem = name.removesuffix("down_proj")
            new = torch.stack(
                [_take(decoded, f"{stem}{e}.down_proj.weight").T for e in range(len(tensor))]
            )
        elif QUANTIZED.search(name):
            new = _take(decoded, name)
        else:
            new = tensor
        if new.shape != tensor.shape or not new.isfinite().all():
            raise ValueError(f"{name}: {tuple(new.shape)} for {tuple(tensor.shape)}, or not finite")
        result[name] = new.to(torch.bfloat16).contiguous()
    if decoded:
        raise ValueError(f"not in the source: {sorted(decoded)[:3]}")
    return result


def _take(decoded: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in decoded:
        raise ValueError(f"the peer left {name} out")
    return decoded.pop(name).float()
