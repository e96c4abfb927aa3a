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
from llama4q.gpus import DEVICES, GIB, Device
from llama4q.kv_cache import KVDtype, kv_layout
from llama4q.memory import RESERVED_BYTES, MemoryPlan, Serving, make_plan
from llama4q.memory_table import render_plan
from llama4q.shards import Cut, Piece, ShardedWeights

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
TABLE_BYTES = 10485760 * 128 * 2  # Scout's rotary positions, cosines and sines in BF16


def held(nbytes: int, sizes: tuple[int, ...] = (1, 2, 4, 8)) -> ShardedWeights:
    """Weights of so many bytes that cards share evenly."""
    return ShardedWeights({Piece(Cut.EVEN, nbytes, 1): 1}, sizes)


INT4 = held(64_900_000_000 - TABLE_BYTES)  # about Scout's, and its table makes 64.9 GB of it


def roomy(config: ModelConfig, kv_bytes: int, **serving: Any) -> MemoryPlan:
    """A plan that leaves exactly `kv_bytes` for the KV cache."""
    asked = Serving(**{"utilization": 1.0, **serving})
    table = 2 * config.max_positions * config.head_dim if config.rope_layers else 0
    device = Device("h100-like", kv_bytes + RESERVED_BYTES + 75 * GIB + table)
    return make_plan(config, held(75 * GIB), device, asked)


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
    layout = kv_layout(SCOUT, batched_tokens=8192, cards=8)
    assert layout.block_bytes == 8192 * 12
    assert (40 * GIB // layout.block_bytes, layout.blocks(1048576)) == (436906, 70144)
    one_head_each = kv_layout(SCOUT, batched_tokens=8192, cards=16)
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
    plan = make_plan(SCOUT, held(0), H100, Serving(131072))
    assert plan.kv_global_bytes == 131072 * 48 * 1024
    assert plan.kv_chunked_bytes == (8192 + 2 * 8192) * 144 * 1024
    full = make_plan(SCOUT, held(0), H100, Serving(131072, hybrid=False))
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
        plan = make_plan(config, held(10**9), H100, serving)
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
        make_plan(SCOUT, INT4, H100, Serving(8192, utilization=percent / 100))
        for percent in range(1, 101)
    ]
    contexts = [plan.largest_context for plan in plans]
    assert contexts == sorted(contexts)
    assert contexts[0] == 0
    assert (
        make_plan(SCOUT, held(0), Device("tiny", 101), Serving(1)).usable_bytes == 93
    )  # rounded up


def test_every_option_changes_the_plan() -> None:
    base = Serving(131072)
    changes: list[dict[str, Any]] = [
        {"context": 65536}, {"kv_dtype": KVDtype.FP8}, {"hybrid": False},
        {"batched_tokens": 2048}, {"utilization": 0.8}, {"concurrency": 2}, {"cards": 2},
        {"positions": 131072}, {"block_tokens": 128},
    ]  # fmt: skip
    before = make_plan(SCOUT, INT4, H100, base)
    for change in changes:
        after = make_plan(SCOUT, INT4, H100, replace(base, **change))
        assert (after.total_bytes, after.usable_bytes) != (before.total_bytes, before.usable_bytes)
    larger = make_plan(SCOUT, INT4, DEVICES["h200-141gb"], base)
    assert larger.largest_context > before.largest_context


def test_the_models_own_limit_ends_the_largest_context() -> None:
    config = replace(SCOUT, max_positions=5001)
    assert make_plan(config, held(10**9), H100, Serving(1)).largest_context == 5001


@pytest.mark.parametrize(
    ("serving", "message"),
    [
        ({"context": 0}, "context 0"),
        ({"context": 16, "batched_tokens": 0}, "batched tokens 0"),
        ({"context": 16, "utilization": 0.0}, "utilization 0.0"),
        ({"context": 16, "utilization": 92.0}, "utilization 92.0"),
        ({"context": 16, "concurrency": 0}, "concurrency 0"),
        ({"context": 16, "cards": 0}, "GPUs 0"),
        ({"context": 16, "block_tokens": 0}, "block size 0"),
        ({"context": 16, "positions": 15}, "15 positions for a context of 16"),
    ],
)
def test_settings_that_no_engine_takes_are_refused(serving: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Serving(**serving)


def test_a_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(UserError, match=r"10,485,761.*10,485,760 positions"):
        make_plan(SCOUT, INT4, H100, Serving(10485761))


def test_table_of_a_plan_that_fits() -> None:
    lines = render_plan(make_plan(SCOUT, INT4, H100, Serving(8192))).splitlines()
    assert [line[:24].strip() for line in lines[:-1]] == [
        "", "weights", "rotary positions", "KV cache, global layers", "KV cache, chunked layers",
        "workspace", "overhead", "total", "usable",
    ]  # fmt: skip
    numbers = [float(line[24:35]) for line in lines[1:-1]]
    assert numbers[:2] == [62.216, 2.684]
    assert numbers[6] == pytest.approx(sum(numbers[:6]), abs=0.003)
    assert numbers[7] == pytest.approx(0.92 * 79.10 * 2**30 / 1e9, abs=0.001)
    assert lines[-1] == (
        "fits: yes, largest context 86,352 tokens; 10,006 KV blocks: 4.89 requests of 8,192 tokens "
        "at once"
    )


def test_table_of_a_plan_that_does_not_fit() -> None:
    plan = make_plan(SCOUT, held(111_600_000_000), H100, Serving(8192, 2, 1, hybrid=False))
    assert "without the hybrid manager" in render_plan(plan)
    assert "bf16 KV cache of 2 x 8,192 tokens" in render_plan(plan)
    last = render_plan(plan).splitlines()[-1]
    assert last.startswith(f"fits: no, short by {plan.short_bytes / 1e9:.2f}"[:-1])
    two = make_plan(SCOUT, held(200_000_000_000), H100, Serving(8192, cards=2))
    assert "on each of 2 GPUs" in render_plan(two).splitlines()[1]
    assert " GB on each GPU; 0 KV blocks: 0.00 requests" in render_plan(two).splitlines()[-1]
    one_byte = roomy(SCOUT, 1025 * 12 * 64 * 1024 - 1, context=4096)
    assert "short by 0.001 GB" in render_plan(one_byte)
    own = make_plan(replace(SCOUT, max_positions=8192), INT4, H100, Serving(16))
    assert "largest context 8,192 tokens (the model's own)" in render_plan(own)


def test_json_has_every_number_and_the_verdict() -> None:
    plan = make_plan(SCOUT, INT4, H100, Serving(131072, kv_dtype=KVDtype.FP8))
    found = json.loads(json.dumps(plan.to_json()))
    assert found["fits"] is plan.fits is True
    assert found["total_bytes"] == sum(
        found[key]
        for key in ("weight_bytes", "position_bytes", "kv_global_bytes", "kv_chunked_bytes",
                    "activation_bytes", "graph_bytes", "non_torch_bytes", "kv_block_bytes")
    )  # fmt: skip
    assert found["device"] == {"name": "h100-80gb", "total_bytes": H100.total_bytes}
    assert found["serving"]["kv_dtype"] == "fp8"
    assert found["serving"]["batched_tokens"] == 8192


def test_requests_at_once_are_those_for_which_there_are_blocks() -> None:
    """Issue 7's check: Scout in INT4 at 131,072 tokens, whose blocks and concurrency vLLM's own
    functions confirm (benchmarks/serving_memory.py); N requests fit where N times the blocks do."""
    base = Serving(131072, positions=131072, kv_dtype=KVDtype.FP8)
    one = make_plan(SCOUT, INT4, H100, base)
    assert one.requests == int((one.kv_blocks - 1) / one.request_blocks) == 2
    for asked, fits in ((2, True), (3, False)):
        plan = make_plan(SCOUT, INT4, H100, replace(base, concurrency=asked))
        assert (plan.fits, plan.kv_bytes) == (fits, asked * one.kv_bytes)
        assert (plan.kv_blocks, plan.requests) == (one.kv_blocks, one.requests)
        assert (plan.largest_context >= 131072) is fits


def test_the_rotary_table_is_as_long_as_the_model_knows_positions() -> None:
    """vLLM's own buffer for the published Scout is [10485760, 128] in BF16, and one of as many rows
    as --hf-overrides says (benchmarks/serving_memory.py); a model that never rotates has none."""
    assert make_plan(SCOUT, INT4, H100, Serving(8192)).position_bytes == 2_684_354_560
    short = make_plan(SCOUT, INT4, H100, Serving(8192, positions=10000))
    assert short.position_bytes == 10000 * 128 * 2
    assert short.context_limit == short.largest_context == 10000
    never = replace(SCOUT, rope_layers=frozenset())
    assert make_plan(never, INT4, H100, Serving(8192)).position_bytes == 0


def test_cards_that_vllm_cannot_divide_the_model_into_are_refused() -> None:
    with pytest.raises(UserError, match=r"3 GPUs: .* choose 1, 2, 4, 8"):
        make_plan(SCOUT, INT4, H100, Serving(8192, cards=3))
