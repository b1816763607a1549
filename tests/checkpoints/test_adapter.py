"""LoRA adapters merged onto a checkpoint, against W + scale * B A computed at once; and all that is not merged, by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import packing
from helpers.packing import write_checkpoint
from safetensors.torch import save_file

from edgewright.checkpoints.opening import open_checkpoint
from edgewright.errors import UserError
from edgewright.models.opening import open_model

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
SHAPES = {f"{Q}.weight": (24, 16), f"{DOWN}.weight": (16, 40), "model.norm.weight": (16,), "lm_head.weight": (50, 16)}


def base(folder: Path, prefix: str = "", dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """A checkpoint in `folder`, and its tensors under the names of a language model."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    write_checkpoint(folder, {name.replace("model.", prefix, 1) if prefix else name: t for name, t in tensors.items()})
    return tensors


def loras(ranks: dict[str, int], transposed: bool = False) -> dict[str, torch.Tensor]:
    """Module -> A and B of a rank, under PEFT's names."""
    generator, made = torch.Generator().manual_seed(1), {}
    for module, rank in ranks.items():
        out, width = SHAPES[f"{module}.weight"]
        out, width = (width, out) if transposed else (out, width)
        made[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, width, generator=generator)
        made[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
    return made


def adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"} | config
    (folder / "adapter_config.json").write_text(json.dumps(values | {"base_model_name_or_path": "owner/base"}))
    if tensors:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def delta(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
    return b @ a


def refused(model: Path, folder: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        open_checkpoint(str(model), str(folder))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


@pytest.mark.parametrize(
    ("config", "ranks", "scales"),
    [
        ({}, {Q: 4, DOWN: 4}, {Q: 2.0, DOWN: 2.0}),
        ({"use_rslora": True}, {Q: 4}, {Q: 4.0}),
        ({"rank_pattern": {"q_proj": 2}}, {Q: 2, DOWN: 4}, {Q: 4.0, DOWN: 2.0}),
        ({"alpha_pattern": {r"layers\.1\.mlp.down_proj": 3}}, {Q: 4, DOWN: 4}, {Q: 2.0, DOWN: 0.75}),
        ({"rank_pattern": {f"^{DOWN}": 1, "^q_proj": 9}}, {Q: 4, DOWN: 1}, {Q: 2.0, DOWN: 8.0}),
        ({"init_lora_weights": "gaussian", "lora_dropout": 0.1, "inference_mode": True}, {Q: 4}, {Q: 2.0}),
    ],
)
def test_an_adapter_is_merged(
    config: dict[str, Any], ranks: dict[str, int], scales: dict[str, float], tmp_path: Path
) -> None:
    tensors, parts = base(tmp_path / "base"), loras(ranks)
    checkpoint = open_checkpoint(str(tmp_path / "base"), str(adapter(tmp_path / "adapter", parts, **config)))
    assert f"merged into {len(ranks)} weights" in checkpoint.notes[-1]
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if module not in ranks:
            assert torch.equal(checkpoint.tensor(name), tensor)
            continue
        expected = (tensor.double() + scales[module] * delta(parts, module)).float()
        torch.testing.assert_close(checkpoint.tensor(name), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(checkpoint.rows(name, 3, 9), expected[3:9], atol=1e-5, rtol=0)
        assert checkpoint.info(name).dtype == torch.float32


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_an_adapter_of_other_prefixes(prefix: str, tmp_path: Path) -> None:
    tensors, parts = base(tmp_path / "base", prefix), loras({Q: 4})
    checkpoint = open_checkpoint(str(tmp_path / "base"), str(adapter(tmp_path / "adapter", parts)))
    name = f"{Q}.weight".replace("model.", prefix, 1)
    expected = (tensors[f"{Q}.weight"].double() + 2 * delta(parts, Q)).float()
    torch.testing.assert_close(checkpoint.tensor(name), expected, atol=1e-5, rtol=0)


def test_an_adapter_of_weights_that_are_inputs_by_outputs(tmp_path: Path) -> None:
    tensors, parts = base(tmp_path / "base"), loras({Q: 4}, transposed=True)
    folder = adapter(tmp_path / "adapter", parts, fan_in_fan_out=True)
    checkpoint = open_checkpoint(str(tmp_path / "base"), str(folder))
    expected = (tensors[f"{Q}.weight"].double() + 2 * delta(parts, Q).t()).float()
    torch.testing.assert_close(checkpoint.tensor(f"{Q}.weight"), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(checkpoint.rows(f"{Q}.weight", 5, 6), expected[5:6], atol=1e-5, rtol=0)


def test_an_adapter_on_a_quantized_base(tmp_path: Path) -> None:
    codes, zeros, scales = torch.randint(0, 16, (16, 24)), torch.randint(0, 16, (1, 24)), torch.rand(1, 24)
    quantized = {f"{Q}.{key}": value for key, value in packing.awq(codes, zeros, scales).items()}
    block = {"quant_method": "awq", "bits": 4, "group_size": -1}
    write_checkpoint(tmp_path / "base", quantized, quantization_config=block)
    parts = loras({Q: 4})
    checkpoint = open_checkpoint(str(tmp_path / "base"), str(adapter(tmp_path / "adapter", parts)))
    expected = packing.dequantized(codes, zeros, scales, [0] * 16).double() + 2 * delta(parts, Q)
    torch.testing.assert_close(checkpoint.tensor(f"{Q}.weight"), expected.float(), atol=1e-5, rtol=0)
    assert len(checkpoint.notes) == 2


def test_a_copy_of_the_bases_weight_is_no_change(tmp_path: Path) -> None:
    tensors, parts = base(tmp_path / "base"), loras({Q: 4, "lm_head": 4})
    copy = {"base_model.model.lm_head.base_layer.weight": tensors["lm_head.weight"]}
    checkpoint = open_checkpoint(str(tmp_path / "base"), str(adapter(tmp_path / "adapter", parts | copy)))
    expected = (tensors["lm_head.weight"].double() + 2 * delta(parts, "lm_head")).float()
    torch.testing.assert_close(checkpoint.tensor("lm_head.weight"), expected, atol=1e-5, rtol=0)
    trained = {"base_model.model.lm_head.weight": tensors["lm_head.weight"] + 1}
    assert "trained whole" in refused(tmp_path / "base", adapter(tmp_path / "trained", loras({Q: 4}) | trained))


def test_a_fingerprint_knows_the_adapter(tmp_path: Path) -> None:
    base(tmp_path / "base")
    parts = loras({Q: 4})
    prints = {open_checkpoint(str(tmp_path / "base")).fingerprint()}
    for i, (more, alpha) in enumerate(((0.0, 8), (0.0, 16), (1.0, 8))):
        changed = {name: tensor + more for name, tensor in parts.items()}
        folder = adapter(tmp_path / str(i), changed, lora_alpha=alpha)
        prints.add(open_checkpoint(str(tmp_path / "base"), str(folder)).fingerprint())
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": "ADALORA"}, "ADALORA"),
        ({"peft_type": None}, "None"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"something_new": {"a": 1}}, "something_new"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"r": 5}, "rank 5"),
        ({"r": 0}, "r is 0"),
        ({"r": 4.5}, "r is 4.5"),
        ({"r": 10**30}, "r is 1"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"lora_alpha": -1}, "lora_alpha is -1"),
        ({"use_rslora": 1}, "use_rslora is 1"),
        ({"fan_in_fan_out": True}, "do not fit"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"rank_pattern": {"(a+)+$": 2}}, "(a+)+$"),
        ({"rank_pattern": {"q_proj": None}}, "q_proj is None"),
        ({"alpha_pattern": {r"\d": 2}}, "alpha_pattern"),
    ],
)
def test_settings_that_are_not_merged(config: dict[str, Any], word: str, tmp_path: Path) -> None:
    base(tmp_path / "base")
    message = refused(tmp_path / "base", adapter(tmp_path / "adapter", loras({Q: 4}), **config))
    assert word in message
    assert message.startswith("--adapter ")


def test_tensors_that_have_no_place(tmp_path: Path) -> None:
    tensors = base(tmp_path / "base")
    a, b = loras({Q: 4}).values()
    head = "base_model.model."
    cases: list[tuple[dict[str, torch.Tensor], str]] = [
        ({f"{head}model.layers.9.x.lora_A.weight": a, f"{head}model.layers.9.x.lora_B.weight": b}, "layers.9.x"),
        ({f"{head}{Q}.lora_A.weight": a}, "lora_A alone"),
        ({f"{head}{Q}.lora_A.weight": a, f"{head}{Q}.lora_B.weight": b.t().contiguous()}, "do not fit"),
        ({f"{head}{Q}.lora_A.weight": a.to(torch.int32), f"{head}{Q}.lora_B.weight": b}, "do not fit"),
        ({f"{head}{Q}.lora_A.weight": a[0], f"{head}{Q}.lora_B.weight": b}, "do not fit"),
        ({f"{head}model.norm.lora_A.weight": a, f"{head}model.norm.lora_B.weight": b}, "do not fit"),
        ({f"{head}{Q}.lora_magnitude_vector": a}, "lora_magnitude_vector"),
        ({f"{head}{Q}.lora_embedding_A": a}, "lora_embedding_A"),
        ({f"{head}{Q}.lora_A.other.weight": a}, "lora_A.other"),
        ({f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b}, "lora_A"),
        ({f"{head}{Q}.base_layer.weight": tensors[f"{Q}.weight"]}, "changes no weight"),
    ]
    for i, (parts, word) in enumerate(cases):
        assert word in refused(tmp_path / "base", adapter(tmp_path / f"adapter{i}", parts))


def test_folders_that_are_no_adapter(tmp_path: Path) -> None:
    base(tmp_path / "base")
    assert "no adapter_config.json" in refused(tmp_path / "base", tmp_path / "nowhere")
    folder = adapter(tmp_path / "empty", {})
    assert "no adapter_model.safetensors" in refused(tmp_path / "base", folder)
    (folder / "adapter_model.bin").write_bytes(b"x")
    assert "pickle" in refused(tmp_path / "base", folder)
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 100)
    assert "not a whole safetensors file" in refused(tmp_path / "base", folder)
    (folder / "adapter_config.json").write_text("[]")
    assert "object" in refused(tmp_path / "base", folder)
    with pytest.raises(UserError, match="module of your own"):
        open_model("package.module:factory", str(folder))


@pytest.mark.parametrize("config", [False, True])
def test_an_adapter_alone_says_what_to_do(config: bool, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", loras({Q: 4}))
    if config:
        (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(
        UserError, match="is a LoRA adapter of 'owner/base', not a model; give that model as -m"
    ) as caught:
        open_checkpoint(str(folder))
    assert "--adapter" in str(caught.value)


def test_an_adapter_in_the_models_folder_is_not_applied_and_told(tmp_path: Path) -> None:
    tensors = base(tmp_path)
    adapter(tmp_path, loras({Q: 4}))
    checkpoint = open_checkpoint(str(tmp_path))
    assert torch.equal(checkpoint.tensor(f"{Q}.weight"), tensors[f"{Q}.weight"])
    assert "not applied" in checkpoint.notes[0]
    assert f"--adapter {tmp_path}" in checkpoint.notes[0]
    assert len(open_checkpoint(str(tmp_path), str(tmp_path)).notes) == 1  # said of what is not applied alone
