"""Attributes and labels of the nodes that the exporter writes."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

LABEL = "edgewright.weights"


"""The metadata of a node with quantized weights: JSON, [[checkpoint name, rows], …]."""


def attr(node: ir.Node, name: str) -> Any:
    return node.attributes[name].value
