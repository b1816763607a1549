"""GPTQ of a whole model, layer by layer, each on what the quantized layers before it give. Top-level: `calibration`, `quant` enter.

The calibration data go through the model once. A weight is quantized at the moment its inputs are known, and the data go on
through its codes, so that later layers make up for what earlier ones lost. Finished codes are kept in files: a run that
was killed walks again, over them, and goes on where they end.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..bundle import Generation
from ..calibration.embedding_hessians import embedding_hessians
from ..calibration.forward import CHUNK_WEIGHTS, CalibrationForward
from ..calibration.hessians import InputHessians
from ..calibration.samples import Call, Sample
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
from ..system.workers import ONE, Workers

Progress = Callable[[str], None]


class CodeStore:
    """Finished codes in a folder, a file a weight; a file is there when it is whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"

    def has(self, name: str) -> bool:
        return self._path(name).exists()

    def write(self, name: str, made: QuantizedTensor) -> None:
        path = self._path(name)
        partial = path.with_suffix(".partial")
        metadata = {"name": name, "bits": str(made.bits), "group_size": str(made.group_size)}
        save_file({"codes": made.codes, "scales": made.scales}, partial, metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)

    def read(self, name: str, shape: tuple[int, int], entry: Entry) -> QuantizedTensor | None:
        """Codes and scales as views of the mapped file, None if there are none. Raises UserError for a file of another plan."""
        path = self._path(name)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                found = file.metadata()
                codes, scales = file.get_tensor("codes"), file.get_tensor("scales")
            if (found["name"], found["bits"], found["group_size"]) != (name, str(entry.bits), str(entry.group_size)):
                raise ValueError("of another plan")
            return QuantizedTensor(codes, scales, entry.bits, entry.group_size, shape)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise UserError(f"{path}: not the codes of {name} ({error}); remove {self.folder} and start anew") from None


def quantize_layerwise(
    checkpoint: Checkpoint,
    model: LanguageModel,
    plan: BitPlan,
    spec: Generation,
    samples: Sequence[Sample],
    calls: Sequence[Call],
    store: CodeStore,
    progress: Progress = lambda _: None,
    workers: Workers = ONE,
) -> list[str]:
    """Fill `store` with the codes of every weight that `plan` gives to GPTQ; returns those no data reached, left to RTN.

    model: built on the meta device, of no use afterwards. samples, calls: see `CalibrationForward`. Raises UserError for weights or
    activations that are not finite.
    """
    wanted = {n: e for n, e in plan.entries.items() if e.quantizer == "gptq" and e.bits != UNQUANTIZED}
    left = sum(not store.has(name) for name in wanted)
    if not left:
        return []
    if left < len(wanted):
        progress(f"gptq: {len(wanted) - left} of {len(wanted)} weights are done already")
    done, told = len(wanted) - left, -1

    def visit(name: str, module: Linear, inputs: list[torch.Tensor]) -> None:
        nonlocal done, told
        entry = wanted.get(name)
        if entry is None or store.has(name):
            return
        tenth = 10 * done // len(wanted)
        if tenth > told:
            told = tenth
            progress(f"gptq: {10 * tenth}% ({name})")
        store.write(name, quantize_rows(checkpoint, name, hessians.of(name, inputs), entry, workers))
        done += 1

    def transform(name: str, module: nn.Module, value: torch.Tensor) -> torch.Tensor:
        entry = wanted.get(name)
        if entry is None or not isinstance(module, Linear):
            return value
        found = store.read(name, (int(value.shape[0]), int(value.shape[1])), entry)
        return value if found is None else found.dequantize()

    embeddings = embedding_hessians(model, checkpoint, spec, samples, wanted)
    forward = CalibrationForward(model, checkpoint, spec, samples, calls, transform, visit, folder=store.folder)
    hessians = InputHessians(forward, model, embeddings)
    with workers.running():
        forward.to_head()
        for name in [n for n in wanted if not store.has(n)]:
            made = hessians.of_embedding(name)
            if made is not None:
                progress(f"gptq: {name}, from what the first layer makes of it")
                store.write(name, quantize_rows(checkpoint, name, made, wanted[name], workers))
    return [name for name in wanted if not store.has(name)]


def load_rounded(model: LanguageModel, checkpoint: Checkpoint, plan: BitPlan, store: CodeStore) -> None:
    """Fill `model` with fp32 values of the planned weights' codes, those of `store` or rounded to nearest, and of all others."""

    def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        checkpoint.expect(name, shape)
        entry = plan.entries.get(name)
        if entry is None:
            return checkpoint.tensor(name).to(torch.float32)
        if entry.bits == UNQUANTIZED:
            return checkpoint.tensor(name).to(torch.bfloat16).to(torch.float32)
        found = store.read(name, (shape[0], shape[1]), entry)
        if found is None:
            found = quantize_rtn(checkpoint.tensor(name), entry.bits, entry.group_size, entry.signed)
        return found.dequantize()

    fill(model, checkpoint, read)


def quantize_rows(
    checkpoint: Checkpoint, name: str, made: Factor, entry: Entry, workers: Workers = ONE
) -> QuantizedTensor:
    """A weight by GPTQ, in chunks of rows read from the checkpoint: over the workers, or over this process's threads."""
    rows, columns = checkpoint.info(name).shape
    codes = torch.empty((rows, packed_bytes(columns, entry.bits)), dtype=torch.uint8)
    scales = torch.empty((rows, columns // entry.group_size), dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    block, many = row_block(rows, columns), max(threads, workers.count)
    most = max(1, CHUNK_WEIGHTS // columns // many // block)
    step = block * min(most, -(-rows // block // many))
    ranges = [(start, min(rows, start + step)) for start in range(0, rows, step)]

    def chunk(start: int, stop: int) -> torch.Tensor:
        weight = checkpoint.rows(name, start, stop)
        check_finite(name, weight)
        return weight

    if not workers.alone:
        parts = tuple(value.numpy() for value in (made.hessian, made.order, made.feedback, made.weights))
        for at in range(0, len(ranges), workers.count):  # no more rows in memory than there are workers for
            some = ranges[at : at + workers.count]
            pieces = [
                (chunk(*r).numpy(), *parts, made.damping, entry.bits, entry.group_size, entry.signed, block)
                for r in some
            ]
            for (start, stop), (c, s) in zip(some, workers.over(_rows, pieces), strict=True):
                codes[start:stop], scales[start:stop] = (
                    torch.from_numpy(c.copy()),
                    torch.from_numpy(s.copy()).view(torch.bfloat16),
                )
    else:
        with one_threaded() as pool:
            parts_of = pool.map(
                lambda r: quantize_gptq(chunk(*r), made, entry.bits, entry.group_size, entry.signed, block), ranges
            )
            for (start, stop), part in zip(ranges, parts_of, strict=True):
                codes[start:stop], scales[start:stop] = part.codes, part.scales
    return QuantizedTensor(codes, scales, entry.bits, entry.group_size, (rows, columns))


def _rows(
    weight: Array,
    hessian: Array,
    order: Array,
    feedback: Array,
    weights: Array,
    damping: float,
    bits: int,
    group: int,
    signed: bool,
    block: int,
) -> tuple[Array, Array]:
    """In a worker: codes, and scales as int16 (numpy has no bfloat16), of some rows."""
    found = [torch.from_numpy(np.ascontiguousarray(a)) for a in (hessian, order, feedback, weights)]
    made = Factor(found[0], damping, *found[1:])
    part = quantize_gptq(torch.from_numpy(weight), made, bits, group, signed, block)
    return part.codes.numpy(), part.scales.view(torch.int16).numpy()
