"""compressed-tensors, of llm-compressor and vLLM: integers packed or one a byte, FP8, and weights that are yet to be rounded.

Packed codes are `weight_packed` [out, words], a bit stream a row, of values raised by half their range; `weight_shape` is
[out, in]. Which of the block's groups of settings a weight has is told by its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..checkpoint import TensorStore
from .bits import scaled, stream_words, unpack
from .block import Block, grouping
from .fp8 import ACTIVATIONS, unused
from .parts import FLOAT8, FLOATS, INT32, Found, Parts, Weight, group_index, modules
from .tiled import Tiling, block_sizes, times_scales, to_be_rounded, written

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
_PLAIN = ("dense", "fakequant")
_STRATEGIES = ("tensor", "channel", "group", "block")
_UNUSED = (*ACTIVATIONS, "input_zero_point", "output_zero_point", "weight_observer_min", "weight_observer_max")


@dataclass(frozen=True)
class _Setting:
    """How the weights of a group of modules are quantized."""

    bits: int
    kind: str
    tiling: Tiling
    symmetric: bool


def find(store: TensorStore, block: Block) -> Found:
    """The weights of a compressed-tensors checkpoint. Raises UserError for a format that is not read, and parts that do not fit."""
    sparse = block.inner("sparsity_config")
    if sparse is not None and sparse.values:
        sparse.word("format", "dense", ("dense",))
    block = block.inner("quantization_config") or block  # as SparseML nests it
    status = block.word(
        "quantization_status", "compressed", ("initialized", "calibration", "frozen", "compressed", "decompressed")
    )
    chosen = block.word("format", "dense", (*_FORMATS, *_PLAIN))
    settings = _settings(block)
    weights: dict[str, Weight] = {}
    plain: set[str] = set()
    for stem in modules(store, "weight_packed"):
        weights[stem + "weight"] = _packed(Parts(store, stem), settings)
    for stem in modules(store, "weight_scale"):
        if stem + "weight" in weights:
            continue
        weight = store.infos.get(stem + "weight")
        if weight is not None and weight.dtype in FLOATS and (status != "compressed" or chosen in _PLAIN):
            if status == "decompressed":
                plain |= {stem + leaf for leaf in ("weight_scale", "weight_zero_point", *_UNUSED)}
            else:
                weights[stem + "weight"] = _not_rounded(Parts(store, stem), settings)
            continue
        weights[stem + "weight"] = _bytes(Parts(store, stem), settings)
    widths = sorted({f"{s.bits} bits {_covered(s.tiling)}" for s in settings})
    return Found(weights, f"compressed-tensors {chosen}, {' and '.join(widths)}", unused(store) | plain)


def _covered(tiling: Tiling) -> str:
    if tiling.rows > 1:
        return f"in blocks of {tiling.rows} by {tiling.columns}"
    return grouping(tiling.columns) if tiling.rows else "with one scale a weight"


def _settings(block: Block) -> list[_Setting]:
    groups = block.inner("config_groups")
    settings: list[_Setting] = []
    for name in groups.values if groups is not None else ():
        assert groups is not None
        group = groups.inner(name)
        arguments = group.inner("weights") if group is not None else None
        if group is None or arguments is None:
            continue
        group.word("format", "dense", (*_FORMATS, *_PLAIN))
        settings.append(_setting(arguments))
    if not settings:
        raise block.error("config_groups", "groups of settings for weights are expected")
    return settings


def _setting(arguments: Block) -> _Setting:
    kind = arguments.word("type", "int", ("int", "float"))
    bits = arguments.integer("num_bits", (8,) if kind == "float" else range(2, 9))
    group = arguments.group("group_size", -1)
    default = "group" if group else "tensor" if arguments.values.get("group_size") is None else "channel"
    strategy = arguments.word("strategy", default, _STRATEGIES)
    symmetric = arguments.values.get("symmetric", True) is True
    if strategy == "group" and not group:
        raise arguments.error("group_size", "the strategy is group")
    if strategy == "block":
        tiling = block_sizes(arguments, "block_structure")
        if tiling is None:
            raise arguments.error("block_structure", "the strategy is block")
        return _Setting(bits, kind, tiling, symmetric)
    known = {"tensor": Tiling(0, 0), "channel": Tiling(1, 0), "group": Tiling(1, group)}
    return _Setting(bits, kind, known[strategy], symmetric)


def _packed(parts: Parts, settings: list[_Setting]) -> Weight:
    out, words = parts.take("weight_packed", INT32, (None, None)).shape
    parts.take("weight_shape", (torch.int64, torch.int32), (2,))
    rows_said, width = (int(n) for n in parts.read("weight_shape"))
    stored = parts.store.infos.get(parts.stem + "weight_scale")
    for setting in settings:
        grid = setting.tiling.shape(out, width) if rows_said == out and width > 0 else None
        if setting.kind != "int" or stream_words(max(width, 1), setting.bits) != words or stored is None:
            continue
        if grid is not None and stored.shape in written(grid) and setting.tiling.rows < 2:
            return _stream(parts, setting, (out, width), grid)
    shown = None if stored is None else list(stored.shape)
    raise parts.error(
        f"weight_shape {[rows_said, width]}, {words} words a row and scales {shown} fit none of the block's config_groups"
    )


def _stream(parts: Parts, setting: _Setting, shape: tuple[int, int], grid: tuple[int, int]) -> Weight:
    (out, width), bits, half = shape, setting.bits, 1 << (setting.bits - 1)
    size, groups = setting.tiling.columns or width, grid[1]
    parts.take("weight_scale", FLOATS, *written(grid))
    parts.drop(*_UNUSED)
    zeros: Callable[[int, int], torch.Tensor] | None = None
    if parts.has("weight_zero_point"):
        zeros = _zero_points(parts, bits, out, grid)
    elif not setting.symmetric:
        parts.take("weight_zero_point", INT32)
    index = _index(parts, width, groups, size)

    def rows(start: int, stop: int) -> torch.Tensor:
        codes = unpack(parts.read("weight_packed")[start:stop], bits, width)
        row = torch.arange(start, stop) if grid[0] == out else torch.zeros(stop - start, dtype=torch.int64)
        scales = parts.read("weight_scale").reshape(grid)[row].float()
        points = torch.zeros_like(scales) if zeros is None else zeros(start, stop)
        return scaled(codes, scales, points + half, size, index())

    return parts.weight((out, width), f"packed {bits} {size}", rows)


def _index(parts: Parts, width: int, groups: int, size: int) -> Callable[[], torch.Tensor | None]:
    """Which group a column is in, where a file says so; -1 says that all are in order."""
    if not parts.has("weight_g_idx"):
        return lambda: None
    parts.take("weight_g_idx", (torch.int32, torch.int64), (width,))
    checked = group_index(parts, "weight_g_idx", groups, size)
    return lambda: None if bool((parts.read("weight_g_idx") == -1).any()) else checked()


def _zero_points(parts: Parts, bits: int, out: int, grid: tuple[int, int]) -> Callable[[int, int], torch.Tensor]:
    """Reads the zero points of rows start..stop, float32 [stop - start, groups]: a byte each, or bit streams along the rows."""
    rows, groups = grid
    plain = parts.store.infos[parts.stem + "weight_zero_point"].dtype == torch.int8
    if plain or rows != out:
        parts.take("weight_zero_point", (torch.int8, torch.int32), *written(grid))

        def one_each(start: int, stop: int) -> torch.Tensor:
            row = torch.arange(start, stop) if rows == out else torch.zeros(stop - start, dtype=torch.int64)
            return parts.read("weight_zero_point").reshape(grid)[row].float()

        return one_each
    parts.take("weight_zero_point", INT32, (stream_words(out, bits), groups))

    def streams(start: int, stop: int) -> torch.Tensor:
        first = start // 32  # 32 codes fill `bits` whole words
        words = parts.read("weight_zero_point")[first * bits : -(-stop // 32) * bits].t()
        codes = unpack(words, bits, stop - first * 32)[:, start - first * 32 :]
        return codes.t().float() - (1 << (bits - 1))

    return streams


def _bytes(parts: Parts, settings: list[_Setting]) -> Weight:
    """One code a byte, int8 or FP8."""
    info = parts.store.infos.get(parts.stem + "weight")
    kind = "int" if info is not None and info.dtype == torch.int8 else "float"
    fitting = [s.tiling for s in settings if s.kind == kind]
    if not fitting:
        raise parts.error(f"weight_scale belongs to {kind} codes of 8 bits, of which config_groups says nothing")
    parts.drop(*_UNUSED)
    dtypes = (torch.int8,) if kind == "int" else FLOAT8
    return times_scales(parts, "weight_scale", dtypes, fitting, parts.has("weight_zero_point"))


def _not_rounded(parts: Parts, settings: list[_Setting]) -> Weight:
    """A float weight that its runtime rounds whenever it computes."""
    if len({(s.kind, s.bits) for s in settings}) > 1:
        raise parts.error(
            "several widths in config_groups, and the weights are not rounded to them yet; save it compressed"
        )
    parts.drop(*_UNUSED)
    tilings = [s.tiling for s in settings]
    return to_be_rounded(parts, settings[0].kind, settings[0].bits, tilings, parts.has("weight_zero_point"))
