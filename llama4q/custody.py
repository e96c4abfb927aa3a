"""Is a folder the whole, unharmed checkpoint that a run finished, fit to be served?

Every file by its manifest, every tensor by name, shape and scale, quantization_config and side
files by what engines demand, and with the source at hand every weight against it. One layer's
attention and shared expert and one routed expert are in memory at a time. Knows nothing of how
codes were found.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .bounds import damage
from .checkpoint import INDEX, Checkpoint, PartReader, TensorInfo
from .config import ModelConfig, read_config, read_config_json
from .errors import UserError
from .export import config_with, quantization_config, side_files
from .manifest import MANIFEST, check_manifest, read_manifest
from .model import Mlp
from .recipe import Recipe, planned, recipe_from_json
from .verify import bits, converted_tensors, kept_tensors, verify
from .weights import Component, LayerReader, check_layout
from .writer import differences

REPORT = "report.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
TOKENIZER_CONFIG = ("tokenizer_config.json",)
PROCESSORS = ("processor_config.json", "preprocessor_config.json")

Read = Callable[[int], None]  # is told numbers of bytes


@dataclass(frozen=True)
class Checked:
    """One line of what was looked at, and found in order."""

    what: str
    count: int
    how: str


def read_report(folder: Path) -> dict[str, Any]:
    """The report that a run left in its checkpoint. Raises UserError when there is none."""
    try:
        report = json.loads((folder / REPORT).read_bytes())
        report["recipe"]["schemes"], report["files"], report["verified"]["untouched"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder}: holds no {REPORT} of 'llama4q quantize'; only what that has written can "
            f"be checked"
        ) from None
    found: dict[str, Any] = report
    return found


def bytes_to_read(folder: Path, source: Path | None) -> int:
    """What `check_custody` will read, in bytes. Raises UserError as that does."""
    files = sum(entry.size for entry in read_manifest(folder).values())
    if source is None:
        return files
    return files + Checkpoint(folder).nbytes + Checkpoint(source).nbytes


def check_custody(folder: Path, source: Path | None, read: Read) -> Iterator[Checked]:
    """What was checked, in order and each as soon as it is; `read` is told how much was read.

    Raises UserError at the first thing that is not as it must be.
    """
    digests = check_manifest(folder, read)
    yield Checked("files", len(digests), f"size and SHA-256 as in {MANIFEST}")
    report = read_report(folder)
    recipe, config = recipe_from_json(report["recipe"], f"{folder / REPORT}"), read_config(folder)
    served = _check_config(folder, config, recipe)
    yield Checked("linears", served, "matched by quantization_config as engines demand")
    written = _opened(folder, digests, report["files"])
    kept = _kept(written, config, recipe, report["verified"]["untouched"])
    counted = verify(written, kept, config, recipe)
    yield Checked("tensors", counted["tensors"], "names, shapes and dtypes as served")
    yield Checked("scales", counted["scales"], "finite, not 0")
    present = _check_side_files(digests, config, folder)
    yield Checked("side files", present, "tokenizer and processor are there")
    if source is not None:
        yield from _against(written, source, config, recipe, read)


def _opened(folder: Path, digests: Mapping[str, str], shards: Mapping[str, str]) -> Checkpoint:
    """All tensors in the folder's files, each of which index and report must know."""
    if INDEX not in digests:
        raise UserError(f"{folder}: has no {INDEX}; without it engines drop the vision tower")
    found = {name: digest for name, digest in digests.items() if name.endswith(".safetensors")}
    if found != dict(shards):
        [name, *_] = sorted(dict(found.items() ^ shards.items()))
        raise UserError(f"{folder}: {name} is not the shard that {REPORT} tells of; copy it again")
    written = PartReader(folder, sorted(found))
    unknown = set(written.names()) ^ set(Checkpoint(folder).names())
    if unknown:
        raise UserError(f"{folder}: {min(unknown)} is not in both {INDEX} and a shard")
    return written


def _kept(
    written: Checkpoint, config: ModelConfig, recipe: Recipe, recorded: int
) -> dict[str, TensorInfo]:
    """The tensors that were left alone; those of the text model must all be there, by shape."""
    original = PartReader(written.folder, [])
    kept = {
        name: info
        for name, info in written.infos.items()
        if name not in converted_tensors(config, recipe)
    }
    original.infos = kept | _as_before(config, recipe)
    text = check_layout(original, config)
    for name in kept:
        if name.startswith(config.prefix) and name not in text:
            raise UserError(
                f"{written.folder}: {name} is no tensor of a served Llama 4; copy or download it "
                f"again"
            )
    if len(kept) != recorded:
        raise UserError(
            f"{written.folder}: {len(kept)} tensors that are not the recipe's, {recorded} in "
            f"{REPORT}; copy or download it again"
        )
    return kept


def _as_before(config: ModelConfig, recipe: Recipe) -> dict[str, TensorInfo]:
    """The linears of a recipe as if they were not quantized."""
    return {
        f"{linear.name}.weight": TensorInfo(
            "", (linear.outputs, linear.inputs), torch.bfloat16, start=0
        )
        for index in range(config.num_layers)
        for linear, _ in planned(recipe, config, index)
    }


def _check_config(folder: Path, config: ModelConfig, recipe: Recipe) -> int:
    """Raises UserError unless config.json says what serving engines demand of this recipe; how
    many linears it speaks of."""
    raw = read_config_json(folder)
    found, wanted = raw.get("quantization_config"), quantization_config(recipe, config)
    for key, wants, has in differences(json.loads(json.dumps(wanted)), found):
        raise UserError(
            f"{folder / 'config.json'}: quantization_config {key} is {json.dumps(has)}, engines "
            f"need {json.dumps(wants)}; copy or download it again"
        )
    return sum(len(planned(recipe, config, index)) for index in range(config.num_layers))


def _check_side_files(present: Mapping[str, str], config: ModelConfig, folder: Path) -> int:
    """Raises UserError when engines would miss a file; how many files are no shards."""
    for either in (TOKENIZERS, TOKENIZER_CONFIG, *([PROCESSORS] if config.has_vision else [])):
        if not any(name in present for name in either):
            raise UserError(
                f"{folder}: has no {' or '.join(either)}, which engines need; put the original's "
                f"beside its weights and quantize again"
            )
    return sum(not name.endswith(".safetensors") for name in present)


def _against(
    written: Checkpoint, folder: Path, config: ModelConfig, recipe: Recipe, read: Read
) -> Iterator[Checked]:
    """Everything once more, against the source."""
    source = Checkpoint(folder)
    copied = side_files(folder)
    quantization = quantization_config(recipe, config)
    for name, content in {**copied, "config.json": config_with(folder, quantization)}.items():
        path = written.folder / name
        if not path.is_file() or path.read_bytes() != content:
            raise UserError(f"{path}: is not what {folder} gives; is that the source?")
    yield Checked("source's files", len(copied) + 1, "the same, config.json with one key more")
    kept = kept_tensors(source.infos, config, recipe)
    for name in kept:
        if bits(written.get(name)) != bits(source.get(name)):
            raise UserError(f"{written.folder}: {name} differs from {folder}; is that the source?")
        read(2 * kept[name].nbytes)
    yield Checked("untouched", len(kept), "bit for bit the source's")
    weights = 0
    for number in range(config.num_layers):
        weights += _check_layer(written, source, number, config, recipe, read)
    yield Checked("weights", weights, "within the bound of their scheme")


@torch.inference_mode()
def _check_layer(
    written: Checkpoint,
    source: Checkpoint,
    index: int,
    config: ModelConfig,
    recipe: Recipe,
    read: Read,
) -> int:
    """Raises UserError when a weight is farther from the source than its codes may be; how many
    there are."""
    readers = (LayerReader(side, config, torch.float32) for side in (source, written))
    sides = (_weights(reader, index) for reader in readers)
    linears = planned(recipe, config, index)
    for (linear, scheme), weight, found in zip(linears, *sides, strict=True):
        problem = damage(weight, found, scheme, recipe.solver.method)
        if problem is not None:
            raise UserError(
                f"{written.folder}: {linear.name} ({scheme.name}) {problem}; "
                f"either {source.folder} is not its source, or it is damaged"
            )
        if scheme.quantizes or linear.component is Component.EXPERTS:  # else read as untouched
            read(2 * weight.numel() + scheme.stored_bytes(linear.inputs, linear.outputs))
    return len(linears)


def _weights(reader: LayerReader, index: int) -> Iterator[torch.Tensor]:
    """The linears of a layer that recipes speak of, `[I, O]`, in the order of `weights.linears`."""
    layer = reader.layer(index)
    yield layer.o.weight
    network = layer.feed_forward
    if isinstance(network, Mlp):
        yield from _parts(network)
        return
    yield from _parts(network.shared)
    for expert in network.experts:
        yield from _parts(expert)


def _parts(network: Mlp) -> Iterator[torch.Tensor]:
    """Gate, up, down."""
    yield from (half.contiguous() for half in network.gate_up.weight.chunk(2, dim=1))
    yield network.down.weight.contiguous()
