"""Are the predicted weights those that are written? True shapes, a few layers, piece by piece.

    python -m benchmarks.written_bytes --model scout|maverick|PATH/config.json --recipe int4
        [--layers 2] [--first-layer K] [--vocab N]

Every tensor of the result is made by the code that a run writes with (rounding to nearest, packing,
safetensors), one linear at a time, and its file is deleted when its header has been read; so two
layers of Scout take seconds for each expert and less room than their embedding. Names, dtypes,
shapes and bytes must be what `llama4q fit --recipe` predicts, else the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from benchmarks.make_giant import MODELS, giant_config, shapes_of
from llama4q import bnb
from llama4q.checkpoint import TensorInfo, shard_infos
from llama4q.config import ModelConfig, parse_config
from llama4q.errors import UserError
from llama4q.packing import pack
from llama4q.predict import predicted_tensors
from llama4q.recipe import Recipe, check_recipe, load_recipe, planned
from llama4q.schemes import Scheme, round_to_nearest
from llama4q.shards import sharded
from llama4q.verify import kept_tensors

POOL = 2**20
SHARD = "model.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True, help=f"{', '.join(MODELS)}, or a config.json")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--first-layer", type=int, default=0)
    parser.add_argument("--vocab", type=int, help="fewer tokens, for a smaller embedding and head")
    options = parser.parse_args()
    try:
        raw = giant_config(options.model, options.layers, options.first_layer, options.vocab)
        recipe = load_recipe(options.recipe)
        differing = compare(raw, recipe)
    except UserError as error:
        sys.exit(str(error))
    for line in differing:
        print(line)
    sys.exit(1 if differing else 0)


def compare(raw: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """A line for each tensor that is not as predicted; prints the bytes of both."""
    config = parse_config(raw, "config.json")
    check_recipe(recipe, config)
    originals = {
        name: TensorInfo("", shape, torch.bfloat16, 0) for name, shape in shapes_of(raw).items()
    }
    foreseen = predicted_tensors(originals, config, recipe)
    found: dict[str, TensorInfo] = {}
    written = 0
    with tempfile.TemporaryDirectory() as folder:
        for infos, size in pieces(config, recipe, originals, Path(folder)):
            found |= infos
            written += size
    print(
        f"{recipe.name}: predicted {sum(info.nbytes for info in foreseen.values()):,} bytes in "
        f"{len(foreseen):,} tensors, written {written:,} in {len(found):,}; "
        f"vLLM holds {sharded(config, found).on(1):,}"
    )
    return [
        f"{name}: predicted {_kind(foreseen.get(name))}, written {_kind(found.get(name))}"
        for name in sorted({*foreseen, *found})
        if _kind(foreseen.get(name)) != _kind(found.get(name))
    ]


def pieces(
    config: ModelConfig, recipe: Recipe, originals: Mapping[str, TensorInfo], folder: Path
) -> Iterator[tuple[dict[str, TensorInfo], int]]:
    """The tensors of one file after the other, and its bytes without the header."""
    for name, info in kept_tensors(originals, config, recipe).items():
        yield _written({name: torch.zeros(info.shape, dtype=info.dtype)}, folder)
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).bfloat16()
    layers = [planned(recipe, config, layer) for layer in range(config.num_layers)]
    for linear, scheme in tqdm([each for layer in layers for each in layer], unit="linear"):
        if not scheme.quantizes and ".experts." not in linear.name:
            continue  # kept
        number = linear.inputs * linear.outputs
        weight = pool.repeat(-(-number // POOL))[:number].view(linear.inputs, linear.outputs)
        yield _written(_stored(linear.name, weight, scheme), folder)


def _stored(name: str, weight: torch.Tensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    """What a run writes for a linear with a weight `[I, O]`."""
    if not scheme.quantizes:
        return {f"{name}.weight": weight.T.contiguous()}
    if scheme.bitsandbytes:
        return dict(pack(name, bnb.quantize(weight, scheme)))
    return dict(pack(name, round_to_nearest(weight.float(), scheme)))


def _written(tensors: dict[str, torch.Tensor], folder: Path) -> tuple[dict[str, TensorInfo], int]:
    path = folder / SHARD
    save_file(tensors, path)
    infos, size = shard_infos(folder, SHARD), path.stat().st_size
    with path.open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    path.unlink()
    return infos, size - header


def _kind(info: TensorInfo | None) -> str:
    return "nothing" if info is None else f"{info.dtype} {list(info.shape)}, {info.nbytes:,} bytes"


if __name__ == "__main__":
    main()
