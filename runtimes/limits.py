"""What a process that loads the artefacts of a stranger's bundle may take: memory and time, from the sizes of its files.

A graph can ask for any size and need not end, so no more than what is accounted for here is granted. The figures are generous: they
are to stop what runs away, not what is a little larger than it should be.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..bundle import WEIGHTS, Bundle, GraphSpec, TargetEntry
from ..system.memory import available_bytes
from ..system.subprocesses import Limits
from ..targets.registry import TARGETS
from .session import state_bytes

LEAST = 2 << 30
_PROCESS = 4 << 30
"""Bytes of Python and the libraries, which have a few hundred MiB loaded, and of what they allocate for a moment."""

_RESERVE = 256 << 20
"""Bytes of the machine's memory that are left to others."""

_ROWS, _POSITIONS, _SESSIONS = 16, 1024, 4
"""Rows of a batch, positions whose logits are held, sessions beside each other."""

_LEAST_SECONDS = 600.0
_SECONDS_PER_BYTE = 2e-6
"""One call of an emulated program of a gigabyte may take half an hour on two cores."""


def limits_of(bundle: Bundle, entries: Sequence[TargetEntry], models: int) -> Limits:
    """The limits of a process that holds a bundle's model `models` times in float32 and, one after the other, these targets."""
    manifest = bundle.manifest
    stored = _size(bundle, (WEIGHTS,))
    # A weight has two bits at least, so a manifest cannot claim more of them than its checkpoint holds.
    weights = min(manifest.weights, 4 * stored)
    held = models * (4 * weights + 2 * stored)
    targets = [_target(bundle, entry, weights) for entry in entries]
    spec = manifest.generation
    logits = _ROWS * _POSITIONS * spec.vocab * 4 if spec.task == "seq2seq" else _POSITIONS * spec.vocab * 4 * _SESSIONS
    needed = held + max(targets, default=0) + _states(manifest.graphs, spec.max_context) + 2 * logits + _PROCESS
    most = max(LEAST, min(needed, available_bytes() - _RESERVE))
    largest = max((_size(bundle, entry.files) for entry in entries), default=0)
    return Limits(most, _LEAST_SECONDS + _SECONDS_PER_BYTE * (stored + largest))


def _target(bundle: Bundle, entry: TargetEntry, weights: int) -> int:
    """Bytes of an artefact that is loaded twice, and of what stands in for its device."""
    target = TARGETS.get(entry.format)
    stand_in = 0 if target is None else target.stand_in_bytes
    return 4 * _size(bundle, entry.files) + (stand_in + 8) * weights


def _states(graphs: Sequence[GraphSpec], most: int) -> int:
    sizes = {"batch": _ROWS, "capacity": most, "source": most}
    return sum(_SESSIONS * state_bytes(graph.states, sizes, 2) for graph in graphs)


def _size(bundle: Bundle, names: Sequence[str]) -> int:
    """Bytes of the files that are there."""
    files = [bundle.path / name for name in names]
    return sum(file.stat().st_size for file in files if file.is_file())
