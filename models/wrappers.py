"""The text model of a multimodal checkpoint: which section of config.json it is, and which family computes it."""

from __future__ import annotations

from typing import Any

from ..errors import UserError
from ..system.reading import shown

WRAPPERS = {
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text",
    "qwen3_5": "qwen3_5_text",
    "mistral3": "mistral",
    "qwen2_vl": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "llava": "llama",
    "idefics3": "llama",
    "smolvlm": "llama",
    "paligemma": "gemma2",
}
"""`model_type` of a wrapper -> that of its text model where the section does not say."""

_TEXT_TYPES = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""`model_type` of a section -> the family that computes it."""

_INHERITED = ("tie_word_embeddings", "eos_token_id", "bos_token_id", "pad_token_id", "edgewright")


def text_model(config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The config of the text model, and lines that say what is left out. Raises UserError for a section that is no object."""
    kind = config.get("model_type")
    if kind not in WRAPPERS or "text_config" not in config:
        return config, []
    section = config["text_config"]
    if not isinstance(section, dict):
        raise UserError(f"config.json: text_config is {shown(section)}, expected an object")
    own = section.get("model_type", WRAPPERS[kind])
    text = {key: config[key] for key in _INHERITED if config.get(key) is not None}
    text |= {key: value for key, value in section.items() if value is not None or key not in text}
    text["model_type"] = _TEXT_TYPES.get(own, own) if isinstance(own, str) else own
    return text, [f"the text model of {kind} is taken; images and sound are left out"]
