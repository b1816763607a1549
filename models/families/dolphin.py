"""Dolphin (arXiv 2408.15518): a small Qwen2 reads a long context into a few embeddings, which a large one reads.

The graph `context` reads context ids, then the memory tokens, in one or more calls. The hidden states of the memory tokens,
projected, are the memory.

The release (NexaAIDev/Squid, `model_type` "dolphin") has the main decoder's keys at the top of config.json. Other keys:
`encoder_config` (Qwen2 keys of the context model), `num_memory_tokens`, `memory_token_ids`, `projector`, `splice`,
`prompt_prefix`, `context_window`. All but the first are ours, with the release's values as defaults. Names, projector and splice
follow the authors' code. Two defaults are unverified, as the release's config.json and tokenizer could not be read: the shape of
Qwen2-0.5B where `encoder_config` is absent, and the ids of the memory tokens behind the 151,646 of Qwen2's tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from ...checkpoints.names import Names
from ...graph import Graph, Port
from ..causal import CausalStep
from ..config import ConfigReader
from ..decoder import DecoderSpec, DecoderStack
from ..language_model import ContextLayout, shorten_stack
from ..layers.linear import Linear
from ..reader import MemoryModel, MemoryStep, cache_states, token_ids
from .qwen2 import describe

QWEN2_HALF_BILLION: dict[str, Any] = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 131072,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "vocab_size": 151936,
}
FIRST_MEMORY_ID = 151646
SPACE_ID = 220  # Qwen2's token of " "


class MemoryConfig:
    """The keys on the memory: how it is made and where it goes in the prompt."""

    def __init__(self, section: ConfigReader, encoder: DecoderSpec, main: DecoderSpec) -> None:
        self.tokens = section.integer("num_memory_tokens", 32, least=2, most=1024)
        self.ids = _ids(section, "memory_token_ids", range(FIRST_MEMORY_ID, FIRST_MEMORY_ID + self.tokens), encoder)
        if len(self.ids) != self.tokens:
            raise section.error("memory_token_ids", f"{len(self.ids)} ids", f"{self.tokens}, as num_memory_tokens says")
        self.prefix = _ids(section, "prompt_prefix", (SPACE_ID,), main)
        splice = section.text("splice", "released")
        if splice not in ("released", "exact"):
            raise section.error("splice", splice, "'released' or 'exact'")
        self.splice: Literal["released", "exact"] = "released" if splice == "released" else "exact"
        if self.splice == "released" and not self.prefix:
            raise section.error("prompt_prefix", [], "at least one id, which the released splice overwrites")
        self.projector = section.text("projector", "linear")
        if self.projector not in ("linear", "mlp"):
            raise section.error("projector", self.projector, "'linear' or 'mlp'")
        room = encoder.positions - self.tokens
        if room < 1:
            raise section.error("num_memory_tokens", self.tokens, f"fewer than {encoder.positions} positions")
        self.window = section.integer("context_window", room, most=room)


def _ids(section: ConfigReader, key: str, default: Sequence[int], stack: DecoderSpec) -> tuple[int, ...]:
    """The token ids under `key`, each in the vocabulary of `stack`."""
    value = section.values.get(key)
    ids = token_ids(list(default) if value is None else value, stack.vocab)
    if ids is None:
        raise section.error(
            key, "absent" if value is None else value, f"a list of at most 1024 token ids below {stack.vocab}"
        )
    return ids


class ContextModel(nn.Module):
    """A Qwen2 without a head."""

    def __init__(self, config: DecoderSpec) -> None:
        super().__init__()
        self.model = DecoderStack(config)


class Projector(nn.Module):
    """From the context model's width to the main decoder's: one matrix, or the paper's MLP of Linear, exact GELU, Linear."""

    def __init__(self, context_hidden: int, hidden: int, kind: str) -> None:
        super().__init__()
        first = Linear(context_hidden, hidden, bias=True)
        self.context_projection: nn.Module = first
        if kind == "mlp":
            self.context_projection = nn.ModuleDict({"0": first, "2": Linear(hidden, hidden, bias=True)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projection = self.context_projection
        if isinstance(projection, nn.ModuleDict):
            h = projection["0"](x)
            projection, x = projection["2"], 0.5 * h * (1.0 + torch.erf(h * 0.5**0.5))
        out: torch.Tensor = projection(x)
        return out


class ContextEncoder(nn.Module):
    """Context model and projector."""

    def __init__(self, config: DecoderSpec, hidden: int, projector: str) -> None:
        super().__init__()
        self.encoder = ContextModel(config)
        self.projector = Projector(config.hidden, hidden, projector)


class Main(DecoderStack):
    """The main decoder. By the checkpoint's names it holds the context encoder."""

    def __init__(self, config: DecoderSpec, encoder: DecoderSpec, projector: str) -> None:
        super().__init__(config)
        self.context_encoder = ContextEncoder(encoder, config.hidden, projector)


class Model(MemoryModel):
    """A Dolphin checkpoint's modules, named as the checkpoint names them."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        section = self.section
        self.main = describe(section)
        encoder = section.section("encoder_config") if _has_encoder(config) else ConfigReader(QWEN2_HALF_BILLION, "")
        self.encoder = describe(encoder)
        self.memory = MemoryConfig(section, self.encoder, self.main)
        self.model = Main(self.main, self.encoder, self.memory.projector)
        self.lm_head = Linear(self.main.hidden, self.main.vocab)
        self.tied = self.tied_head(default=False)
        self.max_context = self.main.positions

    @property
    def names(self) -> Names:
        """A checkpoint may hold the head of the context model, which nothing uses."""
        return Names(ignored=("model.context_encoder.encoder.lm_head.*",))

    @property
    def rows(self) -> int:
        return self.memory.tokens

    def context_spec(self) -> ContextLayout:
        m = self.memory
        return ContextLayout(window=m.window, tokens=m.ids, prefix=m.prefix, splice=m.splice)

    @classmethod
    def shorten(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        encoder = config["encoder_config"] if _has_encoder(config) else QWEN2_HALF_BILLION
        return shorten_stack(config, layers) | {"encoder_config": shorten_stack(encoder, layers)}

    def stacks(self) -> dict[str, nn.ModuleList]:
        return {"context": self.model.context_encoder.encoder.model.layers, "decoder": self.model.layers}

    def decoder_step(self) -> MemoryStep:
        return MemoryStep({"model": self.model, "lm_head": self.lm_head}, self.model.parts(self.lm_head))

    def context_graph(self) -> Graph:
        f32, i64 = torch.float32, torch.int64
        encoder, most = self.model.context_encoder, self.memory.window + self.memory.tokens
        parts = encoder.encoder.model.parts(encoder.projector)
        return Graph(
            name="context",
            module=CausalStep({"whole": encoder}, parts, [2] * len(self.encoder.attention)),
            inputs=(
                Port("input_ids", i64, ("batch", "sequence")),
                Port("past_length", i64, (1,)),
                Port("logit_positions", i64, ("logits",)),
            ),
            outputs=(Port("memory", f32, ("batch", "logits", self.main.hidden)),),
            states=tuple(replace(s, name=f"context_{s.name}") for s in cache_states(self.encoder)),
            example={"batch": 2, "sequence": 3, "capacity": 7, "logits": 2},
            bounds={
                "batch": (1, 1024),
                "sequence": (1, most),
                "capacity": (1, most),
                "logits": (1, self.memory.tokens),
            },
            root="model.context_encoder.",
        )


def _has_encoder(config: dict[str, Any]) -> bool:
    return config.get("encoder_config") is not None
