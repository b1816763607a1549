"""Core ML: the runtime on a Mac, Edgewright's evaluator of the saved package elsewhere."""

from __future__ import annotations

import sys

from ...system.reading import MEBIBYTE
from ..target import GROUP_SIZES, Target, WeightStorage, extra


def _describe() -> str:
    if sys.platform == "darwin":
        return "exports, runs and verifies in Core ML"
    return "exports; verifies with Edgewright's numpy evaluator of the saved package (no Mac: Core ML does not run)"


def _blockwise(bits: int) -> WeightStorage:
    return WeightStorage(bits, bits, GROUP_SIZES, 2, 2, zero_points="same width as the codes")


def _indexed(bits: int, container: int) -> WeightStorage:
    # Codes as indices into an int8 table. There is no 5-bit container: 5 bits ride in 6.
    return WeightStorage(bits, container, GROUP_SIZES, 2, 2, zero_points="in the table", table_bytes=1 << container)


TARGET = Target(
    name="coreml",
    libraries=(("coremltools",),),
    distributions=("coremltools",),
    install=extra("coreml"),
    describe=_describe,
    graphs=(),
    storage=(_blockwise(4), _blockwise(8), _indexed(2, 2), _indexed(3, 3), _indexed(5, 6), _indexed(6, 6)),
    signed_scales=False,
    tied_twice=False,
    int8_cache=False,
    option=None,
    lowering_bytes=(700 * MEBIBYTE, 2.5),
    unit="npu",
    activations="float16",
    exact=True,
    emulated_prompts=None,
    stand_in_bytes=8,
    holds_caches=True,
)
