"""GPTQ by llm-compressor, as a user of it would quantize Llama 4, for one assignment.

The call follows llm-compressor's own example for Llama 4; what the example leaves at a default is
at that default here. The result is decoded from the files that it wrote and not from memory, so
that what would be served is what is judged. It knows symmetric integers by group (pack-quantized),
and no multimodal calibration. The whole model is in memory in BF16.

Modes: "" calibrates every expert on all tokens (its default), "routed" each expert on the tokens
that the router sends to it, "mse" is its default with scales from its search for the least
squared error in place of the largest weight, "example" is its default with the example's
sequential targets, of which the others go without: see `SEQUENTIAL_TARGETS`.
"""

import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import Assignment, hand_back, peak_bytes, stored_bytes
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import load_quantizable_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from loguru import logger
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import Llama4ForConditionalGeneration, PreTrainedTokenizerBase

# Of examples/multimodal_vision/llama4_example.py, without its "Llama4TextAttention", which
# "re:.*self_attn" covers. Everything else that is a Linear is quantized.
IGNORE = [
    "re:.*lm_head",
    "re:.*self_attn",
    "re:.*router",
    "re:.*vision_model.*",
    "re:.*multi_modal_projector.*",
]
# Where the model is cut. Of None, its default, it makes the decoder layers, and those are right.
# The example's class matches the shared expert alone once the experts are split. Then the layer's
# insides are traced and put into another order, in which the routed experts' `out.add_()` comes
# after `out` was used: all later layers are calibrated on a stream without routed experts (seen
# with llmcompressor 0.14.0.1 and transformers 5.17.0).
SEQUENTIAL_TARGETS: dict[str, list[str] | None] = {
    "": None,
    "routed": None,
    "mse": None,
    "example": ["Llama4TextMLP"],
}
PACKED = ".weight_packed"


def main() -> None:
    assignment = Assignment.read(sys.argv[1])
    if assignment.mode not in SEQUENTIAL_TARGETS:
        modes = ", ".join(map(repr, SEQUENTIAL_TARGETS))
        sys.exit(f"unknown mode {assignment.mode!r} of llm-compressor, choose from {modes}")
    torch.manual_seed(assignment.seed)
    started_with = peak_bytes()
    warnings = Warnings()
    logger.add(warnings, level="WARNING")
    start = time.perf_counter()
    quantize(assignment)
    seconds = time.perf_counter() - start
    decoded = dict(decode(assignment.work, assignment.bits))
    hand_back(
        assignment,
        decoded,
        seconds=seconds,
        stored=stored_bytes(assignment.work),
        version=f"llmcompressor {version('llmcompressor')}, transformers {version('transformers')}",
        started_with=started_with,
        notes=[*zeros(decoded), *warnings],
    )


class Warnings(list[str]):
    """What llm-compressor warns of, each thing once; as a sink of its logger."""

    def write(self, message: Any) -> None:
        line = " ".join(message.record["message"].split())
        # Its own level for metrics, of which there are two per linear, ranks above an error.
        if message.record["level"].name != "METRIC" and line not in self:
            self.append(line)


def quantize(assignment: Assignment) -> None:
    """Load, calibrate, and let llm-compressor write its checkpoint into `assignment.work`."""
    with load_quantizable_moe(Llama4ForConditionalGeneration):
        model = Llama4ForConditionalGeneration.from_pretrained(
            assignment.source, dtype=torch.bfloat16
        )
    mse = {"weight_observer": "memoryless_mse"} if assignment.mode == "mse" else {}
    oneshot(
        model=model,
        dataset=batches(assignment.calibration()),
        processor=PreTrainedTokenizerBase(),  # unused with tokens, but it would load the source's
        recipe=GPTQModifier(
            config_groups={"group_0": scheme(assignment.bits, assignment.group)},
            ignore=IGNORE,
            **mse,
        ),
        num_calibration_samples=len(assignment.calibration()),
        sequential_targets=SEQUENTIAL_TARGETS[assignment.mode],
        moe_calibrate_all_experts=assignment.mode != "routed",
    )
    model.save_pretrained(assignment.work, save_compressed=True)


def scheme(bits: int, group: int) -> QuantizationScheme:
    """Its preset for integer weights of that many bits; presets come in groups of 128 only."""
    preset = preset_name_to_scheme(f"W{bits}A16", ["Linear"])
    preset.weights.group_size = group
    return preset


def batches(tokens: torch.Tensor) -> DataLoader[dict[str, torch.Tensor]]:
    """Sequences one by one, its default, which its example for Llama 4 insists on."""
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    return DataLoader(rows, batch_size=1)  # type: ignore[arg-type]  # any sequence will do


def decode(checkpoint: Path, bits: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and weight [out, in] of everything that is stored packed."""
    for path in sorted(checkpoint.glob("*.safetensors")):
        file = load_file(path)  # a module's tensors lie in one file: it shards from 20 GB on
        for name, packed in file.items():
            if name.endswith(PACKED):
                stem = name.removesuffix(PACKED)
                shape = torch.Size(file[f"{stem}.weight_shape"].tolist())
                codes = unpack_from_int32(packed, bits, shape).float()
                scale = file[f"{stem}.weight_scale"].float().unsqueeze(-1)
                yield f"{stem}.weight", (codes.reshape(*scale.shape[:2], -1) * scale).reshape(shape)


def zeros(decoded: dict[str, torch.Tensor]) -> list[str]:
    """How much was written as zeros, as it does with inputs that calibration never saw."""
    empty = [name for name, weight in decoded.items() if not weight.any()]
    columns = sum(int((weight == 0).all(dim=0).sum()) for weight in decoded.values())
    total = sum(weight.shape[1] for weight in decoded.values())
    first = f", the first is {empty[0]}" if empty else ""
    return [
        f"all zeros: {len(empty)} of {len(decoded)} linears{first}",
        f"all zeros: {columns} of {total} input columns, those linears' included",
    ]


if __name__ == "__main__":
    main()
