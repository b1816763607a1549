"""Tiny models through the ExecuTorch exporter: what `model.pte` holds, and what ExecuTorch's runtime computes from it.

Each model mixes 2, 3, 4, 5, 6, 8 and 16 bits, groups of 32 and 64 and per-channel scales. A delegate can be wrong without
a word (see docs/executorch.md), so the program is compared twice: before lowering, with float32 activations, against
the reference; and after lowering against the program before lowering, both with int8 activations.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.onnx_cases import quantize
from helpers.requests import asking
from helpers.tiny import EXAMPLE, write_tiny_gemma3, write_tiny_llama, write_tiny_t5gemma

from edgewright.bundle import Generation, GraphSpec
from edgewright.checkpoints.checkpoint import Checkpoint
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.errors import UserError
from edgewright.exporters.artefact import Artefact, Options
from edgewright.models.loading import load_dequantized, load_quantized
from edgewright.models.registry import build
from edgewright.quant.plan import UNQUANTIZED, BitPlan
from edgewright.runtimes.eager import EagerSession
from edgewright.runtimes.generate import Stream
from edgewright.runtimes.session import Session

pytest.importorskip("executorch")

from edgewright.exporters.executorch import export as exporter
from edgewright.exporters.executorch import lowerings
from edgewright.runtimes.executorch.session import ExecuTorchSession
from edgewright.targets.executorch.libraries import libraries
from edgewright.targets.executorch.program import ProgramFile

CONTEXT = 32
CHUNK = 8
PER_CHANNEL = 0
CHOICES = [(2, 32), (8, PER_CHANNEL), (3, 32), (4, 64), (16, 0), (5, PER_CHANNEL), (4, PER_CHANNEL), (6, PER_CHANNEL)]
TWO_LAYERS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
WRITERS: dict[str, Any] = {
    "t5gemma": lambda path: write_tiny_t5gemma(path, decoder=TWO_LAYERS, encoder=TWO_LAYERS),
    "llama": lambda path: write_tiny_llama(path, num_hidden_layers=2),
    "gemma3": lambda path: write_tiny_gemma3(path, **TWO_LAYERS),
}
TABLES = {
    "t5gemma": {"model.encoder.embed_tokens.weight": (2, 32), "model.decoder.embed_tokens.weight": (3, 32)},
    "llama": {"model.embed_tokens.weight": (16, 0), "lm_head.weight": (5, PER_CHANNEL)},
    "gemma3": {"model.embed_tokens.weight": (6, PER_CHANNEL)},
}


def dynamic_linear(x: Any, codes: Any, scales: Any, bias: Any, bits: int, group: int) -> Any:
    """What XNNPACK is asked for: x in int8, one scale and zero point a row, times the codes."""
    low = x.amin(-1, keepdim=True).clamp(max=0)
    high = x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).eps)
    zero = (-128 - (low / scale)).round().clamp(-128, 127)
    rounded = (((x / scale).round() + zero).clamp(-128, 127) - zero) * scale
    return torch.ops.edgewright.quantized_linear(rounded, codes, scales, bias, bits, group)


class BeforeLowering:
    """The exporter's programs run by torch, one stream at a time."""

    def __init__(self, graphs: list[Any], linear: Any = dynamic_linear) -> None:
        self.specs = {g.name: GraphSpec.of(g) for g in graphs}
        lookup = lowerings.quantized_embedding
        with pytest.MonkeyPatch.context() as patch:
            # embedding_byte in torch rounds code times scale to the scale's type; ExecuTorch's kernel does not (see below)
            patch.setattr(lowerings, "quantized_embedding", lambda i, c, scales, b: lookup(i, c, scales.float(), b))
            programs = {g.name: exporter.method(g, CONTEXT) for g in graphs}
        self.modules = {name: program.module(check_guards=False) for name, program in programs.items()}
        for module in self.modules.values():
            for node in module.graph.nodes:
                if node.target is torch.ops.edgewright.quantized_linear.default:
                    node.target = linear
            module.recompile()

    def new_state(self, batch: int, capacity: int) -> dict[str, Any]:
        assert batch == 1
        return {}

    def run(self, graph: str, inputs: Any, state: dict[str, Any]) -> dict[str, Any]:
        spec = self.specs[graph]
        values = [torch.from_numpy(inputs[p.name]) for p in spec.inputs]
        values += [state[s.name] for s in spec.states if not s.updated]
        if "past_length" in inputs:
            values.append(torch.arange(int(inputs["past_length"][0]) + inputs["input_ids"].shape[1]))
        out = self.modules[graph](*values)
        named = dict(zip([p.name for p in spec.outputs], out, strict=True))
        held = {s.name for other in self.specs.values() for s in other.states}
        state.update({n: v for n, v in named.items() if n in held})
        return {n: v.numpy() for n, v in named.items() if n not in held}


@dataclass
class Case:
    name: str
    folder: Path
    artefact: Artefact
    checkpoint: Checkpoint
    plan: BitPlan
    specs: list[GraphSpec]
    generation: Generation

    def quantized(self) -> Any:
        model = build(self.checkpoint.config)
        load_quantized(model, self.checkpoint)
        return model

    def session(self) -> ExecuTorchSession:
        return ExecuTorchSession(self.folder, self.specs, threads=1)


@pytest.fixture(
    scope="module", params=[n if n == "llama" else pytest.param(n, marks=pytest.mark.slow) for n in WRITERS]
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name = request.param
    root = tmp_path_factory.mktemp(name)
    plan = quantize(WRITERS[name](root / "source"), root / "checkpoint", TABLES[name], CHOICES)
    checkpoint = open_checkpoint(str(root / "checkpoint"))
    model = build(checkpoint.config)
    load_quantized(model, checkpoint)
    folder = root / "executorch"
    folder.mkdir()
    graphs = model.graphs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "CHUNK", CHUNK)
        artefact = exporter.export(graphs, folder, Options(max_positions=CONTEXT))
    generation = Generation(
        task=model.task,
        decoder_start=model.decoder_start,
        vocab=next(p.shape[-1] for g in graphs for p in g.outputs if p.name == "logits"),
        max_context=CONTEXT,
        max_new_tokens=16,
    )
    return Case(name, folder, artefact, checkpoint, plan, [GraphSpec.of(g) for g in graphs], generation)


def prompts(vocab: int, *lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [[int(t) for t in rng.integers(3, vocab, n)] for n in lengths]


def logits(session: Session, spec: Generation, given: list[list[int]], chunks: list[int]) -> np.ndarray:
    """Logits of every position of random tokens fed in pieces, behind the prompts' encoding where there is one."""
    stream = Stream(session, spec, given if spec.task == "seq2seq" else [[3]] * len(given), CONTEXT)
    tokens = np.random.default_rng(5).integers(3, spec.vocab, (len(given), sum(chunks)))
    ends = itertools.accumulate(chunks)
    return np.concatenate([stream.feed(tokens[:, e - n : e], every=True) for n, e in zip(chunks, ends, strict=True)], 1)


def worst(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    assert np.abs(want).max() > 1
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.slow
def test_the_rewritten_program_with_float_activations_is_the_reference(case: Case) -> None:
    rewritten = BeforeLowering(case.quantized().graphs(), torch.ops.edgewright.quantized_linear.default)
    model = build(case.checkpoint.config)
    load_dequantized(model, case.checkpoint)
    reference = EagerSession(model.graphs())
    for source, chunks in [(9, [6, 1, 1, 7, 1]), (1, [1, 1, 4]), (20, [16])]:
        given = prompts(case.generation.vocab, source)
        got, want = (logits(s, case.generation, given, chunks) for s in (rewritten, reference))
        assert worst(got, want) < 2e-5


@pytest.mark.slow
def test_xnnpack_computes_the_rewritten_program(case: Case) -> None:
    """Both round inputs to int8; where a float's last bit decides a rounding, one code may differ: hence the tolerance."""
    declared, session = BeforeLowering(case.quantized().graphs()), case.session()
    for source, chunks in [(9, [6, 1, 1, 7, 1]), (1, [1, 1, 4]), (20, [8])]:
        given = prompts(case.generation.vocab, source)
        got, want = (logits(s, case.generation, given, chunks) for s in (session, declared))
        assert worst(got, want) < 1e-2
        assert np.sqrt(np.mean((got - want) ** 2)) < 2e-3 * np.abs(want).max()


def test_int8_activations_stay_near_the_reference(case: Case) -> None:
    model = build(case.checkpoint.config)
    load_dequantized(model, case.checkpoint)
    given = prompts(case.generation.vocab, 12)
    got, want = (logits(s, case.generation, given, [10, 1]) for s in (case.session(), EagerSession(model.graphs())))
    assert 1e-4 < worst(got, want) < 0.1
    assert case.session().activations == "int8"


def test_pieces_longer_than_the_program_takes_are_fed_in_parts(case: Case) -> None:
    session, given = case.session(), prompts(case.generation.vocab, 12)
    whole = logits(session, case.generation, given, [2 * CHUNK + 3])
    parts = logits(session, case.generation, given, [CHUNK, CHUNK, 3])
    assert np.array_equal(whole, parts)
    stream = Stream(session, case.generation, given if case.name == "t5gemma" else [[3]], CONTEXT)
    tokens = np.random.default_rng(5).integers(3, case.generation.vocab, (1, 2 * CHUNK + 3))
    assert np.array_equal(stream.feed(tokens), whole[:, -1:])


def test_streams_of_one_session_do_not_touch_each_other(case: Case) -> None:
    session, given = case.session(), prompts(case.generation.vocab, 9, 4)
    tokens = np.random.default_rng(1).integers(3, case.generation.vocab, (2, 6))

    def streams() -> list[Stream]:
        return [Stream(session, case.generation, [p if case.name == "t5gemma" else [3]], CONTEXT) for p in given]

    alone = [[stream.feed(tokens[row : row + 1, i : i + 1]) for i in range(6)] for row, stream in enumerate(streams())]
    pair = streams()
    for i in range(6):
        for row, stream in enumerate(pair):
            assert np.array_equal(stream.feed(tokens[row : row + 1, i : i + 1]), alone[row][i])


def test_rows_of_a_batch_are_those_rows_alone(case: Case) -> None:
    session, given = case.session(), prompts(case.generation.vocab, 12, 5, 1)
    together = logits(session, case.generation, given, [5, 1, 1])
    tokens = np.random.default_rng(5).integers(3, case.generation.vocab, (3, 7))
    for row, prompt in enumerate(given):
        stream = Stream(session, case.generation, [prompt if case.name == "t5gemma" else [3]], CONTEXT)
        assert worst(stream.feed(tokens[row : row + 1], every=True), together[row : row + 1]) < 1e-2


def test_the_libraries_that_a_program_needs_are_said(case: Case) -> None:
    said = case.artefact.facts["libraries"]
    assert said == exporter.read_facts(case.folder)["libraries"]
    assert isinstance(said, dict)
    assert set(said) <= {
        "executorch",
        "xnnpack_backend",
        "custom_ops",
        "quantized_ops_lib",
        "optimized_native_cpu_ops_lib",
    }
    assert said["xnnpack_backend"] == ["XnnpackBackend"]
    assert "llama::update_cache.out" in said["custom_ops"]
    tables = case.name != "llama"  # its table is left at 16 bits
    assert any(op.startswith("quantized_decomposed::embedding_") for op in said.get("quantized_ops_lib", [])) == tables
    called = {op for ops in said.values() for op in ops if "::" in op}
    counted = {
        op.removeprefix("CPU: ").removesuffix(" on positions") for ops in case.artefact.ops.values() for op in ops
    }
    assert called == {op for op in counted if "::" in op}


def test_a_kernel_of_no_library_is_refused() -> None:
    with pytest.raises(UserError, match="foreign::op is in none of ExecuTorch's libraries"):
        libraries(["foreign::op"], [])


def test_weights_are_stored_once(case: Case) -> None:
    program = ProgramFile(case.folder / "model.pte")
    raw = (case.folder / "model.pte").read_bytes()
    for weight in program.weights():
        if weight.kind == "linear" and weight.bits == 4:
            assert raw.count(weight.codes.numpy().tobytes()) == 1


def test_the_weights_in_the_program_are_bit_for_bit_the_quantized_checkpoint(case: Case) -> None:
    model = build(case.checkpoint.config)
    load_dequantized(model, case.checkpoint)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    planned = {n for n, e in case.plan.entries.items() if e.bits != UNQUANTIZED}
    found = list(exporter.read_weights(case.folder))
    assert {name for name, _ in found} == planned
    for name, values in found:
        assert torch.equal(values, parameters[name].to(torch.float32)), name
    tied = [stored for stored in model.tied.values() if stored in planned]
    for name in tied:  # the embedding's table and the head's matrix
        assert sum(n == name for n, _ in found) == 2, name
    assert bool(tied) == (case.name != "llama")


def test_codes_lie_in_the_narrowest_form_xnnpack_has(case: Case) -> None:
    kinds = {(w.kind, w.bits) for w in ProgramFile(case.folder / "model.pte").weights()}
    assert {("linear", 4), ("linear", 8)} <= kinds <= {(k, b) for k in ("linear", "embedding") for b in (2, 4, 8)}
    assert ("linear", 2) not in kinds
    expected = {"t5gemma": {2, 4}, "llama": set(), "gemma3": {8}}[case.name]
    assert {b for k, b in kinds if k == "embedding"} == expected


def test_a_changed_code_is_found_at_export(case: Case) -> None:
    model = case.quantized()
    module = next(m for m in model.modules() if hasattr(m, "codes") and hasattr(m, "bias"))
    module.codes = module.codes ^ 1
    with pytest.raises(ValueError, match="does not hold the codes and scales of"):
        exporter._names(model.graphs(), ProgramFile(case.folder / "model.pte"))


def test_xnnpack_computes_all_but_what_the_lowering_keeps(case: Case) -> None:
    placed = case.session().placement()
    assert placed.accelerator == "XnnpackBackend"
    assert set(placed.accelerated) == {spec.name for spec in case.specs}
    model = case.quantized()
    linears = sum(hasattr(m, "codes") and hasattr(m, "bias") for m in model.modules())
    assert sum(ops["FullyConnected"] for ops in placed.accelerated.values()) > linears
    for graph, ops in case.artefact.ops.items():
        units = [counts.get(graph, {}) for counts in (placed.host, placed.fallback)]
        flat = {f"XnnpackBackend: {op}": n for op, n in placed.accelerated[graph].items()}
        assert ops == flat | {f"CPU: {op}": n for unit in units for op, n in unit.items()}
    layers = 2
    kept = placed.host["decoder"]
    assert kept["llama::update_cache.out"] == 2 * layers
    assert kept.get("llama::custom_sdpa.out", 0) == (0 if case.name == "t5gemma" else layers)
    copied = {"t5gemma": 2 * layers, "llama": 0, "gemma3": 2}[
        case.name
    ]  # a soft-capped layer's cache, a windowed one's
    assert kept.get("aten::slice_copy.Tensor_out", 0) == copied
    assert placed.fallback == {}
    assert not any("sin" in op or "cos" in op for ops in placed.host.values() for op in ops)


def test_a_layer_is_one_delegate(case: Case) -> None:
    """All between two writes to a cache, and what comes before the first and after the last; then the head."""
    placed = case.session().placement()
    # Behind the last write of the two-layer decoders: the rest of the layer; behind index_select: norm and head. A
    # soft-capped layer attends in the delegate, so that an encoder-decoder's two layers are cut twice.
    assert placed.accelerated["decoder"]["delegate"] == 4
    if case.name == "t5gemma":
        assert {name: placed.accelerated[name]["delegate"] for name in ("encoder", "cross_kv")} == {
            "encoder": 1,
            "cross_kv": 1,
        }


def test_damaged_programs_are_refused_in_one_line(case: Case, tmp_path: Path) -> None:
    whole = (case.folder / "model.pte").read_bytes()
    names = (case.folder / "weights.json").read_text()
    (tmp_path / "weights.json").write_text(names)
    constants = whole.rindex(ProgramFile(case.folder / "model.pte").named(_any_key(case)).tobytes()[:64])
    flipped = bytearray(whole)
    flipped[constants] ^= 1
    for content, message in [
        (b"", "no whole ExecuTorch program"),
        (b"no program at all" * 100, "no whole ExecuTorch program"),
        (whole[: len(whole) // 2], "no whole ExecuTorch program"),
        (bytes(flipped), "holds a weight that weights.json does not know"),
    ]:
        (tmp_path / "model.pte").write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            list(exporter.read_weights(tmp_path))
        assert "\n" not in str(caught.value)
    (tmp_path / "model.pte").write_bytes(whole)
    for content, message in [
        ("[]", "an object is needed"),
        ('{"w": 3}', "no list of strings"),
        ("{}", "does not know"),
        (names[:-2] + ', "w": ["no such digest"]}', "does not hold w as weights.json knows it"),
    ]:
        (tmp_path / "weights.json").write_text(content)
        with pytest.raises(UserError, match=message):
            list(exporter.read_weights(tmp_path))


def _any_key(case: Case) -> str:
    """Of the codes of some linear."""
    program = ProgramFile(case.folder / "model.pte")
    plan = next(p for p in program.program.execution_plan if p.name == "decoder")
    graph = program.delegate(plan, 0)
    key: str = max(graph["constant_data"], key=lambda c: int(c["size"]))["named_key"]
    return key


@pytest.mark.slow
def test_the_example_exports_and_verifies(tmp_path: Path) -> None:
    from edgewright.compiler import export
    from edgewright.verification.checking import verify_here

    made = export(asking(str(EXAMPLE), ("executorch",), task=EXAMPLE / "task.tsv"), tmp_path / "bundle")
    (target,) = verify_here(made.path).targets
    assert target.passed
    assert target.lowering.top1 >= 0.99
    assert target.lowering.prompts_identical >= 30
