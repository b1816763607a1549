"""Predicted time of a decode step, weight by weight, on a device.

A step multiplies one row with every weight of the decoder's graph. On a device whose kernels were measured it takes the time of
reading them, or of the arithmetic where that is longer; on another what the costs fitted to published rows say. It is a
prediction, not a measurement."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ..device_profiles.predict import fitted_here, predict, units_of
from ..device_profiles.profile import DeviceProfile
from ..errors import UserError
from ..graph import Graph, State
from ..models.language_model import LanguageModel
from ..models.layers.linear import Embedding
from ..models.registry import stored_name
from ..targets.registry import TARGETS
from ..targets.storage import stored_bytes, weight_storage
from .plan import UNQUANTIZED, BitPlan, Unit, WeightSpec
from .workload import as_work, graph_work, planned_names

PICOSECONDS = 10**9
"""Of a millisecond. Times are whole picoseconds, so that sums of them are exact."""

DEPTH = 512
"""Tokens that the caches hold in the step predicted."""


@dataclass(frozen=True)
class Rates:
    """The rates of a device that bound a decode step of `target`'s artefact.

    codes, floats: bytes/s at which quantized and 16-bit weights are read. code_products, float_products: operations/s, a
    multiply-add counting as 2; None where the profile gives none, so that reading alone is counted.
    """

    device: str
    target: str
    codes: float
    floats: float
    code_products: float | None = None
    float_products: float | None = None

    @staticmethod
    def of(device: DeviceProfile, target: str) -> Rates:
        """The rates of the unit that runs the target. Raises UserError where the profile has none, or not that target."""
        kind = TARGETS[target].unit
        if kind is None:
            known = ", ".join(name for name, other in TARGETS.items() if other.unit is not None)
            raise UserError(f"no decode step is predicted for {target}; give --latency with one of {known}")
        if device.target(target) is None:
            known = ", ".join(t.name for t in device.targets) or "no target"
            raise UserError(f"device {device.name} is not known to run {target}, but {known}; choose another --device")
        unit = device.unit(kind)
        read = unit.weight_stream
        if read is None:
            raise UserError(f"device {device.name} has no measured {unit.kind}; run `edgewright devices measure` on it")
        bandwidth = device.memory.bandwidth or read
        peak = unit.peak
        floats = None if peak is None else peak.fp32 if unit.kind == "cpu" else peak.fp16 or peak.fp32
        codes = None if peak is None else peak.int8
        return Rates(
            device.name,
            target,
            read.value,
            bandwidth.value,
            None if codes is None else codes.value * 1e9,
            None if floats is None else floats.value * 1e9,
        )

    def seconds(self, weight: WeightSpec, bits: int, group_size: int) -> float:
        """Of one row times `weight`, [N, K], at these bits and this effective group size, in the target's container."""
        unquantized = bits == UNQUANTIZED
        rate = self.floats if unquantized else self.codes
        read = stored_bytes(self.target, bits, group_size, *weight.shape) / rate
        products = self.float_products if unquantized else self.code_products
        return read if products is None else max(read, 2 * weight.numel / products)


@dataclass(frozen=True)
class PredictedRates:
    """A device whose kernels were not measured: what a byte of weights takes there, by the costs fitted to published rows.

    seconds_per_byte: at the middle of the prediction, or at the slow end of its interval. watts: that the unit draws, where known.
    """

    device: str
    target: str
    seconds_per_byte: float
    watts: float | None
    note: str

    def seconds(self, weight: WeightSpec, bits: int, group_size: int) -> float:
        """Of one row times `weight`, [N, K], at these bits and this effective group size, in the target's container."""
        return stored_bytes(self.target, bits, group_size, *weight.shape) * self.seconds_per_byte


@dataclass(frozen=True)
class DecodeStep:
    """One step of a model's decoder.

    reads: planned weight's name -> how many times it is read; a fraction where only some rows are (one row of an embedding). A
    weight that has no entry is not read at all (an encoder's). rest: picoseconds of everything that is not planned.
    """

    rates: Rates | PredictedRates
    reads: Mapping[str, float]
    rest: int

    def picoseconds(self, weight: WeightSpec, bits: int, group_size: int) -> int:
        """What `weight` adds to the step, rounded up."""
        return math.ceil(self.reads.get(weight.name, 0.0) * self.rates.seconds(weight, bits, group_size) * 1e12)

    def milliseconds(self, plan: BitPlan, units: Sequence[Unit]) -> float:
        """The whole step with the weights as the plan has them."""
        weights = [w for unit in units for w in unit.weights]
        chosen = [(w, plan.entries[w.name]) for w in weights]
        return (self.rest + sum(self.picoseconds(w, e.bits, e.group_size) for w, e in chosen)) / PICOSECONDS


def decode_step(
    model: LanguageModel,
    units: Sequence[Unit],
    device: DeviceProfile,
    targets: Sequence[str],
    depth: int = DEPTH,
    sure: bool = False,
) -> DecodeStep:
    """The step of `model`, built on the meta device, on `device`, with caches that hold `depth` tokens.

    A device whose kernels were measured (`devices measure`) has its own rates; another, and one that models were run on
    (`--models`), is predicted, with `sure` at the slow end of the 80 % interval. Raises UserError for a model without a
    decoder, for several targets (a step takes another time in each), and for a device that is not known to run the target."""
    if len(targets) != 1:
        raise UserError(f"--latency is of one target, not of {', '.join(targets)}; give one --format")
    weight_storage(targets[0], 4)  # refuses a target that does not exist
    depth = min(depth, model.max_context - 1)
    kind = TARGETS[targets[0]].unit
    fitted = kind is not None and fitted_here(targets[0], kind, device.name, "decode")
    streamed = any(unit.kind == kind and unit.weight_stream is not None for unit in device.units)
    measured = kind is None or (streamed and not fitted)
    decoder = next((graph for graph in model.graphs() if graph.name == "decoder"), None)
    if decoder is None:
        raise UserError("--latency is the time of a decode step, and this model has no decoder; give --bits or --size")
    if not measured:
        return _predicted_step(model, units, decoder, device, targets[0], depth, sure)
    rates = Rates.of(device, targets[0])
    calls, rows, other = _run(model, decoder, {w.name: w for u in units for w in u.weights})
    reads = {name: calls[name] + rows[name] for name in {*calls, *rows}}
    caches = sum(_traffic(state, depth) for state in decoder.states)
    return DecodeStep(rates, reads, math.ceil((other + caches) / rates.floats * 1e12))


def _predicted_step(
    model: LanguageModel,
    units: Sequence[Unit],
    decoder: Graph,
    device: DeviceProfile,
    target: str,
    depth: int,
    sure: bool,
) -> DecodeStep:
    found = units_of(target, device)
    if device.target(target) is None:
        known = ", ".join(t.name for t in device.targets) or "no target"
        raise UserError(f"device {device.name} is not known to run {target}, but {known}; choose another --device")
    if not found:
        device.unit(TARGETS[target].unit or "cpu")  # says which units there are
    planned = planned_names(units)
    whole = model.max_context if TARGETS[target].holds_caches else depth
    work = graph_work(model, decoder, 1, whole, depth if model.task == "seq2seq" else 16, planned)
    asked = as_work(work, "decode", target, None)
    unit, step = min(((u, predict(asked, 1, target, u, device)) for u in found), key=lambda pair: pair[1].seconds)
    slower = step.high / step.seconds if sure else 1.0
    per_byte = slower * step.parts["weights"] / asked.terms["weights"]
    rest = slower * (step.seconds - step.parts["weights"]) + per_byte * work.other_bytes
    reads = {name: float(work.calls[name]) for name in work.rows if name in planned}
    for name, rows in work.looked_up.items():
        reads[name] = reads.get(name, 0.0) + rows / work.shapes[name][0]
    watts = unit.power.watts.value if unit.power is not None else None
    rates = PredictedRates(device.name, target, per_byte, watts, f"predicted on the {unit.kind}: {step.note}")
    return DecodeStep(rates, reads, math.ceil(rest * 1e12))


def _run(
    model: LanguageModel, decoder: Graph, planned: Mapping[str, WeightSpec]
) -> tuple[Counter[str], dict[str, float], int]:
    """Run the decoder on shapes alone.

    Returns the calls of each planned weight, the share of its rows that one token looks up, and the bytes of the other
    parameters that were read.
    """
    calls: Counter[str] = Counter()
    rows: dict[str, float] = dict.fromkeys(planned, 0.0)
    others: dict[str, int] = {}

    def watch(path: str, module: nn.Module) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            for leaf, parameter in module.named_parameters(recurse=False):
                name = stored_name(model, f"{path}.{leaf}")
                looked_up = isinstance(module, Embedding)
                if name not in planned:
                    # float32 in every artefact
                    others[name] = 4 * (parameter.shape[-1] if looked_up else parameter.numel())
                elif looked_up:
                    rows[name] += 1 / parameter.shape[0]
                else:
                    calls[name] += 1

        return hook

    hooks = [m.register_forward_hook(watch(path, m)) for path, m in model.named_modules()]
    try:
        values = [value.to("meta") for value in decoder.example_inputs()]
        args = (*values[: len(decoder.inputs)], values[len(decoder.inputs) :]) if decoder.states else tuple(values)
        constants = {name: value.to("meta") for name, value in decoder.module.named_buffers()}
        with torch.no_grad():
            functional_call(decoder.module, constants, args)
    finally:
        for hook in hooks:
            hook.remove()
    return calls, rows, sum(others.values())


def _traffic(state: State, depth: int) -> int:
    """Bytes a step reads of a state whose symbolic sizes are `depth` (one batch). A state of fixed size is written, too."""
    sizes = [1 if size == "batch" else depth if isinstance(size, str) else size for size in state.shape]
    fixed = all(isinstance(size, int) or size == "batch" for size in state.shape)
    return math.prod(sizes) * state.dtype.itemsize * (2 if fixed and state.updated else 1)
