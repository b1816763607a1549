"""An encoder-decoder from decoder-only checkpoints, before any training: Gemma 2 to T5Gemma, Gemma 3 to T5Gemma 2.

The rules are those of arXiv 2504.06225 and 2512.14856. The encoder is a checkpoint without its causal mask, the decoder a
checkpoint with attention to the encoder: the same one (balanced), or another (a large encoder for a small decoder).
T5Gemma's cross-attention starts as the decoder's self-attention where both are of one width, and at random where they are not:
then it must be trained alone first. T5Gemma 2's merged attention has no weights of its own.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.checkpoint import Checkpoint, check_finite
from ..checkpoints.opening import open_checkpoint
from ..checkpoints.safetensors_writer import StreamingWriter
from ..errors import UserError
from ..models.config import ConfigReader
from ..models.families.t5gemma2 import EMBEDDING, END_OF_IMAGE
from ..models.registry import build
from ..system.dtypes import SAFETENSORS_NAMES
from ..system.reading import one_line
from .write_checkpoint import new_checkpoint

KINDS = {"gemma2": "t5gemma", "gemma3_text": "t5gemma2"}
ALONE_STEPS = 1000  # how long the paper trains random cross-attention with all else frozen
_ELEMENTS = 4 << 20  # copied at a time
_NORMS = {
    "pre_self_attn_layernorm": "input_layernorm",
    "post_self_attn_layernorm": "post_attention_layernorm",
    "pre_cross_attn_layernorm": "input_layernorm",
    "post_cross_attn_layernorm": "post_attention_layernorm",
}
_STACK_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "hidden_activation", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("pad_token_id", "eos_token_id", "bos_token_id", "attention_bias", "query_pre_attn_scalar", "sliding_window"),
    *("layer_types", "sliding_window_pattern", "rope_parameters", "rope_theta", "rope_local_base_freq", "rope_scaling"),
    *("final_logit_softcapping", "attn_logit_softcapping"),
)
_GEMMA2_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
# transformers builds a vision tower whatever the checkpoint holds: the smallest that it takes. No weights of it are written.
_NO_VISION = {
    "mm_tokens_per_image": 4,
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 16,
        "patch_size": 8,
    },
}


@dataclass(frozen=True)
class Adapted:
    """A finished adaptation.

    copied: number of tensors from a source; drawn: names of those drawn at random; zeros: of those that start as zeros.
    train_first: a pattern of the names that must be trained alone first, with all else frozen; None where there are none.
    bytes: of model.safetensors.
    """

    path: Path
    model_type: str
    copied: int
    drawn: tuple[str, ...]
    zeros: tuple[str, ...]
    train_first: str | None
    bytes: int


@dataclass(frozen=True)
class _Origin:
    """Where a tensor of the new checkpoint comes from. Without a checkpoint it is drawn with standard deviation `std`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    checkpoint: Checkpoint | None = None
    name: str = ""
    row: int | None = None
    scale: float = 1.0
    std: float = 0.0


def adapt(
    encoder: str,
    decoder: str | None,
    output: Path,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Adapted:
    """Write the encoder-decoder made of two decoder-only checkpoints to the directory `output`, which must not exist.

    encoder, decoder: directory, .gguf file or hub id of a Gemma 2 or Gemma 3 text checkpoint; decoder None: the same for both.
    seed: of what is drawn at random; the same arguments give the same file. Memory stays at a few rows at a time. Raises
    UserError for checkpoints that do not go together, or a disk that refuses.
    """
    if output.exists() or output.is_symlink():
        raise UserError(f"{output} exists already; remove it or choose another -o")
    sources = (open_checkpoint(encoder), open_checkpoint(encoder if decoder is None else decoder))
    config = _config(*sources)
    origins = _origins(config, *sources)
    for source in dict.fromkeys(sources):
        _expect_all_used(source, origins)
    drawn = tuple(n for n, o in origins.items() if o.checkpoint is None and o.std)
    zeros = tuple(n for n, o in origins.items() if o.checkpoint is None and not o.std)
    size = _write(config, origins, sources[1], output, seed, progress)
    first = "cross_attn" if drawn else None
    if first:
        progress(
            f"cross-attention is random: train {len(drawn)} tensors ('{first}') alone for {ALONE_STEPS} steps first"
        )
    copied = len(origins) - len(drawn) - len(zeros)
    return Adapted(output, str(config["model_type"]), copied, drawn, zeros, first, size)


def _config(encoder: Checkpoint, decoder: Checkpoint) -> dict[str, Any]:
    """config.json of the new model, as both transformers and `models.build` read it."""
    kinds = [_kind(source) for source in (encoder, decoder)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"{encoder.source} is a {kinds[0]}, {decoder.source} a {kinds[1]}; both have to be of one family"
        )
    first, second = _stack(encoder), _stack(decoder)
    if first.get("vocab_size") != second.get("vocab_size"):
        raise UserError(
            f"the vocabularies differ: {encoder.source} has {first.get('vocab_size')}, {decoder.source} {second.get('vocab_size')}"
        )
    both: dict[str, Any] = {
        key: second[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size") if key in second
    }
    both |= {
        "decoder_start_token_id": ConfigReader(second, "").token("bos_token_id", 2),
        "dropout_rate": 0.0,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
    }
    if kinds[0] == "gemma2":
        stacks = {
            "encoder": first | {"model_type": "t5_gemma_module"},
            "decoder": second | {"model_type": "t5_gemma_module", "is_decoder": True},
        }
        return both | stacks | {"model_type": "t5gemma", "architectures": ["T5GemmaForConditionalGeneration"]}
    text = first | {"model_type": "t5gemma2_text"}
    reader = _NO_VISION | {"model_type": "t5gemma2_encoder", "text_config": text, "eoi_token_index": END_OF_IMAGE}
    stacks = {"encoder": reader, "decoder": second | {"model_type": "t5gemma2_decoder"}}
    return both | stacks | {"model_type": "t5gemma2", "architectures": ["T5Gemma2ForConditionalGeneration"]}


def _kind(source: Checkpoint) -> str:
    kind = str(source.config.get("model_type"))
    if kind not in KINDS:
        raise UserError(
            f"{source.source}: model_type '{one_line(kind, 40)}' cannot be adapted; known: {', '.join(KINDS)}"
        )
    if source.config.get("use_bidirectional_attention"):
        raise UserError(f"{source.source}: use_bidirectional_attention is set; give a decoder-only checkpoint")
    if not ConfigReader(source.config, "").boolean("tie_word_embeddings", True):
        raise UserError(f"{source.source}: tie_word_embeddings is false; a head of its own has no place here")
    return kind


def _stack(source: Checkpoint) -> dict[str, Any]:
    """The keys of a decoder-only config that a stack keeps, with Gemma 2's default soft-caps written out."""
    defaults = _GEMMA2_CAPS if source.config["model_type"] == "gemma2" else {}
    return defaults | {key: source.config[key] for key in _STACK_KEYS if key in source.config}


def _origins(config: dict[str, Any], encoder: Checkpoint, decoder: Checkpoint) -> dict[str, _Origin]:
    """The origin of every tensor of the new model. Raises UserError for one that a source lacks or has in another shape."""
    model = build(config)
    section = ConfigReader(config["decoder"], "decoder.")
    std = section.number("initializer_range", 0.02)
    alike = config["encoder"].get("hidden_size") == config["decoder"].get("hidden_size")
    origins: dict[str, _Origin] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in model.tied:
            continue
        shape = tuple(parameter.shape)
        source = encoder if name.startswith("model.encoder.") and not name.startswith(EMBEDDING) else decoder
        if name.endswith(".eoi_embedding"):
            origins[name] = _end_of_image(shape, decoder)
            continue
        old = _source_name(name)
        info = source.info(old)
        dtype = torch.float32 if info.dtype == torch.float64 else info.dtype
        if "cross_attn" in name and not alike:
            matrix = name.endswith(".weight") and len(shape) == 2
            origins[name] = _Origin(shape, dtype, std=std if matrix else 0.0)
            continue
        source.expect(old, shape)
        origins[name] = _Origin(shape, dtype, source, old)
    return origins


def _source_name(name: str) -> str:
    """The decoder-only name of the tensor that becomes `name`: cross-attention is from self-attention, norms have new names."""
    old = re.sub(r"^model\.(encoder\.text_model|encoder|decoder)\.", "model.", name).replace(
        ".cross_attn.", ".self_attn."
    )
    return re.sub(r"\w+_layernorm(?=\.weight$)", lambda norm: _NORMS.get(norm[0], norm[0]), old)


def _end_of_image(shape: tuple[int, ...], decoder: Checkpoint) -> _Origin:
    """The token's row as the decoder-only model sees it, times sqrt(hidden); zeros where the vocabulary ends before."""
    info = decoder.info("model.embed_tokens.weight")
    if info.shape[0] <= END_OF_IMAGE:
        return _Origin(shape, torch.float32)
    return _Origin(shape, torch.float32, decoder, info.name, row=END_OF_IMAGE, scale=math.sqrt(info.shape[1]))


def _expect_all_used(source: Checkpoint, origins: dict[str, _Origin]) -> None:
    used = {o.name for o in origins.values() if o.checkpoint is source} | {
        "lm_head.weight",
        "model.embed_tokens.weight",
    }
    stray = [n for n in source.names() if n not in used and not n.endswith(".inv_freq")]
    if stray:
        raise UserError(
            f"{source.source}: {len(stray)} tensors have no place in the encoder-decoder (the first: {one_line(stray[0])})"
        )


def _write(
    config: dict[str, Any],
    origins: dict[str, _Origin],
    tokens: Checkpoint,
    output: Path,
    seed: int,
    progress: Callable[[str], None],
) -> int:
    """The new checkpoint directory, which appears when whole; returns the bytes of its model.safetensors."""
    with new_checkpoint(output) as folder:
        size = _write_weights(origins, folder / "model.safetensors", seed, progress)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        ids = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        generation = {key: config[key] for key in ids if key in config}
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
        if tokens.tokenizer is not None:
            tokens.tokenizer.save(folder)
    return size


def _write_weights(origins: dict[str, _Origin], file: Path, seed: int, progress: Callable[[str], None]) -> int:
    generator = torch.Generator().manual_seed(seed)
    entries = [(name, SAFETENSORS_NAMES[o.dtype], o.shape) for name, o in origins.items()]
    reported = -1
    with StreamingWriter(file, entries, {"format": "pt"}) as writer:
        for done, (name, origin) in enumerate(origins.items(), 1):
            for rows in _rows(origin, generator):
                check_finite(name, rows)
                writer.write(name, rows.to(origin.dtype))
            if 10 * done // len(origins) > reported:  # one line for each tenth
                reported = 10 * done // len(origins)
                progress(f"adapting: {10 * reported}% ({name})")
    return writer.file_bytes


def _rows(origin: _Origin, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """The tensor in float32, some rows at a time."""
    count, width = origin.shape[0], math.prod(origin.shape[1:])
    if origin.row is not None:
        assert origin.checkpoint is not None
        yield origin.checkpoint.rows(origin.name, origin.row, origin.row + 1)[0] * origin.scale
        return
    step = max(1, _ELEMENTS // max(1, width))
    for start in range(0, count, step):
        stop = min(start + step, count)
        if origin.checkpoint is not None:
            yield origin.checkpoint.rows(origin.name, start, stop)
        else:
            yield torch.randn(stop - start, *origin.shape[1:], generator=generator) * origin.std
