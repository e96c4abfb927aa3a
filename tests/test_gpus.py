"""llama4q.gpus: what CUDA reports, by public logs, and vLLM's defaults on them."""

from __future__ import annotations

import pytest

from llama4q.errors import UserError
from llama4q.gpus import DEVICES, GIB, find_device, memory_bytes


def test_devices_are_below_what_nvidia_smi_shows() -> None:
    """CUDA reports 0.4 to 1 GiB less than nvidia-smi's total (public logs), and never more."""
    nvidia_smi_mib = {
        "h100-80gb": 81559, "h100-nvl-94gb": 95830, "h200-141gb": 143771, "a100-80gb": 81920,
        "a100-40gb": 40960, "l40s-48gb": 46068, "b200-192gb": 183359,
        "rtx-pro-6000-96gb": 97887, "rtx6000-ada-48gb": 46068, "rtx4090-24gb": 24564,
        "rtx5090-32gb": 32607,
    }  # fmt: skip
    assert DEVICES.keys() == nvidia_smi_mib.keys()
    for name, mib in nvidia_smi_mib.items():
        assert 0.4 < mib / 1024 - DEVICES[name].total_bytes / GIB < 1


def test_default_batches_are_vllms() -> None:
    """`vllm serve` in vLLM 0.32: 8192 from 70 GiB, 16384 from 160 GiB, 2048 below and on A100."""
    assert {name: device.default_batched_tokens for name, device in DEVICES.items()} == {
        "h100-80gb": 8192, "h100-nvl-94gb": 8192, "h200-141gb": 8192, "a100-80gb": 2048,
        "a100-40gb": 2048, "l40s-48gb": 2048, "b200-192gb": 16384, "rtx-pro-6000-96gb": 8192,
        "rtx6000-ada-48gb": 2048, "rtx4090-24gb": 2048, "rtx5090-32gb": 2048,
    }  # fmt: skip


def test_find_device_names_the_nearest() -> None:
    assert find_device("H100-80GB") is DEVICES["h100-80gb"]
    nearest = r"'h100-80'; did you mean 'h100-80gb' or 'a100-80gb' or '.*'\?.*b200-192gb"
    with pytest.raises(UserError, match=nearest):
        find_device("h100-80")
    with pytest.raises(UserError, match=r"unknown GPU 'zzz'; known are h100-80gb"):
        find_device("zzz")


def test_memory_bytes() -> None:
    assert memory_bytes("80GB") == 80 * 10**9
    assert memory_bytes(" 80 gib ") == 80 * 2**30
    assert memory_bytes("79.1GiB") == int(79.1 * 2**30)
    assert memory_bytes("81559MiB") == 81559 * 2**20
    for text in ("80", "80 GB free", "GB", "-1GB", "0GB", "80XB", "1e3GB", ""):
        with pytest.raises(UserError, match="as in 80GB"):
            memory_bytes(text)
