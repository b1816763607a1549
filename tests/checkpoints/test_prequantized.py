"""Quantized checkpoints read as float weights: against packers of plain integers, and what the libraries themselves give."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import packing
from helpers.packing import write_checkpoint
from helpers.prequantized_samples import EXPECTED, Sample, read_samples
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewright.checkpoints.checkpoint import Checkpoint
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.checkpoints.prequantized.bits import scaled, unpack

SAMPLES = read_samples()


def opened(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Checkpoint:
    return open_checkpoint(str(write_checkpoint(folder, tensors, **config)))


def same(checkpoint: Checkpoint, name: str, expected: torch.Tensor) -> None:
    """All of a tensor, and any rows of it, are the expected values to the bit."""
    info, rows = checkpoint.info(name), expected.shape[0]
    assert (info.dtype, info.shape) == (torch.float32, tuple(expected.shape))
    assert torch.equal(checkpoint.tensor(name), expected)
    for start, stop in ((0, 1), (1, rows), (rows // 3, rows // 2 + 1), (rows - 1, rows), (2, 2)):
        found = checkpoint.rows(name, start, stop)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected[start:stop]), (start, stop)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 70), st.randoms(use_true_random=False))
def test_a_bit_stream_is_read_back(bits: int, rows: int, count: int, random: Any) -> None:
    codes = torch.tensor([[random.randrange(1 << bits) for _ in range(count)] for _ in range(rows)])
    words = packing.packed_rows(codes, bits)
    assert torch.equal(unpack(words, bits, count).long(), codes)
    assert torch.equal(unpack(words.t().contiguous().t(), bits, count).long(), codes)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 12), st.booleans(), st.integers(0, 1000))
def test_scales_cover_their_columns(width: int, size: int, centred: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (3, width), generator=generator).to(torch.uint8)
    groups = -(-width // size)
    scales = torch.randn(3, groups, generator=generator)
    zeros = torch.randint(0, 16, (3, groups), generator=generator).float() if centred else None
    column = torch.arange(width) // size
    plain = codes.float() if zeros is None else codes.float() - zeros[:, column]
    assert torch.equal(scaled(codes, scales, zeros, size), plain * scales[:, column])
    mixed = column[torch.randperm(width, generator=generator)]
    plain = codes.float() if zeros is None else codes.float() - zeros[:, mixed]
    assert torch.equal(scaled(codes, scales, zeros, size, mixed), plain * scales[:, mixed])


@pytest.mark.parametrize("case", sorted(SAMPLES))
def test_what_a_library_quantized_has_the_librarys_values(case: str, tmp_path: Path) -> None:
    config, parts = SAMPLES[case]
    expected = parts[EXPECTED].float()
    checkpoint = opened(tmp_path, {k: v for k, v in parts.items() if k != EXPECTED}, **config)
    assert checkpoint.names() == ["m.weight"]
    assert checkpoint.config == {"model_type": "llama"}
    assert "already quantized" in checkpoint.notes[0]
    same(checkpoint, "m.weight", expected)


def random_codes(bits: int, width: int, out: int, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(bits * width + out)
    codes = torch.randint(0, 1 << bits, (width, out), generator=generator)
    zeros = torch.randint(1, 1 << bits, (groups, out), generator=generator)
    return codes, zeros, torch.rand(groups, out, generator=generator).half()


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", ["plain", "unnamed", "mixed", "whole"])
def test_gptq(bits: int, form: str, order: str, tmp_path: Path) -> None:
    width, out, size = 96, 64, 96 if order == "whole" else 32
    codes, zeros, scales = random_codes(bits, width, out, width // size)
    groups = torch.arange(width) // size
    if order == "mixed":
        groups = groups[torch.randperm(width, generator=torch.Generator().manual_seed(1))]
    parts = packing.gptq(codes, zeros, scales, bits, minus=int(form == "gptq"))
    if order != "unnamed":
        parts["g_idx"] = groups.to(torch.int32)
    block = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": -1 if order == "whole" else size,
        "desc_act": order == "mixed",
    }
    block |= {"checkpoint_format": form} if form == "gptq_v2" else {}
    tensors = {f"a.{k}": v for k, v in parts.items()} | {
        "a.bias": torch.randn(out).half(),
        "b.weight": torch.randn(3, 4),
    }
    checkpoint = opened(tmp_path, tensors, quantization_config=block)
    assert sorted(checkpoint.names()) == ["a.bias", "a.weight", "b.weight"]
    assert torch.equal(checkpoint.tensor("b.weight"), tensors["b.weight"])
    how = "with one scale a row" if order == "whole" else f"in groups of {size}"
    assert f"(gptq, {bits} bits {how})" in checkpoint.notes[0]
    same(checkpoint, "a.weight", packing.dequantized(codes, zeros, scales, groups.tolist()))


@pytest.mark.parametrize("where", ["config.json", "quantize_config.json", "text_config"])
def test_gptq_modules_of_their_own_widths_and_places_of_the_block(where: str, tmp_path: Path) -> None:
    tensors, expected = {}, {}
    for name, bits, dynamic in (("a", 4, None), ("b", 8, {})):
        codes, zeros, scales = random_codes(bits, 64, 32, 2)
        parts = packing.gptq(codes, zeros, scales, bits, minus=1)
        parts["g_idx"] = (torch.arange(64) // 32).to(torch.int32)
        tensors |= {f"{name}.{k}": v for k, v in parts.items()}
        expected[name] = packing.dequantized(codes, zeros, scales, parts["g_idx"].tolist())
        assert dynamic is None or name == "b"
    block = {"bits": 4, "group_size": 32, "dynamic": {"+:b": {"bits": 8}}}
    if where == "quantize_config.json":
        (tmp_path / where).write_text(json.dumps(block))
        checkpoint = opened(tmp_path, tensors)
    elif where == "text_config":
        checkpoint = opened(
            tmp_path, tensors, text_config={"x": 1, "quantization_config": block | {"quant_method": "gptq"}}
        )
        assert checkpoint.config["text_config"] == {"x": 1}
    else:
        checkpoint = opened(tmp_path, tensors, quantization_config=block | {"quant_method": "gptq"})
    for name, values in expected.items():
        same(checkpoint, f"{name}.weight", values)


@pytest.mark.parametrize("size", [32, 64, -1])
@pytest.mark.parametrize("file", ["config.json", "quant_config.json"])
def test_awq(size: int, file: str, tmp_path: Path) -> None:
    width, out = 64, 40
    groups = torch.arange(width) // (width if size < 0 else size)
    codes, zeros, scales = random_codes(4, width, out, int(groups[-1]) + 1)
    tensors = {f"a.{k}": v for k, v in packing.awq(codes, zeros, scales).items()}
    if file == "quant_config.json":
        (tmp_path / file).write_text(
            json.dumps({"w_bit": 4, "q_group_size": size, "zero_point": True, "version": "GEMM"})
        )
        checkpoint = opened(tmp_path, tensors)
    else:
        block = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm", "zero_point": True}
        checkpoint = opened(tmp_path, tensors, quantization_config=block)
    same(checkpoint, "a.weight", packing.dequantized(codes, zeros, scales, groups.tolist()))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_with_widths_of_their_own(bits: int, tmp_path: Path) -> None:
    tensors, expected = {}, {}
    block: dict[str, Any] = {
        "bits": 4,
        "group_size": 64,
        "model.layers.0.b": {"bits": bits, "group_size": 32},
        "c": False,
    }
    for name, width, size in (("model.embed_tokens", 4, 64), ("model.layers.0.b", bits, 32)):
        codes = torch.randint(0, 1 << width, (9, 128))
        scales, biases = torch.randn(9, 128 // size).bfloat16(), torch.randn(9, 128 // size).bfloat16()
        tensors |= {f"{name}.weight": packing.packed_rows(codes, width).view(torch.uint32)}
        tensors |= {f"{name}.scales": scales, f"{name}.biases": biases}
        column = torch.arange(128) // size
        expected[name] = codes.float() * scales[:, column].float() + biases[:, column].float()
    tensors["c.weight"] = torch.randn(2, 128).bfloat16()
    checkpoint = opened(tmp_path, tensors, quantization=block, quantization_config=block)
    for name, values in expected.items():
        same(checkpoint, f"{name}.weight", values)
    assert checkpoint.info("c.weight").dtype == torch.bfloat16
    assert checkpoint.config == {"model_type": "llama"}


@pytest.mark.parametrize(
    "kind", ["blocks", "unsaid blocks", "rows", "rows flat", "whole", "e8m0", "modelopt", "fbgemm"]
)
def test_fp8(kind: str, tmp_path: Path) -> None:
    out, width, size = 200, 300, 128
    codes = torch.randn(out, width).to(torch.float8_e4m3fn)
    block: dict[str, Any] = {"quant_method": "fp8"}
    leaf, rows, columns = "weight_scale_inv", torch.arange(out) // size, torch.arange(width) // size
    if kind in ("blocks", "unsaid blocks", "e8m0"):
        scales = torch.rand(2, 3) + 0.5
        scales = (
            torch.tensor([[1.0, 2.0, 0.5], [4.0, 0.25, 8.0]]).to(torch.float8_e8m0fnu) if kind == "e8m0" else scales
        )
        block |= {} if kind.startswith("unsaid") else {"weight_block_size": [size, size]}
        spread = scales.float()[rows][:, columns]
    elif kind in ("rows", "rows flat", "fbgemm"):
        leaf, scales = "weight_scale", torch.rand(out, 1)
        spread = scales.expand(out, width)
        scales = scales if kind != "rows flat" else scales[:, 0]
        block = {"quant_method": "fbgemm_fp8"} if kind == "fbgemm" else block
    else:
        leaf, scales = "weight_scale", torch.tensor(0.37)
        spread = scales.expand(out, width)
        block = {"quant_method": "modelopt", "quant_algo": "FP8"} if kind == "modelopt" else block
    tensors = {"m.a.weight": codes, f"m.a.{leaf}": scales, "m.a.input_scale": torch.ones(1), "m.k_scale": torch.ones(1)}
    checkpoint = opened(tmp_path, tensors, quantization_config=block)
    assert checkpoint.names() == ["m.a.weight"]
    same(checkpoint, "m.a.weight", codes.float() * spread)


def test_weights_that_are_yet_to_be_rounded_are(tmp_path: Path) -> None:
    weight, scale = torch.randn(6, 64).bfloat16(), (torch.rand(6, 2) / 4 + 0.05).bfloat16()
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}
    block = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {"group_0": group}}
    column = torch.arange(64) // 32
    rounded = (weight / scale[:, column]).clamp(-8, 7).round().float() * scale[:, column].float()
    tensors = {"m.weight": weight, "m.weight_scale": scale}
    for status, expected in (("frozen", rounded), ("decompressed", weight.float())):
        checkpoint = opened(tmp_path, tensors, quantization_config=block | {"quantization_status": status})
        assert checkpoint.names() == ["m.weight"]
        assert torch.equal(checkpoint.rows("m.weight", 0, 6), expected)


def test_compressed_tensors_in_an_order_of_its_own(tmp_path: Path) -> None:
    codes = torch.randint(0, 16, (5, 64))
    scales = torch.rand(5, 2)
    mixed = (torch.arange(64) // 32)[torch.randperm(64)]
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}
    block = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    parts = {
        "m.weight_packed": packing.packed_rows(codes, 4),
        "m.weight_scale": scales,
        "m.weight_shape": torch.tensor([5, 64]),
    }
    for index, groups in ((mixed, mixed), (torch.full((64,), -1), torch.arange(64) // 32)):
        tensors = parts | {"m.weight_g_idx": index.to(torch.int32)}
        checkpoint = opened(tmp_path, tensors, quantization_config=block)
        same(checkpoint, "m.weight", (codes - 8).float() * scales[:, groups])


def sample(case: str) -> Sample:
    config, parts = SAMPLES[case]
    return config, {k: v for k, v in parts.items() if k != EXPECTED}


def test_a_fingerprint_tells_parts_and_settings_apart(tmp_path: Path) -> None:
    codes, zeros, scales = random_codes(4, 64, 32, 2)
    tensors = {f"a.{k}": v for k, v in packing.gptq(codes, zeros, scales, 4, minus=1).items()}
    block = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    prints = {opened(tmp_path, tensors, quantization_config=block).fingerprint()}
    prints.add(opened(tmp_path, tensors, quantization_config=block | {"checkpoint_format": "gptq_v2"}).fingerprint())
    for name in tensors:
        changed = tensors | {name: tensors[name] + 1}
        prints.add(opened(tmp_path, changed, quantization_config=block).fingerprint())
    assert len(prints) == 5


@pytest.mark.parametrize("method", ["bitsandbytes", "fp8", "gptq"])
def test_plain_weights_under_a_block_are_taken_and_told(method: str, tmp_path: Path) -> None:
    block = {"quant_method": method, "bits": 4, "group_size": 32}
    checkpoint = opened(tmp_path, {"a.weight": torch.ones(2, 3)}, quantization_config=block)
    assert torch.equal(checkpoint.tensor("a.weight"), torch.ones(2, 3))
    assert "stored as plain values" in checkpoint.notes[0]
    assert checkpoint.config == {"model_type": "llama"}


ROWS = """
import subprocess
import sys
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.system.memory_peak import PeakAnonymous
checkpoint, out = open_checkpoint(sys.argv[1]), int(sys.argv[2])
checkpoint.rows("a.weight", 0, 8)  # whatever torch allocates once
with PeakAnonymous() as peak:
    before = peak.bytes
    for start in range(0, out, 1024):
        checkpoint.rows("a.weight", start, min(start + 1024, out))
print(peak.bytes - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("method", ["awq", "gptq", "nf4"])
def test_rows_of_a_3b_models_layer_take_little_memory(method: str, tmp_path: Path) -> None:
    out, width, size = 11008, 2048, 128
    words = {
        "qzeros": (width // size, out // 8),
        "qweight": (width, out // 8) if method == "awq" else (width // 8, out),
    }
    parts = {f"a.{k}": torch.randint(-(2**31), 2**31, shape).to(torch.int32) for k, shape in words.items()}
    parts["a.scales"] = torch.rand(width // size, out).half()
    block: dict[str, Any] = {"quant_method": method, "bits": 4, "group_size": size}
    if method == "nf4":
        config, nested = sample("nf4 nested=True")
        state = json.loads(bytes(nested["m.weight.quant_state.bitsandbytes__nf4"].tolist())) | {"shape": [out, width]}
        parts = {k.replace("m.", "a.", 1): v for k, v in nested.items() if "map" in k}
        parts["a.weight"] = torch.randint(0, 256, (out * width // 2, 1)).to(torch.uint8)
        parts["a.weight.absmax"] = torch.randint(0, 256, (out * width // 64,)).to(torch.uint8)
        parts["a.weight.nested_absmax"] = torch.rand(out * width // 64 // 256)
        text = json.dumps(state).encode()
        parts["a.weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
        block = config["quantization_config"]
    opened(tmp_path, parts, quantization_config=block)
    # In a process of its own: this one's memory and children change as it likes.
    done = subprocess.run([sys.executable, "-c", ROWS, tmp_path, str(out)], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 60 << 20  # the values alone are 86 MiB, a chunk's 8 MiB
