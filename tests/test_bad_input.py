"""The user's mistakes, at the command line: one line that names the thing, exit code 1, no harm.

The rule is that of "Errors" in docs/guide.md. No command here may end in a
traceback, touch its source, or leave a folder behind when nothing was worth keeping.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

import cli
from llama4q.checkpoint import INDEX, SINGLE, Checkpoint
from llama4q.hub import POCKET_MODEL
from llama4q.writer import WORK

from . import plain_reports, tiny
from .test_writer import as_nobody

ROOT = Path(__file__).parent.parent
VARIANT = dataclasses.replace(
    tiny.Variant(layers=2, experts=2, rope_scaling=tiny.SCOUT_ROPE), vocab_size=2048
)
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
QUICK = (
    "--samples", "4", "--length", "64", "--eval-windows", "2", "--eval-length", "64",
    "--lengths", "128", "--depths", "0.5", "--prompts", "1", "--dtype", "float32",
)  # fmt: skip
SHARD = "model-00001-of-00002.safetensors"
LAYER = "language_model.model.layers.1."


def with_tokenizer(folder: Path) -> Path:
    for name in TOKENIZER:
        shutil.copy(POCKET_MODEL / name, folder)
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source that has nothing wrong with it; not to be changed."""
    return with_tokenizer(tiny.write(tmp_path_factory.mktemp("sound"), VARIANT))


@pytest.fixture
def source(sound: Path, tmp_path: Path) -> Path:
    """A copy of one's own to damage."""
    shutil.copytree(sound, tmp_path / "source")
    return tmp_path / "source"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def mistake(*arguments: object, code: int = 1) -> str:
    """The one line that the command ends with, after nothing but progress."""
    found = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    if not isinstance(found.exception, SystemExit):
        raise AssertionError(found.output) from found.exception
    assert found.exit_code == code
    assert found.stdout == ""
    *progress, last = found.stderr.splitlines()
    assert last.startswith("Error: ")
    noise = ("Error", "Traceback", "Warning", " ")
    assert not any(line.startswith(noise) for line in progress), progress
    return last.removeprefix("Error: ")


def refused(source: Path, *options: object) -> str:
    """The line with which `quantize` refuses; the source is as it was, no destination is made."""
    destination = source.parent / "refused"
    before = contents(source)
    line = mistake("quantize", source, destination, *QUICK, *options)
    assert not destination.exists()
    assert contents(source) == before
    return line


def stopped(source: Path, *options: object) -> str:
    """The line with which `quantize` stops on the way; what it leaves is no checkpoint."""
    destination = source.parent / "stopped"
    before = contents(source)
    line = mistake("quantize", source, destination, *QUICK, *options)
    assert {path.name for path in destination.iterdir()} == {WORK}
    assert contents(source) == before
    return line


def quantized(source: Path, destination: Path) -> Result:
    return CliRunner().invoke(cli.main, ["quantize", str(source), str(destination), *QUICK])


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# What the source is


def test_not_a_llama_4(source: Path) -> None:
    mixtral = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    (source / "config.json").write_text(json.dumps(mixtral))
    assert "not a Llama 4 but model_type 'mixtral' (['MixtralForCausalLM'])" in refused(source)
    (source / "config.json").write_text("{}")
    assert "not a Llama 4 but model_type None (no architecture named)" in refused(source)


@pytest.mark.parametrize("place", ["", "text_config"])
def test_quantized_already(place: str, source: Path) -> None:
    quantization = {"quantization_config": {"quant_method": "fbgemm_fp8"}}
    edited(
        source / "config.json",
        lambda config: (config[place] if place else config).update(quantization),
    )
    assert refused(source) == f"{source}: is quantized already (fbgemm_fp8); name the BF16 original"


def test_an_own_output_is_quantized_already(source: Path) -> None:
    output = source.parent / "output"
    assert quantized(source, output).exit_code == 0
    assert "is quantized already (compressed-tensors)" in refused(output)


def test_no_source(tmp_path: Path) -> None:
    for name in (tmp_path / "missing", tmp_path):
        assert str(name) in mistake("quantize", name, tmp_path / "out", *QUICK)
    (tmp_path / "file").write_text("x")
    assert "no such folder" in mistake("quantize", tmp_path / "file", tmp_path / "out", *QUICK)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ('{"model_type": "llama4"}', "without text_config"),
        ('{"model_type": "llama4", "text_config": 3}', "without text_config"),
        ('{"model_type": "llama4", "text_config": {"hidden_size": 3}}', "key 'num_hidden_layers'"),
    ],
)
def test_a_broken_config(content: str, words: str, source: Path) -> None:
    (source / "config.json").write_text(content)
    line = refused(source)
    assert line.startswith(f"{source / 'config.json'}: ")
    assert words in line


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_hidden_layers", "many", "wrong form"),
        ("no_rope_layers", [1], "fewer entries than the 2 layers"),
        ("layer_types", ["full_attention"], "fewer entries than the 2 layers"),
        ("no_rope_layer_interval", 0, "wrong form"),
        ("moe_layers", 3, "wrong form"),
        ("num_experts_per_tok", 2, "num_experts_per_tok 2; Llama 4 routes to exactly 1"),
        ("attention_bias", True, "Llama 4 has no biases"),
        ("hidden_act", "gelu", "hidden_act 'gelu'"),
        ("head_dim", 33, "do not go together"),
        ("rope_scaling", {"rope_type": "yarn"}, "rope_type 'yarn'"),
    ],
)
def test_a_config_that_no_llama_4_has(key: str, value: object, words: str, source: Path) -> None:
    edited(source / "config.json", lambda config: config["text_config"].update({key: value}))
    line = refused(source)
    assert line.startswith(f"{source / 'config.json'}: ")
    assert words in line


def test_a_model_that_the_groups_do_not_divide(source: Path) -> None:
    narrow = with_tokenizer(
        tiny.write(source.parent / "narrow", dataclasses.replace(VARIANT, expert_size=96))
    )
    line = refused(narrow)
    assert "feed_forward.shared_expert.down_proj has 96 inputs, no multiple of the group" in line
    assert "128 of int4; choose smaller groups" in line


# Its files


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def corrupt(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:8] + b"\0" + path.read_bytes()[9:])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, "this shard of the index is missing; download it again"),
        (truncate, "truncated or corrupted"),
        (corrupt, "truncated or corrupted"),
    ],
)
@pytest.mark.parametrize("command", ["quantize", "inspect", "fit", "eval"])
def test_a_damaged_shard(
    command: str, damage: Callable[[Path], None], words: str, source: Path, sound: Path
) -> None:
    damage(source / SHARD)
    if command == "quantize":
        line = refused(source)
    else:
        line = mistake(command, source, *(["--against", sound] if command == "eval" else []))
    assert line.startswith(f"{source / SHARD}: ")
    assert words in line


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_an_index_that_leads_outside(shard: str, source: Path, sound: Path) -> None:
    shutil.copy(sound / SHARD, source.parent / "other.safetensors")
    (source / "sub").mkdir()
    shutil.copy(sound / SHARD, source / "sub" / "x.safetensors")
    edited(source / INDEX, lambda index: index["weight_map"].update({f"{LAYER}x": shard}))
    assert refused(source) == f"{source / INDEX}: names {shard!r}, outside the folder; refused"


def test_a_broken_index_and_none(source: Path) -> None:
    (source / INDEX).write_text('{"weight_map": [')
    assert refused(source) == f"{source / INDEX}: not a safetensors index; download it again"
    (source / INDEX).unlink()
    assert refused(source).startswith(f"{source}: neither {INDEX} nor {SINGLE} here")


def test_a_tensor_that_is_missing_or_of_another_shape(source: Path) -> None:
    name = f"{LAYER}self_attn.o_proj.weight"
    edited(source / INDEX, lambda index: index["weight_map"].pop(name))
    assert f"tensor {name} is missing; download the checkpoint again" in mistake(
        "quantize", source, source.parent / "out", *QUICK
    )
    other = tiny.write(source.parent / "x", VARIANT, replace={name: torch.zeros(128, 64)})
    line = mistake("quantize", with_tokenizer(other), other.parent / "out", *QUICK)
    assert f"{name} has shape (128, 64), config.json says (128, 128)" in line


def spoiled(source: Path, name: str, change: Callable[[torch.Tensor], object]) -> Path:
    """The source with one tensor changed, written anew."""
    made = {key: Checkpoint(source).get(key) for key in Checkpoint(source).names()}
    change(made[name])
    shards = {info.shard for info in Checkpoint(source).infos.values()}
    for shard in shards:
        (source / shard).unlink()
    (source / INDEX).unlink()
    save_file(made, source / SINGLE)
    return source


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.embed_tokens.weight",
        f"{LAYER}feed_forward.experts.down_proj",
        "vision_model.layernorm_pre.weight",
    ],
)
def test_weights_that_are_not_finite(name: str, value: float, source: Path) -> None:
    spoiled(source, name, lambda tensor: tensor.view(-1)[-1:].fill_(value))
    assert stopped(source) == (
        f"tensor {name} holds 1 values that are NaN or Inf; download the checkpoint again"
    )


@pytest.mark.parametrize(
    "name",
    [
        f"{LAYER}feed_forward.router.weight",
        f"{LAYER}feed_forward.shared_expert.up_proj.weight",
        f"{LAYER}self_attn.q_proj.weight",
        f"{LAYER}input_layernorm.weight",
        "language_model.model.norm.weight",
        "language_model.lm_head.weight",
    ],
)
def test_every_kind_of_weight_is_looked_at(name: str, source: Path) -> None:
    spoiled(source, name, lambda tensor: tensor.view(-1)[:2].fill_(float("nan")))
    assert f"tensor {name} holds 2 values that are NaN or Inf" in stopped(source)


@pytest.mark.parametrize("recipe", ["int4", "fp8"])
@pytest.mark.parametrize(
    ("name", "factor"),
    [
        (f"{LAYER}feed_forward.experts.gate_up_proj", 1e25),
        (f"{LAYER}feed_forward.shared_expert.up_proj.weight", 1e38),
        (f"{LAYER}self_attn.q_proj.weight", 1e38),
    ],
)
def test_activations_that_overflow(name: str, factor: float, recipe: str, source: Path) -> None:
    """The weights are finite; the layer in which their products are not is named."""
    spoiled(source, name, lambda tensor: tensor.mul_(factor).clamp_(-1e38, 1e38))
    line = stopped(source, "--dtype", "bfloat16", "--recipe", recipe)
    assert line.startswith("layer 1: the hidden states are NaN or Inf after this layer")


@pytest.mark.parametrize(
    "name", ["language_model.model.norm.weight", "language_model.lm_head.weight"]
)
def test_logits_that_overflow(name: str, source: Path) -> None:
    spoiled(source, name, lambda tensor: tensor.mul_(1e38).clamp_(-3e38, 3e38))
    assert stopped(source).startswith("lm_head: the logits are NaN or Inf")


def test_no_tokenizer_and_a_broken_one(source: Path) -> None:
    (source / "tokenizer.json").write_text("{")
    assert refused(source).startswith(f"{source}: its tokenizer cannot be loaded (")
    for name in TOKENIZER:
        (source / name).unlink()
    assert refused(source).startswith(f"{source}: no tokenizer here; copy")


def test_a_token_outside_the_vocabulary(source: Path) -> None:
    small = tiny.write(source.parent / "small", dataclasses.replace(VARIANT, vocab_size=512))
    line = refused(with_tokenizer(small))
    assert "is outside the model's vocabulary of 512; use this checkpoint's own tokenizer" in line


# The recipe


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[schemes]\nexpert = 'int4'", "unknown key 'expert' in [schemes]; did you mean 'experts'"),
        (
            "[schemes]\nexperts = 'int44'",
            "unknown scheme 'int44' for experts in [schemes]; did you",
        ),
        ("[schemes]\nexperts = ['int4']", "unknown scheme ['int4'] for experts"),
        ("[shemes]\nexperts = 'int4'", "unknown key 'shemes'; did you mean 'schemes'"),
        ("schemes = 3", "no [schemes]"),
        ("solver = 3\n[schemes]\nexperts = 'int4'", "solver is 3, no table; write [solver]"),
        ("override = 3\n[schemes]\nexperts = 'int4'", "override is no list of tables"),
        ("override = [3]\n[schemes]\nexperts = 'int4'", "override is no list of tables"),
        ("[schemes]\nexperts = 'int4'\n[solver]\ndamping = inf", "inf is below 0 or not finite"),
        ("[schemes", "not valid TOML"),
        ("[schemes]\ndense = 'int4'", "quantizes nothing in this model"),
        ("[schemes]\nexperts='int4'\n[[override]]\nlayers=[2]", "but the model has 2 layers"),
    ],
)
def test_a_recipe_with_a_mistake(text: str, words: str, sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    line = refused(sound, "--recipe", path)
    assert "mine" in line
    assert words in line


def test_recipes_that_are_not_there_or_no_text(sound: Path, tmp_path: Path) -> None:
    assert "int5: neither a file nor a shipped recipe; did you mean 'int" in refused(
        sound, "--recipe", "int5"
    )
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe")
    assert "mine.toml: not UTF-8" in refused(sound, "--recipe", tmp_path / "mine.toml")


# The texts


@pytest.mark.parametrize("option", ["--calibration", "--eval-text"])
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "", "empty, there is no text in it"),
        ("a.txt", "  \n\f\n", "empty, there is no text in it"),
        ("a.jsonl", "", "empty, there is no text in it"),
        ("a.txt", "Only a few words.", "name more text, or ask for fewer or shorter samples"),
        ("a.jsonl", '{"story": "Once."}', "no column known to hold text, found story"),
        ("a.jsonl#tale", '{"story": "Once."}', "no column 'tale', found story"),
        ("a.jsonl#story", '{"story": 3}', "column 'story' holds a int"),
        ("a.jsonl", '{"text": ', "line 1 is not valid JSON"),
        ("a.pdf", "x", "but text is read from"),
    ],
)
def test_a_text_that_does_not_do(
    option: str, name: str, content: str, words: str, sound: Path, tmp_path: Path
) -> None:
    (tmp_path / name.partition("#")[0]).write_text(content)
    line = refused(sound, option, tmp_path / name)
    assert str(tmp_path / name.partition("#")[0]) in line
    assert words in line


def test_a_text_that_is_not_there(sound: Path, tmp_path: Path) -> None:
    line = refused(sound, "--calibration", tmp_path / "missing.txt")
    assert f"text '{tmp_path / 'missing.txt'}': no such file" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--length", "4097"], "calibration sequences of 4097 tokens, but the model reads at most"),
        (["--eval-length", "4097"], "evaluation on 4097 tokens, but the model reads at most 4096"),
        (["--lengths", "128,5000"], "evaluation on 5000 tokens, but the model reads at mos"),
        (["--lengths", "8"], "needle: 8 tokens are too few for its prompt; give lengths of "),
        (["--lengths", "long"], "lengths 'long': give numbers of tokens with commas between"),
        (["--depths", "1.5"], "depth 1.5 is outside of 0 to 1; give shares of the text"),
        (["--depths", "deep"], "depths 'deep': give numbers with commas between"),
        (["--tasks", "niah_multikey2"], "unknown task 'niah_multikey2'; did you mean 'niah_multik"),
        (["--tasks", "cwe"], "cwe: 128 tokens are too few for its prompt; give lengths of "),
        (["--tasks", "qa"], "task 'qa' asks about documents; name a JSON file in SQuAD form with"),
        (["--gpu", "h100-80"], "unknown GPU 'h100-80'"),
    ],
)
def test_numbers_that_do_not_go_with_the_model(options: list[str], words: str, sound: Path) -> None:
    assert words in refused(sound, *options)


def test_eval_longer_than_the_model(sound: Path) -> None:
    line = mistake("eval", sound, "--against", sound, *QUICK[4:], "--eval-length", "4097")
    assert line.startswith("evaluation on 4097 tokens, but the model reads at most 4096")


def test_eval_against_another_model(sound: Path, tmp_path: Path) -> None:
    other = tiny.write(tmp_path / "other", dataclasses.replace(VARIANT, layers=3))
    line = mistake("eval", other, "--against", sound, *QUICK[4:])
    assert line.startswith(f"{other} and {sound} are models of different sizes")


def test_another_tokenizer(sound: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(sound, other)
    raw = (other / "tokenizer.json").read_text()
    vocabulary = json.loads(raw)["model"]["vocab"]
    one, two = (next(key for key in vocabulary if vocabulary[key] == id) for id in (700, 701))
    content = json.loads(raw)
    content["model"]["vocab"] |= {one: 701, two: 700}
    (other / "tokenizer.json").write_text(json.dumps(content))
    line = mistake("eval", other, "--against", sound, *QUICK[4:])
    assert line.startswith(f"{other} and {sound} have different tokenizers (token ")
    assert "700 and 701" in line or "701 and 700" in line


# The destination


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("letter.txt", "is not empty and holds no unfinished run; choose another folder"),
        (INDEX, "already holds a finished checkpoint; choose another folder or delete it"),
    ],
)
def test_a_destination_that_is_taken(name: str, words: str, sound: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    assert mistake("quantize", sound, tmp_path, *QUICK) == f"{tmp_path}: {words}"
    assert contents(tmp_path) == {name: b"mine"}
    line = mistake("quantize", sound, tmp_path / name, *QUICK)
    assert line == f"{tmp_path / name}: is a file; choose a folder that does not exist yet"
    line = mistake("quantize", sound, tmp_path / name / "below", *QUICK)
    assert line.startswith(f"{tmp_path / name / 'below'}: cannot be written (Not a directory)")
    assert contents(tmp_path) == {name: b"mine"}


def test_the_source_as_destination(source: Path) -> None:
    before = contents(source)
    assert "already holds a finished checkpoint" in mistake("quantize", source, source, *QUICK)
    assert contents(source) == before


def test_no_permission(sound: Path) -> None:
    # not tmp_path, which is root's alone
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        readable = shutil.copytree(sound, Path(name) / "source")
        for path in (readable, *readable.iterdir()):
            path.chmod(0o755)
        # root imports what nobody may not even see
        assert quantized(readable, Path(name) / "imports").exit_code == 0
        for mode in (0o555, 0o000):
            locked = Path(name) / f"locked-{mode:o}"
            locked.mkdir()
            locked.chmod(mode)
            with as_nobody():
                line = mistake("quantize", readable, locked / "out", *QUICK)
            assert line.startswith(f"{locked / 'out'}: cannot be written (Permission denied)")
            with as_nobody():
                line = mistake("quantize", readable, locked, *QUICK)
            assert line.startswith(f"{locked}: cannot be written (Permission denied)")
            locked.chmod(0o755)
            assert contents(locked) == {}
        (readable / SHARD).chmod(0)
        with as_nobody():
            line = mistake("quantize", readable, Path(name) / "out", *QUICK)
        assert line.startswith(f"{readable / SHARD}: cannot be read (Permission denied); mend")
        (readable / "config.json").chmod(0)
        with as_nobody():
            line = mistake("inspect", readable)
        assert line == f"{readable / 'config.json'}: cannot be read (Permission denied)"


def test_a_disk_that_is_too_small_is_noticed_before_the_start(
    sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(sound)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    line = refused(sound)
    assert "the result needs 0.0 GB, the disk has 0.0 GB free" in line
    assert line.endswith("or choose another disk")


def test_no_room_in_any_temporary_folder(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One with room is enough; Python looks at several."""
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: [str(tmp_path / "missing")])
    monkeypatch.setattr("tempfile.tempdir", None)
    line = refused(sound)
    assert line.startswith("No usable temporary directory found in [")
    assert line.endswith("; free some space there, or set TMPDIR to a folder that has some")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_disk_that_is_full_on_the_way(
    number: int, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command goes on when there is room; tests/test_writer.py has real disks."""
    left = [number]

    def full(*arguments: Any, **options: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(*arguments, **options)

    out = tmp_path / "out"
    monkeypatch.setattr("llama4q.writer.save_file", full)
    line = mistake("quantize", sound, out, *QUICK)
    assert line.startswith(f"{out}: cannot be written (No space left on device)")
    assert line.endswith("repeat the command, the run goes on where it stopped")
    found = quantized(sound, out)
    assert found.exit_code == 0
    assert found.stderr.count("was written before: checked and replayed") == min(number - 1, 4)
    assert Checkpoint(out).names()


def test_a_source_that_changes_on_the_way(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put back, the same command goes on behind the layer that was written."""
    shards = list(source.glob("*.safetensors"))
    times = {shard: shard.stat().st_mtime_ns for shard in shards}

    def changing(*arguments: Any, **options: Any) -> None:
        save_file(*arguments, **options)
        for shard in shards:
            os.utime(shard)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("llama4q.writer.save_file", changing)
        line = mistake("quantize", source, out, *QUICK)
    assert ": was changed while in use (" in line
    assert any(line.startswith(f"{shard}: ") for shard in shards)
    for shard, time in times.items():
        os.utime(shard, ns=(time, time))
    found = quantized(source, out)
    assert found.exit_code == 0
    assert "layer 0, part 1 of 2 was written before: checked and replayed" in found.stderr


# Reports and policies: exit code 2, as 1 is an answer


REPORT = json.dumps(plain_reports.report())
POLICY = "[likelihood.kl_mean]\nmax = 0.05"


@pytest.mark.parametrize(
    ("report", "policy", "words"),
    [
        (None, POLICY, "no such report"),
        ("{", POLICY, "not valid JSON"),
        ("[]", POLICY, "JSON, but not a report of llama4q"),
        ('{"schema": 2, "evidence": 3}', POLICY, "should be an object but is '3'"),
        ('{"llama4q": "0.1.0", "evidence": {}}', POLICY, "a report of schema 1, but"),
        (REPORT, None, "gate.toml: cannot be read (No such file or directory)"),
        (REPORT, "[likelihood.kl]\nmax = 1", "unknown figure [likelihood.kl]; did you mean"),
        (REPORT, f"{POLICY}\nmin = 2\nmax = 1", "not valid TOML"),
        (REPORT, f"{POLICY}\nbaseline_rato = 2", "did you mean 'baseline_ratio'?"),
        (REPORT, "[layers.jump]\nbaseline_ratio = 2", "name one with --baseline"),
    ],
)
def test_reports_and_policies_that_are_none(
    report: str | None, policy: str | None, words: str, tmp_path: Path
) -> None:
    paths = tmp_path / "report.json", tmp_path / "gate.toml"
    for path, content in zip(paths, (report, policy), strict=True):
        if content is not None:
            path.write_text(content)
    assert words in mistake("check", paths[0], "--policy", paths[1], code=2)


@pytest.mark.parametrize("option", ["--junit", "--markdown"])
def test_a_verdict_that_cannot_be_written(option: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(REPORT)
    line = mistake("check", tmp_path / "report.json", option, tmp_path / "no" / "file", code=2)
    assert "no/file: cannot be written (No such file or directory); name another file" in line


# A process of its own


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "{missing}"], "no such folder"),
        (["quantize", "{sound}", "{file}"], "is a file; choose a folder"),
    ],
)
def test_what_the_shell_sees(arguments: list[str], words: str, sound: Path, tmp_path: Path) -> None:
    """Exit code 1, nothing on stdout, one line on stderr."""
    (tmp_path / "file").write_text("mine")
    places = {"missing": tmp_path / "missing", "sound": sound, "file": tmp_path / "file"}
    filled = [argument.format(**places) for argument in arguments]
    found = subprocess.run(
        [sys.executable, "-c", "import cli; cli.main()", *filled],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 1
    assert found.stdout == ""
    [line] = found.stderr.splitlines()
    assert line.startswith("Error: ")
    assert words in line
    assert (tmp_path / "file").read_text() == "mine"
