"""Writes one small checkpoint on disks of every size that is too small, then on a larger one.

`python -m tests.full_disk FOLDER PAGES` must be root of a mount namespace of its own: it mounts a
memory disk on FOLDER, of 1, 2, 3 ... PAGES pages. It prints what each attempt said as JSON, for
tests/test_writer.py to judge.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from llama4q.errors import UserError
from llama4q.manifest import MANIFEST
from llama4q.writer import CheckpointWriter

PAGE = 4096
UNITS = {"first": 3, "second": 1, "third": 2}  # pages of each unit's one tensor


def mount(folder: Path, pages: int, *, again: bool = False) -> None:
    option = f"size={pages * PAGE}{',remount' if again else ''}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(folder)], check=True)


def write(folder: Path) -> list[str]:
    """Write the checkpoint, or what is missing of it; the units that had to be written."""
    solved = []
    with CheckpointWriter(folder, {"key": 1}) as writer:
        if not writer.finishing(UNITS):
            for unit, pages in UNITS.items():
                if writer.done(unit) is None:
                    tensor = torch.full((pages * PAGE // 4,), pages, dtype=torch.float32)
                    writer.write(unit, [(f"{unit}.weight", tensor)], {"note": unit})
                    solved.append(unit)
        written, digests = writer.assemble(UNITS)
        side_files = {"config.json": b"{}" * 50, "report.json": b"[]" * PAGE}
        writer.publish(written, digests, side_files)
    return solved


def attempt(folder: Path, pages: int) -> dict[str, object]:
    """One disk too small, the same one grown, and what then lies there."""
    mount(folder, pages)
    try:
        said, finished = "", False
        out = folder / "out"
        try:
            write(out)
        except UserError as error:
            said, finished = str(error), (out / MANIFEST).exists()
        if said:
            mount(folder, 1000, again=True)
            solved = write(out)
        else:
            solved = []
        files = {path.name: path.read_bytes().hex() for path in out.iterdir()}
        return {"said": said, "finished": finished, "solved": solved, "files": files}
    finally:
        subprocess.run(["umount", str(folder)], check=True)


if __name__ == "__main__":
    disk, most = Path(sys.argv[1]), int(sys.argv[2])
    print(json.dumps([attempt(disk, pages) for pages in range(1, most + 1)]))
