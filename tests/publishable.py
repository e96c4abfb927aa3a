"""Finished checkpoints as push takes them, named and shaped as Scout; their tensors are noise."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from llama4q.manifest import MANIFEST, manifest

from . import reports, tiny

BASE_MODEL = "meta-llama/Llama-4-Scout-17B-16E-Instruct"
NAME = "Llama-4-Scout-17B-16E-Instruct-int4"
# how the agreement begins, and the line that it asks for in 1.b.iii
AGREEMENT = """LLAMA 4 COMMUNITY LICENSE AGREEMENT

Llama 4 Version Effective Date: April 5, 2025
"""
NOTICE = (
    "Llama 4 is licensed under the Llama 4 Community License, Copyright © Meta Platforms, Inc. "
    "All Rights Reserved."
)
APACHE = "Apache License\nVersion 2.0, January 2004\n"
META = {
    "license": "other", "license_name": "llama4", "license_link": None,
    "language": ["en", "de"], "pipeline_tag": "image-text-to-text",
}  # fmt: skip
OTHER = {**META, "license": "apache-2.0", "license_name": None, "language": "en"}


def report(metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """Of Scout in INT4; `metadata` is what the source's card says."""
    found = reports.quantized(tasks=("niah_single_1", "vt"))
    found["source"]["metadata"] = metadata or META
    return found


def scout(folder: Path, seed: int = 0, shards: int = 3) -> Path:
    """Under the Llama 4 Community License, all files that it asks for in place."""
    return write(
        folder, report(), {"LICENSE": AGREEMENT, "USE_POLICY.md": "policy", "NOTICE": NOTICE},
        seed, shards,
    )  # fmt: skip


def other(folder: Path) -> Path:
    """The same under Apache-2.0."""
    found = report(OTHER)
    found["source"] |= {"name": "someone/small-llama4"}
    return write(folder, found, {"LICENSE": APACHE})


def write(
    folder: Path, made: dict[str, Any], texts: dict[str, str], seed: int = 0, shards: int = 3
) -> Path:
    """A folder with a report, these files, a manifest, and shards large enough for LFS."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    for at in range(shards):
        name = f"model-{at + 1:05d}-of-{shards:05d}.safetensors"
        (folder / name).write_bytes(chance.randbytes(60_000 + at))
    (folder / "model.safetensors.index.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps(tiny.config_json(tiny.SCOUT)))
    (folder / "report.json").write_text(json.dumps(made))
    for name, text in texts.items():
        (folder / name).write_text(text)
    seal(folder)
    return folder


def seal(folder: Path) -> None:
    """The manifest anew, after a change that is meant."""
    (folder / MANIFEST).unlink(missing_ok=True)
    (folder / MANIFEST).write_bytes(manifest(folder))
