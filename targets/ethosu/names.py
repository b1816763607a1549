"""Names that exporter and runtime of Ethos-U share."""

from __future__ import annotations

GRAPH = "encoder"


HOST_OPS = (
    "aten::logical_and.out",
    "aten::mul.out",
    "aten::squeeze_copy.dims_out",
    "aten::unsqueeze_copy.out",
    "aten::where.self_out",
    "quantized_decomposed::dequantize_per_tensor.out",
    "quantized_decomposed::embedding_byte.dtype_out",
    "quantized_decomposed::quantize_per_tensor.out",
)


"""What the lowering itself keeps on the CPU: embedding, mask, and fixed point in and out."""
