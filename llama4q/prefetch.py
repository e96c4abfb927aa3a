"""Reading ahead: the next item is loaded by a thread while one is in use.

Knows nothing of what is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def prefetched(load: Callable[[int], Item], indices: Sequence[int]) -> Iterator[Item]:
    """`load(index)` for each index in order, the next one being read while one is in use."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as pool:
        coming = pool.submit(load, indices[0]) if indices else None
        for position in range(len(indices)):
            assert coming is not None
            item = coming.result()
            more = position + 1 < len(indices)
            coming = pool.submit(load, indices[position + 1]) if more else None
            yield item
            del item  # the caller's reference is the last one: two in memory, not three
