"""Commands that serve a checkpoint, sized by the report's fit line. Knows nothing of how a card
looks, nor of what a checkpoint is worth.

Source: the engines and options of docs/format.md.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from .figures import Report
from .wording import count, part

NO_ENGINE = ("int3",)  # has a kernel for them
NOT_SGLANG = ("int4-g64", "int8")  # its Triton path takes groups of 32 and 128
BITSANDBYTES = ("bnb-nf4", "bnb-int8")
CARDS = 8  # the most that a fit line considers


@dataclass(frozen=True)
class Command:
    """How one engine is started."""

    engine: str
    language: str  # of the block
    lines: tuple[str, ...]
    remark: str


def schemes(report: Report) -> set[str]:
    """Every scheme that some layer has."""
    recipe = part(report, "recipe")
    overrides = [
        {key: value for key, value in one.items() if key != "layers"}
        for one in recipe.get("overrides") or []
    ]
    return {name for one in (part(recipe, "schemes"), *overrides) for name in one.values()}


def engines(report: Report) -> list[str]:
    """By name, those that serve it."""
    return [command.engine for command in commands(report, "", False)]


def commands(report: Report, model: str, multimodal: bool) -> Iterator[Command]:
    """For each engine that takes the report's schemes; `model` is its Hub id or folder."""
    used, served = schemes(report), part(report, "fit", "served")
    if not used & {*NO_ENGINE, *BITSANDBYTES}:
        planned = served.get("options") or [("--moe-backend", "triton")]
        options = [shlex.join(option) for option in planned]
        yield Command(
            "vLLM",
            "sh",
            _shell(f"vllm serve {model}", *options),
            "Keep `--moe-backend triton`: by their code, other kernels apply Llama 4's router "
            "score twice or in the wrong place, without an error.",
        )
        if not used & {*NOT_SGLANG}:
            options = [f"--tp-size {served['cards']}"] if served.get("cards", 1) > 1 else []
            options += [f"--context-length {served['context']}"] if served else []
            yield Command(
                "SGLang",
                "sh",
                _shell(
                    f"python -m sglang.launch_server --model-path {model}",
                    "--moe-runner-backend triton",
                    *options,
                ),
                "Here it is `--moe-runner-backend triton`, for the same reason.",
            )
    yield _transformers(report, model, multimodal, bool(used & {*BITSANDBYTES}))


def _shell(command: str, *options: str) -> tuple[str, ...]:
    """The command, and its options in a line of their own."""
    return f"{command} \\", f"    {' '.join(options)}"


def _transformers(report: Report, model: str, multimodal: bool, bitsandbytes: bool) -> Command:
    kind = "AutoModelForImageTextToText" if multimodal else "AutoModelForCausalLM"
    original = part(report, "source").get("bytes")
    needs = f", about {original / 1e9:,.0f} GB" if original and original >= 1e9 else ""
    remark = "With `pip install transformers bitsandbytes accelerate`."
    if not bitsandbytes:
        remark = (
            f"With `pip install transformers compressed-tensors accelerate`. It unpacks all "
            f"weights to BF16 in the first forward and then needs the memory of the "
            f"original{needs}: to check with, not to serve."
        )
    lines = (
        f"from transformers import {kind}, AutoTokenizer",
        "",
        f'name = "{model}"',
        f'model = {kind}.from_pretrained(name, device_map="auto")',
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        'chat = [{"role": "user", "content": "What is a mixture of experts?"}]',
        "inputs = tokenizer.apply_chat_template(",
        '    chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
        ").to(model.device)",
        "output = model.generate(**inputs, max_new_tokens=200)",
        'print(tokenizer.decode(output[0][inputs["input_ids"].shape[1]:]))',
    )
    return Command("transformers", "python", lines, remark)


def fit_line(report: Report) -> str:
    """Which cards hold it, and up to which context; empty where the report does not say, or the
    plan's engine, vLLM, does not serve it."""
    fit = part(report, "fit")
    if "served" not in fit or "vLLM" not in engines(report):
        return ""
    device = str(fit["device"]).upper().replace("-", " ")
    served = fit["served"]
    if not served:
        return f"more than {CARDS} × {device}"
    planned = served["cards"] == fit["cards"] and served["context"] <= fit["context"]
    context, upto = served["context"], "a context of"
    if planned:
        context, upto = fit["largest_context"], "up to a context of"
    requests = f"{fit['concurrency']} requests of " if fit["concurrency"] > 1 else ""
    return (
        f"{served['cards']} × {device}, {requests}{upto} {count(context)} tokens "
        f"with {_CACHES[fit['kv']]} KV cache"
    )


_CACHES = {"bf16": "a BF16", "fp8": "an FP8"}
