"""RoPE (arXiv 2104.09864): from config.json to the inverse frequencies of a head, for every type that checkpoints use.

Types: default; linear scaling of positions; dynamic NTK; yarn (arXiv 2309.00071); longrope (arXiv 2402.13753); llama3, of Llama
3.1 and later; proportional, of Gemma 4; factors, of GGUF files, which divide each frequency. Each value is computed in the order
of operations of transformers, those of factors in llama.cpp's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import UserError
from .config import LONG_FACTORS, OURS, ConfigReader

KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional", "factors")
_ALIASES = {"su": "longrope", "mrope": "default"}  # without images the axes of mrope are one
_MOST_FACTORS = 4096


@dataclass(frozen=True)
class Rope:
    """One RoPE.

    Attributes:
        theta: base of the wavelengths.
        kind: one of `KINDS`.
        factor: how many times longer texts may be than in training.
        original: positions of the training; for yarn, longrope and llama3.
        low, high: of llama3 the factors of low and high frequencies; of yarn the slow and fast beta.
        truncate: yarn's range is cut to whole dimensions.
        factors: one for each frequency; longrope's are for texts of at most `original` tokens, or of more where `long`.
        attention: what a rotated query and a rotated key are each multiplied by.
        share: of proportional, the share of a head that rotates.
        long: longrope's factors are those for long texts.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original: int = 0
    low: float = 1.0
    high: float = 1.0
    truncate: bool = True
    factors: tuple[float, ...] = ()
    attention: float = 1.0
    share: float = 1.0
    long: bool = False

    def within(self, positions: int) -> int:
        """How many of so many positions these frequencies are right for."""
        return min(positions, self.original) if self.kind == "longrope" and not self.long else positions

    def frequencies(self, dims: int) -> torch.Tensor:
        """Inverse frequencies float32 [dims / 2] of `dims` rotated dimensions, on the CPU also under `torch.device("meta")`."""
        with torch.device("cpu"):
            plain = 1.0 / self._powers(dims)
            if self.kind == "linear":
                return plain / self.factor
            if self.kind == "llama3":
                return self._llama3(plain)
            if self.kind == "yarn":
                return self._yarn(dims)
            if self.kind in ("longrope", "factors"):
                if len(self.factors) != dims // 2:
                    raise UserError(
                        f"config.json: {len(self.factors)} factors of {self.kind} for {dims // 2} frequencies of a head"
                    )
                factors = torch.tensor(self.factors, dtype=torch.float32)
                if self.kind == "factors":
                    return plain / factors / self.factor
                return 1.0 / (factors * self._powers(dims))
            if self.kind == "proportional":
                turned = int(self.share * dims // 2)
                return torch.cat((plain[:turned], torch.zeros(dims // 2 - turned))) / self.factor
            return plain

    def _powers(self, dims: int) -> torch.Tensor:
        exponents = torch.arange(0, dims, 2, dtype=torch.float32) / dims
        return torch.pow(torch.tensor(self.theta), exponents)

    def _llama3(self, plain: torch.Tensor) -> torch.Tensor:
        wavelength = 2 * math.pi / plain
        longest, shortest = self.original / self.low, self.original / self.high
        scaled = torch.where(wavelength > longest, plain / self.factor, plain)
        smooth = (self.original / wavelength - self.low) / (self.high - self.low)
        between = (1 - smooth) * scaled / self.factor + smooth * scaled
        return torch.where((wavelength < shortest) | (wavelength > longest), scaled, between)

    def _yarn(self, dims: int) -> torch.Tensor:
        powers = self._powers(dims)

        def dimension(rotations: float) -> float:
            return dims * math.log(self.original / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = dimension(self.high), dimension(self.low)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dims - 1)
        if low == high:
            high += 0.001
        ramp = torch.clamp((torch.arange(dims // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
        kept = 1 - ramp
        return 1.0 / (self.factor * powers) * (1 - kept) + 1.0 / powers * kept


def read_rope(
    section: ConfigReader,
    default_theta: float,
    key: str | None = None,
    partial: bool = False,
    positions: int = 2048,
) -> Rope:
    """RoPE of the layers of type `key` (None: of all), from `rope_parameters`, nested by layer type or flat, or the older keys.

    partial: the caller reads `partial_rotary_factor` (`ConfigReader.rotated`); without it that key is refused, but for
    proportional. positions: where `max_position_embeddings` is absent. Raises UserError for a bad value, an unknown type, or
    two blocks that differ.
    """
    new, old = (_block(section, name) for name in ("rope_parameters", "rope_scaling"))
    new, old = _of_layer(section, new, key), _of_layer(section, old, key, older=True)
    local = key == "sliding_attention"
    theta_key = "rope_local_base_freq" if local else "rope_theta"
    theta = section.number(theta_key, default_theta, least=1.0)
    ropes = [
        _read(ConfigReader(block, f"{section.where}{name}."), section, theta, positions)
        for name, block in (("rope_scaling", old), ("rope_parameters", new))
        if block
    ]
    if not partial:
        for where in (section.values, new, old):
            share = where.get("partial_rotary_factor", 1.0)
            if share not in (1, None) and not (ropes and ropes[0].kind == "proportional"):
                raise section.error("partial_rotary_factor", share, "1 or nothing")
    if len(ropes) == 2 and ropes[0] != ropes[1]:
        raise section.error(
            "rope_scaling", old, "what rope_parameters says; the two differ, so keep the one that is meant"
        )
    return ropes[0] if ropes else Rope(theta)


def _block(section: ConfigReader, name: str) -> Mapping[str, Any]:
    value = section.values.get(name) or {}
    if not isinstance(value, dict):
        raise section.error(name, value, "an object")
    return value


def _of_layer(
    section: ConfigReader, block: Mapping[str, Any], key: str | None, older: bool = False
) -> Mapping[str, Any]:
    """The part of a block that is about layers of type `key`. A flat block is about the full layers alone."""
    if key is None:
        return block
    if any(isinstance(value, dict) for value in block.values()):
        part = block.get(key) or {}
        if not isinstance(part, dict):
            raise section.error(f"{'rope_scaling' if older else 'rope_parameters'}.{key}", part, "an object")
        return part
    return {} if key == "sliding_attention" else block


def _read(block: ConfigReader, section: ConfigReader, theta: float, positions: int) -> Rope:
    """The RoPE of a block. theta: where the block has none."""
    values = block.values
    kind = values.get("rope_type", values.get("type", "default"))
    kind = _ALIASES.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in KINDS:
        raise block.error("rope_type", kind, f"one of {', '.join(KINDS)}")
    rope = Rope(block.number("rope_theta", theta, least=1.0), kind)
    if kind == "default":
        return rope
    if kind == "dynamic":  # up to the trained length it is plain RoPE
        block.number("factor", 1.0, least=1e-6)
        return replace(rope, kind="default")
    if kind == "proportional":
        share = block.number("partial_rotary_factor", 1.0)
        if share > 1:
            raise block.error("partial_rotary_factor", share, "at most 1")
        return replace(rope, share=share, factor=block.number("factor", 1.0, least=1e-6))
    if kind == "linear":
        return replace(rope, factor=block.number("factor", least=1e-6))
    if kind == "factors":
        return replace(
            rope,
            factors=_factors(block, "factors"),
            factor=block.number("factor", 1.0, least=1e-6),
            attention=block.number("attention_factor", 1.0),
        )
    return _scaled(block, section, rope, positions)


def _scaled(block: ConfigReader, section: ConfigReader, rope: Rope, positions: int) -> Rope:
    """yarn, longrope and llama3, which know the positions of the training."""
    positions = section.integer("max_position_embeddings", positions)
    outer = section.values.get("original_max_position_embeddings")
    where = section if outer is not None else block
    original = where.integer("original_max_position_embeddings", positions)
    stretch = max(1.0, positions / original)
    if rope.kind == "llama3":
        low, high = block.number("low_freq_factor", least=1e-6), block.number("high_freq_factor", least=1e-6)
        if high <= low:
            raise block.error("high_freq_factor", high, f"more than low_freq_factor, {low:g}")
        return replace(rope, factor=block.number("factor", least=1e-6), original=original, low=low, high=high)
    if rope.kind == "yarn" and "factor" not in block.values:
        raise block.error("factor", None, "a number")
    factor = block.number("factor", stretch, least=1e-6)
    attention = block.number("attention_factor") if block.values.get("attention_factor") is not None else None
    if rope.kind == "yarn":
        if attention is None:
            attention = _mscale(block, factor)
        fast, slow = block.number("beta_fast", 32.0, least=1e-6), block.number("beta_slow", 1.0, least=1e-6)
        truncate = block.boolean("truncate", True)
        if rope.theta <= 1:
            raise block.error("rope_theta", rope.theta, "more than 1")
        return replace(
            rope, factor=factor, original=original, low=slow, high=fast, truncate=truncate, attention=attention
        )
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    short, beyond = (_factors(block, name) for name in ("short_factor", "long_factor"))
    long = OURS in section.values and section.section(OURS).boolean(LONG_FACTORS, False)
    return replace(rope, original=original, factors=beyond if long else short, attention=attention, long=long)


def _mscale(block: ConfigReader, factor: float) -> float:
    """yarn's attention factor where the config gives none."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    one, all_dims = (block.number(name, 0.0) for name in ("mscale", "mscale_all_dim"))
    return scale(one) / scale(all_dims) if one and all_dims else scale(1.0)


def _factors(block: ConfigReader, name: str) -> tuple[float, ...]:
    """A list of positive numbers. Its length is checked against the head's by whoever rotates."""
    value = block.values.get(name)
    good = isinstance(value, list) and 0 < len(value) <= _MOST_FACTORS
    if not good or not all(type(x) in (int, float) and 0 < x < 1e30 for x in value or ()):
        raise block.error(name, value, "a list of positive numbers")
    return tuple(float(x) for x in value or ())
