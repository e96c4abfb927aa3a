"""Where the time of a run goes, phase by phase, and how much of the machine each phase gets.

    python -m benchmarks.layer SOURCE DESTINATION [--memory 16GB] [any option of `quantize`]

Runs `llama4q quantize` in this process and looks 20 times a second at what its main thread is
doing, so nothing in the product counts time for it. Amounts are those of the run's own plan, the
ceiling is what this machine reaches on one large product (or disk transfer) beforehand. Also prints
the peak of memory, the floor of the plan, and what the whole model would take: layers of the kinds
that were run, as often as Scout or Maverick has them. SOURCE is best made by benchmarks/make_giant.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from types import FrameType

import click

from calibrate.plan import Pace, duration, make_plan, measure_searches, pace
from calibrate.run import DTYPES, Report
from calibrate.work import Phase, Texts
from cli import main as llama4q
from llama4q.config import read_config
from llama4q.machine import Rates, measure_rates
from llama4q.recipe import recipe_from_json

EVERY = 0.05  # seconds between two looks

# The innermost function on this list says what the time is spent on: file and function; "" is any
# function of the file. What a phase computes is counted by the plan under the phases behind it.
PHASES: dict[str, tuple[tuple[tuple[str, str], ...], tuple[Phase, ...]]] = {
    "read: waiting for the disk": (
        (("llama4q/prefetch.py", ""), ("llama4q/checkpoint.py", ""), ("llama4q/weights.py", "")),
        (),
    ),
    "forward of both streams": (
        (("llama4q/model.py", ""), ("llama4q/stream.py", ""), ("calibrate/streams.py", "")),
        (Phase.ORIGINAL, Phase.SERVED),
    ),
    "rows of tokens: gather, keep": ((("llama4q/hidden.py", ""), ("calibrate/gather.py", "")), ()),
    "token weights": ((("calibrate/weighting.py", ""),), ()),
    "moments": ((("calibrate/target.py", "add"),), (Phase.MOMENTS,)),
    "shrinkage pools": ((("calibrate/layer.py", "_through"), ("calibrate/layer.py", "_others")),
                        (Phase.POOL,)),
    "shrinkage": ((("calibrate/hessian.py", ""),), ()),
    "factors": (
        (("calibrate/cholesky.py", "factor_upper"), ("calibrate/gptq.py", "factorize")),
        (Phase.FACTOR,),
    ),
    "correction": (
        (("calibrate/target.py", "corrected"), ("calibrate/target.py", "_share"),
         ("calibrate/cholesky.py", "divide")),
        (Phase.CORRECTION,),
    ),
    "scale search": ((("calibrate/gptq.py", "choose_scales"),), (Phase.SCALES,)),
    "code search": ((("calibrate/lookahead.py", ""),), (Phase.CODES,)),
    "GPTQ products": (
        (("calibrate/gptq.py", "solve"), ("calibrate/outputs.py", "solve_in_turn")),
        (Phase.PRODUCTS,),
    ),
    "judging": ((("calibrate/judge.py", ""), ("llama4q/schemes.py", "")), (Phase.JUDGE,)),
    "packing": ((("llama4q/packing.py", ""),), ()),
    "writing": ((("llama4q/writer.py", ""),), ()),
    "evaluation": (
        (("evals/evaluation.py", ""), ("evals/layers.py", ""), ("evals/likelihood.py", "")),
        (Phase.EVALUATION,),
    ),
    "verification": ((("llama4q/verify.py", ""),), ()),
    "calibration text, questions": (
        (("llama4q/text.py", ""), ("llama4q/tokens.py", ""), ("calibrate/data.py", ""),
         ("evals/questions.py", "")),
        (),
    ),
}  # fmt: skip
OUTER = ("evaluation", "verification", "shrinkage pools")  # counts whatever is called inside
OTHER = "the rest"
WHOLE = {"scout": {"MoE": 48}, "maverick": {"MoE": 24, "dense": 24}}
ROOT = Path(__file__).resolve().parent.parent


def phase_of(frame: FrameType | None) -> str:
    """What a thread is doing: the outermost of OUTER, else the innermost phase."""
    found = OTHER
    while frame is not None:
        code = frame.f_code
        for name, (places, _) in PHASES.items():
            if any(
                code.co_filename.endswith(file) and function in ("", code.co_name)
                for file, function in places
            ):
                if name in OUTER or found == OTHER:
                    found = name
                break
        frame = frame.f_back
    return found


class Looks:
    """Looks at the main thread while it is entered."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        main = threading.main_thread().ident
        before = time.perf_counter()
        while not self._over.wait(EVERY):
            now = time.perf_counter()
            self.seconds[phase_of(sys._current_frames().get(main or 0))] += now - before
            before = now

    def __enter__(self) -> Looks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def texts_of(report: Report) -> Texts:
    """The sequences of a finished run, from its report."""
    calibration = report["calibration"]
    likelihood, retrieval = report["evidence"]["likelihood"], report["evidence"]["retrieval"]
    windows = likelihood["windows"]
    lengths: Counter[int] = Counter()
    for task in (retrieval or {"tasks": []})["tasks"]:
        for cell in task["cells"]:
            lengths[cell["length"]] += cell["prompts"]
    return Texts(
        ((calibration["tokens"] // calibration["length"], calibration["length"]),),
        ((windows, likelihood["tokens"] // windows + 1),),
        tuple((count, length) for length, count in lengths.items()),
    )


def ceilings(rates: Rates, found: Pace) -> Pace:
    """No product can be faster than the fastest kind of product of the machine."""
    best = max(rates.f32, rates.bf16, rates.bf16_factors, rates.rough)
    products = set(Phase) - {Phase.SCALES, Phase.CODES}
    return replace(found, speeds={**found.speeds, **dict.fromkeys(products, best)})


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(source: Path, destination: Path, options: tuple[str, ...]) -> None:
    """Quantize, and say where the time went."""
    arguments = [str(source), str(destination), *options]
    began = time.perf_counter()
    with Looks() as looks:
        llama4q(["quantize", *arguments], standalone_mode=False)
    taken = time.perf_counter() - began
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = json.loads((destination / "report.json").read_bytes())
    config, recipe = read_config(source), recipe_from_json(report["recipe"], str(destination))
    scheme = next(one for one in recipe.schemes.values() if one.calibrates)
    rates = measure_rates(next(source.glob("*.safetensors")), destination)
    paced = pace(rates, measure_searches(scheme, recipe.solver), DTYPES[report["dtype"]])
    plan = make_plan(config, recipe, texts_of(report))
    best = ceilings(rates, paced)
    print(f"{'':30}{'seconds':>9}{'share':>8}{'amount':>10}{'a second':>10}{'of ceiling':>12}")
    for name, seconds in sorted(looks.seconds.items(), key=lambda item: -item[1]):
        amounts = {p: plan.amounts[p] for p in PHASES.get(name, ((), ()))[1]}
        amount = sum(amounts.values())
        line = f"{name:30}{seconds:9.1f}{seconds / taken:8.1%}"
        if amount:
            least = sum(value / best.speeds[phase] for phase, value in amounts.items())
            line += f"{amount:10.2e}{amount / seconds:10.2e}{least / seconds:12.0%}"
        print(line)
    moved = plan.read + plan.written
    disk = plan.read / paced.read + plan.written / paced.write
    print(f"{'disk, beside all that':30}{disk:9.1f}{disk / taken:8.1%}{moved:10.2e}")
    floor = plan.floor(paced)
    print(
        f"whole run {duration(taken)}, {taken / floor:.2f} times the plan's floor of "
        f"{duration(floor)}; peak of resident memory {peak / 1e9:.2f} GB"
    )
    kinds = Counter(unit.network for unit in plan.units)
    for model, layers in WHOLE.items():
        if set(layers) <= set(kinds):
            floors = {unit.network: paced.seconds(unit) for unit in plan.units}
            whole = sum(count * floors[kind] for kind, count in layers.items())
            print(
                f"all {sum(layers.values())} layers of {model}: {duration(whole * taken / floor)}"
            )


if __name__ == "__main__":
    main()
