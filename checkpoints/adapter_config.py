"""What a PEFT adapter's adapter_config.json says of its LoRAs. What would change their arithmetic and is not read is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

from ..errors import UserError
from ..system.reading import one_line, shown

CONFIG = "adapter_config.json"
MERGED = "merge it where it was trained (PEFT's merge_and_unload, then save_pretrained), and give the merged model"

_PATTERN = re.compile(r"\^?[\w.\\-]+", re.ASCII)
_MOST_RANK = 1 << 14

# Keys that say how an adapter was trained, or what it is called: the weights are the same without them.
_HARMLESS = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    *("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform", "lora_dropout", "runtime_config"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "megatron_core", "qalora_group_size"),
    *("alora_invocation_string", "ensure_weight_tying", "task_type"),
)
_READ = (
    *("alpha_pattern", "bias", "fan_in_fan_out", "init_lora_weights", "lora_alpha", "r", "rank_pattern"),
    *("use_rslora",),
)
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Settings:
    """What adapter_config.json says. ranks, alphas: end of a module's name -> its own rank or alpha.

    stabilised: the scale is alpha / sqrt(rank) (arXiv 2312.03732). transposed: the base's weights are [in, out].
    """

    rank: int
    alpha: float
    stabilised: bool
    transposed: bool
    ranks: Mapping[str, float]
    alphas: Mapping[str, float]

    def scale(self, module: str, rank: int) -> float:
        """What B A of a module is multiplied by."""
        alpha = number_of(self.alphas, module, self.alpha)
        return alpha / sqrt(rank) if self.stabilised else alpha / rank


def settings_of(values: dict[str, Any]) -> Settings:
    """What the contents of adapter_config.json say. Raises UserError for all that is not a plain LoRA of linears."""
    kind = values.get("peft_type")
    if not isinstance(kind, str) or kind.upper() != "LORA":
        raise UserError(f"{CONFIG}: peft_type is {shown(kind, 40)}, and LORA alone is merged here; {MERGED}")
    for key in sorted(values.keys() - {*_HARMLESS, *_READ}):
        if values[key]:
            raise UserError(
                f"{CONFIG}: {one_line(key, 40)} is {shown(values[key], 60)}, which is not read here; {MERGED}"
            )
    if values.get("bias", "none") != "none":
        raise UserError(f"{CONFIG}: bias is {shown(values['bias'], 40)}: trained biases are not merged here; {MERGED}")
    start = values.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise UserError(
            f"{CONFIG}: init_lora_weights is {shown(start, 40)}, which changes the base's weights, too; {MERGED}"
        )
    rank = _number(values, "r", 8)
    if rank != int(rank):
        raise UserError(f"{CONFIG}: r is {shown(values['r'], 40)}, expected a whole number")
    return Settings(
        rank=int(rank),
        alpha=_number(values, "lora_alpha", 8),
        stabilised=_flag(values, "use_rslora"),
        transposed=_flag(values, "fan_in_fan_out"),
        ranks=_patterns(values, "rank_pattern"),
        alphas=_patterns(values, "alpha_pattern"),
    )


def _number(values: Mapping[str, Any], key: str, default: float) -> float:
    value = values.get(key, default)
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not 0 < value <= _MOST_RANK
        or not isfinite(value)
    ):
        raise UserError(f"{CONFIG}: {one_line(key, 60)} is {shown(value, 40)}, expected a number up to {_MOST_RANK}")
    return float(value)


def _flag(values: Mapping[str, Any], key: str) -> bool:
    value = values.get(key, False)
    if not isinstance(value, bool):
        raise UserError(f"{CONFIG}: {key} is {shown(value, 40)}, expected true or false")
    return value


def _patterns(values: Mapping[str, Any], key: str) -> dict[str, float]:
    """Ends of modules' names -> a number. PEFT takes regular expressions; plain names, which are what it writes, are read here."""
    patterns = values.get(key) or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{CONFIG}: {key} is {shown(patterns, 40)}, expected an object")
    for pattern in patterns:
        if not _PATTERN.fullmatch(pattern) or re.search(r"\\[^.]|\\$", pattern):
            raise UserError(f"{CONFIG}: {key} has {shown(pattern, 60)}: names of modules alone are read here; {MERGED}")
    return {pattern.replace("\\", ""): _number(patterns, pattern, 0) for pattern in patterns}


def number_of(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The number of the first pattern that is the module's name, or an end of it behind a dot."""
    for pattern, value in patterns.items():
        name = pattern.removeprefix("^")
        if module == name or (name == pattern and module.endswith("." + name)):
            return value
    return default
