"""Whether bias or norm correction pays: the output error that quantized linears keep when either is added afterwards.

    python benchmarks/bench_correction.py MODEL --calibration CAL --text HELD [--layers 0 8 16 24] [--bits 2 3 4]

For the linears behind a norm (q, k, v; gate, up) of some layers of a decoder-only model: squared output error relative to that
without correction, on text that calibration has not seen. Bias: the mean output error on the calibration data is taken
off. Norm: the norm's weights, so the columns of the linears behind it, get the factors that are best on the calibration data.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch

from edgewright.calibration.forward import CalibrationForward
from edgewright.calibration.samples import read_samples
from edgewright.calibration.source import Source
from edgewright.models.layers.linear import Linear
from edgewright.pipeline.plan import plan
from edgewright.pipeline.request import BudgetOptions, CalibrationOptions, Request
from edgewright.quant.gptq import quantize_gptq
from edgewright.quant.hessian import damping_for, factor
from edgewright.quant.rtn import quantize_rtn

GROUP = 64
RIDGE = 0.02
"""Of the mean diagonal, in the norm's least squares: the factors stay near one where the data say little."""
SHARE = {"q_proj": ("k_proj", "v_proj"), "gate_proj": ("up_proj",)}
"""A linear and those that have the same input."""


def inputs(source: Source, text: Path, tokens: int, layers: Sequence[int]) -> dict[str, torch.Tensor]:
    """Name of a weight -> the inputs [T, K] that the original model gives it."""
    found: dict[str, torch.Tensor] = {}

    def visit(name: str, module: Linear, parts: list[torch.Tensor]) -> None:
        *_, layer, _, kind, _ = [""] * 4 + name.split(".")
        if kind in SHARE and layer in map(str, layers):
            found[name] = torch.cat(list(forward.all_rows(parts)))

    samples = read_samples(text, source.checkpoint, source.generation, 512, tokens)
    forward = CalibrationForward(source.build(), source.over(samples), visit=visit)
    forward.to_head()
    return found


def errors(
    weight: torch.Tensor, x: torch.Tensor, y: torch.Tensor, bits: int, quantizer: str
) -> tuple[float, float, float]:
    """Squared error on y over that of the output: without correction, with the bias's, with the norm's; both fitted on x."""
    hessian = x.T @ x / len(x)
    if quantizer == "gptq":
        made = factor(hessian, damping_for(len(hessian), len(x)))
        values = quantize_gptq(weight, made, bits, GROUP, True).dequantize()
    else:
        values = quantize_rtn(weight, bits, GROUP, True).dequantize()
    lost = weight - values
    normal = hessian * (values.T @ values)
    normal.diagonal().add_(RIDGE * normal.diagonal().mean())
    factors = 1 + torch.linalg.solve(normal, ((values.T @ lost) * hessian).sum(dim=1))
    output = float((y @ weight.T).square().sum())
    plain = y @ lost.T
    biased = plain - lost @ x.mean(dim=0)
    scaled = y @ (weight - values * factors).T
    return tuple(float(e.square().sum()) / output for e in (plain, biased, scaled))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=(0, 8, 16, 24))
    parser.add_argument("--bits", type=int, nargs="+", default=(2, 3, 4))
    parser.add_argument("--tokens", type=int, default=8192, help="of the calibration text; half as many for the test")
    options = parser.parse_args()
    request = Request(options.model, BudgetOptions(importance="uniform"), CalibrationOptions(quantizer="rtn"))
    source = plan(request).source
    checkpoint = source.checkpoint
    fitted = inputs(source, options.calibration, options.tokens, options.layers)
    unseen = inputs(source, options.text, options.tokens // 2, options.layers)
    print("| bits | quantizer | error | with bias | with norm |\n|---|---|---|---|---|")
    for bits in options.bits:
        for quantizer in ("rtn", "gptq"):
            rows = []
            for name, x in fitted.items():
                kind = name.split(".")[-2]
                names = [name, *(name.replace(kind, other) for other in SHARE[kind])]
                weight = torch.cat([checkpoint.tensor(n).float() for n in names])
                rows.append(errors(weight, x, unseen[name], bits, quantizer))
            plain, biased, scaled = (mean(column) for column in zip(*rows, strict=True))
            print(
                f"| {bits} | {quantizer} | {plain:.5f} | {biased / plain - 1:+.1%} | {scaled / plain - 1:+.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
