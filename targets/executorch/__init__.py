"""ExecuTorch with the XNNPACK delegate."""

from __future__ import annotations

from ...system.reading import MEBIBYTE
from ..target import Target, WeightStorage, extra


def _storage(bits: int, container: int, groups: tuple[int, ...]) -> WeightStorage:
    # XNNPACK groups 4-bit codes only; it stores group scales as bfloat16, channel scales as float32.
    return WeightStorage(bits, container, groups, scale_bytes=2, channel_scale_bytes=4, zero_points="none")


TARGET = Target(
    name="executorch",
    libraries=(("executorch",),),
    distributions=("executorch",),
    install=extra("executorch"),
    describe=lambda: "exports, runs and verifies",
    graphs=(),
    storage=(
        *(_storage(bits, 4, (32, 64, 128, 256)) for bits in (2, 3, 4)),
        *(_storage(bits, 8, ()) for bits in (5, 6, 8)),
    ),
    signed_scales=False,
    tied_twice=True,
    int8_cache=True,
    option=None,
    lowering_bytes=(700 * MEBIBYTE, 2.5),
    unit="cpu",
    activations="int8",
    exact=False,
    emulated_prompts=None,
    stand_in_bytes=0,
    holds_caches=True,
)
