"""Arm's Ethos-U: encoders, through ExecuTorch and Vela."""

from __future__ import annotations

from ...system.reading import MEBIBYTE
from ..target import Target, TargetOption, WeightStorage, extra
from .names import GRAPH

TARGET = Target(
    name="ethosu",
    libraries=(("executorch", "ethosu", "tosa", "tosa_reference_model"),),
    distributions=("ethos-u-vela",),
    # Vela and the TOSA tools come without their pins, which are below what the other targets are tested with.
    install=f"{extra('ethosu')} && pip install --no-deps ethos-u-vela==5.1.0 tosa-tools==2026.5.0",
    describe=lambda: (
        "exports encoders; verifies them through Arm's TOSA reference model on this CPU (the NPU itself is not here)"
    ),
    graphs=(GRAPH,),
    # One scale per channel, in a record of ten bytes with the bias.
    storage=tuple(
        WeightStorage(bits, 8, (), scale_bytes=10, channel_scale_bytes=10, zero_points="none")
        for bits in (2, 3, 4, 5, 6, 8)
    ),
    signed_scales=False,
    tied_twice=False,
    int8_cache=False,
    option=TargetOption(
        "--ethos-u", "names", ("ethos-u85-256",), "Arm: configurations; repeatable. Default: ethos-u85-256."
    ),
    lowering_bytes=(1500 * MEBIBYTE, 3.0),
    unit=None,
    activations="int16",
    exact=False,
    emulated_prompts=8,
    stand_in_bytes=0,
    holds_caches=False,
)
