"""The lowering error: an artefact compared with the reference on the same dequantized weights.

The weights in an artefact's files are the checkpoint's bit for bit. With float32 activations its outputs are the reference's
but for rounding; what int8 or float16 activations add is reported apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..bundle import Bundle, GraphSpec, TargetEntry
from ..checkpoints.checkpoint import Checkpoint
from ..errors import UserError, VerificationFailure
from ..exporters.registry import exporter, read_facts
from ..models.kv_cache import stored_as
from ..models.loading import CODES, load_dequantized, quantized_parts
from ..models.registry import build, stored_name
from ..ops.quantized import dequantize
from ..runtimes.eager import EagerSession, Int8Session
from ..runtimes.registry import has_runtime, open_exact, open_session
from ..runtimes.session import Joined, PlacedSession, Session
from ..system.reading import one_line, shown
from ..system.stages import Stage
from ..targets.registry import TARGETS
from .compare import Probe
from .read_back import ReadBackSession
from .report import TargetReport

Progress = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class References:
    """The dequantized weights in float32, run by PyTorch, and the same with arithmetic that some runtimes force.

    exact: what every artefact is compared with. int8: with int8 activations, for a runtime that has no others.
    float_cache: with float KV caches, where the bundle's are int8; else None.
    """

    exact: EagerSession
    int8: Int8Session
    float_cache: EagerSession | None

    @staticmethod
    def load(bundle: Bundle, quantized: Checkpoint) -> References:
        """The references of a bundle. quantized: its checkpoint. Raises UserError unless the manifest's graphs are its own."""
        model = build(quantized.config)
        load_dequantized(model, quantized)
        kv_cache = bundle.manifest.kv_cache
        graphs = stored_as(model.graphs(), kv_cache)
        if tuple(map(GraphSpec.of, graphs)) != bundle.manifest.graphs:
            raise UserError(
                f"{bundle.path}: the graphs in its manifest are not its checkpoint's; export the model again"
            )
        linears = {n.removesuffix(CODES) for n in quantized.names() if n.endswith(CODES)}
        linears |= {alias for alias, name in model.tied.items() if name in linears}
        float_cache = EagerSession(model.graphs()) if kv_cache != "float32" else None
        return References(EagerSession(graphs), Int8Session(graphs, linears), float_cache)


def compare_artefact(
    bundle: Bundle,
    entry: TargetEntry,
    quantized: Checkpoint,
    references: References,
    probe: Probe,
    threads: int,
    progress: Progress,
) -> tuple[TargetReport, PlacedSession]:
    """Read an artefact's weights back, and run it beside the reference: with float32 activations and as it ships.

    Returns the report and the session of the artefact as it ships. Raises UserError if it does not load.
    """
    progress(f"{entry.format}: reading its weights back")
    bundle.require_plain(entry.format)
    weights, wrong = 0, None
    try:
        with Stage(f"{entry.format}: reading its weights back"):
            weights = check_weights(bundle, entry.format, quantized)
    except VerificationFailure as error:
        wrong = str(error)
    progress(f"{entry.format}: reloading, comparing on {probe.what}")
    shipped: PlacedSession
    if has_runtime(entry.format):
        shipped = open_session(bundle, entry.format, threads, VerificationFailure)
        exact = open_exact(bundle, entry.format, threads, VerificationFailure)
    else:
        with Stage(f"{entry.format}: loading"):
            shipped, exact = ReadBackSession(bundle, entry.format, quantized), None
    sessions = [shipped] if exact is None else [exact, shipped]
    part = TARGETS[entry.format].graphs
    compared: list[Session] = [Joined(s, part, references.exact) for s in sessions] if part else [*sessions]
    emulated = references.int8 if exact is None and shipped.activations == "int8" else references.float_cache
    agreements = probe.compare(references.exact, [*compared, *([] if emulated is None else [emulated])])
    arithmetic = None if emulated is None else agreements.pop()
    report = TargetReport(
        format=entry.format,
        activations=sessions[0].activations,
        lowering=agreements[0],
        shipped=agreements[-1],
        placement=shipped.placement(),
        stored_bytes=entry.stored_bytes,
        ideal_bytes=entry.ideal_bytes,
        how=shipped.how,
        weights=weights,
        file_bytes=sum((bundle.path / f).stat().st_size for f in entry.files),
        wrong=wrong,
        arithmetic=arithmetic,
        on_device=exact is not None and exact.stand_in and not shipped.stand_in,
    )
    return report, shipped


def check_weights(bundle: Bundle, format: str, quantized: Checkpoint) -> int:
    """Compare every quantized weight in an artefact's files with the checkpoint's, to the bit; returns how many.

    What the manifest says of the files is compared with them, too. Raises VerificationFailure for what differs or is missing,
    UserError for files that cannot be read.
    """
    try:
        weights = _check_weights(bundle, format, quantized)
        _check_facts(bundle, format)
        return weights
    except (UserError, VerificationFailure):
        raise
    except Exception as error:  # the formats' readers raise types that share no base
        reason = one_line(error)[:200]
        raise UserError(f"{bundle.path}: the {format} artefact does not load ({reason}); export again") from error


def _check_facts(bundle: Bundle, format: str) -> None:
    """Raise VerificationFailure unless what the manifest says of an artefact's files is what they bear themselves."""
    facts = bundle.target(format).facts
    for name, found in read_facts(format, bundle.path / format).items():
        said = facts.get(name, found)
        if said != found:
            raise VerificationFailure(
                f"{format}: {name}: the manifest says {shown(said, 120)}, its files {shown(found, 120)}"
            )


def _check_weights(bundle: Bundle, format: str, quantized: Checkpoint) -> int:
    model = build(quantized.config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    held = {n for g in model.graphs() if g.name in TARGETS[format].graphs for n in g.parameters()}
    stored = (n.removesuffix(CODES) for n in quantized.names() if n.endswith(CODES))
    wanted = {n for n in stored if n in held or not TARGETS[format].graphs}
    seen: set[str] = set()
    for artefact_name, values in exporter(format).read_weights(bundle.path / format):
        name = stored_name(model, artefact_name)
        if quantized.has(name):
            continue  # kept at 16 bits, in a float type of the target
        if name not in wanted:
            raise VerificationFailure(
                f"{format}: the artefact holds a weight {one_line(artefact_name, 120)} that the plan has not"
            )
        if not torch.equal(values, dequantize(*quantized_parts(quantized, name, shapes[name]))):
            raise VerificationFailure(f"{format}: {name} in the artefact's files is not the checkpoint's to the bit")
        seen.add(name)
    if wanted - seen:
        raise VerificationFailure(f"{format}: {min(wanted - seen)} is not in the artefact's files")
    return len(seen)
