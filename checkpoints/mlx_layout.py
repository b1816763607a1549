"""mlx-lm's forms of tensors that are not quantized, told by the shape of a short convolution: it keeps [channels, taps, 1].

Where it does, norms of Qwen3-Next and Qwen3.5 hold 1 + weight, too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..errors import UserError
from .checkpoint import TensorInfo, TensorStore
from .named_store import NamedStore
from .names import Piece

_CONVOLUTIONS = ("conv1d.weight", "conv.conv.weight")
_SHIFTED = ("qwen3_next", "qwen3_5", "qwen3_5_text")
_NORMS = (
    *(".input_layernorm.weight", ".post_attention_layernorm.weight", "model.norm.weight"),
    *(".q_norm.weight", ".k_norm.weight"),
)
_AS_THEY_ARE = ("lfm2",)


def without_mlx_layout(model_type: str, store: TensorStore) -> TensorStore:
    """The store with transformers' forms. Raises UserError for a family whose weights mlx-lm changes in other ways."""
    turned = [
        name
        for name, info in store.infos.items()
        if name.endswith(_CONVOLUTIONS) and len(info.shape) == 3 and info.shape[2] == 1 and info.shape[1] > 1
    ]
    if not turned:
        return store
    if model_type not in (*_SHIFTED, *_AS_THEY_ARE):
        raise UserError(
            f"{turned[0]} has the shape of mlx-lm's checkpoints, which change the weights of {model_type} in ways that are "
            "not undone here; give the model as it was before mlx-lm converted it"
        )
    add = -1.0 if model_type in _SHIFTED else 0.0
    pieces = {
        name: (Piece(name, add=add if name.endswith(_NORMS) and len(info.shape) == 1 else 0.0),)
        for name, info in store.infos.items()
    }
    return _Turned(store, pieces, frozenset(turned))


class _Turned(NamedStore):
    """A store whose convolutions [channels, taps, 1] are [channels, 1, taps]."""

    def __init__(self, base: TensorStore, pieces: Mapping[str, tuple[Piece, ...]], turned: frozenset[str]) -> None:
        super().__init__(base, pieces)
        self._turned = turned
        for name in turned:
            info = self.infos[name]
            self.infos[name] = TensorInfo(name, info.dtype, (info.shape[0], 1, info.shape[1]))

    def tensor(self, name: str) -> torch.Tensor:
        value = super().tensor(name)
        return value.transpose(1, 2).contiguous() if name in self._turned else value

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        value = super().rows(name, start, stop)
        return value.transpose(1, 2).contiguous() if name in self._turned else value
