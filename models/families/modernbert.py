"""ModernBERT (arXiv 2412.13663), the encoder of the Ettin pairs (arXiv 2507.11412), with its masked-language-model head.

It has no generate loop: its one graph, `encoder`, is run as it is; where a text is to become one vector, `models.embedding` has the
same layers without the head. Layers alternate between full attention and a window of
`local_attention` tokens, and each kind has its own RoPE base. Query, key and value are one matrix, and so are the two halves
of the gated feed-forward. `modernbert_decoder` is the causal twin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...graph import Graph, Port
from ..config import ConfigReader
from ..language_model import LanguageModel, TextEncoder, TextStack
from ..layers.activations import activation
from ..layers.block import Block
from ..layers.linear import Embedding, Linear
from ..layers.norm import LayerNorm
from ..layers.ops import EW
from ..rope import read_rope

KINDS = ("full_attention", "sliding_attention")
TABLE = "model.embeddings.tok_embeddings.weight"


class Config:
    """The keys of config.json for a stack, of the encoder or of its causal twin."""

    def __init__(self, values: dict[str, Any]) -> None:
        section = ConfigReader(values, "")
        self.vocab = section.integer("vocab_size")
        self.hidden = section.integer("hidden_size")
        self.intermediate = section.integer("intermediate_size")
        self.layers = section.integer("num_hidden_layers", most=1024)
        self.heads = section.integer("num_attention_heads", most=4096)
        self.head_dim = self.hidden // self.heads
        if self.hidden % self.heads or self.head_dim % 8 or self.head_dim > 4096:
            want = f"{self.hidden} / heads to be a multiple of 8 up to 4096"
            raise section.error("num_attention_heads", self.heads, want)
        self.eps = section.number("norm_eps", 1e-5)
        self.norm_bias = section.boolean("norm_bias", False)
        self.attention_bias = section.boolean("attention_bias", False)
        self.mlp_bias = section.boolean("mlp_bias", False)
        self.head_bias = section.boolean("classifier_bias", False)
        self.decoder_bias = section.boolean("decoder_bias", True)
        self.act = activation(section.text("hidden_activation", "gelu"))
        self.head_act = activation(section.text("classifier_activation", "gelu"))
        self.max_positions = section.integer("max_position_embeddings", 8192)
        self.layer_types = _layer_types(section, self.layers)
        # Half of `local_attention`: the tokens that the encoder sees on each side, and the decoder in all.
        if values.get("local_attention", 128) is None:
            raise section.error("local_attention", None, "an integer of at least 2")
        self.half_window = section.integer("local_attention", 128, least=2) // 2
        if values.get("rope_scaling") is not None:
            raise section.error("rope_scaling", values["rope_scaling"], "nothing")
        older = {"rope_theta": values.get("global_rope_theta"), "rope_local_base_freq": values.get("local_rope_theta")}
        keys = ConfigReader(values | older, "")
        self.ropes = {
            kind: read_rope(keys, base, kind) for kind, base in zip(KINDS, (160_000.0, 10_000.0), strict=True)
        }
        for rope in self.ropes.values():
            if rope.kind not in ("default", "linear"):
                raise section.error("rope_parameters.rope_type", rope.kind, "'default' or 'linear'")

    def norm(self) -> LayerNorm:
        return LayerNorm(self.hidden, self.eps, self.norm_bias)

    def frequencies(self, kind: str) -> torch.Tensor:
        return self.ropes[kind].frequencies(self.head_dim)


def _layer_types(section: ConfigReader, layers: int) -> list[str]:
    """`layer_types`; if absent, the first layer and every n-th after it are full, the others slide."""
    every = section.integer("global_attn_every_n_layers", 3, most=1024)
    return section.kinds(layers, KINDS, ["sliding_attention" if i % every else "full_attention" for i in range(layers)])


class Embeddings(nn.Module):
    """The embedding and a norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.tok_embeddings = Embedding(config.vocab, config.hidden)
        self.norm = config.norm()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(self.tok_embeddings(input_ids))
        return out


class GatedFeedForward(nn.Module):
    """`Wo(act(a) * b)`, a and b the halves of `Wi(x)`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.Wi = Linear(config.hidden, 2 * config.intermediate, config.mlp_bias)
        self.Wo = Linear(config.intermediate, config.hidden, config.mlp_bias)
        self.act = config.act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = self.Wi(x)
        half = both.shape[-1] // 2
        out: torch.Tensor = self.Wo(self.act(both[..., :half]) * both[..., half:])
        return out


class PredictionHead(nn.Module):
    """Linear, activation and norm before the matrix to the vocabulary."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dense = Linear(config.hidden, config.hidden, config.head_bias)
        self.norm = config.norm()
        self.act = config.head_act

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(self.act(self.dense(h)))
        return out


class Attention(Block):
    """Bidirectional self-attention, its three projections in one matrix."""

    inv_freq: torch.Tensor

    def __init__(self, config: Config, kind: str) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        self.Wqkv = Linear(config.hidden, 3 * config.hidden, config.attention_bias)
        self.Wo = Linear(config.hidden, config.hidden, config.attention_bias)
        self.register_buffer("inv_freq", config.frequencies(kind), persistent=False)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        packed, size = self.Wqkv(x), self.heads * self.head_dim
        parts = (packed[..., i * size : (i + 1) * size] for i in range(3))
        q, k, v = (part.reshape(*x.shape[:2], self.heads, self.head_dim) for part in parts)
        q, k = EW.rope(q, positions, self.inv_freq), EW.rope(k, positions, self.inv_freq)
        out: torch.Tensor = self.Wo(EW.bidirectional_attention(q, k, v, mask, self.head_dim**-0.5, 0.0))
        return out


class Layer(nn.Module):
    """Attention and gated feed-forward, each behind a norm."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        # The embedding is normalised.
        self.attn_norm: nn.Module = config.norm() if index else nn.Identity()
        self.attn = Attention(config, config.layer_types[index])
        self.mlp_norm = config.norm()
        self.mlp = GatedFeedForward(config)

    def forward(self, h: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = h + self.attn(self.attn_norm(h), positions, mask)
        out: torch.Tensor = h + self.mlp(self.mlp_norm(h))
        return out


class Stack(nn.Module):
    """Embedding, layers and last norm."""

    def __init__(self, config: Config, layer: Callable[[Config, int], nn.Module]) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(layer(config, i) for i in range(config.layers))
        self.final_norm = config.norm()


class EncoderStack(Stack, TextStack):
    """A stack of bidirectional layers."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, Layer)
        self.layer_types, self.half_window = config.layer_types, config.half_window

    def hidden_states(self, input_ids: torch.Tensor, encoder_mask: torch.Tensor) -> torch.Tensor:
        h = self.embeddings(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        distance = (positions.unsqueeze(1) - positions.unsqueeze(0)).abs()
        padding = encoder_mask.unsqueeze(1).unsqueeze(1)
        full = torch.logical_and(padding, (distance >= 0).unsqueeze(0).unsqueeze(0))
        near = (distance <= self.half_window).unsqueeze(0).unsqueeze(0)
        sliding = torch.logical_and(padding, near)
        for layer, kind in zip(self.layers, self.layer_types, strict=True):
            h = layer(h, positions, sliding if kind == "sliding_attention" else full)
        out: torch.Tensor = self.final_norm(h)
        return out


class MaskedStep(nn.Module):
    """The encoder: logits of every position, and the hidden states that they come from."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.whole = model

    def forward(self, input_ids: torch.Tensor, encoder_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids: int64 [B, T]; encoder_mask: bool [B, T], true at real tokens. Returns [B, T, vocab], [B, T, hidden]."""
        h = self.whole.model.hidden_states(input_ids, encoder_mask)
        return self.whole.decoder(self.whole.head(h)), h


class Model(LanguageModel):
    """A ModernBERT masked language model's modules, named as the checkpoint names them."""

    task = "module"

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.config = Config(config)
        self.model = EncoderStack(self.config)
        self.head = PredictionHead(self.config)
        self.decoder = Linear(self.config.hidden, self.config.vocab, self.config.decoder_bias)
        self.tied = self.tied_head(True, "decoder.weight", TABLE)
        self.max_context = self.config.max_positions

    @classmethod
    def own_pooling(cls, config: dict[str, Any]) -> str | None:
        """The pooling that config.json has for classifiers, else the mean, of a file without the head for tokens."""
        section = ConfigReader(config, "")
        pooling = section.text("classifier_pooling", "mean")
        if pooling not in ("cls", "mean"):
            raise section.error("classifier_pooling", pooling, "'cls' or 'mean'")
        return pooling if config.get("architectures") == ["ModernBertModel"] else None

    def text_encoder(self) -> TextEncoder:
        c = self.config
        return TextEncoder(EncoderStack(c), c.hidden, c.vocab, c.max_positions, self.names)

    def stacks(self) -> dict[str, nn.ModuleList]:
        return {"encoder": self.model.layers}

    def graphs(self) -> list[Graph]:
        c = self.config
        return [
            Graph(
                name="encoder",
                module=MaskedStep(self),
                inputs=(
                    Port("input_ids", torch.int64, ("batch", "source")),
                    Port("encoder_mask", torch.bool, ("batch", "source")),
                ),
                outputs=(
                    Port("logits", torch.float32, ("batch", "source", c.vocab)),
                    Port("hidden", torch.float32, ("batch", "source", c.hidden)),
                ),
                example={"batch": 2, "source": 5},
                bounds={"batch": (1, 1024), "source": (1, c.max_positions)},
            )
        ]
