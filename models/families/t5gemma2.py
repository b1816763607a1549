"""T5Gemma 2 (arXiv 2512.14856), its text path: two Gemma 3 stacks, self- and cross-attention merged in the decoder.

What may enter: `ops`, the shared layers. One set of projections serves the decoder's own tokens and the encoder's: its query
sees both under one softmax, the encoder's keys without RoPE. One embedding serves encoder, decoder and head; the token
that ends an image has its own row, which is not scaled. The vision tower is left out (`Model.unused`).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from ...errors import UserError
from ...graph import Graph, Port, State
from ..config import ConfigReader
from ..kv_cache import Cache, merged_attention
from ..layers.activations import softcap
from ..layers.attention import AttentionSpec, BidirectionalAttention, rotary_frequencies
from ..layers.linear import Embedding, Linear
from ..layers.mlp import GatedMLP
from ..layers.norm import RMSNorm
from ..layers.ops import EW

EMBEDDING = "model.encoder.text_model.embed_tokens"
END_OF_IMAGE = 256_000  # transformers' default of `eoi_token_index`


class StackConfig:
    """One stack's section of config.json: `encoder.text_config` or `decoder`."""

    def __init__(self, section: ConfigReader, end_of_image: int) -> None:
        self.vocab = section.integer("vocab_size")
        self.hidden = section.integer("hidden_size")
        self.intermediate = section.integer("intermediate_size")
        self.layers = section.integer("num_hidden_layers", most=1024)
        self.heads = section.integer("num_attention_heads", most=4096)
        self.kv_heads = section.integer("num_key_value_heads", self.heads, most=4096)
        if self.heads % self.kv_heads:
            raise section.error("num_key_value_heads", self.kv_heads, f"a divisor of {self.heads} heads")
        self.head_dim = section.head_dim(256)
        self.eps = section.number("rms_norm_eps", 1e-6)
        self.act = section.text("hidden_activation", "gelu_pytorch_tanh")
        self.scale = section.number("query_pre_attn_scalar", 256.0, least=1e-6) ** -0.5
        cap = section.values.get("attn_logit_softcapping")
        if cap is not None:
            # transformers reads the key and leaves it unused; a checkpoint that sets it is not one we know.
            raise UserError(
                f"config.json: {section.where}attn_logit_softcapping is {cap!r}; T5Gemma 2 has no attention soft-capping"
            )
        final = section.values.get("final_logit_softcapping")
        self.final_softcap = section.number("final_logit_softcapping") if final is not None else 0.0
        self.layer_types = section.layer_types(self.layers, section.integer("sliding_window_pattern", 6))
        self.window = section.window(self.layer_types)
        self.bases = {
            kind: section.rope(base, kind) for kind, base in (("full_attention", 1e6), ("sliding_attention", 1e4))
        }
        self.bias = section.boolean("attention_bias", False)
        self.max_positions = section.integer("max_position_embeddings", 131_072)
        self.end_of_image = end_of_image

    def norm(self) -> RMSNorm:
        return RMSNorm(self.hidden, self.eps, offset=1.0)

    def attention(self, layer: int) -> AttentionSpec:
        kind = self.layer_types[layer]
        theta, factor = self.bases[kind]
        return AttentionSpec(
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            scale=self.scale,
            theta=theta,
            rope_factor=factor,
            window=self.window if kind == "sliding_attention" else 0,
            bias=self.bias,
            out_bias=self.bias,
            norm_eps=self.eps,
        )


class TokenEmbedding(Embedding):
    """An `Embedding` that also holds the row of the token that ends an image; `embed` puts it in."""

    def __init__(self, vocab: int, hidden: int) -> None:
        super().__init__(vocab, hidden)
        self.eoi_embedding = nn.Parameter(torch.empty(hidden), requires_grad=False)


def embed(config: StackConfig, embed_tokens: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Hidden states [B, S, hidden] of input_ids [B, S]: rows times sqrt(hidden), the end of an image as it is."""
    rows: torch.Tensor = embed_tokens(input_ids) * config.hidden**0.5
    row: Any = embed_tokens.eoi_embedding
    return torch.where((input_ids == config.end_of_image).unsqueeze(-1), row.to(rows.dtype), rows)


class MergedAttention(nn.Module):
    """Attention of a decoder to its own past and to the encoder's output at once, the same weights for both."""

    fused: ClassVar[tuple[tuple[str, ...], ...]] = (("q_proj", "k_proj", "v_proj"),)
    key_value: ClassVar[tuple[str, ...]] = ("k_proj", "v_proj")
    inv_freq: torch.Tensor

    def __init__(self, spec: AttentionSpec, eps: float) -> None:
        super().__init__()
        self.spec = spec
        self.q_proj = Linear(spec.hidden, spec.heads * spec.head_dim, spec.bias)
        self.k_proj = Linear(spec.hidden, spec.kv_heads * spec.head_dim, spec.bias)
        self.v_proj = Linear(spec.hidden, spec.kv_heads * spec.head_dim, spec.bias)
        self.o_proj = Linear(spec.heads * spec.head_dim, spec.hidden, spec.out_bias)
        self.q_norm = RMSNorm(spec.head_dim, eps, offset=1.0)
        self.k_norm = RMSNorm(spec.head_dim, eps, offset=1.0)
        frequencies = rotary_frequencies(spec.head_dim, spec.theta, spec.rope_factor)
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v [B, S, KV, D] of x [B, S, hidden], k normalised and not rotated."""
        shape = (*x.shape[:2], self.spec.kv_heads, self.spec.head_dim)
        return self.k_norm(self.k_proj(x).reshape(shape)), self.v_proj(x).reshape(shape)

    def project_encoder(self, encoder_hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k, v [B, KV, T, D] of encoder_hidden [B, T, hidden]."""
        k, v = self.keys_values(encoder_hidden)
        return k.transpose(1, 2), v.transpose(1, 2)

    def forward(
        self, x: torch.Tensor, past_length: torch.Tensor, mask: torch.Tensor, states: list[Cache]
    ) -> tuple[torch.Tensor, Cache, Cache]:
        s = self.spec
        positions = past_length + torch.arange(x.shape[1], device=x.device)
        q = EW.rope(self.q_norm(self.q_proj(x).reshape(*x.shape[:2], s.heads, s.head_dim)), positions, self.inv_freq)
        k, v = self.keys_values(x)
        k = EW.rope(k, positions, self.inv_freq)
        own_k, own_v, cross_k, cross_v = states
        attended, k_out, v_out = merged_attention(
            q, k, v, own_k, own_v, cross_k, cross_v, mask, past_length, s.scale, s.softcap, s.window
        )
        return self.o_proj(attended), k_out, v_out


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
    def __init__(self, config: StackConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = MergedAttention(config.attention(layer), config.eps)
        self.mlp = GatedMLP(config.hidden, config.intermediate, config.act)
        self.pre_self_attn_layernorm = config.norm()
        self.post_self_attn_layernorm = config.norm()
        self.pre_feedforward_layernorm = config.norm()
        self.post_feedforward_layernorm = config.norm()

    def forward(
        self, h: torch.Tensor, past_length: torch.Tensor, mask: torch.Tensor, states: list[Cache]
    ) -> tuple[torch.Tensor, Cache, Cache]:
        attended, k_out, v_out = self.self_attn(self.pre_self_attn_layernorm(h), past_length, mask, states)
        h = h + self.post_self_attn_layernorm(attended)
        return h + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(h))), k_out, v_out


class TextEncoder(nn.Module):
    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = TokenEmbedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(EncoderLayer(config, i) for i in range(config.layers))
        self.norm = config.norm()

    def forward(self, input_ids: torch.Tensor, encoder_mask: torch.Tensor) -> tuple[torch.Tensor]:
        """input_ids: int64 [B, T]; encoder_mask: bool [B, T], true at real tokens. Returns ([B, T, hidden],)."""
        h = embed(self.config, self.embed_tokens, input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        ahead = positions.unsqueeze(0) - positions.unsqueeze(1)  # [query, key]
        padding = encoder_mask.unsqueeze(1).unsqueeze(1)
        full = torch.logical_and(padding, (ahead.abs() >= 0).unsqueeze(0).unsqueeze(0))
        # A window of w tokens in all: (w + 1) // 2 to the left, the token itself among them, and w // 2 to the right.
        left, right = (self.config.window + 1) // 2, self.config.window // 2
        near = torch.logical_and(ahead > -left, ahead <= right).unsqueeze(0).unsqueeze(0)
        sliding = torch.logical_and(padding, near)
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            h = layer(h, positions, sliding if kind == "sliding_attention" else full)
        return (self.norm(h),)


class Encoder(nn.Module):
    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.text_model = TextEncoder(config)


class Decoder(nn.Module):
    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = TokenEmbedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.layers))
        self.norm = config.norm()


class Stacks(nn.Module):
    def __init__(self, encoder: StackConfig, decoder: StackConfig) -> None:
        super().__init__()
        self.encoder = Encoder(encoder)
        self.decoder = Decoder(decoder)


class Head(nn.Module):
    def __init__(self, hidden: int, vocab: int) -> None:
        super().__init__()
        self.out_proj = Linear(hidden, vocab)


class CrossKV(nn.Module):
    """Every decoder layer's keys and values of the encoder output."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model.model

    def forward(self, encoder_hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        layers: Any = self.model.decoder.layers
        pairs = [layer.self_attn.project_encoder(encoder_hidden) for layer in layers]
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
        h = embed(decoder.config, decoder.embed_tokens, input_ids)
        mask = encoder_mask.unsqueeze(1).unsqueeze(1)
        updated: list[Cache] = []
        for i, layer in enumerate(decoder.layers):
            h, k, v = layer(h, past_length, mask, states[4 * i : 4 * i + 4])
            updated += [k, v]
        h = decoder.norm(h.index_select(1, logit_positions))
        return (softcap(self.lm_head.out_proj(h), self.cap), *updated)


class Model(nn.Module):
    """The text path of a T5Gemma 2 checkpoint, its modules named as the checkpoint names them.

    unused: the prefixes of tensors that a checkpoint may hold and this model does not read.
    """

    task = "seq2seq"
    unused = ("model.encoder.vision_tower.", "model.encoder.multi_modal_projector.")

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        section = ConfigReader(config, "")
        whole = section.section("encoder")
        text = whole.section("text_config") if "text_config" in whole.values else whole
        end = whole.token("eoi_token_index", section.token("eoi_token_index", END_OF_IMAGE))
        assert end is not None
        self.encoder_config = StackConfig(text, end)
        self.decoder_config = StackConfig(section.section("decoder"), end)
        for what in ("hidden", "vocab"):
            here, there = getattr(self.encoder_config, what), getattr(self.decoder_config, what)
            if here != there:
                raise UserError(
                    f"config.json: the encoder's {what}_size is {here}, the decoder's {there}; T5Gemma 2 shares one embedding"
                )
        if not section.boolean("tie_word_embeddings", True):
            raise section.error("tie_word_embeddings", False, "true, as T5Gemma 2 has one embedding")
        self.model = Stacks(self.encoder_config, self.decoder_config)
        self.lm_head = Head(self.decoder_config.hidden, self.decoder_config.vocab)
        self.tied = {
            "lm_head.out_proj.weight": f"{EMBEDDING}.weight",
            "model.decoder.embed_tokens.weight": f"{EMBEDDING}.weight",
            "model.decoder.embed_tokens.eoi_embedding": f"{EMBEDDING}.eoi_embedding",
        }
        start = section.token("decoder_start_token_id", section.section("decoder").token("bos_token_id", 2))
        self.decoder_start = 2 if start is None else start
        # One bound for prompt and answer: the smaller of what the two stacks were made for.
        self.max_context = min(self.encoder_config.max_positions, self.decoder_config.max_positions)

    @staticmethod
    def shorten(config: dict[str, Any], layers: int) -> dict[str, Any]:
        """The config with at most `layers` layers in each stack (a rehearsal)."""

        def cut(stack: dict[str, Any]) -> dict[str, Any]:
            kept = min(layers, stack["num_hidden_layers"])
            types = {"layer_types": stack["layer_types"][:kept]} if stack.get("layer_types") else {}
            return stack | {"num_hidden_layers": kept} | types

        encoder = config["encoder"]
        nested = "text_config" in encoder
        encoder = encoder | {"text_config": cut(encoder["text_config"])} if nested else cut(encoder)
        return config | {"encoder": encoder, "decoder": cut(config["decoder"])}

    def stacks(self) -> dict[str, nn.ModuleList]:
        return {"encoder": self.model.encoder.text_model.layers, "decoder": self.model.decoder.layers}

    def graphs(self) -> list[Graph]:
        enc, dec = self.encoder_config, self.decoder_config
        f32, i64 = torch.float32, torch.int64
        source = {"batch": (1, 1024), "source": (1, enc.max_positions)}
        target = dict.fromkeys(("sequence", "capacity", "logits"), (1, dec.max_positions))
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
                module=self.model.encoder.text_model,
                inputs=(Port("input_ids", i64, ("batch", "source")), mask),
                outputs=(hidden,),
                example={"batch": 2, "source": 5},
                bounds=source,
                root="model.encoder.text_model.",
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
                bounds=source | target,
            ),
        ]
