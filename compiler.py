"""The main job, top to bottom: load, plan, quantize, lower, verify, write the bundle. All rooms enter."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from . import __version__, backends
from .bundle import (
    CHECKPOINT,
    PREFILL_CHUNK,
    Bundle,
    Generation,
    GraphSpec,
    Manifest,
    TargetEntry,
    hash_files,
    write_manifest,
)
from .checkpoint import Checkpoint, open_checkpoint
from .errors import UserError, VerificationFailure
from .exporters.artefact import Options
from .lowering import lower, lower_apart
from .memory import PeakAnonymous, require_available
from .models import build, shorten
from .models.layers import Embedding
from .prompts import random_prompts, read_task, text_windows
from .quant.allocate import Override, allocate, expected_loss, reach
from .quant.plan import BitPlan, Unit, WeightSpec, weight_bytes
from .quant.stream import METADATA, quantize_checkpoint
from .quant.targets import TIED_TWICE, common_bits, stored_bytes
from .quant.units import quantizable_units
from .safetensors_writer import StreamingWriter
from .scoring import score_layers, unit_weights
from .untrusted import one_line
from .verdict import Report, require, require_placement
from .verification import require_memory, verify

VERIFY_PROMPTS = 32
TASK = "task.tsv"
DEFAULT_CONTEXT = 4096
DEFAULT_BITS = 4.5
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What a user asks of `export` or `plan`."""

    model: str
    formats: tuple[str, ...] = ("onnx",)
    bits: float | None = None
    size: int | None = None
    plan: BitPlan | None = None
    overrides: tuple[Override, ...] = ()
    widths: tuple[int, ...] | None = None
    groups: tuple[int, ...] = (32, 64, 128)
    importance: str = "zd"
    calibration: Path | None = None
    task: Path | None = None
    num_layers: int | None = None
    max_context: int | None = None
    sms: tuple[int, ...] = (86, 89, 120)
    htp: tuple[int, ...] = (75,)
    ethos_u: tuple[str, ...] = ("ethos-u85-256",)


@dataclass(frozen=True)
class Alone:
    """What the plan could be for one target alone, at the same budget: the price of carrying one plan to several.

    widths: those it stores whole. loss_ratio: the joint plan's expected loss (importance * weights * expected relative
    error, predicted) over that of the plan for this target alone; 1 or more.
    """

    widths: tuple[int, ...]
    loss_ratio: float


@dataclass
class Planned:
    """The model opened and the plan made; nothing has been written yet. alone: for each target of several.

    checkpoint: the source; once it is quantized, the quantized checkpoint.
    """

    checkpoint: Checkpoint
    config: dict[str, Any]
    model: Any
    units: list[Unit]
    plan: BitPlan
    other: list[str]
    scores: dict[tuple[str, int], float]
    generation: Generation
    prompts: list[list[int]]
    formats: tuple[str, ...]
    alone: dict[str, Alone] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        return sum(u.numel for u in self.units)

    def held_by(self, target: str) -> list[WeightSpec]:
        """The planned weights that an artefact of `target` holds: all, but for a target of some graphs."""
        part = backends.BACKENDS[target].graphs
        names = {n for g in self.model.graphs() if g.name in part for n in g.parameters()}
        return [w for u in self.units for w in u.weights if not part or w.name in names]

    def true_bytes(self, target: str) -> int:
        """Bytes the planned weights take in an artefact of `target`, containers and scale types counted."""
        entries = self.plan.entries
        twice = set(self.model.tied.values()) if target in TIED_TWICE else set()
        return sum(
            stored_bytes(target, entries[w.name].bits, entries[w.name].group_size, *w.shape)
            * (2 if w.name in twice else 1)
            for w in self.held_by(target)
        )

    def ideal_bytes(self, target: str) -> int:
        """Bytes of codes and scales of the same weights in the quantized checkpoint."""
        entries = self.plan.entries
        return sum(weight_bytes(w, entries[w.name].bits, entries[w.name].group_size) for w in self.held_by(target))


@dataclass(frozen=True)
class Cost:
    """What lowering one target took: seconds, and the peak anonymous memory of this process and its children, in bytes."""

    seconds: float
    peak_anonymous: int


@dataclass
class Exported:
    """A finished export. costs: format -> what its lowering took (measured)."""

    path: Path
    planned: Planned
    manifest: Manifest
    report: Report | None
    peak_anonymous: int
    costs: dict[str, Cost]


def plan(request: Request, progress: Progress = lambda _: None) -> Planned:
    """Open the model, check that its tensors are there, score its layers, and allocate bits. Writes nothing.

    Raises UserError for anything wrong with the checkpoint, the budget or the options.
    """
    checkpoint = open_checkpoint(request.model)
    request = _with_own_task(request, checkpoint, progress)
    config = checkpoint.config
    if request.num_layers is not None:
        config = shorten(config, request.num_layers)
    model = build(config)
    _expect_tensors(model, checkpoint, whole=request.num_layers is None)
    _check_lengths(model)
    units = quantizable_units(model)
    if not units:
        raise UserError(f"{request.model}: no weight can be quantized; the model's layers are narrower than 16")
    planned_names = {w.name for u in units for w in u.weights}
    other = [n for n in _parameters(model) if n not in planned_names]
    generation = _generation(model, checkpoint, config, request)
    prompts = _prompts(request, checkpoint, generation)
    if request.plan is not None:
        made = request.plan.validate(units)
        scores: dict[tuple[str, int], float] = {}
        alone: dict[str, Alone] = {}
    else:
        made, scores, alone = _allocate(request, checkpoint, model, units, other, generation, prompts, progress)
        model = build(config)  # LIM filled it with float weights
    return Planned(checkpoint, config, model, units, made, other, scores, generation, prompts, request.formats, alone)


def export(
    request: Request, output: Path, check: bool = True, progress: Progress = lambda _: None, strict: bool = False
) -> Exported:
    """Compile a model into a bundle at `output`, which must not exist; it appears when whole.

    check: reload every artefact and compare it with the reference; a mismatch raises VerificationFailure and leaves no
    bundle. strict: so does an op that fell back to another unit. Raises UserError for anything the user can mend.
    """
    _refuse_existing(output)
    for name in request.formats:
        backends.require(name)  # a missing library is refused before any work
    with PeakAnonymous() as peak:
        planned = plan(request, progress)
        if check:
            require_memory(planned.weights, {f: planned.true_bytes(f) for f in planned.formats}, original=False)
        partial = _partial(output)
        try:
            manifest, costs = _write(planned, request, partial, progress)
            report = None
            if check:
                report = verify(partial, progress=progress)
                _judge(report, output, strict)
                costed = {"costs": {name: asdict(cost) for name, cost in costs.items()}}
                Bundle(partial, manifest).write_report("export", report.to_json() | costed)
            partial.chmod(0o755)
            partial.rename(output)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"{output} cannot be written ({one_line(error)})") from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return Exported(output, planned, manifest, report, peak.bytes, costs)


def _with_own_task(request: Request, checkpoint: Checkpoint, progress: Progress) -> Request:
    """A checkpoint's directory may bring its task file, `task.tsv`: better prompts than random ids."""
    own = Path(request.model).expanduser() / TASK
    if request.task or request.calibration or checkpoint.tokenizer is None or not own.is_file():
        return request
    progress(f"prompts from the checkpoint's own {TASK}")
    return replace(request, task=own)


def _write(planned: Planned, request: Request, folder: Path, progress: Progress) -> tuple[Manifest, dict[str, Cost]]:
    """Quantized checkpoint, artefacts, tokenizer and manifest into `folder`."""
    checkpoint_dir = folder / CHECKPOINT
    checkpoint_dir.mkdir()

    told = -1

    def count(name: str, done: int, total: int) -> None:
        nonlocal told
        tenth = 10 * done // max(1, total)
        if tenth > told:  # a line for every tenth, not for every tensor
            told = tenth
            progress(f"quantizing: {10 * tenth}% ({name})")

    quantize_checkpoint(planned.checkpoint, planned.plan, planned.model.tied, checkpoint_dir, planned.other, count)
    # The planned config: a rehearsal's has fewer layers than the source.
    (checkpoint_dir / "config.json").write_text(json.dumps(planned.config, indent=1, sort_keys=True) + "\n")
    if (checkpoint_dir / "tokenizer.json").exists():
        shutil.copyfile(checkpoint_dir / "tokenizer.json", folder / "tokenizer.json")

    fingerprint = planned.checkpoint.fingerprint()
    planned.checkpoint = open_checkpoint(str(checkpoint_dir))  # the source is done with: a GGUF's vocabulary is large
    gc.collect()
    targets: list[TargetEntry] = []
    costs: dict[str, Cost] = {}
    prompts = tuple(tuple(p) for p in planned.prompts)
    options = Options(planned.generation.max_context, request.sms, request.htp, request.ethos_u, prompts)
    for name in request.formats:
        (folder / name).mkdir()
        start = time.perf_counter()
        with PeakAnonymous() as peak:
            made = (lower if len(request.formats) == 1 else lower_apart)(
                name, checkpoint_dir, folder / name, options, progress
            )
        costs[name] = Cost(time.perf_counter() - start, peak.bytes)
        targets.append(
            TargetEntry(
                format=name,
                files=tuple(f"{name}/{f}" for f in made.files),
                ops=made.ops,
                facts=made.facts,
                stored_bytes=planned.true_bytes(name),
                ideal_bytes=planned.ideal_bytes(name),
            )
        )
    progress("hashing")
    manifest = Manifest(
        source=_source_name(request.model),
        source_fingerprint=fingerprint,
        model_type=str(planned.config["model_type"]),
        graphs=tuple(GraphSpec.of(g) for g in planned.model.graphs()),
        generation=planned.generation,
        average_bits=planned.plan.average_bits,
        weights=planned.weights,
        targets=tuple(targets),
        prompts=prompts,
        files=hash_files(folder),
        tools=_tools(request.formats),
    )
    write_manifest(folder, manifest)
    return manifest, costs


def _judge(report: Report, output: Path, strict: bool) -> None:
    """Raise VerificationFailure if a target does not match; the report stays beside where the bundle would have been."""
    try:
        require(report)
        if strict:
            require_placement(report)
    except VerificationFailure:
        left = output.with_name(f"{output.name}.verification.json")
        left.write_text(json.dumps(report.to_json(), indent=1) + "\n")
        raise


def _refuse_existing(output: Path) -> None:
    try:
        found = output.exists() or output.is_symlink()
        parent = next((p for p in output.absolute().parents if p.exists()), output)
        usable = parent.is_dir() and os.access(parent, os.W_OK)
    except OSError as error:
        raise UserError(f"{one_line(output)} cannot be made ({error.strerror}); choose another -o") from None
    if found:
        raise UserError(f"{output} exists already; remove it or choose another -o")
    if not usable:
        raise UserError(f"{output} cannot be made ({parent} is no folder to write in); choose another -o")


def _partial(output: Path) -> Path:
    """A new folder beside `output` that is renamed to it once it is whole. Raises UserError if the disk refuses."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{output.name[:64]}.", suffix=".partial", dir=output.parent))
    except OSError as error:
        raise UserError(f"{output} cannot be made ({error.strerror}); choose another -o") from None


def _source_name(model: str) -> str:
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def _parameters(model: Any) -> list[str]:
    return [n for n, _ in model.named_parameters(remove_duplicate=False) if n not in model.tied]


def _expect_tensors(model: Any, checkpoint: Checkpoint, whole: bool) -> None:
    shapes = dict(model.named_parameters(remove_duplicate=False))
    for name in _parameters(model):
        checkpoint.expect(name, tuple(shapes[name].shape))
    if whole:
        # A bias the config does not speak of would vanish from original, reference and artefact alike: no check sees it.
        known = set(shapes) | set(model.tied)
        stray = [n for n in checkpoint.names() if n not in known and not n.endswith(".inv_freq")]
        if stray:
            kind = checkpoint.config.get("model_type")
            raise UserError(
                f"{checkpoint.source}: {len(stray)} tensors have no place in this {kind} (the first: {one_line(stray[0])}); "
                "is config.json the one of these weights?"
            )


def _generation(model: Any, checkpoint: Checkpoint, config: dict[str, Any], request: Request) -> Generation:
    tokenizer = checkpoint.tokenizer
    eos = set(tokenizer.eos_ids) if tokenizer is not None else set()
    for source in (checkpoint.generation, config, config.get("decoder")):
        if isinstance(source, dict):
            eos |= _token_ids("eos_token_id", source.get("eos_token_id"))
    wanted = DEFAULT_CONTEXT if request.max_context is None else request.max_context
    if wanted < 2:
        raise UserError(f"--max-context {wanted} is too short; give at least 2")
    context = min(model.max_context, wanted)
    new_tokens = checkpoint.generation.get("max_new_tokens")
    new_tokens = new_tokens if isinstance(new_tokens, int) and new_tokens > 0 else 256
    logits = next(p for g in model.graphs() for p in g.outputs if p.name == "logits")
    vocab = min([int(logits.shape[-1]), *(m.weight.shape[0] for m in model.modules() if isinstance(m, Embedding))])
    if (model.decoder_start or 0) >= vocab:
        raise UserError(f"config.json: decoder_start_token_id is {model.decoder_start}, the vocabulary {vocab}")
    pad = tokenizer.pad_id if tokenizer is not None else None
    return Generation(
        task=model.task,
        decoder_start=model.decoder_start,
        eos_ids=tuple(sorted(eos)),
        pad_id=pad if pad is not None and pad < vocab else 0,
        vocab=vocab,
        max_context=context,
        max_new_tokens=min(new_tokens, context - 1),
        prefill_chunk=min(PREFILL_CHUNK, *(g.bounds["sequence"][1] for g in model.graphs() if "sequence" in g.bounds)),
    )


def _token_ids(key: str, value: object) -> set[int]:
    """The ids of a config's `key`: one, a list of them, or none. Raises UserError."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
        raise UserError(f"{key} is {one_line(repr(value), 80)}, expected a token id or a list of them")
    return set(values)


def _check_lengths(model: Any) -> None:
    """Raise UserError if the model takes fewer positions than the graphs are traced with."""
    for graph in model.graphs():
        for name, (_, most) in graph.bounds.items():
            if most < graph.example[name]:
                least = max(graph.example.values())
                raise UserError(f"config.json: max_position_embeddings is {most}; at least {least} are needed")


def _prompts(request: Request, checkpoint: Checkpoint, spec: Generation) -> list[list[int]]:
    """The prompts that calibrate LIM and that every later `verify` uses: from the task, the text, or random ids."""
    tokenizer = checkpoint.tokenizer
    if (request.task or request.calibration) and tokenizer is None:
        raise UserError(f"{request.model} has no tokenizer, which --task and --calibration need")
    if request.task is not None and tokenizer is not None:
        prompts = [tokenizer.encode(p) for p in read_task(request.task, VERIFY_PROMPTS).prompts]
    elif request.calibration is not None and tokenizer is not None:
        prompts = text_windows(request.calibration, tokenizer, min(64, max(2, spec.max_context // 2)), VERIFY_PROMPTS)
    else:
        return [p[: spec.max_context - 1] for p in random_prompts(spec.vocab, VERIFY_PROMPTS)]
    for prompt in prompts:
        if len(prompt) >= spec.max_context:
            raise UserError(f"a prompt of {len(prompt)} tokens does not fit --max-context {spec.max_context}")
        if max(prompt, default=0) >= spec.vocab:
            raise UserError(
                f"{request.model}: its tokenizer gives token {max(prompt)}, the model has {spec.vocab}; "
                "is the tokenizer of another model?"
            )
    return prompts


def _allocate(
    request: Request,
    checkpoint: Checkpoint,
    model: Any,
    units: list[Unit],
    other: list[str],
    spec: Generation,
    prompts: list[list[int]],
    progress: Progress,
) -> tuple[BitPlan, dict[tuple[str, int], float], dict[str, Alone]]:
    """Refuse an impossible budget first (it costs nothing), then score the layers and allocate for real."""
    other_bytes = sum(_bytes(checkpoint, n) for n in other) + _header_bytes(units, checkpoint, other)

    bits = request.bits
    if bits is None and request.size is None:  # the default, or what comes nearest to it
        low, high = reach(
            units,
            widths=request.widths or common_bits(request.formats),
            groups=request.groups,
            overrides=request.overrides,
            targets=request.formats,
        )
        bits = min(max(DEFAULT_BITS, low), high)

    def run(scores: dict[tuple[str, int], float], targets: tuple[str, ...]) -> BitPlan:
        return allocate(
            units,
            unit_weights(units, scores, request.importance),
            bits=bits,
            size=request.size,
            other_bytes=other_bytes,
            widths=request.widths or common_bits(targets),
            groups=request.groups,
            overrides=request.overrides,
            targets=targets,
            method=request.importance,
        )

    run({}, request.formats)
    calibration = prompts if request.task or request.calibration else []
    if request.importance == "lim":
        require_available(
            4 * sum(u.numel for u in units), "LIM runs the original model in float32", "give --importance zd"
        )
    scores = score_layers(request.importance, model, checkpoint, units, calibration, spec, progress)
    made = run(scores, request.formats)
    loss = expected_loss(made, units)
    alone = {}
    for target in request.formats if len(request.formats) > 1 else ():
        ratio = loss / expected_loss(run(scores, (target,)), units)
        alone[target] = Alone(request.widths or common_bits((target,)), ratio)
    return made, scores, alone


def _bytes(checkpoint: Checkpoint, name: str) -> int:
    info = checkpoint.info(name)
    count = 1
    for size in info.shape:
        count *= size
    return count * info.dtype.itemsize


def _header_bytes(units: list[Unit], checkpoint: Checkpoint, other: list[str]) -> int:
    """No fewer bytes than the header of the quantized checkpoint will take: --size means the file."""
    entries = [(n, "F32", checkpoint.info(n).shape) for n in other]
    for w in (w for u in units for w in u.weights):
        entries += [(f"{w.name}.codes", "U8", w.shape), (f"{w.name}.scales", "BF16", w.shape)]
    data = sum(math.prod(shape) * {"F32": 4, "U8": 1, "BF16": 2}[kind] for _, kind, shape in entries)
    return StreamingWriter(Path("header"), entries, METADATA).file_bytes - data


def _tools(formats: tuple[str, ...]) -> dict[str, str]:
    packages = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")
    tools = {"edgewright": __version__} | {p: importlib.metadata.version(p) for p in packages}
    for name in formats:
        distribution, _, version = (backends.BACKENDS[name].version or f"{name} unknown").partition(" ")
        tools[distribution] = version
    return tools
