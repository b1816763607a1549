"""`devices measure --models`: a few small models of random weights are exported and run, and this machine's costs are fitted to
them.

Predictions for this machine then rest on what ONNX Runtime takes here for the graphs that Edgewright writes, not on other devices.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import compiler
from ..bundle import PREFILL_CHUNK
from ..checkpoints.safetensors_writer import StreamingWriter
from ..device_profiles.calibrate import entry_of
from ..device_profiles.cost_fit import Costs, fit
from ..device_profiles.efficiencies import OWN_RUNTIME, Entry, Interval, read_entries, to_json, user_file
from ..device_profiles.profile import make_folder
from ..device_profiles.work import TERMS, Phase, Work
from ..models.registry import build
from ..pipeline.request import BudgetOptions, CalibrationOptions, CheckOptions, Request
from ..quant.plan import BitPlan
from ..quant.prediction import Asked, steps
from ..quant.units import quantizable_units
from ..quant.workload import as_work
from ..system.reading import read_text
from ..system.writing import write_file
from ..targets.registry import TARGETS
from .profile import ProfileLengths, profile

Note = Callable[[str], None]
_TARGET, _BITS, _CONTEXT = "onnx", 4, 1152
_ROWS = 4096
_LEAST_WIDTH = 1.15
"""Factor that an interval is wide at least on both sides: two runs of one thing on a shared machine differ so much."""


def _decoder(hidden: int, ffn: int, layers: int, heads: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "vocab_size": vocab,
        "max_position_embeddings": _CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }


def _hybrid(hidden: int, layers: int, vocab: int) -> dict[str, Any]:
    pattern = ["linear_attention", "linear_attention", "full_attention"]
    return {
        "model_type": "qwen3_5_text",
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "layer_types": (pattern * layers)[:layers],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_num_key_heads": hidden // 128,
        "linear_num_value_heads": hidden // 64,
        "vocab_size": vocab,
        "max_position_embeddings": _CONTEXT,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        "tie_word_embeddings": True,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "decoder of 3 million weights": _decoder(256, 704, 3, 4, 2048),
    "decoder of 12 million weights, many layers": _decoder(256, 704, 16, 4, 2048),
    "decoder of 70 million weights": _decoder(768, 2048, 5, 12, 24576),
    "decoder of 150 million weights": _decoder(1280, 3584, 6, 20, 16384),
    "hybrid of 30 million weights": _hybrid(512, 6, 8192),
}
"""Name -> config of what is run: small and large, few and many layers, a recurrence; heads of 64, as most models have."""


@dataclass(frozen=True)
class _Row:
    """A measured row, as `cost_fit` takes it."""

    shape: str
    test: str
    device: str
    kind: str
    work: dict[Phase, Work]
    tokens_per_second: dict[Phase, float]


def measure_models(device: str, note: Note, shapes: dict[str, dict[str, Any]] | None = None, repeats: int = 5) -> Path:
    """Fit the costs of a device that is this machine, and write them where predictions read them. Returns the file.

    shapes: name -> config; None: SHAPES. It takes some minutes, and memory of a few gigabytes. Raises UserError.
    """
    rows: list[_Row] = []
    for name, config in (shapes or SHAPES).items():
        with tempfile.TemporaryDirectory(prefix="edgewright-measure-") as folder:
            rows += _measured(name, config, Path(folder), device, repeats)
        last = [f"{1e3 / r.tokens_per_second['decode']:.2f} ms a token" for r in rows if "decode" in r.work][-1]
        note(f"{name}: {last}")
    entries = [_fitted(phase, [r for r in rows if phase in r.tokens_per_second]) for phase in TERMS]
    path = user_file()
    kept = [e for e in read_entries() if e.runtime != OWN_RUNTIME]
    make_folder(path)
    write_file(path, to_json([*kept, *entries]))
    return path


def write_random_model(folder: Path, config: dict[str, Any]) -> Path:
    """config.json and bfloat16 weights near what a trained model has, norms near 1, so that activations stay finite."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    model = build(config)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False) if n not in model.tied}
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(2 * _ROWS * max(s[-1] for s in shapes.values()), generator=random).mul_(0.02).bfloat16()
    with StreamingWriter(folder / "model.safetensors", [(n, "BF16", s) for n, s in shapes.items()], {}) as writer:
        for at, (name, shape) in enumerate(shapes.items()):
            count, width = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, shape[0])
            for start in range(0, count, _ROWS):
                numbers = (min(count, start + _ROWS) - start) * width
                offset = (at * 79_999 + start * 7919) % (len(noise) - numbers + 1)
                values = noise[offset : offset + numbers]
                writer.write(name, (values + 1).bfloat16() if name.endswith("norm.weight") else values)
    return folder


def export_and_run(model: Path, bundle: Path, lengths: ProfileLengths, bits: int = _BITS) -> dict[str, float]:
    """Test -> median tokens a second of a checkpoint's ONNX artefact here, in a process of its own."""
    request = Request(
        str(model),
        budget=BudgetOptions(widths=(bits,), groups=(32,), importance="uniform"),
        calibration=CalibrationOptions(shipped=False, quantizer="rtn"),
        checks=CheckOptions(verify=False, against="none"),
    )
    compiler.export(request, bundle)
    result = profile(bundle, (_TARGET,), lengths, check=False)
    return {row["test"]: row["median"] for row in result["targets"][_TARGET]["rows"]}


def _measured(name: str, config: dict[str, Any], folder: Path, device: str, repeats: int) -> list[_Row]:
    lengths = ProfileLengths(prompts=(64, 512), new=32, depths=(0, 256, 1024), repeats=repeats)
    rates = export_and_run(write_random_model(folder / "model", config), folder / "bundle", lengths)
    plan = BitPlan.from_json(read_text(folder / "bundle" / "checkpoint" / "plan.json", 1 << 30))
    model = build(config)
    units = quantizable_units(model)
    rows: list[_Row] = []
    for asked in (Asked(64, 32, 0), Asked(512, 32, 0), Asked(1, 32, 256), Asked(1, 32, 1024)):
        for step in steps(model, units, asked, PREFILL_CHUNK):
            phase: Phase = "decode" if step.decode else "prefill"
            if step.test in rates and not any(r.test == step.test for r in rows):
                work = as_work(step.works[0], phase, _TARGET, plan)
                rows.append(_Row(name, step.test, device, "host", {phase: work}, {phase: rates[step.test]}))
    return rows


def _fitted(phase: Phase, rows: Sequence[_Row]) -> Entry:
    """The costs of all rows; the interval is that of each shape predicted from the others."""
    residuals: list[float] = []
    for name in dict.fromkeys(r.shape for r in rows):
        others = fit(phase, "cpu", [r for r in rows if r.shape != name], {})
        residuals += [_residual(others, r, phase) for r in rows if r.shape == name]
    spread = max(float(np.quantile(np.abs(residuals), 0.8)), math.log(_LEAST_WIDTH))
    interval = Interval(low=math.exp(-spread), high=math.exp(spread))
    models = len({r.shape for r in rows})
    source = (
        f"edgewright devices measure: {len(rows)} rows of {models} models of random weights, measured on this machine"
    )
    version = TARGETS[_TARGET].version or "onnxruntime"
    return entry_of(fit(phase, "cpu", rows, {}), OWN_RUNTIME, version, "cpu", source, interval, interval)


def _residual(costs: Costs, row: _Row, phase: Phase) -> float:
    seconds = sum(costs.seconds(row.work[phase], row.device, row.kind, None).values())
    return float(np.log(row.tokens_per_second[phase] * seconds))
