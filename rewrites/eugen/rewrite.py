"""Feed-forward blocks into EUGens (arXiv 2601.22563), a checkpoint directory in and one out, without backpropagation.

Top to bottom: read the spec, send the calibration text through the model once, replace each block that matches when it is
reached, write a checkpoint whose config.json says which blocks are EUGens. Blocks are found by their class, whatever the
architecture.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...bundle import PREFILL_CHUNK, Generation
from ...checkpoints.checkpoint import Checkpoint, check_finite
from ...checkpoints.opening import open_checkpoint
from ...checkpoints.safetensors_writer import StreamingWriter
from ...errors import UserError
from ...models.config import ConfigReader
from ...models.eugen import CONFIG, KEY, EUGen, EUGenSize, eugen_for, gated_mlps
from ...models.language_model import LanguageModel
from ...models.layers.linear import Embedding, Linear
from ...models.layers.mlp import GatedMLP
from ...models.registry import build
from ...pipeline.generation import decoder_prompt
from ...system.dtypes import SAFETENSORS_NAMES
from ...system.memory import require_available
from ...system.reading import one_line
from ..activations import BlockForward, read_prompts
from ..write_checkpoint import new_checkpoint, write_side_files
from .directions import KINDS
from .least_squares import CHUNK
from .transfer import HELD, TRAIN, TUNE, Fit, transfer

FEWEST_PROMPTS = 8
ANSWER = 64  # tokens of an encoder-decoder's answer that calibrate its decoder
_PART_OF = 8  # of eight sequences six are fitted on, one chooses the ridge, one is held out
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class EUGenSpec:
    """Which blocks (paths that `regex` is found in) become EUGens of which size, and where their G come from."""

    regex: str
    size: EUGenSize
    g: str = "block"

    @staticmethod
    def parse(text: str) -> EUGenSpec:
        r"""Read 'regex:m=256,k=2' or 'regex:m=256,k=2,g=random', such as 'layers\.(8|9)\.mlp:m=256,k=2'.

        Raises UserError.
        """
        regex, colon, rest = text.rpartition(":")
        match = re.fullmatch(r"m=([0-9]{1,9}),k=([0-9]{1,9})(?:,g=([a-z]{1,16}))?", rest.replace(" ", ""))
        if not colon or not regex or match is None:
            raise UserError(
                f"--eugen {one_line(text, 80)!r} is not 'regex:m=FEATURES,k=ORDERS', such as 'mlp:m=256,k=2'"
            )
        g = match[3] or "block"
        if g not in KINDS:
            raise UserError(f"--eugen: g={g} is not known; choose from {', '.join(KINDS)}")
        try:
            re.compile(regex)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(f"--eugen: {one_line(regex, 80)!r} is not a regular expression: {error}") from None
        try:
            size = EUGenSize.read(ConfigReader({"m": int(match[1]), "k": int(match[2])}, ""))
        except UserError as error:
            raise UserError(str(error).replace("config.json:", "--eugen:")) from None
        return EUGenSpec(regex, size, g)


@dataclass(frozen=True)
class LayerReport:
    """One block before and after.

    fit: how near the EUGen is on rows held out. flops: a token, multiplications and additions counted. bytes: of its parameters
    as the checkpoint stores them.
    """

    path: str
    size: EUGenSize
    fit: Fit
    parameters: tuple[int, int]
    flops: tuple[int, int]
    bytes: tuple[int, int]


@dataclass(frozen=True)
class EUGenReport:
    """A finished rewrite. tokens: of calibration, all stacks together. bytes: of model.safetensors before and after."""

    path: Path
    layers: tuple[LayerReport, ...]
    sequences: int
    tokens: int
    bytes: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        return values | {"path": str(self.path)}


def rewrite_eugen(
    model_dir: str,
    spec: str | EUGenSpec,
    calibration: Path | Sequence[Sequence[int]],
    output_dir: Path,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
    flow: str = "rewritten",
) -> EUGenReport:
    """Write the model with the blocks that `spec` matches turned into EUGens to `output_dir`, which must not exist.

    model_dir: directory, .gguf file or hub id. spec: 'regex:m=256,k=2'. calibration: a text file, a task file (.tsv), or
    token prompts; at most MOST_TOKENS tokens are used. flow: whether later blocks are fitted to inputs that the
    "rewritten" ones give, or the "original". The same arguments give the same weights on one machine and thread count.
    Raises UserError for a regex that matches nothing, sizes out of range, too little text, or a disk that refuses.
    """
    asked = EUGenSpec.parse(spec) if isinstance(spec, str) else spec
    if output_dir.exists() or output_dir.is_symlink():
        raise UserError(f"{output_dir} exists already; remove it or choose another -o")
    checkpoint = open_checkpoint(model_dir)
    model = build(checkpoint.config)
    blocks = gated_mlps(model)
    paths = [path for path in blocks if re.search(asked.regex, path)]
    if not paths:
        some = ", ".join(list(blocks)[:2]) or "none"
        raise UserError(f"--eugen: {one_line(asked.regex, 80)!r} matches no feed-forward block; there are {some} …")
    generation = generation_of(model, checkpoint)
    prompts = read_prompts(calibration, checkpoint, generation)
    if len(prompts) < FEWEST_PROMPTS:
        raise UserError(
            f"calibration has {len(prompts)} sequences, at least {FEWEST_PROMPTS} are needed; give more text"
        )
    _require_memory(model, asked.size, sum(len(p) for p in prompts))
    layers: dict[str, EUGen] = {}
    reports: list[LayerReport] = []

    def visit(path: str, block: GatedMLP, x: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
        layer, dtype = eugen_for(blocks[path], asked.size), _dtype(checkpoint, path)
        fit = transfer(block, x, parts_of(sequence), layer, asked.g, seed + paths.index(path), dtype)
        layers[path] = layer
        reports.append(_compare(path, blocks[path], layer, fit, dtype))
        progress(f"eugen {len(layers)}/{len(paths)}: {path}, held-out error {fit.error:.3f}")
        flowing = layer if flow == "rewritten" else block
        return torch.cat([flowing(rows) for rows in torch.split(x, CHUNK)])

    progress(f"eugen: {len(prompts)} calibration sequences, {len(paths)} of {len(blocks)} feed-forward blocks")
    tokens = BlockForward(model, checkpoint, generation, prompts, paths, visit).run()
    before = sum(path.stat().st_size for path in checkpoint.files)
    after = _write(checkpoint, asked.size, layers, output_dir)
    return EUGenReport(output_dir, tuple(reports), len(prompts), tokens, (before, after))


def parts_of(sequence: torch.Tensor) -> torch.Tensor:
    """TRAIN, TUNE or HELD for each row. Complete sequences are held out: rows of one sequence are too alike."""
    turn = sequence % _PART_OF
    part = torch.full_like(turn, TRAIN)
    part[turn == _PART_OF - 2] = TUNE
    part[turn == _PART_OF - 1] = HELD
    return part


def _dtype(checkpoint: Checkpoint, path: str) -> torch.dtype:
    """That of the block's own weights, or float32 where new ones cannot be stored in it."""
    dtype = checkpoint.info(f"{path}.gate_proj.weight").dtype
    return dtype if dtype in _DTYPES else torch.float32


def _compare(path: str, block: nn.Module, layer: EUGen, fit: Fit, dtype: torch.dtype) -> LayerReport:
    counts = tuple(sum(p.numel() for p in module.parameters()) for module in (block, layer))
    products = tuple(sum(m.weight.numel() for m in b.modules() if isinstance(m, Linear)) for b in (block, layer))
    return LayerReport(
        path,
        layer.size,
        fit,
        (counts[0], counts[1]),
        (2 * products[0], 2 * products[1]),
        (counts[0] * dtype.itemsize, counts[1] * dtype.itemsize),
    )


def generation_of(model: LanguageModel, checkpoint: Checkpoint) -> Generation:
    """How the calibration text goes through the model: the kind of loop, where answers start and stop, and the vocabulary."""
    if model.sound_layout() is not None:
        raise UserError("--eugen fits blocks on text, and this model reads sound")
    if model.task not in ("seq2seq", "causal"):
        kind = checkpoint.config.get("model_type")
        raise UserError(f"{checkpoint.source}: calibration text cannot go through a {kind}; no rewrite for it yet")
    tokenizer = checkpoint.tokenizer
    logits = next(p for g in model.graphs() for p in g.outputs if p.name == "logits")
    vocab = min([int(logits.shape[-1]), *(m.weight.shape[0] for m in model.modules() if isinstance(m, Embedding))])
    limit = checkpoint.generation.get("max_new_tokens")
    new_tokens = limit if isinstance(limit, int) and 0 < limit <= ANSWER else ANSWER
    pad = tokenizer.pad_id if tokenizer is not None else None
    start, forced = decoder_prompt(model, checkpoint.generation, checkpoint.config)
    return Generation(
        task=model.task,
        decoder_start=start,
        forced=forced,
        eos_ids=tuple(sorted(tokenizer.eos_ids)) if tokenizer is not None else (),
        pad_id=pad if pad is not None and pad < vocab else 0,
        vocab=vocab,
        max_context=model.max_context,
        max_new_tokens=min(new_tokens, model.max_context - 1),
        prefill_chunk=PREFILL_CHUNK,
    )


def _require_memory(model: LanguageModel, size: EUGenSize, tokens: int) -> None:
    """Refuse before the work: sums of the least squares, the activations of a block, the keys and values of all layers."""
    features = 1 + size.k * size.m
    widest = max(m.weight.shape[0] for m in model.modules() if isinstance(m, Linear) and not m.weight.numel() >> 31)
    states = 0
    for state in (s for g in model.graphs() for s in g.states if s.kind == "kv"):
        states += int(state.shape[1]) * int(state.shape[3])
    sums = 8 * 6 * features * features
    matrices = 4 * 4 * size.factors * size.m * max(b.gate_proj.weight.shape[1] for b in gated_mlps(model).values())
    needed = sums + matrices + 4 * tokens * states + 4 * min(tokens, CHUNK) * (3 * widest + 2 * features)
    require_available(needed, f"an EUGen of m={size.m},k={size.k} takes memory", "choose a smaller m or k")


def _write(checkpoint: Checkpoint, size: EUGenSize, layers: dict[str, EUGen], output: Path) -> int:
    """The new checkpoint directory, which appears when whole; returns the bytes of its model.safetensors."""
    asked = checkpoint.config.get(CONFIG, {})
    entries = asked.get(KEY, {}) | {path: asdict(size) for path in layers}
    with new_checkpoint(output) as folder:
        written = _write_weights(checkpoint, layers, folder / "model.safetensors")
        write_side_files(checkpoint, checkpoint.config | {CONFIG: asked | {KEY: entries}}, folder)
    return written


def _write_weights(checkpoint: Checkpoint, layers: dict[str, EUGen], file: Path) -> int:
    """Tensors that stay, one by one from the mapped file, and the new layers in place of the blocks they replace."""
    kept = [n for n in checkpoint.names() if not any(n.startswith(f"{path}.") for path in layers)]
    new: dict[str, torch.Tensor] = {}
    for path, layer in layers.items():
        dtype = _dtype(checkpoint, path)
        new |= {f"{path}.{name}": p.detach().to(dtype) for name, p in layer.named_parameters()}
    for name, value in new.items():
        check_finite(name, value)
    entries = [(n, SAFETENSORS_NAMES[checkpoint.info(n).dtype], checkpoint.info(n).shape) for n in kept]
    entries += [(n, SAFETENSORS_NAMES[t.dtype], tuple(t.shape)) for n, t in new.items()]
    with StreamingWriter(file, entries, {"format": "pt"}) as writer:
        for name in kept:
            writer.write(name, checkpoint.tensor(name))
        for name, value in new.items():
            writer.write(name, value)
    return writer.file_bytes
