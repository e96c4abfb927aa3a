"""Do the engines read a quantized checkpoint as it was meant? One table for any number of them.

    python benchmarks/engines/setup.py                       (once)
    python benchmarks/engines/check.py CHECKPOINT... [--source SOURCE]

For each checkpoint, every engine in an environment and a process of its own:

transformers  loads it with both auto classes; no key may be missing or left over, and the weights
              it decompresses must equal those that `dequantize.py` reads from the same files.
vLLM loader   vLLM's configuration parsing, target matching and weight loading, with plain
              arithmetic instead of kernels. No parameter may be left unset, the weights it loaded
              must equal ours bit by bit, and its distributions over the vocabulary, after every
              token of a few prompts, must be those of transformers on our dequantized weights.
vLLM native   vLLM's own CPU kernels. Most schemes are refused on most processors: that is no
              failure and says nothing about GPUs. If it serves, it must be near the reference.
SGLang        its matcher gives every layer a scheme, which must be the one in the files.

With --source, the unquantized source goes first and shows the noise between the engines, and each
checkpoint shows what quantization itself cost. Divergences are Kullback-Leibler, in nats per token.

The exit code is 1 if any check fails. Not known after this: anything on a GPU (kernels, sharding,
memory), SGLang beyond its matcher, images, FP8 activations in vLLM (its loader is compared
weight-only; transformers simulates them, which its own divergence shows).
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from dequantize import INDEX, StoredScheme, stored_schemes
from setup import FOLDER

HERE = Path(__file__).parent
PERMUTED = ("q_proj.weight", "k_proj.weight", "v_proj.weight")  # v lies in one layer with them
LENGTHS = (32, 64, 128)
LONGEST = 384
DISTRIBUTION_VALUES = 2_000_000  # vLLM returns them as Python objects
# Median divergence between transformers and vLLM on the same BF16 weights is about 6e-4.
LOADER_BOUND = 3e-3
# With an FP8 cache 6e-3, of which transformers has 2e-3.
CACHE_BOUND = 1e-2
# vLLM's INT4 CPU kernels round activations to 8 bits: 3e-3 to 4e-3 measured.
NATIVE_BOUND = 1e-2
# Of a tensor's maximum. transformers rounds FP8 scales to BF16, and the weight again.
WEIGHT_BOUND = 1e-2
CLASS_WORDS = {"AutoModelForImageTextToText": "image-text", "AutoModelForCausalLM": "causal"}
SOURCE = "(source)"
SHOWN = 6  # failures of one cell that are printed


@dataclass
class Finding:
    """One cell of the table, what is wrong with it, and what else is worth a line."""

    text: str
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


Findings = dict[str, Finding]  # by column


def main() -> None:
    arguments = parse()
    rows: dict[str, Findings] = {}
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(arguments, Path(arguments.keep or temporary))
        if arguments.source:
            rows[SOURCE] = bench.check_source()
        for name, checkpoint in named(arguments.checkpoints).items():
            print(f"checking {checkpoint}", file=sys.stderr, flush=True)
            rows[name] = bench.check(checkpoint, name)
    print_report(rows)
    sys.exit(any(finding.failures for row in rows.values() for finding in row.values()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--source", type=Path, help="the BF16 checkpoint all of them came from")
    parser.add_argument("--engines", type=Path, default=FOLDER, help="default: %(default)s")
    parser.add_argument("--text", type=Path, default=Path(__file__), help="text for prompts")
    parser.add_argument("--bound", type=float, default=LOADER_BOUND, help="default: %(default)s")
    parser.add_argument("--limit", type=int, default=600, help="seconds for one engine's check")
    parser.add_argument("--keep", type=Path, help="keep prompts, logs and results in this folder")
    arguments = parser.parse_args()
    for checkpoint in filter(None, [arguments.source, *arguments.checkpoints]):
        if not (checkpoint / "config.json").exists():
            parser.error(f"{checkpoint} has no config.json")
    for checkpoint in arguments.checkpoints:
        if "quantization_config" not in read_config(checkpoint):
            parser.error(f"{checkpoint} is not quantized: it could be the --source")
    for engine in ("vllm", "sglang"):
        if not interpreter(arguments.engines, engine).exists():
            parser.error(f"no {engine} in {arguments.engines}: run {HERE.name}/setup.py first")
    return arguments


def read_config(checkpoint: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    return config


def named(checkpoints: list[Path]) -> dict[str, Path]:
    """Checkpoints by their folders' names, with a number where two have the same."""
    names: dict[str, Path] = {}
    for checkpoint in checkpoints:
        name = checkpoint.resolve().name
        taken = sum(other == name or other.startswith(f"{name} #") for other in names)
        names[f"{name} #{taken + 1}" if taken else name] = checkpoint
    return names


def interpreter(engines: Path, name: str) -> Path:
    return engines / name / "bin" / "python"


class Bench:
    """Runs the workers of one call of this script and keeps their results in a folder."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments = arguments
        self.folder = folder

    def check_source(self) -> Findings:
        work = self.work_folder(self.arguments.source, SOURCE)
        checked = self.transformers_and_vllm(self.arguments.source, work)
        return checked | {"SGLang": Finding("-"), "cost": Finding("-")}

    def check(self, checkpoint: Path, name: str) -> Findings:
        work = self.work_folder(checkpoint, name)
        checked = self.transformers_and_vllm(checkpoint, work)
        result = self.run("sglang_worker", checkpoint, work, "sglang", python="sglang")
        checked["SGLang"] = sglang_finding(result, checkpoint)
        if self.arguments.source:
            divergence = divergences(
                self.folder / SOURCE / "transformers.npz", work / "transformers.npz"
            )
            checked["cost"] = Finding("-" if divergence is None else middle_and_mean(divergence))
        return checked

    def work_folder(self, checkpoint: Path, name: str) -> Path:
        work = self.folder / name
        work.mkdir(parents=True, exist_ok=True)
        prompts = make_prompts(self.arguments.source or checkpoint, self.arguments.text)
        (work / "prompts.json").write_text(json.dumps(prompts))
        return work

    def transformers_and_vllm(self, checkpoint: Path, work: Path) -> Findings:
        loaded = self.run("transformers_worker", checkpoint, work, "transformers")
        reference = self.run(
            "vllm_worker", checkpoint, work, "vllm-loader", "--reference", python="vllm"
        )
        native = self.run("vllm_worker", checkpoint, work, "vllm-native", python="vllm")
        return {
            "transformers": transformers_finding(loaded),
            "weights": weights_finding(loaded, activations_quantized(checkpoint)),
            "vLLM loader KL": loader_finding(reference, work, self.bound(checkpoint)),
            "unset": unset_finding(reference),
            "its weights": loaded_finding(reference, loaded),
            "vLLM native": native_finding(native, work),
        }

    def bound(self, checkpoint: Path) -> float:
        """What may lie between vLLM and the reference, which keeps keys and values as they are."""
        if read_config(checkpoint).get("quantization_config", {}).get("kv_cache_scheme"):
            return max(CACHE_BOUND, float(self.arguments.bound))
        return float(self.arguments.bound)

    def run(
        self, worker: str, checkpoint: Path, work: Path, name: str, *options: str, python: str = ""
    ) -> dict[str, Any]:
        """A worker's result; its 'crash' if it left none. All it prints goes into a log."""
        executable = interpreter(self.arguments.engines, python) if python else sys.executable
        result, logprobs, log = (work / f"{name}.{kind}" for kind in ("json", "npz", "log"))
        for left_over in (result, logprobs):  # of an earlier call with --keep
            left_over.unlink(missing_ok=True)
        command = [executable, HERE / f"{worker}.py", checkpoint, "--result", result, *options]
        if worker != "sglang_worker":
            command += ["--prompts", work / "prompts.json", "--logprobs", logprobs]
        with log.open("w") as output:
            try:
                subprocess.run(
                    command, stdout=output, stderr=output, timeout=self.arguments.limit, check=False
                )
            except subprocess.TimeoutExpired:
                return {"crash": f"not finished after {self.arguments.limit} seconds"}
        if result.exists():
            answer: dict[str, Any] = json.loads(result.read_text())
            return answer
        return {"crash": next(iter(log.read_text().strip().splitlines()[-1:]), "no output")}


# --- prompts --------------------------------------------------------------------------------


def make_prompts(checkpoint: Path, text: Path) -> list[list[int]]:
    """Token ids of a few prompts, the longest across a chunk border where that is affordable.

    Text if the checkpoint has a tokenizer; otherwise random ids, always the same."""
    config = read_config(checkpoint)
    text_config = config.get("text_config", config)
    vocabulary = text_config["vocab_size"]
    chunk = text_config.get("attention_chunk_size") or LONGEST
    lengths = [*LENGTHS, min(chunk + chunk // 2, LONGEST)]
    most = DISTRIBUTION_VALUES // vocabulary
    lengths = [max(2, min(length, length * most // sum(lengths))) for length in lengths]
    if (checkpoint / "tokenizer.json").exists():
        stream = tokens_of(text.read_text(), checkpoint, sum(lengths))
    else:
        stream = random.Random(0).choices(range(vocabulary), k=sum(lengths))
    rest = iter(stream)
    return [list(islice(rest, length)) for length in lengths]


def tokens_of(text: str, checkpoint: Path, count: int) -> list[int]:
    from tokenizers import Tokenizer

    tokens: list[int] = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(text).ids
    return (tokens * (count // len(tokens) + 1))[:count]


# --- what the results mean ------------------------------------------------------------------


def transformers_finding(result: dict[str, Any]) -> Finding:
    """Both auto classes load it, every key has its place, and the first forward works."""
    if "crash" in result:
        return Finding("crashed", [result["crash"]])
    finding = Finding(" and ".join(CLASS_WORDS[name] for name in result["classes"]))
    for name, loaded in result["classes"].items():
        for problem in ("missing", "unexpected", "mismatched"):
            keys = loaded.get(problem, [])
            if keys:
                finding.failures.append(f"{name}: {len(keys)} {problem} keys, such as {keys[0]}")
        if "error" in loaded:
            finding.failures.append(f"{name}: {loaded['error']}")
    finding.text += ": problems" if finding.failures else ": all keys"
    return finding


def weights_finding(result: dict[str, Any], activations: bool) -> Finding:
    """What transformers decompresses and computes, against our dequantized weights."""
    if "crash" in result:
        return Finding("-")
    if result["reference_error"]:
        return Finding("unreadable", [f"dequantize.py: {result['reference_error']}"])
    finding, texts = Finding(""), []
    for name, loaded in result["classes"].items():
        if "median" not in loaded:
            continue
        difference, compared = loaded["weight_difference"], loaded["weights_compared"]
        texts.append("equal" if difference == 0 else f"within {difference:.1e}")
        if not difference <= WEIGHT_BOUND or not compared:
            finding.failures.append(f"{name}: weights of {compared} differ by {difference:.1e}")
        if not activations and not loaded["median"] <= LOADER_BOUND:
            finding.failures.append(f"{name}: divergence {loaded['median']:.1e} from our weights")
        kind = "with FP8 activations or cache" if activations else "weight-only"
        finding.notes.append(f"{name} {kind}: KL {loaded['median']:.1e} / {loaded['mean']:.1e}")
    finding.text = max(texts, default="-")
    return finding


def loader_finding(result: dict[str, Any], work: Path, bound: float) -> Finding:
    """vLLM's loader and plain arithmetic, against transformers on our dequantized weights."""
    if result.get("unset"):
        return Finding("not run")  # the next column says why
    if not result.get("served"):
        return Finding("refused", [result.get("crash") or result["reason"]])
    divergence = divergences(work / "transformers.npz", work / "vllm-loader.npz")
    if divergence is None:
        return Finding("no reference")
    finding = Finding(middle_and_mean(divergence), notes=[counted(result["kinds"])])
    if not np.median(divergence) <= bound:
        finding.failures.append(f"median divergence above {bound:.0e}")
    return finding


def unset_finding(result: dict[str, Any]) -> Finding:
    unset = result.get("unset")
    if unset is None:
        return Finding("unknown")
    return Finding(str(len(unset)) if unset else "none", unset)


def loaded_finding(result: dict[str, Any], loaded: dict[str, Any]) -> Finding:
    """Weights of the decoder layers as vLLM's loader has them, against ours."""
    theirs, ours = result.get("digests"), loaded.get("digests")
    if not theirs or not ours:
        return Finding("-")
    names = [name for name in ours if ".layers." in name and has_equal_rows(name)]
    failures = [
        f"{name} {'differs' if name in theirs else 'is nowhere in vLLM'}"
        for name in names
        if theirs.get(name) != ours[name]
    ]
    return Finding(f"{len(failures)} of {len(names)} differ" if failures else "equal", failures)


def has_equal_rows(name: str) -> bool:
    """Not q and k, whose rows vLLM permutes, nor a source's fused experts or the vision tower."""
    return name.endswith(".weight") and not (name.startswith("vision") or name.endswith(PERMUTED))


def native_finding(result: dict[str, Any], work: Path) -> Finding:
    """Kernels that this processor has not, or not fast enough, are nobody's failure."""
    if "crash" in result:
        return Finding("crashed", notes=[result["crash"]])
    if not result["served"]:
        return Finding("refused", notes=[result["reason"]])
    divergence = divergences(work / "transformers.npz", work / "vllm-native.npz")
    if divergence is None:
        return Finding("served, no reference")
    finding = Finding(f"served, KL {np.median(divergence):.1e}", notes=[counted(result["kinds"])])
    if not np.median(divergence) <= NATIVE_BOUND:
        finding.failures.append(f"median divergence above {NATIVE_BOUND:.0e}")
    return finding


def sglang_finding(result: dict[str, Any], checkpoint: Path) -> Finding:
    """SGLang's scheme of every layer, against the weights that lie in the files."""
    if "crash" in result:
        return Finding("crashed", [result["crash"]])
    stored = stored_schemes(checkpoint)
    finding, kinds = Finding(""), Counter[str]()
    for layer in result["layers"]:
        problem = layer.get("raises") or disagreement(layer, stored)
        if problem:
            finding.failures.append(f"{layer['layer']}: {problem}")
        kinds[f"{kind_of(layer['layer'])}: {described(layer)}"] += 1
    if not (checkpoint / INDEX).exists():
        finding.failures.append(f"no {INDEX}: SGLang would drop the vision tower")
    finding.text = f"{len(finding.failures)} problems" if finding.failures else "agrees"
    finding.notes.append(counted(kinds))
    return finding


def disagreement(layer: dict[str, Any], stored: dict[str, StoredScheme]) -> str | None:
    """Why a layer's verdict is not what the files hold; None if it is."""
    parts = [part for pattern in layer["parts"] for part in matching(pattern, stored)]
    if not parts:
        return "no weights of it in the files"
    declared = (layer["values"], layer.get("strategy"), layer.get("group_size"))
    for part in parts:
        if not stored[part].agrees(*declared):
            return f"{described(layer)}, but {part} holds {stored[part]}"
    return None


def matching(pattern: str, stored: dict[str, StoredScheme]) -> list[str]:
    if "{expert}" not in pattern:
        return [pattern] if pattern in stored else []
    before, after = pattern.split("{expert}")
    return [name for name in stored if name.startswith(before) and name.endswith(after)]


def described(layer: dict[str, Any]) -> str:
    if "raises" in layer:
        return "raises"
    words = [layer["values"], layer.get("strategy"), layer.get("group_size")]
    return " ".join(str(word) for word in words if word is not None)


def kind_of(layer: str) -> str:
    tower = "vision " if layer.startswith("vision_model") else ""
    return tower + ("shared_expert." if "shared_expert" in layer else "") + layer.split(".")[-1]


def activations_quantized(checkpoint: Path) -> bool:
    """Whether inputs of linears, or keys and values, are rounded as well."""
    quantization = read_config(checkpoint).get("quantization_config", {})
    groups = quantization.get("config_groups", {}).values()
    cache = bool(quantization.get("kv_cache_scheme"))
    return cache or any(group.get("input_activations") for group in groups)


def divergences(first: Path, second: Path) -> Any:
    """KL(first || second) at every position of every prompt, in nats; None if one is not there."""
    if not (first.exists() and second.exists()):
        return None
    pair = np.load(first), np.load(second)
    rows = []
    for prompt in pair[0].files:
        log_p, log_q = (logs[prompt].astype(np.float64) for logs in pair)
        rows.append((np.exp(log_p) * (log_p - log_q)).sum(axis=-1))
    return np.concatenate(rows)


def middle_and_mean(divergence: Any) -> str:
    return f"{np.median(divergence):.1e} / {divergence.mean():.1e}"


def counted(kinds: dict[str, int]) -> str:
    return "; ".join(f"{count} x {kind}" for kind, count in kinds.items())


# --- the report -----------------------------------------------------------------------------


def print_report(rows: dict[str, Findings]) -> None:
    """The table, then each checkpoint's failures and notes."""
    columns = list(next(iter(rows.values())))
    table = [["checkpoint", *columns, "verdict"]]
    for name, row in rows.items():
        failed = any(finding.failures for finding in row.values())
        table.append(
            [name, *(row[column].text for column in columns), "FAILED" if failed else "ok"]
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)))
    for name, row in rows.items():
        print(f"\n{name}")
        for column, finding in row.items():
            for line in finding.failures[:SHOWN]:
                print(f"  FAILED {column}: {line}")
            if len(finding.failures) > SHOWN:
                print(f"  FAILED {column}: and {len(finding.failures) - SHOWN} more like these")
            for line in finding.notes:
                print(f"  {column}: {line}")


if __name__ == "__main__":
    main()
