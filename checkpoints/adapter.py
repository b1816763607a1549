"""A LoRA adapter (arXiv 2106.09685) of PEFT, merged onto a checkpoint: W + scale * B A, computed row by row in float32."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..system.reading import one_line, read_json_object, shown
from .checkpoint import WEIGHT_DTYPES, Checkpoint, TensorInfo, TensorStore
from .names import PREFIXES
from .safetensors_reader import SafetensorsStore

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapters.safetensors")
"""The weights of a PEFT adapter, and of mlx-lm's."""

_PICKLE = "adapter_model.bin"
_MERGED = "merge it where it was trained (PEFT's merge_and_unload, then save_pretrained), and give the merged model"
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
_PATTERN = re.compile(r"\^?[\w.\\-]+", re.ASCII)
_MOST_RANK = 1 << 14
_CHUNK = 2 << 20  # values computed at a time

# Keys that say how an adapter was trained, or what it is called: the weights are the same without them.
_HARMLESS = frozenset(
    [
        "alora_invocation_string",
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "lora_ga_config",
        "ensure_weight_tying",
    ]
)
_READ = frozenset(
    ["alpha_pattern", "bias", "fan_in_fan_out", "init_lora_weights", "lora_alpha", "r", "rank_pattern", "use_rslora"]
)
_OWN_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "true_dora")


@dataclass(frozen=True)
class _Settings:
    """What adapter_config.json says. patterns: rank or alpha of the modules that a name is the end of."""

    rank: int
    alpha: float
    stabilised: bool
    transposed: bool
    ranks: Mapping[str, float]
    alphas: Mapping[str, float]

    def scale(self, module: str, rank: int) -> float:
        alpha = _of(self.alphas, module, self.alpha)
        return alpha / sqrt(rank) if self.stabilised else alpha / rank


@dataclass(frozen=True)
class _Change:
    """What is added to a weight: `scale` * B A, or its transpose."""

    down: str
    up: str
    scale: float
    transposed: bool


def adapted(checkpoint: Checkpoint, folder: str) -> Checkpoint:
    """The checkpoint with the adapter in `folder` merged. Raises UserError for an adapter that is not read, or of another model."""
    directory = Path(folder).expanduser()
    if not (directory / CONFIG).is_file():
        raise UserError(f"--adapter {one_line(folder)}: no {CONFIG} there; give the folder of a PEFT adapter")
    try:
        settings = _settings(read_json_object(directory / CONFIG))
        if not (directory / WEIGHTS[0]).is_file():
            pickled = (
                f", and {_PICKLE} is a pickle, which can run code when read" if (directory / _PICKLE).exists() else ""
            )
            raise UserError(f"no {WEIGHTS[0]}{pickled}; save the adapter as safetensors (PEFT's save_pretrained does)")
        own = SafetensorsStore(directory, {WEIGHTS[0]: set()})
        changes = _changes(own, settings, checkpoint.store)
    except UserError as error:
        raise UserError(f"--adapter {one_line(folder)}: {error}") from None
    store = AdaptedStore(checkpoint.store, own, changes)
    line = f"the adapter {one_line(folder)} (LoRA, rank {settings.rank}) is merged into {len(changes)} weights"
    return checkpoint.changed(store=store, notes=(*checkpoint.notes, line), adapter=folder)


def explain_adapter(source: str, directory: Path, weights: bool) -> str | None:
    """A line about an adapter that lies in a model's folder. Raises UserError where the folder has no other weights."""
    if not (directory / CONFIG).is_file():
        return None
    if weights:
        return (
            f"an adapter lies in {one_line(source)}, which is not applied; to merge it: --adapter {one_line(directory)}"
        )
    base = read_json_object(directory / CONFIG).get("base_model_name_or_path")
    named = shown(base, 120) if isinstance(base, str) and base else "a model that its config does not name"
    raise UserError(
        f"{one_line(source)} is a LoRA adapter of {named}, not a model; give that model as -m, and this folder as --adapter"
    )


def _settings(values: dict[str, Any]) -> _Settings:
    kind = values.get("peft_type")
    if not isinstance(kind, str) or kind.upper() != "LORA":
        raise UserError(f"{CONFIG}: peft_type is {shown(kind, 40)}, and LORA alone is merged here; {_MERGED}")
    for key in sorted(values.keys() - _HARMLESS - _READ):
        if values[key]:
            raise UserError(
                f"{CONFIG}: {one_line(key, 40)} is {shown(values[key], 60)}, which is not read here; {_MERGED}"
            )
    if values.get("bias", "none") != "none":
        raise UserError(f"{CONFIG}: bias is {shown(values['bias'], 40)}: trained biases are not merged here; {_MERGED}")
    start = values.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_OWN_BASE):
        raise UserError(
            f"{CONFIG}: init_lora_weights is {shown(start, 40)}, which changes the base's weights, too; {_MERGED}"
        )
    rank = _number(values, "r", 8)
    if rank != int(rank):
        raise UserError(f"{CONFIG}: r is {shown(values['r'], 40)}, expected a whole number")
    return _Settings(
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
            raise UserError(
                f"{CONFIG}: {key} has {shown(pattern, 60)}: names of modules alone are read here; {_MERGED}"
            )
    return {pattern.replace("\\", ""): _number(patterns, pattern, 0) for pattern in patterns}


def _of(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The number of the first pattern that is the module's name, or an end of it behind a dot."""
    for pattern, value in patterns.items():
        name = pattern.removeprefix("^")
        if module == name or (name == pattern and module.endswith("." + name)):
            return value
    return default


def _changes(own: TensorStore, settings: _Settings, base: TensorStore) -> dict[str, _Change]:
    """Name of a weight of the base -> what is added to it. Raises UserError for a tensor of the adapter that has no place."""
    pairs: dict[str, dict[str, str]] = {}
    for name in own.infos:
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise UserError(f"{one_line(name)} is no A or B of a LoRA of a linear, and is not merged here; {_MERGED}")
        if match[2] in pairs.setdefault(match[1], {}):
            raise UserError(f"{one_line(match[1])} has two lora_{match[2]}")
        pairs[match[1]][match[2]] = name
    names = _by_module(base)
    changes: dict[str, _Change] = {}
    for module, pair in pairs.items():
        weight = names.get(_canonical(module + ".weight"))
        if weight is None or weight in changes:
            raise UserError(
                f"the model has no weight {one_line(module)}.weight, which the adapter changes; is it the right -m?"
            )
        if len(pair) < 2:
            raise UserError(f"{one_line(module)} has lora_{next(iter(pair))} alone; is the file whole?")
        changes[weight] = _change(own, settings, base.infos[weight], module, pair)
    return changes


def _change(own: TensorStore, settings: _Settings, weight: TensorInfo, module: str, pair: Mapping[str, str]) -> _Change:
    down, up = own.infos[pair["A"]], own.infos[pair["B"]]
    rank = int(_of(settings.ranks, module, settings.rank))
    shape = tuple(reversed(weight.shape)) if settings.transposed else weight.shape
    fits = len(shape) == 2 and down.shape == (rank, shape[1]) and up.shape == (shape[0], rank)
    if not fits or not {down.dtype, up.dtype, weight.dtype} <= set(WEIGHT_DTYPES):
        raise UserError(
            f"{one_line(module)}: A {list(down.shape)} and B {list(up.shape)} of rank {rank} do not fit "
            f"{one_line(weight.name)} {list(weight.shape)} ({weight.dtype}); is it the adapter of this model?"
        )
    return _Change(pair["A"], pair["B"], settings.scale(module, rank), settings.transposed)


def _by_module(base: TensorStore) -> dict[str, str | None]:
    """A weight's name as an adapter may call it -> its name; None where two have one."""
    names: dict[str, str | None] = {}
    for name in base.infos:
        key = _canonical(name)
        names[key] = None if key in names else name
    return names


def _canonical(name: str) -> str:
    """The name without what stands before it in files of other versions of transformers, and of models without a head."""
    for old, new in PREFIXES:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name if name.startswith(("model.", "lm_head.")) else "model." + name


class AdaptedStore:
    """The tensors of `base`, some of them changed by an adapter, which are float32 then."""

    def __init__(self, base: TensorStore, adapter: TensorStore, changes: Mapping[str, _Change]) -> None:
        self._base, self._adapter, self._changes = base, adapter, changes
        self.infos = {
            name: TensorInfo(name, torch.float32, info.shape) if name in changes else info
            for name, info in base.infos.items()
        }

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self._base.files, *self._adapter.files)

    def tensor(self, name: str) -> torch.Tensor:
        if name not in self._changes:
            return self._base.tensor(name)
        rows, width = self.infos[name].shape
        out = torch.empty((rows, width))
        step = max(1, _CHUNK // max(1, width))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            out[start:stop] = self.rows(name, start, stop)
        return out

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        values = self._base.rows(name, start, stop)
        change = self._changes.get(name)
        if change is None:
            return values
        down, up = self._adapter.tensor(change.down), self._adapter.tensor(change.up)
        left, right = (down[:, start:stop].t(), up.t()) if change.transposed else (up[start:stop], down)
        return torch.addmm(values, left.float(), right.float(), alpha=change.scale)

    def sample(self, name: str) -> bytes:
        change = self._changes.get(name)
        if change is None:
            return self._base.sample(name)
        parts = (self._adapter.sample(part) for part in (change.down, change.up))
        return b"".join((self._base.sample(name), repr(change.scale).encode(), *parts))
