"""What several commands need: remarks, JSON, what made a report, what memory there is."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llama4q import __version__
from llama4q.errors import UserError
from llama4q.ranks import Ranks

if TYPE_CHECKING:
    import torch

    from llama4q.config import ModelConfig
    from llama4q.machine import Budget
    from llama4q.source import Source

GPU = "h100-80gb"


def tell(line: str) -> None:
    click.echo(line, err=True)


def as_text(value: Any) -> str:
    return json.dumps(value, indent=2)


def write_text(path: Path, text: str, mode: str = "w") -> None:
    try:
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); name another file"
        ) from None


def nbytes(source: Source) -> int:
    """Bytes of all tensors of a checkpoint."""
    return source.checkpoint().nbytes


def provenance(source: Source, config: ModelConfig) -> dict[str, Any]:
    """What made a report, and when."""
    import datetime
    from importlib.metadata import PackageNotFoundError, version

    from evals.gate import SCHEMA
    from llama4q.inspect import component_bytes
    from llama4q.licence import described

    versions = {}
    for name in (
        "torch", "transformers", "compressed-tensors", "safetensors", "datasets", "bitsandbytes",
    ):  # fmt: skip
        with contextlib.suppress(PackageNotFoundError):  # bitsandbytes is an extra
            versions[name] = version(name)
    return {
        "schema": SCHEMA,
        "llama4q": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["llama4q", *sys.argv[1:]]),
        "source": {
            "name": source.name,
            "revision": source.revision,
            "bytes": nbytes(source),
            "components": component_bytes(config, source.checkpoint().infos),
            "metadata": described(source.folder),
        },
        "versions": versions,
    }


def budget_for(memory: str | None, device: torch.device, ranks: Ranks) -> Budget:
    """What this process may use: as named, else nine tenths of what is free. The host's memory is
    shared evenly by the processes on it."""
    from llama4q.machine import Budget, device_memory, free_memory, parse_memory

    named = parse_memory(memory) if memory else Budget(free_memory() * 9 // 10)
    host = named.host // ranks.neighbours
    if device.type == "cpu":
        if named.device is not None:
            raise UserError(
                f"memory {memory!r}: gives some of a GPU to a run on the CPU; name the host's alone"
            )
        return Budget(host)
    return Budget(host, named.device or device_memory(device) * 9 // 10)
