"""Every type that the gguf package dequantizes: values are its own, to the bit, however a tensor is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from helpers.gguf_files import HIDDEN, LAYERS, VOCAB, tensors_of, write_gguf

from edgewright.checkpoints import gguf_store
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.errors import UserError

WIDTH = 512


def readable() -> list[Kind]:
    """The types that the package dequantizes."""
    found = []
    for kind in Kind:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            continue
        found.append(kind)
    return found


def blocks(rows: int, width: int, kind: Kind) -> np.ndarray:
    """Random bytes: any are blocks of a quantized type, some with scales that are no numbers. Floats are made as such."""
    random = np.random.default_rng(int(kind))
    if kind in (Kind.F32, Kind.F16):
        values = random.standard_normal((rows, width)).astype(np.float32 if kind == Kind.F32 else np.float16)
        return values.view(np.uint8)
    block, size = GGML_QUANT_SIZES[kind]
    return random.integers(0, 256, (rows, width // block * size), dtype=np.uint8)


def test_the_types_of_the_issue_are_readable() -> None:
    names = {kind.name for kind in readable()}
    assert names >= {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"}
    assert names >= {
        "IQ3_S",
        "IQ4_NL",
        "IQ4_XS",
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q8_0",
        "TQ1_0",
        "TQ2_0",
        "BF16",
        "MXFP4",
    }


@pytest.mark.parametrize("kind", readable(), ids=lambda kind: kind.name)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_values_are_those_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind) -> None:
    path = tmp_path / "m.gguf"
    stored = {name: blocks(shape[0], WIDTH, kind) for name, shape in _matrices().items()}
    _write(path, stored, kind)
    opened = open_checkpoint(str(path))
    monkeypatch.setattr(gguf_store, "_CHUNK", 7 * WIDTH)  # several reads a tensor
    table = dequantize(stored["token_embd.weight"], kind)
    assert _same(opened.tensor("model.embed_tokens.weight"), table)
    assert _same(opened.rows("model.embed_tokens.weight", 5, 18), table[5:18])
    query = dequantize(stored["blk.1.attn_q.weight"], kind)
    pairs = query.reshape(4, 8, 2, WIDTH).swapaxes(1, 2).reshape(query.shape)
    assert _same(opened.tensor("model.layers.1.self_attn.q_proj.weight"), pairs)
    assert _same(opened.rows("model.layers.1.self_attn.q_proj.weight", 3, 40), pairs[3:40])


def _matrices() -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in tensors_of("llama").items() if len(shape) == 2}


def _write(path: Path, stored: dict[str, np.ndarray], kind: Kind) -> None:
    """A Llama whose every matrix has rows of `WIDTH`: nothing here computes with it."""
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, shape in tensors_of("llama").items():
        if name in stored:
            writer.add_tensor(name, stored[name], raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _same(found: torch.Tensor, wanted: np.ndarray) -> bool:
    """Equal to the bit; where random bytes are no number, both are none."""
    mine = found.numpy()
    numbers = ~np.isnan(wanted)
    bits = mine.view(np.uint32)[numbers] == wanted.astype(np.float32).view(np.uint32)[numbers]
    return bool(mine.shape == wanted.shape and (np.isnan(mine) == ~numbers).all() and bits.all())


@pytest.mark.parametrize("kind", [k for k in Kind if k not in readable()], ids=lambda kind: kind.name)
def test_other_types_are_named(tmp_path: Path, kind: Kind) -> None:
    path = tmp_path / "m.gguf"
    stored = {name: blocks(shape[0], WIDTH, kind) for name, shape in _matrices().items()}
    _write(path, stored, kind)
    with pytest.raises(UserError, match=rf"is {kind.name}, not readable here"):
        open_checkpoint(str(path))


def test_a_vocabulary_of_one_row(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    values = write_gguf(path)
    assert open_checkpoint(str(path)).rows("model.embed_tokens.weight", VOCAB - 1, VOCAB).tolist() == [
        values["token_embd.weight"][-1].tolist()
    ]
