"""EUGen layers (arXiv 2601.22563) in place of feed-forward blocks, where config.json has them.

Any family may have them: the object `edgewright.eugen` of config.json maps paths of `GatedMLP` modules to the sizes of the
layers that replace them, {"model.layers.3.mlp": {"m": 256, "k": 2}}. `rewrites.eugen` makes such checkpoints.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..system.reading import one_line
from .config import OURS, ConfigReader
from .layers.linear import Linear
from .layers.mlp import GatedMLP

CONFIG, KEY = OURS, "eugen"
ORDERS = 3  # the paper: more than three orders are not needed
BLOCK = 16  # m is a multiple of it, so that the output matrix can be quantized
SMALLEST, LARGEST = 16, 1 << 16


@dataclass(frozen=True)
class EUGenSize:
    """m random features in each of the orders 1 to k."""

    m: int
    k: int

    @property
    def factors(self) -> int:
        """The number of random matrices: order i multiplies i of them."""
        return self.k * (self.k + 1) // 2

    @staticmethod
    def read(section: ConfigReader) -> EUGenSize:
        """`m` and `k` of a section. Raises UserError unless m is a multiple of 16 up to 65536, and k is 1 to 3."""
        m, k = section.integer("m", least=SMALLEST, most=LARGEST), section.integer("k", most=ORDERS)
        if m % BLOCK:
            raise section.error("m", m, f"a multiple of {BLOCK}")
        unknown = sorted(set(section.values) - {"m", "k"})
        if unknown:
            raise section.error(one_line(unknown[0], 40), section.values[unknown[0]], "m and k alone")
        return EUGenSize(m, k)


class EUGen(nn.Module):
    """`out(concat over orders i of the product of i random projections of [x; 1; |x|])`, in place of a feed-forward block.

    One matrix holds all projections: `features` for x, its bias for the constant 1, `norm_column` for the norm. The norm
    enters as rms(x) = |x| / sqrt(hidden), whose squares half precision holds. Order 0 is the bias of `out`, the paper's g(W)
    merged with the linear map behind it. x: [..., hidden] -> [..., hidden].
    """

    def __init__(self, hidden: int, size: EUGenSize, outputs: int | None = None) -> None:
        super().__init__()
        self.size, self.root = size, hidden**-0.5
        self.features = Linear(hidden, size.factors * size.m, bias=True)
        self.norm_column = nn.Parameter(torch.empty(size.factors * size.m), requires_grad=False)
        self.out = Linear(size.k * size.m, outputs or hidden, bias=True)

    def projections(self, x: torch.Tensor) -> torch.Tensor:
        """The projections of [x; 1; rms(x)], those of order 1 first: [..., factors * m]."""
        scaled = x * self.root
        norm = torch.sqrt((scaled * scaled).sum(-1, keepdim=True))
        out: torch.Tensor = self.features(x) + self.norm_column.to(x.dtype) * norm
        return out

    def expand(self, x: torch.Tensor) -> torch.Tensor:
        """The features without the constant: [..., k * m], order 1 first."""
        m, at = self.size.m, 0
        projected = self.projections(x)
        orders: list[torch.Tensor] = []
        for order in range(1, self.size.k + 1):
            product = projected[..., at : at + m]
            for factor in range(1, order):
                product = product * projected[..., at + factor * m : at + (factor + 1) * m]
            orders.append(product)
            at += order * m
        return torch.cat(orders, -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.expand(x))
        return out


def sizes(config: dict[str, Any]) -> dict[str, EUGenSize]:
    """Module path -> size, by `edgewright.eugen` of config.json; {} without it. Raises UserError if it is malformed."""
    if CONFIG not in config:
        return {}
    section = ConfigReader(config, "").section(CONFIG)
    if KEY not in section.values:
        return {}
    entries = section.section(KEY)
    for path in entries.values:
        if not re.fullmatch(r"[\w.]{1,200}", path, re.ASCII):
            raise UserError(f"config.json: {CONFIG}.{KEY} names {one_line(path, 80)!r}, which is no path of a module")
    return {path: EUGenSize.read(entries.section(path)) for path in entries.values}


def place(model: nn.Module, config: dict[str, Any]) -> None:
    """Replace the blocks of `model` that config.json names by EUGens with unset parameters.

    Raises UserError for a path that is no gated feed-forward block of the model.
    """
    blocks = gated_mlps(model)
    for path, size in sizes(config).items():
        if path not in blocks:
            shown = one_line(path, 80)
            raise UserError(
                f"config.json: {CONFIG}.{KEY} names {shown!r}, which is no feed-forward block of this model"
            )
        model.set_submodule(path, eugen_for(blocks[path], size))


def kept_by(model: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    """`config` without the EUGens of layers that `model`, a shorter one, does not have."""
    paths = sizes(config)
    if not paths:
        return config
    blocks, ours = gated_mlps(model), config[CONFIG]
    return config | {CONFIG: ours | {KEY: {path: ours[KEY][path] for path in paths if path in blocks}}}


def gated_mlps(model: nn.Module) -> dict[str, GatedMLP]:
    """Path -> gated feed-forward block, in the model's order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, GatedMLP)}


def eugen_for(block: GatedMLP, size: EUGenSize) -> EUGen:
    """An EUGen with the inputs and outputs of `block` and unset parameters."""
    return EUGen(block.gate_proj.weight.shape[1], size, block.down_proj.weight.shape[0])
