"""T5Gemma: two Gemma 2 stacks, encoder and decoder (arXiv 2504.06225). What may enter: `ops`, the shared layers.

Three graphs: `encoder` (once per prompt), `cross_kv` (the encoder output projected to every decoder layer's keys and
values, once per prompt), and `decoder`, which is prefill and decode step alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...graph import Graph, Port, State
from ..config import ConfigReader
from ..kv_cache import Cache
from ..layers.activations import softcap
from ..layers.attention import AttentionSpec, BidirectionalAttention, CachedAttention, CrossAttention
from ..layers.linear import Embedding, Linear
from ..layers.mlp import GatedMLP
from ..layers.norm import RMSNorm


class StackConfig:
    """One stack's section of config.json."""

    def __init__(self, section: ConfigReader) -> None:
        self.vocab = section.integer("vocab_size")
        self.hidden = section.integer("hidden_size")
        self.intermediate = section.integer("intermediate_size")
        self.layers = section.integer("num_hidden_layers", most=1024)
        self.heads = section.integer("num_attention_heads", most=4096)
        self.kv_heads = section.integer("num_key_value_heads", self.heads, most=4096)
        self.head_dim = section.head_dim(256)
        self.eps = section.number("rms_norm_eps", 1e-6)
        self.act = section.text("hidden_activation", "gelu_pytorch_tanh")
        self.scale = section.number("query_pre_attn_scalar", 256.0, least=1e-6) ** -0.5
        self.attention_softcap = section.number("attn_logit_softcapping", 0.0) if _set(section, "attn") else 0.0
        self.final_softcap = section.number("final_logit_softcapping", 0.0) if _set(section, "final") else 0.0
        self.layer_types = section.layer_types(self.layers, pattern=2)
        self.window = section.window(self.layer_types)
        self.theta, self.rope_factor = section.rope(10000.0)
        self.bias = section.boolean("attention_bias", False)
        self.max_positions = section.integer("max_position_embeddings", 8192)
        if self.heads % self.kv_heads:
            raise section.error("num_key_value_heads", self.kv_heads, f"a divisor of {self.heads} heads")

    def norm(self) -> RMSNorm:
        return RMSNorm(self.hidden, self.eps, offset=1.0)

    def attention(self, layer: int) -> AttentionSpec:
        return AttentionSpec(
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            scale=self.scale,
            theta=self.theta,
            rope_factor=self.rope_factor,
            softcap=self.attention_softcap,
            window=self.window if self.layer_types[layer] == "sliding_attention" else 0,
            bias=self.bias,
            out_bias=self.bias,
        )


def _set(section: ConfigReader, which: str) -> bool:
    return section.values.get(f"{which}_logit_softcapping") is not None


class EncoderLayer(nn.Module):
    def __init__(self, config: StackConfig, layer: int) -> None:
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


class DecoderLayer(nn.Module):
    def __init__(self, config: StackConfig, layer: int, encoder_hidden: int) -> None:
        super().__init__()
        spec = config.attention(layer)
        self.self_attn = CachedAttention(spec)
        self.cross_attn = CrossAttention(spec, encoder_hidden)
        self.mlp = GatedMLP(config.hidden, config.intermediate, config.act)
        self.pre_self_attn_layernorm = config.norm()
        self.post_self_attn_layernorm = config.norm()
        self.pre_cross_attn_layernorm = config.norm()
        self.post_cross_attn_layernorm = config.norm()
        self.pre_feedforward_layernorm = config.norm()
        self.post_feedforward_layernorm = config.norm()

    def forward(
        self, h: torch.Tensor, past_length: torch.Tensor, encoder_mask: torch.Tensor, states: list[Cache]
    ) -> tuple[torch.Tensor, Cache, Cache]:
        k_cache, v_cache, cross_k, cross_v = states
        attended, k_out, v_out = self.self_attn(self.pre_self_attn_layernorm(h), past_length, k_cache, v_cache)
        h = h + self.post_self_attn_layernorm(attended)
        crossed = self.cross_attn(self.pre_cross_attn_layernorm(h), cross_k, cross_v, encoder_mask)
        h = h + self.post_cross_attn_layernorm(crossed)
        return h + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(h))), k_out, v_out


class Encoder(nn.Module):
    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(EncoderLayer(config, i) for i in range(config.layers))
        self.norm = config.norm()

    def forward(self, input_ids: torch.Tensor, encoder_mask: torch.Tensor) -> tuple[torch.Tensor]:
        """input_ids: int64 [B, T]; encoder_mask: bool [B, T], true at real tokens. Returns ([B, T, hidden],)."""
        h = self.embed_tokens(input_ids) * self.config.hidden**0.5
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        distance = (positions.unsqueeze(1) - positions.unsqueeze(0)).abs()
        padding = encoder_mask.unsqueeze(1).unsqueeze(1)
        full = torch.logical_and(padding, (distance >= 0).unsqueeze(0).unsqueeze(0))
        # Inclusive on both sides, as transformers computes it (the paper's window is exclusive).
        sliding = torch.logical_and(padding, (distance <= self.config.window).unsqueeze(0).unsqueeze(0))
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            h = layer(h, positions, sliding if kind == "sliding_attention" else full)
        return (self.norm(h),)


class Decoder(nn.Module):
    def __init__(self, config: StackConfig, encoder_hidden: int) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(DecoderLayer(config, i, encoder_hidden) for i in range(config.layers))
        self.norm = config.norm()


class Stacks(nn.Module):
    def __init__(self, encoder: StackConfig, decoder: StackConfig) -> None:
        super().__init__()
        self.encoder = Encoder(encoder)
        self.decoder = Decoder(decoder, encoder.hidden)


class Head(nn.Module):
    def __init__(self, hidden: int, vocab: int) -> None:
        super().__init__()
        self.out_proj = Linear(hidden, vocab)


class CrossKV(nn.Module):
    """Every decoder layer's cross-attention keys and values from the encoder output."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model.model

    def forward(self, encoder_hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        layers: Any = self.model.decoder.layers
        pairs = [layer.cross_attn.project_encoder(encoder_hidden) for layer in layers]
        return tuple(tensor for pair in pairs for tensor in pair)


class DecoderStep(nn.Module):
    """Prefill and decode step of the decoder with its head."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model, self.lm_head = model.model, model.lm_head
        self.cap = model.decoder_config.final_softcap

    def forward(
        self,
        input_ids: torch.Tensor,
        past_length: torch.Tensor,
        encoder_mask: torch.Tensor,
        logit_positions: torch.Tensor,
        states: list[Cache],
    ) -> tuple[Cache, ...]:
        decoder = self.model.decoder
        h = decoder.embed_tokens(input_ids) * decoder.config.hidden**0.5
        mask = encoder_mask.unsqueeze(1).unsqueeze(1)
        updated: list[Cache] = []
        for i, layer in enumerate(decoder.layers):
            h, k, v = layer(h, past_length, mask, states[4 * i : 4 * i + 4])
            updated += [k, v]
        h = decoder.norm(h.index_select(1, logit_positions))
        return (softcap(self.lm_head.out_proj(h), self.cap), *updated)


class Model(nn.Module):
    """A T5Gemma checkpoint's modules, named as the checkpoint names them."""

    task = "seq2seq"

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        section = ConfigReader(config, "")
        self.encoder_config = StackConfig(section.section("encoder"))
        self.decoder_config = StackConfig(section.section("decoder"))
        self.model = Stacks(self.encoder_config, self.decoder_config)
        self.lm_head = Head(self.decoder_config.hidden, self.decoder_config.vocab)
        tied = section.boolean("tie_word_embeddings", True)
        self.tied = {"lm_head.out_proj.weight": "model.decoder.embed_tokens.weight"} if tied else {}
        start = section.token("decoder_start_token_id", section.section("decoder").token("bos_token_id", 2))
        self.decoder_start = 2 if start is None else start
        # One bound for prompt and answer: the smaller of what the two stacks were made for.
        self.max_context = min(self.encoder_config.max_positions, self.decoder_config.max_positions)

    @staticmethod
    def shorten(config: dict[str, Any], layers: int) -> dict[str, Any]:
        """The config with at most `layers` layers in each stack (a rehearsal)."""
        short = dict(config)
        for name in ("encoder", "decoder"):
            stack = dict(config[name])
            stack["num_hidden_layers"] = min(layers, stack["num_hidden_layers"])
            if stack.get("layer_types"):
                stack["layer_types"] = stack["layer_types"][: stack["num_hidden_layers"]]
            short[name] = stack
        return short

    def stacks(self) -> dict[str, nn.ModuleList]:
        return {"encoder": self.model.encoder.layers, "decoder": self.model.decoder.layers}

    def graphs(self) -> list[Graph]:
        enc, dec = self.encoder_config, self.decoder_config
        f32, i64 = torch.float32, torch.int64
        source = {"batch": (1, 1024), "source": (1, enc.max_positions)}
        hidden = Port("encoder_hidden", f32, ("batch", "source", enc.hidden))
        mask = Port("encoder_mask", torch.bool, ("batch", "source"))
        kv_shape = ("batch", dec.kv_heads, "capacity", dec.head_dim)
        cross_shape = ("batch", dec.kv_heads, "source", dec.head_dim)
        states: list[State] = []
        for i in range(dec.layers):
            states += [State(f"{n}_cache_{i}", "kv", f32, kv_shape, updated=True) for n in ("k", "v")]
            states += [State(f"cross_{n}_{i}", "cross", f32, cross_shape, updated=False) for n in ("k", "v")]
        return [
            Graph(
                name="encoder",
                module=self.model.encoder,
                inputs=(Port("input_ids", i64, ("batch", "source")), mask),
                outputs=(hidden,),
                example={"batch": 2, "source": 5},
                bounds=source,
                root="model.encoder.",
            ),
            Graph(
                name="cross_kv",
                module=CrossKV(self),
                inputs=(hidden,),
                outputs=tuple(Port(s.name, f32, s.shape) for s in states if s.kind == "cross"),
                example={"batch": 2, "source": 5},
                bounds=source,
            ),
            Graph(
                name="decoder",
                module=DecoderStep(self),
                inputs=(
                    Port("input_ids", i64, ("batch", "sequence")),
                    Port("past_length", i64, (1,)),
                    mask,
                    Port("logit_positions", i64, ("logits",)),
                ),
                outputs=(Port("logits", f32, ("batch", "logits", dec.vocab)),),
                states=tuple(states),
                example={"batch": 2, "source": 5, "sequence": 3, "capacity": 7, "logits": 2},
                bounds=source
                | {
                    "sequence": (1, dec.max_positions),
                    "capacity": (1, dec.max_positions),
                    "logits": (1, dec.max_positions),
                },
            ),
        ]
