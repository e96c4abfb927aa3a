"""The streamed run: read a layer, find its codes, write it, run it again as written, go on.

Two streams of hidden states travel: the original's, and the one that the written layers produce,
which is what serving will see. A rerun checks the layers already written by hash, replays them (a
forward pass, no solving) and goes on to the same bytes. Knows nothing of evaluation: an observer
is shown every layer in both forms.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama4q import __version__, products
from llama4q.config import read_config
from llama4q.device import HOST
from llama4q.errors import UserError
from llama4q.export import config_with, quantization_config, side_files
from llama4q.hidden import Spool
from llama4q.machine import UNBOUNDED, Memory, give_back_memory
from llama4q.model import DecoderLayer
from llama4q.prefetch import prefetched
from llama4q.ranks import ALONE, Ranks
from llama4q.recipe import Method, Recipe
from llama4q.source import Source
from llama4q.stream import LayerObserver, check_tokens, embed
from llama4q.verify import (
    Untouched,
    bits,
    kept_tensors,
    verify,
    verify_files,
)
from llama4q.weights import (
    LayerReader,
    check_finite,
    check_layout,
    layer_of,
    router_names,
)
from llama4q.writer import WORK, CheckpointWriter, to_json

from .beforehand import check_disk, groups_in, predicted_bytes, reading_order, refuse_early
from .codes import GroupReport
from .kernel import description
from .layer import LayerQuantizer, Part, part_count
from .leaves import check_ranks, deal
from .progress import Progress
from .routing import views
from .streams import Streams
from .units import Units, check_seen

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
Report = Mapping[str, Any]
Pages = Callable[[Report], Mapping[str, bytes]]  # a report in other forms, by file name
REST, EVIDENCE = "rest", "evidence"  # the units beside the layers
SOURCE = "source"  # in the work folder: where a source that is not here comes to


@dataclass(frozen=True)
class Job:
    """What one run depends on, beside the files of the source."""

    source: Source
    destination: Path
    recipe: Recipe
    tokens: tuple[torch.Tensor, ...]  # calibration tokens [S, T], one for each length
    digest: str  # of the tokens
    dtype: torch.dtype  # of activations and products
    device: torch.device = HOST  # where they are


@dataclass(frozen=True)
class Outcome:
    """What a finished run has to say; JSON types only."""

    layers: list[dict[str, Any]]
    rescues: list[dict[str, Any]]
    evidence: dict[str, Any]
    checked: dict[str, int]  # what verification counted
    files: dict[str, str]  # final shard -> SHA-256
    quantized_bytes: int
    seconds: float


def quantize(
    job: Job,
    observer: LayerObserver,
    progress: Progress,
    make_report: Callable[[Outcome], Report],
    memory: Memory = UNBOUNDED,
    ranks: Ranks = ALONE,
    pages: Pages = lambda report: {},
) -> Report:
    """Quantize `job.source` into `job.destination`; returns the report written beside it.

    What does not go into `memory` goes to files in the destination; the result is the same. So it
    is for any number of `ranks`, each of which calls this with the same job; the first one alone
    makes the report, and the `pages` of it that are written beside it.

    Raises UserError for a bad input, a full disk, or damage; what was written stays resumable.
    """
    run = Run(job, observer, progress, memory, ranks)
    with run.written:  # nobody else writes there
        return run.execute(make_report, pages)


class Run:
    """One run over the layers of a checkpoint."""

    def __init__(
        self, job: Job, observer: LayerObserver, progress: Progress, memory: Memory, ranks: Ranks
    ) -> None:
        self.job = job
        self.ranks = ranks
        ranks.from_first(self._refuse)
        if ranks.count > 1:
            config_file = job.source.folder / "config.json"
            found = ranks.from_first(config_file.read_bytes)
            check_seen(ranks, config_file, found, job.source.folder)
        self.config = read_config(job.source.folder)
        self.source = job.source.checkpoint()
        self.steps = reading_order(self.config, self.source.names())
        self.observer = observer
        self.written = Units(ranks, job.destination, self._run_key())
        self.spool = Spool(memory.rows, self.written.work, job.device, memory.on_device)
        self.most = memory.most
        self.progress = progress
        self.units = [
            *(unit for index in range(self.config.num_layers) for unit in self.layer_units(index)),
            REST,
            EVIDENCE,
        ]

    def _refuse(self) -> None:
        """Raises UserError for whatever can be told before a tensor is read."""
        job = self.job
        config = read_config(job.source.folder)
        lengths = [tokens.shape[1] for tokens in job.tokens]
        refuse_early(job.source.folder, job.destination, job.recipe, config, lengths)
        check_ranks(self.ranks, sum(len(tokens) for tokens in job.tokens))
        source = job.source.checkpoint()
        check_layout(source, config)
        for tokens in job.tokens:
            check_tokens(config.vocab_size, tokens)
        held = job.source.held(reading_order(config, source.names()))
        check_disk(predicted_bytes(source, config, job.recipe) + held, job.destination)

    def layer_units(self, index: int) -> list[str]:
        """The parts of a layer, and last what is to be said of it as a whole."""
        name = f"layer-{index:05d}"
        parts = [f"{name}.{part:02d}" for part in range(part_count(self.config, index))]
        return [*parts, name]

    def execute(self, make_report: Callable[[Outcome], Report], pages: Pages) -> Report:
        if not self.written.finishing(self.units):
            try:
                with torch.inference_mode():
                    self._stream()
            finally:
                self.job.source.end()
        return self.ranks.from_first(lambda: self._finish(self.written.first, make_report, pages))

    def _run_key(self) -> dict[str, Any]:
        """Whatever bytes and report depend on: a rerun with another key is another run."""
        config_bytes = (self.job.source.folder / "config.json").read_bytes()
        recipe = self.job.recipe.to_json()
        del recipe["calibration"]["text"]  # its tokens count, not how its name is spelled
        return {
            "llama4q": __version__,
            "source": f"{self.job.source.identity()} {hashlib.sha256(config_bytes).hexdigest()}",
            "recipe": recipe,
            "calibration tokens": self.job.digest,
            "dtype": str(self.job.dtype).removeprefix("torch."),
            "device": self.job.device.type,
            "evaluation": self.observer.key,
        }

    def _stream(self) -> None:
        """Write every unit; layers in order, both streams beside each other."""
        device, solver = self.job.device, self.job.recipe.solver
        source = self.job.source
        original = LayerReader(source.checkpoint(device), self.config, self.job.dtype)
        self.progress.start(groups_in(self.config, self.job.recipe))
        early = [
            name for i in sorted(self.config.moe_layers) for name in router_names(self.config, i)
        ]
        source.begin(self.steps, early, self.written.work / SOURCE, self.progress.phase)
        if solver.method is Method.GPTQ:
            self.progress.phase(f"inner loops: {description(solver.beams, device)}")
            self.progress.phase(f"large products: {products.description(device)}")
        self.router_views = views(original)
        embedding = original.embedding()
        dealt = deal(self.job.tokens, self.ranks)
        plain = embed(embedding, dealt.batches, self.spool)
        streams = Streams(self.spool.copy(plain), plain, dealt)
        self.observer.start(embedding, self.spool)
        del embedding
        indices = range(self.config.num_layers)
        for index, layer in zip(indices, prefetched(original.layer, indices), strict=True):
            began = time.perf_counter()
            new = self._layer(layer, streams)
            self.observer.layer(layer, self._read_back(index))
            source.passed(index)
            self.progress.layer(time.perf_counter() - began if new else None)
        self._write_rest()
        if self.written.done(EVIDENCE) is None:
            self.progress.phase("comparing the predictions of both models")
            head = original.head()  # not quantized, so it serves both
            self.written.write(EVIDENCE, [], self.observer.finish(head, head))

    def _layer(self, layer: DecoderLayer, streams: Streams) -> bool:
        """Both streams through a layer, whose parts are found and written unless they are there.

        Whether none of them was.
        """
        index = layer.index
        quantizer = LayerQuantizer(
            self.config,
            self.job.recipe,
            layer,
            self.router_views,
            self._group,
            self.progress.rescue,
        )
        parts = LayerParts(self, index)
        counts = quantizer.quantize(streams, parts)
        *_, whole = self.layer_units(index)
        if self.written.done(whole) is None:
            memory = {
                "layer": index,
                "expert_tokens": counts,
                "hidden_error": stream_error(streams, self.ranks),
                "kv_scales": None if quantizer.cache is None else quantizer.cache.to_json(),
            }
            self.written.write(whole, [], memory)
        return not parts.replayed

    def _group(self, report: GroupReport) -> None:
        give_back_memory(self.most)
        self.progress.group(report)

    def kept(self, index: int | None) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of a layer (None: of no layer) that are copied bit for bit."""
        for name in kept_tensors(self.source.infos, self.config, self.job.recipe):
            if layer_of(self.config, name) == index:
                tensor = self.source.get(name)
                check_finite(name, tensor)
                yield name, tensor

    def _write_rest(self) -> None:
        if self.written.done(REST) is None:
            kept = Untouched(self.kept(None))
            self.written.write(REST, kept, {}, kept.arrived)

    def _read_back(self, index: int) -> DecoderLayer:
        """A layer as written, so that a resumed run computes with the same numbers."""
        files = [
            file for unit in self.layer_units(index) for file in self.written.recorded(unit).files
        ]
        return self.reader_of(files).layer(index)

    def reader_of(self, files: Iterable[str]) -> LayerReader:
        """Reads what this run has written under these names."""
        written = self.written.read_back(files, self.job.device)
        return LayerReader(written, self.config, self.job.dtype)

    def _layer_record(self, writer: CheckpointWriter, index: int) -> dict[str, Any]:
        """What the report says of a layer: its record, and those of its parts joined."""
        *parts, whole = (dict(writer.recorded(unit).memory) for unit in self.layer_units(index))
        joined = {
            key: [one for part in parts for one in part[key]] for key in ("groups", "rescues")
        }
        return {**whole, **joined, "seconds": sum(part["seconds"] for part in parts)}

    def _finish(
        self, writer: CheckpointWriter, make_report: Callable[[Outcome], Report], pages: Pages
    ) -> Report:
        """Final names, verification, side files; the index makes it a checkpoint, and the manifest,
        last of all, a finished one."""
        self.progress.phase("verifying what was written")
        written, files = writer.assemble(self.units)
        verify_files(self.job.destination, files)
        kept = kept_tensors(self.source.infos, self.config, self.job.recipe)
        checked = verify(written, kept, self.config, self.job.recipe)
        checked["untouched"] = self._compared(writer, kept)
        records = [self._layer_record(writer, index) for index in range(self.config.num_layers)]
        rescues = [rescue for record in records for rescue in record.pop("rescues")]
        seconds = sum(record.pop("seconds") for record in records)
        report = make_report(
            Outcome(
                layers=records,
                rescues=rescues,
                evidence=dict(writer.recorded(EVIDENCE).memory),
                checked=checked,
                files=files,
                quantized_bytes=written.nbytes,
                seconds=seconds,
            )
        )
        quantization = quantization_config(self.job.recipe, self.config)
        writer.publish(
            written,
            files,
            {
                **side_files(self.job.source.folder),
                "report.json": to_json(report),
                **pages(report),
                "config.json": config_with(self.job.source.folder, quantization),
            },
        )
        return report

    def _compared(self, writer: CheckpointWriter, kept: Collection[str]) -> int:
        """How many tensors were compared with the source's bits when they were written: all of
        `kept`, as the source may not be there any more."""
        records = [writer.recorded(unit).memory for unit in self.units]
        compared = {name for record in records for name in record.get("untouched", ())}
        assert compared == set(kept), compared ^ set(kept)
        return len(compared)


class LayerParts:
    """The parts of one layer of a run: written by an earlier one, or to be written."""

    def __init__(self, run: Run, index: int) -> None:
        self.run, self.index = run, index
        *self.units, _ = run.layer_units(index)
        self.began = time.perf_counter()
        self.replayed = False

    def written(self, number: int) -> LayerReader | None:
        unit = self.run.written.done(self.units[number])
        if unit is None:
            return None
        self.replayed = True
        self.run.ranks.from_first(lambda: self._check_source(unit.memory.get("untouched", {})))
        part = f"layer {self.index}, part {number + 1} of {len(self.units)}"
        self.run.progress.replayed(part, len(unit.memory["groups"]))
        return self.run.reader_of(unit.files)

    def write(self, number: int, part: Part) -> None:
        """The part's tensors; those of the layer that stay as they are go with the first one."""
        kept = Untouched(self.run.kept(self.index) if number == 0 else ())
        memory = {
            "groups": [dataclasses.asdict(group) for group in part.groups],
            "rescues": [dataclasses.asdict(rescue) for rescue in part.rescues],
            "seconds": time.perf_counter() - self.began,
        }
        tensors = itertools.chain(kept, part.tensors)
        self.run.written.write(self.units[number], tensors, memory, kept.arrived)
        self.began = time.perf_counter()

    def _check_source(self, copied: Mapping[str, str]) -> None:
        """Raises UserError where the source is not what it was when its tensors were copied."""
        for name, before in copied.items():
            if bits(self.run.source.get(name)) != before:
                raise UserError(
                    f"{self.run.job.source}: {name} has changed since it was copied; put it back, "
                    f"or delete {self.run.job.destination} and repeat the command"
                )


def layers_written(folder: Path) -> int:
    """How many layers an unfinished run has written as a whole."""
    return len(list((folder / WORK).glob("layer-?????.json")))


def stream_error(streams: Streams, ranks: Ranks) -> float:
    """|x - y|^2 / |x|^2 over all hidden states: how far the written layers have drifted."""
    squares = [
        (
            float((plain.float() - served.float()).square().sum()),
            float(plain.float().square().sum()),
        )
        for plain, served in zip(streams.plain, streams.served, strict=True)
    ]
    lost = total = 0.0
    for batches in ranks.everyone(squares):
        for wrong, wanted in batches:
            lost += wrong
            total += wanted
    return lost / total
