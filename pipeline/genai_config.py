"""`genai_config.json` of a decoder-only bundle, by which onnxruntime-genai opens the bundle's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..bundle import CHECKPOINT, Generation, GraphSpec
from ..targets.onnx.genai import MASK, NAME

FILE = "genai_config.json"
GRAPH = f"{NAME}.onnx"
"""The graph that genai runs, in the folder `onnx`; only where there is one is a config written."""


def write_genai_config(folder: Path, decoder: GraphSpec, generation: Generation) -> None:
    """Write the file into a bundle's folder. decoder: the graph from which `exporters.onnx.genai` made its own."""
    (folder / FILE).write_text(json.dumps(genai_config(decoder, generation), indent=1) + "\n")


def genai_config(decoder: GraphSpec, generation: Generation) -> dict[str, Any]:
    """The settings as genai reads them; paths are relative to the bundle."""
    _, kv_heads, _, head_dim = decoder.states[0].shape
    stop = list(generation.eos_ids)
    drawn = generation.sampling
    search: dict[str, Any] = {
        "max_length": generation.max_context,
        "num_beams": 1,
        "past_present_share_buffer": True,
        "do_sample": False,
    }
    if drawn is not None:
        search["repetition_penalty"] = drawn.repetition_penalty
        if drawn.temperature > 0:
            search |= {"do_sample": True, "temperature": drawn.temperature, "top_p": drawn.top_p, "top_k": drawn.top_k}
    return {
        "model": {
            "type": "decoder",
            "tokenizer_dir": CHECKPOINT,
            "vocab_size": generation.vocab,
            "context_length": generation.max_context,
            "pad_token_id": generation.pad_id,
            "bos_token_id": 0,
            "eos_token_id": stop or [generation.pad_id],
            "decoder": {
                "filename": f"onnx/{GRAPH}",
                "session_options": {"provider_options": []},
                "num_hidden_layers": len(decoder.states) // 2,
                "num_key_value_heads": kv_heads,
                "head_size": head_dim,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": MASK,
                    "past_key_names": "k_cache_%d",
                    "past_value_names": "v_cache_%d",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "k_cache_%d_out",
                    "present_value_names": "v_cache_%d_out",
                },
            },
        },
        "search": search,
    }
