"""Make the environments in which the workers of the peers run.

Every peer pins its own transformers and compressed-tensors, so each gets an environment of its own,
with pip and from whichever index pip is set up for. A finished environment is left as it is; one
that was cut off is made again. What a worker does with its peer is not known here.

All of them get the same torch, and any build of it will do; the CPU build saves several GB. Where
pip's own index does not have it, name one that does: `--pip-option=--extra-index-url=URL`.
"""

import argparse
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(".peers")
TORCH = "torch==2.13.0"
SHARED = ("numpy", "safetensors")  # what common.py imports, beside torch
FINISHED = "finished.txt"  # the pinned versions, written into an environment at the end


@dataclass(frozen=True)
class Peer:
    requirements: tuple[str, ...]  # pip's; torch is pinned for all of them at once
    statement: str  # proves that the environment can import what its worker needs
    alone: tuple[str, ...] = ()  # installed after those, without what they depend on


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of {', '.join(PEERS)}; all")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: %(default)s")
    parser.add_argument("--pip-option", action="append", default=[], help="passed on to pip")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.peers if name not in PEERS]:
        parser.error(f"unknown peer {unknown[0]!r}, choose from {', '.join(PEERS)}")
    try:
        for name in arguments.peers or PEERS:
            make_peer(arguments.folder / name, PEERS[name], arguments.pip_option)
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(map(str, error.cmd))} failed with exit code {error.returncode}")


def make_peer(environment: Path, peer: Peer, options: list[str]) -> None:
    pins = "\n".join((TORCH, *peer.requirements, *peer.alone))
    if is_finished(environment, pins):
        return
    make(environment)
    # First on its own: a resolver that meets the peer's open range takes the newest, CUDA and all.
    pip(environment, "install", *options, TORCH)
    pip(environment, "install", *options, TORCH, *SHARED, *peer.requirements)
    if peer.alone:
        pip(environment, "install", *options, "--no-deps", *peer.alone)
    finish(environment, pins, peer.statement)


def make(environment: Path) -> None:
    print(f"making {environment}", flush=True)
    shutil.rmtree(environment, ignore_errors=True)
    venv.create(environment, with_pip=True)


def pip(environment: Path, *arguments: str) -> None:
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "--quiet", *arguments], check=True)


def is_finished(environment: Path, pins: str) -> bool:
    marker = environment / FINISHED
    finished = marker.exists() and marker.read_text() == pins
    if finished:
        print(f"{environment} is there already")
    return finished


def finish(environment: Path, pins: str, statement: str) -> None:
    """Prove that the environment can import what it is for, then mark it."""
    subprocess.run([environment / "bin" / "python", "-W", "ignore", "-c", statement], check=True)
    (environment / FINISHED).write_text(pins)


PEERS = {
    "llmcompressor": Peer(
        ("llmcompressor==0.14.0.1",),
        "from llmcompressor import oneshot",
    ),
    "bitsandbytes": Peer(
        ("bitsandbytes==0.50.2",),
        "import bitsandbytes.functional",
    ),
    "gptqmodel": Peer(
        # What GPTQModel 7.7.0 asks for, but torch 2.14.1; it runs on ours, so it comes without.
        (
            *("accelerate==1.15.0", "datasets==5.2.0", "defuser==0.0.28", "device-smi==0.5.7"),
            *("dill==0.4.1", "logbar==0.4.15", "ninja==1.13.2", "pillow==13.0.0"),
            *("protobuf==7.36.2", "pyarrow==26.0.1", "pypcre==0.6.4", "requests==2.34.2"),
            *("threadpoolctl==3.8.0", "tokenicer==0.0.14", "torchao==0.18.0"),
            "transformers==5.23.0",
        ),
        "from gptqmodel import GPTQModel",
        alone=("GPTQModel==7.7.0",),
    ),
    "autoround": Peer(
        ("auto-round==0.16.1", "transformers==5.23.0"), "from auto_round import AutoRound"
    ),
}


if __name__ == "__main__":
    main()
