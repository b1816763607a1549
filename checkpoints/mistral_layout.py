"""Mistral's own layout: params.json and consolidated.safetensors, seen as transformers' config and names.

Its RoPE turns neighbours, so rows of queries and keys are reordered.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UserError
from ..system.reading import read_json_object, shown
from .named_store import NamedStore
from .names import Piece, Rule, halves, rename
from .safetensors_reader import SafetensorsStore

PARAMS = "params.json"
_WEIGHTS = "consolidated*.safetensors"
_WAY_OUT = "give the same model in transformers' layout (config.json and model.safetensors)"
_KNOWN = frozenset(
    [
        "dim",
        "n_layers",
        "head_dim",
        "hidden_dim",
        "n_heads",
        "n_kv_heads",
        "norm_eps",
        "vocab_size",
        "rope_theta",
        "max_seq_len",
        "max_position_embeddings",
        "sliding_window",
        "tied_embeddings",
        "max_batch_size",
        "model_parallel",
        "causal",
        "vision_encoder",
    ]
)


def weight_files(directory: Path) -> list[str]:
    """Names of the weight files of this layout."""
    return sorted(p.name for p in directory.glob(_WEIGHTS)) if (directory / PARAMS).is_file() else []


def open_mistral(directory: Path) -> tuple[dict[str, Any], NamedStore, list[str]]:
    """Config, store and lines for the user. Raises UserError for what this layout may hold and is not read here."""
    config = _config(directory / PARAMS)
    files = weight_files(directory)
    store = SafetensorsStore(directory, {name: set() for name in files})
    rules = _rules(config)
    pieces: dict[str, tuple[Piece, ...]] = {}
    for name in store.infos:
        matches = (rule.pieces(name) for rule in rules)
        new, piece = next((m for m in matches if m), [(name, Piece(name))])[0]
        if new in pieces:
            raise UserError(f"{directory}: {new} is there twice")
        pieces[new] = (piece,)
    notes = ["the checkpoint is in Mistral's own layout (params.json)"]
    return config, NamedStore(store, pieces), notes


def _config(path: Path) -> dict[str, Any]:
    params = read_json_object(path)
    for key in sorted(params.keys() - _KNOWN):
        if params[key]:
            raise UserError(
                f"{path}: {key!r:.60} is {shown(params[key], 60)}, which is not read in this layout; {_WAY_OUT}"
            )
    if params.get("causal", True) is not True:
        raise UserError(f"{path}: causal is {shown(params['causal'], 20)}; {_WAY_OUT}")
    window, positions = params.get("sliding_window"), params.get("max_position_embeddings") or params.get("max_seq_len")
    heads = _size(path, params, "n_heads")
    return {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "hidden_size": _size(path, params, "dim"),
        "num_hidden_layers": _size(path, params, "n_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": _size(path, params | {"n_kv_heads": params.get("n_kv_heads", heads)}, "n_kv_heads"),
        "head_dim": _size(path, params, "head_dim"),
        "intermediate_size": _size(path, params, "hidden_dim"),
        "vocab_size": _size(path, params, "vocab_size"),
        "max_position_embeddings": 32768
        if positions is None
        else _size(path, {"max_seq_len": positions}, "max_seq_len"),
        "sliding_window": None if window is None else _size(path, params, "sliding_window"),
        "tie_word_embeddings": params.get("tied_embeddings", False) is True,
        "rms_norm_eps": _real(path, params, "norm_eps"),
        "rope_theta": _real(path, params, "rope_theta"),
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _size(path: Path, params: dict[str, Any], key: str) -> int:
    value = params.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
        raise _error(path, params, key)
    return value


def _real(path: Path, params: dict[str, Any], key: str) -> float:
    value = params.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
        raise _error(path, params, key)
    return float(value)


def _error(path: Path, params: dict[str, Any], key: str) -> UserError:
    said = f"{key} is {shown(params[key], 40)}" if key in params else f"no {key}"
    return UserError(f"{path}: {said}, which Mistral's own layout needs; complete it, or {_WAY_OUT}")


def _rules(config: dict[str, Any]) -> list[Rule]:
    layer, new = "layers.{}.", "model.layers.{}."
    attention, mlp = f"{layer}attention.", f"{layer}feed_forward."
    return [
        rename("tok_embeddings", "model.embed_tokens"),
        rename("norm", "model.norm"),
        rename("output", "lm_head"),
        halves(f"{attention}wq", config["num_attention_heads"], f"{new}self_attn.q_proj"),
        halves(f"{attention}wk", config["num_key_value_heads"], f"{new}self_attn.k_proj"),
        rename(f"{attention}wv", f"{new}self_attn.v_proj"),
        rename(f"{attention}wo", f"{new}self_attn.o_proj"),
        rename(f"{layer}attention_norm", f"{new}input_layernorm"),
        rename(f"{layer}ffn_norm", f"{new}post_attention_layernorm"),
        rename(f"{mlp}w1", f"{new}mlp.gate_proj"),
        rename(f"{mlp}w2", f"{new}mlp.down_proj"),
        rename(f"{mlp}w3", f"{new}mlp.up_proj"),
    ]
