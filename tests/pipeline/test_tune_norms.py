"""Norms tuned to the codes: what is learnt, when it is kept, and what an export makes of it."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.calibration import opened, samples_of
from helpers.cli_runner import edgewright
from helpers.family_table import CONFIGS
from helpers.killed_export import Killed, contents, request
from helpers.requests import changed
from safetensors.torch import save_file

from edgewright.bundle import CHECKPOINT, Bundle
from edgewright.calibration.backward import GradientSession, backward_bytes
from edgewright.calibration.forward import CalibrationForward
from edgewright.calibration.samples import Sample
from edgewright.calibration.source import Source
from edgewright.checkpoints.checkpoint import Checkpoint
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.compiler import export
from edgewright.errors import UserError
from edgewright.models.loading import load_original
from edgewright.models.registry import build
from edgewright.pipeline import quantize
from edgewright.pipeline.gptq import CodeStore, load_rounded
from edgewright.pipeline.request import Request
from edgewright.pipeline.tune_norms import TuningOptions, tune_norms
from edgewright.quant.plan import BitPlan, Budget, Entry
from edgewright.quant.rtn import quantize_rtn
from edgewright.system.resumable import ResumableExport


def vectors(model: Any) -> dict[str, torch.Tensor]:
    """Parameters of modules whose weight is a vector, by path."""
    return {
        f"{path}.{leaf}": parameter
        for path, module in model.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 1
        for leaf, parameter in module.named_parameters(recurse=False)
    }


def detuned(checkpoint: Checkpoint, share: float) -> Any:
    """The original, with every norm's gain off by up to `share` of it."""
    model = build(checkpoint.config)
    load_original(model, checkpoint)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in vectors(model).items():
            offset = float(getattr(model.get_submodule(name.rpartition(".")[0]), "offset", 0.0))
            off = (parameter + offset) * (1 + share * (2 * torch.rand_like(parameter) - 1)) - offset
            parameter.copy_(off.to(checkpoint.info(model.tied.get(name, name)).dtype))
    return model


def small_parts(source: Source, samples: list[Sample]) -> Source:
    return dataclasses.replace(source, samples=samples, part_tokens=32)


QUICK = ("llama", "falcon_h1")


@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
)
def test_gains_that_are_off_are_found_again(family: str, tmp_path: Path) -> None:
    """Through every family's graphs: the gradient reaches each norm, and what was spoilt is mended on unseen data."""
    source = opened(family, tmp_path)
    if source.generation.task == "module":
        pytest.skip("no logits")
    source, checkpoint = small_parts(source, many(source.generation)), source.checkpoint
    model = detuned(checkpoint, 0.2)
    before = {n: p.detach().clone() for n, p in vectors(model).items()}
    made = tune_norms(model, source, options=TuningOptions(rate=0.02, epochs=6))
    assert made is not None
    assert made.values.keys() == {model.tied.get(n, n) for n in before}
    assert 0.0 < made.after < 0.6 * made.before
    for name, value in vectors(model).items():
        stored = model.tied.get(name, name)
        assert made.values[stored].dtype == checkpoint.info(stored).dtype
        assert torch.equal(made.values[stored].float(), value.detach())
        if bool(before[name].any()):
            assert not torch.equal(value.detach(), before[name]), name
    assert 0 < made.tokens < source.tokens


def many(spec: Any) -> list[Sample]:
    """Thirty samples of like kind as `samples_of` gives, each of other tokens."""
    found = []
    for i, sample in enumerate(samples_of(spec, 3) * 10):
        shift = [(t * 7 + 13 * i) % (spec.vocab - 4) + 4 for t in sample.tokens]
        decoded = sample.decoded[:1] + tuple((t * 5 + 11 * i) % (spec.vocab - 4) + 4 for t in sample.decoded[1:])
        found.append(dataclasses.replace(sample, tokens=tuple(shift), decoded=decoded))
    return found


def test_what_does_not_help_is_not_kept(tmp_path: Path) -> None:
    source = opened("llama", tmp_path)
    model = detuned(source.checkpoint, 0.01)
    before = {n: p.detach().clone() for n, p in vectors(model).items()}
    made = tune_norms(model, small_parts(source, many(source.generation)), options=TuningOptions(rate=5.0))
    assert made is not None
    assert (made.values, made.facts(), made.after) == ({}, {}, made.before)
    assert all(torch.equal(before[n], p) for n, p in vectors(model).items())


def test_the_mapped_checkpoint_is_not_written_into(tmp_path: Path) -> None:
    """Of a float32 file parameters are views: a step in place would move the original, too."""
    source = opened("llama", tmp_path)
    checkpoint, names = source.checkpoint, source.checkpoint.names()
    wide = tmp_path / "wide"
    shutil.copytree(tmp_path / "model", wide)
    save_file({n: checkpoint.tensor(n).float() for n in names}, wide / "model.safetensors")
    mapped = open_checkpoint(str(wide))
    before = {n: mapped.tensor(n).clone() for n in names}
    model = build(mapped.config)
    entries = {n: Entry(2, 32, 1.0, "") for n in names if n.endswith("proj.weight")}
    load_rounded(
        model, mapped, BitPlan(1, "by hand", Budget("bits", 4.0), entries, 0.0, 0), CodeStore(tmp_path / "codes")
    )
    made = tune_norms(
        model,
        small_parts(dataclasses.replace(source, checkpoint=mapped, config=mapped.config), many(source.generation)),
    )
    assert made is not None
    assert made.before > 0.0
    for name in names:
        assert torch.equal(mapped.tensor(name), before[name]), name


def test_equal_parts_are_apart_and_learnt_from_alike(tmp_path: Path) -> None:
    source = opened("llama", tmp_path)
    source = small_parts(source, samples_of(source.generation, 1) * 40)
    made = tune_norms(detuned(source.checkpoint, 0.1), source)
    assert made is not None
    assert made.after < made.before


def test_a_large_vocabulary_thins_out_samples_before_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All positions of the samples that are left: were it one a sample, it would be the first, which is like no other."""
    source = opened("llama", tmp_path)
    source = dataclasses.replace(source, samples=many(source.generation) * 4, part_tokens=200)
    asked: list[tuple[int, int]] = []
    logits = CalibrationForward.logits

    def watched(self: CalibrationForward, most: int) -> Any:
        found, real = logits(self, most)
        asked.append((len(found), int(real.sum())))
        return found, real

    monkeypatch.setattr(CalibrationForward, "logits", watched)
    few = TuningOptions(logits=1, fewest_positions=32)
    made = tune_norms(detuned(source.checkpoint, 0.1), source, options=few)
    assert made is not None
    assert {rows for rows, _ in asked} == {2}
    assert all(positions >= 14 for _, positions in asked)  # of 7 to 9 tokens each


@pytest.mark.parametrize(
    "family", ["llama", "t5gemma", "mu", "modernbert-decoder", "qwen3_5_text", "hgrn2", "phi4flash"]
)
@pytest.mark.parametrize("length", [12, 200])
def test_what_a_backward_pass_keeps_is_within_the_estimate(
    family: str, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONFIGS[family], "max_position_embeddings", 512)
    source = opened(family, tmp_path)
    spec = source.generation.model_copy(update={"max_context": 512})
    source = dataclasses.replace(source, generation=spec)
    tokens = tuple(4 + i % (spec.vocab - 4) for i in range(length))
    decoded = () if spec.decoder_start is None else (spec.decoder_start, *tokens[1:])
    sample = Sample(tokens, decoded if spec.task == "seq2seq" else ())
    model = source.build()
    load_original(model, source.checkpoint)
    for parameter in vectors(model).values():
        parameter.requires_grad_()
    held: dict[int, int] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        held[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        session = GradientSession(model.graphs())
        logits, _ = CalibrationForward(model, source.over([sample]), session=session).logits(length)
        torch.as_tensor(logits).sum().backward()  # what is saved lives until here: no address comes twice
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = sum(size for place, size in held.items() if place not in weights)
    assert 0 < kept <= backward_bytes(model, sample.size, sample.size, length)


def test_too_few_data_are_none(tmp_path: Path) -> None:
    source = opened("llama", tmp_path)
    few = small_parts(source, samples_of(source.generation, 3))
    assert tune_norms(detuned(source.checkpoint, 0.1), few) is None


def test_a_model_is_loaded_as_its_codes_and_scales_have_it(tmp_path: Path) -> None:
    """From finished codes where there are any, rounded to nearest elsewhere, 16 bits as bfloat16."""
    checkpoint = opened("llama", tmp_path).checkpoint
    names = [n for n in checkpoint.names() if re.search(r"layers\.0\..*proj\.weight", n)]
    entries = {n: Entry((3, 4, 16)[i % 3], 32, 1.0, "", "gptq") for i, n in enumerate(names)}
    entries = {n: dataclasses.replace(e, group_size=64) if e.bits == 16 else e for n, e in entries.items()}
    store = CodeStore(tmp_path / "codes")
    ready = quantize_rtn(checkpoint.tensor(names[0]) * 2, 3, 32)
    store.write(names[0], ready)
    model = build(checkpoint.config)
    load_rounded(model, checkpoint, BitPlan(1, "by hand", Budget("bits", 4.0), entries, 0.0, 0), store)
    for name, parameter in model.named_parameters():
        value = checkpoint.tensor(name)
        if name == names[0]:
            want = ready.dequantize()
        elif name not in entries:
            want = value.float()
        elif entries[name].bits == 16:
            want = value.to(torch.bfloat16).float()
        else:
            want = quantize_rtn(value, entries[name].bits, 32).dequantize()
        assert torch.equal(parameter, want), name


def enough_data(example: str, num_layers: int | None = 2) -> Request:
    """Data of an example in more parts than tuning needs."""
    return request(example, num_layers, tokens=1200, part_tokens=64)


@pytest.mark.slow
def test_an_export_tunes_norms_and_says_so(tmp_path: Path) -> None:
    asked = changed(enough_data("deltanet-g2p", None), bits=3.0)
    told: list[str] = []
    made = export(asked, tmp_path / "tuned", progress=told.append)  # verified: the artefact holds them
    facts = Bundle.open(tmp_path / "tuned").manifest.tuned_norms
    assert facts is not None
    assert 0.0 < facts.after < 0.9 * facts.before
    assert any(line.startswith("norms: tuned, from 0.") for line in told)
    kept = export(changed(asked, norms="kept", verify=False), tmp_path / "kept")
    assert Bundle.open(tmp_path / "kept").manifest.tuned_norms is None
    source = open_checkpoint(asked.model)
    stored = {n: open_checkpoint(str(tmp_path / n / CHECKPOINT)) for n in ("tuned", "kept")}
    differing = set()
    for name in made.planned.other:
        original = source.tensor(name)
        assert torch.equal(stored["kept"].tensor(name), original)
        assert stored["tuned"].info(name).dtype == original.dtype
        differing |= set() if torch.equal(stored["tuned"].tensor(name), original) else {name}
    assert differing == {n for n in vectors(build(source.config)) if source.tensor(n).any()}
    codes = [n for n in stored["kept"].names() if n.endswith(".codes")]
    assert all(torch.equal(stored["kept"].tensor(n), stored["tuned"].tensor(n)) for n in codes)
    assert kept.planned.plan == made.planned.plan


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("half way", marks=pytest.mark.slow),
        pytest.param("written, not marked", marks=pytest.mark.slow),
        pytest.param("before the checkpoint", marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_beside_the_tuning_ends_in_the_same_bytes(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = enough_data("deltanet-g2p")
    whole = export(changed(asked, verify=False), tmp_path / "whole")
    assert whole.manifest.tuned_norms is not None
    finish = ResumableExport.finish

    def dying(self: ResumableExport, stage: str, facts: Any) -> None:
        if stage == "norms":
            raise Killed
        finish(self, stage, facts)

    def half_way(text: str) -> None:
        if text == "norms: 50%":
            raise Killed

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ResumableExport, "discard", ResumableExport.leave)
        if moment == "written, not marked":
            patched.setattr(ResumableExport, "finish", dying)
        elif moment == "before the checkpoint":
            patched.setattr(quantize, "quantize_checkpoint", _killed)
        with pytest.raises(Killed):
            export(
                changed(asked, verify=False), tmp_path / "killed", progress=half_way if moment == "half way" else str
            )
    if moment == "before the checkpoint":
        monkeypatch.setattr(quantize, "tune_norms", _killed)  # what is found is not looked for again
    export(changed(asked, verify=False), tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def _killed(*_: Any) -> Any:
    raise Killed


@pytest.mark.slow
def test_norms_are_kept_where_memory_does_not_hold_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "tuning_bytes", lambda *_: 1 << 50)
    told: list[str] = []
    made = export(changed(enough_data("t5gemma-g2p"), verify=False), tmp_path / "bundle", progress=told.append)
    assert made.manifest.tuned_norms is None
    assert any(line.startswith("norms: kept, as tuning them would take about 1048576.0 GiB") for line in told)


def test_memory_that_is_gone_by_then_is_said_and_codes_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = iter([1, 1 << 50])
    monkeypatch.setattr(quantize, "tuning_bytes", lambda *_: next(sizes))
    with pytest.raises(UserError, match=r"tuning norms takes memory: about 1048576.0 GiB") as caught:
        export(changed(enough_data("t5gemma-g2p"), verify=False), tmp_path / "bundle")
    assert "the same command goes on from there" in caught.value.__notes__[0]


def test_the_option_is_a_choice(tmp_path: Path) -> None:
    model = tiny.write_tiny_llama(tmp_path / "model")
    done = edgewright("export", "-m", model, "--norms", "bent", "-o", tmp_path / "bundle")
    assert done.exit_code == 2
    assert "'bent' is not one of 'tuned', 'kept'" in done.output
