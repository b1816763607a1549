"""What an architecture of GGUF is: how its metadata become a config.json, and where each tensor of the model lies in the file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from ..errors import UserError
from .gguf_keys import WAY_OUT, Keys
from .row_orders import Halves, Order

Config = dict[str, Any]


@dataclass(frozen=True)
class Stored:
    """A tensor of the model as the file has it.

    Attributes:
        name: in the file, behind `blk.N.` for a layer's.
        rows, columns: their order, if it is another.
        add: what is added to the file's values.
        log: the file has minus the exponential of the model's values.
        form: "flat": a vector in the model; "conv": [channels, taps] that is [channels, 1, taps] in the model.
    """

    name: str
    rows: Order | None = None
    columns: Order | None = None
    add: float = 0.0
    log: bool = False
    form: Literal["", "flat", "conv"] = ""

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in the model of a tensor that has shape `stored` in the file. Raises ValueError if it cannot be of it."""
        if (self.form == "conv" and len(stored) != 2) or (self.form == "flat" and len(stored) > 2):
            raise ValueError(f"{len(stored)} axes")
        for order, count in ((self.rows, stored[0]), (self.columns, stored[-1])):
            if order is not None and count != order.total:
                raise ValueError(f"{order.total} rows or columns of its heads are expected")
        if self.form == "flat":
            return (math.prod(stored),)
        return (stored[0], 1, stored[1]) if self.form == "conv" else stored


Block = Callable[[Config, int], Mapping[str, Stored]]
"""(config, layer) -> tensor of a layer in the model, behind `model.layers.N.` -> as stored."""

TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        describe: the metadata -> config.json.
        block, top: where the tensors of a layer, and the others, lie. The head is `output.weight`, if the file has one.
        biases: flag of config.json -> weights of a layer that have biases where any of the file's has one; what the file lacks
            of them is zero. Flag "": always.
        factors: tensors that `describe` reads.
        norm: what is added to norms behind the layers.
        left_out: whether a block is no layer of the model: heads that predict later tokens.
    """

    describe: Callable[[Keys], Config]
    block: Block
    top: Mapping[str, str] = field(default_factory=lambda: TOP)
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    factors: tuple[str, ...] = ()
    norm: float = 0.0
    left_out: Callable[[Keys], int] = lambda keys: 0


def weights(table: Mapping[str, str], **changes: Any) -> dict[str, Stored]:
    """Weights by their stems: the file's -> the model's. changes: fields of all."""
    return {f"{new}.weight": Stored(f"{old}.weight", **changes) for old, new in table.items()}


def plain_block(
    attention: Mapping[str, str], norms: Mapping[str, str], turned: bool = False, norm: float = 0.0
) -> Block:
    """The layers of a plain decoder.

    attention: linears, the file's stem -> the model's. turned: queries and keys are in the order of neighbours. norm: what is
    added to the norms.
    """

    def block(config: Config, layer: int) -> dict[str, Stored]:
        found = weights(attention) | weights(norms, add=norm)
        if turned:
            for name, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
                key = f"self_attn.{name}.weight"
                found[key] = replace(found[key], rows=Halves(config[heads], config["head_dim"]))
        return found

    return block


def common(keys: Keys, partial: bool = False) -> Config:
    """The keys that all decoders have. partial: a head may rotate in part.

    Raises UserError for a mixture of experts, and for attention that is not causal.
    """
    if keys.get("expert_count"):
        raise UserError(f"{keys.file.path}: a mixture of experts, which is not supported; {WAY_OUT}")
    if keys.get("attention.causal") is False:
        raise UserError(
            f"{keys.file.path}: an encoder (attention.causal is false), which cannot generate; give a decoder"
        )
    hidden, heads = keys.size("embedding_length"), keys.size("attention.head_count")
    head_dim = keys.size("attention.key_length", max(1, hidden // heads))
    if head_dim % 2:
        raise keys.error("attention.key_length", head_dim)
    if keys.size("attention.value_length", head_dim) != head_dim:
        raise keys.error("attention.value_length", keys.get("attention.value_length"))
    dims = keys.size("rope.dimension_count", head_dim)
    if (dims != head_dim and not partial) or dims > head_dim or dims % 2:
        raise keys.error("rope.dimension_count", dims)
    embedding = keys.file.tensors.get("token_embd.weight")
    if embedding is None:
        raise UserError(f"{keys.file.path}: no tensor token_embd.weight; is the file complete?")
    return {
        "hidden_size": hidden,
        "num_hidden_layers": keys.layers(),
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": keys.size("context_length"),
        "tie_word_embeddings": "output.weight" not in keys.file.tensors,
        "attention_dropout": 0.0,
        "dtype": "float32",
    }


def decoder(keys: Keys, partial: bool = False) -> Config:
    """`common` and the keys of decoders whose layers are all alike."""
    config = common(keys, partial)
    kv_heads = keys.size("attention.head_count_kv", config["num_attention_heads"])
    if config["num_attention_heads"] % kv_heads:
        raise keys.error("attention.head_count_kv", kv_heads)
    return {
        **config,
        "intermediate_size": keys.size("feed_forward_length"),
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
        "attention_bias": False,
    }


def rotated_share(dims: int, head_dim: int) -> float:
    """The `partial_rotary_factor` that makes `int(head_dim * share)` these dims."""
    share = dims / head_dim
    return share if int(head_dim * share) == dims else float(np.nextafter(share, 1.0))
