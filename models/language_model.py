"""The base class of every architecture, and what the families' files share to read and shorten their configs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..checkpoints.names import Names
from ..errors import UserError
from ..graph import Graph
from .config import ConfigReader
from .layers.block import Block

Task = Literal["seq2seq", "causal", "memory", "embed", "module"]
"""What is done with a model: the generate loop of an encoder-decoder, of a decoder alone, of a decoder that reads a memory; one
vector of a text; nothing but running its graphs."""

Example = tuple[str, dict[str, torch.Tensor]]
"""A graph's name and its inputs by name."""


@dataclass(frozen=True)
class ContextLayout:
    """How a model of the task "memory" reads a context, and where the memory goes in its prompt.

    Attributes:
        window: context tokens of one memory.
        tokens: ids put behind the context tokens; their hidden states are the memory.
        prefix: ids put before the memory's slots in the prompt.
        splice: "exact" puts the memory into its slots. "released" puts it one position earlier, over the last id of
            `prefix`, and leaves id 0 in the last slot, as the code released with Dolphin does.
    """

    window: int
    tokens: tuple[int, ...]
    prefix: tuple[int, ...]
    splice: Literal["released", "exact"]


class TextStack(nn.Module, ABC):
    """What makes hidden states of a text. layers: in order."""

    layers: nn.ModuleList

    @abstractmethod
    def hidden_states(self, input_ids: torch.Tensor, encoder_mask: torch.Tensor) -> torch.Tensor:
        """[B, T, hidden] of input_ids int64 [B, T] and encoder_mask bool [B, T], true at real tokens, which come first."""


@dataclass(frozen=True)
class TextEncoder:
    """A stack, which the model holds as `model`, with its sizes. names: as `LanguageModel.names`."""

    stack: TextStack
    hidden: int
    vocab: int
    positions: int
    names: Names


@dataclass(frozen=True)
class SoundLayout:
    """What the encoder of a speech model reads of a sound.

    Attributes:
        kind: "log-mel": a spectrogram of a whole window, which a shorter sound is padded to; "samples": as many rows of samples as
            the sound has.
        rate: samples a second.
        window: the most samples of one call.
        positions: of the encoder's output, of a whole window.
        mels, fft, hop: bands, samples of a frame, and samples from frame to frame of the spectrogram; 0 for samples.
        row: samples of a row; 0 for a spectrogram.
        tail: samples that the first position reads beyond its row; 0 for a spectrogram.
    """

    kind: Literal["log-mel", "samples"]
    rate: int
    window: int
    positions: int
    mels: int = 0
    fft: int = 0
    hop: int = 0
    row: int = 0
    tail: int = 0


class LanguageModel(nn.Module, ABC):
    """A model whose parameters have the checkpoint's names. Each family's `Model` derives from it.

    Attributes:
        task: the generate loop that runs the graphs.
        tied: alias parameter -> the stored parameter that it shares.
        decoder_start: the first token of a seq2seq decoder; None for other tasks.
        max_context: positions that the model was made for.
        section: config.json, checked at each access.
    """

    task: ClassVar[Task]
    tied: dict[str, str]
    decoder_start: int | None = None
    max_context: int

    def __init__(self, config: dict[str, Any]) -> None:
        """config: the contents of config.json. Raises UserError for a bad value."""
        super().__init__()
        self.section = ConfigReader(config, "")

    @property
    def names(self) -> Names:
        """What files call the parameters, where it is not what the model calls them."""
        return Names()

    @abstractmethod
    def stacks(self) -> dict[str, nn.ModuleList]:
        """Name -> layers of each stack."""

    @abstractmethod
    def graphs(self) -> list[Graph]:
        """The graphs to lower, in the order in which they run."""

    @classmethod
    def own_pooling(cls, config: dict[str, Any]) -> str | None:
        """The pooling of a checkpoint that is an encoder of texts by its config.json alone; None if it is none."""
        return None

    def text_encoder(self) -> TextEncoder | None:
        """A new stack that makes hidden states of a text, on the parameters that this model has; None if there is none."""
        return None

    def matched(self, config: dict[str, Any], has: Callable[[str], bool]) -> dict[str, Any]:
        """`config` as the checkpoint's tensors show it, where they decide what it leaves open. has: whether a file has the tensor
        that the model calls so."""
        return config

    @classmethod
    def shorten(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        """`config` with at most `layers` layers in each stack: a rehearsal. config: valid, as the model was built of it."""
        return shorten_stack(config, layers)

    def context_spec(self) -> ContextLayout | None:
        """How the model reads a context; None unless its task is "memory"."""
        return None

    def sound_layout(self) -> SoundLayout | None:
        """What the encoder reads of a sound; None for a model of text."""
        return None

    def examples(self) -> list[Example]:
        """Inputs of its own that a model without a generate loop is compared on; [] if it has none."""
        return []

    def tied_head(
        self,
        default: bool,
        head: str = "lm_head.weight",
        table: str = "model.embed_tokens.weight",
        key: str = "tie_word_embeddings",
    ) -> dict[str, str]:
        """`tied` of a head that shares the embedding's table where config.json says so (`default`: where it does not say)."""
        return {head: table} if self.section.boolean(key, default) else {}

    def check_lengths(self) -> None:
        """Raises UserError if the model takes fewer positions than its graphs are traced with."""
        for graph in self.graphs():
            for name, (_, most) in graph.bounds.items():
                if most < graph.example[name]:
                    least = max(graph.example.values())
                    raise UserError(f"config.json: max_position_embeddings is {most}; at least {least} are needed")

    def protected_weights(self) -> set[str]:
        """Weights of gates and decays (`Block.protected`): they stay at 16 bits unless the user overrides it."""
        return {
            f"{path}.{name}.weight" for path, block in self._blocks() for name in block.plain_linears(block.protected)
        }

    def key_value_weights(self) -> set[str]:
        """Stored names of the weights of keys and values (`Block.key_value`); the query of one token reads them for many."""
        return {
            self.stored_name(f"{path}.{name}.weight")
            for path, block in self._blocks()
            for name in block.plain_linears(block.key_value)
        }

    def stored_name(self, name: str) -> str:
        """The name a parameter is stored under: its own, or that of the parameter it is tied to."""
        return self.tied.get(name, name)

    def _blocks(self) -> list[tuple[str, Block]]:
        return [(path, module) for path, module in self.named_modules() if isinstance(module, Block)]


def shorten_stack(values: dict[str, Any], layers: int) -> dict[str, Any]:
    """The keys of a stack with at most `layers` layers, each of the kind it was."""
    kept = min(layers, values["num_hidden_layers"])
    short = values | {"num_hidden_layers": kept}
    if short.get("layer_types"):
        short["layer_types"] = short["layer_types"][:kept]
    return short
