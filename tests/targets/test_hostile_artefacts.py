"""Artefacts looked through before a native library gets them: what no exporter here writes is refused in one line."""

from __future__ import annotations

import contextlib
import os
import random
import struct
import sys
from pathlib import Path

import onnx
import pytest
from helpers import hostile_graphs as hostile
from helpers.requests import asking
from helpers.tiny import write, write_tiny_llama
from helpers.tiny_families import FAMILIES

from edgewright import compiler
from edgewright.errors import UserError
from edgewright.targets.executorch.plan_check import check_program
from edgewright.targets.onnx.graph_check import check_graph
from edgewright.targets.onnx.wire import fields, varints
from edgewright.targets.registry import TARGETS


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        check_graph(path)
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < 400
    return line


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Must not be written to."""
    folder = tmp_path_factory.mktemp("llama")
    model = write_tiny_llama(folder / "model", num_hidden_layers=1)
    compiler.export(asking(str(model), bits=6.0, verify=False), folder / "bundle")
    return folder / "bundle"


@pytest.fixture
def graph(bundle: Path, tmp_path: Path) -> Path:
    """`decoder.onnx` with its weights, in a folder that may be written to."""
    for name in ("decoder.onnx", "weights.bin"):
        (tmp_path / name).write_bytes((bundle / "onnx" / name).read_bytes())
    return tmp_path / "decoder.onnx"


def edit(path: Path, change: hostile.Edit) -> None:
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())


@pytest.mark.slow
def test_a_graph_in_a_scan_passes(tmp_path: Path) -> None:
    """Of all families SambaY alone has a graph in a node."""
    model = write(tmp_path / "model", FAMILIES["phi4flash"])
    made = compiler.export(asking(str(model), num_layers=1, verify=False), tmp_path / "bundle")
    file = made.path / "onnx" / "decoder.onnx"
    assert "Scan" in {node.op_type for node in onnx.load(file, load_external_data=False).graph.node}
    check_graph(file)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (hostile.endless_loop, "a graph inside 'Loop'"),
        (hostile.nested_scan, "a graph inside 'Scan' inside another"),
        (hostile.foreign_op, "ops of the domain 'stranger'"),
        (hostile.own_function, "functions of its own"),
        (hostile.huge_weight, "more elements than any file holds"),
        (hostile.weights_in("../../weights.bin"), "weights in '../../weights.bin', outside its folder"),
        (hostile.weights_in("/dev/zero"), "outside its folder"),
        (hostile.weights_in("/etc/passwd"), "outside its folder"),
        (hostile.weights_in("*/_ORT_MEM_ADDR_/*"), "outside its folder"),
        (hostile.weights_in(".."), "outside its folder"),
        (hostile.weights_in(""), "outside its folder"),
        (hostile.weights_in("C:weights.bin"), "outside its folder"),
        (hostile.weights_in("absent.bin"), "absent.bin: cannot be read"),
        (hostile.weights_in("weights.bin", length="9" * 30), "beyond the end of weights.bin"),
        (hostile.weights_in("weights.bin", offset="-4096"), "beyond the end of weights.bin"),
        (hostile.weights_in("weights.bin", offset="many"), "no numbers"),
        (hostile.weights_in("weights.bin", offset="9" * 9999), "no numbers"),
    ],
)
def test_a_hostile_graph_is_refused(graph: Path, change: hostile.Edit, words: str) -> None:
    check_graph(graph)
    edit(graph, change)
    assert words in refusal(graph)


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes in folders")
def test_weights_in_a_pipe_are_not_waited_for(graph: Path) -> None:
    os.mkfifo(graph.with_name("pipe"))
    edit(graph, hostile.weights_in("pipe"))
    assert "a pipe, a regular file is needed" in refusal(graph)
    graph.unlink()
    os.mkfifo(graph)
    assert "a pipe, a regular file is needed" in refusal(graph)


def test_a_loop_cannot_hide_in_an_unusual_spelling(graph: Path) -> None:
    """Protobuf takes a number with needless bytes, a field twice, and a message in two pieces."""
    model = onnx.load(graph, load_external_data=False)
    hostile.endless_loop(model)
    (loop,) = (n for n in model.graph.node if n.op_type == "Loop")
    plain = loop.SerializeToString()
    scan = onnx.NodeProto(op_type="Scan").SerializeToString()
    for node in (scan + plain, plain.replace(b"\x22\x04Loop", b"\xa2\x80\x00\x84\x80\x00Loop")):
        parsed = onnx.NodeProto.FromString(node)
        assert parsed.op_type == "Loop"
        body = b"\x0a" + _length(len(node)) + node
        whole = model.SerializeToString() + b"\x3a" + _length(len(body)) + body  # the graph goes on in a second piece
        assert onnx.ModelProto.FromString(whole).graph.node[-1].op_type == "Loop"
        graph.write_bytes(whole)
        assert "a graph inside 'Loop'" in refusal(graph)


def _length(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def test_a_damaged_file_is_refused_or_as_harmless_as_before(graph: Path) -> None:
    data, rng = bytearray(graph.read_bytes()), random.Random(0)
    for _ in range(300):
        changed = bytearray(data[: rng.randrange(len(data))]) if rng.random() < 0.3 else bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            if changed:
                changed[rng.randrange(len(changed))] = rng.randrange(256)
        graph.write_bytes(changed)
        with contextlib.suppress(UserError):
            check_graph(graph)


def test_numbers_and_fields_as_protobuf_writes_them() -> None:
    tensor = onnx.TensorProto(dims=[1, 300, 1 << 40], name="x")
    found = list(fields(memoryview(tensor.SerializeToString())))
    assert [n for number, value in found if number == 1 for n in varints(value)] == [1, 300, 1 << 40]
    assert varints(memoryview(b"\x01\xac\x02")) == [1, 300]
    for broken in (b"\x0a\x05abc", b"\x08" + b"\xff" * 11, b"\x08", b"\x0b", b"\x09abc", b"\xff"):
        with pytest.raises(ValueError, match=r"longer than|without an end|unknown kind"):
            list(fields(memoryview(broken)))


# ExecuTorch


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    if not TARGETS["executorch"].installed:
        pytest.skip("executorch is not installed")
    folder = tmp_path_factory.mktemp("executorch")
    model = write_tiny_llama(folder / "model", num_hidden_layers=1)
    compiler.export(asking(str(model), ("executorch",), bits=8.0, verify=False), folder / "bundle")
    return (folder / "bundle" / "executorch" / "model.pte").read_bytes()


def test_a_program_is_looked_through(program: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.pte"
    file.write_bytes(program)
    assert 0 < check_program(file) < 1 << 30
    for data in (b"", b"x", program[:200], b"\0" * 4096, program[:4] + b"XX12" + program[8:]):
        file.write_bytes(data)
        with pytest.raises(UserError, match="no whole ExecuTorch program"):
            check_program(file)


def test_damaged_programs_never_keep_it_busy(program: bytes, tmp_path: Path) -> None:
    file, rng = tmp_path / "model.pte", random.Random(0)
    tables = program[: min(len(program), 1 << 16)]
    for _ in range(150):
        data = bytearray(tables)
        for _ in range(rng.randrange(1, 8)):
            at = rng.randrange(8, len(data) - 4)
            data[at : at + 4] = struct.pack("<I", rng.choice((0, 1, 0xFFFFFFFF, 0x7FFFFFFF, rng.randrange(len(data)))))
        file.write_bytes(data)
        with contextlib.suppress(UserError):
            check_program(file)


def test_jumps_and_planned_memory_are_refused(program: bytes, tmp_path: Path) -> None:
    from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary
    from executorch.exir.schema import Instruction, JumpFalseCall

    file = tmp_path / "model.pte"
    whole = deserialize_pte_binary(program)
    plan = whole.program.execution_plan[0]
    sizes, plan.non_const_buffer_sizes = plan.non_const_buffer_sizes, [0, 1 << 50]
    file.write_bytes(bytes(serialize_pte_binary(whole)))
    with pytest.raises(UserError, match=r"plans memory: about 1048576\.0 GiB"):
        check_program(file)
    plan.non_const_buffer_sizes = sizes
    plan.chains[0].instructions.append(Instruction(JumpFalseCall(0, 0)))
    file.write_bytes(bytes(serialize_pte_binary(whole)))
    with pytest.raises(UserError, match="it jumps"):
        check_program(file)
