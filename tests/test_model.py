"""The streamed forward against transformers' modeling_llama4, in float32, on every variant."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llama4q.checkpoint import Checkpoint
from llama4q.config import read_config
from llama4q.model import logits
from llama4q.prefetch import prefetched
from llama4q.stream import advance, embed
from llama4q.weights import LayerReader

from . import tiny


def our_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    config = read_config(folder)
    reader = LayerReader(Checkpoint(folder), config, torch.float32)
    batches = embed(reader.embedding(), [tokens])
    for layer in prefetched(reader.layer, range(config.num_layers)):
        advance(config, layer, batches)
    return torch.cat([logits(config, reader.head(), hidden) for hidden in batches])


@pytest.mark.parametrize("name", tiny.VARIANTS)
@torch.inference_mode()
def test_logits_against_transformers(name: str, tmp_path: Path) -> None:
    """Three sequences, several attention chunks (32) and temperature floors (48) long."""
    folder = tiny.write(tmp_path, tiny.VARIANTS[name])
    tokens = torch.randint(0, 512, (3, 150), generator=torch.Generator().manual_seed(1))
    theirs = tiny.transformers_model(folder)(input_ids=tokens).logits
    torch.testing.assert_close(our_logits(folder, tokens), theirs, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_chunks_and_temperature_matter(tmp_path: Path) -> None:
    """The parity above would not notice a switch that has no effect at these lengths."""
    folder = tiny.write(tmp_path, tiny.SCOUT)
    tokens = torch.randint(0, 512, (1, 150), generator=torch.Generator().manual_seed(1))
    before = our_logits(folder, tokens)
    config = (folder / "config.json").read_text()
    for switch, value in (
        ('"attention_chunk_size": 32', '"attention_chunk_size": 64'),
        ('"floor_scale": 48', '"floor_scale": 24'),
        ('"use_qk_norm": true', '"use_qk_norm": false'),
        ('"factor": 8.0', '"factor": 2.0'),
    ):
        assert switch in config
        (folder / "config.json").write_text(config.replace(switch, value))
        assert (our_logits(folder, tokens) - before).abs().max() > 1e-3, switch


@torch.inference_mode()
def test_long_sequences_in_pieces_against_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces that hold two chunks, and queries of global layers a few at a time."""
    monkeypatch.setattr("llama4q.model.POSITIONS_TOGETHER", 70)  # two chunks of 32
    monkeypatch.setattr("llama4q.model.QUERIES_TOGETHER", 24)
    folder = tiny.write(tmp_path / "model", tiny.SCOUT)
    tokens = torch.randint(0, 512, (2, 300), generator=torch.Generator().manual_seed(2))
    theirs = tiny.transformers_model(folder)(input_ids=tokens).logits
    torch.testing.assert_close(our_logits(folder, tokens), theirs, atol=1e-4, rtol=0)
