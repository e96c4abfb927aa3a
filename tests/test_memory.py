"""llama4q.memory: blocks of the KV cache against vLLM's figures and a count layer by layer."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from llama4q.config import ModelConfig, parse_config
from llama4q.errors import UserError
from llama4q.memory import (
    DEVICES,
    GIB,
    RESERVED_BYTES,
    Device,
    KVDtype,
    MemoryPlan,
    Serving,
    find_device,
    kv_layout,
    make_plan,
    memory_bytes,
)
from llama4q.memory_table import render_plan

SCOUT = parse_config(
    {
        "model_type": "llama4_text", "vocab_size": 202048, "hidden_size": 5120,
        "intermediate_size": 8192, "intermediate_size_mlp": 16384, "num_hidden_layers": 48,
        "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
        "num_local_experts": 16, "attention_chunk_size": 8192, "max_position_embeddings": 10485760,
    },
    "scout",
)  # fmt: skip
H100 = DEVICES["h100-80gb"]
INT4_BYTES = 64_900_000_000  # Scout's experts and shared experts INT4, with vision


def roomy(config: ModelConfig, kv_bytes: int, **serving: Any) -> MemoryPlan:
    """A plan that leaves exactly `kv_bytes` for the KV cache."""
    device = Device("h100-like", kv_bytes + RESERVED_BYTES + 75 * GIB)
    return make_plan(config, 75 * GIB, device, Serving(**{"utilization": 1.0, **serving}))


@pytest.mark.parametrize(
    ("serving", "blocks", "request_blocks", "concurrency", "tokens"),
    [
        ({"context": 131072}, 27306, 12800, 2.13, 279613),
        ({"context": 131072, "kv_dtype": KVDtype.FP8}, 54613, 12800, 4.27, 559237),
        ({"context": 131072, "hybrid": False}, 6826, 8192, 0.83, 109216),
        ({"context": 10485760}, 27306, 659968, 0.04, 433845),
        ({"context": 4096}, 27306, 1024, 26.67, 109224),
        ({"context": 131072, "batched_tokens": 2048}, 27306, 10496, 2.60, 340992),
    ],
)
def test_scout_with_20_gib_left_against_vllms_own_functions(
    serving: dict[str, Any], blocks: int, request_blocks: int, concurrency: float, tokens: int
) -> None:
    """serving-contract.md 5(i): the closed form that equals vLLM 0.32's functions; `tokens` is the
    "KV cache size" that vLLM logs."""
    plan = roomy(SCOUT, 20 * GIB, **serving)
    assert (plan.kv_blocks, plan.request_blocks) == (blocks, request_blocks)
    assert round(plan.max_concurrency, 2) == concurrency
    assert int(plan.max_concurrency * plan.serving.context) == tokens


def test_tensor_parallel_blocks_against_vllms_own_functions() -> None:
    """serving-contract.md's seventh case: 40 GiB left on each of 8 cards, 1,048,576 tokens."""
    layout = kv_layout(SCOUT, H100, Serving(1048576), cards=8)
    assert layout.block_bytes == 8192 * 12
    assert (40 * GIB // layout.block_bytes, layout.blocks(1048576)) == (436906, 70144)
    one_head_each = kv_layout(SCOUT, H100, Serving(1048576), cards=16)
    assert one_head_each.block_bytes == layout.block_bytes  # a head cannot be halved


@pytest.mark.parametrize(
    ("whole", "chunked", "hybrid", "context", "blocks", "request_blocks", "largest"),
    [
        (3, 10, True, 1000, 1365, 179, 19968),  # 1 group and 4, the last one padded
        (12, 13, True, 1000, 315, 92, 4560),  # nearly as many: padded to 13
        (4, 6, True, 1000, 1024, 121, 15440),  # 1.5 times as many: not padded
        (10, 3, True, 1000, 1365, 281, 5328),
        (3, 10, False, 1000, 315, 63, 5024),
        (5, 0, True, 3000, 819, 188, 13088),
        (0, 5, True, 3000, 819, 29, 10485760),
        (0, 5, False, 3000, 819, 29, 10485760),  # nothing to unify: they stay chunked
    ],
)
def test_odd_patterns_against_vllms_own_functions(
    whole: int, chunked: int, hybrid: bool, context: int,
    blocks: int, request_blocks: int, largest: int,
) -> None:  # fmt: skip
    """Run in vLLM 0.32: get_kv_cache_groups, get_kv_cache_config_from_groups, get_kv_cache_capacity
    and _estimate_max_model_len_from_groups (null block off); 256 MiB, chunk 256, batches of 100."""
    config = replace(
        SCOUT,
        num_layers=whole + chunked,
        chunked_layers=frozenset(range(whole, whole + chunked)),
        chunk_size=256,
    )
    plan = roomy(config, 256 * 2**20, context=context, hybrid=hybrid, batched_tokens=100)
    assert (plan.kv_blocks, plan.request_blocks) == (blocks, request_blocks)
    assert plan.largest_context == largest


def test_bytes_of_a_token_against_the_contract() -> None:
    """4 KiB a token and layer in BF16: global layers 48 KiB without end, chunked ones 144 KiB up
    to the chunk and two batches; all layers in full 192 KiB."""
    plan = make_plan(SCOUT, 0, H100, Serving(131072))
    assert plan.kv_global_bytes == 131072 * 48 * 1024
    assert plan.kv_chunked_bytes == (8192 + 2 * 8192) * 144 * 1024
    full = make_plan(SCOUT, 0, H100, Serving(131072, hybrid=False))
    assert full.kv_bytes == 131072 * 192 * 1024 == 25_769_803_776  # design.md: 25.8 GB
    assert full.kv_global_bytes * 3 == full.kv_chunked_bytes


def random_config(rng: random.Random) -> ModelConfig:
    """Any pattern of chunked and global layers; dense-only, since experts keep no KV."""
    layers = rng.randint(1, 20)
    share = rng.choice([0, 0.2, 0.5, 0.75, 1])
    return replace(
        SCOUT,
        num_layers=layers,
        moe_layers=frozenset(),
        chunked_layers=frozenset(layer for layer in range(layers) if rng.random() < share),
        num_kv_heads=rng.choice([1, 2, 8]),
        head_dim=rng.choice([32, 128]),
        chunk_size=rng.choice([40, 256, 8192]),
        max_positions=4000,
    )


def dealt(config: ModelConfig, hybrid: bool) -> Iterator[list[str | None]]:
    """Layers dealt out to groups of one size by vLLM's rule, None where a place stays empty."""
    chunked = ["chunked"] * len(config.chunked_layers)
    whole = ["global"] * (config.num_layers - len(chunked))
    if not chunked or not whole or not hybrid:
        yield [*whole, *chunked]
        return
    fewer, more = sorted((len(whole), len(chunked)))
    size = more if more < 1.5 * fewer else fewer
    for kind in (whole, chunked):
        for start in range(0, len(kind), size):
            group: list[str | None] = list(kind[start : start + size])
            yield group + [None] * (size - len(group))


def slow_bytes(config: ModelConfig, serving: Serving, batched: int) -> dict[str, int]:
    """Every block of every layer on its own: the tokens that it can still need at the end of the
    prompt, while two batches are in flight."""
    one_token = 2 * config.head_dim * config.num_kv_heads * serving.kv_dtype.nbytes
    mixed = bool(config.chunked_layers) and len(config.chunked_layers) < config.num_layers
    found = {"global": 0, "chunked": 0}
    for group in dealt(config, serving.hybrid):
        kind = group[0]
        assert kind is not None
        tokens = range(serving.context)
        if kind == "chunked" and (serving.hybrid or not mixed):
            tokens = tokens[: config.chunk_size + batched + batched]
        for layer in group:
            found[layer or kind] += 16 * one_token * len({token // 16 for token in tokens})
    return found


def test_random_patterns_against_a_count_layer_by_layer() -> None:
    rng = random.Random(7)
    for _case in range(150):
        config = random_config(rng)
        serving = Serving(
            context=rng.randint(1, 2000),
            kv_dtype=rng.choice(list(KVDtype)),
            hybrid=rng.random() < 0.7,
            batched_tokens=rng.choice([1, 50, 300]),
        )
        plan = make_plan(config, 10**9, H100, serving)
        assert serving.batched_tokens is not None
        slow = slow_bytes(config, serving, serving.batched_tokens)
        assert (plan.kv_global_bytes, plan.kv_chunked_bytes) == (slow["global"], slow["chunked"])


def test_the_largest_context_fits_and_one_token_more_does_not() -> None:
    rng = random.Random(8)
    bounded = 0
    for _case in range(150):
        config = random_config(rng)
        changes = {"hybrid": rng.random() < 0.7, "batched_tokens": rng.choice([1, 50, 300])}
        kv_bytes = rng.randint(0, 2 ** rng.randint(20, 28))
        plan = roomy(config, kv_bytes, context=rng.randint(1, 4000), **changes)
        largest = plan.largest_context
        assert plan.fits is (plan.serving.context <= largest)
        if largest:
            assert roomy(config, kv_bytes, context=largest, **changes).fits
        if largest < config.max_positions:
            bounded += 1
            assert largest % 16 == 0
            assert not roomy(config, kv_bytes, context=largest + 1, **changes).fits
    assert bounded > 50


def test_one_block_stays_back_as_in_vllm() -> None:
    """vLLM's pool keeps a null block: it refuses to start when a request needs all blocks."""
    block = 12 * 64 * 1024
    enough = roomy(SCOUT, 1025 * block, context=4096)
    assert (enough.request_blocks, enough.fits, enough.short_bytes) == (1024, True, 0)
    assert enough.total_bytes == enough.usable_bytes
    assert enough.largest_context == 4096
    short = roomy(SCOUT, 1025 * block - 1, context=4096)
    assert (short.fits, short.short_bytes, short.largest_context) == (False, 1, 4080)


def test_largest_context_never_falls_with_utilization() -> None:
    plans = [
        make_plan(SCOUT, INT4_BYTES, H100, Serving(8192, utilization=percent / 100))
        for percent in range(1, 101)
    ]
    contexts = [plan.largest_context for plan in plans]
    assert contexts == sorted(contexts)
    assert contexts[0] == 0
    assert make_plan(SCOUT, 0, Device("tiny", 101), Serving(1)).usable_bytes == 93  # rounded up


def test_every_option_changes_the_plan() -> None:
    base = Serving(131072)
    changes: list[dict[str, Any]] = [
        {"context": 65536}, {"kv_dtype": KVDtype.FP8}, {"hybrid": False},
        {"batched_tokens": 2048}, {"utilization": 0.8},
    ]  # fmt: skip
    before = make_plan(SCOUT, INT4_BYTES, H100, base)
    for change in changes:
        after = make_plan(SCOUT, INT4_BYTES, H100, replace(base, **change))
        assert (after.total_bytes, after.usable_bytes) != (before.total_bytes, before.usable_bytes)
    larger = make_plan(SCOUT, INT4_BYTES, DEVICES["h200-141gb"], base)
    assert larger.largest_context > before.largest_context


def test_the_models_own_limit_ends_the_largest_context() -> None:
    config = replace(SCOUT, max_positions=5001)
    assert make_plan(config, 10**9, H100, Serving(1)).largest_context == 5001


def test_truthful_no_on_one_80_gb_card() -> None:
    """design.md: FP8 Scout and 4-bit Maverick do not fit; INT4 Scout does."""
    fp8 = make_plan(SCOUT, 111_600_000_000, H100, Serving(8192))
    assert (fp8.fits, fp8.largest_context) == (False, 0)
    assert "2 cards (--tensor-parallel-size 2)" in fp8.remedies
    maverick = make_plan(SCOUT, 216_000_000_000, H100, Serving(8192))
    assert not maverick.fits
    assert "4 cards (--tensor-parallel-size 4)" in maverick.remedies
    assert make_plan(SCOUT, INT4_BYTES, H100, Serving(8192)).fits
    huge = make_plan(SCOUT, 10**12, H100, Serving(8192))
    assert "more than 8 cards" in huge.remedies
    small = make_plan(SCOUT, 10**9, Device("4GB", 4 * 10**9), Serving(8192))
    assert small.remedies == ("a larger GPU",)  # no engine starts here


def test_every_remedy_is_one() -> None:
    """What `remedies` names, done, fits."""
    serving = Serving(131072, hybrid=False)
    plan = make_plan(SCOUT, INT4_BYTES - 6 * 10**9, H100, serving)
    assert [words.split(" (")[0] for words in plan.remedies] == [
        "the hybrid KV cache manager",
        "an FP8 KV cache",
        f"a context of at most {plan.largest_context:,} tokens",
        "2 cards",
        plan.remedies[-1],
    ]
    budget = int(float(plan.remedies[-1].split()[5]) * 1e9)
    for weights, changed in [
        (plan.weight_bytes, replace(serving, hybrid=True)),
        (plan.weight_bytes, replace(serving, kv_dtype=KVDtype.FP8)),
        (plan.weight_bytes, replace(serving, context=plan.largest_context)),
        (budget, serving),
    ]:
        assert make_plan(SCOUT, weights, H100, changed).fits
    assert not make_plan(SCOUT, budget + 2 * 10**7, H100, serving).fits
    share = make_plan(SCOUT, INT4_BYTES, H100, Serving(131072)).remedies[1]
    assert share == "a larger share of the GPU (--gpu-memory-utilization 0.95)"
    assert make_plan(SCOUT, INT4_BYTES, H100, Serving(131072, utilization=0.95)).fits
    assert not make_plan(SCOUT, INT4_BYTES, H100, Serving(131072, utilization=0.94)).fits


def test_smaller_batches_and_fp8_together_are_proposed_when_neither_does() -> None:
    def proposed(blocks: int) -> list[str]:
        remedies = roomy(SCOUT, blocks * 12 * 64 * 1024, context=131072).remedies
        return [words.split(" (")[0] for words in remedies[:2]]

    assert proposed(10497) == ["smaller batches", "an FP8 KV cache"]
    assert proposed(10496)[0] == "an FP8 KV cache"
    assert proposed(5249)[0] == "both"
    assert proposed(5248)[0].startswith("a context")


def test_cards_divide_the_heads() -> None:
    """vLLM refuses a tensor parallel size that the heads do not divide by."""
    five = replace(SCOUT, num_heads=10, num_kv_heads=10)
    assert "more than 2 cards" in make_plan(five, 216 * 10**9, H100, Serving(16)).remedies


def test_devices_are_below_what_nvidia_smi_shows() -> None:
    """CUDA reports 0.4 to 1 GiB less than nvidia-smi's total (public logs), and never more."""
    nvidia_smi_mib = {
        "h100-80gb": 81559, "h100-nvl-94gb": 95830, "h200-141gb": 143771, "a100-80gb": 81920,
        "a100-40gb": 40960, "l40s-48gb": 46068, "b200-192gb": 183359,
        "rtx-pro-6000-96gb": 97887, "rtx4090-24gb": 24564, "rtx5090-32gb": 32607,
    }  # fmt: skip
    assert DEVICES.keys() == nvidia_smi_mib.keys()
    for name, mib in nvidia_smi_mib.items():
        assert 0.4 < mib / 1024 - DEVICES[name].total_bytes / GIB < 1


def test_default_batches_are_vllms() -> None:
    """`vllm serve` in vLLM 0.32: 8192 from 70 GiB, 16384 from 160 GiB, 2048 below and on A100."""
    assert {name: device.default_batched_tokens for name, device in DEVICES.items()} == {
        "h100-80gb": 8192, "h100-nvl-94gb": 8192, "h200-141gb": 8192, "a100-80gb": 2048,
        "a100-40gb": 2048, "l40s-48gb": 2048, "b200-192gb": 16384, "rtx-pro-6000-96gb": 8192,
        "rtx4090-24gb": 2048, "rtx5090-32gb": 2048,
    }  # fmt: skip


def test_find_device_names_the_nearest() -> None:
    assert find_device("H100-80GB") is H100
    with pytest.raises(UserError, match=r"'h100-80'; did you mean 'h100-80gb'\?.*b200-192gb"):
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


@pytest.mark.parametrize(
    ("serving", "message"),
    [
        ({"context": 0}, "context 0"),
        ({"context": 16, "batched_tokens": 0}, "batched tokens 0"),
        ({"context": 16, "utilization": 0.0}, "utilization 0.0"),
        ({"context": 16, "utilization": 92.0}, "utilization 92.0"),
    ],
)
def test_settings_that_no_engine_takes_are_refused(serving: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Serving(**serving)


def test_a_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(UserError, match=r"10,485,761.*10,485,760 positions"):
        make_plan(SCOUT, INT4_BYTES, H100, Serving(10485761))


def test_table_of_a_plan_that_fits() -> None:
    lines = render_plan(make_plan(SCOUT, INT4_BYTES, H100, Serving(8192))).splitlines()
    assert [line[:24].strip() for line in lines[:-1]] == [
        "", "weights", "KV cache, global layers", "KV cache, chunked layers", "workspace",
        "overhead", "total", "usable",
    ]  # fmt: skip
    numbers = [float(line[24:35]) for line in lines[1:-1]]
    assert numbers[0] == 64.9
    assert numbers[5] == pytest.approx(sum(numbers[:5]), abs=0.003)
    assert numbers[6] == pytest.approx(0.92 * 79.10 * 2**30 / 1e9, abs=0.001)
    assert lines[-1] == (
        "fits: yes, largest context 86,352 tokens; 4.89 requests of 8,192 tokens at once"
    )


def test_table_of_a_plan_that_does_not_fit() -> None:
    plan = make_plan(SCOUT, 111_600_000_000, H100, Serving(8192, hybrid=False))
    assert "without the hybrid manager" in render_plan(plan)
    last = render_plan(plan).splitlines()[-1]
    assert last.startswith(f"fits: no, short by {plan.short_bytes / 1e9:.2f}"[:-1])
    assert last.endswith(" | ".join(plan.remedies))
    one_byte = roomy(SCOUT, 1025 * 12 * 64 * 1024 - 1, context=4096)
    assert "short by 0.001 GB" in render_plan(one_byte)
    own = make_plan(replace(SCOUT, max_positions=8192), INT4_BYTES, H100, Serving(16))
    assert "largest context 8,192 tokens (the model's own)" in render_plan(own)


def test_json_has_every_number_and_the_verdict() -> None:
    plan = make_plan(SCOUT, INT4_BYTES, H100, Serving(131072, kv_dtype=KVDtype.FP8))
    found = json.loads(json.dumps(plan.to_json()))
    assert found["fits"] is plan.fits is True
    assert found["total_bytes"] == sum(
        found[key]
        for key in ("weight_bytes", "kv_global_bytes", "kv_chunked_bytes", "activation_bytes",
                    "graph_bytes", "non_torch_bytes", "kv_block_bytes")
    )  # fmt: skip
    assert found["device"] == {"name": "h100-80gb", "total_bytes": H100.total_bytes}
    assert found["serving"]["kv_dtype"] == "fp8"
    assert found["serving"]["batched_tokens"] == 8192
