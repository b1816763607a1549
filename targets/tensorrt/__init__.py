"""TensorRT engines: run where there is an NVIDIA GPU; elsewhere the network that they are built from runs on the CPU."""

from __future__ import annotations

from ...system.reading import MEBIBYTE
from ..target import Target, TargetOption, WeightStorage, extra
from .driver import gpu_available


def _describe() -> str:
    if gpu_available():
        return "exports, runs the engines on this NVIDIA GPU and verifies them"
    return "exports engines; verifies the network they are built from on this CPU (no NVIDIA GPU: they are not run)"


def _storage(bits: int, container: int, groups: tuple[int, ...], in_blocks: bool) -> WeightStorage:
    # INT8 in blocks would be expanded to float16 inside the engine. INT4 with one scale per channel would be widened to
    # INT8, so its scale is repeated for each block.
    return WeightStorage(bits, container, groups, 2, 2, zero_points="none", scales_in_blocks=in_blocks)


TARGET = Target(
    name="tensorrt",
    libraries=(("tensorrt_rtx_bindings",), ("tensorrt",)),
    distributions=("tensorrt-rtx-cu13-bindings", "tensorrt"),
    install=extra("tensorrt"),
    describe=_describe,
    graphs=(),
    storage=(
        *(_storage(bits, 4, (16, 32, 64, 128), True) for bits in (2, 3, 4)),
        *(_storage(bits, 8, (), False) for bits in (5, 6, 8)),
    ),
    signed_scales=False,
    tied_twice=False,
    int8_cache=False,
    option=TargetOption("--sm", "numbers", (86, 89, 120), "TensorRT: compute capabilities. Default: 86,89,120."),
    lowering_bytes=(1100 * MEBIBYTE, 2.5),
    unit="gpu",
    activations="float16",
    exact=True,
    emulated_prompts=None,
    stand_in_bytes=16,
    holds_caches=False,
)
