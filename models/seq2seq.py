"""Encoder-decoders: three graphs, built once for every family.

`encoder` runs once for a prompt. So does `cross_kv`, which projects the encoder's output to keys and values of every decoder
layer. `decoder` is prefill and decode step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..graph import Dim, Graph, Port, State
from .causal import DecoderParts, kv_states
from .config import ConfigReader
from .kv_cache import Cache
from .language_model import LanguageModel

_MASK = Port("encoder_mask", torch.bool, ("batch", "source"))


@dataclass(frozen=True)
class EncoderInput:
    """What an encoder reads.

    ports: of the graph `encoder`. source: positions of its output, "source" or, where all inputs have one length, a number.
    least: the fewest positions.
    """

    ports: tuple[Port, ...]
    source: Dim = "source"
    least: int = 1


TEXT = EncoderInput((Port("input_ids", torch.int64, ("batch", "source")), _MASK))


@dataclass(frozen=True)
class EncoderDecoder:
    """What the three graphs are built of.

    Attributes:
        encoder: module that takes the tensors of `reads` and returns (hidden states [B, T, encoder_hidden],).
        encoder_root: what stands before the names of its parameters in the checkpoint.
        stack: the module that holds the decoder, by its name in the model.
        head: the module that holds the head, by its name in the model.
        decoder: its parts. A layer is called with `(h, past_length, mask, [k, v, cross k, cross v], *shared)` and returns
            `(h, k, v)`; its `project_encoder` gives keys and values [B, KV, T, D] of the encoder's output.
        encoder_hidden, vocab, kv_heads, head_dim: sizes.
        source_positions, target_positions: the most tokens of the encoder and of the decoder.
        reads: the inputs of the encoder.
    """

    encoder: nn.Module
    encoder_root: str
    stack: Mapping[str, nn.Module]
    head: Mapping[str, nn.Module]
    decoder: DecoderParts
    encoder_hidden: int
    vocab: int
    kv_heads: int
    head_dim: int
    source_positions: int
    target_positions: int
    reads: EncoderInput = TEXT


class CrossKV(nn.Module):
    """Every decoder layer's keys and values of the encoder's output."""

    def __init__(self, model: EncoderDecoder) -> None:
        super().__init__()
        for name, module in model.stack.items():
            self.add_module(name, module)
        self.parts = model.decoder

    def forward(self, encoder_hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """encoder_hidden: [B, T, encoder_hidden]. Returns k and v [B, KV, T, D] of each layer."""
        layers: Any = self.parts.layers
        pairs = [layer.project_encoder(encoder_hidden) for layer in layers]
        return tuple(tensor for pair in pairs for tensor in pair)


class DecoderStep(nn.Module):
    """Prefill and decode step of the decoder, with its head."""

    def __init__(self, model: EncoderDecoder) -> None:
        super().__init__()
        for name, module in {**model.stack, **model.head}.items():
            self.add_module(name, module)
        self.parts = model.decoder

    def forward(
        self,
        input_ids: torch.Tensor,
        past_length: torch.Tensor,
        encoder_mask: torch.Tensor,
        logit_positions: torch.Tensor,
        states: list[Cache],
    ) -> tuple[Cache, ...]:
        """input_ids: int64 [B, S]; past_length: int64 [1]; encoder_mask: bool [B, T], true at real tokens; logit_positions:
        int64 [L]; states: k, v, cross k, cross v of each layer. Returns logits [B, L, vocab] and every new k and v."""
        parts = self.parts
        h = parts.embedded(input_ids, past_length)
        shared = parts.shared()
        mask = encoder_mask.unsqueeze(1).unsqueeze(1)
        updated: list[Cache] = []
        for i, layer in enumerate(parts.layers):
            h, k, v = layer(h, past_length, mask, states[4 * i : 4 * i + 4], *shared)
            updated += [k, v]
        return (parts.head(parts.norm(h.index_select(1, logit_positions))), *updated)


class Seq2seqModel(LanguageModel):
    """An encoder-decoder."""

    task = "seq2seq"

    @abstractmethod
    def encoder_decoder(self) -> EncoderDecoder:
        """What the graphs are built of."""

    def first_token(self, decoder: ConfigReader, default: int) -> int:
        """The token that the decoder starts from: `decoder_start_token_id`, else the `bos_token_id` of the decoder's keys."""
        start = self.section.token("decoder_start_token_id", decoder.token("bos_token_id", default))
        return default if start is None else start

    def graphs(self) -> list[Graph]:
        model = self.encoder_decoder()
        f32, i64 = torch.float32, torch.int64
        bounds, example = {"batch": (1, 1024)}, {"batch": 2}
        read = model.reads.source
        if isinstance(read, str):
            bounds |= {read: (model.reads.least, model.source_positions)}
            example |= {read: 5}
        target = dict.fromkeys(("sequence", "capacity", "logits"), (1, model.target_positions))
        hidden = Port("encoder_hidden", f32, ("batch", read, model.encoder_hidden))
        mask = replace(_MASK, shape=("batch", read))
        states = _states(model)
        return [
            Graph(
                name="encoder",
                module=model.encoder,
                inputs=model.reads.ports,
                outputs=(hidden,),
                example=example,
                bounds=bounds,
                root=model.encoder_root,
            ),
            Graph(
                name="cross_kv",
                module=CrossKV(model),
                inputs=(hidden,),
                outputs=tuple(Port(s.name, f32, s.shape) for s in states if s.kind == "cross"),
                example=example,
                bounds=bounds,
            ),
            Graph(
                name="decoder",
                module=DecoderStep(model),
                inputs=(
                    Port("input_ids", i64, ("batch", "sequence")),
                    Port("past_length", i64, (1,)),
                    mask,
                    Port("logit_positions", i64, ("logits",)),
                ),
                outputs=(Port("logits", f32, ("batch", "logits", model.vocab)),),
                states=tuple(states),
                example=example | {"sequence": 3, "capacity": 7, "logits": 2},
                bounds=bounds | target,
            ),
        ]


def _states(model: EncoderDecoder) -> list[State]:
    """Of each layer its own cache, then the keys and values that `cross_kv` fills."""
    shape = ("batch", model.kv_heads, model.reads.source, model.head_dim)
    states: list[State] = []
    for i in range(len(model.decoder.layers)):
        states += kv_states(i, model.kv_heads, model.head_dim)
        states += [State(f"cross_{n}_{i}", "cross", torch.float32, shape, updated=False) for n in ("k", "v")]
    return states
