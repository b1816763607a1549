"""What the page of a bundle shows: facts of its files, its kept reports, and what is computed from its graphs. Nothing is run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...bundle import Bundle, Manifest
from ...checkpoints.opening import open_checkpoint
from ...device_profiles.host_facts import cpu_model
from ...device_profiles.profile import DeviceProfile, load, user_path
from ...errors import UserError
from ...measuring.kept_reports import Devices, Profiled, Verified, kept_report, last_check
from ...measuring.measure import DeviceResult
from ...models.language_model import LanguageModel
from ...models.registry import build
from ...quant.plan import BitPlan, Unit, weight_bytes
from ...quant.prediction import Asked, Step, predicted_rows, steps
from ...quant.units import quantizable_units
from ...quant.workload import GraphWork
from ...targets.registry import TARGETS

_CURVE_POINTS = 7
MOST_CURVES = 6
"""Devices whose cost is drawn against the context's length."""


@dataclass(frozen=True)
class LayerBytes:
    """Codes and scales of one layer. bytes: bits -> bytes. path: of the layer in the checkpoint, "" outside the layers."""

    place: str
    path: str
    weights: int
    bytes: dict[int, int]


@dataclass(frozen=True)
class Call:
    """One call of a graph: its operations (a multiply-add counts as 2) and the bytes that it reads, counted on shapes."""

    graph: str
    phase: str
    target: str
    tokens: int
    operations: float
    bytes: float

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.operations / max(1.0, self.bytes)


@dataclass(frozen=True)
class Roof:
    """One unit of a device. bandwidth: bytes/s. peaks: type -> operations/s. Each with what its number is: (value, kind)."""

    device: str
    unit: str
    kind: str
    bandwidth: tuple[float, str] | None
    peaks: dict[str, tuple[float, str]]


@dataclass(frozen=True)
class Reached:
    """Operations a second of a phase, with an interval where it is predicted. figure: measured or predicted."""

    device: str
    target: str
    test: str
    intensity: float
    rate: float
    low: float
    high: float
    figure: str


@dataclass(frozen=True)
class Curve:
    """Predicted milliseconds of a token against the tokens before it. points: (tokens, ms, low, high)."""

    device: str
    target: str
    unit: str
    points: list[tuple[int, float, float, float]]


@dataclass(frozen=True)
class OfGraphs:
    """What is computed from a model's graphs and plan; of a module of the user's own nothing is."""

    layers: list[LayerBytes] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    reached: list[Reached] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)


@dataclass(frozen=True)
class BundlePage:
    """All that is known of a bundle. prediction: as `commands.predict.Prediction.as_json` gives it, or None.

    checked_at: the command whose report `verified` is."""

    name: str
    manifest: Manifest
    file_bytes: dict[str, int]
    verified: Verified | None
    checked_at: str
    profiled: Profiled | None
    devices: Devices | None
    prediction: dict[str, Any] | None
    roofs: list[Roof]
    graphs: OfGraphs


def bundle_page(
    path: Path,
    names: Sequence[str] = (),
    prediction: dict[str, Any] | None = None,
    measured: Mapping[str, Any] | None = None,
    linked: Sequence[DeviceResult] | None = None,
) -> BundlePage:
    """Gather it. names: devices of the library; the roofs and curves are of the first MOST_CURVES. measured, linked: as `profile`
    found them just now, in place of the reports in the bundle.

    Raises UserError for what is no bundle, a damaged report or plan, and a device that is none.
    """
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    profiled = Profiled.model_validate(measured) if measured is not None else kept_report(bundle, "profile", Profiled)
    verified, checked_at = last_check(bundle)
    devices = [load(name) for name in names[:MOST_CURVES]]
    host = _host(profiled)
    files = {t.format: [bundle.path / f for f in t.files] for t in manifest.targets}
    graphs = _of_graphs(bundle, devices, profiled, prediction) if manifest.generation.task != "module" else OfGraphs()
    return BundlePage(
        name=path.resolve().name,
        manifest=manifest,
        file_bytes={t: sum(f.stat().st_size for f in those if f.is_file()) for t, those in files.items()},
        verified=verified,
        checked_at=checked_at,
        profiled=profiled,
        devices=kept_report(bundle, "devices", Devices) if linked is None else Devices(devices=list(linked)),
        prediction=prediction,
        roofs=[roof for device in [*([host] if host else []), *devices] for roof in roofs_of(device)],
        graphs=graphs,
    )


def _of_graphs(
    bundle: Bundle, devices: Sequence[DeviceProfile], profiled: Profiled | None, prediction: dict[str, Any] | None
) -> OfGraphs:
    """What the model, built without weights, and its plan tell."""
    manifest = bundle.manifest
    model = build(open_checkpoint(str(bundle.path / "checkpoint")).config)
    units, plan = quantizable_units(model), BitPlan.read(bundle.path / "checkpoint" / "plan.json")
    targets = [entry.format for entry in manifest.targets if entry.format in TARGETS]
    works = _Works(model, units, plan, manifest, targets)
    return OfGraphs(
        layers=layer_bytes(model, units, plan),
        calls=works.calls(),
        reached=[*works.measured(profiled), *works.predicted(prediction)],
        curves=context_curves(model, units, plan, devices, targets, manifest),
    )


def layer_bytes(model: LanguageModel, units: Sequence[Unit], plan: BitPlan) -> list[LayerBytes]:
    """Bytes of the planned weights by layer and width, in the model's order. A weight without an entry is not counted."""
    paths = {id(module): path for path, module in model.named_modules()}
    where = {(s, i): paths[id(layer)] for s, stack in model.stacks().items() for i, layer in enumerate(stack)}
    found: dict[str, LayerBytes] = {}
    for weight in (w for unit in units for w in unit.weights):
        entry = plan.entries.get(weight.name)
        if entry is None:
            continue
        inside = weight.layer is not None
        place = f"{weight.stack} {weight.layer}" if inside else weight.name.removesuffix(".weight").rpartition(".")[2]
        path = where[weight.stack, weight.layer] if weight.layer is not None else ""
        row = found.setdefault(place, LayerBytes(place, path, 0, {}))
        widths = dict(row.bytes)
        widths[entry.bits] = widths.get(entry.bits, 0) + weight_bytes(weight, entry.bits, entry.group_size)
        found[place] = LayerBytes(place, path, row.weights + weight.numel, widths)
    return list(found.values())


def roofs_of(device: DeviceProfile) -> list[Roof]:
    """A roof for each unit of which a peak or the memory's bandwidth is known."""
    roofs = []
    for unit in device.units:
        memory = unit.bandwidth or device.memory.bandwidth
        peaks = {} if unit.peak is None else {k: q for k, q in vars(unit.peak).items() if q is not None}
        if memory is not None or peaks:
            bandwidth = None if memory is None else (memory.value, memory.kind)
            told = {kind: (q.value * 1e9, q.kind) for kind, q in peaks.items()}
            roofs.append(Roof(device.name, unit.name, unit.kind, bandwidth, told))
    return roofs


def _host(profiled: Profiled | None) -> DeviceProfile | None:
    """What `devices measure` found of this machine, if it is the one that the report is of."""
    cpus = {measured.host.cpu for measured in profiled.targets.values()} if profiled is not None else set()
    try:
        return load("host") if user_path("host").is_file() and cpus == {cpu_model()} else None
    except UserError:
        return None


def context_curves(
    model: LanguageModel,
    units: Sequence[Unit],
    plan: BitPlan,
    devices: Sequence[DeviceProfile],
    targets: Sequence[str],
    manifest: Manifest,
) -> list[Curve]:
    """The cost of a decode step, or of a text of a model of embeddings, at lengths from nothing to the whole context: a curve for
    each device, of the target that is fastest there."""
    task, context = manifest.generation.task, manifest.generation.max_context
    if not devices or task == "module":
        return []
    found: dict[tuple[str, str], Curve] = {}
    for i in range(_CURVE_POINTS):
        length = max(0 if task in ("causal", "memory") else 1, (context - 2) * i // (_CURVE_POINTS - 1))
        asked = Asked(1, 1, length) if task in ("causal", "memory") else Asked(length, 1, 0)
        try:
            rows = predicted_rows(model, units, plan, devices, targets, asked, manifest.generation.prefill_chunk)
        except UserError:  # no target of the bundle runs there, as the page says in its table of devices
            return []
        for row in rows:
            if row.test.startswith("encode" if task == "embed" else "tg"):
                p = row.predicted
                curve = found.setdefault((p.device, row.target), Curve(p.device, row.target, p.unit, []))
                curve.points.append((length, p.seconds * 1e3, p.low * 1e3, p.high * 1e3))
    ordered = sorted(found.values(), key=lambda curve: curve.points[-1][1])
    best = {curve.device: curve for curve in reversed(ordered)}
    return [best[device.name] for device in devices if device.name in best]


class _Works:
    """What the graphs of a bundle ask, for its targets."""

    def __init__(
        self, model: LanguageModel, units: Sequence[Unit], plan: BitPlan, manifest: Manifest, targets: Sequence[str]
    ) -> None:
        self._model, self._units, self._plan, self._targets = model, units, plan, targets
        self._chunk, self._context = manifest.generation.prefill_chunk, manifest.generation.max_context
        self._made: dict[tuple[Asked, int], list[Step]] = {}

    def calls(self) -> list[Call]:
        """A prompt of half the context and a decode step behind it."""
        half = max(1, self._context // 2)
        found = {}
        for target in self._targets:
            for step in self._steps(target, Asked(half, 1, half if self._model.task == "causal" else 0)):
                for work in step.works:
                    phase = "decode step" if step.decode else "prompt"
                    call = Call(work.graph, phase, target, work.tokens, _operations(work), self._bytes(work, target))
                    found[target, work.graph, phase] = call
        return list(found.values())

    def measured(self, profiled: Profiled | None) -> list[Reached]:
        """The measured rows whose graphs are known, as operations a second."""
        found = []
        for target, measured in profiled.targets.items() if profiled is not None else ():
            for row in measured.rows if target in self._targets else ():
                step = self._of_row(target, row.test)
                if step is not None and row.median:
                    operations, moved = self._of_token(step, target)
                    rate, std = operations * row.median, operations * row.std
                    ends = (max(rate / 10, rate - std), rate + std)
                    cpu = measured.host.cpu
                    found.append(Reached(cpu, target, row.test, operations / moved, rate, *ends, measured.kind))
        return found

    def predicted(self, prediction: dict[str, Any] | None) -> list[Reached]:
        """The predicted rows as operations a second."""
        found = []
        for row in prediction["rows"] if prediction is not None else ():
            step = self._of_row(row["target"], row["test"])
            if step is not None:
                operations, moved = self._of_token(step, row["target"])
                rate, low, high = (operations * row[f"tokens_per_s{end}"] for end in ("", "_low", "_high"))
                found.append(
                    Reached(row["device"], row["target"], row["test"], operations / moved, rate, low, high, "predicted")
                )
        return found

    def _of_row(self, target: str, test: str) -> Step | None:
        """The phase that a row's name means; None for what it does not tell."""
        task = self._model.task
        read = re.fullmatch(r"(?:pp|encode )(\d{1,7})(?: @ d(\d{1,7}))?", test)
        made = re.fullmatch(r"tg(\d{1,7})(?: @ d(\d{1,7}))?", test)
        if task not in ("causal", "seq2seq", "embed") or (read is None and made is None):
            return None
        if read is not None:
            asked = Asked(int(read[1]), 1, int(read[2] or 0) if task == "causal" else 0)
        else:
            assert made is not None
            depth = int(made[2] or 0)
            asked = Asked(1, int(made[1]), depth) if task == "causal" else Asked(max(1, depth), int(made[1]), 0)
        if not 0 < asked.prompt + asked.depth <= self._context:
            return None
        found = self._steps(target, asked)
        step = next((s for s in found if s.decode == (made is not None)), None)
        if step is None or task != "seq2seq" or not test.startswith("pp"):
            return step
        first = next(s for s in found if s.decode)  # such a row ends with the first decode step
        return Step(test, False, step.tokens, (*step.works, *first.works))

    def _of_token(self, step: Step, target: str) -> tuple[float, float]:
        """Operations and bytes of one token of a phase; a decode step at a prompt's end is shared by its tokens."""
        operations = moved = 0.0
        for work in step.works:
            calls = 1 / (step.tokens if not step.decode and work.tokens == 1 else max(1, work.tokens))
            operations += calls * _operations(work)
            moved += calls * self._bytes(work, target)
        return operations, max(1.0, moved)

    def _steps(self, target: str, asked: Asked) -> list[Step]:
        whole = self._model.max_context if TARGETS[target].holds_caches else 0
        if (asked, whole) not in self._made:
            self._made[asked, whole] = steps(self._model, self._units, asked, self._chunk, whole)
        return self._made[asked, whole]

    def _bytes(self, work: GraphWork, target: str) -> float:
        """Weights, caches and states that a call reads."""
        size = {"float32": 4, "float16": 2, "int16": 1, "int8": 4}[TARGETS[target].activations]
        return sum(work.weight_bytes(target, self._plan).values()) + work.cache * size + work.state_bytes


def _operations(work: GraphWork) -> float:
    return work.products + 2 * work.attention
