"""Ask SGLang's own matcher which scheme every layer of one checkpoint would get, as JSON.

Runs in the SGLang environment that `setup.py` makes. Of SGLang only the file with its ignore and
target matching is imported: it needs no GPU and is reached by its path, since importing SGLang
itself would. The names and classes of Llama 4's layers, and which of them are handed the
quantization configuration at all, are copied from SGLang 0.5.23's model files. It doesn't load a
weight, run a kernel, or know what the checkpoint holds.
"""

import argparse
import importlib.util
import json
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

MATCHER = "sglang/srt/layers/quantization/compressed_tensors/utils.py"
# Llama 4's fused layers in SGLang, and the layers of the checkpoint that they are made of.
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--result", type=Path, required=True)
    arguments = parser.parse_args()
    config = json.loads((arguments.checkpoint / "config.json").read_text())
    matcher = Matcher(config["quantization_config"])
    layers = [matcher.verdict(name, kind) for name, kind in model_layers(config)]
    arguments.result.write_text(json.dumps({"layers": layers}, indent=1))


def model_layers(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and SGLang class of every layer that is handed the quantization configuration.

    Router, projector and the vision tower's attention are not: SGLang leaves them unquantized."""
    text = config.get("text_config", config)
    root = "language_model." if "text_config" in config else ""
    step = text.get("interleave_moe_layer_step", 1)
    for layer in range(text["num_hidden_layers"]):
        name = f"{root}model.layers.{layer}"
        yield f"{name}.self_attn.qkv_proj", "QKVParallelLinear"
        yield f"{name}.self_attn.o_proj", "RowParallelLinear"
        name += ".feed_forward"
        if step and (layer + 1) % step == 0:
            yield f"{name}.experts", "FusedMoE"
            name += ".shared_expert"
        yield f"{name}.gate_up_proj", "MergedColumnParallelLinear"
        yield f"{name}.down_proj", "RowParallelLinear"
    yield f"{root}lm_head", "ParallelLMHead"
    yield from vision_layers(config.get("vision_config"))


def vision_layers(vision: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    if vision is None:
        return
    for layer in range(vision["num_hidden_layers"]):
        yield f"vision_model.model.layers.{layer}.mlp.fc1", "ColumnParallelLinear"
        yield f"vision_model.model.layers.{layer}.mlp.fc2", "RowParallelLinear"
    yield "vision_model.patch_embedding.linear", "ColumnParallelLinear"
    yield "vision_model.vision_adapter.mlp.fc1", "ColumnParallelLinear"
    yield "vision_model.vision_adapter.mlp.fc2", "RowParallelLinear"


class Matcher:
    """SGLang's functions with one checkpoint's configuration."""

    def __init__(self, quantization: dict[str, Any]) -> None:
        self.quantization = quantization
        self.functions = sglang_matcher()
        groups = quantization["config_groups"].values()
        self.groups = {target: group for group in groups for target in group["targets"]}
        if "Linear" in self.groups:  # SGLang does the same, so that Linear covers experts
            self.groups.setdefault("FusedMoE", self.groups["Linear"])

    def verdict(self, name: str, kind: str) -> dict[str, Any]:
        """What SGLang would do with one layer; 'raises' if it would end the engine."""
        answer: dict[str, Any] = {"layer": name, "parts": parts_of(name, kind)}
        try:
            group = self.group_of(name, kind)
        except Exception as error:
            return answer | {"raises": f"{type(error).__name__}: {error}".splitlines()[0]}
        if group is None:
            return answer | {"values": "bf16"}
        weights = group["weights"]
        answer |= {
            "values": f"{weights['type']}{weights['num_bits']}",
            "strategy": weights["strategy"],
            "group_size": weights.get("group_size"),
            "format": group.get("format") or self.quantization["format"],
        }
        if kind == "FusedMoE" and weights["type"] == "int":
            answer |= packed_experts_rule(self.quantization["format"])
        return answer

    def group_of(self, name: str, kind: str) -> dict[str, Any] | None:
        """The config group of a layer; None if it stays unquantized."""
        if kind == "FusedMoE":  # SGLang looks at expert 0 only
            parts = [f"{name}.0.{projection}" for projection in EXPERT_PROJECTIONS]
            groups = [self.match(part, kind) for part in parts]
            if any(group != groups[0] for group in groups):
                raise ValueError("all expert projections need the same quantization scheme")
            return groups[0]
        if kind == "ParallelLMHead":  # only a target that names it counts, never a class
            named = self.functions.check_equal_or_regex_match(name, self.groups)
            return self.match(name, kind) if named else None
        return self.match(name, kind)

    def match(self, name: str, kind: str) -> dict[str, Any] | None:
        if self.functions.should_ignore_layer(name, self.quantization.get("ignore", []), FUSED):
            return None
        module = type(kind, (), {})()  # the matcher looks at the class's name and no further
        target = self.functions.find_matched_target(name, module, self.groups.keys(), FUSED)
        group: dict[str, Any] = self.groups[target]
        return group


def packed_experts_rule(top_level_format: str) -> dict[str, str]:
    """SGLang's integer experts test the configuration's own format, not the group's."""
    if top_level_format == "pack-quantized":
        return {}
    return {"raises": f"ValueError: top-level format is {top_level_format}, not pack-quantized"}


def parts_of(name: str, kind: str) -> list[str]:
    """Modules of the checkpoint whose weights make up one layer; {expert} stands for any."""
    if kind == "FusedMoE":
        return [f"{name}.{{expert}}.{projection}" for projection in EXPERT_PROJECTIONS]
    parent, _, leaf = name.rpartition(".")
    return [f"{parent}.{part}" for part in FUSED[leaf]] if leaf in FUSED else [name]


def sglang_matcher() -> Any:
    path = Path(str(distribution("sglang").locate_file(MATCHER)))
    specification = importlib.util.spec_from_file_location("sglang_matcher", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
