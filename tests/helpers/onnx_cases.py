"""Tiny models through the ONNX exporter, for the tests of what the files hold and of what ONNX Runtime computes from them.

Each model mixes 2, 3, 4, 5, 6, 8 and 16 bits, groups of 32 and 64 and per-channel scales.
"""

from __future__ import annotations

import itertools
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from filelock import FileLock

from edgewright.bundle import Generation, GraphSpec
from edgewright.checkpoints.checkpoint import Checkpoint
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.exporters.artefact import Artefact, Options
from edgewright.exporters.onnx import export as exporter
from edgewright.models.loading import load_dequantized, load_quantized, quantized_parts
from edgewright.models.registry import build
from edgewright.quant.plan import UNQUANTIZED, BitPlan, Budget, Entry
from edgewright.quant.quantize_checkpoint import quantize_checkpoint
from edgewright.quant.tensor import QuantizedTensor
from edgewright.quant.units import quantizable_units
from edgewright.runtimes.eager import EagerSession
from edgewright.runtimes.generate import Stream
from edgewright.runtimes.onnx.session import OnnxSession
from edgewright.runtimes.session import Session
from helpers.tiny import write_tiny_gemma3, write_tiny_llama, write_tiny_t5gemma

CONTEXT = 64
TOLERANCE = 1e-4
PER_CHANNEL = 0
CHOICES = [(2, 32), (8, PER_CHANNEL), (3, 32), (4, 64), (16, 0), (5, 32), (6, PER_CHANNEL), (4, PER_CHANNEL), (3, 64)]
CHOICES += [(2, 64), (6, 32)]  # eleven: the turn of the layers is not the turn of the choices
_SHORT = {"encoder": {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}}
_SHORT |= {"decoder": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}}
WRITERS: dict[str, Callable[[Path], Path]] = {
    "t5gemma": partial(write_tiny_t5gemma, **_SHORT),
    "llama": partial(write_tiny_llama, num_hidden_layers=2),
    "gemma3": write_tiny_gemma3,
}
FAST = [pytest.param(name, marks=pytest.mark.slow) if name == "gemma3" else name for name in WRITERS]
"""As parameters of a fixture; two are enough for the fast suite."""
OVERRIDES = {
    "t5gemma": {"model.encoder.embed_tokens.weight": (2, 32), "model.decoder.embed_tokens.weight": (3, 32)},
    "llama": {"model.embed_tokens.weight": (16, 0), "lm_head.weight": (2, 32)},
    "gemma3": {"model.embed_tokens.weight": (6, PER_CHANNEL)},
}
TIED = {
    "t5gemma": ("lm_head.out_proj.weight", "model.decoder.embed_tokens.weight"),
    "gemma3": ("lm_head.weight", "model.embed_tokens.weight"),
}


def make_plan(
    model: Any, overrides: dict[str, tuple[int, int]], choices: Sequence[tuple[int, int]] = tuple(CHOICES)
) -> BitPlan:
    turn = itertools.cycle(choices)
    entries: dict[str, Entry] = {}
    for unit in quantizable_units(model):
        choice = next(turn)
        for w in unit.weights:
            bits, group = overrides.get(w.name, choice)
            columns = w.shape[1]
            if not group or bits == UNQUANTIZED:
                group = columns
            elif columns % group:
                group = 32
            entries[w.name] = Entry(bits, group, 1.0, "")
    return BitPlan(1, "by hand", Budget("bits", 4.0), entries, 0.0, 0).validate(quantizable_units(model))


def quantize(
    source: Path, out: Path, overrides: dict[str, tuple[int, int]], choices: Sequence[tuple[int, int]] = tuple(CHOICES)
) -> BitPlan:
    checkpoint = open_checkpoint(str(source))
    model = build(checkpoint.config)
    plan = make_plan(model, overrides, choices)
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    quantize_checkpoint(checkpoint, plan, model.tied, out, [n for n in names if n not in {*model.tied, *plan.entries}])
    return plan


def lower(quantized: Path, out: Path) -> tuple[Artefact, list[GraphSpec]]:
    """Export a quantized checkpoint into `out`; also run by a second process, see the test of identical bytes."""
    checkpoint = open_checkpoint(str(quantized))
    model = build(checkpoint.config)
    load_quantized(model, checkpoint)
    out.mkdir()
    graphs = model.graphs()
    return exporter.export(graphs, out, Options(max_positions=CONTEXT)), [GraphSpec.of(g) for g in graphs]


@dataclass
class Initializer:
    """A tensor of an ONNX file; region is (offset, length) in weights.bin, None where it is inline."""

    array: np.ndarray
    region: tuple[int, int] | None


@dataclass
class Case:
    folder: Path
    quantized: Checkpoint
    plan: BitPlan
    artefact: Artefact
    specs: list[GraphSpec]
    generation: Generation
    reference: EagerSession
    session: OnnxSession
    tied: dict[str, str]
    shapes: dict[str, tuple[int, int]]
    models: dict[str, onnx.ModelProto] = field(default_factory=dict)

    def initializers(self, graph: str) -> dict[str, Initializer]:
        """Every initializer, read from the files by the format's own rules."""
        raw = (self.folder / "weights.bin").read_bytes()
        found = {}
        for t in self.models[graph].graph.initializer:
            if not t.external_data:
                found[t.name] = Initializer(onnx.numpy_helper.to_array(t), None)
                continue
            where = {e.key: e.value for e in t.external_data}
            assert where["location"] == "weights.bin"
            offset, length = int(where["offset"]), int(where["length"])
            kind = onnx.helper.tensor_dtype_to_np_dtype(t.data_type)
            found[t.name] = Initializer(
                np.frombuffer(raw, kind, count=length // kind.itemsize, offset=offset).reshape(t.dims), (offset, length)
            )
        return found

    def stored(self, name: str) -> np.ndarray:
        """What a weight of the plan is worth, float32, from the quantized checkpoint."""
        if self.plan.entries[name].bits == UNQUANTIZED:
            return self.quantized.tensor(name).float().numpy()
        shape = self.shapes[name]
        return QuantizedTensor(*quantized_parts(self.quantized, name, shape), shape).dequantize().numpy()


def make_case(source: Path, root: Path, overrides: dict[str, tuple[int, int]]) -> Case:
    plan = quantize(source, root / "checkpoint", overrides)
    return open_case(root, plan, *lower(root / "checkpoint", root / "onnx"))


def shared_case(run: Path, name: str, folder: Path) -> Case:
    """The case of an architecture, lowered once in a run. run: a folder that all workers have; folder: a new one."""
    made = run / f"case-{name}"
    with FileLock(f"{made}.lock"):
        if not made.is_dir():
            shutil.rmtree(half := made.with_suffix(".half"), ignore_errors=True)
            source = WRITERS[name](half / "source")
            facts = (
                quantize(source, half / "checkpoint", OVERRIDES[name]),
                *lower(half / "checkpoint", half / "onnx"),
            )
            (half / "facts").write_bytes(pickle.dumps(facts))
            half.rename(made)
    shutil.copytree(made, folder)
    return open_case(folder, *pickle.loads((made / "facts").read_bytes()))


def open_case(root: Path, plan: BitPlan, artefact: Artefact, specs: list[GraphSpec]) -> Case:
    checkpoint = open_checkpoint(str(root / "checkpoint"))
    model = build(checkpoint.config)
    shapes = {w.name: w.shape for u in quantizable_units(model) for w in u.weights}
    load_dequantized(model, checkpoint)
    vocab = next(p.shape[-1] for s in specs for p in s.outputs if p.name == "logits")
    generation = Generation(
        task=model.task,
        decoder_start=model.decoder_start,
        vocab=vocab,
        max_context=CONTEXT,
        max_new_tokens=CONTEXT - 1,
    )
    return Case(
        root / "onnx",
        checkpoint,
        plan,
        artefact,
        specs,
        generation,
        EagerSession(model.graphs()),
        OnnxSession(root / "onnx", specs, threads=1, activations="float32"),
        model.tied,
        shapes,
        {s.name: onnx.load(root / "onnx" / f"{s.name}.onnx", load_external_data=False) for s in specs},
    )


def prompts(vocab: int, *lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(sum(lengths))
    return [rng.integers(3, vocab, n).tolist() for n in lengths]


def logits(session: Session, spec: Generation, given: list[list[int]], chunks: list[int]) -> tuple[np.ndarray, Stream]:
    """All logits [batch, sum(chunks), vocab] of random decoder tokens after `given`, fed in chunks; and the stream."""
    if spec.task == "seq2seq":
        stream = Stream(session, spec, given, sum(chunks))
    else:
        stream = Stream(session, spec, [p[:1] for p in given], sum(chunks))
    tokens = np.random.default_rng(5).integers(3, spec.vocab, (len(given), sum(chunks)))
    ends = np.cumsum(chunks)
    parts = [stream.feed(tokens[:, end - n : end], every=True) for n, end in zip(chunks, ends, strict=True)]
    return np.concatenate(parts, 1), stream
