"""`llama4q fit` by the command line, on checkpoints of the true sizes that are headers alone.

Authorities: the serving contract, design.md's truthful no, and the command itself: what it says
would do is asked again, and must fit.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from cli import main
from llama4q.config import parse_config
from llama4q.export import quantization_config
from llama4q.predict import predicted_tensors
from llama4q.recipe import load_recipe

from . import sparse, test_inspect, tiny

REAL = {"scout": test_inspect.SCOUT, "maverick": test_inspect.MAVERICK}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The published models, and Scout by two recipes, of which one has scales of a KV cache."""
    folder = tmp_path_factory.mktemp("checkpoints")
    found = {}
    for model, raw in REAL.items():
        infos = test_inspect.bf16(raw)
        found[model] = sparse.write(folder / model, raw, infos)
    config, infos = parse_config(REAL["scout"], "scout"), test_inspect.bf16(REAL["scout"])
    for name in ("int4", "fp8"):
        recipe = load_recipe(name)
        stored = quantization_config(recipe, config)
        if name == "fp8":
            stored["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
        raw = {**REAL["scout"], "quantization_config": stored}
        tensors = predicted_tensors(infos, config, recipe)
        found[f"scout-{name}"] = sparse.write(folder / f"scout-{name}", raw, tensors)
    return found


def ran(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["fit", *map(str, arguments)])
    assert result.exit_code in (0, 1), result.output
    return result


def asked(*arguments: object) -> dict[str, Any]:
    result = ran(*arguments, "--json")
    found: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == (0 if found["fits"] else 1)
    return found


def words(found: dict[str, Any]) -> list[str]:
    return [remedy["words"].split(",")[0] for remedy in found["remedies"]]


SAME = {  # vLLM's option -> ours
    "--max-model-len": "--context", "--tensor-parallel-size": "--gpus", "--kv-cache-dtype": "--kv",
    "--max-num-batched-tokens": "--batched-tokens", "--gpu-memory-utilization": "--utilization",
    "--hf-overrides": "--positions", "--block-size": "--block-size",
}  # fmt: skip


def as_asked(command: str) -> list[str]:
    """The options of a `vllm serve` command as `llama4q fit` takes them."""
    program, verb, _name, *options = shlex.split(command)
    assert (program, verb) == ("vllm", "serve")
    given = []
    while options:
        option = options.pop(0)
        if option == "--moe-backend":
            assert options.pop(0) == "triton"
        elif option == "--disable-hybrid-kv-cache-manager":
            given.append("--no-hybrid")
        else:
            value = options.pop(0)
            if option == "--hf-overrides":
                [limit] = json.loads(value)["text_config"].values()
                value = str(limit)
            given += [SAME[option], value]
    return given


@pytest.mark.parametrize("recipe", ["int4", "fp8"])
def test_prediction_and_fact_are_the_same_answer(checkpoints: dict[str, Path], recipe: str) -> None:
    for options in ((), ("--gpus", 4, "--context", 100000)):
        fact = asked(checkpoints[f"scout-{recipe}"], "--kv", "bf16", *options)
        predicted = asked(checkpoints["scout"], "--recipe", recipe, *options)
        for answer in (fact, predicted):
            for key in ("source", "recipe", "command", "remedies"):
                del answer[key]
        assert fact == predicted


def test_scout_in_int4_on_one_h100(checkpoints: dict[str, Path]) -> None:
    """The blocks and the concurrency that vLLM's own functions give for the same free bytes
    (benchmarks/serving_memory.py, first case)."""
    result = ran(checkpoints["scout"], "--recipe", "int4", "--context", 131072)
    assert result.exit_code == 1
    assert "6,627 KV blocks: 0.52 requests of 131,072 tokens at once" in result.stdout
    found = asked(checkpoints["scout"], "--recipe", "int4", "--context", 131072)
    assert (found["kv_blocks"], found["request_blocks"]) == (6627, 12800)
    assert found["max_concurrency"] == 6627 / 12800
    assert found["largest_context"] == 32288
    assert asked(checkpoints["scout-int4"], "--context", 32288)["fits"]
    assert not asked(checkpoints["scout-int4"], "--context", 32289)["fits"]


@pytest.mark.parametrize(
    ("source", "options", "short_gb", "expected"),
    [
        ("scout-fp8", ("--kv", "bf16"), 46.2,
         ["the recipe int4-fp8", "2 of these GPUs", "h200-141gb instead"]),
        ("maverick", ("--recipe", "int4"), 145.0, ["4 of these GPUs"]),
        ("maverick", ("--recipe", "int4-g32"), 163.6, ["4 of these GPUs"]),
        ("maverick", ("--recipe", "int4", "--gpus", 2), 36.3,
         ["4 of these GPUs", "h200-141gb instead"]),
    ],
)  # fmt: skip
def test_truthful_no_on_80_gb(
    checkpoints: dict[str, Path], source: str, options: tuple[Any, ...], short_gb: float,
    expected: list[str],
) -> None:  # fmt: skip
    """design.md: FP8 Scout and 4-bit Maverick do not fit one 80 GB card."""
    found = asked(checkpoints[source], *options)
    assert not found["fits"]
    assert found["short_bytes"] / 1e9 == pytest.approx(short_gb, abs=0.05)
    assert words(found) == expected
    assert found["command"] is None


NO = [
    ("scout-int4", "--context", 131072),
    ("scout-int4", "--context", 131072, "--no-hybrid"),
    ("scout-int4", "--context", 40000, "--concurrency", 3),
    ("scout-int4", "--context", 131072, "--gpu", "rtx4090-24gb", "--gpus", 4),
    ("scout-int4", "--context", 8192, "--gpu-memory", "75GB"),
    ("scout-fp8", "--context", 300000, "--gpus", 2, "--concurrency", 9),
    ("scout", "--context", 8192, "--gpu", "b200-192gb"),
    ("scout", "--context", 1000000, "--recipe", "int4-fp8"),
    ("maverick", "--recipe", "mixed", "--gpus", 4, "--context", 1000000, "--concurrency", 2),
]  # fmt: skip


@pytest.mark.parametrize("options", NO, ids=lambda options: " ".join(map(str, options)))
def test_every_remedy_is_one(checkpoints: dict[str, Path], options: tuple[Any, ...]) -> None:
    """Asked again with the options of the remedy's own command, it fits."""
    source, *rest = options
    found = asked(checkpoints[source], *rest)
    assert not found["fits"]
    assert found["remedies"]
    for remedy in found["remedies"]:
        device = [] if "--gpu-memory" not in rest else ["--gpu-memory", "75GB"]
        if "--gpu" in rest:
            device = ["--gpu", rest[rest.index("--gpu") + 1]]
        if remedy["words"].endswith(" instead"):
            device = ["--gpu", remedy["words"].split()[0]]
        recipe = remedy["recipe"] or ("int4" if source == "scout-int4" else None)
        if "--recipe" in rest and not remedy["recipe"]:
            recipe = rest[rest.index("--recipe") + 1]
        number = rest[rest.index("--concurrency") + 1] if "--concurrency" in rest else 1
        if "at once" in remedy["words"]:
            number = remedy["words"].split()[0]
        name = source if not recipe else source.partition("-")[0]
        chosen = ["--recipe", recipe] if recipe else []
        again = asked(
            checkpoints[name], *chosen, *device, "--concurrency", number,
            *as_asked(remedy["command"]),
        )  # fmt: skip
        assert again["fits"], remedy
        assert again["total_bytes"] == remedy["total_bytes"]
        assert again["usable_bytes"] == remedy["usable_bytes"]


def test_options_come_alone_or_as_the_smallest_combination(checkpoints: dict[str, Path]) -> None:
    found = words(asked(checkpoints["scout-int4"], "--context", 131072, "--no-hybrid"))
    assert found[0] == (
        "a table of no more positions than the context and the hybrid KV cache manager and a "
        "larger share of the GPU"
    )
    assert found[1] == "the hybrid KV cache manager and an FP8 KV cache"
    alone = words(asked(checkpoints["scout-int4"], "--context", 50000))
    assert alone[:4] == [
        "a table of no more positions than the context", "smaller batches",
        "a larger share of the GPU", "an FP8 KV cache",
    ]  # fmt: skip


def test_the_command_that_serves_is_printed(checkpoints: dict[str, Path]) -> None:
    """docs/format.md: other experts than Triton's are wrong on a GPU."""
    folder = checkpoints["scout-int4"]
    yes = ran(folder, "--gpus", 2, "--kv", "fp8", "--utilization", 0.9)
    assert yes.stdout.splitlines()[-1] == (
        f"serve: vllm serve {folder} --max-model-len 8192 --moe-backend triton "
        f"--tensor-parallel-size 2 --kv-cache-dtype fp8 --gpu-memory-utilization 0.9"
    )
    no = ran(checkpoints["scout"], "--recipe", "int4", "--context", 32300)
    assert no.stdout.splitlines()[-1] == (
        "serve: vllm serve scout-int4 --max-model-len 32300 --moe-backend triton "
        '--hf-overrides \'{"text_config": {"max_position_embeddings": 32300}}\''
    )
    nothing = ran(checkpoints["maverick"], "--gpus", 8, "--gpu-memory", "4GB", "--context", 500000,
                  "--concurrency", 100)  # fmt: skip
    assert nothing.stdout.splitlines()[-1] == "no option, recipe or GPU known here would do"


def test_the_kv_cache_is_what_the_checkpoint_says(checkpoints: dict[str, Path]) -> None:
    """serving-contract.md 5(f): vLLM turns FP8 on by itself where there is a kv_cache_scheme."""
    assert asked(checkpoints["scout-fp8"])["serving"]["kv_dtype"] == "fp8"
    assert asked(checkpoints["scout-fp8"], "--kv", "bf16")["serving"]["kv_dtype"] == "bf16"
    assert asked(checkpoints["scout-int4"])["serving"]["kv_dtype"] == "bf16"


def refused(*arguments: object) -> str:
    result = ran(*arguments)
    assert result.exit_code == 1
    [line] = result.stderr.splitlines()
    return line


def test_bad_input_is_one_line(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    scout = checkpoints["scout"]
    assert "unknown GPU 'h100'; did you mean 'h100-80gb'" in refused(scout, "--gpu", "h100")
    assert "10,485,761: the model knows 10,485,760" in refused(scout, "--context", 10485761)
    assert "3 GPUs" in refused(scout, "--gpus", 3)
    assert "is quantized already (compressed-tensors); leave out --recipe" in refused(
        checkpoints["scout-int4"], "--recipe", "int4"
    )
    assert "neither a file nor a shipped recipe" in refused(scout, "--recipe", "int5")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"hf_quant_config.json": "{}"}, "is quantized by NVIDIA ModelOpt; name a plain"),
        ({"config.json": "modelopt"}, "is quantized by NVIDIA ModelOpt; name a plain"),
        ({"config.json": "gptq"}, "is quantized with gptq; name a plain"),
    ],
)
def test_other_formats_are_named(files: dict[str, str], message: str, tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "other", tiny.SCOUT)
    for name, content in files.items():
        if name == "config.json":
            raw = json.loads((folder / name).read_text())
            content = json.dumps({**raw, "quantization_config": {"quant_method": content}})
        (folder / name).write_text(content)
    assert message in refused(folder)


def test_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for name in (tmp_path, tmp_path / "model.gguf"):
        assert "is GGUF, for llama.cpp; name a plain checkpoint" in refused(name)


def test_what_others_quantize_with_compressed_tensors_is_planned(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """llm-compressor's FP8_BLOCK (serving-contract.md 4): codes with a BF16 scale for each block of
    128 by 128, which vLLM holds in F32."""
    raw = tiny.config_json(tiny.Variant(width=256, expert_size=256))
    infos = {}
    for name, info in test_inspect.quantized(test_inspect.bf16(raw)).items():
        infos[name] = info
        if ".experts." in name:
            rows, columns = info.shape
            infos[name] = test_inspect.tensor(info.shape, torch.float8_e4m3fn)
            scale = test_inspect.tensor((rows // 128, columns // 128))
            infos[name.replace(".weight", ".weight_scale")] = scale
    raw["quantization_config"] = {"quant_method": "compressed-tensors"}
    folder = sparse.write(tmp_path / "block", raw, infos)
    found = asked(folder, "--context", 64)
    scales = sum(info.nbytes for name, info in infos.items() if name.endswith("_scale"))
    assert found["weight_bytes"] == sum(info.nbytes for info in infos.values()) + scales
    halves = asked(folder, "--context", 64, "--gpus", 2)
    assert found["weight_bytes"] / 2 < halves["weight_bytes"] < found["weight_bytes"] * 0.6
