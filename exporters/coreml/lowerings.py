"""The table from `edgewright::` ops to MIL operations; the plain ATen around them is in `aten`.

Each form is chosen so that float16 does not overflow where the reference would not, and so that no constant costs accuracy: see
`rms_norm`, `builder.scaled`, `attention.rope`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import torch

from ...targets.coreml.library import Builder as mb
from . import attention
from .builder import Lowering, scaled

_TINY = 2.0**-14  # the smallest normal float16

# ---- quantized ------------------------------------------------------------------------------------------------------


def quantized_linear(low: Lowering, _: Any, x: Any, codes: Any, scales: Any, bias: Any, bits: int, group: int) -> Any:
    return low.linear(x, low.constants.weight(codes, scales, bits), bias)


def quantized_embedding(low: Lowering, _: Any, ids: Any, codes: Any, scales: Any, bits: int, group: int) -> Any:
    return mb.gather(x=low.constants.weight(codes, scales, bits), indices=ids, axis=0)


# ---- pointwise ------------------------------------------------------------------------------------------------------


def rms_norm(low: Lowering, _: Any, x: Any, weight: torch.Tensor, eps: float, offset: float) -> Any:
    """The norm of x / m, where m is the largest magnitude of x: its squares cannot overflow. eps is divided by the square of m.

    A shrunk x (`builder.SHRINK`) has a shrunk m. Then eps shrinks by the square, and the result is the same.
    Gemma's `1 + weight` has more digits than float16, so `x * weight + x` is computed, which loses nothing of a bfloat16 weight.
    """
    largest = mb.reduce_max(x=mb.abs(x=x), axes=[-1], keep_dims=True)
    largest = mb.maximum(x=largest, y=low.half(_TINY))
    unit = mb.real_div(x=x, y=largest)
    root = scaled(low, mb.real_div(x=low.half(1.0), y=largest), math.sqrt(eps))
    root = low.shrunk(root) if low.is_shrunk(x) else root
    mean = mb.reduce_mean(x=mb.mul(x=unit, y=unit), axes=[-1], keep_dims=True)
    rms = mb.sqrt(x=mb.add(x=mean, y=mb.mul(x=root, y=root)))
    normed = mb.real_div(x=unit, y=rms)
    out = mb.mul(x=normed, y=low.constants.tensor(weight))
    if offset == 0.0:
        return out
    return mb.add(x=out, y=normed if offset == 1.0 else scaled(low, normed, offset))


def gelu_tanh(low: Lowering, _: Any, x: Any) -> Any:
    """Spelled out. Beyond 10 the tanh is 1 and the square of x would overflow: to clip x there changes nothing."""
    near = mb.clip(x=x, alpha=np.float16(-10.0), beta=np.float16(10.0))
    c = math.sqrt(2.0 / math.pi)
    slope = mb.add(x=mb.mul(x=mb.mul(x=near, y=near), y=low.half(c * 0.044715)), y=low.half(c))
    gate = mb.add(x=mb.tanh(x=mb.mul(x=near, y=slope)), y=low.half(1.0))
    return mb.mul(x=mb.mul(x=x, y=low.half(0.5)), y=gate)


# ---- convolution ----------------------------------------------------------------------------------------------------


def causal_conv(low: Lowering, node: Any, x: Any, weight: Any, bias: Any, state: Any) -> tuple[Any, Any]:
    """A product for each tap, over the inputs before x and x itself; for one token, one product and one sum."""
    taps = node.args[1].meta["val"].shape[1]
    weight = weight.detach().to(torch.float32).transpose(0, 1)  # [K, C]
    inputs = mb.concat(values=[mb.transpose(x=state, perm=[0, 2, 1]), x], axis=1)
    if node.args[0].meta["val"].shape[1] == 1:
        products = mb.mul(x=inputs, y=low.constants.tensor(weight.unsqueeze(0).contiguous()))
        out = mb.reduce_sum(x=products, axes=[1], keep_dims=True)
    else:
        parts = [
            mb.mul(x=_rows_between(inputs, tap, tap - taps + 1), y=low.constants.tensor(weight[tap].contiguous()))
            for tap in range(taps)
        ]
        out = reduce(lambda a, b: mb.add(x=a, y=b), parts)
    if bias is not None:
        out = mb.add(x=out, y=low.var(bias))
    # The reshape gives the number of rows, which a slice of a dynamic length does not know.
    last = mb.reshape(x=_rows_between(inputs, 1 - taps, 0), shape=[1, taps - 1, weight.shape[1]])
    return out, mb.transpose(x=last, perm=[0, 2, 1])


def _rows_between(x: Any, begin: int, end: int) -> Any:
    """The rows of x [1, T, C] from `begin` up to `end`, as [1, n, C]. `end` counts from the last row; 0 is after it."""
    return mb.slice_by_index(
        x=x,
        begin=[0, begin, 0],
        end=[0, end, 0],
        begin_mask=[True, False, True],
        end_mask=[True, end == 0, True],
    )


LOWERINGS: dict[str, Callable[..., Any]] = {
    "edgewright::quantized_linear": quantized_linear,
    "edgewright::quantized_embedding": quantized_embedding,
    "edgewright::rms_norm": rms_norm,
    "edgewright::gelu_tanh": gelu_tanh,
    "edgewright::rope": attention.rope,
    "edgewright::bidirectional_attention": attention.bidirectional_attention,
    "edgewright::cross_attention": attention.cross_attention,
    "edgewright::cached_attention": attention.cached_attention,
    "edgewright::biased_attention": attention.biased_attention,
    "edgewright::merged_attention": attention.merged_attention,
    "edgewright::shared_attention": attention.shared_attention,
    "edgewright::causal_conv": causal_conv,
}
"""An `edgewright::` op without a row is decomposed into ATen first."""

WRITES_STATE = frozenset(
    {"edgewright::cached_attention", "edgewright::biased_attention", "edgewright::merged_attention"}
)
"""The ops that take states themselves and write them. All others are given the value of a state before the call."""

TAKES_SHRUNK = frozenset({"edgewright::rms_norm", "aten::add", "aten::index_select"})
"""The ops that take a shrunk sum as it is. All others are given the sum at its own size."""
