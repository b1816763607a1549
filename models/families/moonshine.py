"""Moonshine (arXiv 2410.15608): three convolutions over samples of any length, a Transformer with RoPE behind, text out.

The convolutions have strides of 64, 3 and 2 samples: a position stands for 384. The graph reads rows of 384 samples and computes a
position for each; the last two read beyond the sound, so `encoder_mask` is false there, and what is real is what transformers
computes of a sound of 384 n + 511 samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...checkpoints.names import Names, convolution, halves, rename, split
from ...graph import Port
from ..config import ConfigReader
from ..encoder_decoder import EncoderDecoderSpec, StackSpec
from ..language_model import SoundLayout
from ..layers.activations import gelu
from ..layers.attention import AttentionSpec
from ..layers.linear import Linear
from ..layers.norm import NormSpec
from ..rope import read_rope
from ..seq2seq import EncoderInput
from ..speech import Front, SpeechModel

RATE, WINDOW = 16000, 30
"""Samples a second, and the seconds of the longest sound of the training."""

TAPS = 127, 7, 3
STRIDES = 64, 3, 2
ROW = 384
TAIL = 511
"""Of a position: the samples until the next, and those that it reads behind its row."""

BEHIND = -(-TAIL // ROW)
"""Rows behind the last position's own."""


class ChannelNorm(nn.Module):
    """A group norm of one group: over all channels and real frames. x: [B, T, channels]; real: float32 [B, T, 1]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size), requires_grad=False)

    def forward(self, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        share = real.mean(1, keepdim=True)  # means stay small in half precision, sums do not
        mean = (x * real).mean(2, keepdim=True).mean(1, keepdim=True) / share
        centred = (x - mean) * real
        variance = (centred * centred).mean(2, keepdim=True).mean(1, keepdim=True) / share
        return centred * torch.rsqrt(variance + self.eps) * self.weight.to(x.dtype) + self.bias.to(x.dtype)


class MoonshineFront(Front):
    """The convolutions, each a linear over patches. Frames lie in rows as samples do: six of the first convolution in one."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.conv1 = Linear(TAPS[0], hidden)
        self.groupnorm = ChannelNorm(hidden, 1e-5)
        self.conv2 = Linear(TAPS[1] * hidden, 2 * hidden, bias=True)
        self.conv3 = Linear(TAPS[2] * 2 * hidden, hidden, bias=True)
        samples = Port("input_values", torch.float32, ("batch", "source", ROW))
        mask = Port("encoder_mask", torch.bool, ("batch", "source"))
        self.reads = EncoderInput((samples, mask), "source", BEHIND + 1)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """inputs: samples [B, T, ROW], and bool [B, T], true at positions that read no row behind the sound."""
        samples, mask = inputs
        batch, rows = mask.shape
        frames = torch.tanh(self.conv1(_patches(samples.unsqueeze(3), TAPS[0], STRIDES[0])))  # [B, T, 6, hidden]
        each, hidden = frames.shape[2], frames.shape[3]
        real = _real_frames(mask.to(frames.dtype).unsqueeze(2), each)
        frames = self.groupnorm(frames.reshape(batch, rows * each, hidden), real).reshape(batch, rows, each, hidden)
        frames = gelu(self.conv2(_patches(frames, TAPS[1], STRIDES[1])))  # [B, T, 2, 2 * hidden]
        h = gelu(self.conv3(_patches(frames, TAPS[2], STRIDES[2]))).squeeze(2)
        positions = torch.arange(rows, device=h.device)
        everywhere = (positions.unsqueeze(1) + positions.unsqueeze(0) >= 0).unsqueeze(0).unsqueeze(0)
        return h, torch.logical_and(mask.unsqueeze(1).unsqueeze(1), everywhere)


def _real_frames(mask: torch.Tensor, each: int) -> torch.Tensor:
    """[B, T * each, 1], 1 at frames that a real position reads; mask: [B, T, 1], 1 at those, the first among them.

    They are the frames of its row and the next one, and the first of the row behind. Masks are shifted, as half precision does not
    count so far.
    """
    rows, one = mask.shape[1], mask.narrow(1, 0, 1)
    others = torch.cat((one, mask.narrow(1, 0, rows - 1)), 1)
    first = torch.cat((one, others.narrow(1, 0, rows - 1)), 1)
    return torch.cat((first, *[others] * (each - 1)), 2).reshape(mask.shape[0], rows * each, 1)


def _patches(x: torch.Tensor, taps: int, stride: int) -> torch.Tensor:
    """What a convolution's outputs see of x [B, T, n, C], whose n items of T rows follow each other: [B, T, n / stride, taps * C].

    Behind the last row stands the last again, which only masked positions read: a constant there would join what is apart.
    """
    batch, rows, items, channels = x.shape
    steps = x.reshape(batch, rows, items // stride, stride * channels)  # a patch begins with each
    needed = -(-taps // stride)  # steps of a patch; the last may be cut
    later = torch.cat((steps.narrow(1, 1, rows - 1), steps.narrow(1, rows - 1, 1)), 1)
    ahead = torch.cat((steps, later), 2)
    views = [ahead.narrow(2, at, items // stride) for at in range(needed)]
    return torch.cat(views, 3).narrow(3, 0, taps * channels)


class Model(SpeechModel):
    """The modules of a Moonshine checkpoint."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.max_context = self.spec.positions
        self.decoder_start = self.first_token(self.section, 1)

    def describe(self) -> EncoderDecoderSpec:
        section = self.section
        section.integer("pad_head_dim_to_multiple_of", 8)  # zeros behind a head, which change nothing
        hidden, vocab = section.integer("hidden_size", 288), section.integer("vocab_size", 32768)
        # RoPE has no table that would end, and the encoder has more positions than the decoder was trained for
        positions = max(section.integer("max_position_embeddings", 512), self.sound_layout().positions)

        def stack(name: str, act: str, gated: bool) -> StackSpec:
            layers = section.integer(f"{name}_num_hidden_layers", 6, most=1024)
            intermediate = section.integer("intermediate_size", 1152)
            attention = _attention(section, name, hidden)
            return StackSpec(vocab, layers, intermediate, attention, section.text(f"{name}_hidden_act", act), gated)

        return EncoderDecoderSpec(
            encoder=stack("encoder", "gelu", False),
            decoder=stack("decoder", "silu", True),
            hidden=hidden,
            positions=positions,
            norm=NormSpec(1e-5, "layer"),
            mlp_bias=True,
            shared=False,
            tied=section.flag("tie_word_embeddings", True),
        )

    def front(self) -> MoonshineFront:
        return MoonshineFront(self.spec.hidden)

    def sound_layout(self) -> SoundLayout:
        positions = (RATE * WINDOW - TAIL) // ROW
        window = ROW * positions + TAIL
        return SoundLayout("samples", RATE, window, positions + BEHIND, row=ROW, tail=TAIL)

    @classmethod
    def shorten(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        keys = ("encoder_num_hidden_layers", "decoder_num_hidden_layers")
        return config | {key: min(layers, config.get(key, 6)) for key in keys}

    @property
    def names(self) -> Names:
        intermediate = self.spec.decoder.intermediate
        rotary = []
        for stack, spec in (("encoder", self.spec.encoder), ("decoder", self.spec.decoder)):
            heads, rotated = spec.attention.heads, spec.attention.rotary_dims
            rotary += [
                halves(f"model.{stack}.layers.{{}}.self_attn.{name}", heads, rotated=rotated)
                for name in ("q_proj", "k_proj")
            ]
        up_and_gate = {
            "model.decoder.layers.{}.mlp.up_proj": intermediate,
            "model.decoder.layers.{}.mlp.gate_proj": intermediate,
        }
        return Names(
            convolution("model.encoder.conv1", "model.encoder.front.conv1"),
            convolution("model.encoder.conv2", "model.encoder.front.conv2"),
            convolution("model.encoder.conv3", "model.encoder.front.conv3"),
            rename("model.encoder.groupnorm", "model.encoder.front.groupnorm"),
            *rotary,
            rename("model.decoder.layers.{}.encoder_attn.*", "model.decoder.layers.{}.cross_attn.*"),
            split("model.decoder.layers.{}.mlp.fc1", up_and_gate),
            rename("model.encoder.layers.{}.mlp.fc1", "model.encoder.layers.{}.mlp.up_proj"),
            rename("model.*.mlp.fc2", "model.*.mlp.down_proj"),
            rename("model.*.input_layernorm", "model.*.self_attn_norm"),
            rename("model.encoder.layers.{}.post_attention_layernorm", "model.encoder.layers.{}.mlp_norm"),
            rename("model.decoder.layers.{}.post_attention_layernorm", "model.decoder.layers.{}.cross_attn_norm"),
            rename("model.decoder.layers.{}.final_layernorm", "model.decoder.layers.{}.mlp_norm"),
            rename("model.encoder.layer_norm", "model.encoder.norm"),
        )


def _attention(section: ConfigReader, name: str, hidden: int) -> AttentionSpec:
    """The attention of a stack. Raises UserError for fewer key heads than heads, which transformers' model does not take."""
    heads = section.divisor(f"{name}_num_attention_heads", hidden, 8)
    key_heads = section.integer(f"{name}_num_key_value_heads", heads)
    if key_heads != heads:
        raise section.error(f"{name}_num_key_value_heads", key_heads, f"{heads}, as many as heads")
    width = section.integer("head_dim", hidden // heads, most=4096)
    return AttentionSpec(
        hidden,
        heads,
        heads,
        width,
        scale=width**-0.5,
        rope=read_rope(section, 10000.0, partial=True),
        bias=section.flag("attention_bias", False),
        rotated=section.rotated(width, 0.9),
        padding=-width % 8,
    )
