"""Dolphin (arXiv 2408.15518): a small Qwen2 reads a long context into a few embeddings, a large one answers from them.

Two graphs. `context` reads context ids, then the memory tokens, in as many calls as one likes, and gives the hidden states
of the memory tokens as embeddings of the main decoder. `decoder` is prefill and decode step of the main decoder, whose
prompt holds slots for rows of that memory. A memory can be kept and asked again. What may enter: `ops`, the shared layers,
Qwen2's stack.

The release (NexaAIDev/Squid, `model_type` "dolphin") has the main decoder's keys at the top of config.json. Other keys:
`encoder_config` (Qwen2 keys of the context model), `num_memory_tokens`, `memory_token_ids`, `projector`, `splice`,
`prompt_prefix`, `context_window`; all but the first are ours, and their defaults are the release's. Names, projector and
splice follow the authors' code. Unverified, as its config.json and tokenizer could not be read: that the context model is
Qwen2-0.5B's published shape where `encoder_config` is absent, and that the memory tokens have the ids behind the 151,646 of
Qwen2's tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...graph import Graph, Port, State
from ..causal import CausalStep, kv_states
from ..config import ConfigReader
from ..layers.linear import Linear
from ..reader import MemoryStep, memory_graph
from .qwen2 import Stack, StackConfig, shorten_stack

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
WINDOWS = 8
"""The most memories that one prompt can hold, each of its own window of the context."""


class MemoryConfig:
    """How the context becomes a memory and where the memory goes in the prompt."""

    def __init__(self, section: ConfigReader, encoder: StackConfig, main: StackConfig) -> None:
        self.tokens = section.integer("num_memory_tokens", 32, least=2, most=1024)
        self.ids = _ids(section, "memory_token_ids", range(FIRST_MEMORY_ID, FIRST_MEMORY_ID + self.tokens), encoder)
        if len(self.ids) != self.tokens:
            raise section.error("memory_token_ids", f"{len(self.ids)} ids", f"{self.tokens}, as num_memory_tokens says")
        self.prefix = _ids(section, "prompt_prefix", (SPACE_ID,), main)
        self.splice = section.text("splice", "released")
        if self.splice not in ("released", "exact"):
            raise section.error("splice", self.splice, "'released' or 'exact'")
        if self.splice == "released" and not self.prefix:
            raise section.error("prompt_prefix", [], "at least one id, which the released splice overwrites")
        self.projector = section.text("projector", "linear")
        if self.projector not in ("linear", "mlp"):
            raise section.error("projector", self.projector, "'linear' or 'mlp'")
        room = encoder.max_positions - self.tokens
        if room < 1:
            raise section.error("num_memory_tokens", self.tokens, f"fewer than {encoder.max_positions} positions")
        self.window = section.integer("context_window", room, most=room)


def _ids(section: ConfigReader, key: str, default: Sequence[int], stack: StackConfig) -> tuple[int, ...]:
    """The list of token ids under `key`, each in the vocabulary of `stack`."""
    value = section.values.get(key)
    ids = list(default) if value is None else value
    whole = isinstance(ids, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
    if not whole or len(ids) > 1024 or not all(0 <= i < stack.vocab for i in ids):
        shown = "absent" if value is None else f"{value!r:.60}"
        raise section.error(key, shown, f"a list of at most 1024 token ids below {stack.vocab}")
    return tuple(ids)


class ContextModel(nn.Module):
    """A Qwen2 without a head."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.model = Stack(config)


class Projector(nn.Module):
    """From the context model's width to the main decoder's: one matrix, or Linear, exact GELU, Linear (the paper's MLP)."""

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
    def __init__(self, config: StackConfig, hidden: int, projector: str) -> None:
        super().__init__()
        self.encoder = ContextModel(config)
        self.projector = Projector(config.hidden, hidden, projector)


class Main(Stack):
    """The main decoder, which holds the context encoder as the checkpoint's names have it."""

    def __init__(self, config: StackConfig, encoder: StackConfig, projector: str) -> None:
        super().__init__(config)
        self.context_encoder = ContextEncoder(encoder, config.hidden, projector)


class Model(nn.Module):
    """A Dolphin checkpoint's modules, named as the checkpoint names them."""

    task = "memory"
    # The context model is used without its head; a checkpoint may hold it all the same.
    unused = ("model.context_encoder.encoder.lm_head.",)

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        section = ConfigReader(config, "")
        self.main = StackConfig(section)
        encoder = section.section("encoder_config") if _has_encoder(config) else ConfigReader(QWEN2_HALF_BILLION, "")
        self.encoder = StackConfig(encoder)
        self.memory = MemoryConfig(section, self.encoder, self.main)
        self.model = Main(self.main, self.encoder, self.memory.projector)
        self.lm_head = Linear(self.main.hidden, self.main.vocab)
        tied = section.boolean("tie_word_embeddings", False)
        self.tied = {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}
        self.decoder_start = None
        self.max_context = self.main.max_positions

    def context_spec(self) -> dict[str, Any]:
        """What the generate loop needs to know.

        window: context tokens a memory; tokens: the memory tokens' ids, put behind them; prefix: ids put before the slots
        of the prompt; splice: "exact" puts the memory into its slots, "released" one position earlier, over the prefix's
        last id, and leaves id 0 in the last slot, as the authors' code does.
        """
        m = self.memory
        return {"window": m.window, "tokens": m.ids, "prefix": m.prefix, "splice": m.splice}

    @staticmethod
    def shorten(config: dict[str, Any], layers: int) -> dict[str, Any]:
        """The config with at most `layers` layers in each stack (a rehearsal)."""
        encoder = config["encoder_config"] if _has_encoder(config) else QWEN2_HALF_BILLION
        return shorten_stack(config, layers) | {"encoder_config": shorten_stack(encoder, layers)}

    def stacks(self) -> dict[str, nn.ModuleList]:
        return {"context": self.model.context_encoder.encoder.model.layers, "decoder": self.model.layers}

    def graphs(self) -> list[Graph]:
        return [self._context_graph(), self._decoder_graph()]

    def _context_graph(self) -> Graph:
        f32, i64 = torch.float32, torch.int64
        encoder, stack = self.model.context_encoder, self.model.context_encoder.encoder.model
        most = self.memory.window + self.memory.tokens
        return Graph(
            name="context",
            module=CausalStep(encoder, stack.embed_tokens, stack.layers, stack.norm, encoder.projector),
            inputs=(
                Port("input_ids", i64, ("batch", "sequence")),
                Port("past_length", i64, (1,)),
                Port("logit_positions", i64, ("logits",)),
            ),
            outputs=(Port("memory", f32, ("batch", "logits", self.main.hidden)),),
            states=tuple(replace(s, name=f"context_{s.name}") for s in _caches(self.encoder)),
            example={"batch": 2, "sequence": 3, "capacity": 7, "logits": 2},
            bounds={
                "batch": (1, 1024),
                "sequence": (1, most),
                "capacity": (1, most),
                "logits": (1, self.memory.tokens),
            },
            root="model.context_encoder.",
        )

    def _decoder_graph(self) -> Graph:
        rows = WINDOWS * self.memory.tokens
        step = MemoryStep(self.model, self.lm_head)
        return memory_graph(step, _caches(self.main), self.main.hidden, self.main.vocab, self.main.max_positions, rows)


def _has_encoder(config: dict[str, Any]) -> bool:
    return config.get("encoder_config") is not None


def _caches(stack: StackConfig) -> list[State]:
    return [s for i in range(stack.layers) for s in kv_states(i, stack.kv_heads, stack.head_dim)]
