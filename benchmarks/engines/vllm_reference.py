"""vLLM's own loader with plain arithmetic behind it: llama4q's schemes served on any CPU.

`install()` leaves vLLM's configuration parsing, target matching, parameter creation, name mapping
and weight loading untouched. It replaces the choice of kernels, which on a CPU refuses most
schemes, and what happens after loading: the parameters that vLLM filled are dequantized to BF16
and handed to vLLM's unquantized CPU path. Before loading, every parameter of the model is poisoned,
so that whatever the checkpoint left unset (even one expert of a stack) is found: vLLM itself does
not look in quantized checkpoints. The bits of what was loaded are noted for comparison, because a
single misread expert moves too few tokens to stand out in their distributions.

Written for vLLM 0.32. It knows INT4 and INT8 by group or channel and FP8 by channel; activations
are NOT quantized, so compare with a weight-only reference.
"""

from collections.abc import Iterator
from typing import Any

import torch
from dequantize import digest
from torch.nn import Module, Parameter
from torch.nn.functional import linear

UNSET: list[str] = []  # "parameter: how much of it no tensor of the checkpoint has set"
DIGESTS: dict[str, str] = {}  # what vLLM loaded, dequantized, under the checkpoint's names

NOT_A_NUMBER_FP8 = 0x7F
UNLIKELY_WORD = 0x5A5A5A5A


def install() -> None:
    watch_loading()
    replace_linears()
    replace_experts()


# --- what the checkpoint left unset ---------------------------------------------------------


def watch_loading() -> None:
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    load_weights = DefaultModelLoader.load_weights

    def watched(self: Any, model: Module, model_config: Any) -> None:
        parameters = parameters_of_the_checkpoint(model)
        for parameter in parameters.values():
            poison(parameter.data)
        load_weights(self, model, model_config)
        for name, parameter in parameters.items():
            UNSET.extend(what_is_unset(name, parameter.data))
        if UNSET:
            raise ValueError(f"{len(UNSET)} parameters not set by the checkpoint: {UNSET[0]}")
        for name, weight in loaded_weights(model):
            DIGESTS[name] = digest(weight)

    DefaultModelLoader.load_weights = watched


def parameters_of_the_checkpoint(model: Module) -> dict[str, Parameter]:
    """All but the scales of a quantized KV cache: vLLM has defaults if a checkpoint has none."""
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

    return {
        f"{prefix}.{name}": parameter
        for prefix, module in model.named_modules()
        if not isinstance(getattr(module, "quant_method", None), BaseKVCacheMethod)
        for name, parameter in module.named_parameters(recurse=False)
    }


def poison(data: torch.Tensor) -> None:
    if data.dtype == torch.float8_e4m3fn:
        data.view(torch.uint8).fill_(NOT_A_NUMBER_FP8)
    elif data.is_floating_point():
        data.fill_(float("nan"))
    else:
        data.fill_(UNLIKELY_WORD)


def poisoned(data: torch.Tensor) -> torch.Tensor:
    if data.dtype == torch.float8_e4m3fn:
        return torch.eq(data.view(torch.uint8), NOT_A_NUMBER_FP8)
    return data.isnan() if data.is_floating_point() else torch.eq(data, UNLIKELY_WORD)


def what_is_unset(name: str, data: torch.Tensor) -> list[str]:
    """Nothing, or one line; experts are stacked in the first dimension and named by number."""
    mask = poisoned(data)
    if not mask.any():
        return []
    line = f"{name}: {int(mask.sum())} of {mask.numel()} values"
    if ".experts." in name:
        experts = mask.flatten(1).any(dim=1).nonzero().flatten().tolist()
        line += f", experts {experts}"
    return [line]


# --- what was loaded ------------------------------------------------------------------------


def loaded_weights(model: Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Dequantized weights of vLLM's layers, taken apart into the checkpoint's.

    Not q, k and v: vLLM permutes their rows. They move every token's distribution if misread."""
    for name, module in model.named_modules():
        if name.endswith(".routed_experts"):
            yield from expert_weights(name.removesuffix(".routed_experts"), module)
        elif name.endswith(".gate_up_proj"):
            gate, up = weight_of(module, "").chunk(2)
            yield f"{name.removesuffix('gate_up_proj')}gate_proj.weight", gate
            yield f"{name.removesuffix('gate_up_proj')}up_proj.weight", up
        elif name.endswith((".down_proj", ".o_proj", ".router", "layernorm")):
            yield f"{name}.weight", weight_of(module, "")


def expert_weights(name: str, module: Module) -> Iterator[tuple[str, torch.Tensor]]:
    gates_and_ups, downs = weight_of(module, "w13_"), weight_of(module, "w2_")
    for expert, (gate_and_up, down) in enumerate(zip(gates_and_ups, downs, strict=True)):
        gate, up = gate_and_up.chunk(2)
        yield f"{name}.{expert}.gate_proj.weight", gate
        yield f"{name}.{expert}.up_proj.weight", up
        yield f"{name}.{expert}.down_proj.weight", down


def weight_of(module: Any, prefix: str) -> torch.Tensor:
    """A module's weight as BF16, whatever its scheme."""
    if not hasattr(module, f"{prefix}weight_scale"):
        unquantized: torch.Tensor = getattr(module, f"{prefix}weight").data
        return unquantized
    method = getattr(module, "scheme", None) or module.quant_method
    return dequantized(module, prefix, getattr(method, "num_bits", 8))


# --- Linears --------------------------------------------------------------------------------


def replace_linears() -> None:
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_w8a8_fp8 as fp8,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_wNa16 as packed,
    )

    packed.choose_mp_linear_kernel = lambda *_, **__: NoKernel
    fp8.init_fp8_linear_kernel = lambda *_, **__: NoKernel()
    fp8.expose_input_quant_key = lambda *_, **__: None

    def after_loading(self: Any, layer: Any) -> None:
        weight = weight_of(layer, "")
        for name in [name for name, _ in layer.named_parameters(recurse=False) if name != "bias"]:
            delattr(layer, name)
        layer.weight = Parameter(weight, requires_grad=False)

    method = compressed_tensors.CompressedTensorsLinearMethod
    method.process_weights_after_loading = after_loading
    method.apply = lambda self, layer, x, bias=None: linear(x, layer.weight, bias)


class NoKernel:
    """Stands where a scheme keeps its kernel; nobody calls it."""

    def __init__(self, *_: Any, **__: Any) -> None: ...


# --- experts --------------------------------------------------------------------------------


def replace_experts() -> None:
    from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w8a8_fp8 as fp8,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as packed,
    )

    packed.select_wna16_moe_backend = lambda *_, **__: (WNA16MoEBackend.MARLIN, None)
    fp8.select_fp8_moe_backend = lambda *_, **__: (None, None)
    for method in (
        packed.CompressedTensorsWNA16MoEMethod,
        fp8.CompressedTensorsW8A8Fp8MoEMethod,
    ):
        method.process_weights_after_loading = experts_after_loading
        method.apply = lambda self, *positional, **named: self.plain.apply(*positional, **named)
        method.get_fused_moe_quant_config = lambda self, layer: self.plain.moe_quant_config


def experts_after_loading(self: Any, layer: Any) -> None:
    """Dequantize a stack of experts and let vLLM's unquantized method have it."""
    from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod

    weights = {name: weight_of(layer, name) for name in ("w13_", "w2_")}
    for name, _ in list(layer.named_parameters(recurse=False)):
        delattr(layer, name)
    for name, weight in weights.items():
        layer.register_parameter(f"{name}weight", Parameter(weight, requires_grad=False))
    self.plain = UnquantizedFusedMoEMethod(layer.moe_config)
    self.plain.process_weights_after_loading(layer)
    self.moe_kernel = self.plain.moe_kernel
    self.moe_quant_config = self.plain.moe_quant_config


# --- arithmetic -----------------------------------------------------------------------------


def dequantized(layer: Any, prefix: str, bits: int) -> torch.Tensor:
    """BF16 weight [..., out, in] from a layer's parameters, which keep the checkpoint's layout."""
    packed = getattr(layer, f"{prefix}weight_packed", None)
    codes: torch.Tensor = (
        getattr(layer, f"{prefix}weight") if packed is None else unpack(packed, bits)
    )
    scale: torch.Tensor = getattr(layer, f"{prefix}weight_scale")
    if scale.ndim != codes.ndim or scale.shape[:-1] != codes.shape[:-1]:
        raise ValueError(f"scales {tuple(scale.shape)} for a weight {tuple(codes.shape)}")
    groups = codes.float().reshape(*scale.shape, -1) * scale.float().unsqueeze(-1)
    return groups.reshape(codes.shape).to(torch.bfloat16)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [..., in] of int32 words that hold code + 2^(bits-1), lowest bits first."""
    shifts = torch.arange(0, 32, bits)
    unsigned: torch.Tensor = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return unsigned.flatten(-2) - (1 << (bits - 1))
