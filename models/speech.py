"""Encoder-decoders that read sound: the encoder of `encoder_decoder` behind convolutions, its decoder as it is.

A family gives the `EncoderDecoderSpec` of both stacks and the front of its encoder: the module that makes hidden states of what
the graph `encoder` reads. How a sound becomes that, says its `SoundLayout`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import nn

from .encoder_decoder import EncoderDecoderSpec, EncoderLayer, Stack
from .language_model import SoundLayout
from .layers.linear import Linear
from .seq2seq import EncoderDecoder, EncoderInput, Seq2seqModel


class Front(nn.Module):
    """What stands before an encoder's layers. reads: the inputs of the graph `encoder`."""

    reads: EncoderInput

    @abstractmethod
    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [B, T, hidden], and which positions see which: bool [B or 1, 1, T, T]."""


class SpeechEncoder(nn.Module):
    """The front, the layers and the last norm."""

    def __init__(self, spec: EncoderDecoderSpec, front: Front) -> None:
        super().__init__()
        self.front = front
        self.layers = nn.ModuleList(EncoderLayer(spec) for _ in range(spec.encoder.layers))
        self.norm = spec.norm.of(spec.hidden)


class SpeechStacks(nn.Module):
    """Both stacks."""

    def __init__(self, spec: EncoderDecoderSpec, front: Front) -> None:
        super().__init__()
        self.encoder = SpeechEncoder(spec, front)
        self.decoder = Stack(spec, bidirectional=False)


class Encode(nn.Module):
    """The graph `encoder`."""

    def __init__(self, model: SpeechStacks) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor]:
        """inputs: those of the front. Returns ([B, T, hidden],)."""
        encoder = self.model.encoder
        h, mask = encoder.front(*inputs)
        positions = torch.arange(h.shape[1], device=h.device)
        for layer in encoder.layers:
            h = layer(h, positions, mask, mask)
        return (encoder.norm(h),)


class SpeechModel(Seq2seqModel):
    """An encoder-decoder that reads sound. Its head is the decoder's embedding where `spec.tied`."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.spec = spec = self.describe()
        self.model = SpeechStacks(spec, self.front())
        self.proj_out = Linear(spec.hidden, spec.decoder.vocab)
        self.tied = {"proj_out.weight": "model.decoder.embed_tokens.weight"} if spec.tied else {}

    @abstractmethod
    def describe(self) -> EncoderDecoderSpec:
        """The stacks of `section`, with an embedding of the decoder's own; positions are the decoder's. Raises UserError."""

    @abstractmethod
    def front(self) -> Front:
        """A new front of the encoder."""

    @abstractmethod
    def sound_layout(self) -> SoundLayout: ...

    def stacks(self) -> dict[str, nn.ModuleList]:
        return {"encoder": self.model.encoder.layers, "decoder": self.model.decoder.layers}

    def encoder_decoder(self) -> EncoderDecoder:
        spec, stack = self.spec, self.model.decoder
        assert stack.embed_tokens is not None
        return EncoderDecoder(
            encoder=Encode(self.model),
            encoder_root="",
            stack={"model": self.model},
            head={"proj_out": self.proj_out},
            decoder=stack.parts(stack.embed_tokens, self.proj_out),
            encoder_hidden=spec.hidden,
            vocab=spec.decoder.vocab,
            kv_heads=spec.decoder.attention.kv_heads,
            head_dim=spec.decoder.attention.cached_dim,
            source_positions=self.sound_layout().positions,
            target_positions=spec.positions,
            reads=self.model.encoder.front.reads,
        )
