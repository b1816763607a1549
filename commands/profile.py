"""`profile`: latency, memory and load time of a bundle on this machine, each target measured in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from ..bundle import MANIFEST, Bundle, Generation
from ..errors import UserError, VerificationFailure
from ..runtimes.benchmark import Lengths, Measurement, NotMeasured, ProfileResult, SimulatedFact
from ..runtimes.limits import limits_of
from ..system.reading import one_line
from ..system.subprocesses import ChildFailed, run_child
from ..targets.registry import TARGETS

SIMULATED = "vendor_simulated"
"""Facts of a target whose key begins so come from a vendor's simulator: {"simulator", "note", "programs": {name: {what: n}}}."""


@dataclass(frozen=True)
class ProfileLengths:
    """What to measure, in tokens; None is llama-bench's default, or less where the context ends.

    prompts: prompt lengths (512); 0 asks for no row. new: tokens to generate (128). depths: tokens before those.
    repeats: how often each row is measured.
    """

    prompts: Sequence[int] | None = None
    new: int | None = None
    depths: Sequence[int] = (0,)
    repeats: int = 5

    def within(self, spec: Generation) -> Lengths:
        """The lengths for a bundle. Raises UserError for what its context does not hold."""
        if spec.task == "module":
            return Lengths((), 0, tuple(self.depths), self.repeats)
        if spec.task == "embed" and self.new:
            raise UserError(
                f"-n {self.new}: the bundle holds a model of embeddings, which generates nothing; leave it out"
            )
        context, causal = spec.max_context, spec.task not in ("seq2seq", "embed")
        prompts = [min(512, context - 1)] if self.prompts is None else [n for n in self.prompts if n]
        if spec.speech is not None:  # what it reads is a window of sound
            prompts = []
            if self.prompts is not None or any(self.depths):
                raise UserError("-p and -d are tokens that are read, and this model reads sound; leave them out")
        new = 0 if spec.task == "embed" else self.new
        if new is None:
            new = max(1, min(128, context - 2 - (max(self.depths, default=0) if causal else 0)))
        if new < 0 or not (prompts or new or spec.speech is not None):
            raise UserError(f"-p {','.join(map(str, prompts)) or 0} -n {new} measures nothing; give lengths above 0")
        read = [] if spec.task == "memory" else prompts  # a long context is read in parts
        for length in [*read, *((d + new + 1 if causal else max(d, new + 1)) for d in self.depths)]:
            if length > context - 1:
                raise UserError(
                    f"{length} tokens were asked for and the bundle's context is {context}; give shorter -p, -n or -d"
                )
        if self.repeats < 1:
            raise UserError(f"-r {self.repeats} is too few; give 1 or more")
        return Lengths(tuple(prompts), new, tuple(self.depths), self.repeats)


def profile(
    path: str | Path,
    formats: Sequence[str] = (),
    lengths: ProfileLengths | None = None,
    threads: int = 0,
    check: bool = True,
) -> ProfileResult:
    """Measure a bundle on this machine, each target in a fresh process.

    Args:
        path: the bundle's folder.
        formats: the targets; without, all in the bundle.
        lengths: what to measure; None is the default of each.
        threads: of the runtime; 0 is OMP_NUM_THREADS, else all cores.
        check: whether the files that will be read are hashed first. They are then in the system's cache when they are loaded.

    Raises UserError for lengths beyond the bundle's context, or a target in `formats` that cannot run on this machine;
    VerificationFailure for a file that is not what was exported, and for an artefact that crashes its runtime.
    """
    bundle = Bundle.open(path)
    requested = [bundle.target(name).format for name in dict.fromkeys(formats)]
    chosen = requested or [entry.format for entry in bundle.manifest.targets]
    fitted = (lengths or ProfileLengths()).within(bundle.manifest.generation)
    measured: dict[str, Measurement] = {}
    missing: dict[str, str] = {}
    for name in chosen:
        if not (requested or (name in TARGETS and TARGETS[name].installed)):
            missing[name] = f"its runtime is not installed: {TARGETS[name].install if name in TARGETS else name}"
            continue
        if check:
            bundle.check_target(name)
        request = {"path": str(path), "format": name, "lengths": asdict(fitted), "threads": threads}
        result = _in_a_process(bundle, request)
        if "not_measured" in result:
            missing[name] = result["not_measured"]
        else:
            measured[name] = result
    simulated: dict[str, dict[str, SimulatedFact]] = {
        entry.format: {key: _simulated(key, fact) for key, fact in entry.facts.items() if key.startswith(SIMULATED)}
        for entry in bundle.manifest.targets
        if entry.format in chosen
    }
    return {
        "model": bundle.manifest.source,
        "bits": bundle.manifest.average_bits,
        "targets": measured,
        "simulated": {name: facts for name, facts in simulated.items() if facts},
        "not_measured": missing,
    }


def _simulated(key: str, fact: object) -> SimulatedFact:
    """A fact of the manifest, which a stranger may have written. Raises UserError unless it has the form of `SIMULATED`."""
    programs = fact.get("programs", {}) if isinstance(fact, dict) else None
    whole = isinstance(programs, dict) and all(
        isinstance(values, dict) and all(isinstance(v, int | float) for v in values.values())
        for values in programs.values()
    )
    if (
        not isinstance(fact, dict)
        or not whole
        or not all(isinstance(fact.get(k, ""), str) for k in ("simulator", "note"))
    ):
        raise UserError(f"{MANIFEST}: {one_line(key, 80)} holds no figures of a simulator; export the bundle again")
    return cast(SimulatedFact, fact)


def _in_a_process(bundle: Bundle, request: dict[str, Any]) -> Measurement | NotMeasured:
    name = request["format"]
    limits = limits_of(bundle, [bundle.target(name)], 0)
    try:
        return cast("Measurement | NotMeasured", run_child("edgewright.runtimes.benchmark", request, limits=limits))
    except ChildFailed as error:
        if error.stage:
            raise VerificationFailure(f"{error.stage}: the process {error}") from None
        raise UserError(f"measuring {bundle.path} ({name}) failed: the process {error}") from None
