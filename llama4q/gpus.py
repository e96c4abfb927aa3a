"""GPUs by name, and how much memory an engine finds on them. Knows no models or plans."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from decimal import Decimal

from .errors import UserError

GIB = 2**30
UNITS = {
    "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


@dataclass(frozen=True)
class Device:
    """One GPU; `total_bytes` is what CUDA reports (`torch.cuda.mem_get_info`)."""

    name: str
    total_bytes: int

    @property
    def default_batched_tokens(self) -> int:
        """`vllm serve`'s max_num_batched_tokens here. Source: vLLM 0.32 `engine/arg_utils.py`."""
        if self.total_bytes >= 160 * GIB:
            return 16384
        return 8192 if self.total_bytes >= 70 * GIB and "a100" not in self.name else 2048


# GiB that CUDA reports to a process, the number an engine multiplies with its utilization, as
# "total capacity" in public PyTorch logs. It is 0.5 to 0.8 GiB less than nvidia-smi's total (MiB,
# behind each), and moves by some 0.2 GiB with driver and ECC: the least number seen often is here.
_REPORTED_GIB = {
    "h100-80gb": 79.10,  # SXM and PCIe; up to 79.33; 81559
    "h100-nvl-94gb": 93.02,  # up to 93.11; 95830
    "h200-141gb": 139.72,  # SXM and NVL; up to 139.81; 143771
    "a100-80gb": 79.14,  # SXM and PCIe; up to 79.25; 81920
    "a100-40gb": 39.39,  # up to 39.59; 40960
    "l40s-48gb": 44.32,  # with ECC on; up to 44.53; 46068
    "b200-192gb": 178.35,  # up to 178.36; 183359
    "rtx-pro-6000-96gb": 94.97,  # Blackwell; 97887
    "rtx6000-ada-48gb": 44.43,  # with ECC on, which is how it comes; 46068
    "rtx4090-24gb": 23.52,  # up to 23.65, less what a display takes; 24564
    "rtx5090-32gb": 31.36,  # up to 31.40, less what a display takes; 32607
}
DEVICES = {name: Device(name, int(gib * GIB)) for name, gib in _REPORTED_GIB.items()}


def find_device(name: str) -> Device:
    """The known GPU of that name. Raises UserError with the nearest and all known names."""
    if name.lower() in DEVICES:
        return DEVICES[name.lower()]
    nearest = difflib.get_close_matches(name.lower(), DEVICES, n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(map(repr, nearest))}?" if nearest else ";"
    raise UserError(
        f"unknown GPU {name!r}{hint} known are {', '.join(DEVICES)}; "
        f"of any other GPU name the memory: fit --gpu-memory 80GB, quantize --fit 80GB"
    )


def device_of(text: str) -> Device:
    """A GPU by its name, or any other by its memory, as 80GB. Raises UserError for neither."""
    if text[:1].isdigit():
        return Device(text, memory_bytes(text))
    return find_device(text)


def memory_bytes(text: str) -> int:
    """Bytes of "80GB" (10^9), "79.1GiB" (2^30), "81559MiB". Raises UserError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", text.strip().lower())
    unit = UNITS.get(match[2].upper()) if match else None
    size = int(Decimal(match[1]) * unit) if match and unit else 0
    if not size:
        raise UserError(
            f"memory size {text!r}: give a number above 0 and a unit, as in 80GB or 79.1GiB"
        )
    return size
