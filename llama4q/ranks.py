"""Processes that do one run together, each with a number: its rank.

torchrun starts them and tells each one its rank; a process that was started without it is the only
rank, and all that is asked of the others here is answered by itself. Knows nothing of what is sent
nor of how it travels (group.py).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")


class Ranks:
    """One process alone."""

    number = 0
    count = 1
    neighbours = 1  # ranks on this machine, which share its memory; this one counts

    @property
    def neighbour(self) -> int:
        """Number of this process among the neighbours."""
        return self.number % self.neighbours

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.number == 0

    def leave(self) -> None:
        """When all is done: waits until it is so on every rank."""

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What the first rank makes, on every rank.

        A UserError is raised there; the others exit with code 1 and without a word.
        """
        return make()

    def everyone(self, value: Value) -> list[Value]:
        """A value of each rank, in their order, on every rank."""
        return [value]

    def to_first(self, values: Iterable[Value]) -> Iterator[Value]:
        """On the first rank the values of all, rank after rank; on the others none.

        The first rank's own ones are made when they are asked for, the others' before they travel.
        """
        return iter(values)

    def exchange(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """`parts[k]`, rows `[n, ...]`, go to rank k; returns those that each rank sent here."""
        return list(parts)


ALONE = Ranks()


def join() -> Ranks:
    """This process among those that torchrun has started with it.

    Raises UserError when the others do not come.
    """
    if _number("WORLD_SIZE", 1) == 1:
        return ALONE
    from .group import Group

    return Group(_number("LOCAL_WORLD_SIZE", 1))


def speaker() -> str:
    """How a line of this process begins: "rank 3: " beside others, nothing of the first rank."""
    number = _number("RANK", 0)
    return f"rank {number}: " if number and _number("WORLD_SIZE", 1) > 1 else ""


def leave_at_once(end: SystemExit) -> None:
    """Ends the process as `end` says if it is one of several, else returns.

    torch.distributed keeps gloo's threads beyond `destroy_process_group`. One that lets go of a
    tensor while Python is taken apart aborts the process, whose run torchrun then calls failed.
    """
    if _number("WORLD_SIZE", 1) == 1:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(end.code if isinstance(end.code, int) else end.code is not None)


def _number(variable: str, default: int) -> int:
    return int(os.environ.get(variable, default))
