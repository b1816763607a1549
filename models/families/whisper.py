"""Whisper (arXiv 2212.04356): two convolutions over a log-mel spectrogram of 30 seconds, a Transformer behind, text out."""

from __future__ import annotations

from typing import Any

import torch

from ...checkpoints.names import Names, convolution, rename
from ...graph import Port
from ..decoder import PositionTable
from ..encoder_decoder import EncoderDecoderSpec, StackSpec
from ..language_model import SoundLayout
from ..layers.activations import gelu
from ..layers.attention import AttentionSpec
from ..layers.convolution import Convolution, ConvolutionSpec
from ..layers.norm import NormSpec
from ..rope import Rope
from ..seq2seq import EncoderInput
from ..speech import Front, SpeechModel

RATE, FFT, HOP = 16000, 400, 160
"""Of every Whisper: samples a second, samples of a frame, samples from frame to frame. A position stands for two frames."""


class WhisperFront(Front):
    """Convolutions over time, and positions that are added."""

    def __init__(self, mels: int, hidden: int, positions: int) -> None:
        super().__init__()
        self.conv1 = Convolution(ConvolutionSpec(mels, hidden, taps=3, padding=1))
        self.conv2 = Convolution(ConvolutionSpec(hidden, hidden, taps=3, stride=2, padding=1))
        self.embed_positions = PositionTable(positions, hidden)
        features = Port("input_features", torch.float32, ("batch", mels, 2 * positions))
        self.reads = EncoderInput((features,), positions)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """inputs: the spectrogram [B, mels, frames]."""
        h = gelu(self.conv1(inputs[0].transpose(1, 2)))
        h = gelu(self.conv2(h))
        positions = torch.arange(h.shape[1], device=h.device)
        everywhere = positions.unsqueeze(1) + positions.unsqueeze(0) >= 0
        return h + self.embed_positions(positions), everywhere.unsqueeze(0).unsqueeze(0)


class Model(SpeechModel):
    """The modules of a Whisper checkpoint."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.max_context = self.spec.positions
        self.decoder_start = self.section.token("decoder_start_token_id", 50257)

    def describe(self) -> EncoderDecoderSpec:
        section = self.section
        section.flag("scale_embedding", False)  # transformers has this key and never scales by it
        hidden = section.integer("d_model", 384)
        vocab = section.integer("vocab_size", 51865)

        def stack(name: str) -> StackSpec:
            heads = section.divisor(f"{name}_attention_heads", hidden, 6)
            if hidden // heads % 8:
                raise section.error(
                    f"{name}_attention_heads", heads, f"heads of a multiple of 8 of {hidden} dimensions"
                )
            width = hidden // heads
            attention = AttentionSpec(
                hidden,
                heads,
                heads,
                width,
                scale=width**-0.5,
                rope=Rope(),
                bias=True,
                out_bias=True,
                rotated=0,
                key_bias=False,
            )
            layers = section.integer(f"{name}_layers", 4, most=1024)
            return StackSpec(vocab, layers, section.integer(f"{name}_ffn_dim", 1536), attention)

        return EncoderDecoderSpec(
            encoder=stack("encoder"),
            decoder=stack("decoder"),
            hidden=hidden,
            positions=section.integer("max_target_positions", 448),
            norm=NormSpec(1e-5, "layer", bias=True),
            act=section.text("activation_function", "gelu"),
            mlp_bias=True,
            learned=0,
            shared=False,
            tied=section.flag("tie_word_embeddings", True),
        )

    def front(self) -> WhisperFront:
        return WhisperFront(self._mels, self.spec.hidden, self._positions)

    @property
    def _mels(self) -> int:
        return self.section.integer("num_mel_bins", 80, most=1024)

    @property
    def _positions(self) -> int:
        return self.section.integer("max_source_positions", 1500, least=2, most=1 << 16)

    def sound_layout(self) -> SoundLayout:
        window = 2 * HOP * self._positions
        return SoundLayout("log-mel", RATE, window, self._positions, mels=self._mels, fft=FFT, hop=HOP)

    @classmethod
    def shorten(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        return config | {key: min(layers, config.get(key, 4)) for key in ("encoder_layers", "decoder_layers")}

    @property
    def names(self) -> Names:
        layer = "model.*.layers.{}."
        return Names(
            convolution("model.encoder.conv1", "model.encoder.front.conv1.patches"),
            convolution("model.encoder.conv2", "model.encoder.front.conv2.patches"),
            rename("model.encoder.embed_positions", "model.encoder.front.embed_positions"),
            rename(f"{layer}self_attn.out_proj", f"{layer}self_attn.o_proj"),
            rename(f"{layer}encoder_attn.out_proj", f"{layer}cross_attn.o_proj"),
            rename("model.*.encoder_attn_layer_norm", "model.*.cross_attn_norm"),
            rename("model.*.encoder_attn.*", "model.*.cross_attn.*"),
            rename("model.*.fc1", "model.*.mlp.up_proj"),
            rename("model.*.fc2", "model.*.mlp.down_proj"),
            rename("model.*.self_attn_layer_norm", "model.*.self_attn_norm"),
            rename("model.*.final_layer_norm", "model.*.mlp_norm"),
            rename("model.*.layer_norm", "model.*.norm"),
        )
