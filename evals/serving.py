"""Commands that serve a checkpoint, sized by the report's fit line. Knows nothing of how a card
looks, nor of what a checkpoint is worth.

Source: the engines and options of docs/format.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .figures import Report
from .wording import count, part

NO_ENGINE = ("int3",)  # has a kernel for them
NOT_SGLANG = ("int4-g64", "int8")  # its Triton path takes groups of 32 and 128
BITSANDBYTES = ("bnb-nf4", "bnb-int8")
CARDS = (1, 2, 4, 8)  # that the heads of Scout and Maverick can be divided among
LEAST = 4096  # tokens of context, below which a card is of no use


@dataclass(frozen=True)
class Command:
    """How one engine is started."""

    engine: str
    language: str  # of the block
    lines: tuple[str, ...]
    remark: str


@dataclass(frozen=True)
class Size:
    """How many cards serve it, and how many tokens a request may have there."""

    cards: int
    context: int


def size_of(fit: Mapping[str, Any]) -> Size | None:
    """The fewest cards of the fit line's device, and the context that it asks for or the largest.

    On several cards weights are divided and the KV cache, to be safe, is not. None where nothing
    is known, or no number of cards will do.
    """
    if not fit.get("usable_bytes"):
        return None
    if fit["largest_context"] >= min(fit["context"], LEAST):
        return Size(1, min(fit["context"], fit["largest_context"]))
    rest = fit["kv_bytes"] + fit["reserved_bytes"]
    weights = fit["total_bytes"] - rest
    for cards in CARDS[1:]:
        if weights / cards + rest <= fit["usable_bytes"]:
            return Size(cards, fit["context"])
    return None


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
    used, size = schemes(report), size_of(part(report, "fit"))
    if not used & {*NO_ENGINE, *BITSANDBYTES}:
        options = [f"--tensor-parallel-size {size.cards}"] if size and size.cards > 1 else []
        options += [f"--max-model-len {size.context}"] if size else []
        yield Command(
            "vLLM",
            "sh",
            _shell(f"vllm serve {model}", "--moe-backend triton", *options),
            "Keep `--moe-backend triton`: by their code, other kernels apply Llama 4's router "
            "score twice or in the wrong place, without an error.",
        )
        if not used & {*NOT_SGLANG}:
            options = [f"--tp-size {size.cards}"] if size and size.cards > 1 else []
            options += [f"--context-length {size.context}"] if size else []
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
    """Which card holds it, and up to which context; empty where the report does not say, or the
    plan's engine, vLLM, does not serve it."""
    fit = part(report, "fit")
    size = size_of(fit)
    if not fit.get("usable_bytes") or "vLLM" not in engines(report):
        return ""
    device = str(fit["device"]).upper().replace("-", " ")
    if size is None:
        return f"more than {CARDS[-1]} × {device}"
    largest = count(fit["largest_context"] if size.cards == 1 else size.context)
    upto = "up to a context of" if size.cards == 1 else "a context of"
    return f"{size.cards} × {device}, {upto} {largest} tokens with a BF16 KV cache"
