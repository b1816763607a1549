"""Quantized checkpoints whose parts or settings do not fit: one line, or values of the right shape; nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import packing
from helpers.packing import write_checkpoint
from helpers.prequantized_samples import EXPECTED, Sample, read_samples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgewright.checkpoints.opening import open_checkpoint
from edgewright.errors import UserError

SAMPLES = read_samples()


def _grouped(method: str, pack: Callable[..., dict[str, torch.Tensor]], **block: Any) -> Sample:
    codes, zeros = torch.randint(0, 16, (64, 32)), torch.randint(1, 16, (2, 32))
    parts = pack(codes, zeros, torch.rand(2, 32))
    return {"quantization_config": {"quant_method": method, "bits": 4, "group_size": 32, **block}}, {
        f"m.{key}": value for key, value in parts.items()
    }


SAMPLES["awq"] = _grouped("awq", packing.awq, version="gemm", zero_point=True)
SAMPLES["gptq"] = _grouped("gptq", lambda *parts: packing.gptq(*parts, 4, 1), checkpoint_format="gptq", desc_act=False)
SAMPLES["gptq"][1]["m.g_idx"] = (torch.arange(64) // 32).to(torch.int32)
SAMPLES["fp8"] = (
    {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 32]}},
    {"m.weight": torch.randn(20, 40).to(torch.float8_e4m3fn), "m.weight_scale_inv": torch.rand(2, 2)},
)
GROUP: dict[str, Any] = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}


def read_all(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    for name in checkpoint.names():
        whole = checkpoint.tensor(name)
        assert whole.shape == checkpoint.info(name).shape
        if whole.dim() == 2 and whole.dtype == torch.float32 and whole.shape[0] > 2:
            assert checkpoint.rows(name, 1, 3).equal(whole[1:3]) or bool(whole[1:3].isnan().any())


def refused(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> str:
    """The line that opening or reading gives."""
    write_checkpoint(folder, tensors, **config)
    with pytest.raises(UserError) as caught:
        read_all(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


def parts_of(case: str) -> Sample:
    config, parts = SAMPLES[case]
    return json.loads(json.dumps(config)), {k: v.clone() for k, v in parts.items() if k != EXPECTED}


MUTATIONS: list[Callable[[torch.Tensor], torch.Tensor | None]] = [
    lambda t: None,
    lambda t: t[:-1] if t.dim() else t.reshape(1),
    lambda t: t[..., :-1] if t.dim() else t.reshape(1, 1),
    lambda t: t[:0] if t.dim() else t,
    lambda t: t.t() if t.dim() == 2 else t[None],
    lambda t: t[..., None],
    lambda t: torch.cat((t, t)) if t.dim() else t,
    lambda t: t.float() if t.dtype != torch.float32 else t.to(torch.int32),
    lambda t: t.to(torch.float64) if t.dtype != torch.float64 else t.half(),
    lambda t: torch.zeros_like(t.float()).to(torch.int8),
    lambda t: torch.full(t.shape, 2**31 - 1, dtype=torch.int32),
    lambda t: torch.full(t.shape, -1, dtype=torch.int64),
    lambda t: torch.full(t.shape, 255, dtype=torch.uint8),
    lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() and t.dtype.itemsize > 1 else t,
]
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    7,
    64,
    10**30,
    0.5,
    float("inf"),
    "x",
    "",
    [],
    [1, 2],
    [0, 10**9],
    {},
    {"a": 1},
]


def readable(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Opens and reads, or is refused in one line."""
    write_checkpoint(folder, tensors, **config)
    message = ""
    try:
        read_all(folder)
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 700


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_part_that_is_not_what_it_should_be(tmp_path: Path, data: st.DataObject) -> None:
    config, tensors = parts_of(data.draw(st.sampled_from(sorted(SAMPLES))))
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(sorted(tensors)))
        changed = data.draw(st.sampled_from(MUTATIONS))(tensors[name])
        if changed is None:
            tensors.pop(name)
        else:
            tensors[name] = changed
        if not tensors:
            return
    readable(tmp_path, config, tensors)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_setting_that_is_not_what_it_should_be(tmp_path: Path, data: st.DataObject) -> None:
    config, tensors = parts_of(data.draw(st.sampled_from(sorted(SAMPLES))))
    inner: Any = config
    while True:
        key = data.draw(st.sampled_from(sorted(inner)))
        if not isinstance(inner[key], dict) or not inner[key] or data.draw(st.integers(0, 3)) == 0:
            break
        inner = inner[key]
    inner[key] = data.draw(st.sampled_from(VALUES))
    readable(tmp_path, config, tensors)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["nf4 nested=False", "nf4 nested=True"]),
    st.sampled_from(["shape", "blocksize", "quant_type", "nested_offset", "nested_blocksize", "dtype"]),
    st.sampled_from([*VALUES, [5, 51], [50, 5], [1, 250], [5, -50], [2**40, 2**40], [5.0, 50]]),
)
def test_a_state_of_bitsandbytes_that_is_not_what_it_should_be(tmp_path: Path, case: str, key: str, value: Any) -> None:
    config, tensors = parts_of(case)
    name = "m.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[name].tolist())) | {key: value}
    tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    readable(tmp_path, config, tensors)


def test_texts_that_are_no_state(tmp_path: Path) -> None:
    config, tensors = parts_of("nf4 nested=False")
    name = "m.weight.quant_state.bitsandbytes__nf4"
    for text, word in (
        (b"\xff\xfe", "no JSON"),
        (b"[" * 60000, "no JSON"),
        (b"[]", "no shape"),
        (b" " * 70000, "70000 bytes"),
    ):
        tensors[name] = torch.tensor(list(text), dtype=torch.uint8)
        assert word in refused(tmp_path, tensors, **config)


UNKNOWN = [
    *(
        "bitnet",
        "hqq",
        "torchao",
        "quanto",
        "aqlm",
        "eetq",
        "mxfp4",
        "higgs",
        "vptq",
        "spqr",
        "auto-round",
        "quark",
        "exl2",
    ),
    *("BitNet", "", 3, None, ["awq"], "x" * 5000),
]


@pytest.mark.parametrize("method", UNKNOWN, ids=lambda m: str(m)[:12])
def test_a_method_that_is_not_known_is_refused_by_its_name(method: Any, tmp_path: Path) -> None:
    weight = {"model.a.weight": torch.ones(2, 4)}
    message = refused(tmp_path, weight, quantization_config={"quant_method": method, "bits": 2})
    assert "no quant_method" in message if method is None else f"{method!r}"[:20] in message
    assert "give the model before it was quantized" in message


@pytest.mark.parametrize(
    ("case", "changes", "word"),
    [
        ("awq", {"version": "gemv"}, "gemv"),
        ("awq", {"version": "gemv_fast"}, "gemv_fast"),
        ("awq", {"version": "llm-awq"}, "llm-awq"),
        ("awq", {"bits": 8}, "bits is 8"),
        ("awq", {"zero_point": False}, "zero_point is False"),
        ("awq", {"group_size": 16}, "[4, 4]"),
        ("awq", {"group_size": 10**30}, "group_size"),
        ("awq", {"group_size": 0}, "group_size is 0"),
        ("gptq", {"checkpoint_format": "marlin"}, "marlin"),
        ("gptq", {"checkpoint_format": "bitblas"}, "bitblas"),
        ("gptq", {"is_marlin_format": True}, "Marlin"),
        ("gptq", {"pack_dtype": "int16"}, "int16"),
        ("gptq", {"bits": 5}, "bits is 5"),
        ("gptq", {"bits": 8}, "8 rows"),
        ("gptq", {"bits": True}, "bits is True"),
        ("fp8", {"weight_block_size": [0, 32]}, "weight_block_size"),
        ("fp8", {"weight_block_size": [8, 32]}, "[3, 2]"),
        ("fp8", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
        ("nf4 nested=True", {"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type is 'fp4'"),
        ("packed 4 group symmetric=True", {"format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
        ("packed 4 group symmetric=True", {"format": "mxfp4-pack-quantized"}, "mxfp4-pack-quantized"),
        ("packed 4 group symmetric=True", {"format": "marlin-24"}, "marlin-24"),
        ("packed 4 group symmetric=True", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ("packed 4 group symmetric=True", {"config_groups": {}}, "config_groups"),
        ("packed 4 group symmetric=True", {"config_groups": {"a": {"weights": GROUP | {"num_bits": 8}}}}, "fit none"),
        (
            "packed 4 group symmetric=True",
            {"config_groups": {"a": {"weights": GROUP | {"group_size": 16}}}},
            "fit none",
        ),
        ("packed 4 group symmetric=True", {"config_groups": {"a": {"weights": GROUP | {"strategy": "x"}}}}, "strategy"),
        (
            "packed 4 group symmetric=True",
            {"config_groups": {"a": {"weights": GROUP | {"symmetric": False}}}},
            "zero_point",
        ),
    ],
)
def test_settings_that_are_not_read(case: str, changes: dict[str, Any], word: str, tmp_path: Path) -> None:
    config, tensors = parts_of(case)
    assert word in refused(tmp_path, tensors, quantization_config=config["quantization_config"] | changes)


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_modes_of_mlx_that_are_not_read(mode: str, tmp_path: Path) -> None:
    config, tensors = parts_of("mlx 4")
    assert mode in refused(tmp_path, tensors, quantization=config["quantization"] | {"mode": mode})
    own = config["quantization"] | {"m": {"group_size": 32, "bits": 4, "mode": mode}}
    assert mode in refused(tmp_path, tensors, quantization=own)


def test_a_group_that_is_not_there(tmp_path: Path) -> None:
    config, tensors = parts_of("gptq")
    for bad in (2, -1, 2**31 - 1):
        tensors["m.g_idx"][5] = bad
        assert "g_idx names a group" in refused(tmp_path, tensors, **config)


def test_parts_without_a_block_are_named(tmp_path: Path) -> None:
    for case, word in (
        ("gptq", "m.qweight"),
        ("awq", "m.qweight"),
        ("mlx 4", "uint32"),
        ("int8", "m.SCB"),
        ("fp8", "scale_inv"),
    ):
        message = refused(tmp_path, parts_of(case)[1])
        assert word in message
        assert "quantization_config" in message


def test_a_weight_in_both_forms(tmp_path: Path) -> None:
    config, tensors = parts_of("awq")
    assert "twice" in refused(tmp_path, tensors | {"m.weight": torch.ones(32, 64)}, **config)


@pytest.mark.parametrize("block", [3, "awq", [], [{}], True])
def test_a_block_that_is_no_object(block: Any, tmp_path: Path) -> None:
    assert "expected an object" in refused(tmp_path, {"a.weight": torch.ones(2)}, quantization_config=block)


def test_weights_of_another_order_in_8_bits(tmp_path: Path) -> None:
    config, tensors = parts_of("int8")
    tensors["m.weight_format"] = torch.tensor(2, dtype=torch.uint8)
    assert "weight_format" in refused(tmp_path, tensors, **config)
