"""Qualcomm's NPU (HTP), or Qualcomm's emulator of it on x86."""

from __future__ import annotations

import platform

from ...system.reading import MEBIBYTE
from ..onnx import matmulnbits
from ..target import Target, TargetOption, extra


def emulated() -> bool:
    """Whether the backend is the emulator: the one that comes for x86 always is."""
    return platform.machine().lower() in ("x86_64", "amd64")


def _describe() -> str:
    if emulated():
        return "exports; runs and verifies in Qualcomm's emulator"
    return "exports, runs and verifies on the NPU"


TARGET = Target(
    name="qnn",
    libraries=(("onnxruntime_qnn",),),
    distributions=("onnxruntime-qnn",),
    install=extra("qnn"),
    describe=_describe,
    graphs=(),
    storage=matmulnbits(scale_bytes=2),
    signed_scales=False,
    tied_twice=False,
    int8_cache=False,
    option=TargetOption("--htp", "numbers", (75,), "Qualcomm: HTP versions. Default: 75."),
    lowering_bytes=(800 * MEBIBYTE, 2.5),
    unit="npu",
    activations="float16",
    exact=False,
    emulated_prompts=8,
    stand_in_bytes=0,
    holds_caches=True,
)
