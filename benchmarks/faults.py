"""Faults planted in a quantized checkpoint, in place: does a check find them?

    python benchmarks/faults.py FOLDER scales --layer 3 --expert 2 --factor 1.05
    python benchmarks/faults.py FOLDER swap --layer 3 --experts 1 4

The first one makes the scales of an expert wrong, the second one exchanges two experts. Both leave
a checkpoint that loads and answers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

# a tensor by its name and all others of its file -> what is written in its place
Fault = Callable[[str, dict[str, torch.Tensor]], torch.Tensor]


def plant(folder: Path, fault: Fault) -> int:
    """How many tensors of the checkpoint the fault has changed."""
    changed = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        faulty = {name: fault(name, tensors) for name in tensors}
        differ = sum(faulty[name] is not tensors[name] for name in tensors)
        if differ:
            save_file({name: tensor.clone() for name, tensor in faulty.items()}, path, metadata)
        changed += differ
    return changed


def scales(layer: int, expert: int, factor: float) -> Fault:
    """Every scale of one expert times `factor`."""

    def fault(name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        wrong = _prefix(layer, expert) in name and name.endswith("weight_scale")
        return tensors[name] * factor if wrong else tensors[name]

    return fault


def swap(layer: int, one: int, other: int) -> Fault:
    """Two experts in each other's place; they must be in one file."""
    places = {_prefix(layer, one): _prefix(layer, other)}
    places |= {there: here for here, there in places.items()}

    def fault(name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        for here, there in places.items():
            if here in name:
                return tensors[name.replace(here, there)]
        return tensors[name]

    return fault


def _prefix(layer: int, expert: int) -> str:
    return f".layers.{layer}.feed_forward.experts.{expert}."


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    kinds = parser.add_subparsers(dest="kind", required=True)
    wrong, exchanged = kinds.add_parser("scales"), kinds.add_parser("swap")
    for kind in (wrong, exchanged):
        kind.add_argument("--layer", type=int, required=True)
    wrong.add_argument("--expert", type=int, required=True)
    wrong.add_argument("--factor", type=float, default=1.05)
    exchanged.add_argument("--experts", type=int, nargs=2, required=True)
    given = parser.parse_args()
    if given.kind == "scales":
        fault = scales(given.layer, given.expert, given.factor)
    else:
        fault = swap(given.layer, *given.experts)
    changed = plant(given.folder, fault)
    if not changed:
        parser.error(f"{given.folder} has no such expert, or none that is quantized")
    print(f"{changed} tensors of {given.folder} are wrong now")


if __name__ == "__main__":
    main()
