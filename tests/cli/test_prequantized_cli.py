"""Quantized checkpoints and adapters through whole commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import packing
from helpers.cli_runner import edgewright, passed, refused
from helpers.tiny import write_tiny_llama
from safetensors.torch import load_file, save_file

from edgewright.bundle import CHECKPOINT
from edgewright.models.opening import open_model
from edgewright.pipeline.request import Request
from edgewright.pipeline.resume import _job

BLOCK = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


def as_awq(folder: Path, plain: Path) -> None:
    """A tiny Llama whose projections are AWQ's parts in `folder`, and the same values as floats in `plain`."""
    generator = torch.Generator().manual_seed(3)
    for made in (folder, plain):
        write_tiny_llama(made)
    tensors = load_file(folder / "model.safetensors")
    parts, floats = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if "_proj.weight" not in name:
            continue
        out, width = weight.shape
        codes = torch.randint(0, 16, (width, out), generator=generator)
        zeros = torch.randint(6, 10, (width // 32, out), generator=generator)
        scales = (torch.rand(width // 32, out, generator=generator) * 0.02 + 0.02).half()
        stem = name.removesuffix("weight")
        parts |= {stem + leaf: t.contiguous() for leaf, t in packing.awq(codes, zeros, scales).items()}
        floats[name] = packing.dequantized(codes, zeros, scales, [i // 32 for i in range(width)])
        del parts[name]
    save_file(parts, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(floats, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": BLOCK}))


@pytest.mark.slow
def test_an_awq_llama_is_exported_and_verified(tmp_path: Path) -> None:
    model, plain, bundle = tmp_path / "awq", tmp_path / "plain", tmp_path / "bundle"
    as_awq(model, plain)
    result = edgewright("export", "-m", model, "--format", "onnx", "--bits", 6, "-o", bundle)
    passed(result)
    assert "already quantized (awq, 4 bits in groups of 32)" in result.stderr
    passed(edgewright("verify", bundle, "-m", model))
    assert "quantization_config" not in json.loads((bundle / CHECKPOINT / "config.json").read_text())
    passed(edgewright("export", "-m", plain, "--format", "onnx", "--bits", 6, "--no-verify", "-o", tmp_path / "other"))
    ours, theirs = (load_file(b / CHECKPOINT / "model.safetensors") for b in (bundle, tmp_path / "other"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny Llama, and an adapter of its queries."""
    model = write_tiny_llama(tmp_path / "model")
    folder = tmp_path / "adapter"
    folder.mkdir()
    parts = {}
    for layer in range(3):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
        parts |= {f"{stem}A.weight": torch.randn(4, 64), f"{stem}B.weight": torch.randn(64, 4) * 0.1}
    save_file(parts, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    return model, folder


@pytest.mark.slow
def test_an_adapter_is_merged_into_what_is_exported(adapter: tuple[Path, Path], tmp_path: Path) -> None:
    model, folder = adapter
    bundle = tmp_path / "bundle"
    given = ("-m", model, "--adapter", folder)
    result = edgewright("export", *given, "--format", "onnx", "--bits", 6, "-o", bundle)
    passed(result)
    assert "merged into 3 weights" in result.stderr
    passed(edgewright("verify", bundle, *given))
    assert "is not the checkpoint" in refused(edgewright("verify", bundle, "-m", model))
    assert "give -m MODEL" in refused(edgewright("verify", bundle, "--adapter", folder))
    assert "a bundle is given" in refused(edgewright("inspect", bundle, "--adapter", folder))
    contents = json.loads(passed(edgewright("inspect", model, "--adapter", folder, "--json")))
    assert "merged into 3 weights" in contents["notes"][0]
    passed(edgewright("plan", *given, "--bits", 5))


def test_a_run_with_an_adapter_is_another_run(adapter: tuple[Path, Path]) -> None:
    model, folder = (str(path) for path in adapter)
    plain, merged = (_job(Request(model, a), open_model(model, a)) for a in (None, folder))
    assert plain["request"]["adapter"] is None
    assert merged["request"]["adapter"] == folder
    assert plain["fingerprint"] != merged["fingerprint"]
