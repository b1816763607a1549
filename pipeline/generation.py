"""How a bundle generates: its `Generation`, from the model, the configs and the request."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from ..bundle import MOST_IDS, PREFILL_CHUNK, ContextSpec, EmbeddingSpec, Generation
from ..checkpoints.checkpoint import Checkpoint
from ..errors import UserError
from ..models.embedding import EmbeddingModel
from ..models.language_model import LanguageModel
from ..models.layers.linear import Embedding
from ..runtimes.speech_rules import prefix
from ..system.reading import shown
from .answering import Note, end_tokens, sampling_of
from .speech import default_language, speech_of

DEFAULT_CONTEXT = 4096
_NEW_TOKENS = 256
FORCED = "forced_bos_token_id"


def generation_of(
    model: LanguageModel,
    checkpoint: Checkpoint,
    config: dict[str, Any],
    max_context: int | None = None,
    note: Note = lambda _: None,
) -> Generation:
    """How `model` generates. max_context: tokens that a prompt and its answer may take; None: at most DEFAULT_CONTEXT.

    note: gets a line where what the configs say is not enough, or not done. Raises UserError for a context too short, or token
    ids that are none.
    """
    tokenizer = checkpoint.tokenizer
    eos = set(tokenizer.eos_ids) if tokenizer is not None else set()
    for source in (checkpoint.generation, config, config.get("decoder")):
        if isinstance(source, dict):
            eos |= _token_ids("eos_token_id", source.get("eos_token_id"))
    if model.task != "module":
        eos = end_tokens(tokenizer, eos, note)
    limit = DEFAULT_CONTEXT if max_context is None else max_context
    if limit < 2:
        raise UserError(f"--max-context {limit} is too short; give at least 2")
    context = min(model.max_context, limit)
    new_tokens = checkpoint.generation.get("max_new_tokens")
    new_tokens = new_tokens if isinstance(new_tokens, int) and new_tokens > 0 else _NEW_TOKENS
    graphs = model.graphs()
    widths = [int(p.shape[-1]) for g in graphs for p in g.outputs if p.name == "logits"]
    main = [m for m in model.modules() if isinstance(m, Embedding)]
    if model.task == "memory":  # the context's decoder has another vocabulary, which only its graph reads
        main = [m for m in main if m.weight.shape[0] >= widths[0]] or main
    vocab = min([*widths, *(m.weight.shape[0] for m in main)], default=1)
    start, forced = decoder_prompt(model, checkpoint.generation, config)
    layout = model.sound_layout()
    speech = None if layout is None else speech_of(layout, checkpoint, config, context, vocab)
    if speech is not None:
        forced = prefix(speech, default_language(speech), None, timestamps=False)
    for key, token in (("decoder_start_token_id", start), *((FORCED, token) for token in forced)):
        if (token or 0) >= vocab:
            raise UserError(f"config.json: {key} is {token}, the vocabulary {vocab}")
    pad = tokenizer.pad_id if tokenizer is not None else None
    return Generation(
        task=model.task,
        decoder_start=start,
        forced=forced,
        eos_ids=tuple(sorted(eos)),
        pad_id=pad if pad is not None and pad < vocab else 0,
        vocab=vocab,
        max_context=context,
        max_new_tokens=max(1, min(new_tokens, context - 1)),
        prefill_chunk=min([PREFILL_CHUNK, *(g.bounds["sequence"][1] for g in graphs if "sequence" in g.bounds)]),
        context=_context(model, context) if model.task == "memory" else None,
        sampling=sampling_of(checkpoint.generation, note),
        speech=speech,
        embedding=_embedding(model) if isinstance(model, EmbeddingModel) else None,
    )


def _embedding(model: EmbeddingModel) -> EmbeddingSpec:
    spec = model.embedding
    return EmbeddingSpec.model_validate(
        {
            "size": model.size,
            "pooling": spec.pooling,
            "normalised": spec.normalised,
            "similarity": spec.similarity,
            "prompts": dict(spec.prompts),
            "default_prompt": spec.default_prompt,
            "lower_case": spec.lower_case,
        }
    )


def decoder_prompt(
    model: LanguageModel, generation: dict[str, Any], config: dict[str, Any]
) -> tuple[int | None, tuple[int, ...]]:
    """The token that a decoder starts from, and those that every answer begins with.

    generation: the contents of generation_config.json, which come before config.json. Raises UserError for ids that are none.
    """
    if model.task != "seq2seq":
        return model.decoder_start, ()
    start = _token_ids("decoder_start_token_id", generation.get("decoder_start_token_id"))
    forced = _token_ids(FORCED, (generation if FORCED in generation else config).get(FORCED))
    return min(start, default=model.decoder_start), tuple(forced)


def _context(model: LanguageModel, most: int) -> ContextSpec:
    """How the model reads a context; a part and the tokens after it fit the bundle's context."""
    layout = model.context_spec()
    assert layout is not None
    decoder = next(g for g in model.graphs() if g.name == "decoder")
    hidden = next(int(p.shape[-1]) for p in decoder.inputs if p.name == "memory")
    # the smaller vocabulary of the two stacks: both have such ids
    vocab = min(m.weight.shape[0] for m in model.modules() if isinstance(m, Embedding))
    window = min(layout.window, most - len(layout.tokens))
    if window < 1:
        raise UserError(f"--max-context {most} leaves no room for a context beside its memory tokens; give more")
    return ContextSpec(
        hidden=hidden, rows=decoder.bounds["memory"][1], vocab=vocab, **asdict(replace(layout, window=window))
    )


def _token_ids(key: str, value: object) -> set[int]:
    """The ids of a config's `key`: one, a list of them, or none. Raises UserError."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < MOST_IDS for v in values):
        raise UserError(f"{key} is {shown(value, 80)}, expected a token id or a list of them")
    return set(values)
