"""ARC-Encoder (arXiv 2510.20535): an encoder turns a text into a fourth or an eighth as many embeddings of a decoder.

Both are Llama-shaped; the encoder has no causal mask and no last norm. In its last block the queries are means over groups of
`pooling_factor` tokens (the last group may be shorter), the keys and values are those of all tokens. A learned token follows,
and two linears without bias lead to the decoder's width. The graph `context` reads one text without padding.

Where the paper is open, the authors' code decides: the block's input is averaged before its norm and for the residual; the means
have the positions 0, 1, 2 …; the learned token (`cont_tok`) goes through the linears too. The release is no Hugging Face
directory, so the keys of config.json and the names of tensors are ours. The decoder's Llama keys are at the top, its tensors
named as in Llama. Further keys: `encoder_config` (Llama keys; `num_hidden_layers` counts the blocks that are kept),
`pooling_factor`, `bridge_hidden_size`, `context_window`, `prompt_prefix`. Further tensors: `encoder.*`, `bridge.*`,
`cont_tok.weight`. RoPE rotates the two halves of a head; the release's weights are for neighbours and have to be permuted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...graph import Graph, Port
from ..config import ConfigReader
from ..decoder import DecoderSpec, DecoderStack
from ..language_model import ContextLayout, shorten_stack
from ..layers.attention import BidirectionalAttention
from ..layers.linear import Embedding, Linear
from ..layers.mlp import GatedMLP
from ..layers.ops import EW
from ..reader import MemoryModel, MemoryStep, token_ids
from .llama import describe

WINDOW = 1024


class MemoryConfig:
    """The keys on the memory: how it is made and what stands before it in the prompt."""

    def __init__(self, section: ConfigReader, encoder: DecoderSpec, main: DecoderSpec) -> None:
        self.factor = section.integer("pooling_factor", 8, least=2, most=1024)
        self.bridge = section.integer("bridge_hidden_size", 2048)
        most = min(encoder.positions, main.positions)
        self.window = section.integer("context_window", min(WINDOW, most), least=2, most=most)
        self.rows = -(-self.window // self.factor) + 1
        value = section.values.get("prompt_prefix", [])
        prefix = token_ids(value, main.vocab)
        if prefix is None:
            raise section.error("prompt_prefix", value, f"a list of token ids below {main.vocab}")
        self.prefix = prefix


class EncoderLayer(nn.Module):
    """A Llama block without a causal mask."""

    def __init__(self, config: DecoderSpec, layer: int) -> None:
        super().__init__()
        self.self_attn = BidirectionalAttention(config.attention[layer])
        self.mlp = GatedMLP(config.hidden, config.intermediate, config.act, config.mlp_bias)
        self.input_layernorm = config.norm.of(config.hidden)
        self.post_attention_layernorm = config.norm.of(config.hidden)

    def forward(self, h: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = h + self.self_attn(self.input_layernorm(h), positions, mask)
        out: torch.Tensor = h + self.mlp(self.post_attention_layernorm(h))
        return out

    def pooled(self, h: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """The block on queries [B, M, hidden], with keys and values of h [B, T, hidden]. Returns [B, M, hidden]."""
        attention, spec = self.self_attn, self.self_attn.spec
        positions = torch.arange(h.shape[1], device=h.device)
        _, k, v = attention.project(self.input_layernorm(h), positions)
        q = attention.q_proj(self.input_layernorm(queries))
        q = q.reshape(*queries.shape[:2], spec.heads, spec.head_dim)
        q = EW.rope(q, torch.arange(queries.shape[1], device=h.device), attention.inv_freq)
        everything = (positions >= 0).expand(h.shape[0], 1, 1, -1)
        attended = EW.cross_attention(
            q, k.transpose(1, 2), v.transpose(1, 2), everything, spec.rotated_scale, spec.softcap
        )
        h = queries + attention.o_proj(attended)
        out: torch.Tensor = h + self.mlp(self.post_attention_layernorm(h))
        return out


def groups(tokens: int, factor: int, device: torch.device) -> torch.Tensor:
    """float32 [ceil(tokens / factor) + 1, tokens], 1 where a token belongs to a group; the last group has none.

    The empty group is the place of the learned token. With it there are never fewer than 2 groups, and torch.export does not
    specialise on 1.
    """
    at = torch.arange(tokens, device=device)
    starts = (torch.arange((tokens + 2 * factor - 1) // factor, device=device) * factor).unsqueeze(1)
    return torch.logical_and(at >= starts, at < starts + factor).to(torch.float32)


class Encoder(nn.Module):
    """The encoder; its last layer pools."""

    def __init__(self, config: DecoderSpec) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(EncoderLayer(config, i) for i in range(len(config.attention)))

    def forward(self, input_ids: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        """[B, M, hidden] of input_ids [B, T]; means [M, T] averages tokens into groups."""
        h = self.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        everything = (positions.unsqueeze(1) + positions.unsqueeze(0) >= 0).expand(h.shape[0], 1, -1, -1)
        *layers, last = self.layers
        for layer in layers:
            h = layer(h, positions, everything)
        pooling: Any = last
        out: torch.Tensor = pooling.pooled(h, torch.matmul(means, h))
        return out


class Bridge(nn.Module):
    """From the encoder's width to the decoder's."""

    def __init__(self, encoder_hidden: int, between: int, hidden: int) -> None:
        super().__init__()
        self.layer1 = Linear(encoder_hidden, between)
        self.layer2 = Linear(between, hidden)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer2(self.layer1(h))
        return out


class LearnedToken(nn.Module):
    """One row, weight [1, hidden]. It is no `Embedding`, so it is not quantized."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, hidden), requires_grad=False)


class ContextStep(nn.Module):
    """Rows of the decoder's embedding space for a text: one for each group of tokens, and that of the learned token."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.encoder, self.bridge, self.cont_tok = model.encoder, model.bridge, model.cont_tok
        self.factor = model.memory.factor

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        """input_ids: int64 [B, T], no padding. Returns ([B, ceil(T / factor) + 1, hidden],)."""
        belongs = groups(input_ids.shape[1], self.factor, input_ids.device)
        sizes = belongs.sum(-1, keepdim=True)
        h = self.encoder(input_ids, belongs / sizes.clamp(min=1.0))
        return (self.bridge(torch.where(sizes > 0, h, self.cont_tok.weight.to(h.dtype))),)


class Model(MemoryModel):
    """Encoder, bridge and decoder under the names that the module's docstring gives."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        section = self.section
        self.main = describe(section)
        self.source = describe(section.section("encoder_config"))
        self.memory = MemoryConfig(section, self.source, self.main)
        self.encoder = Encoder(self.source)
        self.cont_tok = LearnedToken(self.source.hidden)
        self.bridge = Bridge(self.source.hidden, self.memory.bridge, self.main.hidden)
        self.model = DecoderStack(self.main)
        self.lm_head = Linear(self.main.hidden, self.main.vocab)
        self.tied = self.tied_head(default=False)
        self.max_context = self.main.positions

    @property
    def rows(self) -> int:
        return self.memory.rows

    def context_spec(self) -> ContextLayout:
        return ContextLayout(window=self.memory.window, tokens=(), prefix=self.memory.prefix, splice="exact")

    @classmethod
    def shorten(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        return shorten_stack(config, layers) | {"encoder_config": shorten_stack(config["encoder_config"], layers)}

    def stacks(self) -> dict[str, nn.ModuleList]:
        return {"context": self.encoder.layers, "decoder": self.model.layers}

    def decoder_step(self) -> MemoryStep:
        return MemoryStep({"model": self.model, "lm_head": self.lm_head}, self.model.parts(self.lm_head))

    def context_graph(self) -> Graph:
        """The output's length, ceil(source / factor) + 1, follows from the input's."""
        source, memory = min(5, self.memory.window), self.memory
        return Graph(
            name="context",
            module=ContextStep(self),
            inputs=(Port("input_ids", torch.int64, ("batch", "source")),),
            outputs=(Port("memory", torch.float32, ("batch", "memory", self.main.hidden)),),
            example={"batch": 2, "source": source, "memory": -(-source // memory.factor) + 1},
            bounds={"batch": (1, 1024), "source": (1, memory.window), "memory": (2, memory.rows)},
        )
