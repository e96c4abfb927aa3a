"""Whether a chosen mix of precisions is the better one, and mixes are ranked as they turn out.

    python -m benchmarks.mixes FOLDER [--model pocket] [any option of `quantize`]

Quantizes the model with the mixes that `quantize --fit` chooses for three budgets between INT4 and
FP8, with recipes and mixes that one might write by hand, and with 20 random ones. Prints the
expected and the measured divergence of each, for each budget whether any other mix that is no
larger loses less, and how the order that was expected goes with the measured one (Spearman). What
was measured stays in FOLDER, so that a run that was stopped goes on.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import click
from scipy.stats import spearmanr

from calibrate.budget import Choice, Goal, choose
from commands.goal import no_schemes
from commands.jobs import drawn_tokens
from commands.passes import Original, measured
from llama4q.config import ModelConfig, read_config
from llama4q.device import HOST
from llama4q.gpus import Device
from llama4q.hub import resolve
from llama4q.machine import UNBOUNDED
from llama4q.memory import RESERVED_BYTES, Serving
from llama4q.predict import Place
from llama4q.recipe import Calibration
from llama4q.tokens import load_tokenizer
from llama4q.weights import Component

RUN = "import cli; cli.main()"
BUDGETS = (0.2, 0.45, 0.7)  # of the way from the smallest mix to FP8
RANDOM = 20
NAMES = ("int4", "int4-g64", "int4-g32", "fp8", "int8", "bf16")
TEXT = ("--samples", "32", "--length", "1024", "--prompts", "1")


@dataclass(frozen=True)
class Outcome:
    """What a mix was expected to lose, and what it lost; nats a token."""

    name: str
    nbytes: int
    expected: float
    measured: float
    error: float  # standard error of what was measured


def by_hand(config: ModelConfig, places: list[Place]) -> Iterator[tuple[str, dict[Place, str]]]:
    """Mixes that people write: one scheme, better ends, better shared parts, every other layer."""
    last = config.num_layers - 1
    for name in NAMES[:-1]:
        yield f"all {name}", dict.fromkeys(places, name)
    for better in ("fp8", "int8"):
        for words, chosen in (
            ("but for INT4 experts", [p for p in places if p[1] is not Component.EXPERTS]),
            ("in two first and last layers", [p for p in places if min(p[0], last - p[0]) < 2]),
            ("in every other layer", [p for p in places if p[0] % 2]),
            ("in the first half", [p for p in places if p[0] <= last // 2]),
        ):
            yield f"{better} {words}", dict.fromkeys(places, "int4") | dict.fromkeys(chosen, better)


def at_random(places: list[Place]) -> Iterator[tuple[str, Mapping[Place, str]]]:
    """Half of them any scheme anywhere, half mostly INT4."""
    draw = random.Random(1)
    for number in range(RANDOM):
        kept = draw.random() if number % 2 else 0.0
        yield (
            f"random {number}",
            {place: "int4" if draw.random() < kept else draw.choice(NAMES) for place in places},
        )


def budgets(goal: Goal, choice: Choice) -> Iterator[tuple[str, Choice]]:
    """What is chosen when so many bytes are there."""
    low = choice.menu.rest_bytes + sum(
        min(option.nbytes for option in part.options) for part in choice.menu.parts
    )
    [high] = [point["bytes"] for point in choice.to_json()["recipes"] if point["name"] == "fp8"]
    for share in BUDGETS:
        room = int(low + share * (high - low))
        spare = goal.plan(goal.infos).weight_room - room
        total = goal.device.total_bytes - int(spare / goal.serving.utilization)
        device = Device("budget", total)
        fitting = Goal(goal.config, goal.infos, device, goal.serving, goal.recipe)
        yield f"chosen for {room / 1e6:.2f} MB", choose(fitting, choice.sensitivity)


def expected(choice: Choice, mix: Mapping[Place, str]) -> tuple[int, float]:
    """Bytes and divergence of any mix."""
    options = {
        (part.layer, part.component): {one.scheme: one for one in part.options}
        for part in choice.menu.parts
    }
    found = [options[place][name] for place, name in mix.items()]
    nbytes = choice.menu.rest_bytes + sum(one.nbytes for one in found)
    return nbytes, choice.sensitivity.divergence(sum(one.error for one in found))


def lost(folder: Path, model: str, name: str, mix: Mapping[Place, str], options: list[str]) -> Path:
    """Quantizes with a mix, unless that was done before; the report."""
    report = folder / f"{name.replace(' ', '-')}.json"
    if report.exists():
        return report
    layers = sorted({layer for layer, _ in mix})
    lines = [f'name = "{name}"', "[schemes]"]
    for layer in layers:
        lines += ["[[override]]", f"layers = [{layer}]"]
        lines += [f'{part.value} = "{mix[at, part]}"' for at, part in mix if at == layer]
    recipe, result = folder / "mix.toml", folder / "result"
    recipe.write_text("\n".join(lines) + "\n")
    shutil.rmtree(result, ignore_errors=True)
    command = [sys.executable, "-c", RUN, "quantize", model, str(result), "-r", str(recipe)]
    with (folder / "log").open("ab") as log:
        subprocess.run([*command, *TEXT, *options], check=True, stderr=log, stdout=log)
    shutil.move(result / "report.json", report)
    shutil.rmtree(result)
    return report


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model", default="pocket", show_default=True)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(folder: Path, model: str, options: tuple[str, ...]) -> None:
    """Quantize mix after mix, and print the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    source = resolve(model, print)
    config = read_config(source.folder)
    infos = source.checkpoint().infos
    device = Device("all", RESERVED_BYTES * 100)
    goal = Goal(config, infos, device, Serving(1024), no_schemes())
    drawn = drawn_tokens(Calibration(samples=32, length=1024), load_tokenizer(source.folder))
    read = Original(source, config, folder / "work", "bfloat16", HOST, UNBOUNDED)
    sensitivity = measured(read, goal, drawn.tokens[0])
    choice = choose(goal, sensitivity)

    mixes: dict[str, Mapping[Place, str]] = {}
    for name, found in budgets(goal, choice):
        pairs = zip(found.menu.parts, found.mix.options, strict=True)
        mixes[name] = {(part.layer, part.component): option.scheme for part, option in pairs}
    mixes.update(by_hand(config, goal.places()))
    mixes.update(at_random(goal.places()))

    outcomes = []
    print("| mix | MB | expected KL | measured KL | standard error |\n|---|---|---|---|---|")
    for name, mix in mixes.items():
        report = json.loads(lost(folder, model, name, mix, list(options)).read_text())
        found = report["evidence"]["likelihood"]
        nbytes, divergence = expected(choice, mix)
        one = Outcome(name, nbytes, divergence, found["kl_mean"], found["kl_standard_error"])
        outcomes.append(one)
        print(
            f"| {one.name} | {one.nbytes / 1e6:.2f} | {one.expected:.5f} | {one.measured:.5f} "
            f"| {one.error:.5f} |",
            flush=True,
        )
    verdicts(outcomes)


def verdicts(outcomes: list[Outcome]) -> None:
    """Whether the chosen ones are the better ones, and the order."""
    others = [one for one in outcomes if not one.name.startswith("chosen")]
    for chosen in (one for one in outcomes if one.name.startswith("chosen")):
        smaller = [one for one in others if one.nbytes <= chosen.nbytes]
        best = min(smaller, key=lambda one: one.measured)
        larger = [one for one in others if one.nbytes > chosen.nbytes]
        beaten = [one for one in larger if one.measured > chosen.measured]
        print(
            f"{chosen.name}: {chosen.measured:.5f}; the best of {len(smaller)} no larger ones is "
            f"{best.name} with {best.measured:.5f}; {len(beaten)} of {len(larger)} larger ones "
            f"lose more"
        )
    drawn = [one for one in others if one.name.startswith("random")]
    order = spearmanr([one.expected for one in drawn], [one.measured for one in drawn])
    print(f"Spearman over {len(drawn)} random mixes: {order.statistic:.3f}")


if __name__ == "__main__":
    main()
