"""GPTQ by GPTQModel on the feed-forward weights of a Llama 4: its own pipeline, or only its solver.

Mode "" is GPTQModel's pipeline: it loads, calibrates, quantizes and saves, and this file only reads
what it saved. Mode "solver" is *not* its pipeline: its GPTQ class, its packing and its decoding are
used, once per linear, and this file feeds them, one layer after the other, with the stream of the
layers quantized before. An expert then sees the rows that the router sends to it and no others; the
pipeline feeds every expert all rows, those of other experts as zeros.

All else is at GPTQModel's own defaults for Llama 4. What is asked for and where the result goes is
in common.py; how good the result is, is not known here.
"""

from __future__ import annotations

import copy
import csv
import os
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from common import QUANTIZED, Assignment, hand_back, peak_bytes, stored_bytes
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import FORMAT, GPTQ
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from gptqmodel.version import __version__
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts, Llama4TextMoe

VERSION = f"GPTQModel {__version__}, transformers {transformers.__version__}"
EXCLUDED = {r"-:.*\.self_attn\..*": {}}  # of the linears of its module tree for Llama 4
PACKED = ("qweight", "qzeros", "scales", "g_idx")
Tensors = dict[str, torch.Tensor]


def main() -> None:
    assignment = Assignment.read(sys.argv[1])
    started_with = peak_bytes()
    torch.manual_seed(assignment.seed)
    notes: list[str] = []
    saved = assignment.work / "saved"
    start = time.perf_counter()
    if assignment.mode == "":
        run_pipeline(assignment, saved, notes)
    elif assignment.mode == "solver":
        run_solver(assignment, saved, notes)
    else:
        sys.exit(f"unknown mode {assignment.mode!r}, choose '' or 'solver'")
    seconds = time.perf_counter() - start
    decoded = decode_folder(assignment, saved, notes)
    hand_back(
        assignment,
        decoded,
        seconds=seconds,
        stored=stored_bytes(saved),
        version=VERSION,
        started_with=started_with,
        notes=notes,
    )


def its_config(assignment: Assignment) -> QuantizeConfig:
    return QuantizeConfig(
        bits=assignment.bits,
        group_size=assignment.group,
        sym=True,
        dynamic=dict(EXCLUDED),
        offload_to_disk_path=str(assignment.work / "offload"),
    )


# The pipeline


def run_pipeline(assignment: Assignment, saved: Path, notes: list[str]) -> None:
    allow_few_cores(notes)
    name_layout(assignment.source, notes)
    calibration = [
        {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]}
        for row in assignment.calibration()
    ]
    try:
        model = GPTQModel.load(str(assignment.source), its_config(assignment))
        model.quantize(calibration, batch_size=1)
        model.save(str(saved))
    except Exception as error:
        traceback.print_exc()
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        message = " ".join(str(error).split())
        sys.exit(f"GPTQModel {__version__}: {type(error).__name__} in {where}: {message}")
    read_log(saved / "quant_log.csv", assignment.calibration().numel(), notes)


def allow_few_cores(notes: list[str]) -> None:
    """With one or two cores GPTQModel's default is one worker, and then its loader wants two."""
    if (os.cpu_count() or 1) < 3 and "GPTQMODEL_CPU_WORKERS" not in os.environ:
        os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
        notes.append("GPTQMODEL_CPU_WORKERS=2: its default refuses to run on two cores")


def name_layout(source: Path, notes: list[str]) -> None:
    """Tell Defuser, which splits the experts, that they are stored as [E, in, out].

    Untold it infers so from in < out in gate_up_proj (defuser 0.0.28, moe_experts_interface.py),
    which holds for Scout and Maverick, but not where an expert is at most half as wide as the
    model; and of square weights GPTQModel's loader takes the first reading whose shape fits."""
    Llama4TextExperts.is_transposed = True
    text = transformers.AutoConfig.from_pretrained(source).text_config
    width, expert = text.hidden_size, text.intermediate_size
    if text.moe_layers and (width >= 2 * expert or width == expert):
        notes.append("told its loader the layout of the experts, which it misreads at these widths")


def read_log(file: Path, tokens: int, notes: list[str]) -> None:
    """Note which linears were not solved as asked for."""
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    experts = [row for row in rows if ".experts." in row["module"]]
    if experts and all(int(row["samples"]) == tokens for row in experts):
        notes.append(f"each expert was fed all {tokens} rows, those of other experts as zeros")
    fallback = [row for row in rows if "fallback" in row["loss"]]
    if fallback:
        notes.append(f"{len(fallback)} of {len(rows)} linears by its round-to-nearest fallback")
    raised = [row for row in rows if row not in fallback and float(row["damp"]) > 0.05]
    if raised:
        notes.append(f"{len(raised)} of {len(rows)} linears with more damping than its default")


# Its solver alone


@torch.no_grad()
def run_solver(assignment: Assignment, saved: Path, notes: list[str]) -> None:
    notes.append("its solver, packing and decoding, fed by this worker: not its pipeline")
    model = AutoModelForImageTextToText.from_pretrained(assignment.source, dtype=torch.bfloat16)
    text = model.eval().language_model.model
    tokens = assignment.calibration()
    prefix = "language_model.model.layers"
    linears = Linears(its_config(assignment), tokens.numel())
    streams = [text.embed_tokens(row[None]) for row in tokens]
    extras = layer_arguments(text, tokens[:1])
    for index, (layer, extra) in enumerate(zip(text.layers, extras, strict=True)):
        inputs = feed_forward_inputs(layer, extra, streams)
        solve_feed_forward(linears, f"{prefix}.{index}.feed_forward", layer.feed_forward, inputs)
        streams = [layer(stream, **extra) for stream in streams]
        print(f"layer {index + 1} of {len(text.layers)}", flush=True)
    if linears.fallbacks:
        notes.append(
            f"{linears.fallbacks} of {linears.count} linears by its round-to-nearest fallback"
        )
    saved.mkdir(parents=True)
    untouched = {name: tensor for name, tensor in read(assignment.source) if not is_ffn(name)}
    save_file(untouched | linears.packed, str(saved / "model.safetensors"))


def layer_arguments(text: Any, tokens: torch.Tensor) -> list[dict[str, Any]]:
    """What each layer is called with beside the stream; alike for all sequences of one length."""
    caught: list[dict[str, Any]] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _module, _arguments, named: caught.append(named), with_kwargs=True
        )
        for layer in text.layers
    ]
    text(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return caught


def feed_forward_inputs(
    layer: Any, extra: dict[str, Any], streams: list[torch.Tensor]
) -> list[torch.Tensor]:
    """One [T, hidden] per sequence."""
    caught: list[torch.Tensor] = []
    hook = layer.feed_forward.register_forward_pre_hook(
        lambda _module, arguments: caught.append(arguments[0].flatten(0, -2))
    )
    for stream in streams:
        layer(stream, **extra)
    hook.remove()
    return caught


def solve_feed_forward(
    linears: Linears, name: str, module: Any, inputs: list[torch.Tensor]
) -> None:
    """Replace the weights of a dense or a routed feed-forward by what their codes decode to."""
    if not isinstance(module, Llama4TextMoe):
        solve_dense(linears, name, module, inputs)
        return
    solve_dense(linears, f"{name}.shared_expert", module.shared_expert, inputs)
    scores = [module.router(rows)[0] for rows in inputs]
    experts = module.experts
    for expert in range(experts.num_experts):
        routed = [
            (rows * score[:, expert, None])[score[:, expert] != 0]
            for rows, score in zip(inputs, scores, strict=True)
        ]
        gate, up = experts.gate_up_proj[expert].T.chunk(2)
        down = experts.down_proj[expert].T
        stem = f"{name}.experts.{expert}"
        gate, up, down = solve_swiglu(linears, stem, (gate, up, down), experts.act_fn, routed)
        experts.gate_up_proj[expert] = torch.cat([gate, up]).T
        experts.down_proj[expert] = down.T


def solve_dense(linears: Linears, name: str, module: Any, inputs: list[torch.Tensor]) -> None:
    parts = (module.gate_proj, module.up_proj, module.down_proj)
    weights = tuple(part.weight for part in parts)
    solved = solve_swiglu(linears, name, weights, module.activation_fn, inputs)
    for part, weight in zip(parts, solved, strict=True):
        part.weight.copy_(weight)


def solve_swiglu(
    linears: Linears,
    name: str,
    weights: tuple[torch.Tensor, ...],
    activation: Any,
    inputs: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gate and up first, then down on what the quantized two give: its true_sequential."""
    gate = linears.solve(f"{name}.gate_proj", weights[0], inputs)
    up = linears.solve(f"{name}.up_proj", weights[1], inputs)
    inner = [activation(rows @ gate.T) * (rows @ up.T) for rows in inputs]
    return gate, up, linears.solve(f"{name}.down_proj", weights[2], inner)


class Linears:
    """GPTQModel's solver for one linear after the other; keeps what it packed."""

    def __init__(self, config: QuantizeConfig, tokens: int) -> None:
        self.config = config
        self.tokens = tokens  # what its threshold for the fallback is a share of
        self.packed: Tensors = {}
        self.count = 0
        self.fallbacks = 0

    def solve(
        self, name: str, weight: torch.Tensor, inputs: Iterable[torch.Tensor]
    ) -> torch.Tensor:
        """The decoded `[out, in]` weight in BF16, from `inputs` of `[rows, in]`."""
        rows_out, columns = weight.shape
        linear = torch.nn.Linear(columns, rows_out, bias=False, dtype=weight.dtype)
        linear.weight.data.copy_(weight)
        solver = GPTQ(linear, copy.deepcopy(self.config))
        solver.expected_nsamples = self.tokens
        solver.quantizer.configure(perchannel=True)
        for rows in inputs:
            if len(rows):
                solver.add_batch(rows, None)
        linear.weight.data, scales, zeros, groups, _, loss, *_ = solver.quantize()
        self.count += 1
        self.fallbacks += isinstance(loss, str)  # it has a figure only where it solved
        kernel = its_kernel(self.config.bits, self.config.group_size, columns, rows_out)
        kernel.pack_original(linear, scales, zeros, groups)
        packed = {part: getattr(kernel, part).contiguous() for part in PACKED}
        self.packed |= {f"{name}.{part}": tensor.clone() for part, tensor in packed.items()}
        return decode(self.config.bits, self.config.group_size, packed, False).to(weight.dtype)


# From its format


def decode_folder(assignment: Assignment, saved: Path, notes: list[str]) -> Tensors:
    stored = dict(read(saved))
    first = (
        assignment.mode == ""
    )  # the pipeline writes format v1, in which a zero point is less one
    decoded: Tensors = {}
    for name in [name for name in stored if name.endswith(".qweight")]:
        stem = name.removesuffix(".qweight")
        packed = {part: stored[f"{stem}.{part}"] for part in PACKED}
        decoded[f"{stem}.weight"] = decode(assignment.bits, assignment.group, packed, first)
    zeroed = [name for name, weight in decoded.items() if not weight.any()]
    if zeroed:
        notes.append(f"{len(zeroed)} of {len(decoded)} linears are all zero, such as {zeroed[0]}")
    left = {name: tensor for name, tensor in stored.items() if is_ffn(name)}
    if left:
        notes.append(f"{len(left)} linears left in BF16, such as {next(iter(left))}")
    return decoded | left


def decode(bits: int, group: int, packed: Tensors, first_format: bool) -> torch.Tensor:
    """GPTQModel's decoding, to `[out, in]`."""
    columns, rows_out = len(packed["g_idx"]), packed["scales"].shape[1]
    kernel = its_kernel(bits, group, columns, rows_out)
    for part, tensor in packed.items():
        kernel.register_buffer(part, tensor.clone())
    if first_format:
        convert_gptq_v1_to_v2_format_module(kernel, bits, torch.int32)
    # No post_init(): it compiles every single kernel, which takes longer than to decode with it.
    kernel.scales = kernel.scales.float()  # else the products are rounded to FP16, and then to BF16
    return kernel.dequantize_weight().T.contiguous()


def its_kernel(bits: int, group: int, columns: int, rows_out: int) -> TorchLinear:
    return TorchLinear(
        bits=bits,
        group_size=group,
        sym=True,
        desc_act=False,
        in_features=columns,
        out_features=rows_out,
        format=FORMAT.GPTQ_V2,
    )


def read(folder: Path) -> Iterable[tuple[str, torch.Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        yield from load_file(str(file)).items()


def is_ffn(name: str) -> bool:
    """Whether it is a tensor of feed-forward weights, fused or not."""
    fused = (".experts.gate_up_proj", ".experts.down_proj")
    return QUANTIZED.search(name) is not None or name.endswith(fused)


if __name__ == "__main__":
    main()
