"""From checkpoint and plan to a quantized checkpoint, row chunk by row chunk.

Nothing larger than a few row chunks is ever in memory: rows come from the mapped file, codes and scales go straight to their
places in the new one.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch

from ..checkpoints.checkpoint import Checkpoint, check_finite
from ..checkpoints.safetensors_writer import StreamingWriter
from ..errors import UserError
from ..system.dtypes import SAFETENSORS_NAMES
from .plan import UNQUANTIZED, BitPlan, Entry, WeightSpec, check_choice, weight_bytes
from .rtn import quantize_rtn
from .tensor import SMALLEST_SCALE, QuantizedTensor

METADATA = {"format": "edgewright-quantized", "version": "1"}
"""The safetensors metadata that tells a quantized checkpoint."""

CHUNK_WEIGHTS = 2 << 20
"""Weights of a row chunk (8 MiB in fp32); each thread holds one or two such buffers."""

_MOST_THREADS = 8  # each holds two chunks: memory stays bounded on a large machine too
_KEPT = (torch.float32, torch.bfloat16, torch.float16)

Progress = Callable[[str, int, int], None]
"""Called after each tensor with its name, the weights done so far, and all there are."""

ReadCodes = Callable[[str], QuantizedTensor | None]
"""A weight's name -> its finished codes, as its line of the plan asks; None where it has none."""


@dataclass(frozen=True, eq=False)
class Calibrated:
    """What calibration computed. codes: of weights; the others are rounded to nearest. vectors: stored name -> value of
    tensors that stay unquantized, in place of the checkpoint's.
    """

    codes: ReadCodes = lambda _: None
    vectors: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class QuantizedStats:
    """What was written.

    bytes: of codes, scales and weights planned at 16 bits. weights: how many numbers the plan covers. average_bits:
    their ratio. file_bytes: the size of model.safetensors, everything unquantized and the header included.
    """

    bytes: int
    weights: int
    average_bits: float
    file_bytes: int


def quantize_checkpoint(
    checkpoint: Checkpoint,
    plan: BitPlan,
    tied: Mapping[str, str],
    out_dir: Path,
    copy: Iterable[str],
    progress: Progress | None = None,
    calibrated: Calibrated | None = None,
) -> QuantizedStats:
    """Write the quantized checkpoint directory `out_dir`; the same checkpoint, plan and `calibrated` give the same bytes.

    tied: alias name -> stored name; aliases are not written. copy: tensors to keep unquantized, in their dtype (fp64
    becomes fp32); `calibrated.vectors` are some of them. model.safetensors appears last: where it is, everything is.
    Raises UserError for NaN or infinite weights (naming the tensor), a plan that does not fit the checkpoint's shapes,
    a tensor that is missing, or a disk that refuses.
    """
    kept = [name for name in dict.fromkeys(copy) if name not in tied]
    specs = {name: _spec(checkpoint, name, entry) for name, entry in plan.entries.items()}
    for name in (*specs, *kept):
        if name in tied:
            raise UserError(f"plan: {name} is stored as {tied[name]}; plan that one")
        if name in specs and name in kept:
            raise UserError(f"plan: {name} is to be kept unquantized; give it 16 bits or leave it out of the plan")
    for name in kept:
        checkpoint.info(name)
    calibrated = calibrated or Calibrated()
    if not calibrated.vectors.keys() <= set(kept):
        raise ValueError(f"{min(calibrated.vectors.keys() - set(kept))} is to be changed, but not kept unquantized")
    place = {name: i for i, name in enumerate(checkpoint.names())}  # the file's order, so that reading is sequential
    order = sorted((*specs, *kept), key=lambda name: place[name])
    layout = [row for name in order for row in _layout(checkpoint, name, plan.entries.get(name))]

    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out_dir} cannot be made ({error.strerror}); choose another output") from None
    model = out_dir / "model.safetensors"
    total = sum(_numel(checkpoint, name) for name in order)
    done = 0
    with one_threaded() as pool, StreamingWriter(model, layout, METADATA) as writer:
        for name in order:
            entry = plan.entries.get(name)
            if name in calibrated.vectors:
                value = calibrated.vectors[name]
                check_finite(name, value)
                writer.write(name, value.to(_stored_dtype(checkpoint, name, None)))
            elif entry is None or entry.bits == UNQUANTIZED:
                _copy(checkpoint, name, entry, writer)
            elif (quantized := calibrated.codes(name)) is not None:
                writer.write(f"{name}.codes", quantized.codes)
                writer.write(f"{name}.scales", quantized.scales)
            else:
                _quantize(checkpoint, specs[name], entry, writer, pool)
            done += _numel(checkpoint, name)
            if progress is not None:
                progress(name, done, total)
        model.unlink(missing_ok=True)  # never an older model beside the new plan
        _write_side_files(checkpoint, plan, out_dir)
    planned = sum(weight_bytes(specs[name], e.bits, e.group_size) for name, e in plan.entries.items())
    weights = sum(spec.numel for spec in specs.values())
    return QuantizedStats(planned, weights, planned * 8 / weights if weights else 0.0, writer.file_bytes)


def _spec(checkpoint: Checkpoint, name: str, entry: Entry) -> WeightSpec:
    """The weight as the checkpoint has it, checked against its line of the plan."""
    info = checkpoint.info(name)
    if len(info.shape) != 2 or 0 in info.shape or not info.dtype.is_floating_point:
        raise UserError(f"plan: {name} is {info.dtype} {list(info.shape)}; only floating matrices are quantized")
    spec = WeightSpec(name, (info.shape[0], info.shape[1]), None, "")
    check_choice(spec, entry.bits, entry.group_size)
    return spec


def _numel(checkpoint: Checkpoint, name: str) -> int:
    return prod(checkpoint.info(name).shape)


def _stored_dtype(checkpoint: Checkpoint, name: str, entry: Entry | None) -> torch.dtype:
    """The dtype of a tensor that is not quantized."""
    if entry is not None:
        return torch.bfloat16
    dtype = checkpoint.info(name).dtype
    return dtype if dtype in _KEPT or not dtype.is_floating_point else torch.float32


def _layout(checkpoint: Checkpoint, name: str, entry: Entry | None) -> list[tuple[str, str, tuple[int, ...]]]:
    """The entries of a tensor in the new file."""
    shape = checkpoint.info(name).shape
    if entry is None or entry.bits == UNQUANTIZED:
        return [(name, SAFETENSORS_NAMES[_stored_dtype(checkpoint, name, entry)], shape)]
    rows, columns = shape
    return [
        (f"{name}.codes", "U8", (rows, columns * entry.bits // 8)),
        (f"{name}.scales", "BF16", (rows, columns // entry.group_size)),
    ]


def _copy(checkpoint: Checkpoint, name: str, entry: Entry | None, writer: StreamingWriter) -> None:
    """Copy a tensor in row chunks, refusing NaN and infinities."""
    info = checkpoint.info(name)
    dtype = _stored_dtype(checkpoint, name, entry)
    if not info.shape or not info.dtype.is_floating_point:
        tensor = checkpoint.tensor(name).to(dtype)  # a view of the file, unless it is a scalar of another dtype
        if dtype.is_floating_point:
            check_finite(name, tensor)
        writer.write(name, tensor)
        return
    for start, stop in _row_chunks(info.shape):
        piece = checkpoint.rows(name, start, stop).to(dtype)
        check_finite(name, piece)
        writer.write(name, piece)


def _quantize(
    checkpoint: Checkpoint, spec: WeightSpec, entry: Entry, writer: StreamingWriter, pool: ThreadPoolExecutor
) -> None:
    """Quantize a weight in row chunks, on the threads of `pool`, and write codes and scales in order."""

    def work(start: int, stop: int) -> tuple[QuantizedTensor, float]:
        rows = checkpoint.rows(spec.name, start, stop)
        check_finite(spec.name, rows)
        low, high = torch.aminmax(rows)
        return quantize_rtn(rows, entry.bits, entry.group_size, entry.signed), max(-float(low), float(high))

    largest = 0.0
    for result, reach in _in_order(pool, work, _row_chunks(spec.shape)):
        writer.write(f"{spec.name}.codes", result.codes)
        writer.write(f"{spec.name}.scales", result.scales)
        largest = max(largest, reach)
    if 0.0 < largest < SMALLEST_SCALE:
        raise UserError(
            f"{spec.name}: its largest weight, {largest:.3g}, is below the smallest scale {SMALLEST_SCALE:.3g}, so "
            f"nothing of it would be left; keep it with --override '{spec.name}=16'"
        )


def _row_chunks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about CHUNK_WEIGHTS weights."""
    step = max(1, CHUNK_WEIGHTS // max(1, prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


@contextmanager
def one_threaded() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch has (at most 8), each of which runs torch on one: small operations split badly."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(count, _MOST_THREADS), thread_name_prefix="quantize") as pool:
            yield pool
    finally:
        torch.set_num_threads(count)


def _in_order(
    pool: ThreadPoolExecutor,
    work: Callable[[int, int], tuple[QuantizedTensor, float]],
    chunks: Iterable[tuple[int, int]],
) -> Iterator[tuple[QuantizedTensor, float]]:
    """The results of `work` in the order of `chunks`; at most a few of them are computed ahead."""
    waiting: deque[Future[tuple[QuantizedTensor, float]]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(work, *chunk))
            if len(waiting) > _MOST_THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _write_side_files(checkpoint: Checkpoint, plan: BitPlan, out_dir: Path) -> None:
    """config.json, generation_config.json, plan.json and the tokenizer's files."""
    texts = {
        "config.json": json.dumps(checkpoint.config, indent=2, ensure_ascii=False) + "\n",
        "plan.json": plan.to_json(),
    }
    if checkpoint.generation:
        texts["generation_config.json"] = json.dumps(checkpoint.generation, indent=2, ensure_ascii=False) + "\n"
    try:
        for name, text in texts.items():
            partial = out_dir / f"{name}.partial"
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, out_dir / name)
        if checkpoint.tokenizer is not None:
            checkpoint.tokenizer.save(out_dir)
    except OSError as error:
        raise UserError(f"{out_dir} cannot be written ({error.strerror}); choose another output") from None
