"""Load one checkpoint with transformers' auto classes and write what happened as JSON.

Two things are compared: transformers reading the quantized checkpoint by itself, and the
reference, which is transformers' unquantized model filled with the weights that `dequantize.py`
reads from the same files. The reference's log-probabilities are saved for the other engines.
Runs in the project's own environment. It doesn't know vLLM or SGLang, and judges nothing.

The model is in memory as a whole, in BF16, once or twice: this is for pocket models.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from dequantize import digest, fuse_experts, unfused_weights

# A multimodal checkpoint read as a text-only model leaves these over, rightly.
VISION = ("vision_model.", "multi_modal_projector.")
# Scales that compressed-tensors makes up for the vision tower, which caches nothing.
MADE_UP = re.compile(r"vision_model\..*\.self_attn\.[kv]_scale")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--logprobs", type=Path, required=True)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    prompts = json.loads(arguments.prompts.read_text())
    with torch.inference_mode():
        reference = attempt(read_reference, arguments.checkpoint, prompts)
        report = {
            "reference_error": reference.get("error"),
            "digests": {name: digest(weight) for name, weight in reference["weights"].items()}
            if "weights" in reference
            else {},
            "classes": {
                name: attempt(load, name, arguments.checkpoint, prompts, reference)
                for name in auto_classes(arguments.checkpoint)
            },
        }
    if "logprobs" in reference:
        np.savez(arguments.logprobs, *reference["logprobs"])
    arguments.result.write_text(json.dumps(report, indent=1))


def attempt(function: Any, *arguments: Any) -> dict[str, Any]:
    """What the function returns, or its exception in one line: the next check goes on."""
    try:
        return dict(function(*arguments))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def auto_classes(checkpoint: Path) -> list[str]:
    """The auto classes a user would try: a text-only Llama 4 has one, a multimodal one two."""
    config = json.loads((checkpoint / "config.json").read_text())
    both = ["AutoModelForImageTextToText", "AutoModelForCausalLM"]
    return both if "vision_config" in config else both[1:]


def read_reference(checkpoint: Path, prompts: list[list[int]]) -> dict[str, Any]:
    """Our dequantized weights, and what transformers' unquantized model computes with them."""
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    auto_class = getattr(transformers, auto_classes(checkpoint)[0])
    model = auto_class.from_config(config, dtype=torch.bfloat16).eval()
    weights = unfused_weights(checkpoint)
    model.load_state_dict(fuse_experts(weights), strict=True)
    return {"weights": weights, "logprobs": logprobs(model, prompts)}


def logprobs(model: Any, prompts: list[list[int]]) -> list[Any]:
    """One array [T, V] per prompt, computed alone so that no padding takes part."""
    rows = (model(input_ids=torch.tensor([prompt])).logits[0] for prompt in prompts)
    return [row.float().log_softmax(dim=-1).numpy() for row in rows]


def load(
    name: str, checkpoint: Path, prompts: list[list[int]], reference: dict[str, Any]
) -> dict[str, Any]:
    """Keys that were missing or left over, and what the loaded model computes."""
    auto_class = getattr(transformers, name)
    model, info = auto_class.from_pretrained(
        checkpoint, dtype=torch.bfloat16, output_loading_info=True
    )
    text_only = not hasattr(model, "vision_model")
    unexpected = [
        key for key in info["unexpected_keys"] if not (text_only and key.startswith(VISION))
    ]
    report: dict[str, Any] = {
        "class": type(model).__name__,
        "missing": sorted(key for key in info["missing_keys"] if not MADE_UP.fullmatch(key)),
        "unexpected": sorted(unexpected),
        "mismatched": sorted(str(key) for key in info["mismatched_keys"]),
    }
    # The first forward decompresses every weight; broken ones raise here and not in loading.
    report |= attempt(forward, model, prompts, reference.get("logprobs"))
    if "error" not in report and "weights" in reference:
        report |= weight_difference(model, reference["weights"])
    return report


def forward(model: Any, prompts: list[list[int]], reference: list[Any] | None) -> dict[str, Any]:
    computed = logprobs(model.eval(), prompts)
    if reference is None:
        return {}
    pairs = zip(reference, computed, strict=True)
    divergence = np.concatenate([(np.exp(p) * (p - q)).sum(axis=-1) for p, q in pairs])
    return {"median": float(np.median(divergence)), "mean": float(divergence.mean())}


def weight_difference(model: Any, ours: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Largest difference of a decompressed weight from ours, relative to the tensor's maximum."""
    theirs = model.state_dict()
    largest, compared = 0.0, 0
    for name, weight in ours.items():
        # The text-only class of a multimodal checkpoint drops the prefix.
        other = theirs.get(name, theirs.get(name.removeprefix("language_model.")))
        if other is not None:
            difference = (other.float() - weight.float()).abs().max().nan_to_num(nan=torch.inf)
            largest = max(largest, float(difference / weight.float().abs().max().clamp(1e-30)))
            compared += 1
    return {"weight_difference": largest, "weights_compared": compared}


if __name__ == "__main__":
    main()
