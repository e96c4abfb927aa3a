"""Several ranks by torch.distributed, over gloo.

Everything travels between the hosts' memories, and arrives on the kind of device that it came from.
A rank may wait for days while another one solves; one that dies closes its connections, which the
others notice at once. Knows nothing of what is sent.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from .errors import UserError
from .ranks import Ranks, Value

MEETING = timedelta(minutes=10)  # until all ranks are there
WORKING = timedelta(days=30)  # in which one rank may wait for another


class Group(Ranks):
    """This process among several."""

    def __init__(self, neighbours: int) -> None:
        """Raises UserError when the others do not come."""
        self.neighbours = neighbours
        try:
            store, self.number, self.count = next(rendezvous("env://", timeout=MEETING))
            distributed.init_process_group(
                "gloo", store=store, rank=self.number, world_size=self.count, timeout=WORKING
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"the other ranks do not come ({_first_line(error)}); start them all by torchrun, "
                f"where each can reach the first one"
            ) from None

    def leave(self) -> None:
        self.everyone(None)
        distributed.destroy_process_group()

    def from_first(self, make: Callable[[], Value]) -> Value:
        if not self.first:
            found = _arrived(_broadcast)
            if not found:
                raise SystemExit(1)
            value: Value = found[0]
            return value
        try:
            value = make()
        except UserError:
            _send((), _broadcast)
            raise
        _send((value,), _broadcast)
        return value

    def everyone(self, value: Value) -> list[Value]:
        found: list[Any] = [None] * self.count
        _talk(distributed.all_gather_object, found, value)
        return found

    def to_first(self, values: Iterable[Value]) -> Iterator[Value]:
        if self.first:
            return self._collected(values)
        made = list(values)
        for value in (len(made), *made):
            _send(value, lambda tensor: _talk(distributed.send, tensor, 0))
        return iter(())

    def _collected(self, values: Iterable[Value]) -> Iterator[Value]:
        yield from values
        for rank in range(1, self.count):

            def receive(tensor: torch.Tensor, rank: int = rank) -> None:
                _talk(distributed.recv, tensor, rank)

            for _ in range(_arrived(receive)):
                yield _arrived(receive)

    def exchange(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        sent = torch.tensor([len(part) for part in parts])
        arriving = torch.empty_like(sent)
        _talk(distributed.all_to_all_single, arriving, sent)
        given = torch.cat(list(parts))
        rows = given.cpu()
        found = torch.empty(int(arriving.sum()), *rows.shape[1:], dtype=rows.dtype)
        row_bytes = rows.itemsize * rows.shape[1:].numel()
        sizes = [(counts * row_bytes).tolist() for counts in (arriving, sent)]
        _talk(distributed.all_to_all_single, _raw(found), _raw(rows), *sizes)
        return list(found.to(given.device).split(arriving.tolist()))


def _broadcast(tensor: torch.Tensor) -> None:
    """From the first rank to all."""
    _talk(distributed.broadcast, tensor, 0)


def _send(value: Any, send: Callable[[torch.Tensor], object]) -> None:
    """The size of a value without its tensors, that value, and each tensor by itself."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    rest = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
    for tensor in (torch.tensor(len(rest)), rest, *pickler.tensors):
        if tensor.numel():
            send(_raw(tensor))


def _arrived(receive: Callable[[torch.Tensor], object]) -> Any:
    """The value at the other end of `_send`."""
    size = torch.tensor(0)
    receive(_raw(size))
    rest = torch.empty(int(size), dtype=torch.uint8)
    receive(rest)
    unpickler = _Unpickler(io.BytesIO(rest.numpy().tobytes()))
    value = unpickler.load()
    for tensor in unpickler.tensors:
        if tensor.numel():
            raw = _raw(tensor)
            receive(raw)
            if tensor.device.type != "cpu":
                tensor.copy_(raw.view(tensor.dtype).view(tensor.shape))
    return value


class _Pickler(pickle.Pickler):
    """Leaves tensors out, for which a pickle would need room several times."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[torch.Tensor] = []

    def persistent_id(self, value: Any) -> tuple[torch.Size, torch.dtype, str] | None:
        if not isinstance(value, torch.Tensor):
            return None
        self.tensors.append(value)
        return value.shape, value.dtype, value.device.type


class _Unpickler(pickle.Unpickler):
    """Makes room for the tensors that were left out, on a device as they were."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[torch.Tensor] = []

    def persistent_load(self, described: tuple[torch.Size, torch.dtype, str]) -> torch.Tensor:
        shape, dtype, device = described
        self.tensors.append(torch.empty(shape, dtype=dtype, device=device))
        return self.tensors[-1]


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes on the host, whatever it holds; in place where they lie there beside each other."""
    return tensor.cpu().contiguous().view(-1).view(torch.uint8)


def _talk(say: Callable[..., object], *what: Any) -> None:
    """Turns a lost connection into one line."""
    try:
        say(*what)
    except RuntimeError as error:
        raise UserError(
            f"another rank has stopped and says why if it could ({_first_line(error)}); what is "
            f"written stands: repeat the command, with any number of ranks"
        ) from None


def _first_line(error: Exception) -> str:
    """Of gloo's message the first sentence, without the place in its source."""
    line = str(error).splitlines()[0]
    return (line.partition("] ")[2] or line).partition(". ")[0]
