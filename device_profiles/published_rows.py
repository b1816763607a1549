"""Tables of published speeds: one row a model, precision, device, runtime, context and unit; and the sizes of their models.

The rows that ship are those of qai-hub-models 0.65.0 (BSD-3). What is known to be wrong in them is put right or left out here,
once."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..system.reading import MEBIBYTE, nearest, one_line, read_text, shown
from .profile import DeviceProfile, list_profiles
from .work import DecoderShape, Work, decode_work, prefill_work

_DATA = Path(__file__).parent / "data"
SHIPPED_ROWS = _DATA / "published_latency.csv"
SHIPPED_MODELS = _DATA / "published_models.csv"
_SIZE_LIMIT = 16 * MEBIBYTE
_COLUMNS = ("model", "precision", "device", "runtime", "ctx", "unit", "decode_tps", "prefill_tps", "ttft_min_ms")

_PROMPT_MARGIN = 128  # tokens that the prompts of the published rows leave free in their context
_STATIC_CHUNK = 128  # tokens that Qualcomm's runtimes take at once
_CHUNK = 512  # and llama.cpp


@dataclass(frozen=True)
class _Precision:
    """How a published precision stores weights: bits of the layers and of the head, and what it multiplies them with."""

    weight_format: str
    activations: str
    body_bits: float
    head_bits: float


PRECISIONS = {
    "q4_0": _Precision("q4_0", "int8", 4.5, 6.5625),
    "q8_0": _Precision("q8_0", "int8", 8.5, 8.5),
    "mxfp4": _Precision("mxfp4", "int8", 4.25, 8.5),
    "w4a16": _Precision("int4-channel", "int16", 4.0, 8.0),
    "w4": _Precision("int4-channel", "float16", 4.0, 8.0),
    "w8a16": _Precision("int8-channel", "int16", 8.0, 8.0),
}
"""Precision of the tables -> storage. Files of Q4_0 keep the embedding, which is the head where it is tied, in Q6_K."""

_PADDED_PROMPT = ("genie", "qnn_context_binary")
"""Runtimes whose prefill rate divides a short prompt by a whole chunk; a chunk over the least time to a first token is the rate."""

_SPECULATIVE = "_ssd"
"""Models so named generate several tokens a step: their decode rate is not that of a step."""


@dataclass(frozen=True)
class Model:
    """A model of the tables. group: models of one architecture have one, and are held out together.

    step_bytes, prompt_bytes: of the layers' weights that a token and a chunk of a prompt read, where they are not all of them
    (experts)."""

    name: str
    group: str
    shape: DecoderShape
    step_bytes: float = 0
    prompt_bytes: float = 0


@dataclass(frozen=True)
class Published:
    """One row. tokens_per_second: by phase; a phase that failed or means something else has none."""

    model: str
    group: str
    device: str
    kind: str
    runtime: str
    unit: str
    precision: str
    context: int
    tokens_per_second: Mapping[str, float]
    work: Mapping[str, Work]

    @property
    def key(self) -> tuple[str, str]:
        return self.runtime, self.unit


def read_models(path: Path = SHIPPED_MODELS) -> dict[str, Model]:
    """Name -> sizes; a model whose sizes are unknown is left out. Raises UserError for a file that is not such a table."""
    models = {}
    for line, row in _rows(path, ("model", "arch_group", "layers", "body_params")):
        if not row["layers"]:
            continue

        def number(key: str, row: dict[str, str] = row, line: int = line) -> float:
            return _number(path, line, row, key)

        experts = "MoE" in row.get("note", "")
        shape = DecoderShape(
            layers=int(number("layers")),
            attention_layers=int(number("attn_layers")),
            recurrent_layers=int(number("recurrent_layers")),
            heads=max(1, int(number("heads"))),
            kv_heads=max(1, int(number("kv_heads"))),
            head_dim=max(1, int(number("head_dim"))),
            body=number("body_params"),
            head=number("head_params"),
            window=int(number("window")),
            window_layers=int(number("window_layers")),
            global_head_dim=2 * int(number("head_dim")) if row["arch_group"].startswith("gemma4") else 0,
            state_bytes=number("state_bytes"),
            expert_layers=int(number("layers")) if experts else 0,
        )
        name, group = row["model"], row["arch_group"]
        models[name] = Model(name, group, shape, number("q4_weight_bytes"), number("prompt_weight_bytes"))
    return models


def read_rows(
    path: Path = SHIPPED_ROWS, models: Mapping[str, Model] | None = None
) -> tuple[list[Published], list[str]]:
    """The rows that can be compared, one measurement once, and a line for each kind that was left out.

    Raises UserError for a file that is not such a table, and for one of which no row can be used.
    """
    known = read_models() if models is None else models
    devices = published_devices()
    rows: list[Published] = []
    left: dict[str, int] = {}
    seen: set[tuple[object, ...]] = set()

    def leave_out(why: str) -> None:
        left[why] = left.get(why, 0) + 1

    for line, row in _rows(path, _COLUMNS):
        model, precision = known.get(row["model"]), PRECISIONS.get(row["precision"])
        if model is None:
            leave_out(f"the sizes of {one_line(row['model'], 60)} are not known{nearest(row['model'], known)}")
            continue
        if precision is None:
            leave_out(f"precision {shown(row['precision'], 40)} is not known; it is one of {', '.join(PRECISIONS)}")
            continue
        device = devices.get(row["device"])
        rates = {"decode": _number(path, line, row, "decode_tps"), "prefill": _number(path, line, row, "prefill_tps")}
        if row["runtime"] in _PADDED_PROMPT:
            first = _number(path, line, row, "ttft_min_ms")
            rates["prefill"] = _STATIC_CHUNK / (first / 1e3) if first else 0.0
        if row["model"].endswith(_SPECULATIVE):
            rates["decode"] = 0.0
        context = int(_number(path, line, row, "ctx"))
        if context < 1:
            raise UserError(
                f"{one_line(path)}, line {line}: ctx is {shown(row['ctx'])}; give the tokens of the context"
            )
        name = device.name if device is not None else row["device"]
        key = (row["model"], row["precision"], name, row["runtime"], context, row["unit"], rates["decode"])
        if key in seen:
            leave_out("another name of a measurement that is there")
            continue
        seen.add(key)
        usable = {phase: rate for phase, rate in rates.items() if rate > 0}
        if not usable:
            leave_out("no rate above 0")
            continue
        kind = device.kind if device is not None else "unknown"
        work = _work(model, row["runtime"], precision, context)
        rows.append(
            Published(
                row["model"],
                model.group,
                name,
                kind,
                row["runtime"],
                row["unit"],
                row["precision"],
                context,
                usable,
                work,
            )
        )
    if not rows:
        reason = f" ({next(iter(left))})" if left else ""
        raise UserError(f"{one_line(path)}: none of its rows can be used{reason}; see docs/devices.md for the columns")
    return rows, [f"{n} rows left out: {why}" for why, n in sorted(left.items())]


def published_devices() -> dict[str, DeviceProfile]:
    """A device's name in tables, or its profile's -> its profile; another name of a device has the profile of that device."""
    profiles = {p.name: p for p in list_profiles()}
    named = {}
    for profile in profiles.values():
        device = profiles.get(profile.alias_of or "", profile)
        for name in (profile.name, *profile.published_as):
            named[name] = device
    return named


def _work(model: Model, runtime: str, precision: _Precision, context: int) -> dict[str, Work]:
    """The terms of a row. Qualcomm's runtimes read a static cache of int8 whole; llama.cpp's is of float16, as far as it is
    filled."""
    shape = model.shape
    body = shape.body * precision.body_bits / 8
    step = (model.step_bytes or body) + shape.head * precision.head_bits / 8
    formats = precision.weight_format, precision.activations
    prompt = max(1, context - _PROMPT_MARGIN)
    if runtime == "geniex_llamacpp":
        depth, chunk, mean, cache_bytes, least_head = max(1, context - 64), min(_CHUNK, prompt), prompt / 2, 2, 0
    else:
        depth, chunk, mean, cache_bytes, least_head = context, _STATIC_CHUNK, context, 1, 128
    return {
        "decode": decode_work(shape, step, depth, cache_bytes, *formats, least_head),
        "prefill": prefill_work(shape, model.prompt_bytes or body, mean, chunk, *formats, least_head),
    }


def _rows(path: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Line number and cells of each row of a CSV file that has these columns."""
    reader = csv.DictReader(io.StringIO(read_text(path, _SIZE_LIMIT)))
    try:
        missing = [c for c in columns if c not in (reader.fieldnames or [])]
        if missing:
            raise UserError(f"{one_line(path)}: no column {missing[0]}; the columns are {', '.join(columns)}")
        return [(reader.line_num, {k: v or "" for k, v in row.items() if k}) for row in reader]
    except csv.Error as error:
        raise UserError(f"{one_line(path)}, line {reader.line_num}: {one_line(error, 100)}; give a CSV file") from None


def _number(path: Path, line: int, row: Mapping[str, str], key: str) -> float:
    """A number of 0 or more; an empty cell is 0."""
    text = row.get(key, "")
    try:
        value = float(text or 0)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1e18:
        raise UserError(f"{one_line(path)}, line {line}: {key} is {shown(text)}; give a number of 0 or more")
    return value
