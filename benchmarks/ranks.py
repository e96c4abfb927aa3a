"""How much faster several processes are than one, each with one thread.

    python -m benchmarks.ranks SOURCE FOLDER [--ranks 1,2] [any option of `quantize`]

Quantizes SOURCE into FOLDER/1, FOLDER/2, ... by torchrun, and prints a Markdown table of wall
times, start and reading of the text included, and of the time that all processors spent, after a
check that all have written the same bytes. SOURCE is best made by benchmarks/make_giant.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import click


def command(ranks: int) -> list[str]:
    """What starts so many processes of `llama4q`."""
    alone = [sys.executable, "-c", "import cli; cli.main()"]
    if ranks == 1:
        return alone
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    return [*torchrun, f"--nproc-per-node={ranks}", *alone]


def seconds(
    ranks: int, source: Path, folder: Path, options: tuple[str, ...]
) -> tuple[float, float]:
    """Wall time of one run, and time of processors."""
    began, before = time.perf_counter(), os.times()
    subprocess.run(
        [*command(ranks), "quantize", str(source), str(folder), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    after = os.times()
    spent = [now - then for now, then in zip(after[2:4], before[2:4], strict=True)]
    return time.perf_counter() - began, sum(spent)


def written(folder: Path) -> dict[str, str]:
    """The SHA-256 of each shard."""
    files: dict[str, str] = json.loads((folder / "report.json").read_bytes())["files"]
    return files


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--ranks", default="1,2", show_default=True)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(source: Path, folder: Path, ranks: str, options: tuple[str, ...]) -> None:
    counts = [int(count) for count in ranks.split(",")]
    folder.mkdir(parents=True, exist_ok=True)
    taken = {count: seconds(count, source, folder / f"{count}", options) for count in counts}
    first = counts[0]
    for count in counts[1:]:
        if written(folder / f"{count}") != written(folder / f"{first}"):
            raise SystemExit(f"{count} ranks have written other bytes than {first}")
    click.echo(f"| ranks | seconds | times as fast as {first} | processors |\n|---|---|---|---|")
    for count, (wall, spent) in taken.items():
        click.echo(f"| {count} | {wall:.1f} | {taken[first][0] / wall:.2f} | {spent:.1f} |")


if __name__ == "__main__":
    main()
