"""What a person finds in the package in Xcode: who made it, what each input, output and state is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ...graph import Graph
from ...system.version import __version__

AUTHOR = "made with Edgewright"
LICENSE = "the license of the model that the weights come from"

_PORTS = {
    "input_ids": "token ids",
    "past_length": "how many tokens the caches hold before this call",
    "logit_positions": "at which of the given tokens logits are wanted, from 0",
    "encoder_mask": "1 for the tokens of the prompt, 0 for padding",
    "encoder_hidden": "what the encoder made of the prompt: [batch, tokens, hidden]",
    "memory": "rows of memory that stand for a context: [batch, rows, hidden]",
    "slots": "the row of memory at each position, or -1 for a token",
    "logits": "logits of the next token: [batch, positions, vocabulary]",
}
_STATES = (
    (r"k_cache_(\d+)", "keys of layer {}, written by each call"),
    (r"v_cache_(\d+)", "values of layer {}, written by each call"),
    (r"cross_k_(\d+)", "keys of the prompt for layer {}"),
    (r"cross_v_(\d+)", "values of the prompt for layer {}"),
    (r"conv_(\d+)", "the last inputs of the convolution of layer {}"),
    (r"recurrent_(\d+)", "what the recurrence of layer {} carries from call to call"),
)


def describe(spec: Any, graphs: Sequence[Graph]) -> None:
    """Fill in the metadata of a Core ML model and the descriptions of its features."""
    metadata, names = spec.description.metadata, [g.name for g in graphs]
    metadata.author = AUTHOR
    metadata.license = LICENSE
    metadata.versionString = __version__
    functions = ", ".join(names)
    metadata.shortDescription = (
        f"A language model with quantized weights. Functions: {functions}; one that ends in _step takes one token."
    )
    for function in spec.description.functions:
        for feature in (*function.input, *function.output, *function.state):
            feature.shortDescription = words(feature.name)


def words(name: str) -> str:
    """What the input, output or state `name` is; its own name where a user's module gave it."""
    plain, after = name.removesuffix("_out"), " after this call" if name.endswith("_out") else ""
    if plain in _PORTS:
        return _PORTS[plain] + after
    for pattern, text in _STATES:
        found = re.fullmatch(pattern, plain)
        if found is not None:
            return text.format(found[1]) + after
    return plain.replace("_", " ") + after
