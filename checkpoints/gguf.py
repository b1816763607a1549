"""A GGUF file seen as a Hugging Face checkpoint: config, names and values as the original model had them.

Architectures `llama` and `gemma3`. Two changes of llama.cpp's converter are undone: it reorders the rows of Llama's query and
key weights (its RoPE pairs neighbours, Hugging Face's pairs the two halves of a head), and it adds 1 to Gemma's norm weights.
Values are those of the file's own quantization.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from ..errors import UserError
from ..system.reading import one_line
from .checkpoint import Checkpoint, TensorInfo
from .gguf_file import GgufFile, GgufTensor, read_gguf
from .tokenizer import Tokenizer

_WAY_OUT = "give the safetensors checkpoint instead"
_SAMPLE = 1024
_CHUNK = 4 << 20  # elements dequantized at a time, 16 MiB of float32

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LLAMA_BLOCK = {**_BLOCK, "ffn_norm": "post_attention_layernorm"}
_GEMMA_BLOCK = {
    **_BLOCK,
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA_27B_LAYERS = 62


def open_gguf(source: str, path: Path) -> Checkpoint:
    """Open a GGUF file of architecture llama or gemma3. Only the header is read.

    Raises UserError if the file is corrupt, incomplete, a part of a split model, or of another kind.
    """
    file = read_gguf(path)
    if file.metadata.get("split.count", 0) not in (0, 1):
        raise UserError(f"{source}: one part of a split GGUF; join the parts first (llama-gguf-split --merge)")
    _check_kinds(source, file)
    architecture = file.metadata.get("general.architecture")
    if architecture == "llama":
        config, names = _llama_config(file), _LLAMA_BLOCK
    elif architecture == "gemma3":
        config, names = _gemma3_config(file), _GEMMA_BLOCK
    else:
        raise UserError(
            f"{source}: GGUF architecture {one_line(architecture, 40)!r} (known: gemma3, llama); {_WAY_OUT}"
        )
    places = _places(file, config, names)
    ids = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    for key, stem in ids.items():
        token = file.metadata.get(f"tokenizer.ggml.{stem}_token_id")
        config[key] = token if isinstance(token, int) else None

    def load_tokenizer() -> Tokenizer | None:
        return Tokenizer.from_gguf(file.metadata) if "tokenizer.ggml.model" in file.metadata else None

    return Checkpoint(source, config, {}, GgufStore(file.path, places), load_tokenizer)


class _Keys:
    """The metadata under one architecture's prefix. Each value is checked when it is read."""

    def __init__(self, file: GgufFile, prefix: str) -> None:
        self._file, self._prefix = file, prefix

    def get(self, key: str) -> Any:
        return self._file.metadata.get(f"{self._prefix}.{key}")

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer, or a list that repeats one."""
        value = self.get(key)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise self.error(key, value)
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A positive finite number, as the shortest decimal of its float32 (1e-05, not 9.999999747378752e-06)."""
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.error(key, value)
        return float(str(np.float32(value)))

    def error(self, key: str, value: object) -> UserError:
        return UserError(f"{self._file.path}: {self._prefix}.{key} is {one_line(value, 40)}; {_WAY_OUT}")


def _common_config(file: GgufFile, keys: _Keys) -> dict[str, Any]:
    hidden, heads = keys.size("embedding_length"), keys.size("attention.head_count")
    kv_heads = keys.size("attention.head_count_kv", heads)
    head_dim = keys.size("attention.key_length", max(1, hidden // heads))
    if head_dim % 2:
        raise keys.error("attention.key_length", head_dim)
    if heads % kv_heads:
        raise keys.error("attention.head_count_kv", kv_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.size(key, head_dim) != head_dim:
            raise keys.error(key, keys.get(key))
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise UserError(f"{file.path}: no tensor token_embd.weight; is the file complete?")
    return {
        "hidden_size": hidden,
        "intermediate_size": keys.size("feed_forward_length"),
        "num_hidden_layers": keys.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": keys.size("context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "float32",
    }


def _rope(keys: _Keys, theta: float) -> dict[str, Any]:
    """RoPE of the full layers: plain, or with positions divided by a factor. Raises UserError for others."""
    scaling = keys.get("rope.scaling.type") or "none"
    if scaling == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if scaling == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": keys.real("rope.scaling.factor")}
    raise keys.error("rope.scaling.type", scaling)


def _llama_config(file: GgufFile) -> dict[str, Any]:
    keys = _Keys(file, "llama")
    if keys.get("expert_count"):
        raise UserError(f"{file.path}: a mixture of experts, which is not supported; {_WAY_OUT}")
    factors = file.tensors.get("rope_freqs.weight")
    if factors is not None and not np.all(dequantize(factors.data, factors.kind) == 1.0):
        raise UserError(f"{file.path}: RoPE factors of Llama 3.1 and later, of which GGUF loses the rule; {_WAY_OUT}")
    theta = keys.real("rope.freq_base", 10000.0)
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **_common_config(file, keys),
        "hidden_act": "silu",
        "mlp_bias": False,
        "rope_theta": theta,
        "rope_parameters": _rope(keys, theta),
    }


def _gemma3_config(file: GgufFile) -> dict[str, Any]:
    keys = _Keys(file, "gemma3")
    common = _common_config(file, keys)
    layers, theta = common["num_hidden_layers"], keys.real("rope.freq_base", 1e6)
    local = keys.real("rope.freq_base_swa", 10000.0)
    period = keys.size("attention.sliding_window_pattern", 6)
    if layers > len(file.tensors):
        raise keys.error("block_count", layers)
    kinds = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]
    # Gemma 3 scales queries by head_dim, its 27B by hidden_size / heads. In GGUF only the depth tells which one it is.
    is_27b = layers == _GEMMA_27B_LAYERS
    scalar = common["hidden_size"] // common["num_attention_heads"] if is_27b else common["head_dim"]
    capped = keys.get("final_logit_softcapping") is not None
    return {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        **common,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": keys.size("attention.sliding_window", 512),
        "layer_types": kinds,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": keys.real("final_logit_softcapping") if capped else None,
        "rope_theta": theta,
        "rope_local_base_freq": local,
        "rope_parameters": {
            "full_attention": _rope(keys, theta),
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


@dataclass(frozen=True)
class _Place:
    """Where a Hugging Face tensor lies in the file, and how to get its values from the file's."""

    tensor: GgufTensor
    heads: int = 0  # > 0: the file's rows are in llama.cpp's order within so many heads
    add: float = 0.0


def _places(file: GgufFile, config: Mapping[str, Any], block: Mapping[str, str]) -> dict[str, _Place]:
    """Hugging Face name -> place. Raises UserError if a tensor is missing, unknown, or a q/k has the wrong rows."""
    layers = config["num_hidden_layers"]
    if layers > len(file.tensors):  # a hostile count would make a long loop
        raise UserError(f"{file.path}: {layers} layers in {len(file.tensors)} tensors; is the file complete?")
    names = {f"{old}.weight": f"{new}.weight" for old, new in _TOP.items()}
    if config["tie_word_embeddings"]:
        del names["output.weight"]
    for i in range(layers):
        names |= {f"blk.{i}.{old}.weight": f"model.layers.{i}.{new}.weight" for old, new in block.items()}
    unknown = sorted(file.tensors.keys() - names.keys() - {"rope_freqs.weight"})
    missing = sorted(names.keys() - file.tensors.keys())
    if missing:
        raise UserError(f"{file.path}: no tensor {missing[0]}; is the file complete?")
    if unknown:
        kind = config["model_type"]
        raise UserError(f"{file.path}: tensor {one_line(unknown[0], 60)} has no place in {kind}; {_WAY_OUT}")
    gemma = config["model_type"] == "gemma3_text"
    places: dict[str, _Place] = {}
    for old, new in names.items():
        heads = 0
        if not gemma and ".attn_q." in old:
            heads = config["num_attention_heads"]
        elif not gemma and ".attn_k." in old:
            heads = config["num_key_value_heads"]
        tensor = file.tensors[old]
        if heads and tensor.shape[0] != heads * config["head_dim"]:
            raise UserError(f"{file.path}: {old} has shape {list(tensor.shape)} for {heads} heads; is the file right?")
        places[new] = _Place(tensor, heads, add=-1.0 if gemma and old.endswith("norm.weight") else 0.0)
    return places


def _check_kinds(source: str, file: GgufFile) -> None:
    """Raises UserError if a tensor's type cannot be dequantized. Each type in use is tried on one block of zeros."""
    for tensor in {t.kind: t for t in file.tensors.values()}.values():
        try:
            dequantize(np.zeros_like(tensor.data[:1]), tensor.kind)
        except NotImplementedError:
            raise UserError(f"{source}: {tensor.name} is {tensor.kind.name}, not readable here; {_WAY_OUT}") from None


class GgufStore:
    """The tensors of a GGUF file under their Hugging Face names. Each is dequantized to float32 when it is read."""

    def __init__(self, path: Path, places: dict[str, _Place]) -> None:
        self.files = (path,)
        self.infos = {name: TensorInfo(name, torch.float32, place.tensor.shape) for name, place in places.items()}
        self._places = places

    def tensor(self, name: str) -> torch.Tensor:
        shape = self.infos[name].shape
        if len(shape) == 1:
            return self.rows(name, 0, shape[0])
        out = torch.empty(shape)
        step = max(1, _CHUNK // (out.numel() // shape[0]))
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            out[start:stop] = self.rows(name, start, stop)
        return out

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        place = self._places[name]
        shape = place.tensor.shape
        if len(shape) == 1:  # a vector is one row of blocks
            values = _values(place, place.tensor.data)[0, start:stop]
        else:
            data = place.tensor.data.reshape(shape[0], -1)
            picked = data[_file_rows(place, start, stop)] if place.heads else data[start:stop]
            values = _values(place, picked.reshape(-1, place.tensor.data.shape[1])).reshape(stop - start, *shape[1:])
        return torch.from_numpy(values)

    def sample(self, name: str) -> bytes:
        data = self._places[name].tensor.data.reshape(-1)
        middle = max(0, data.size - _SAMPLE) // 2
        return data[middle : middle + _SAMPLE].tobytes()


def _values(place: _Place, blocks: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """float32 values [rows, width] of block bytes [rows, bytes a row]."""
    kind = place.tensor.kind
    if blocks.shape[0] == 0:
        return np.empty((0, place.tensor.shape[-1]), np.float32)
    values: npt.NDArray[np.float32]
    if kind == GGMLQuantizationType.F32:
        values = np.ascontiguousarray(blocks).view(np.float32)
    else:
        values = np.ascontiguousarray(dequantize(blocks, kind), dtype=np.float32)
    return values + np.float32(place.add) if place.add else values


def _file_rows(place: _Place, start: int, stop: int) -> npt.NDArray[np.int64]:
    """The file's rows that hold rows start..stop of the original weight.

    Within a head the original has the first halves of all RoPE pairs, then the second halves. llama.cpp keeps the two halves
    of a pair together: the original row of half h and pair j is the file's row 2 j + h.
    """
    row = np.arange(start, stop)
    size = place.tensor.shape[0] // place.heads
    head, within = np.divmod(row, size)
    half, pair = np.divmod(within, size // 2)
    rows: npt.NDArray[np.int64] = head * size + 2 * pair + half
    return rows
