"""torch's dtypes and what files call them."""

from __future__ import annotations

import torch

SAFETENSORS: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The name of a dtype in the header of a safetensors file -> the dtype."""

SAFETENSORS_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in SAFETENSORS.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in graph ports and manifests, which is torch's own: "float32", "int64", "bool"."""
    return str(dtype).removeprefix("torch.")
