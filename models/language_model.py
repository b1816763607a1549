"""What every architecture offers to the rest of the product."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from ..graph import Graph


class LanguageModel(Protocol):
    """What a `Model` class offers beside being an `nn.Module` whose parameters bear the checkpoint's names.

    task: "seq2seq" or "causal", which decides the generate loop. tied: alias parameter -> the stored one it shares.
    decoder_start: the token a seq2seq decoder starts from. max_context: positions the model was made for.
    """

    task: str
    tied: dict[str, str]
    decoder_start: int | None
    max_context: int

    def stacks(self) -> dict[str, nn.ModuleList]: ...

    def graphs(self) -> list[Graph]: ...
