"""A run that is killed twice and once meets a full disk, against one that nobody disturbs.

    python -m benchmarks.survive SOURCE FOLDER [--reference FINISHED] [any option of `quantize`]

Works in FOLDER. Must be root: the disturbed run writes to an ext4 image that is loop-mounted there,
and a file that fills it up is what makes it full. The run is killed with SIGKILL when a quarter and
when three quarters of its parts are written, the disk fills up at half of them; each time the same
command is repeated. Prints what each attempt said and took, its peak of resident memory seen from
outside, and whether the result is that of the undisturbed run, byte for byte; exit code 1 if not.
SOURCE is best made by benchmarks/make_giant.py.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from calibrate.layer import part_count
from calibrate.plan import duration
from llama4q.checkpoint import Checkpoint, sha256
from llama4q.config import read_config
from llama4q.export import REPORTS
from llama4q.manifest import MANIFEST
from llama4q.writer import WORK

RUN = "import cli; cli.main()"
POLL = 0.2  # seconds
BLOCK = 4096  # bytes, of ext4
SPARE = 2 * 10**9  # bytes of the image beyond those of the source


@dataclass(frozen=True)
class Attempt:
    """One start of the command, to its end."""

    ended: str  # "killed", or its exit code
    said: str  # its last line
    seconds: float
    peak: int  # bytes of resident memory


def attempt(command: list[str], log: Path, due: Callable[[], bool] | None) -> Attempt:
    """Run it to its end, or kill it when it is `due`."""
    began, peak = time.monotonic(), 0
    with log.open("ab") as file:
        process = subprocess.Popen(command, stderr=file, stdout=file)
        killed = False
        try:
            while process.poll() is None:
                peak = max(peak, resident_peak(process.pid))
                if due is not None and due() and not killed:
                    process.kill()
                    killed = True
                time.sleep(POLL)
        finally:
            process.kill()
    lines = log.read_text(errors="replace").strip().splitlines()
    said = "" if killed else next((line for line in reversed(lines) if line.strip()), "")
    ended = "killed" if killed else f"exit {process.returncode}"
    return Attempt(ended, said, time.monotonic() - began, peak)


def resident_peak(pid: int) -> int:
    """As the kernel counts it; 0 when the process is gone."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return 0


@contextlib.contextmanager
def disk(image: Path, folder: Path, nbytes: int) -> Iterator[None]:
    """A disk of its own in a file, mounted on `folder`."""
    folder.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(nbytes)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        image.unlink()


def fill(folder: Path) -> Path:
    """A file that takes what is left of a disk, but for less than a block of its own records."""
    filler = folder / "filler"
    with filler.open("wb") as file:
        end, size = 0, shutil.disk_usage(folder).free
        while size >= BLOCK:
            try:
                os.posix_fallocate(file.fileno(), end, size)
                end += size
            except OSError:
                size //= 2
    return filler


def digests(folder: Path) -> dict[str, str]:
    """Of all files of a checkpoint."""
    return {path.name: sha256(path) for path in sorted(folder.iterdir())}


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--reference",
    type=click.Path(exists=True, path_type=Path),
    help="An undisturbed run's result, if there is one.",
)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(source: Path, folder: Path, reference: Path | None, options: tuple[str, ...]) -> None:
    """Quantize, be disturbed, compare."""
    folder.mkdir(parents=True, exist_ok=True)
    config = read_config(source)
    parts = sum(part_count(config, index) for index in range(config.num_layers))
    attempts: list[tuple[str, Attempt]] = []

    def start(name: str, destination: Path, due: Callable[[], bool] | None = None) -> Attempt:
        command = [sys.executable, "-c", RUN, "quantize", str(source), str(destination), *options]
        found = attempt(command, folder / "log", due)
        attempts.append((name, found))
        print(
            f"{name:24}{found.ended:10}{duration(found.seconds):>14}"
            f"{found.peak / 1e9:8.2f} GB  {found.said}",
            flush=True,
        )
        return found

    if reference is None:
        reference = folder / "undisturbed"
        start("undisturbed", reference)
    mounted = folder / "disk"
    with disk(folder / "image", mounted, Checkpoint(source).nbytes + SPARE):
        destination = mounted / "disturbed"

        def written() -> int:
            return len(list((destination / WORK).glob("layer-?????.??.json")))

        start("killed", destination, lambda: written() >= parts / 4)
        fillers: list[Path] = []

        def full() -> bool:
            """Fills the disk; the run is not killed."""
            if written() >= parts / 2 and not fillers:
                fillers.append(fill(mounted))
            return False

        start("disk full", destination, full)
        for filler in fillers:
            filler.unlink()
        start("killed", destination, lambda: written() >= 3 * parts / 4)
        start("to the end", destination)
        expected, found = digests(reference), digests(destination)
    different = [
        name
        for name in sorted({*expected, *found})
        if name not in (*REPORTS, MANIFEST)  # which say how long it took
        and expected.get(name) != found.get(name)
    ]
    print(f"{len(found)} files, different: {', '.join(different) or 'none'}")
    ends = [one.ended for _, one in attempts][-4:]
    if different or ends != ["killed", "exit 1", "killed", "exit 0"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
