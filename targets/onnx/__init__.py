"""ONNX Runtime on the CPU, and the storage of its `MatMulNBits`."""

from __future__ import annotations

from ...system.reading import MEBIBYTE
from ..target import GROUP_SIZES, Target, TargetOption, WeightStorage
from .releases import check_asked


def matmulnbits(scale_bytes: int) -> tuple[WeightStorage, ...]:
    """The storage of `com.microsoft.MatMulNBits` with scales of so many bytes. 2 bits are fast in three group sizes alone."""
    containers = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 8: 8}
    return tuple(
        WeightStorage(
            bits=bits,
            container=container,
            groups=(32, 64, 128) if container == 2 else GROUP_SIZES,
            scale_bytes=scale_bytes,
            channel_scale_bytes=scale_bytes,
            zero_points="packed uint8",
            scales_in_blocks=True,
        )
        for bits, container in containers.items()
    )


TARGET = Target(
    name="onnx",
    libraries=(("onnxruntime",),),
    distributions=("onnxruntime",),
    install="pip install edgewright",
    describe=lambda: "exports, runs and verifies",
    graphs=(),
    storage=matmulnbits(scale_bytes=4),
    signed_scales=True,
    tied_twice=False,
    int8_cache=True,
    option=TargetOption(
        "--onnxruntime",
        "version",
        (),
        "ONNX Runtime: the oldest release that must open the graphs, such as 1.24. Default: the newest forms.",
        check_asked,
    ),
    lowering_bytes=(700 * MEBIBYTE, 0.0),
    unit="cpu",
    activations="int8",
    exact=True,
    emulated_prompts=None,
    stand_in_bytes=0,
    holds_caches=False,
)
