"""What a model's phases cost on devices, from the shapes of its graphs and a plan: predictions, not measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..device_profiles.predict import Predicted, predict, units_of
from ..device_profiles.profile import DeviceProfile
from ..errors import UserError
from ..graph import Graph
from ..models.language_model import LanguageModel
from ..targets.registry import TARGETS
from .plan import BitPlan, Unit
from .workload import GraphWork, as_work, graph_work, planned_names, state_bytes


@dataclass(frozen=True)
class Asked:
    """Lengths in tokens. prompt: read at once. new: generated. depth: before those. context: of a model with one, or a source."""

    prompt: int = 128
    new: int = 64
    depth: int = 0


@dataclass(frozen=True)
class PhaseRow:
    """One phase on one unit. test: as llama-bench names it. tokens: that `predicted.seconds` are for."""

    test: str
    target: str
    tokens: int
    predicted: Predicted
    reason: str

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.predicted.seconds


@dataclass(frozen=True)
class Step:
    """One phase of a model: graphs in turn, each with what a call of it asks. tokens: of the phase."""

    test: str
    decode: bool
    tokens: int
    works: tuple[GraphWork, ...]


def steps(model: LanguageModel, units: Sequence[Unit], asked: Asked, chunk: int, whole_cache: int = 0) -> list[Step]:
    """The phases of a model built on the meta device.

    chunk: tokens that a call of the decoder takes. whole_cache: positions that a runtime reads whatever is filled, 0 for none. A
    decoder's cost at a depth is taken in the middle of the answer.
    """
    planned = planned_names(units)
    graphs = {g.name: g for g in model.graphs()}

    def one(graph: Graph, tokens: int, depth: int, source: int) -> GraphWork:
        return graph_work(model, graph, tokens, whole_cache or depth, source, planned)

    if model.task == "module":
        return [Step(name, False, 1, (one(g, 1, 0, 1),)) for name, g in graphs.items()]
    rows: list[Step] = []
    encoders = [g for name, g in graphs.items() if name != "decoder"]
    if model.task in ("seq2seq", "embed"):
        works = tuple(one(g, asked.prompt, 0, asked.prompt) for g in encoders)
        rows.append(Step(f"encode {asked.prompt}", False, asked.prompt, works))
    elif encoders:  # a context, read in chunks, that becomes a memory
        context = encoders[0]
        read = min(chunk, asked.prompt)
        rows.append(Step(f"context {asked.prompt}", False, asked.prompt, (one(context, read, asked.prompt // 2, 0),)))
    if "decoder" not in graphs:
        return rows
    decoder = graphs["decoder"]
    source = asked.prompt if model.task == "seq2seq" else min(16, asked.prompt)
    at = f" @ d{asked.depth}" if asked.depth else ""
    if model.task == "causal":
        read = min(chunk, asked.prompt)
        middle = asked.depth + max(0, asked.prompt - read) // 2
        rows.append(Step(f"pp{asked.prompt}{at}", False, asked.prompt, (one(decoder, read, middle, source),)))
    behind = asked.depth + asked.new // 2
    rows.append(Step(f"tg{asked.new}{at}", True, asked.new, (one(decoder, 1, behind, source),)))
    return rows


def predicted_rows(
    model: LanguageModel,
    units: Sequence[Unit],
    plan: BitPlan | None,
    devices: Sequence[DeviceProfile],
    targets: Sequence[str],
    asked: Asked,
    chunk: int,
    bits: int = 4,
) -> list[PhaseRow]:
    """Every phase on the fastest unit of every device that runs a target. plan: None for `bits` everywhere.

    Raises UserError if no device runs any of the targets.
    """
    rows: list[PhaseRow] = []
    made: dict[int, list[Step]] = {}
    for target in targets:
        whole = model.max_context if TARGETS[target].holds_caches else 0
        if whole not in made:
            made[whole] = steps(model, units, asked, chunk, whole)
        for device in devices:
            found = units_of(target, device)
            for step in made[whole] if found else ():
                options = [_on(step, target, plan, bits, device, unit.kind) for unit in found]
                rows.append(_fastest(options))
    if not rows:
        names = ", ".join(d.name for d in devices)
        raise UserError(f"no prediction for {', '.join(targets)} on {names}: they are not known to run there")
    return rows


def _on(step: Step, target: str, plan: BitPlan | None, bits: int, device: DeviceProfile, kind: str) -> PhaseRow:
    unit = next(u for u in device.units if u.kind == kind)
    parts = [
        predict(
            as_work(work, "decode" if step.decode else "prefill", target, plan, bits), step.tokens, target, unit, device
        )
        for work in step.works
    ]
    return PhaseRow(step.test, target, step.tokens, _sum(parts), "")


def _sum(parts: Sequence[Predicted]) -> Predicted:
    """Graphs run one after the other."""
    first = parts[0]
    if len(parts) == 1:
        return first
    terms: dict[str, float] = {}
    for part in parts:
        for name, seconds in part.parts.items():
            terms[name] = terms.get(name, 0.0) + seconds
    energies = [p.energy for p in parts if p.energy is not None]
    energy = replace(energies[0], joules=sum(e.joules for e in energies)) if energies else None
    return replace(
        first,
        seconds=sum(p.seconds for p in parts),
        low=sum(p.low for p in parts),
        high=sum(p.high for p in parts),
        parts=terms,
        energy=energy,
    )


def _fastest(options: Sequence[PhaseRow]) -> PhaseRow:
    """The fastest unit, with the reason where there were several."""
    best = min(options, key=lambda row: row.predicted.seconds)
    others = [row for row in options if row is not best]
    if not others:
        return best
    said = ", ".join(f"{r.predicted.unit} {r.predicted.seconds / best.predicted.seconds:.1f}x as long" for r in others)
    bound = max(best.predicted.parts, key=lambda name: best.predicted.parts[name])
    return replace(best, reason=f"{best.predicted.unit}: {bound} bound it; {said}")


def memory_bytes(
    model: LanguageModel, units: Sequence[Unit], plan: BitPlan | None, targets: Sequence[str], context: int, bits: int
) -> dict[str, int]:
    """Target -> about the bytes of its weights and of one stream's states at a context: what a device must hold at least."""
    planned, graphs = planned_names(units), model.graphs()
    works = [graph_work(model, graph, 1, 0, 1, planned) for graph in graphs]
    for work in works:
        work.looked_up.update(dict.fromkeys(work.looked_up, 1 << 40))  # a table is held whole
    states = state_bytes(graphs, context, context, {})
    return {t: states + sum(int(sum(w.weight_bytes(t, plan, bits).values())) for w in works) for t in targets}
