"""Write the pocket model as a checkpoint of the Hub's layout.

Knows files and names, nothing of training: a dictionary of float32 text weights goes in, a folder
of bf16 shards with an index, config.json and the tokenizer's files comes out. The vision tower
and the projector are random (seeded): they are there so that tools meet the whole architecture.
The folder is replaced in one move, so that a reader never sees half of it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.pocket.config import PocketConfig, hub_config
from benchmarks.pocket.make_tokenizer import SPECIAL_TOKENS

SHARDS = 3


def special_ids(folder: Path) -> dict[str, int]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = ((token, tokenizer.token_to_id(token)) for token in SPECIAL_TOKENS)
    return {token: number for token, number in found if number is not None}


def vision_weights(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Random weights of tower and projector, as transformers initializes them."""
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    torch.manual_seed(seed)
    model = Llama4ForConditionalGeneration(Llama4Config(**config))
    state: dict[str, Tensor] = model.state_dict()
    return {name: weight for name, weight in state.items() if not name.startswith("language_model")}


def write_checkpoint(
    text: dict[str, Tensor], config: PocketConfig, folder: Path, seed: int
) -> None:
    """Put the weights in place of whatever weights `folder` holds; its other files stay."""
    hub = hub_config(config, special_ids(folder))
    with torch.random.fork_rng():
        tensors = vision_weights(hub, seed)
    tensors |= text
    tensors = {name: weight.detach().bfloat16().contiguous() for name, weight in tensors.items()}
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(folder, new, ignore=shutil.ignore_patterns("*.safetensors*"))
    _write_shards(tensors, new)
    (new / "config.json").write_text(json.dumps(hub, indent=2) + "\n", encoding="utf-8")
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old)


def _write_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(SHARDS)]
    written = 0
    for name, tensor in tensors.items():
        shards[min(written * SHARDS // total, SHARDS - 1)][name] = tensor
        written += tensor.nbytes
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        save_file(shard, str(folder / file), metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors writes for the owner alone
        where |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(index, indent=2) + "\n", encoding="utf-8"
    )
