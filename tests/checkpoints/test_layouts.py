"""Folders of other layouts: Mistral's, Meta's, mlx-lm's forms of tensors; read, or refused in one line that says what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.packing import write_checkpoint
from safetensors.torch import load_file, save_file

from edgewright.checkpoints.opening import open_checkpoint
from edgewright.errors import UserError
from edgewright.models.opening import open_model

PARAMS: dict[str, Any] = {
    "dim": 64,
    "n_layers": 2,
    "head_dim": 16,
    "hidden_dim": 96,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": 96,
    "rope_theta": 10000.0,
}
OWN_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "layers",
}


def refused(model: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_model(str(model))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


def own_layout(folder: Path, tensors: dict[str, torch.Tensor], **params: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    values = {k: v for k, v in (PARAMS | params).items() if v != "left out"}
    (folder / "params.json").write_text(json.dumps(values))
    save_file(tensors, folder / "consolidated.safetensors")
    return folder


def neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys whose halves turn together, in the order of a RoPE that turns neighbours."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder that transformers wrote, and its tensors as Mistral's own files have them."""
    import transformers

    folder = tmp_path_factory.mktemp("mistral")
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "sliding_window": None}
    transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, **heads)).save_pretrained(folder)
    own = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        turned = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        for old, new in OWN_NAMES.items():
            name = name.replace(old, new)
        own[name] = neighbours(tensor, turned).contiguous() if turned else tensor
    return folder, own


def test_mistrals_own_layout(mistral: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder, own = mistral
    assert "layers.1.attention.wq.weight" in own
    expected, opened = open_model(str(folder)), open_model(str(own_layout(tmp_path, own)))
    assert set(opened.names()) == set(expected.names())
    for name in expected.names():
        assert torch.equal(opened.tensor(name), expected.tensor(name)), name
        assert torch.equal(opened.rows(name, 1, 3), expected.rows(name, 1, 3)), name
    assert "Mistral's own layout" in opened.notes[0]
    assert opened.tokenizer is None
    for key in (
        "hidden_size",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "sliding_window",
        "rms_norm_eps",
    ):
        assert opened.config[key] == expected.config[key], key


@pytest.mark.parametrize(
    ("params", "word"),
    [
        ({"moe": {"num_experts": 8}}, "moe"),
        ({"yarn": {"factor": 4}}, "yarn"),
        ({"quantization": {"qformat_weight": "fp8_e4m3"}}, "quantization"),
        ({"lora": {"rank": 8}}, "lora"),
        ({"rope_theta": "left out"}, "no rope_theta"),
        ({"dim": "left out"}, "no dim"),
        ({"n_heads": 10**30}, "n_heads is 1"),
        ({"n_layers": -1}, "n_layers is -1"),
        ({"norm_eps": "x"}, "norm_eps is 'x'"),
        ({"causal": False}, "causal"),
        ({"n_heads": 3}, "wq"),
    ],
)
def test_what_mistrals_layout_may_hold_and_is_not_read(params: dict[str, Any], word: str, tmp_path: Path) -> None:
    own = {"layers.0.attention.wq.weight": torch.zeros(64, 64)}
    assert word in refused(own_layout(tmp_path, own, **params))


def test_both_layouts_in_one_folder(mistral: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder, own = mistral
    write_checkpoint(tmp_path, load_file(folder / "model.safetensors"))
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    own_layout(tmp_path, own)
    assert set(open_model(str(tmp_path)).names()) == set(open_model(str(folder)).names())


def test_metas_own_layout_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "consolidated.00.pth").write_bytes(b"PK")
    (tmp_path / "params.json").write_text("{}")
    message = refused(tmp_path)
    assert "Meta's own layout" in message
    assert "pickle" in message
    assert "transformers' layout" in message


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5", "qwen3_5_text", "lfm2"])
def test_mlx_lms_convolutions_and_norms(kind: str, tmp_path: Path) -> None:
    leaf = "conv.conv.weight" if kind == "lfm2" else "linear_attn.conv1d.weight"
    conv, norm = torch.randn(6, 4, 1), torch.rand(8) + 1
    names = ("language_model.model.layers.0.input_layernorm.weight", "language_model.model.norm.weight")
    other = "language_model.model.layers.0.linear_attn.norm.weight"
    tensors = {f"language_model.model.layers.0.{leaf}": conv} | dict.fromkeys((*names, other), norm)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path, tensors, model_type=kind)))
    name = f"language_model.model.layers.0.{leaf}"
    assert checkpoint.info(name).shape == (6, 1, 4)
    assert torch.equal(checkpoint.tensor(name), conv.transpose(1, 2))
    assert torch.equal(checkpoint.rows(name, 2, 5), conv.transpose(1, 2)[2:5])
    shift = 0.0 if kind == "lfm2" else 1.0
    for shifted in names:
        assert torch.equal(checkpoint.tensor(shifted), norm - shift)
    assert torch.equal(checkpoint.tensor(other), norm)
    tensors[name] = conv.transpose(1, 2).contiguous()  # as transformers has it: nothing is undone
    plain = open_checkpoint(str(write_checkpoint(tmp_path, tensors, model_type=kind)))
    assert torch.equal(plain.tensor(names[0]), norm)
    assert torch.equal(plain.tensor(name), tensors[name])


@pytest.mark.parametrize("kind", ["falcon_h1", "mamba2"])
def test_mlx_lms_changes_that_are_not_undone(kind: str, tmp_path: Path) -> None:
    message = refused(
        write_checkpoint(tmp_path, {"model.layers.0.mamba.conv1d.weight": torch.zeros(6, 4, 1)}, model_type=kind)
    )
    assert "mlx-lm" in message
    assert kind in message


def test_biases_of_zeros_that_the_model_has_not(tmp_path: Path) -> None:
    import transformers

    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.bias"
    for value, kept in ((0.0, False), (0.5, True)):
        save_file(tensors | {name: torch.full((64,), value)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        assert open_model(str(tmp_path)).has(name) == kept  # what is kept has no place, and is refused by name
