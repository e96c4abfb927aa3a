"""Write a random Llama 4 with the true shapes of Scout or Maverick, and as few layers as wanted.

    python -m benchmarks.make_giant DEST --model scout|maverick|PATH/config.json
        [--layers N] [--first-layer K] [--vocab N] [--seed S]

Time, memory and disk of the real models can be measured with it where there is no room for one of
them. Layers K to K + N - 1 are written, numbered from 0: `--model maverick --layers 2` is a dense
layer and one of experts, `--layers 1 --first-layer 1` that of experts alone, `--model scout
--layers 1 --first-layer 3` a global one. Names and spellings are the Hub's. Only the text part is
written, and config.json names no vision tower. Side files are the pocket model's: its tokenizer's
ids are the lowest ones of the larger vocabulary.

Weights are random but not normal: inputs and outputs have scales of their own, a few of them
large, and tails are heavy. Embeddings share few directions, so that what layers see is correlated.
Each tensor follows from the seed and its name. Values are drawn once, into a pool; a row of a
matrix is a window of the pool at a random place, as drawing each value takes ten times as long.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm import tqdm

from benchmarks.pocket.config import PocketConfig, hub_config
from benchmarks.pocket.export import special_ids
from llama4q.checkpoint import INDEX
from llama4q.config import parse_config, read_config_json
from llama4q.errors import UserError
from llama4q.export import side_files
from llama4q.hub import POCKET_MODEL
from llama4q.writer import to_json, write_atomically

SCOUT = PocketConfig(
    vocabulary=202_048, hidden=5_120, layers=48, query_heads=40, key_value_heads=8, head=128,
    experts=16, expert_width=8_192, dense_width=16_384, chunk=8_192, context=10_485_760,
    floor_scale=8_192, rope_original=8_192,
)  # fmt: skip
MAVERICK = replace(
    SCOUT, experts=128, moe_step=2, qk_norm=False, rope_factor=1.0, context=1_048_576
)
MODELS = {"scout": SCOUT, "maverick": MAVERICK}

SHARD_BYTES = 5 * 10**9
POOL = 2**24
PIECE = 2**19  # values at once: 1 MB stays in the processor's cache, twice as fast as 4 MB
TAIL = 0.3  # of a lognormal factor on each value: a kurtosis of 4.3, where a normal's is 3
SPREAD = 0.3  # of the lognormal scales of channels
OUTLIER, CHANNELS_PER_OUTLIER = 6.0, 256
DIRECTIONS = 128  # shared by the embeddings of all tokens

Shapes = Mapping[str, tuple[int, ...]]


def giant_config(
    model: str, layers: int | None = None, first: int = 0, vocab: int | None = None
) -> dict[str, Any]:
    """config.json of layers `first` to `first + layers - 1` of a model, without vision.

    What differs from layer to layer is listed, so that it does not depend on a layer's number.
    """
    raw, pocket = _read_model(model), read_config_json(POCKET_MODEL)
    raw = _with_token_ids(raw, pocket)
    raw.pop("vision_config", None)
    text = _with_token_ids(raw.get("text_config", raw), pocket["text_config"])
    whole = parse_config(raw, model)
    count = whole.num_layers - first if layers is None else layers
    kept = range(first, first + count)
    if not kept or first < 0 or kept.stop > whole.num_layers:
        raise UserError(
            f"{model}: has layers 0 to {whole.num_layers - 1}, asked for {count} from {first} on; "
            f"choose --first-layer and --layers among them"
        )
    text["num_hidden_layers"] = len(kept)
    text["no_rope_layers"] = [int(layer in whole.rope_layers) for layer in kept]
    text["moe_layers"] = [layer - first for layer in kept if layer in whole.moe_layers]
    if text.get("layer_types"):
        text["layer_types"] = text["layer_types"][first : kept.stop]
    text["vocab_size"] = _enough(whole.vocab_size if vocab is None else vocab, pocket)
    return {**raw, "text_config": text} if "text_config" in raw else text


def _read_model(model: str) -> dict[str, Any]:
    if model in MODELS:
        return hub_config(MODELS[model], special_ids(POCKET_MODEL))
    path = Path(model)
    if path.name != "config.json":
        raise UserError(
            f"--model {model}: choose {', '.join(MODELS)}, or the path of a config.json"
        )
    return read_config_json(path.parent)


def _with_token_ids(part: Mapping[str, Any], pocket: Mapping[str, Any]) -> dict[str, Any]:
    """A part of config.json with the ids of the tokenizer that is written beside it."""
    return {key: pocket.get(key, part[key]) if "_token_" in key else part[key] for key in part}


def _enough(vocab: int, pocket: Mapping[str, Any]) -> int:
    least = int(pocket["text_config"]["vocab_size"])
    if vocab < least:
        raise UserError(f"--vocab {vocab}: the tokenizer written beside it has {least} tokens")
    return vocab


def shapes_of(config: Mapping[str, Any]) -> Shapes:
    """Tensor names and shapes, in order, from transformers on the meta device."""
    from transformers import Llama4ForCausalLM
    from transformers.models.llama4 import Llama4TextConfig

    with torch.device("meta"):
        model = Llama4ForCausalLM(Llama4TextConfig(**config.get("text_config", config)))
    prefix = parse_config(config, "config.json").prefix
    return {prefix + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


class Weights:
    """Random tensors by name, in pieces of whole rows, so that none is in memory as a whole."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        generator = self._generator("pool")
        values = torch.randn(POOL, generator=generator)
        values *= torch.exp(TAIL * torch.randn(POOL, generator=generator) - TAIL**2)
        self.pool = values.bfloat16()

    def pieces(self, name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """The values of one tensor in their order on disk, BF16."""
        generator = self._generator(name)
        if len(shape) == 1:
            yield channel_scales(generator, shape[0]).bfloat16()
        elif "embed_tokens" in name:
            yield from self._embedding(generator, *shape)
        elif len(shape) == 3:
            for _ in range(shape[0]):
                yield from self._matrix(generator, shape[1], shape[2], fan_in=shape[1])
        else:
            # Where outputs compete, for a token or to be the next one, a large one always wins.
            scaled = "router" not in name and "lm_head" not in name
            yield from self._matrix(generator, shape[0], shape[1], fan_in=shape[1], scaled=scaled)

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)

    def _matrix(
        self, generator: torch.Generator, rows: int, columns: int, fan_in: int, scaled: bool = True
    ) -> Iterator[torch.Tensor]:
        """`[rows, columns]` with a variance of 1 / fan_in, which keeps the size of its inputs."""
        of_rows, of_columns = (
            channel_scales(generator, size) if scaled else torch.ones(size)
            for size in (rows, columns)
        )
        of_columns *= fan_in**-0.5
        for part in of_rows.bfloat16().split(max(1, PIECE // columns)):
            values = self._windows(generator, len(part), columns)
            yield values.mul_(part[:, None]).mul_(of_columns.bfloat16())

    def _embedding(
        self, generator: torch.Generator, tokens: int, width: int
    ) -> Iterator[torch.Tensor]:
        """`[tokens, width]`: half of the variance lies in DIRECTIONS directions."""
        scales = channel_scales(generator, width) * 0.5**0.5
        directions = torch.randn(DIRECTIONS, width, generator=generator) * DIRECTIONS**-0.5
        step = max(1, PIECE // width)
        for start in range(0, tokens, step):
            rows = min(step, tokens - start)
            mixed = torch.randn(rows, DIRECTIONS, generator=generator) @ directions
            yield mixed.add_(self._windows(generator, rows, width)).mul_(scales).bfloat16()

    def _windows(self, generator: torch.Generator, rows: int, columns: int) -> torch.Tensor:
        windows = self.pool.unfold(0, columns, 1)
        return windows[torch.randint(len(windows), (rows,), generator=generator)]


def channel_scales(generator: torch.Generator, size: int) -> torch.Tensor:
    """`[size]` lognormal scales with a few outliers; their root mean square is 1."""
    scales = torch.exp(SPREAD * torch.randn(size, generator=generator))
    chosen = torch.randperm(size, generator=generator)[: size // CHANNELS_PER_OUTLIER]
    scales[chosen] *= OUTLIER
    return scales / scales.square().mean().sqrt()


def write_giant(folder: Path, config: Mapping[str, Any], seed: int = 0) -> None:
    """A checkpoint of this config.json in `folder`, the index last.

    Raises UserError where the folder is there already, and where it will not fit the disk.
    """
    if folder.exists():
        raise UserError(f"{folder}: is there already; choose another folder or delete it")
    shapes = shapes_of(config)
    _check_disk(folder, nbytes(shapes))
    folder.mkdir(parents=True)
    weights, parts = Weights(seed), shards(shapes)
    where: dict[str, str] = {}
    with tqdm(total=nbytes(shapes), unit="B", unit_scale=True, desc=folder.name) as bar:
        for number, part in enumerate(parts, 1):
            shard = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            with (folder / shard).open("wb") as file:
                _write_shard(file, part, weights, bar)
            where |= dict.fromkeys(part, shard)
    for name, content in side_files(POCKET_MODEL).items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_bytes(to_json(config))
    index = {"metadata": {"total_size": nbytes(shapes)}, "weight_map": where}
    write_atomically(folder / INDEX, to_json(index))


def _check_disk(folder: Path, needed: int) -> None:
    existing = next(path for path in folder.absolute().parents if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{folder}: the checkpoint needs {needed / 1e9:.1f} GB, the disk has "
            f"{free / 1e9:.1f} GB free; ask for fewer --layers or choose another disk"
        )


def nbytes(shapes: Shapes) -> int:
    return sum(2 * math.prod(shape) for shape in shapes.values())


def shards(shapes: Shapes) -> list[Shapes]:
    """In order, up to SHARD_BYTES each; a larger tensor, as all experts of Maverick, is alone."""
    found: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if found[-1] and nbytes({**found[-1], name: shape}) > SHARD_BYTES:
            found.append({})
        found[-1][name] = shape
    return list(found)


def _write_shard(file: BinaryIO, shapes: Shapes, weights: Weights, bar: Any) -> None:
    file.write(safetensors_header(shapes))
    for name, shape in shapes.items():
        for piece in weights.pieces(name, shape):
            bar.update(file.write(piece.view(torch.uint8).numpy().data))


def safetensors_header(shapes: Shapes) -> bytes:
    """What comes before the values, which its own writer would have to hold all at once.

    Source: "Format" in the README of huggingface/safetensors; padded to 8 bytes as it does.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + nbytes({name: shape})
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("dest", type=Path)
    parser.add_argument("--model", required=True, help=f"{', '.join(MODELS)}, or a config.json")
    parser.add_argument("--layers", type=int, help="how many; by default all")
    parser.add_argument("--first-layer", type=int, default=0, help="of the model")
    parser.add_argument("--vocab", type=int, help="fewer tokens, for a smaller embedding and head")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # faster than any disk; more threads mostly wait for each other
    try:
        config = giant_config(options.model, options.layers, options.first_layer, options.vocab)
        write_giant(options.dest, config, options.seed)
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
