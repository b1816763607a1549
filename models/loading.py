"""Loads weights into a model that was built on the meta device.

Three loaders: the original in float32, which quantization loss is measured against; codes and scales as views of the mapped
file, which exporters lower; the same dequantized to float32, the eager reference of every artefact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import UserError
from ..ops.quantized import dequantize
from .language_model import LanguageModel
from .layers.linear import Embedding, Linear, QuantizedEmbedding, QuantizedLinear

if TYPE_CHECKING:
    from ..checkpoints.checkpoint import Checkpoint

CODES, SCALES = ".codes", ".scales"


def load_original(model: LanguageModel, checkpoint: Checkpoint) -> None:
    """Fill `model` with the checkpoint's weights in float32. Raises UserError for a missing or misshapen tensor."""

    def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        checkpoint.expect(name, shape)
        return checkpoint.tensor(name).to(torch.float32)

    fill(model, checkpoint, read)


def load_dequantized(model: LanguageModel, checkpoint: Checkpoint) -> None:
    """Fill `model` with float32 values of a quantized checkpoint: code times scale."""

    def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if not checkpoint.has(name + CODES):
            checkpoint.expect(name, shape)
            return checkpoint.tensor(name).to(torch.float32)
        codes, scales, bits, group = quantized_parts(checkpoint, name, shape)
        return dequantize(codes, scales, bits, group)

    fill(model, checkpoint, read)


def load_quantized(model: LanguageModel, checkpoint: Checkpoint) -> None:
    """Put the codes and scales of a quantized checkpoint into `model`, as views of the mapped file.

    Linears and embeddings become their quantized forms. Unquantized tensors keep the file's dtype.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    for path, module in list(model.named_modules()):
        if not isinstance(module, Linear | Embedding):
            continue
        stored = model.stored_name(f"{path}.weight")
        if not checkpoint.has(stored + CODES):
            continue
        codes, scales, bits, group = quantized_parts(checkpoint, stored, shapes[f"{path}.weight"])
        new: nn.Module
        if isinstance(module, Linear):
            bias = None
            if module.bias is not None:
                checkpoint.expect(f"{path}.bias", tuple(module.bias.shape))
                bias = checkpoint.tensor(f"{path}.bias")
            new = QuantizedLinear(codes, scales, bits, group, bias)
        else:
            new = QuantizedEmbedding(codes, scales, bits, group)
        for extra, parameter in module.named_parameters(recurse=False):
            if extra not in ("weight", "bias"):  # T5Gemma 2's embedding has a row beside the table
                new.register_parameter(extra, parameter)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.eval())

    def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        checkpoint.expect(name, shape)
        return checkpoint.tensor(name)

    fill(model, checkpoint, read)


def quantized_parts(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """(codes, scales, bits, group_size) of a weight of a quantized checkpoint. Raises UserError if they do not fit."""
    codes, scales = checkpoint.tensor(name + CODES), checkpoint.tensor(name + SCALES)
    rows, columns = shape
    fits = codes.dim() == scales.dim() == 2 and codes.shape[0] == scales.shape[0] == rows and scales.shape[1] > 0
    if not fits or codes.dtype != torch.uint8 or columns % scales.shape[1] or codes.shape[1] * 8 % columns:
        raise UserError(f"{checkpoint.source}: codes and scales of {name} do not fit its shape {list(shape)}")
    bits = codes.shape[1] * 8 // columns
    if bits not in (2, 3, 4, 5, 6, 8):
        raise UserError(f"{checkpoint.source}: {name} has codes of {bits} bits; expected 2, 3, 4, 5, 6 or 8")
    return codes, scales, bits, columns // scales.shape[1]


def fill(model: LanguageModel, checkpoint: Checkpoint, read: Callable[[str, tuple[int, ...]], torch.Tensor]) -> None:
    """Set every parameter on the meta device to `read(stored name, shape)`. Tied parameters share one."""
    done: dict[str, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if not parameter.is_meta:
            continue
        stored = model.stored_name(name)
        if stored not in done:
            done[stored] = nn.Parameter(read(stored, tuple(parameter.shape)), requires_grad=False)
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path).register_parameter(leaf, done[stored])
