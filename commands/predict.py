"""`profile --device NAME`: what a bundle, or a model that need not be there, costs on the library's devices. Predicted, not
measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle import PREFILL_CHUNK, Bundle
from ..checkpoints.opening import open_checkpoint, read_config
from ..device_profiles.predict import units_of
from ..device_profiles.profile import DeviceProfile, list_profiles, load
from ..errors import UserError
from ..models.language_model import LanguageModel
from ..models.registry import build
from ..quant.plan import BitPlan
from ..quant.prediction import Asked, PhaseRow, memory_bytes, predicted_rows
from ..quant.units import quantizable_units
from ..system.reading import one_line, read_text
from ..targets.registry import TARGETS
from .profile import ProfileLengths

ALL = "all"
"""In place of a device's name: every device of the library that runs one of the targets."""

ASSUMED = (
    "predicted from the graphs' shapes and published speeds, not measured; the interval holds the true rate four times out of five",
    "one stream, caches filled as far as the test says, clocks as in the published runs; heat is not modelled",
)


@dataclass(frozen=True)
class Prediction:
    """Rows by device and target. memory: target -> bytes of weights and states at the context, at least."""

    model: str
    bits: float
    context: int
    rows: list[PhaseRow]
    memory: dict[str, int]
    too_small: list[str]

    def as_json(self) -> dict[str, Any]:
        """Seconds of a phase, tokens a second with their interval, joules of a token with what they count."""
        return {
            "model": self.model,
            "bits": self.bits,
            "context": self.context,
            "kind": "predicted",
            "assumptions": list(ASSUMED),
            "memory_bytes": self.memory,
            "too_small": self.too_small,
            "rows": [_row(row) for row in self.rows],
        }


def _row(row: PhaseRow) -> dict[str, Any]:
    p = row.predicted
    return {
        "device": p.device,
        "target": row.target,
        "unit": p.unit,
        "test": row.test,
        "tokens": row.tokens,
        "seconds": p.seconds,
        "tokens_per_s": row.rate,
        "tokens_per_s_low": row.tokens / p.high,
        "tokens_per_s_high": row.tokens / p.low,
        "parts": p.parts,
        "joules_per_token": None if p.energy is None else p.energy.joules / row.tokens,
        "energy_boundary": None if p.energy is None else p.energy.boundary,
        "rows_of_this_device": p.seen,
        "reason": row.reason,
        "note": p.note,
    }


def predict_bundle(path: Path, names: Sequence[str], formats: Sequence[str], lengths: ProfileLengths) -> Prediction:
    """The bundle's targets on devices. Raises UserError for a bundle or a device that is none, and lengths beyond the context."""
    bundle = Bundle.open(path)
    config = open_checkpoint(str(bundle.path / "checkpoint")).config
    plan = BitPlan.from_json(read_text(bundle.path / "checkpoint" / "plan.json", 1 << 30))
    present = [entry.format for entry in bundle.manifest.targets]
    targets = [bundle.target(name).format for name in dict.fromkeys(formats)] or present
    spec = bundle.manifest.generation
    fitted = lengths.within(spec)
    asked = [
        Asked(prompt, fitted.new or 1, depth)
        for prompt in fitted.prompts or (1,)
        for depth in (fitted.depths if spec.task == "causal" else (0,))
    ]
    return _predict(
        bundle.manifest.source,
        build(config),
        plan,
        0,
        _devices(names, targets),
        targets,
        asked,
        spec.prefill_chunk,
        spec.max_context,
    )


def predict_model(
    model: str, names: Sequence[str], formats: Sequence[str], bits: int, lengths: ProfileLengths
) -> Prediction:
    """A checkpoint of which config.json is enough, all its quantizable weights at `bits`. Raises UserError."""
    if bits not in range(2, 9):
        raise UserError(f"--bits {bits} with --device: a prediction takes one width from 2 to 8 for all weights")
    targets = list(dict.fromkeys(formats)) or [t for t, facts in TARGETS.items() if not facts.graphs]
    for target in targets:
        if target not in TARGETS:
            raise UserError(f"unknown target {one_line(target, 40)}; choose from {', '.join(TARGETS)}")
    devices = _devices(names, targets)
    built = build(read_config(model))
    room = built.max_context - max(lengths.depths, default=0)
    prompts = [n for n in lengths.prompts or (min(128, room // 2),) if n > 0] or [1]
    new = lengths.new or max(1, min(64, room - max(prompts) - 1))
    asked = [Asked(n, new, d) for n in prompts for d in lengths.depths]
    most = max(a.prompt + a.depth + a.new for a in asked)
    if most > built.max_context:
        raise UserError(
            f"{most} tokens were asked for and the model takes {built.max_context}; give shorter -p, -n or -d"
        )
    return _predict(model, built, None, bits, devices, targets, asked, PREFILL_CHUNK, most)


def _predict(
    source: str,
    model: LanguageModel,
    plan: BitPlan | None,
    bits: int,
    devices: Sequence[DeviceProfile],
    targets: Sequence[str],
    asked: Sequence[Asked],
    chunk: int,
    context: int,
) -> Prediction:
    units = quantizable_units(model)
    rows: list[PhaseRow] = []
    for one in dict.fromkeys(asked):
        made = predicted_rows(model, units, plan, devices, targets, one, chunk, bits or 4)
        rows += [r for r in made if r not in rows]
    used = list(dict.fromkeys(row.target for row in rows))
    memory = memory_bytes(model, units, plan, used, context, bits or 4)
    small = [
        f"{d.name} ({t}: {memory[t] / 1e9:.1f} GB of {d.memory.size.value / 1e9:.1f} GB)"
        for d in devices
        for t in used
        if d.memory.size is not None and units_of(t, d) and memory[t] > d.memory.size.value
    ]
    average = plan.average_bits if plan is not None else float(bits)
    return Prediction(source, average, context, rows, memory, small)


def _devices(names: Sequence[str], targets: Sequence[str]) -> list[DeviceProfile]:
    """The devices of these names; ALL leaves the others out."""
    if ALL in names:
        known = [d for d in list_profiles() if d.alias_of is None]
        return [d for d in known if any(units_of(t, d) for t in targets)]
    chosen = []
    for name in dict.fromkeys(names):
        device = load(name)
        chosen.append(load(device.alias_of) if device.alias_of is not None else device)
    return chosen
