"""`devices calibrate`: the efficiencies file, from the rows that ship and a user's own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal, cast

import numpy as np

from .cost_fit import Costs
from .efficiencies import SHIPPED_SOURCE, TAILS, Entry, Interval, fit_efficiencies, interval_of
from .evaluate import Predicted, predict_rows
from .published_rows import Published
from .work import Phase

UnitKind = Literal["cpu", "gpu", "npu"]
Key = tuple[str, str, Phase]


def calibrate(rows: Sequence[Published], source: str = SHIPPED_SOURCE, version: str = "") -> list[Entry]:
    """The costs of every runtime and unit in the rows, with intervals from rows held out.

    source, version: where the rows are from. A device with rows gets intervals from architectures held out, another from
    devices held out."""
    fitted = fit_efficiencies(rows)
    known = _intervals(predict_rows(rows, rows, "architecture"), TAILS["architecture"], fitted.costs)
    unseen = _intervals(predict_rows(rows, rows, "device"), TAILS["device"], fitted.costs)
    result = []
    for (runtime, unit, phase), costs in sorted(fitted.costs.items()):
        familiar = known[(runtime, unit, phase)]
        wider = _no_narrower(unseen[(runtime, unit, phase)], familiar)
        result.append(entry_of(costs, runtime, version, unit, source, familiar, wider))
    return result


def entry_of(
    costs: Costs, runtime: str, version: str, unit: str, source: str, known: Interval, unseen: Interval
) -> Entry:
    """The costs of a runtime's unit as the file of efficiencies holds them."""
    return Entry(
        runtime=runtime,
        version=version,
        unit=cast(UnitKind, unit),
        phase=costs.phase,
        n=costs.n,
        source=source,
        costs={term: float(np.exp(log)) for term, log in costs.log_costs.items()},
        spread=_spread(costs),
        deviations=costs.deviations,
        known=known,
        unseen=unseen,
    )


def _intervals(predicted: Sequence[Predicted], tail: float, keys: Mapping[Key, Costs]) -> dict[Key, Interval]:
    residuals: dict[Key, list[float]] = defaultdict(list)
    for p in predicted:
        residuals[(*p.row.key, p.phase)].append(float(-np.log1p(p.error)))
    result = {}
    for key in keys:
        pooled = [e for (_, _, phase), all_ in residuals.items() for e in all_ if phase == key[2]]
        result[key] = interval_of(residuals[key], pooled, tail)
    return result


def _no_narrower(unseen: Interval, known: Interval) -> Interval:
    """An unseen device is never surer than one with rows."""
    return Interval(low=min(unseen.low, known.low), high=max(unseen.high, known.high))


def _spread(costs: Costs) -> dict[str, float]:
    """Term -> standard deviation of its log over the devices, their kinds included."""
    devices = [d for name, d in costs.deviations.items() if name.startswith("device:")]
    return {term: float(np.std([d[term] for d in devices])) if devices else 0.0 for term in costs.log_costs}
