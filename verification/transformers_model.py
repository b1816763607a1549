"""The child of `against`: transformers' model of a checkpoint beside ours, on the same tokens, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import nn

from ..audio.features import encoder_inputs, sample_sound
from ..bundle import SoundSpec
from ..errors import UserError, VerificationFailure
from ..models.embedding import EmbeddingModel
from ..models.language_model import LanguageModel
from ..models.loading import load_original
from ..models.opening import open_model
from ..models.registry import build
from ..runtimes.session import sized
from ..system.reading import one_line
from ..system.stages import Stage
from ..system.subprocesses import Progress, serve
from .report import TOLERANCE
from .transformers_reading import (
    Unknown,
    difference,
    first_difference,
    load_theirs,
    random_tokens,
    stack_of,
    their_work,
    watched,
)
from .transformers_vectors import compare_vectors

_PROMPT, _BATCH, _NEW = 20, 2, 8
_SOUND_SECONDS = 2.0
_CLASSES = {"causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM"}
_SUFFIXES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "MTModel")


def compare(model: str, progress: Progress, pooling: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of an `Independent`, or the `reason` why there is nothing to compare with."""
    checkpoint = open_model(model, pooling=pooling)
    ours = build(checkpoint.config)
    if isinstance(ours, EmbeddingModel):
        return compare_vectors(model, ours, checkpoint, progress, pooling)
    try:
        with their_work("load the checkpoint"):
            theirs, version = _theirs(model, ours)
        progress(f"comparing the checkpoint's reading with transformers {version}")
        kind = Spoken if ours.sound_layout() is not None else _Seq2seq if ours.task == "seq2seq" else _Causal
        run = kind(ours, theirs)
        ids = random_tokens(_vocab(ours), checkpoint.config, _BATCH, _PROMPT)
        with their_work("compute the model"), torch.no_grad():
            for _ in range(_NEW):
                ids = torch.cat((ids, run.theirs(ids)[:, -1:].argmax(-1)), 1)
            want, theirs_layers = watched(run.their_layers(), lambda: run.theirs(ids))
    except Unknown as unknown:
        return {"reason": str(unknown)}
    load_original(ours, checkpoint)
    with Stage("computing the checkpoint's model"), torch.no_grad():
        got, our_layers = watched(run.our_layers(), lambda: run.ours(ids))
    if not bool(torch.isfinite(want).all()):
        return {"reason": "the logits of its model are not finite"}
    off = difference(got, want)
    top1 = float((got.argmax(-1) == want.argmax(-1)).float().mean())
    differs = None if off <= TOLERANCE else first_difference(our_layers, theirs_layers)
    return {
        "version": version,
        "max_relative_error": off,
        "top1": top1,
        "positions": want.shape[0] * want.shape[1],
        "tokens": int((got.argmax(-1) == want.argmax(-1))[:, -_NEW - 1 : -1].sum()),
        "differs": differs,
    }


def _theirs(model: str, ours: LanguageModel) -> tuple[nn.Module, str]:
    if ours.task not in _CLASSES:
        raise Unknown(f"it has no model of the task {ours.task!r}")
    auto = _CLASSES[ours.task] if ours.sound_layout() is None else "AutoModelForSpeechSeq2Seq"
    return load_theirs(model, auto, _SUFFIXES)


def _vocab(model: LanguageModel) -> int:
    (vocab,) = {p.shape[-1] for g in model.graphs() for p in g.outputs if p.name == "logits"}
    return int(vocab)


class _Causal:
    """Both models of a decoder alone, given ids [B, S], give logits [B, S, vocab]."""

    def __init__(self, ours: LanguageModel, theirs: nn.Module) -> None:
        self._ours, self._theirs = ours, theirs
        (self._graph,) = ours.graphs()

    def theirs(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._theirs(input_ids=ids, use_cache=False).logits
        return logits

    def ours(self, ids: torch.Tensor) -> torch.Tensor:
        length = ids.shape[1]
        sizes = {"batch": ids.shape[0], "capacity": length}
        given = {"input_ids": ids, "past_length": torch.tensor([0]), "logit_positions": torch.arange(length)}
        states = [torch.zeros(sized(s.shape, sizes), dtype=s.dtype) for s in self._graph.states]
        logits: torch.Tensor = self._graph.call([*(given[p.name] for p in self._graph.inputs), *states])[0]
        return logits

    def our_layers(self) -> dict[str, Sequence[nn.Module]]:
        return {name: list(layers) for name, layers in self._ours.stacks().items()}

    def their_layers(self) -> dict[str, Sequence[nn.Module]]:
        return {name: stack_of(self._theirs, len(layers), name) for name, layers in self._ours.stacks().items()}


class _Seq2seq(_Causal):
    """Both models of an encoder-decoder; ids are the decoder's, the encoder reads its first tokens."""

    def __init__(self, ours: LanguageModel, theirs: nn.Module) -> None:
        self._ours, self._theirs = ours, theirs
        self._graphs = {g.name: g for g in ours.graphs()}

    def theirs(self, ids: torch.Tensor) -> torch.Tensor:
        out = self._theirs(**self.their_source(ids), decoder_input_ids=self._started(ids), use_cache=False)
        logits: torch.Tensor = out.logits
        return logits

    def their_source(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What transformers' encoder reads."""
        source = ids[:, :_PROMPT]
        return {"input_ids": source, "attention_mask": torch.ones_like(source)}

    def our_source(self, ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The inputs of our graph `encoder`, and where its output is real."""
        source = ids[:, :_PROMPT]
        mask = torch.ones_like(source).bool()
        return [source, mask], mask

    def ours(self, ids: torch.Tensor) -> torch.Tensor:
        target = self._started(ids)
        read, mask = self.our_source(ids)
        (hidden,) = self._graphs["encoder"].call(read)
        cross = dict(zip(self._graphs["cross_kv"].output_names, self._graphs["cross_kv"].call([hidden]), strict=True))
        graph, length = self._graphs["decoder"], target.shape[1]
        sizes = {"batch": ids.shape[0], "capacity": length, "source": mask.shape[1]}
        given = {
            "input_ids": target,
            "past_length": torch.tensor([0]),
            "encoder_mask": mask,
            "logit_positions": torch.arange(length),
        }
        states = [
            cross[s.name] if s.name in cross else torch.zeros(sized(s.shape, sizes), dtype=s.dtype)
            for s in graph.states
        ]
        logits: torch.Tensor = graph.call([*(given[p.name] for p in graph.inputs), *states])[0]
        return logits

    def _started(self, ids: torch.Tensor) -> torch.Tensor:
        """The decoder's tokens: its start, then what follows the prompt."""
        start = 0 if self._ours.decoder_start is None else self._ours.decoder_start
        return torch.cat((torch.full((ids.shape[0], 1), start), ids[:, _PROMPT:]), 1)


class Spoken(_Seq2seq):
    """Both models of one that reads sound; ids are the decoder's, the encoder reads made-up sounds."""

    def __init__(self, ours: LanguageModel, theirs: nn.Module) -> None:
        super().__init__(ours, theirs)
        layout = ours.sound_layout()
        assert layout is not None
        sound = SoundSpec(**asdict(layout))
        samples = [sample_sound(sound, _SOUND_SECONDS, seed) for seed in range(_BATCH)]
        # whole positions, so that no silence behind a sound is read here and not there
        length = sound.row * (sound.real_rows(len(samples[0])) - 1) + sound.tail if sound.row else len(samples[0])
        self._samples = torch.from_numpy(np.stack(samples))[:, :length]
        rows = [encoder_inputs(sound, s) for s in self._samples.numpy()]
        self._inputs = {name: torch.from_numpy(np.concatenate([r[name] for r in rows])) for name in rows[0]}
        self._positions = sound.positions

    def their_source(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        if "input_features" in self._inputs:
            return {"input_features": self._inputs["input_features"]}
        return {"input_values": self._samples}

    def our_source(self, ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        mask = self._inputs.get("encoder_mask")
        if mask is None:
            mask = torch.ones(_BATCH, self._positions, dtype=torch.bool)
        return [self._inputs[p.name] for p in self._graphs["encoder"].inputs], mask


def _job(job: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """`compare`, or the `fault` of ours that ended it."""
    try:
        return compare(job["model"], progress, job.get("pooling", ()))
    except (UserError, VerificationFailure):
        raise
    except Exception as error:  # told apart from what transformers cannot do
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return {"reason": "two models in float32 took more memory than there is"}
        return {"fault": f"{type(error).__name__}: {one_line(error, 160)}"}


if __name__ == "__main__":
    serve(_job)
