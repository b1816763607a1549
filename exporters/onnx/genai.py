"""A decoder-only graph with the inputs that onnxruntime-genai feeds: the same nodes and weights, other ports.

genai gives token ids, an attention mask as long as all tokens so far, and KV caches; it wants the last token's logits. Its prompts
of several rows have paddings, which the graph does not know, so the batch is one.
"""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ...graph import Graph
from ...targets.onnx.genai import MASK, NAME

_PORTS = ["input_ids", "past_length", "logit_positions"]
_CACHE = re.compile(r"[kv]_cache_[0-9]+")


def fits(graph: Graph) -> bool:
    """Whether genai can feed the graph: tokens in, logits out, and float caches that grow."""
    caches = all(
        s.kind == "kv" and s.updated and s.dtype == torch.float32 and len(s.shape) == 4 and _CACHE.fullmatch(s.name)
        for s in graph.states
    )
    return bool(graph.states) and caches and [p.name for p in graph.inputs] == _PORTS


def give_ports(model: ir.Model) -> None:
    """Change the ports of a lowered decoder, in place, to those that genai feeds."""
    graph = model.graph
    ids, past, positions = graph.inputs[:3]
    mask = ir.Value(name=MASK, shape=ir.Shape([1, "total"]), type=ir.TensorType(ir.DataType.INT64))
    one = ir.Value(
        name="genai.one",
        shape=ir.Shape([1]),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor(np.array([1], np.int64), name="genai.one"),
    )
    graph.register_initializer(one)
    new = ir.node("Shape", [ids], {"start": 1, "end": 2})
    total = ir.node("Shape", [mask], {"start": 1, "end": 2})
    before = ir.node("Sub", [total.outputs[0], new.outputs[0]])
    last = ir.node("Sub", [new.outputs[0], one])
    added = [new, total, before, last]
    for i, node in enumerate(added):
        node.name = f"genai.{i}"
        node.outputs[0].name, node.outputs[0].type = f"genai.{i}.out", ir.TensorType(ir.DataType.INT64)
        node.outputs[0].shape = ir.Shape([1])
    ir.convenience.replace_all_uses_with(past, before.outputs[0])
    ir.convenience.replace_all_uses_with(positions, last.outputs[0])
    graph.insert_before(next(iter(graph)), added)
    del graph.inputs[1:3]
    graph.inputs.insert(1, mask)
    for value in (ids, *graph.inputs[2:], *graph.outputs):
        assert value.shape is not None
        value.shape = ir.Shape([1, *value.shape[1:]])
    logits = graph.outputs[0]
    assert logits.shape is not None
    logits.shape = ir.Shape([1, 1, logits.shape[2]])  # by this genai knows that it gets the last token's alone
    RemoveUnusedNodesPass()(model)
    graph.name = NAME
