"""The lowest opset and IR version that a finished graph needs, computed from the schemas of its nodes.

torch.onnx writes for one opset. Most ops of it are those of an older one, with more types that no graph here has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
from onnx import defs, helper

from .translate import OPSET

SAME_MEANING = {
    ("Cast", 19): "`saturate` is for 8-bit floats",
    ("Cast", 24): "`round_mode` is for float8e8m0",
}
"""(op, version) -> why it computes what the version before did, though its schema says more. The others are compared."""

_METADATA_IR = 10
"""The IR version that brought metadata of nodes, in which a node says which weights it has."""


def lower_opset(model: ir.Model) -> None:
    """Write the lowest opset and IR version under which every node of `model` means what it does now."""
    opset = lowest_opset(model)
    model.opset_imports[""] = opset
    imports = [helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    model.ir_version = max(_METADATA_IR, helper.find_min_ir_version_for(imports, ignore_unknown=True))


def lowest_opset(model: ir.Model) -> int:
    """The lowest opset of the standard's domain whose schemas are those of the nodes, as far as these use them."""
    types = _types(model)
    return max((_lowest(node, types) for node in model.graph.all_nodes() if node.domain == ""), default=1)


def _lowest(node: ir.Node, types: set[str]) -> int:
    """The version of the oldest schema that means the same for `node`. 1 for an op that the standard does not have."""
    if not defs.has(node.op_type):
        return 1  # ONNX Runtime keeps SimplifiedLayerNormalization in the standard's domain
    schema = defs.get_schema(node.op_type, OPSET)
    while schema.since_version > 1:
        try:
            before = defs.get_schema(node.op_type, schema.since_version - 1)
        except defs.SchemaError:
            break
        if before.deprecated or not _same(node, schema, before, types):
            break
        schema = before
    return int(schema.since_version)


def _same(node: ir.Node, new: Any, old: Any, types: set[str]) -> bool:
    """Whether a node of the schema `new` is one of `old` with the same meaning, in a graph that has these types."""
    wider = set().union(*(_admitted(new, name) - _admitted(old, name) for name in _type_names(new)))
    if wider & types:
        return False
    if (new.name, new.since_version) in SAME_MEANING:
        return not set(node.attributes) - set(old.attributes)
    return _form(new) == _form(old) and _words(new) == _words(old)


def _form(schema: Any) -> tuple[Any, ...]:
    """Inputs, outputs and attributes with their defaults."""
    ports = [[(p.name, str(p.option), p.type_str) for p in side] for side in (schema.inputs, schema.outputs)]
    attributes = {k: (str(a.type), a.required, str(a.default_value)) for k, a in schema.attributes.items()}
    return ports, attributes


def _words(schema: Any) -> list[str]:
    return str(schema.doc).split()


def _type_names(schema: Any) -> Iterator[str]:
    return (c.type_param_str for c in schema.type_constraints)


def _admitted(schema: Any, name: str) -> set[str]:
    return {t for c in schema.type_constraints if c.type_param_str == name for t in c.allowed_type_strs}


def _types(model: ir.Model) -> set[str]:
    """The tensor types of a graph as schemas write them: of what is stored, given and returned, and of casts."""
    values = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    found = {v.dtype for v in values if v.dtype is not None}
    for node in model.graph.all_nodes():
        found |= {v.dtype for v in node.outputs if v.dtype is not None}
        if node.op_type == "Cast":
            found.add(ir.DataType(node.attributes["to"].as_int()))
    return {f"tensor({dtype.name.lower()})" for dtype in found}
