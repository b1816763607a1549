"""A LoRA adapter (arXiv 2106.09685) of PEFT, merged onto a checkpoint: W + scale * B A, computed row by row in float32."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import UserError
from ..system.reading import one_line, read_json_object, shown
from .adapter_config import CONFIG, MERGED, Settings, number_of, settings_of
from .checkpoint import WEIGHT_DTYPES, Checkpoint, TensorInfo, TensorStore
from .names import PREFIXES
from .safetensors_reader import SafetensorsStore

WEIGHTS = ("adapter_model.safetensors", "adapters.safetensors")
"""The weights of a PEFT adapter, and of mlx-lm's."""

_PICKLE = "adapter_model.bin"
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
_COPY = re.compile(r"base_model\.model\.(.+?)(?:\.base_layer)?\.weight")
_CHUNK = 2 << 20  # values computed at a time


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
        settings = settings_of(read_json_object(directory / CONFIG))
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


def _changes(own: TensorStore, settings: Settings, base: TensorStore) -> dict[str, _Change]:
    """Name of a weight of the base -> what is added to it. Raises UserError for a tensor of the adapter that has no place."""
    names = _by_module(base)
    pairs: dict[str, dict[str, str]] = {}
    for name in own.infos:
        match = _TENSOR.fullmatch(name)
        if match is None:
            _require_copy(own, name, base, names)
            continue
        if match[2] in pairs.setdefault(match[1], {}):
            raise UserError(f"{one_line(match[1])} has two lora_{match[2]}")
        pairs[match[1]][match[2]] = name
    changes: dict[str, _Change] = {}
    for module, pair in pairs.items():
        weight = names.get(_canonical(module + ".weight"))
        if weight is None or weight in changes:
            raise UserError(
                f"the model has no weight {one_line(module)}.weight, which it changes; is it the adapter of this -m?"
            )
        if len(pair) < 2:
            raise UserError(f"{one_line(module)} has lora_{next(iter(pair))} alone; is the file whole?")
        changes[weight] = _change(own, settings, base.infos[weight], module, pair)
    if not changes:
        raise UserError("it changes no weight; is the file whole?")
    return changes


def _require_copy(own: TensorStore, name: str, base: TensorStore, names: Mapping[str, str | None]) -> None:
    """Raises UserError for a tensor that is no LoRA's, unless it is the base's, as PEFT copies a head or an embedding."""
    match = _COPY.fullmatch(name)
    weight = names.get(_canonical(match[1] + ".weight")) if match else None
    if weight is None or ".lora_" in name:
        raise UserError(f"{one_line(name)} is no A or B of a LoRA of a linear, and is not merged here; {MERGED}")
    info, other = own.infos[name], base.infos[weight]
    step = max(1, _CHUNK // max(1, *info.shape[1:], 1))
    starts = range(0, info.shape[0], step) if info.shape else ()
    same = info.shape == other.shape and {info.dtype, other.dtype} <= set(WEIGHT_DTYPES)
    if not same or not all(torch.equal(own.rows(name, i, i + step), base.rows(weight, i, i + step)) for i in starts):
        raise UserError(f"{one_line(name)} is a weight that was trained whole, which is not merged here; {MERGED}")


def _change(own: TensorStore, settings: Settings, weight: TensorInfo, module: str, pair: Mapping[str, str]) -> _Change:
    down, up = own.infos[pair["A"]], own.infos[pair["B"]]
    rank = int(number_of(settings.ranks, module, settings.rank))
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
