"""Where a run computes, the host or one GPU, and how tensors from files get there.

Knows nothing of models or files.
"""

from __future__ import annotations

import os
from functools import cache

import torch

from .errors import UserError

HOST = torch.device("cpu")


def use_device(name: str | None, neighbour: int = 0) -> torch.device:
    """The device that `name` means, ready for a run: "cpu", "cuda" or "cuda:1"; None is a GPU where
    there is one, else the host. A GPU without a number is the one of process `neighbour` of those
    that share this machine.

    Raises UserError for one that is not there.
    """
    found = _found(name, neighbour)
    if found.type == "cuda":
        # Matrices of many sizes come and go; without this the gaps between them are lost.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(found)
        # F32 products are F32's here: factors have eigenvalues that TF32 would not see. BF16 ones
        # are summed in F32 from end to end.
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return found


def _found(name: str | None, neighbour: int) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda", neighbour % count) if count else HOST
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "cpu":
        return HOST
    if device.type != "cuda":
        raise UserError(f"device {name!r}: unknown; name cpu, cuda, or one of several as cuda:1")
    if not count:
        raise UserError(
            f"device {name!r}: PyTorch {torch.__version__} finds no GPU here; leave it out to "
            f"compute on the CPU, or install a build of PyTorch for the GPU's driver"
        )
    index = neighbour % count if device.index is None else device.index
    if index >= count:
        raise UserError(f"device {name!r}: {count} GPU here; name one below cuda:{count}")
    return torch.device("cuda", index)


def arrived(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on `device`; whichever thread waits for it, products go on beside it."""
    if device.type == "cpu":
        return tensor
    stream = _copies(device)
    with torch.cuda.stream(stream):
        found = tensor.to(device, non_blocking=True)
    stream.synchronize()
    # Its memory is this stream's; not to be used again before products have read it.
    found.record_stream(torch.cuda.default_stream(device))
    return found


@cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
