"""Reading a section of config.json: each value is typed and bounded, each fault is one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from ..system.reading import shown

OURS = "edgewright"
"""The object of config.json that holds keys of this product."""

LONG_FACTORS = "long_factors"
"""Key of `OURS`: longrope takes its long factors, for every position."""

# No real model is near it; a hostile config must not lead to huge shapes or endless loops.
_MOST = 1 << 24


class ConfigReader:
    """One object of config.json. Its methods raise UserError for a bad value, with the key and the value.

    where: the path of the object, before the key in errors.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def error(self, key: str, value: object, want: str) -> UserError:
        return UserError(f"config.json: {self.where}{key} is {shown(value)}, expected {want}")

    def integer(self, key: str, default: int | None = None, least: int = 1, most: int = _MOST) -> int:
        value = self.values.get(key, default)
        if value is None and default is not None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.error(key, value, f"an integer from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None, least: float = 0.0) -> float:
        value = self.values.get(key, default)
        if value is None and default is not None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < 1e30:
            raise self.error(key, value, f"a number of at least {least:g}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """As `boolean`; a null is false, as transformers takes it."""
        return False if key in self.values and self.values[key] is None else self.boolean(key, default)

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise self.error(key, value, "a string")
        return value

    def token(self, key: str, default: int | None = None) -> int | None:
        """A token id, the first of a list of them, or None where the config has none."""
        value = self.values.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _MOST:
            raise self.error(key, value, "a token id")
        return value

    def section(self, key: str) -> ConfigReader:
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.error(key, value, "an object")
        return ConfigReader(value, f"{self.where}{key}.")

    def divisor(self, key: str, of: int, default: int | None = None) -> int:
        """A number, of groups or heads, that divides `of`."""
        value = self.integer(key, default, most=of)
        if of % value:
            raise self.error(key, value, f"a divisor of {of}")
        return value

    def absent(self, *keys: str) -> None:
        """Raises UserError if a feature that the family does not compute is switched on."""
        for key in keys:
            if self.values.get(key) not in (None, False, 0):
                raise self.error(key, self.values[key], "nothing: this feature is not supported")

    def kv_heads(self, heads: int, default: int | None = None) -> int:
        """`num_key_value_heads`, a divisor of `heads`; where the key is absent `default`, or as many as `heads`."""
        value = self.integer("num_key_value_heads", heads if default is None else default, most=4096)
        if heads % value:
            raise self.error("num_key_value_heads", value, f"a divisor of {heads} heads")
        return value

    def head_dim(self, default: int | None) -> int:
        """`head_dim`, a multiple of 8, which the attention kernels need."""
        value = self.integer("head_dim", default, most=4096)
        if value % 8:
            raise self.error("head_dim", value, "a multiple of 8")
        return value

    def window(self, types: list[str]) -> int:
        """`sliding_window`; 0 if no layer slides, 4096 if the key is absent."""
        if "sliding_attention" not in types:
            return 0
        return self.integer("sliding_window") if "sliding_window" in self.values else 4096

    def layer_types(self, layers: int, pattern: int) -> list[str]:
        """`layer_types`; if absent, every `pattern`-th layer is full and the others slide."""
        default = ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)]
        return self.kinds(layers, ("full_attention", "sliding_attention"), default)

    def kinds(self, layers: int, known: tuple[str, str], default: list[str]) -> list[str]:
        """`layer_types`, each one of the two `known`; `default` if the key is absent."""
        value = self.values.get("layer_types")
        if value is None:
            return default
        if not isinstance(value, list) or len(value) != layers or not all(t in known for t in value):
            raise self.error("layer_types", value, f"{layers} times '{known[0]}' or '{known[1]}'")
        return value

    def rotated(self, head_dim: int, default: float = 1.0) -> int:
        """How many dimensions of a head rotate, by `partial_rotary_factor`. Call `read_rope` with `partial=True` beside it."""
        params = self.values.get("rope_parameters")
        inner = ConfigReader(params if isinstance(params, dict) else {}, f"{self.where}rope_parameters.")
        section = inner if inner.values.get("partial_rotary_factor") is not None else self
        share = section.number("partial_rotary_factor", default)
        dims = int(head_dim * share)
        if not 2 <= dims <= head_dim or dims % 2:
            raise section.error("partial_rotary_factor", share, f"a share of {head_dim} that is even and at least 2")
        return dims


class StackKeys:
    """The keys that most stacks of layers have, under Llama's names.

    positions, head_dim, kv_heads, eps: defaults; where they are None, heads of hidden / heads dimensions, and as many key heads
    as heads. intermediate: the key of the feed-forward's width.
    """

    def __init__(
        self,
        section: ConfigReader,
        positions: int,
        head_dim: int | None = None,
        kv_heads: int | None = None,
        eps: float = 1e-6,
        intermediate: str = "intermediate_size",
    ) -> None:
        self.vocab = section.integer("vocab_size")
        self.hidden = section.integer("hidden_size")
        self.intermediate = section.integer(intermediate)
        self.layers = section.integer("num_hidden_layers", most=1024)
        self.heads = section.integer("num_attention_heads", most=4096)
        self.kv_heads = section.kv_heads(self.heads, kv_heads)
        self.head_dim = section.head_dim(self.hidden // self.heads if head_dim is None else head_dim)
        self.eps = section.number("rms_norm_eps", eps)
        self.max_positions = section.integer("max_position_embeddings", positions)
