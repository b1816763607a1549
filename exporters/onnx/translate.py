"""A `Graph` as ONNX IR: torch.onnx translates plain ATen, and each `edgewright::` op becomes one node of a private domain.

An op without a row in the target's table is decomposed first. The exporters lower the private nodes; none reaches a file.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Collection
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import values
from torch.onnx._internal.exporter import _registration

from ...graph import Graph, Port, State
from ...ops import DECOMPOSITIONS

DOMAIN = "edgewright"
OPSET = 24
LEAST_DECAY = -80.0
"""The least log decay in a decomposition: its exp counts as nothing, and minus infinity times a mask's 0 would be NaN."""
_FLOATS = ["tensor(float)", "tensor(bfloat16)", "tensor(float16)"]
_ANY = [*_FLOATS, "tensor(int64)", "tensor(int32)", "tensor(int8)", "tensor(uint8)", "tensor(bool)"]


def translate(graph: Graph, kept: Collection[str]) -> ir.Model:
    """The graph as an ONNX IR model. Its inputs and outputs have the graph's names; weights stay lazy torch tensors.

    kept: the private nodes of the target's table (see `onnx_name`). Initializers have the checkpoint's names, so that a weight has
    one name in all graphs.
    """
    program = graph.export()
    used = {node.target for node in program.graph.nodes}
    decompositions = {op: _decomposition(op) for op in DECOMPOSITIONS if op in used and onnx_name(op) not in kept}
    if decompositions:
        program = program.run_decompositions(decompositions)
    _quieten()
    _remember_translations()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            program, dynamo=True, custom_translation_table=_table(), opset_version=OPSET, verbose=False, optimize=True
        )
    assert exported is not None
    model: ir.Model = exported.model
    _forget_sources(model)
    for value in list(model.graph.initializers.values()):
        value.name = graph.checkpoint_name(str(value.name))
    ports: list[Port | State] = [*graph.inputs, *graph.states]
    for value, port in zip(model.graph.inputs, ports, strict=True):
        value.name = port.name
        value.shape = ir.Shape(port.shape)
    updated = [s.shape for s in graph.states if s.updated]
    shapes = [*(p.shape for p in graph.outputs), *updated]
    for value, name, shape in zip(model.graph.outputs, graph.output_names, shapes, strict=True):
        value.name = name
        value.shape = ir.Shape(shape)
    model.graph.name = graph.name
    return model


def _forget_sources(model: ir.Model) -> None:
    """Drop what torch notes of the Python code that each node comes from: paths of this machine, and no two alike."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _decomposition(op: Any) -> Callable[..., Any]:
    """The op's reference, with its log decays `g` bounded by `LEAST_DECAY`."""
    reference = DECOMPOSITIONS[op]
    names = [a.name for a in op._schema.arguments]
    if "g" not in names:
        return reference
    at = names.index("g")

    def bounded(*args: Any) -> Any:
        return reference(*args[:at], args[at].clamp(min=LEAST_DECAY), *args[at + 1 :])

    return bounded


def _quieten() -> None:
    # torch.onnx warns about torchvision ops on every import, and no user can act on it.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)


@functools.cache
def _remember_translations() -> None:
    # torch.onnx reads its thousand translations from their sources again for each graph, a second each time.
    found: Any = getattr(_registration, "onnxscript_apis", None)
    if hasattr(found, "get_torchlib_ops"):
        found.get_torchlib_ops = functools.cache(found.get_torchlib_ops)


def _table() -> dict[Callable[..., Any], Callable[..., Any]]:
    return {op: _translation(op) for op in DECOMPOSITIONS}


def onnx_name(op: Any) -> str:
    """`edgewright::rms_norm` -> `RmsNorm`."""
    return "".join(part.capitalize() for part in op._schema.name.split("::")[1].split("_"))


def _translation(op: Any) -> Callable[..., Any]:
    """A function that emits one private node for the op: tensor arguments become inputs, the others attributes."""
    arguments = op._schema.arguments
    tensors = [a.name for a in arguments if "Tensor" in str(a.type)]
    attributes = {a.name: str(a.type) for a in arguments if "Tensor" not in str(a.type)}
    returns = len(op._schema.returns)
    name = onnx_name(op)
    kinds = {"int": onnx.defs.OpSchema.AttrType.INT, "float": onnx.defs.OpSchema.AttrType.FLOAT}
    formal = onnx.defs.OpSchema.FormalParameter
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    schema = onnx.defs.OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[formal(t, f"T{i}", param_option=_option(op, t, optional, single)) for i, t in enumerate(tensors)],
        outputs=[formal(f"o{i}", f"O{i}") for i in range(returns)],
        type_constraints=[(f"T{i}", _ANY, "") for i in range(len(tensors))]
        + [(f"O{i}", _ANY, "") for i in range(returns)],
        attributes=[onnx.defs.OpSchema.Attribute(a, kinds[k], "") for a, k in attributes.items()],
    )
    node = values.Op(values.Opset(DOMAIN, 1), name, schema)
    order = [a.name for a in arguments]

    def emit(*args: Any, **kwargs: Any) -> Any:
        named = dict(zip(order, args, strict=False)) | kwargs
        return node(*[named.get(t) for t in tensors], **{a: named[a] for a in attributes})

    return emit


def _option(op: Any, name: str, optional: Any, single: Any) -> Any:
    return (
        optional if any(a.name == name and str(a.type).startswith("Optional") for a in op._schema.arguments) else single
    )
