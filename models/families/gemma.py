"""What the Gemma families share: keys of config.json, a stack, and the encoder of T5Gemma and T5Gemma 2."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..causal import DecoderParts
from ..config import ConfigReader, StackKeys
from ..layers.activations import softcap
from ..layers.attention import AttentionSpec, BidirectionalAttention
from ..layers.linear import Embedding, Linear
from ..layers.mlp import GatedMLP
from ..layers.norm import RMSNorm
from ..rope import Rope, read_rope
from ..seq2seq import EncoderDecoder, Seq2seqModel

FULL, SLIDING = "full_attention", "sliding_attention"


class GemmaConfig(StackKeys):
    """One stack's section of config.json.

    pattern: every how many layers one is full, where `layer_types` is absent. Heirs set `ropes` (of both kinds of layers),
    `softcap` (of attention, 0 without) and `norm_eps` (of the QK-norm, None without).
    """

    ropes: Mapping[str, Rope]
    softcap: float = 0.0
    norm_eps: float | None = None

    def __init__(self, section: ConfigReader, positions: int, pattern: int) -> None:
        super().__init__(section, positions, head_dim=256)
        self.act = section.text("hidden_activation", "gelu_pytorch_tanh")
        self.scale = section.number("query_pre_attn_scalar", 256.0, least=1e-6) ** -0.5
        self.final_softcap = optional_number(section, "final_logit_softcapping")
        self.layer_types = section.layer_types(self.layers, pattern)
        self.window = section.window(self.layer_types)
        self.bias = section.boolean("attention_bias", False)

    def norm(self) -> RMSNorm:
        return RMSNorm(self.hidden, self.eps, offset=1.0)

    def attention(self, layer: int) -> AttentionSpec:
        kind = self.layer_types[layer]
        return AttentionSpec(
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            scale=self.scale,
            rope=self.ropes[kind],
            softcap=self.softcap,
            window=self.window if kind == SLIDING else 0,
            bias=self.bias,
            out_bias=self.bias,
            norm_eps=self.norm_eps,
        )


class Gemma2Config(GemmaConfig):
    """A stack of Gemma 2's layers."""

    def __init__(self, section: ConfigReader) -> None:
        super().__init__(section, positions=8192, pattern=2)
        self.softcap = optional_number(section, "attn_logit_softcapping", 50.0)
        self.final_softcap = optional_number(section, "final_logit_softcapping", 30.0)
        self.ropes = dict.fromkeys((FULL, SLIDING), read_rope(section, 10000.0))


class Gemma3Config(GemmaConfig):
    """A stack of Gemma 3's layers. family: its name in errors."""

    def __init__(self, section: ConfigReader, positions: int, family: str) -> None:
        super().__init__(section, positions, section.integer("sliding_window_pattern", 6))
        cap = section.values.get("attn_logit_softcapping")
        if cap is not None:
            # transformers reads the key and does not use it; a checkpoint that sets it is not one we know.
            raise section.error("attn_logit_softcapping", cap, f"nothing: {family} has no attention soft-capping")
        self.ropes = {kind: read_rope(section, base, kind) for kind, base in ((FULL, 1e6), (SLIDING, 1e4))}
        self.norm_eps = self.eps


def optional_number(section: ConfigReader, key: str, default: float = 0.0) -> float:
    """The number under `key`; 0 where it is null, `default` where it is absent."""
    if key not in section.values:
        return default
    return 0.0 if section.values[key] is None else section.number(key)


class EncoderLayer(nn.Module):
    """Bidirectional attention and gated MLP, each between two norms."""

    def __init__(self, config: GemmaConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = BidirectionalAttention(config.attention(layer))
        self.mlp = GatedMLP(config.hidden, config.intermediate, config.act)
        self.pre_self_attn_layernorm = config.norm()
        self.post_self_attn_layernorm = config.norm()
        self.pre_feedforward_layernorm = config.norm()
        self.post_feedforward_layernorm = config.norm()

    def forward(self, h: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = h + self.post_self_attn_layernorm(self.self_attn(self.pre_self_attn_layernorm(h), positions, mask))
        out: torch.Tensor = h + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(h)))
        return out


class GemmaStack(nn.Module):
    """Embedding, layers and last norm."""

    def __init__(self, config: GemmaConfig, embed_tokens: Embedding, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = embed_tokens
        self.layers = nn.ModuleList(layers)
        self.norm = config.norm()

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, S, hidden] of input_ids [B, S]: rows times sqrt(hidden)."""
        out: torch.Tensor = self.embed_tokens(input_ids) * self.config.hidden**0.5
        return out


class GemmaEncoder(GemmaStack, ABC):
    """The graph `encoder` of an encoder-decoder; heirs say what a sliding layer sees."""

    @abstractmethod
    def masks(self, positions: torch.Tensor, encoder_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What full and what sliding layers see, each bool [B, 1, T, T], of positions [T] and encoder_mask [B, T]."""

    def forward(self, input_ids: torch.Tensor, encoder_mask: torch.Tensor) -> tuple[torch.Tensor]:
        """input_ids: int64 [B, T]; encoder_mask: bool [B, T], true at real tokens. Returns ([B, T, hidden],)."""
        h = self.embed(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        full, sliding = self.masks(positions, encoder_mask)
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            h = layer(h, positions, sliding if kind == SLIDING else full)
        return (self.norm(h),)


class Head(nn.Module):
    """The head of an encoder-decoder, under its name in the checkpoint."""

    def __init__(self, hidden: int, vocab: int) -> None:
        super().__init__()
        self.out_proj = Linear(hidden, vocab)


class GemmaSeq2seq(Seq2seqModel):
    """An encoder-decoder of Gemma stacks. Heirs set `encoder_config`, `decoder_config`, `model` and `lm_head`."""

    encoder_config: GemmaConfig
    decoder_config: GemmaConfig
    model: nn.Module
    lm_head: Head

    @property
    @abstractmethod
    def encoder(self) -> GemmaEncoder:
        """The encoder's stack."""

    @property
    @abstractmethod
    def decoder(self) -> GemmaStack:
        """The decoder's stack."""

    def head(self, h: torch.Tensor) -> torch.Tensor:
        """Logits of the last hidden states h [B, L, hidden]."""
        return softcap(self.lm_head.out_proj(h), self.decoder_config.final_softcap)

    def stacks(self) -> dict[str, nn.ModuleList]:
        return {"encoder": self.encoder.layers, "decoder": self.decoder.layers}

    def encoder_decoder(self) -> EncoderDecoder:
        decoder, config = self.decoder, self.decoder_config
        return EncoderDecoder(
            encoder=self.encoder,
            encoder_root=next(f"{path}." for path, module in self.named_modules() if module is self.encoder),
            stack={"model": self.model},
            head={"lm_head": self.lm_head},
            decoder=DecoderParts(decoder.embed, decoder.layers, decoder.norm, self.head),
            encoder_hidden=self.encoder_config.hidden,
            vocab=config.vocab,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            source_positions=self.encoder_config.max_positions,
            target_positions=config.max_positions,
        )
