"""ONNX for ONNX Runtime: each graph a file, all weights in one `weights.bin`.

Translate (torch.onnx, private nodes) -> lower (by `LOWERINGS`) -> save. Codes and scales stream from the mapped quantized
checkpoint; the ONNX files contain the graph alone.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from ...errors import UserError
from ...graph import Graph
from ...targets.onnx.genai import NAME as GENAI
from ...targets.onnx.oldest import FACT, oldest, read_oldest
from ...targets.onnx.releases import has, reaches
from ...targets.onnx.weights import read_nbits
from ..artefact import Artefact, Options, Progress
from . import genai
from .attention_cached import (
    lower_biased_attention,
    lower_cross_attention,
    lower_merged_attention,
    lower_shared_attention,
)
from .attention_int8 import (
    lower_append_kv,
    lower_quantize_kv,
    lower_quantized_attention,
    lower_quantized_biased_attention,
    lower_quantized_causal_attention,
    lower_quantized_merged_attention,
)
from .attention_ort import lower_bidirectional_attention, lower_cached_attention, lower_rope
from .linear import lower_embedding, lower_linear
from .lowering import MS, Lowering, nodes
from .opset import lower_opset
from .pointwise import fuse_silu, lower_gelu_tanh, lower_rms_norm
from .recurrence import (
    lower_causal_conv,
    lower_diagonal_scan,
    lower_gated_delta_rule,
    lower_generalized_delta_rule,
    lower_linear_attention,
    lower_selective_scan,
)
from .translate import DOMAIN, translate
from .weight_file import WeightFile

WEIGHTS = "weights.bin"
_INLINE = 4096  # bytes: larger tensors that torch.onnx left in the graph move to the weight file

LOWERINGS: dict[str, Callable[[Lowering, ir.Node], None]] = {
    "CachedAttention": lower_cached_attention,
    "BidirectionalAttention": lower_bidirectional_attention,
    "BiasedAttention": lower_biased_attention,
    "MergedAttention": lower_merged_attention,
    "SharedAttention": lower_shared_attention,
    "CrossAttention": lower_cross_attention,
    "QuantizedCausalAttention": lower_quantized_causal_attention,
    "QuantizedBiasedAttention": lower_quantized_biased_attention,
    "QuantizedMergedAttention": lower_quantized_merged_attention,
    "QuantizedAttention": lower_quantized_attention,
    "QuantizeKv": lower_quantize_kv,
    "AppendKv": lower_append_kv,
    "Rope": lower_rope,
    "CausalConv": lower_causal_conv,
    "GatedDeltaRule": lower_gated_delta_rule,
    "LinearAttention": lower_linear_attention,
    "SelectiveScan": lower_selective_scan,
    "DiagonalScan": lower_diagonal_scan,
    "GeneralizedDeltaRule": lower_generalized_delta_rule,
    "QuantizedLinear": lower_linear,
    "QuantizedEmbedding": lower_embedding,
    "RmsNorm": lower_rms_norm,
    "GeluTanh": lower_gelu_tanh,
}
"""Private node -> its lowering, in the order of work: attention first, which takes Rope and the q, k and v linears into itself.

An op without a row is decomposed before.
"""

KERNELS = {
    "CausalConv": "CausalConvWithState",
    "GatedDeltaRule": "LinearAttention",
    "LinearAttention": "LinearAttention",
}
"""Private node -> the kernel without which it is decomposed, for a runtime that lacks it."""


def export(graphs: Sequence[Graph], directory: Path, options: Options, progress: Progress = lambda _: None) -> Artefact:
    """Write `<graph>.onnx` for each graph and `weights.bin` into `directory` (which must exist and be empty).

    A decoder-only model gets `genai.onnx` as well, where onnxruntime-genai can feed it (`genai`).

    Modules carry quantized weights as mapped tensors. `options.max_positions` bounds the rotary tables. `options.names`: the
    oldest ONNX Runtime that must open the graphs, or nothing. Raises UserError for a graph that it does not open in any form.
    """
    runtime = options.names[0] if options.names else None
    kept = [op for op in LOWERINGS if runtime is None or has(runtime, KERNELS.get(op, ""))]
    weights = WeightFile(directory / WEIGHTS)
    ops: dict[str, dict[str, int]] = {}
    try:
        for graph in graphs:
            progress(f"onnx: {graph.name}")
            model = translate(graph, kept)
            lower(model, weights, options.max_positions, runtime)
            _require(model, runtime)
            ir.save(model, directory / f"{graph.name}.onnx")
            ops[graph.name] = dict(Counter(_label(n) for n in model.graph))
            if len(graphs) == 1 and genai.fits(graph):
                genai.give_ports(model)
                ir.save(model, directory / f"{GENAI}.onnx")
    finally:
        weights.close()
    files = tuple(path.name for path in sorted(directory.iterdir()))
    return Artefact(files, ops, read_facts(directory))


def read_facts(directory: Path) -> dict[str, object]:
    """The facts that the files in `directory` bear themselves: the oldest ONNX Runtime that opens each graph."""
    return {FACT: read_oldest(directory)}


def _require(model: ir.Model, runtime: str | None) -> None:
    """Raise UserError for a graph that the asked runtime does not open."""
    found = oldest(model)
    if runtime is not None and not reaches(runtime, found.release):
        raise UserError(
            f"--onnxruntime {runtime}: {model.graph.name} has {found.because}, which {found.release} first has; "
            "ask for that, or for no release"
        )


def read_weights(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(checkpoint name, float32 [N, K]) of every quantized weight of the graphs in `directory`."""
    for path in sorted(directory.glob("*.onnx")):
        yield from read_nbits(path)


def lower(model: ir.Model, weights: WeightFile, max_positions: int, runtime: str | None = None) -> None:
    """Rewrite every private node of `model` by the table. Raises ValueError for one without a row. runtime: as in `Lowering`."""
    low = Lowering(model.graph, weights, max_positions, runtime=runtime)
    for op, lowering in LOWERINGS.items():
        for node in nodes(model.graph, op):
            lowering(low, node)
        RemoveUnusedNodesPass()(model)  # the linears of q, k and v that were packed: else they would be stored again
    fuse_silu(low)
    RemoveUnusedNodesPass()(model)
    _move_large_tensors(low)
    TopologicalSortPass()(model)
    remaining = sorted({n.op_type for n in model.graph if n.domain == DOMAIN})
    if remaining:
        raise ValueError(f"no ONNX lowering for {', '.join(remaining)}")
    model.opset_imports.pop(DOMAIN, None)
    model.opset_imports[MS] = 1
    lower_opset(model)
    model.producer_name = "edgewright"


def _move_large_tensors(low: Lowering) -> None:
    """Float weights (16-bit ones, norms) and other constants above the inline size go to the weight file as they are."""
    for name, value in list(low.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.nbytes <= _INLINE:
            continue
        array = tensor.numpy()
        shape = tuple(int(d) for d in array.shape)
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)  # numpy has no bfloat16 of its own
        key = f"raw:{tensor.dtype}:{hashlib.sha256(data.data).hexdigest()}"
        moved = low.weights.add(name, key, [data], tensor.dtype, shape)
        value.const_value = moved.const_value


def _label(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type
