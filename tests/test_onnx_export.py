"""Tiny models through the ONNX exporter: what the files hold, and what ONNX Runtime computes from them.

Each model mixes 2, 3, 4, 5, 6, 8 and 16 bits, groups of 32 and 64 and per-channel scales.
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import plain
import pytest
from tiny import write_tiny_gemma3, write_tiny_llama, write_tiny_t5gemma

from edgewright.bundle import Generation, GraphSpec
from edgewright.checkpoint import Checkpoint, open_checkpoint
from edgewright.errors import UserError
from edgewright.exporters import onnx as exporter
from edgewright.exporters.artefact import Artefact, Options
from edgewright.models import build
from edgewright.models.loading import load_dequantized, load_quantized, quantized_parts
from edgewright.quant.plan import UNQUANTIZED, BitPlan, Budget, Entry
from edgewright.quant.stream import quantize_checkpoint
from edgewright.quant.tensor import QuantizedTensor
from edgewright.quant.units import quantizable_units
from edgewright.runtimes.eager import EagerSession
from edgewright.runtimes.generate import Sampling, Stream, generate, generate_batch
from edgewright.runtimes.onnxruntime import OnnxSession
from edgewright.runtimes.session import Session

CONTEXT = 64
TOLERANCE = 1e-4
PER_CHANNEL = 0
CHOICES = [(2, 32), (8, PER_CHANNEL), (3, 32), (4, 64), (16, 0), (5, 32), (6, PER_CHANNEL), (4, PER_CHANNEL), (3, 64)]
CHOICES += [(2, 64), (6, 32)]  # eleven: the turn of the layers is not the turn of the choices
WRITERS = {"t5gemma": write_tiny_t5gemma, "llama": write_tiny_llama, "gemma3": write_tiny_gemma3}
OVERRIDES = {
    "t5gemma": {"model.encoder.embed_tokens.weight": (2, 32), "model.decoder.embed_tokens.weight": (3, 32)},
    "llama": {"model.embed_tokens.weight": (16, 0), "lm_head.weight": (5, 32)},
    "gemma3": {"model.embed_tokens.weight": (6, PER_CHANNEL)},
}
TIED = {
    "t5gemma": ("lm_head.out_proj.weight", "model.decoder.embed_tokens.weight"),
    "gemma3": ("lm_head.weight", "model.embed_tokens.weight"),
}


def make_plan(model: Any, overrides: dict[str, tuple[int, int]]) -> BitPlan:
    turn = itertools.cycle(CHOICES)
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


def quantize(source: Path, out: Path, overrides: dict[str, tuple[int, int]]) -> BitPlan:
    checkpoint = open_checkpoint(str(source))
    model = build(checkpoint.config)
    plan = make_plan(model, overrides)
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
    artefact, specs = lower(root / "checkpoint", root / "onnx")
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


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Architecture -> its case, made once."""

    @functools.cache
    def made(name: str) -> Case:
        root = tmp_path_factory.mktemp(name)
        return make_case(WRITERS[name](root / "source"), root, OVERRIDES[name])

    return made


@pytest.fixture(params=WRITERS)
def case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)


def test_every_width_is_in_every_plan(case: Case) -> None:
    assert {e.bits for e in case.plan.entries.values()} == {2, 3, 4, 5, 6, 8, 16}


# ---- numbers ----


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


@pytest.mark.parametrize(
    ("sources", "chunks"),
    [
        ([9], [1]),
        ([1], [7]),
        ([30], [20]),
        ([12], [9, 1, 1, 4, 1, 12]),  # later chunks of several tokens: a batch of one only
        ([5], [1] * 14),
        ([12, 5, 1, 12], [6, 1, 1, 1, 1]),  # a batch, padded where there is an encoder
        ([2, 21], [1] * 6),
    ],
    ids=str,
)
def test_logits_and_caches_equal_the_dequantized_reference(case: Case, sources: list[int], chunks: list[int]) -> None:
    given = prompts(case.generation.vocab, *sources)
    want, expected = logits(case.reference, case.generation, given, chunks)
    got, stream = logits(case.session, case.generation, given, chunks)
    assert got.shape == want.shape == (len(given), sum(chunks), case.generation.vocab)
    assert np.abs(want).max() > 0.5
    assert np.abs(got - want).max() <= TOLERANCE * np.abs(want).max()
    for state in (s for spec in case.specs for s in spec.states if s.updated):
        a, b = (np.asarray(x) for x in (expected.state[state.name], stream.state[state.name].numpy()))
        a, b = a[:, :, : sum(chunks)], b[:, :, : sum(chunks)]
        assert np.abs(a - b).max() <= TOLERANCE * np.abs(a).max(), state.name


def test_padding_changes_nothing_for_the_rows_beside_it(case: Case) -> None:
    given = prompts(case.generation.vocab, 12, 5, 1)
    together, _ = logits(case.session, case.generation, given, [3, 1])
    tokens = np.random.default_rng(5).integers(3, case.generation.vocab, (3, 4))
    seq2seq = case.generation.task == "seq2seq"
    for row, prompt in enumerate(given):
        stream = Stream(case.session, case.generation, [prompt if seq2seq else prompt[:1]], 4)
        alone = stream.feed(tokens[row : row + 1], every=True)
        assert np.abs(alone[0] - together[row]).max() <= TOLERANCE * np.abs(alone).max()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generated_tokens_are_identical(case: Case, temperature: float) -> None:
    """Far past the windows, nearly to the end of the context."""
    sampling = Sampling(temperature, seed=3)
    seen: set[int] = set()
    for prompt in prompts(case.generation.vocab, 1, 6, 23):
        want, got = (list(generate(s, case.generation, prompt, 40, sampling)) for s in (case.reference, case.session))
        assert got == want
        assert len(want) == 40
        seen |= set(want)
    assert len(seen) > (10 if temperature else 1)


def test_generated_batches_are_identical(case: Case) -> None:
    given = prompts(case.generation.vocab, 7, 2, 19)
    want = generate_batch(case.reference, case.generation, given, 12)
    assert generate_batch(case.session, case.generation, given, 12) == want
    assert [list(generate(case.session, case.generation, p, 12)) for p in given] == want


def test_quantized_activations_stay_near(case: Case) -> None:
    """As shipped: level 4 rounds each input to 8 bits and no more."""
    given = prompts(case.generation.vocab, 12)
    shipped = OnnxSession(case.folder, case.specs, threads=1)
    got, want = (logits(s, case.generation, given, [10, 1])[0] for s in (shipped, case.reference))
    assert TOLERANCE < np.abs(got - want).max() / np.abs(want).max() < 0.1


# ---- the files ----


def dequantized_matrices(case: Case, graph: str) -> list[np.ndarray]:
    """What each MatMulNBits and GatherBlockQuantized of a graph multiplies by or looks up, from the files alone."""
    held = case.initializers(graph)
    found = []
    for node in case.models[graph].graph.node:
        if node.op_type not in ("MatMulNBits", "GatherBlockQuantized"):
            continue
        attributes = {a.name: a.i for a in node.attribute}
        bits, block = attributes["bits"], attributes["block_size"]
        at = (1, 2) if node.op_type == "MatMulNBits" else (0, 2)
        packed, scales = (held[node.input[i]].array for i in at)
        assert len(node.input) <= 3 or node.input[3] == ""  # the zero point is the default one
        if node.op_type == "MatMulNBits":
            assert packed.shape == (attributes["N"], attributes["K"] // block, block * bits // 8)
        codes = plain.signed_codes(packed.reshape(len(packed), -1), bits).astype(np.float32)
        assert scales.dtype == np.float32
        assert scales.shape == (len(codes), codes.shape[1] // block)
        found.append(codes * scales.repeat(block, 1))
    return found


def test_the_weights_in_the_files_are_bit_for_bit_the_quantized_checkpoint(case: Case) -> None:
    planned = {n: case.stored(n) for n, e in case.plan.entries.items() if e.bits != UNQUANTIZED}
    families = {w.tobytes(): {n} for n, w in planned.items()}
    for unit in quantizable_units(build(case.quantized.config)):
        names = [w.name for w in unit.weights if w.name in planned]
        if len(names) == 3:  # q, k and v may be one matrix
            families[np.concatenate([planned[n] for n in names]).tobytes()] = set(names)
    found: list[str] = []
    for spec in case.specs:
        for matrix in dequantized_matrices(case, spec.name):
            assert matrix.tobytes() in families, f"a matrix {matrix.shape} of {spec.name} is no weight of the plan"
            found += families[matrix.tobytes()]
    twice = {case.tied[n] for n in case.tied}
    assert sorted(found) == sorted([*planned, *(n for n in twice if n in planned)])


def test_weights_of_16_bits_are_in_the_files_as_they_are(case: Case) -> None:
    kept = [n for n, e in case.plan.entries.items() if e.bits == UNQUANTIZED]
    assert kept
    values = set()
    for spec in case.specs:
        for held in case.initializers(spec.name).values():
            if held.array.ndim == 2 and held.array.dtype.kind not in "iu":
                wide = held.array.astype(np.float32)
                values |= {wide.tobytes(), wide.T.tobytes()}  # torch.onnx may store the transpose
    for name in kept:
        assert case.stored(name).tobytes() in values, name


def test_norm_weights_are_exact(case: Case) -> None:
    model = build(case.quantized.config)
    vectors = {h.array.tobytes() for s in case.specs for h in case.initializers(s.name).values() if h.array.ndim == 1}
    norms = [n for n, p in model.named_parameters() if p.dim() == 1 and "norm" in n]
    assert norms
    for name in norms:
        offset = model.get_submodule(name.removesuffix(".weight")).offset
        gamma = case.quantized.tensor(name).float() + offset
        assert gamma.numpy().tobytes() in vectors, name


def test_the_files_are_valid_and_hold_only_what_is_used(case: Case) -> None:
    assert case.artefact.files == (*(f"{s.name}.onnx" for s in case.specs), "weights.bin")
    assert sorted(p.name for p in case.folder.iterdir()) == sorted(case.artefact.files)
    for name, model in case.models.items():
        assert {n.domain for n in model.graph.node} <= {"", "com.microsoft"}
        assert {o.domain for o in model.opset_import} == {"", "com.microsoft"}
        assert not model.functions
        used = {i for n in model.graph.node for i in n.input} | {o.name for o in model.graph.output}
        names = [t.name for t in model.graph.initializer]
        assert set(names) <= used
        assert len(names) == len(set(names))
        made = [o for n in model.graph.node for o in n.output if o]
        assert len(made) == len(set(made))
        counts = {f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in model.graph.node}
        assert set(case.artefact.ops[name]) == counts
        assert sum(case.artefact.ops[name].values()) == len(model.graph.node)


def test_weights_bin_holds_each_tensor_once_at_a_page_and_nothing_else(case: Case) -> None:
    raw = (case.folder / "weights.bin").read_bytes()
    regions = sorted({h.region for s in case.specs for h in case.initializers(s.name).values() if h.region is not None})
    end = 0
    for offset, length in regions:
        assert offset == end + -end % 4096
        end = offset + length
    assert end == len(raw)
    contents = [raw[offset : offset + length] for offset, length in regions]
    assert len(set(contents)) == len(contents)


@pytest.mark.parametrize("name", TIED)
def test_a_tied_embedding_and_head_share_their_bytes(cases: Callable[[str], Case], name: str) -> None:
    case = cases(name)
    alias, stored = TIED[name]
    assert case.tied == {alias: stored}
    held = case.initializers("decoder")
    nodes = case.models["decoder"].graph.node
    (lookup,) = [n for n in nodes if n.op_type == "GatherBlockQuantized"]
    rows = case.stored(stored).shape[0]
    (head,) = [
        n for n in nodes if n.op_type == "MatMulNBits" and any(a.name == "N" and a.i == rows for a in n.attribute)
    ]
    assert held[lookup.input[0]].region == held[head.input[1]].region
    assert held[lookup.input[2]].region == held[head.input[2]].region


def test_ports_are_those_of_the_spec(case: Case) -> None:
    kinds = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT64: "int64", onnx.TensorProto.BOOL: "bool"}

    def ports(values: Any) -> list[tuple[str, str, tuple[int | str, ...]]]:
        return [
            (
                v.name,
                kinds[v.type.tensor_type.elem_type],
                tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim),
            )
            for v in values
        ]

    for spec in case.specs:
        graph = case.models[spec.name].graph
        assert graph.name == spec.name
        assert ports(graph.input) == [(p.name, p.dtype, p.shape) for p in (*spec.inputs, *spec.states)]
        updated = [(f"{s.name}_out", s.dtype, s.shape) for s in spec.states if s.updated]
        assert ports(graph.output) == [*((p.name, p.dtype, p.shape) for p in spec.outputs), *updated]


def test_every_node_runs_on_the_cpu_provider(case: Case) -> None:
    placement = case.session.placement()
    assert (placement.accelerator, placement.host, placement.fallback) == ("CPUExecutionProvider", {}, {})
    assert set(placement.accelerated) == set(case.artefact.ops)
    for name, placed in placement.accelerated.items():
        written = case.artefact.ops[name]
        for op in ("MatMulNBits", "GroupQueryAttention", "GatherBlockQuantized"):
            assert placed.get(op, 0) == written.get(f"com.microsoft::{op}", 0)


# ---- corners ----


@pytest.fixture(scope="module")
def wide_table(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A Gemma 3 of one layer whose tied embedding is not quantized and too large to be folded into the graph."""
    root = tmp_path_factory.mktemp("wide")
    source = write_tiny_gemma3(root / "source", num_hidden_layers=1, layer_types=["full_attention"], vocab_size=400)
    return make_case(source, root, {"model.embed_tokens.weight": (16, 0)})


def test_a_tied_embedding_of_16_bits_is_stored_once_in_bfloat16(wide_table: Case) -> None:
    held = [h for h in wide_table.initializers("decoder").values() if 400 in h.array.shape]
    assert [(h.array.dtype.name, h.array.shape) for h in held] == [("bfloat16", (400, 64))]
    given = prompts(400, 9)
    got, want = (logits(s, wide_table.generation, given, [9, 1])[0] for s in (wide_table.session, wide_table.reference))
    assert np.abs(got - want).max() <= TOLERANCE * np.abs(want).max()


def test_a_second_process_writes_the_same_bytes(cases: Callable[[str], Case], tmp_path: Path) -> None:
    """Another process, other addresses, another hash seed: nothing of them may reach the files."""
    script = "import sys; from pathlib import Path; from test_onnx_export import lower\n"
    script += "for source, out in zip(sys.argv[1::2], sys.argv[2::2]): lower(Path(source), Path(out))\n"
    pairs = [(cases(name).folder.parent / "checkpoint", tmp_path / name) for name in WRITERS]
    run = subprocess.run(
        [sys.executable, "-c", script, *(str(p) for pair in pairs for p in pair)],
        env=os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    for name in WRITERS:
        first, second = ({p.name: p.read_bytes() for p in d.iterdir()} for d in (cases(name).folder, tmp_path / name))
        assert first == second


# ---- reading back


def test_weights_are_read_back_under_the_checkpoints_names(case: Case) -> None:
    """Every quantized weight of the plan, q/k/v that were fused apart again, a tied head under its own name too."""
    found = {name: values.numpy() for name, values in exporter.read_weights(case.folder)}
    quantized = {n for n, e in case.plan.entries.items() if e.bits != UNQUANTIZED}
    assert quantized <= set(found) <= quantized | set(case.tied)
    for name, values in found.items():
        assert np.array_equal(values, case.stored(case.tied.get(name, name))), name


@pytest.mark.parametrize("damage", ["short", "elsewhere", "unnamed"])
def test_a_damaged_file_is_not_read_back(case: Case, tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(case.folder, tmp_path / "copy"))
    model = onnx.load(folder / "decoder.onnx", load_external_data=False)
    if damage == "short":
        (folder / "weights.bin").write_bytes((folder / "weights.bin").read_bytes()[:100])
    for tensor in model.graph.initializer if damage == "elsewhere" else ():
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../weights.bin"
    for node in model.graph.node if damage == "unnamed" else ():
        del node.metadata_props[:]
    (folder / "decoder.onnx").write_bytes(model.SerializeToString())
    said = {"short": "shorter than the", "elsewhere": "outside the folder", "unnamed": "does not say which weights"}
    with pytest.raises(UserError, match=said[damage]):
        list(exporter.read_weights(folder))
