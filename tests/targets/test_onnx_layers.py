"""Which layer a node of an ONNX file belongs to, and how the times of a trace are put together by it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from helpers.onnx_cases import Case
from onnx import TensorProto, helper

from edgewright.runtimes.onnx.kernel_times import Kernel, by_layer, by_op, read_trace
from edgewright.targets.onnx.layers import INPUTS, nodes_by_layer, place_of
from edgewright.targets.onnx.nodes import LABEL


@pytest.mark.parametrize(
    ("weight", "place"),
    [
        ("model.layers.12.mlp.up_proj.weight", "model.layers.12"),
        ("model.decoder.layers.0.self_attn.q_proj+k_proj+v_proj.q4.scales", "model.decoder.layers.0"),
        ("model.layers.3.mlp.experts.7.up.weight", "model.layers.3"),
        ("transformer.h.1.ln_1.bias", "transformer.h.1"),
        ("lm_head.out_proj.q8", "lm_head.out_proj"),
        ("model.embed_tokens.q4.rows", "model.embed_tokens"),
        ("model.norm.weight.gamma", "model.norm"),
    ],
)
def test_the_place_of_a_weight(weight: str, place: str) -> None:
    assert place_of(weight) == place


def _two_layers(path: Path, label: str | None = None) -> Path:
    """x -> Cast -> layer 0's product -> Relu -> norm whose weight is layer 1's -> layer 1's product -> Sigmoid."""
    nodes = [
        helper.make_node("Cast", ["x"], ["c"], "cast", to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["c", "m.layers.0.a.weight"], ["p"], "first"),
        helper.make_node("Relu", ["p"], ["r"], "relu"),
        helper.make_node("Mul", ["r", "m.layers.1.norm.weight"], ["n"], "norm"),
        helper.make_node("MatMul", ["n", "second.weight"], ["q"], "second"),
        helper.make_node("Sigmoid", ["q"], ["y"], "last"),
    ]
    if label is not None:
        nodes[4].metadata_props.add(key=LABEL, value=label)
    weights = [
        helper.make_tensor("m.layers.0.a.weight", TensorProto.FLOAT, (2, 2), [0.0] * 4),
        helper.make_tensor("m.layers.1.norm.weight", TensorProto.FLOAT, (2,), [1.0, 1.0]),
        helper.make_tensor("second.weight", TensorProto.FLOAT, (2, 2), [0.0] * 4),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 2)) for name in "xy"]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", ports[:1], ports[1:], weights)), str(path))
    return path


def test_nodes_between_two_layers(tmp_path: Path) -> None:
    found = nodes_by_layer(_two_layers(tmp_path / "a.onnx", json.dumps([["m.layers.1.b.weight", 2]])))
    assert found == {
        "cast": INPUTS,
        "first": "m.layers.0",
        "relu": "m.layers.0",
        "norm": "m.layers.1",
        "second": "m.layers.1",
        "last": "m.layers.1",
    }


@pytest.mark.parametrize("label", ["", "7", "[]", "{}", "[[]]", "[[3, 4]]", "[" * 90])
def test_a_label_of_a_stranger(tmp_path: Path, label: str) -> None:
    assert set(nodes_by_layer(_two_layers(tmp_path / "a.onnx", label))) >= {"first", "second"}


@pytest.mark.parametrize("name", ["llama", "t5gemma"])
def test_every_quantized_node_of_an_export_is_in_the_layer_of_its_weight(
    onnx_cases: Callable[[str], Case], name: str
) -> None:
    case = onnx_cases(name)
    for file in sorted(case.folder.glob("*.onnx")):
        graph = onnx.load(str(file), load_external_data=False).graph
        places = nodes_by_layer(file)
        assert set(places) == {node.name for node in graph.node}
        for node in graph.node:
            for entry in node.metadata_props:
                if entry.key == LABEL:
                    assert {place_of(weight) for weight, _ in json.loads(entry.value)} == {places[node.name]}
        layers = {p for p in places.values() if p.rpartition(".")[2].isdecimal()}
        counts = Counter(places.values())
        assert all(counts[layer] > 2 for layer in layers)
        if file.stem != "cross_kv":  # attention is in the layer of the products around it
            attention = [n.name for n in graph.node if "Attention" in n.op_type]
            assert attention
            assert {places[n] for n in attention} == layers


def _event(name: str, start: int, length: int, op: str = "Relu") -> dict[str, object]:
    args = {"op_name": op, "provider": "CPUExecutionProvider"}
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": start, "dur": length, "args": args}


def test_a_trace_is_read_call_by_call_and_nothing_twice(tmp_path: Path) -> None:
    runs = [{"cat": "Session", "name": "model_run", "ts": at, "dur": 900} for at in (1000, 2000)]
    events = [
        _event("early", 10, 5),
        _event("a", 1000, 100),
        _event("loop", 1200, 500, "Scan"),
        _event("inside", 1300, 100),
        _event("a", 2000, 300),
        _event("b/Fusion", 2400, 50),
    ]
    (tmp_path / "trace.json").write_text(json.dumps([*runs, *events]))
    kernels = read_trace(tmp_path / "trace.json")
    assert [(k.node, k.call, k.ms) for k in kernels] == [("a", 0, 0.1), ("loop", 0, 0.5), ("a", 1, 0.3), ("b", 1, 0.05)]
    ops = by_op(kernels)
    assert [(o["op"], o["calls"]) for o in ops] == [("Scan", 1), ("Relu", 3)]
    assert sum(o["share"] for o in ops) == pytest.approx(1)


def test_layers_have_the_median_of_their_calls() -> None:
    kernels = [Kernel("n10", "Relu", "CPU", call, ms) for call, ms in enumerate((9.0, 1.0, 2.0, 30.0))]
    kernels += [Kernel("n2", "Relu", "CPU", call, 1.0) for call in range(4)]
    kernels += [Kernel("strange", "Relu", "CPU", 1, 0.5)]
    rows = by_layer(kernels, {"n10": "m.layers.10", "n2": "m.layers.2"}, [1, 2, 3], INPUTS)
    assert [row["layer"] for row in rows] == ["m.layers.2", "m.layers.10", INPUTS]
    assert [row["ms"] for row in rows] == [1.0, 2.0, 0.0]
    assert {row["calls"] for row in rows} == {3}
