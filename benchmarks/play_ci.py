"""The CI example for real: docs/ci.md from its first command to builds that fail.

    python -m benchmarks.play_ci [--folder FOLDER]

In a new folder with an environment of its own: runs the commands of docs/ci.md, and after the
first ones and after each planted fault the `run:` steps of docs/workflows/accuracy.yml, as GitHub's
runner does. Packages besides llama4q are those of the Python that runs this. Exits with 1 when a
build ends otherwise than the page says.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
WORKFLOW = Path(".github/workflows/accuracy.yml")
BLAMED = r"layer 3: hidden_error jumps .*; layer 3, expert [124]: gain "  # both faults of the page


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--folder", type=Path, help="An empty one; kept.  [default: a temporary one]"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        sys.exit(0 if play(folder.resolve()) else 1)


def play(folder: Path) -> bool:
    """Whether every build ends as the page says."""
    set_up, *faults = re.findall(
        r"^```sh\n(.*?)^```", (ROOT / "docs/ci.md").read_text(), re.M | re.S
    )
    environment = prepared(folder)
    if run(set_up, folder, environment):
        return False
    ended = [build(folder, environment) == 0]
    for fault in faults:
        shutil.copytree(folder / "checkpoint", folder / "sound")
        run(fault, folder, environment)
        ended.append(build(folder, environment) == 1 and blamed(folder))
        shutil.rmtree(folder / "checkpoint")
        (folder / "sound").rename(folder / "checkpoint")
    print(f"\nbuilds that ended as the page says: {sum(ended)} of {len(ended)}", flush=True)
    return all(ended)


def prepared(folder: Path) -> dict[str, str]:
    """The clone that the page speaks of, and an environment without llama4q."""
    (folder / "llama4q").symlink_to(ROOT)
    python = folder / "environment"
    venv.create(python, symlinks=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(python)})
    (Path(packages) / "others.pth").write_text(sysconfig.get_path("purelib"))
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {
        "PATH": f"{python / 'bin'}:{os.environ['PATH']}",
        "GITHUB_STEP_SUMMARY": str(folder / "summary.md"),
        # the step installs llama4q itself; its dependencies are there
        "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_IGNORE_INSTALLED": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_QUIET": "1",
    }  # fmt: skip


def build(folder: Path, environment: dict[str, str]) -> int:
    """The exit code of the first step of the workflow that fails, else 0."""
    workflow = yaml.safe_load((folder / WORKFLOW).read_text())
    [job] = workflow["jobs"].values()
    for step in job["steps"]:
        if "run" in step:
            print(f"\n--- step: {step['name']}", flush=True)
            code = run(step["run"], folder, environment | workflow["env"])
            if code:
                print(f"--- the build fails with exit code {code}", flush=True)
                return code
    print("--- the build passes", flush=True)
    return 0


def run(script: str, folder: Path, environment: dict[str, str]) -> int:
    """As GitHub runs a step that names no shell."""
    print(script.strip(), flush=True)
    start = time.monotonic()
    code = subprocess.run(["bash", "-e", "-c", script], cwd=folder, env=environment).returncode
    print(f"({time.monotonic() - start:.0f} s)", flush=True)
    return code


def blamed(folder: Path) -> bool:
    """Whether the last verdict names the place of the fault, in the JUnit file."""
    return re.search(BLAMED, (folder / "accuracy/junit.xml").read_text()) is not None


if __name__ == "__main__":
    main()
