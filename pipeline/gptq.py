"""GPTQ of a whole model, layer by layer, each on the outputs of the quantized layers before it.

The calibration data go through the model once. A weight is quantized at the moment its inputs are known, and the data go on
through its codes, so that later layers correct what earlier ones lost. Finished codes are kept in files. After a kill the data go
through the finished codes again, and the run continues where they end.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..calibration.embedding_hessians import embedding_hessians
from ..calibration.forward import CHUNK_WEIGHTS, CalibrationForward
from ..calibration.hessians import InputHessians
from ..calibration.source import Source
from ..checkpoints.checkpoint import Checkpoint, check_finite
from ..errors import UserError
from ..models.language_model import LanguageModel
from ..models.layers.linear import Linear
from ..models.loading import fill
from ..ops.packing import packed_bytes
from ..quant.gptq import quantize_gptq, row_block
from ..quant.hessian import Factor
from ..quant.plan import UNQUANTIZED, BitPlan, Entry
from ..quant.quantize_checkpoint import one_threaded
from ..quant.rtn import quantize_rtn
from ..quant.tensor import QuantizedTensor
from ..runtimes.session import Array
from ..system.digest import of_text
from ..system.workers import ONE, Workers

Progress = Callable[[str], None]


class CodeStore:
    """Finished codes in a folder, a file a weight; a file is there when it is whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{of_text(name)[:32]}.safetensors"

    def has(self, name: str) -> bool:
        return self._path(name).exists()

    def write(self, name: str, weight: QuantizedTensor) -> None:
        path = self._path(name)
        partial = path.with_suffix(".partial")
        metadata = {"name": name, "bits": str(weight.bits), "group_size": str(weight.group_size)}
        save_file({"codes": weight.codes, "scales": weight.scales}, partial, metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)

    def read(self, name: str, shape: tuple[int, int], entry: Entry) -> QuantizedTensor | None:
        """Codes and scales as views of the mapped file; None without a file. Raises UserError for a file of another plan."""
        path = self._path(name)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata()
                codes, scales = file.get_tensor("codes"), file.get_tensor("scales")
            if (about["name"], about["bits"], about["group_size"]) != (name, str(entry.bits), str(entry.group_size)):
                raise ValueError("of another plan")
            return QuantizedTensor(codes, scales, entry.bits, entry.group_size, shape)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise UserError(f"{path}: not the codes of {name} ({error}); remove {self.folder} and start anew") from None


def quantize_layerwise(
    source: Source,
    plan: BitPlan,
    store: CodeStore,
    progress: Progress = lambda _: None,
    workers: Workers = ONE,
) -> list[str]:
    """Fill `store` with the codes of every weight that `plan` gives to GPTQ; returns those that no data reached, for RTN.

    Raises UserError for weights or activations that are not finite.
    """
    entries = {n: e for n, e in plan.entries.items() if e.quantizer == "gptq" and e.bits != UNQUANTIZED}
    done, reported = sum(store.has(name) for name in entries), -1
    if done == len(entries):
        return []
    if done:
        progress(f"gptq: {done} of {len(entries)} weights are done already")

    def visit(name: str, module: Linear, inputs: list[torch.Tensor]) -> None:
        nonlocal done, reported
        entry = entries.get(name)
        if entry is None or store.has(name):
            return
        tenth = 10 * done // len(entries)
        if tenth > reported:
            reported = tenth
            progress(f"gptq: {10 * tenth}% ({name})")
        store.write(name, quantize_rows(source.checkpoint, name, hessians.of(name, inputs), entry, workers))
        done += 1

    def transform(name: str, module: nn.Module, value: torch.Tensor) -> torch.Tensor:
        entry = entries.get(name)
        if entry is None or not isinstance(module, Linear):
            return value
        quantized = store.read(name, (int(value.shape[0]), int(value.shape[1])), entry)
        return value if quantized is None else quantized.dequantize()

    model = source.build()
    embeddings = embedding_hessians(model, source, entries)
    forward = CalibrationForward(model, source, transform, visit, folder=store.folder)
    hessians = InputHessians(forward, model, embeddings)
    with workers.running():
        forward.to_head()
        for name in [n for n in entries if not store.has(n)]:
            factor = hessians.of_embedding(name)
            if factor is not None:
                progress(f"gptq: {name}, from what the first layer makes of it")
                store.write(name, quantize_rows(source.checkpoint, name, factor, entries[name], workers))
    return [name for name in entries if not store.has(name)]


def load_rounded(model: LanguageModel, checkpoint: Checkpoint, plan: BitPlan, store: CodeStore) -> None:
    """Fill `model` with fp32 values: of planned weights those of the codes in `store`, or rounded to nearest."""

    def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        checkpoint.expect(name, shape)
        entry = plan.entries.get(name)
        if entry is None:
            return checkpoint.tensor(name).to(torch.float32)
        if entry.bits == UNQUANTIZED:
            return checkpoint.tensor(name).to(torch.bfloat16).to(torch.float32)
        quantized = store.read(name, (shape[0], shape[1]), entry)
        if quantized is None:
            quantized = quantize_rtn(checkpoint.tensor(name), entry.bits, entry.group_size, entry.signed)
        return quantized.dequantize()

    fill(model, checkpoint, read)


def quantize_rows(
    checkpoint: Checkpoint, name: str, factor: Factor, entry: Entry, workers: Workers = ONE
) -> QuantizedTensor:
    """A weight by GPTQ, in chunks of rows read from the checkpoint: over the workers, or over this process's threads."""
    rows, columns = checkpoint.info(name).shape
    codes = torch.empty((rows, packed_bytes(columns, entry.bits)), dtype=torch.uint8)
    scales = torch.empty((rows, columns // entry.group_size), dtype=torch.bfloat16)
    block, many = row_block(rows, columns), max(torch.get_num_threads(), workers.count)
    most = max(1, CHUNK_WEIGHTS // columns // many // block)
    step = block * min(most, -(-rows // block // many))
    ranges = [(start, min(rows, start + step)) for start in range(0, rows, step)]

    def chunk(start: int, stop: int) -> torch.Tensor:
        weight = checkpoint.rows(name, start, stop)
        check_finite(name, weight)
        return weight

    if not workers.alone:
        arrays = _FactorArrays.of(factor)
        for at in range(0, len(ranges), workers.count):  # in memory are no more rows than the workers take
            some = ranges[at : at + workers.count]
            results = workers.over(_quantize_chunk, [(chunk(*r).numpy(), arrays, entry, block) for r in some])
            for (start, stop), (c, s) in zip(some, results, strict=True):
                codes[start:stop] = torch.from_numpy(c.copy())
                scales[start:stop] = torch.from_numpy(s.copy()).view(torch.bfloat16)
    else:
        with one_threaded() as pool:
            parts = pool.map(
                lambda r: quantize_gptq(chunk(*r), factor, entry.bits, entry.group_size, entry.signed, block), ranges
            )
            for (start, stop), part in zip(ranges, parts, strict=True):
                codes[start:stop], scales[start:stop] = part.codes, part.scales
    return QuantizedTensor(codes, scales, entry.bits, entry.group_size, (rows, columns))


@dataclass(frozen=True, eq=False)
class _FactorArrays:
    """A `Factor` as numpy arrays, which workers share instead of copying them."""

    hessian: Array
    damping: float
    order: Array
    feedback: Array
    weights: Array

    @staticmethod
    def of(factor: Factor) -> _FactorArrays:
        order, feedback, weights = (value.numpy() for value in (factor.order, factor.feedback, factor.weights))
        return _FactorArrays(factor.hessian.numpy(), factor.damping, order, feedback, weights)

    def factor(self) -> Factor:
        arrays = (self.hessian, self.order, self.feedback, self.weights)
        hessian, order, feedback, weights = (torch.from_numpy(np.ascontiguousarray(a)) for a in arrays)
        return Factor(hessian, self.damping, order, feedback, weights)


def _quantize_chunk(weight: Array, arrays: _FactorArrays, entry: Entry, block: int) -> tuple[Array, Array]:
    """In a worker: codes, and scales as int16 (numpy has no bfloat16), of some rows."""
    factor = arrays.factor()
    part = quantize_gptq(torch.from_numpy(weight), factor, entry.bits, entry.group_size, entry.signed, block)
    return part.codes.numpy(), part.scales.view(torch.int16).numpy()
