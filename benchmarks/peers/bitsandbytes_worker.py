"""Data-free quantization by bitsandbytes' own functions, for one assignment.

bitsandbytes replaces linears, and the official layout of Llama 4 has none for routed experts:
`load_in_4bit` leaves them in BF16 without a word. So every expert's matrix is given to the same
functions that its linears call. It looks at no calibration text and runs no model; the
assignment's tokens, seed and group are not read.

Modes: "" is NF4 in blocks of 64 with the blocks' scales quantized in turn (4 bits), "int8" is the
weights of LLM.int8(), one scale for each output (8 bits). Its activations in 8 bits and its
outlier columns belong to the forward pass and are not here.
"""

import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from common import QUANTIZED, Assignment, hand_back, peak_bytes
from safetensors.torch import load_file

BITS = {"": 4, "int8": 8}
# Of a weight [out, in]: what its codes decode to, the bytes that they and all that goes with them
# take in a file, and how many of these are the same for every weight.
Codec = Callable[[torch.Tensor], tuple[torch.Tensor, int, int]]


def main() -> None:
    assignment = Assignment.read(sys.argv[1])
    mode, bits = assignment.mode, assignment.bits
    if BITS.get(mode) != bits:
        known = ", ".join(f"{bits} bits in mode {mode!r}" for mode, bits in BITS.items())
        sys.exit(f"bitsandbytes has no {bits} bits in mode {mode!r}, only {known}")
    started_with = peak_bytes()
    linears, others = split(assignment.source)
    codec: Codec = int8 if mode == "int8" else nf4
    start = time.perf_counter()
    coded = {name: codec(weight) for name, weight in linears.items()}
    seconds = time.perf_counter() - start
    hand_back(
        assignment,
        {name: decoded for name, (decoded, _, _) in coded.items()},
        seconds=seconds,
        stored=sum(stored for _, stored, _ in coded.values()) + others,
        version=f"bitsandbytes {version('bitsandbytes')}",
        started_with=started_with,
        notes=[
            "stored_bytes is counted from what its state dictionaries hold, no file was written",
            f"{sum(tables for _, _, tables in coded.values())} of them are tables of constants",
        ],
    )


def nf4(weight: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """As Params4bit quantizes and stores a weight with `compress_statistics`."""
    codes, state = bnb.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    stored = state.as_dict(packed=True)
    tables = stored["quant_map"].nbytes + stored["nested_quant_map"].nbytes
    total = codes.nbytes + sum(tensor.nbytes for tensor in stored.values())
    return bnb.dequantize_4bit(codes, state), total, tables


def int8(weight: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """As Int8Params does it, which goes by way of FP16; it adds one byte to name its layout."""
    codes, scales, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
    return bnb.int8_vectorwise_dequant(codes, scales), codes.nbytes + scales.nbytes + 1, 0


def split(source: Path) -> tuple[dict[str, torch.Tensor], int]:
    """The feed-forward weights [out, in] by their names, and the bytes of all other tensors."""
    linears: dict[str, torch.Tensor] = {}
    others = 0
    for file in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            found = dict(matrices(name, tensor))
            linears |= found
            others += 0 if found else tensor.nbytes
    return linears, others


def matrices(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The linears in a tensor of the source: an expert's each, one, or none."""
    stem, _, leaf = name.rpartition(".")
    if leaf in ("gate_up_proj", "down_proj") and stem.endswith(".experts"):
        parts = ("gate", "up") if leaf == "gate_up_proj" else ("down",)
        for expert, weight in enumerate(tensor):
            for part, half in zip(parts, weight.chunk(len(parts), dim=1), strict=True):
                yield f"{stem}.{expert}.{part}_proj.weight", half.T.contiguous()
    elif QUANTIZED.search(name):
        yield name, tensor


if __name__ == "__main__":
    main()
