"""A Whisper of CTranslate2 as a checkpoint: its arrays where they belong, and a damaged file is refused."""

from __future__ import annotations

import importlib
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from helpers.oracle import randomise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def converter() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("whisper_ctranslate2")
    sys.path.remove(str(BENCHMARKS))


def text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def array(name: str, value: np.ndarray) -> bytes:
    kinds = {"float32": 0, "int16": 2, "float16": 4}
    shape = b"".join(struct.pack("<I", n) for n in value.shape)
    head = text(name) + struct.pack("<B", value.ndim) + shape
    return head + struct.pack("<BI", kinds[str(value.dtype)], value.nbytes) + value.tobytes()


def whole(arrays: dict[str, np.ndarray], aliases: dict[str, str], spec: str = "WhisperSpec") -> bytes:
    parts = [struct.pack("<I", 6), text(spec), struct.pack("<II", 3, len(arrays))]
    parts += [array(name, value) for name, value in arrays.items()]
    parts += [struct.pack("<I", len(aliases)), *(text(a) + text(n) for a, n in aliases.items())]
    return b"".join(parts)


def model() -> Any:
    config = hf.WhisperConfig(
        vocab_size=40,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_source_positions=6,
        max_target_positions=12,
        num_mel_bins=8,
        pad_token_id=1,
    )
    oracle = randomise(hf.WhisperForConditionalGeneration(config), 0)
    oracle.tie_weights()
    return oracle


def arrays_of(oracle: Any) -> dict[str, np.ndarray]:
    """Its weights under CTranslate2's names: projections of one input lie in one array, and a key has a bias of zeros."""
    w = {n.removeprefix("model."): v.numpy() for n, v in oracle.state_dict().items()}
    made: dict[str, np.ndarray] = {}
    for stack, layers in (("encoder", 1), ("decoder", 2)):
        made[f"{stack}/num_heads"] = np.array(2, np.int16)
        made[f"{stack}/position_encodings/encodings"] = w[f"{stack}.embed_positions.weight"]

        def norm(theirs: str, ours: str) -> None:
            made[f"{theirs}/gamma"], made[f"{theirs}/beta"] = w[f"{ours}.weight"], w[f"{ours}.bias"]

        def linear(theirs: str, *ours: str) -> None:
            made[f"{theirs}/weight"] = np.concatenate([w[f"{n}.weight"] for n in ours])
            made[f"{theirs}/bias"] = np.concatenate([w.get(f"{n}.bias", np.zeros(32, np.float32)) for n in ours])

        norm(f"{stack}/layer_norm", f"{stack}.layer_norm")
        for i in range(layers):
            theirs, ours = f"{stack}/layer_{i}", f"{stack}.layers.{i}"
            linear(f"{theirs}/self_attention/linear_0", *(f"{ours}.self_attn.{n}_proj" for n in "qkv"))
            linear(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            if stack == "decoder":
                linear(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn.q_proj")
                linear(f"{theirs}/attention/linear_1", *(f"{ours}.encoder_attn.{n}_proj" for n in "kv"))
                linear(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
                norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
            linear(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            linear(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
    for name in ("conv1", "conv2"):
        for leaf in ("weight", "bias"):
            made[f"encoder/{name}/{leaf}"] = w[f"encoder.{name}.{leaf}"]
    made["decoder/embeddings/weight"] = w["decoder.embed_tokens.weight"]
    return made


ALIASES = {"decoder/projection/weight": "decoder/embeddings/weight"}


def write(folder: Path, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.bin").write_bytes(content)
    (folder / "config.json").write_text('{"suppress_ids": [5, 6], "suppress_ids_begin": [7], "lang_ids": [30]}')
    names = {"<|endoftext|>": 1, "<|startoftranscript|>": 2, "<|notimestamps|>": 33}
    tokens = {"added_tokens": [{"content": name, "id": i} for name, i in names.items()]}
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    return folder


def test_a_converted_model_has_the_weights_of_the_original(converter: Any, tmp_path: Path) -> None:
    oracle = model()
    folder = write(tmp_path / "ct2", whole(arrays_of(oracle), ALIASES))
    converter.convert(folder, tmp_path / "hf")
    wanted = {n: v for n, v in oracle.state_dict().items() if n != "proj_out.weight"}
    got = load_file(tmp_path / "hf" / "model.safetensors")
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[n], v) for n, v in wanted.items())
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for key in ("d_model", "num_mel_bins", "max_source_positions", "max_target_positions", "decoder_layers"):
        assert config[key] == getattr(oracle.config, key)
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == [5, 6]
    assert (generation["no_timestamps_token_id"], generation["is_multilingual"]) == (33, False)


def test_half_precision_is_read(converter: Any, tmp_path: Path) -> None:
    arrays = {n: v if n.endswith("num_heads") else v.astype(np.float16) for n, v in arrays_of(model()).items()}
    converter.convert(write(tmp_path / "ct2", whole(arrays, ALIASES)), tmp_path / "hf")
    got = load_file(tmp_path / "hf" / "model.safetensors")["model.encoder.conv1.bias"]
    np.testing.assert_array_equal(got.numpy(), arrays["encoder/conv1/bias"].astype(np.float32))


def test_what_is_no_such_model_is_refused(converter: Any, tmp_path: Path) -> None:
    arrays = arrays_of(model())
    cases = [
        (whole(arrays, ALIASES, "TransformerSpec"), "version 6 of a TransformerSpec"),
        (whole(arrays, ALIASES)[:-3], "bytes are wanted"),
        (whole(arrays, ALIASES) + b"x", "1 bytes behind the end"),
        (whole(arrays, {"a": "b"}), "a stands for b, which is not there"),
        (whole(arrays | {"encoder/other": np.ones(3, np.float32)}, ALIASES), "arrays without a place: encoder/other"),
        (
            whole(arrays | {"encoder/layer_0/self_attention/linear_0/bias": np.ones(96, np.float32)}, ALIASES),
            "k_proj has a bias",
        ),
    ]
    for content, said in cases:
        with pytest.raises(ValueError, match=said):
            converter.convert(write(tmp_path / "ct2", content), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read(converter: Any, data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray(whole({"a": np.ones((2, 3), np.float32), "b": np.array(2, np.int16)}, {"c": "a"}))
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "model.bin"
    path.write_bytes(bytes(content[: data.draw(st.integers(1, len(content)))]))
    try:
        arrays = converter.read_model(path)
    except ValueError:
        return
    assert len(arrays) <= 3
