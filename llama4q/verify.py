"""Looks at what was written, tensor by tensor, before a folder may call itself a checkpoint.

Serving engines do not notice a missing expert or an unset scale. Knows nothing of calibration.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from . import bnb
from .checkpoint import Checkpoint, TensorInfo, sha256
from .config import ModelConfig
from .errors import UserError
from .float8_cache import KEY, VALUE
from .kv_cache import KVDtype
from .recipe import Recipe, planned
from .schemes import FLOAT8, Kind, Scheme
from .weights import attention_name, layer_of

Expected = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def verify(
    written: Checkpoint, kept: Mapping[str, TensorInfo], config: ModelConfig, recipe: Recipe
) -> dict[str, int]:
    """Raises UserError at the first tensor that is missing, unexpected, misshapen or damaged.

    Checks every key, shape and dtype, `kept` being what was left alone, and that every scale is
    finite and not 0. Returns what was counted.
    """
    converted = converted_tensors(config, recipe)
    expected = converted | {name: (info.dtype, info.shape) for name, info in kept.items()}
    _check_names(written, set(expected))
    scales = 0
    for name, (dtype, shape) in expected.items():
        info = written.info(name)
        if (info.dtype, info.shape) != (dtype, shape):
            raise damaged(
                name, f"is {info.dtype} {info.shape}, expected {dtype} {shape}", written.folder
            )
        if name in converted and name.endswith("_scale"):
            scales += 1
            least, most = written.get(name).abs().aminmax()
            if not (least > 0 and most < torch.inf):  # NaN is neither
                raise damaged(name, "holds scales that are not finite or are 0", written.folder)
    scales += _check_bitsandbytes(written, config, recipe)
    return {"tensors": len(expected), "scales": scales}


class Untouched:
    """Tensors on their way from the source to where they are written, and whether they arrive.

    Their bits are taken as they pass, so that the source is read once: it may not be there long.
    """

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._tensors = tensors
        self._passed: dict[str, str] = {}

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._tensors:
            self._passed[name] = bits(tensor)
            yield name, tensor

    def arrived(self, written: Checkpoint) -> dict[str, dict[str, str]]:
        """`untouched`: the bits of each tensor. Raises UserError where others were written."""
        for name, passed in self._passed.items():
            if bits(written.get(name)) != passed:
                raise damaged(name, "differs from the source", written.folder)
        return {"untouched": self._passed}


def bits(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(memoryview(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data))
    return digest.hexdigest()


def _check_bitsandbytes(written: Checkpoint, config: ModelConfig, recipe: Recipe) -> int:
    """Raises UserError for damaged statistics; returns how many linears have such."""
    checked = 0
    for index in range(config.num_layers):
        for linear, scheme in planned(recipe, config, index):
            if scheme.bitsandbytes:
                name, inputs, outputs = linear.name, linear.inputs, linear.outputs
                problem = bnb.damage_on_disk(written.get, name, scheme, inputs, outputs)
                if problem is not None:
                    raise damaged(name, problem, written.folder)
                checked += 1
    return checked


def converted_tensors(config: ModelConfig, recipe: Recipe) -> Expected:
    """The tensors that replace the source's: quantized linears, and unfused BF16 experts; and the
    scales of keys and values."""
    expected: Expected = {}
    for index in range(config.num_layers):
        if recipe.kv_cache is KVDtype.FP8:
            for scale in (KEY, VALUE):
                expected[f"{attention_name(config, index)}.{scale}"] = (torch.float32, (1,))
        for linear, scheme in planned(recipe, config, index):
            if scheme.quantizes:
                expected |= _stored(linear.name, linear.inputs, linear.outputs, scheme)
            elif ".experts." in linear.name:
                shape = (linear.outputs, linear.inputs)
                expected[f"{linear.name}.weight"] = (torch.bfloat16, shape)
    return expected


def _stored(name: str, inputs: int, outputs: int, scheme: Scheme) -> Expected:
    """Names, dtypes and shapes of one quantized linear (docs/format.md)."""
    if scheme.bitsandbytes:
        parts = bnb.layout(scheme, inputs, outputs)
        return {f"{name}.{key}": expected for key, expected in parts.items()}
    if scheme.kind is Kind.FLOAT8:
        return {
            f"{name}.weight": (FLOAT8, (outputs, inputs)),
            f"{name}.weight_scale": (torch.float32, (outputs, 1)),
        }
    words, groups = -(-inputs * scheme.bits // 32), inputs // (scheme.group or inputs)
    return {
        f"{name}.weight_packed": (torch.int32, (outputs, words)),
        f"{name}.weight_scale": (torch.bfloat16, (outputs, groups)),
        f"{name}.weight_shape": (torch.int64, (2,)),
    }


def kept_tensors(
    infos: Mapping[str, TensorInfo], config: ModelConfig, recipe: Recipe
) -> dict[str, TensorInfo]:
    """Those of the source's tensors that are copied bit for bit."""
    replaced = set()
    for index in range(config.num_layers):
        for linear, scheme in planned(recipe, config, index):
            if scheme.quantizes:
                replaced.add(f"{linear.name}.weight")
    return {
        name: info
        for name, info in infos.items()
        if name not in replaced and not _fused(config, name)
    }


def _fused(config: ModelConfig, name: str) -> bool:
    """Whether `name` is a routed expert's tensor, fused or not: those are written anew."""
    return layer_of(config, name) is not None and ".feed_forward.experts." in name


def verify_files(folder: Path, digests: Mapping[str, str]) -> None:
    """Raises UserError when a file's SHA-256 is not the recorded one."""
    for name, digest in digests.items():
        if sha256(folder / name) != digest:
            raise damaged(name, "changed after it was written", folder)


def _check_names(written: Checkpoint, expected: set[str]) -> None:
    missing = sorted(expected - set(written.names()))
    unexpected = sorted(set(written.names()) - expected)
    if missing:
        raise damaged(missing[0], f"and {len(missing) - 1} more are missing", written.folder)
    if unexpected:
        raise damaged(
            unexpected[0], f"and {len(unexpected) - 1} more are unexpected", written.folder
        )


def damaged(name: str, what: str, folder: Path) -> UserError:
    return UserError(f"{folder}: {name} {what}; the disk may be bad: delete the folder and repeat")
