"""The child of `against`: transformers' model of a checkpoint beside ours, on the same tokens, layer by layer.

transformers gets no code of the checkpoint, no pickle and no network.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import nn

from ..audio.features import encoder_inputs, sample_sound
from ..bundle import SoundSpec
from ..errors import UserError
from ..models.language_model import LanguageModel
from ..models.loading import load_original
from ..models.opening import open_model
from ..models.registry import build
from ..runtimes.session import sized
from ..system.reading import one_line, shown
from ..system.stages import Stage
from ..system.subprocesses import Progress, serve
from .report import TOLERANCE

_PROMPT, _BATCH, _NEW = 20, 2, 8
_SOUND_SECONDS = 2.0
_CLASSES = {"causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM"}
_SUFFIXES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "MTModel")


class _Unknown(Exception):
    """transformers cannot say what this model computes. The text says why."""


def compare(model: str, progress: Progress) -> dict[str, Any]:
    """The fields of an `Independent`, or the `reason` why there is nothing to compare with."""
    checkpoint = open_model(model)
    ours = build(checkpoint.config)
    try:
        with Stage("loading transformers' model"):
            theirs, version = _theirs(model, ours)
    except _Unknown as unknown:
        return {"reason": str(unknown)}
    progress(f"comparing the checkpoint's reading with transformers {version}")
    load_original(ours, checkpoint)
    kind = Spoken if ours.sound_layout() is not None else _Seq2seq if ours.task == "seq2seq" else _Causal
    run = kind(ours, theirs)
    with Stage("comparing with transformers"), torch.no_grad():
        ids = _tokens(_vocab(ours), checkpoint.config)
        for _ in range(_NEW):
            ids = torch.cat((ids, run.theirs(ids)[:, -1:].argmax(-1)), 1)
        want, theirs_layers = _watched(run.their_layers(), lambda: run.theirs(ids))
        got, our_layers = _watched(run.our_layers(), lambda: run.ours(ids))
    if not bool(torch.isfinite(want).all()):
        return {"reason": "the logits of its model are not finite"}
    off = _difference(got, want)
    top1 = float((got.argmax(-1) == want.argmax(-1)).float().mean())
    differs = None if off <= TOLERANCE else _first_difference(our_layers, theirs_layers)
    return {
        "version": version,
        "max_relative_error": off,
        "top1": top1,
        "positions": want.shape[0] * want.shape[1],
        "tokens": int((got.argmax(-1) == want.argmax(-1))[:, -_NEW - 1 : -1].sum()),
        "differs": differs,
    }


def _theirs(folder: str, ours: LanguageModel) -> tuple[nn.Module, str]:
    """transformers' model in float32, and its version. Raises _Unknown."""
    if ours.task not in _CLASSES:
        raise _Unknown(f"it has no model of the task {ours.task!r}")
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    import transformers

    quiet: Any = transformers.logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        names = [n for n in (config.architectures or []) if isinstance(n, str) and n.endswith(_SUFFIXES)]
        chosen = next((getattr(transformers, n) for n in names if hasattr(transformers, n)), None)
        default = _CLASSES[ours.task] if ours.sound_layout() is None else "AutoModelForSpeechSeq2Seq"
        chosen = chosen or getattr(transformers, default)
        options = {"trust_remote_code": False} if chosen.__name__.startswith("Auto") else {}
        theirs, info = chosen.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # whatever it stumbles on in a stranger's files, it cannot be compared with
        raise _Unknown(
            f"it cannot load the checkpoint ({one_line(type(error).__name__)}: {one_line(error, 160)})"
        ) from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise _Unknown(f"it does not find {len(missing)} weights ({shown(missing[0], 80)} and the like) in the files")
    return theirs.eval(), str(transformers.__version__)


def _vocab(model: LanguageModel) -> int:
    (vocab,) = {p.shape[-1] for g in model.graphs() for p in g.outputs if p.name == "logits"}
    return int(vocab)


def _tokens(vocab: int, config: Mapping[str, Any]) -> torch.Tensor:
    """Random token ids [B, S], none of those that stand for something else than text."""
    special = {
        value for key, value in config.items() if key.endswith(("token_id", "token_index")) and type(value) is int
    }
    allowed = torch.tensor([i for i in range(min(vocab, 1 << 16)) if i not in special] or [0])
    generator = torch.Generator().manual_seed(0)
    return allowed[torch.randint(0, len(allowed), (_BATCH, _PROMPT), generator=generator)]


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
        return {name: _stack(self._theirs, len(layers), name) for name, layers in self._ours.stacks().items()}


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


def _stack(model: nn.Module, count: int, name: str) -> list[nn.Module]:
    """The layers of transformers' stack of so many layers; [] if none is found."""
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    named = [m for path, m in lists if name in path.split(".")] or [m for _, m in lists]
    return list(named[0]) if named else []


def _watched(stacks: Mapping[str, Sequence[nn.Module]], run: Any) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
    """What `run` returns, and of each stack the input of its first layer and the outputs of all."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in stacks}
    hooks = []
    for name, layers in stacks.items():

        def keep(_: nn.Module, __: Any, out: Any, seen: list[torch.Tensor] = seen[name]) -> None:
            seen.append(out if isinstance(out, torch.Tensor) else out[0])

        def first(_: nn.Module, args: Any, kwargs: Any, seen: list[torch.Tensor] = seen[name]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        if layers:
            hooks.append(layers[0].register_forward_pre_hook(first, with_kwargs=True))
            hooks += [layer.register_forward_hook(keep) for layer in layers]
    try:
        return run(), seen
    finally:
        for hook in hooks:
            hook.remove()


def _difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference relative to the largest value of `want`; infinite for other shapes or what is not finite."""
    if got.shape != want.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))


def _first_difference(ours: Mapping[str, Sequence[torch.Tensor]], theirs: Mapping[str, Sequence[torch.Tensor]]) -> str:
    """The first part whose output differs, in words."""
    for name in sorted(ours, key=lambda n: n != "encoder"):
        pairs = list(zip(ours[name], theirs.get(name, []), strict=False))
        for i, (whole, want) in enumerate(pairs):
            got = whole[:, : want.shape[1]]  # of a sound there may be masked positions behind
            if _difference(got, want) > TOLERANCE:
                return f"the {name}'s embedding" if i == 0 else f"layer {i - 1} of the {name}"
        if not pairs:
            return f"the {name}, whose layers transformers does not show"
    return "what stands behind the last layer (norm or head)"


def _job(job: dict[str, Any], progress: Progress) -> dict[str, Any]:
    try:
        return compare(job["model"], progress)
    except MemoryError:
        raise UserError("two models in float32 took more memory than there is") from None


if __name__ == "__main__":
    serve(_job)
