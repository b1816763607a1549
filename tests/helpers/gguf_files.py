"""Small GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from gguf.quants import dequantize, quantize

HIDDEN, FFN, HEADS, KV, DIM, LAYERS, VOCAB = 64, 96, 4, 2, 16, 2, 40


def tensors_of(architecture: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (VOCAB, HIDDEN), "output_norm": (HIDDEN,)}
    for i in range(LAYERS):
        block: dict[str, tuple[int, ...]] = {
            "attn_norm": (HIDDEN,),
            "attn_q": (HEADS * DIM, HIDDEN),
            "attn_k": (KV * DIM, HIDDEN),
            "attn_v": (KV * DIM, HIDDEN),
            "attn_output": (HIDDEN, HEADS * DIM),
            "ffn_norm": (HIDDEN,),
            "ffn_gate": (FFN, HIDDEN),
            "ffn_up": (FFN, HIDDEN),
            "ffn_down": (HIDDEN, FFN),
        }
        if architecture == "gemma3":
            block |= {"attn_q_norm": (DIM,), "attn_k_norm": (DIM,)}
            block |= {"post_attention_norm": (HIDDEN,), "post_ffw_norm": (HIDDEN,)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def write_gguf(
    path: Path,
    architecture: str = "llama",
    kind: Kind = Kind.Q8_0,
    drop: tuple[str, ...] = (),
    more: dict[str, np.ndarray] | None = None,
    **numbers: Any,
) -> dict[str, np.ndarray]:
    """A tiny model with seeded weights; returns what each tensor of the file dequantizes to."""
    writer = GGUFWriter(path, architecture)
    sizes = {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": HIDDEN,
        "feed_forward_length": FFN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV,
        "attention.key_length": DIM,
        "attention.value_length": DIM,
    }
    for key, value in {**sizes, **numbers}.items():
        if isinstance(value, bool):
            writer.add_bool(f"{architecture}.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"{architecture}.{key}", value)
        elif isinstance(value, list):
            writer.add_array(f"{architecture}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
        else:
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    if "rope.freq_base" not in numbers:
        writer.add_float32(f"{architecture}.rope.freq_base", 50000.0)
    random = np.random.default_rng(0)
    values: dict[str, np.ndarray] = {}
    for name, shape in tensors_of(architecture).items():
        weight = random.standard_normal(shape).astype(np.float32)
        if name in drop:
            continue
        if len(shape) == 1:
            writer.add_tensor(name, weight)
            values[name] = weight
        else:
            blocks = quantize(weight, kind)
            writer.add_tensor(name, blocks, raw_dtype=kind)
            values[name] = dequantize(blocks, kind).reshape(shape)
    for name, weight in (more or {}).items():
        writer.add_tensor(name, weight)
        values[name] = weight
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values
