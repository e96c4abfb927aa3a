"""Keys and values in a cache of E4M3: one scale a layer for each, which tensors hold them, and what
attention reads back. Knows nothing of models or files.

Source: vLLM's `--kv-cache-dtype fp8` with the checkpoint's scales; compressed-tensors'
`kv_cache_scheme`, strategy "tensor".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from .schemes import FLOAT8_MAX, positive, storable, to_float8

KEY, VALUE = "k_scale", "v_scale"
_ROUNDED = 464.0  # up to here the nearest of E4M3's numbers, were there more, is its largest, 448


@dataclass(frozen=True)
class Float8Cache:
    """A layer's scales; both are what one step of E4M3's 1 stands for."""

    key_scale: float
    value_scale: float

    def keys(self, keys: torch.Tensor) -> torch.Tensor:
        """As attention reads them back."""
        return _stored(keys, self.key_scale)

    def values(self, values: torch.Tensor) -> torch.Tensor:
        """As attention reads them back."""
        return _stored(values, self.value_scale)

    def cut(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[int, int]:
        """How many numbers of either are beyond the largest one, by more than rounding."""
        pairs = (keys, self.key_scale), (values, self.value_scale)
        first, second = (int((x.float().abs() > scale * _ROUNDED).sum()) for x, scale in pairs)
        return first, second

    def tensors(self, attention: str) -> Iterator[tuple[str, torch.Tensor]]:
        """What a checkpoint has of it, by name, F32 `[1]`."""
        yield f"{attention}.{KEY}", torch.tensor([self.key_scale])
        yield f"{attention}.{VALUE}", torch.tensor([self.value_scale])

    def to_json(self) -> dict[str, float]:
        return {"key": self.key_scale, "value": self.value_scale}


def read_cache(get: Callable[[str], torch.Tensor], attention: str) -> Float8Cache:
    """The scales of a layer's attention from its tensors."""
    key, value = (float(get(f"{attention}.{name}").float().max()) for name in (KEY, VALUE))
    return Float8Cache(key, value)


def covering(pairs: Iterable[tuple[float, float]]) -> Float8Cache:
    """The scales at which none of the keys and values saturates whose largest sizes are `pairs`.

    They have BF16's values, which every engine keeps.
    """
    largest = torch.tensor(list(pairs)).amax(dim=0)
    key, value = storable(positive(largest / FLOAT8_MAX)).tolist()
    return Float8Cache(key, value)


def _stored(rows: torch.Tensor, scale: float) -> torch.Tensor:
    return (to_float8(rows.float() / scale).float() * scale).to(rows.dtype)
