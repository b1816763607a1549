"""Adding an op: one definition in `ops`, a row in the table of each exporter that lowers it; without a row it is decomposed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch

from edgewright.exporters.onnx.translate import onnx_name, translate
from edgewright.graph import Graph, Port
from edgewright.ops import DECOMPOSITIONS

OPS = {op._schema.name: op for op in DECOMPOSITIONS}
"""`edgewright::rope` -> the op."""


def table(module: str, library: str) -> Any:
    pytest.importorskip(library)
    return importlib.import_module(f"edgewright.exporters.{module}")


def onnx_rows() -> set[str]:
    return {name for name, op in OPS.items() if onnx_name(op) in table("onnx.export", "onnxruntime").LOWERINGS}


def standard_rows() -> set[str]:
    standard, dialect = table("onnx.standard_ops", "onnx_ir"), table("tensorrt.lowerings", "onnx_ir").DIALECT
    return {name for name, op in OPS.items() if onnx_name(op) in standard.rows(dialect)}


def executorch_rows() -> set[str]:
    ops = table("executorch.passes.ops", "executorch")
    return {op._schema.name for op in (*ops.REWRITES, *ops.DELEGATED) if op._schema.name.startswith("edgewright")}


def coreml_rows() -> set[str]:
    return set(table("coreml.lowerings", "coremltools").LOWERINGS)


def ethosu_rows() -> set[str]:
    return {op._schema.name for op in table("ethosu.lowerings", "executorch")._REWRITES}


LACKING: dict[str, tuple[Callable[[], set[str]], set[str]]] = {
    "onnx": (onnx_rows, set()),
    "tensorrt and qnn": (
        standard_rows,
        {
            *("causal_conv", "gated_delta_rule", "generalized_delta_rule", "linear_attention", "selective_scan"),
            *("diagonal_scan", "quantize_kv", "append_kv"),
            *("quantized_attention", "quantized_causal_attention", "quantized_merged_attention"),
            "quantized_biased_attention",
        },
    ),
    "executorch": (executorch_rows, set()),
    "coreml": (
        coreml_rows,
        {
            *("gated_delta_rule", "generalized_delta_rule", "linear_attention", "selective_scan", "diagonal_scan"),
            *("quantize_kv", "append_kv"),
            *("quantized_attention", "quantized_causal_attention", "quantized_merged_attention"),
            "quantized_biased_attention",
        },
    ),
}
"""Exporter -> its rows, and the ops that it decomposes on purpose."""


@pytest.mark.parametrize("exporter", LACKING)
def test_an_op_has_a_row_or_is_decomposed_on_purpose(exporter: str) -> None:
    rows, lacking = LACKING[exporter]
    assert rows() == OPS.keys() - {f"edgewright::{name}" for name in lacking}


def test_a_row_is_of_an_op_that_exists() -> None:
    names = {onnx_name(op) for op in DECOMPOSITIONS}
    standard, dialect = table("onnx.standard_ops", "onnx_ir"), table("tensorrt.lowerings", "onnx_ir").DIALECT
    assert table("onnx.export", "onnxruntime").LOWERINGS.keys() <= names
    assert standard.rows(dialect) <= names
    assert coreml_rows() <= OPS.keys()
    assert ethosu_rows() <= OPS.keys()


class Norm(torch.nn.Module):
    """One private op, which every exporter has a row for."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8), False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.edgewright.rms_norm(x, self.weight, 1e-6, 0.0)
        return out


def graph() -> Graph:
    return Graph("module", Norm(), (Port("x", torch.float32, (1, 4, 8)),), (Port("y", torch.float32, (1, 4, 8)),))


@pytest.mark.parametrize("kept", [(), ("RmsNorm",)])
def test_onnx_tensorrt_and_qnn_decompose_an_op_without_a_row(kept: Collection[str]) -> None:
    private = [node.op_type for node in translate(graph(), kept).graph if node.domain == "edgewright"]
    assert private == list(kept)


@pytest.mark.parametrize("kept", [False, True])
def test_executorch_decomposes_an_op_without_a_row(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = table("executorch.passes.ops", "executorch")
    norm = torch.ops.edgewright.rms_norm.default
    if not kept:
        monkeypatch.setattr(ops, "DELEGATED", ops.DELEGATED - {norm})
    targets = [node.target for node in ops.decompose(graph().export()).graph.nodes]
    assert targets.count(norm) == int(kept)


@pytest.mark.parametrize("kept", [False, True])
def test_coreml_decomposes_an_op_without_a_row(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lowerings, translation = table("coreml.lowerings", "coremltools"), table("coreml.translate", "coremltools")
    if not kept:
        monkeypatch.delitem(lowerings.LOWERINGS, "edgewright::rms_norm")
    targets = [node.target for node in translation._program(graph()).graph.nodes]
    assert targets.count(torch.ops.edgewright.rms_norm.default) == int(kept)


def test_ethosu_refuses_an_op_without_a_row_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgewright.errors import UserError

    lowerings = table("ethosu.lowerings", "executorch")
    monkeypatch.delitem(lowerings._REWRITES, torch.ops.edgewright.rms_norm.default)
    traced = graph().export().module(check_guards=False)
    with pytest.raises(UserError, match=r"edgewright\.rms_norm\.default has no form on Ethos-U"):
        lowerings.Rewriter(traced, str).run()
