"""What the files of the ONNX exporter hold: weights bit for bit, each once, ports, nodes; and reading them back."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import reference_formulas
from helpers.onnx_cases import FAST, TIED, TOLERANCE, WRITERS, Case, logits, make_case, prompts
from helpers.tiny import write_tiny_gemma3

from edgewright.errors import UserError
from edgewright.exporters.onnx import export as exporter
from edgewright.models.registry import build
from edgewright.quant.plan import UNQUANTIZED
from edgewright.quant.units import quantizable_units


@pytest.fixture(params=FAST)
def case(request: pytest.FixtureRequest, onnx_cases: Callable[[str], Case]) -> Case:
    return onnx_cases(request.param)


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
        codes = reference_formulas.signed_codes(packed.reshape(len(packed), -1), bits).astype(np.float32)
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
    alone = ["genai.onnx"] if len(case.specs) == 1 else []  # the same graph for onnxruntime-genai
    assert sorted(case.artefact.files) == sorted([*(f"{s.name}.onnx" for s in case.specs), *alone, "weights.bin"])
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
def test_a_tied_embedding_and_head_share_their_bytes(onnx_cases: Callable[[str], Case], name: str) -> None:
    case = onnx_cases(name)
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


@pytest.mark.slow
def test_a_second_process_writes_the_same_bytes(onnx_cases: Callable[[str], Case], tmp_path: Path) -> None:
    """Another process, other addresses, another hash seed: nothing of them may reach the files."""
    script = "import sys; from pathlib import Path; from helpers.onnx_cases import lower\n"
    script += "for source, out in zip(sys.argv[1::2], sys.argv[2::2]): lower(Path(source), Path(out))\n"
    pairs = [(onnx_cases(name).folder.parent / "checkpoint", tmp_path / name) for name in WRITERS]
    run = subprocess.run(
        [sys.executable, "-c", script, *(str(p) for pair in pairs for p in pair)],
        env=os.environ
        | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parent.parent.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    for name in WRITERS:
        first, second = (
            {p.name: p.read_bytes() for p in d.iterdir()} for d in (onnx_cases(name).folder, tmp_path / name)
        )
        assert first == second


# ---- reading back


def test_no_path_of_this_machine_is_in_the_files(case: Case) -> None:
    for path in case.folder.glob("*.onnx"):
        stored = path.read_bytes()
        assert b".py" not in stored
        assert b"pkg.torch" not in stored


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
