"""AutoRound (SignRound), as a user of it would quantize Llama 4, for one assignment.

AutoRound loads nothing by itself here, but all else is its own: it splits the experts, tunes block
by block, packs and saves, and the weights handed back are decoded from the files that it wrote.
Symmetric integers by group. Attention is excluded; router, vision and lm_head it leaves alone by
default. It runs on the CPU, with the whole model in memory in BF16. How good the result is, is not
known here, and neither is the text behind the tokens.

Modes, joined by "+": "" is AutoRound's defaults. "light" is its light recipe. "scores" and "masks"
each repair one thing in which its calibration is not Llama 4 (see `put_scores_on_inputs` and
`unmask_global_layers`), "fixed" is both: the strongest AutoRound one could get. What is stored has
the same layout in all modes.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from auto_round import AutoRound, __version__
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.logger import logger
from auto_round.modeling.fused_moe import llama4
from auto_round.schemes import QuantizationScheme
from common import Assignment, hand_back, peak_bytes, stored_bytes
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import Llama4ForConditionalGeneration, PreTrainedTokenizerFast

VERSION = f"auto-round {__version__}, transformers {transformers.__version__}"
MODES = {"light", "scores", "masks", "fixed"}
LIGHT = SignRoundConfig(iters=50, lr=5e-3)  # its cli/main.py, 0.16.1
BATCH = 8  # its default, in sequences
FATAL = ("Calibration forward pass failed", "Insufficient number of samples")
PACKED = ".qweight"


def main() -> None:
    assignment = Assignment.read(sys.argv[1])
    modes = set(filter(None, assignment.mode.split("+")))
    if modes - MODES:
        sys.exit(f"unknown mode {assignment.mode!r}, join some of {', '.join(sorted(MODES))} by +")
    started_with = peak_bytes()
    torch.manual_seed(assignment.seed)
    notes: list[str] = []
    warnings = Warnings()
    logger.addHandler(warnings)
    start = time.perf_counter()
    quantize(assignment, modes, notes)
    seconds = time.perf_counter() - start
    if fatal := [line for line in warnings.lines if line.startswith(FATAL)]:
        sys.exit(f"AutoRound went on without some of the sequences: {fatal[0]}")
    folders = {file.parent for file in assignment.work.rglob("*.safetensors")}
    (saved,) = folders  # AutoRound names it
    hand_back(
        assignment,
        dict(decode(saved, assignment.bits)),
        seconds=seconds,
        stored=stored_bytes(saved),
        version=VERSION,
        started_with=started_with,
        notes=[*notes, *warnings.lines],
    )


class Warnings(logging.Handler):
    """What AutoRound warns of, each thing once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = " ".join(record.getMessage().split())
        if line not in self.lines:
            self.lines.append(line)


def quantize(assignment: Assignment, modes: set[str], notes: list[str]) -> None:
    """Load, calibrate, and let AutoRound write its checkpoint below `assignment.work`."""
    model = Llama4ForConditionalGeneration.from_pretrained(
        assignment.source,
        dtype=torch.bfloat16,
        attn_implementation="sdpa",  # the default, on which unmask_global_layers relies
    )
    tokens = assignment.calibration()
    repair(model, tokens.shape[1], modes, notes)
    if "light" in modes:
        notes.append("its light recipe: 50 iterations at a learning rate of 5e-3")
    unused = tokenizer()
    AutoRound(
        model,
        unused,
        scheme=QuantizationScheme(
            bits=assignment.bits,
            group_size=assignment.group,
            sym=True,
            data_type="int",
            act_bits=16,
        ),
        ignore_layers="self_attn",
        dataset=[{"input_ids": batch} for batch in tokens.split(BATCH)],
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        batch_size=BATCH,
        device_map="cpu",
        enable_torch_compile=False,  # on a CPU it compiles for as long as it saves
        seed=assignment.seed,
        processor=unused,
        alg_configs=LIGHT if "light" in modes else SignRoundConfig(),
    ).quantize_and_save(str(assignment.work), format="auto_round")


def tokenizer() -> PreTrainedTokenizerFast:
    """AutoRound asks for a tokenizer and a processor, and with tokens given only saves them.

    The source's own processor would need torchvision."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"": 0}, unk_token=""))
    )


def repair(model: Any, length: int, modes: set[str], notes: list[str]) -> None:
    """Note in what its calibration is not that of Llama 4, or repair it."""
    text = model.config.text_config
    if text.moe_layers and modes & {"scores", "fixed"}:
        llama4.grouped_or_sequential_moe_forward = put_scores_on_inputs(
            llama4.grouped_or_sequential_moe_forward
        )
        notes.append("repaired by this worker: router scores multiply the experts' inputs")
    elif text.moe_layers:
        notes.append(
            "its experts module multiplies the experts' outputs by the router scores, where"
            " Llama 4 multiplies their inputs: targets and inputs of tuning are another model's"
        )
    if length <= text.attention_chunk_size or "full_attention" not in text.layer_types:
        return
    if modes & {"masks", "fixed"}:
        unmask_global_layers(model.language_model.model.layers, text.layer_types)
        notes.append("repaired by this worker: global layers attend to all previous tokens")
    else:
        notes.append(
            "it replays the first layer's attention mask in all layers: global layers are tuned"
            f" with attention in chunks of {text.attention_chunk_size}, which does not show in"
            " sequences of at most that length"
        )


def put_scores_on_inputs(experts_forward: Any) -> Any:
    """`experts_forward` of modeling/fused_moe/utils.py (0.16.1), which scales what experts return,
    on inputs that are scaled already, as in transformers' Llama4TextMoe."""

    def forward(
        hidden: torch.Tensor, index: torch.Tensor, scores: torch.Tensor, experts: Any, count: int
    ) -> torch.Tensor:
        top = index.shape[1]
        scaled = hidden.repeat_interleave(top, dim=0) * scores.reshape(-1, 1)
        alone = index.reshape(-1, 1)
        routed: torch.Tensor = experts_forward(
            scaled, alone, torch.ones_like(scaled[:, :1]), experts, count
        )
        return routed.reshape(-1, top, hidden.shape[-1]).sum(dim=1)

    return forward


def unmask_global_layers(layers: Any, types: list[str]) -> None:
    """Drop the mask in front of global attention, which then is causal and no more.

    AutoRound catches what the first layer is called with, and calls all others with the same mask.
    In Llama 4 that is the mask of attention in chunks, which every fourth layer does not have."""
    for layer, kind in zip(layers, types, strict=True):
        if kind == "full_attention":
            layer.self_attn.register_forward_pre_hook(
                lambda _module, arguments, named: (arguments, {**named, "attention_mask": None}),
                with_kwargs=True,
            )


# From its format


def decode(saved: Path, bits: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and weight [out, in] of everything that is stored packed."""
    stored: dict[str, torch.Tensor] = {}
    for path in sorted(saved.glob("*.safetensors")):
        stored |= load_file(path)
    for name, packed in stored.items():
        if name.endswith(PACKED):
            stem = name.removesuffix(PACKED)
            codes = unpack(packed, bits)  # [in, out]
            zeros = unpack(stored[f"{stem}.qzeros"].T, bits).T + 1  # [groups, out], less one
            scales = stored[f"{stem}.scales"].float()  # [groups, out]
            grouped = codes.reshape(len(scales), -1, codes.shape[1]) - zeros[:, None]
            yield f"{stem}.weight", (grouped * scales[:, None]).reshape(codes.shape).T


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """[n * bits / 32, columns] int32 to [n, columns]: each column is one stream of bits, the low
    ones first, in which codes of 3 bits lie across words (GPTQ's layout, its own in 0.16.1)."""
    stream = (words[:, None] >> torch.arange(32)[:, None]) & 1  # [words, 32, columns]
    codes = stream.reshape(-1, bits, words.shape[1])
    return (codes << torch.arange(bits)[:, None]).sum(dim=1)


if __name__ == "__main__":
    main()
