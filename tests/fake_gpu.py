"""A GPU that is none: tensors that say "cuda" and hold one on the CPU, for whole runs without one.

An operation runs on what its tensors hold, so its result is the CPU's. What a real GPU refuses is
refused: tensors of both places in one operation, unless it moves values or takes a single scalar;
`numpy`, and here `data_ptr`, too. Knows nothing of llama4q.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
FREE, TOTAL = 70 * 2**30, 80 * 2**30  # what mem_get_info says
aten = torch.ops.aten

# These take tensors of both places: CUDA's own versions copy, or look up by numbers of the host's.
MOVES = (aten.copy_, aten._to_copy, aten.to, aten.where)
LOOKS_UP = (aten.index, aten.index_put_, aten.index_put)


class OnGpu(torch.Tensor):
    """A tensor on the GPU; `held` has its values."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls: type[OnGpu], held: torch.Tensor) -> OnGpu:
        made: OnGpu = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, layout=held.layout, device=GPU,
        )  # fmt: skip
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    # These ask a build without CUDA for CUDA's device, and so do not come to the dispatcher.

    def __float__(self) -> float:
        return float(self.held)

    def __int__(self) -> int:
        return int(self.held)

    def tolist(self) -> Any:
        return self.held.tolist()

    def contiguous(self) -> OnGpu:  # type: ignore[override]
        return self if self.held.is_contiguous() else OnGpu(self.held.contiguous())

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({self.held})"

    def __getitem__(self, index: Any) -> OnGpu:
        return OnGpu(self.held[_held(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, torch.Tensor) and not isinstance(value, OnGpu) and value.dim():
            raise RuntimeError("a tensor on the CPU cannot be put among those of the GPU")
        self.held[_held(index)] = _held(value)

    def data_ptr(self) -> int:
        raise RuntimeError("data_ptr of a tensor on the GPU")

    def record_stream(self, stream: object) -> None:
        pass


def _held(value: Any) -> Any:
    return _changed(value, OnGpu, lambda one: one.held)


def _changed(value: Any, kinds: Any, change: Callable[[Any], Any]) -> Any:
    """With all of some kinds changed, in containers, too. PyTorch's own pytree takes far longer."""
    if isinstance(value, kinds):
        return change(value)
    if isinstance(value, dict):
        return {key: _changed(one, kinds, change) for key, one in value.items()}
    if isinstance(value, list | tuple):
        parts = [_changed(one, kinds, change) for one in value]
        return type(value)(parts) if type(value) in (list, tuple) else type(value)(*parts)
    return value


class FakeGpu(TorchDispatchMode):
    """Inside, tensors can be made on the GPU and moved there; holds for one thread."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    given: list[torch.Tensor] = []
    asked: list[torch.device] = []

    def on_cpu(one: Any) -> Any:
        if isinstance(one, torch.device):
            asked.append(one)
            return CPU
        given.append(one)
        return one.held if isinstance(one, OnGpu) else one

    held_args, kwargs = _changed((args, kwargs), (torch.Tensor, torch.device), on_cpu)
    _check(func, args, given)
    known = {id(one.held): one for one in given if isinstance(one, OnGpu)}
    goes_there = asked[0].type == "cuda" if asked else bool(known)
    if kwargs.get("pin_memory"):
        kwargs["pin_memory"] = False
    found = _on_cpu(func)(*held_args, **kwargs)
    given_ids = {id(one) for one in given}

    def placed(result: torch.Tensor) -> torch.Tensor:
        if id(result) in known and goes_there:
            return known[id(result)]
        if id(result) in known or (asked and goes_there and id(result) in given_ids):
            result = result.clone()  # where it was already; on a GPU a move is a copy
        elif id(result) in given_ids:
            return result  # written in place
        return OnGpu(result) if goes_there else result

    return _changed(found, torch.Tensor, placed)


def _on_cpu(func: Any) -> Callable[..., Any]:
    """Only CUDA has the product of BF16 that sums in F32."""
    if func is aten.mm.dtype:
        return lambda left, right, _: left.float() @ right.float()
    return func  # type: ignore[no-any-return]


def _check(func: Any, args: Sequence[Any], given: Sequence[torch.Tensor]) -> None:
    packet = func.overloadpacket
    if packet in LOOKS_UP:
        numbers = [one for one in args[1] if one is not None]
        if not isinstance(args[0], OnGpu) and any(isinstance(one, OnGpu) for one in numbers):
            raise RuntimeError("indices should be either on cpu or on the same device")
        given = [args[0], *(one for one in args[2:] if isinstance(one, torch.Tensor))]
    on_host = [one for one in given if not isinstance(one, OnGpu)]
    if packet in MOVES or len(on_host) in (0, len(given)):
        return
    if len(on_host) > 1 or on_host[0].dim():
        raise RuntimeError(
            f"{func}: expected all tensors to be on the same device, found {GPU} and "
            f"{[tuple(one.shape) for one in on_host]} on the CPU"
        )


@contextlib.contextmanager
def fake_gpu() -> Iterator[torch.device]:
    """Inside, this machine has one GPU, for all threads that begin there, too."""
    begin = threading.Thread.run

    def run(thread: threading.Thread) -> None:
        with FakeGpu():
            begin(thread)

    nothing = SimpleNamespace(synchronize=lambda: None)
    patched: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: "Fake GPU",
        "mem_get_info": lambda device=None: (FREE, TOTAL),
        "synchronize": lambda device=None: None,
        "Stream": lambda device=None: nothing,
        "default_stream": lambda device=None: nothing,
        "stream": lambda stream: contextlib.nullcontext(),
        "_lazy_init": lambda: None,
    }
    # torch.tensor makes its tensor on the CPU and moves it, which the dispatcher sees
    torch._C._set_only_lift_cpu_tensors(True)
    with (
        mock.patch.multiple(torch.cuda, **patched),
        mock.patch.object(threading.Thread, "run", run),
        FakeGpu(),
    ):
        yield GPU
    torch._C._set_only_lift_cpu_tensors(False)
