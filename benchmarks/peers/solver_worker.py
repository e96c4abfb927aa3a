"""One weight, solved by a peer's own functions from a ready Hessian: what its GPTQ alone costs.

    python solver_worker.py PEER FOLDER

Reads weight.npy `[in, out]` and hessian.npy `[in, in]` in FOLDER, writes found.npy, what the codes
decode to, and seconds.json: the processor time of scales and codes. INT4 in groups of 128, all else
at the peer's defaults, but for "llmcompressor-mse", its search for the least squared error of
scales. Runs in its peer's environment, where llama4q is not installed.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import torch

BITS, GROUP = 4, 128


Solve = Callable[[], torch.Tensor]


def by_llmcompressor(linear: torch.nn.Linear, hessian: torch.Tensor, observer: str) -> Solve:
    """What GPTQModifier.compress_module_list does with one module."""
    from compressed_tensors.quantization import (
        initialize_module_for_quantization,
        preset_name_to_scheme,
    )
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    from llmcompressor.modifiers.gptq.helpers import prepare_batch
    from llmcompressor.modifiers.quantization.calibration import initialize_observer, observe

    modifier = GPTQModifier(targets="Linear", scheme=f"W{BITS}A16")
    scheme = preset_name_to_scheme(f"W{BITS}A16", ["Linear"])
    scheme.weights.group_size = GROUP
    scheme.weights.observer = observer
    scheme.weights.actorder = "static"  # its modifier's default, which it resolves later
    initialize_module_for_quantization(linear, scheme)
    initialize_observer(linear, base_name="weight")

    def solve() -> torch.Tensor:
        observe(linear, "weight")
        weights, hessians, scales, zeros, whole = prepare_batch(
            [linear],
            [linear.weight_observer.get_qparams()],
            {linear: hessian},
            {linear: torch.ones(())},
        )
        found, _, fallback = quantize_weight(
            weights=weights,
            hessians=hessians,
            scale=scales,
            zero_point=zeros,
            global_scale=whole,
            quant_args=scheme.weights,
            blocksize=modifier.block_size,
            percdamp=modifier.dampening_frac,
        )
        assert not fallback.any()
        return found[0]

    return solve


def by_gptqmodel(linear: torch.nn.Linear, hessian: torch.Tensor) -> Solve:
    """Its GPTQ class, with the Hessian in the place where it would have gathered its own."""
    from gptqmodel import QuantizeConfig
    from gptqmodel.quantization import GPTQ

    solver = GPTQ(linear, QuantizeConfig(bits=BITS, group_size=GROUP, sym=True))
    solver.quantizer.configure(perchannel=True)
    solver.H = hessian
    solver.nsamples = solver.expected_nsamples = solver._hessian_total_samples = 1_000_000

    def solve() -> torch.Tensor:
        found, *_, loss = solver.quantize()[:6]
        assert not isinstance(loss, str), loss  # it has a figure only where it solved
        return found

    return solve


@torch.no_grad()
def main() -> None:
    peer, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    weight = torch.from_numpy(numpy.load(folder / "weight.npy"))
    hessian = torch.from_numpy(numpy.load(folder / "hessian.npy"))
    linear = torch.nn.Linear(*weight.shape, bias=False)
    linear.weight.copy_(weight.T)
    if peer == "gptqmodel":
        solve = by_gptqmodel(linear, hessian)
    else:
        mse = peer == "llmcompressor-mse"
        solve = by_llmcompressor(linear, hessian, "memoryless_mse" if mse else "memoryless_minmax")
    began = time.process_time()
    found = solve()
    seconds = time.process_time() - began
    numpy.save(folder / "found.npy", found.float().T.contiguous().numpy())
    (folder / "seconds.json").write_text(json.dumps(seconds))


if __name__ == "__main__":
    main()
