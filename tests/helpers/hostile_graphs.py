"""Bundles whose hashes are right and whose graphs are a stranger's: ONNX files edited, and the manifest mended behind them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto as Kind
from onnx import helper, numpy_helper

Edit = Callable[[onnx.ModelProto], object]


def mend(bundle: Path, *names: str) -> None:
    """Give files of a bundle the hash that they have now; None where they are gone."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    for name in names:
        file = bundle / name
        if file.is_file():
            manifest["files"][name] = hashlib.sha256(file.read_bytes()).hexdigest()
        else:
            manifest["files"].pop(name, None)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def edit_graph(bundle: Path, edit: Edit, name: str = "onnx/decoder.onnx") -> None:
    model = onnx.load(bundle / name, load_external_data=False)
    edit(model)
    (bundle / name).write_bytes(model.SerializeToString())
    mend(bundle, name)


def _into_logits(model: onnx.ModelProto, nodes: list[onnx.NodeProto], scalar: str) -> None:
    """Add `scalar`, which `nodes` compute, to the logits, so that nothing of it is left out as unused."""
    graph = model.graph
    for node in graph.node:
        for outputs in (node.output, node.input):
            for i, value in enumerate(outputs):
                if value == "logits":
                    outputs[i] = "logits.before"
    for i, node in enumerate(nodes):
        graph.node.insert(i, node)
    graph.node.append(helper.make_node("Add", ["logits.before", scalar], ["logits"], name="hostile.add"))


def constant(name: str, values: Any) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(values), name), name=name)


def endless_loop(model: onnx.ModelProto) -> None:
    """A Loop without a count, whose condition is always true."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["goes"], name="hostile.go"),
            helper.make_node("Identity", ["carried"], ["carries"], name="hostile.carry"),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", Kind.INT64, []),
            helper.make_tensor_value_info("go", Kind.BOOL, []),
            helper.make_tensor_value_info("carried", Kind.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("goes", Kind.BOOL, []),
            helper.make_tensor_value_info("carries", Kind.FLOAT, []),
        ],
    )
    nodes = [
        constant("hostile.true", True),
        constant("hostile.zero", np.float32(0)),
        helper.make_node("Loop", ["", "hostile.true", "hostile.zero"], ["hostile.out"], body=body, name="hostile.loop"),
    ]
    _into_logits(model, nodes, "hostile.out")


def nested_scan(model: onnx.ModelProto) -> None:
    """A Scan in a Scan: each may go over a thousand entries, and so on."""
    leaf = helper.make_graph(
        [helper.make_node("Identity", ["y"], ["z"], name="hostile.inner")],
        "inner",
        [helper.make_tensor_value_info("y", Kind.FLOAT, None)],
        [helper.make_tensor_value_info("z", Kind.FLOAT, None)],
    )
    outer = helper.make_graph(
        [helper.make_node("Scan", ["x"], ["w"], body=leaf, num_scan_inputs=1, name="hostile.scan2")],
        "outer",
        [helper.make_tensor_value_info("x", Kind.FLOAT, None)],
        [helper.make_tensor_value_info("w", Kind.FLOAT, None)],
    )
    model.graph.node.append(
        helper.make_node("Scan", ["logits"], ["hostile.w"], body=outer, num_scan_inputs=1, name="hostile.scan")
    )


def filled_memory(gigabytes: int) -> Edit:
    """So much memory filled before the first logits."""

    def edit(model: onnx.ModelProto) -> None:
        one = numpy_helper.from_array(np.array([1], np.float32))
        nodes = [
            constant("hostile.shape", np.array([gigabytes << 28], np.int64)),
            helper.make_node("ConstantOfShape", ["hostile.shape"], ["hostile.many"], value=one, name="hostile.fill"),
            helper.make_node("ReduceMax", ["hostile.many"], ["hostile.most"], keepdims=0, name="hostile.reduce"),
        ]
        _into_logits(model, nodes, "hostile.most")

    return edit


def foreign_op(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Run", ["logits"], ["hostile.out"], domain="stranger", name="hostile.run"))
    model.opset_import.append(helper.make_opsetid("stranger", 1))


def own_function(model: onnx.ModelProto) -> None:
    model.functions.append(
        helper.make_function(
            "stranger", "F", ["x"], ["y"], [helper.make_node("Identity", ["x"], ["y"])], model.opset_import[:1]
        )
    )


def weights_in(location: str, **entries: str) -> Edit:
    """The first weight of the file lies in `location`."""

    def edit(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.external_data)
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
            entry.value = entries.get(entry.key, entry.value)

    return edit


def huge_weight(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.external_data)
    tensor.dims[:] = [1 << 40, 1 << 40, 1 << 40]


def other_logits(model: onnx.ModelProto) -> None:
    """Logits of one dimension more, as no graph of the bundle says."""
    axes = numpy_helper.from_array(np.array([0], np.int64), "hostile.axes")
    model.graph.initializer.append(axes)
    for node in model.graph.node:
        for i, value in enumerate(node.output):
            if value == "logits":
                node.output[i] = "logits.before"
    model.graph.node.append(
        helper.make_node("Unsqueeze", ["logits.before", "hostile.axes"], ["logits"], name="hostile.wide")
    )
    (port,) = (o for o in model.graph.output if o.name == "logits")
    port.CopyFrom(helper.make_tensor_value_info("logits", Kind.FLOAT, None))
