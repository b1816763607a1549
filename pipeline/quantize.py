"""The quantized checkpoint of a plan, by GPTQ where it has calibration data."""

from __future__ import annotations

import json
from dataclasses import replace

import safetensors.torch
import torch

from ..bundle import CHECKPOINT, EXAMPLES
from ..quant.quantize_checkpoint import Calibrated, quantize_checkpoint
from ..system.memory import available_bytes, require_available
from ..system.resumable import ResumableExport
from .gptq import CodeStore, load_rounded, quantize_layerwise
from .planned import Planned
from .request import Progress, Request
from .tune_norms import enough, tune_norms, tuning_bytes


def quantize(planned: Planned, request: Request, run: ResumableExport, progress: Progress) -> Planned:
    """Write the quantized checkpoint into the run's folder, unless an earlier run did. Returns the plan as it was carried out.

    A weight that the calibration data do not reach is rounded to nearest, whatever the plan says.
    """
    if run.finished("checkpoint") is not None:
        progress("quantized already")
        return planned
    calibrated = Calibrated()
    if planned.plan.calibration is not None:
        planned, calibrated = _calibrate(planned, request, run, progress)
    _write_checkpoint(planned, run, calibrated, progress)
    planned.checkpoint.require_unchanged()
    run.finish("checkpoint", {})
    return planned


def _calibrate(
    planned: Planned, request: Request, run: ResumableExport, progress: Progress
) -> tuple[Planned, Calibrated]:
    """The plan as GPTQ could carry it out, with its codes and the norms tuned to them."""
    tune = request.calibration.norms == "tuned" and _tuning_fits(planned, run, progress)
    store = CodeStore(run.work / "codes")
    entries = planned.plan.entries
    unreached = quantize_layerwise(planned.source, planned.plan, store, progress, request.workers)
    if unreached:
        progress(
            f"gptq: the calibration data do not reach {len(unreached)} weights ({unreached[0]}): rounded to nearest"
        )
        rounded = {n: replace(entries[n], quantizer="rtn") for n in unreached}
        planned = replace(planned, plan=replace(planned.plan, entries=entries | rounded))
    norms = _tuned(planned, run, store, progress) if tune else {}
    shapes = {w.name: w.shape for u in planned.units for w in u.weights}
    entries = planned.plan.entries
    return planned, Calibrated(lambda name: store.read(name, shapes[name], entries[name]), norms)


def _write_checkpoint(planned: Planned, run: ResumableExport, calibrated: Calibrated, progress: Progress) -> None:
    reported = -1

    def count(name: str, done: int, total: int) -> None:
        nonlocal reported
        tenth = 10 * done // max(1, total)
        if tenth > reported:  # one line for each tenth
            reported = tenth
            progress(f"quantizing: {10 * tenth}% ({name})")

    directory = run.fresh_folder(CHECKPOINT)
    tied = planned.model.tied
    quantize_checkpoint(planned.checkpoint, planned.plan, tied, directory, planned.other, count, calibrated)
    # The planned config: a rehearsal's has fewer layers than the source.
    (directory / "config.json").write_text(json.dumps(planned.config, indent=1, sort_keys=True) + "\n")
    if planned.examples:
        named = {f"{i}.{g}.{n}": v.contiguous() for i, (g, e) in enumerate(planned.examples) for n, v in e.items()}
        safetensors.torch.save_file(named, directory / EXAMPLES)


def _tuning_fits(planned: Planned, run: ResumableExport, progress: Progress) -> bool:
    """Whether norms can be tuned in the memory there is; decided once, so that a killed run ends as it would have."""
    if not enough(planned.source):
        progress("norms: kept, as there are too few calibration data to tune them on")
        return False
    decision = run.finished("tuning")
    if decision is None:
        needed = tuning_bytes(planned.model, planned.source)
        available = available_bytes()
        decision = {"fits": needed <= available}
        if not decision["fits"]:
            progress(
                f"norms: kept, as tuning them would take about {needed / 2**30:.1f} GiB of the "
                f"{available / 2**30:.1f} there are"
            )
        run.finish("tuning", decision)
    return bool(decision["fits"])


def _tuned(planned: Planned, run: ResumableExport, store: CodeStore, progress: Progress) -> dict[str, torch.Tensor]:
    """Norms tuned to the finished codes, by stored name; those of an earlier run if there are any."""
    file = run.work / "norms.safetensors"
    if run.finished("norms") is None:
        require_available(
            tuning_bytes(planned.model, planned.source),
            "tuning norms takes memory",
            "free some, and give the same command again",
        )
        model = planned.source.build()
        load_rounded(model, planned.checkpoint, planned.plan, store)
        tuned = tune_norms(model, planned.source, progress)
        values, facts = ({}, {}) if tuned is None else (tuned.values, tuned.facts())
        safetensors.torch.save_file(values, file)
        run.finish("norms", facts)
    return safetensors.torch.load_file(file)
