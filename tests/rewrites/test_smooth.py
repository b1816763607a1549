"""Scaling folded into norms: the function stays, the error of planted outliers falls, and what cannot be folded is named."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import tiny
from helpers.family_table import CONFIGS
from helpers.requests import asking
from helpers.tiny_families import FAMILIES
from safetensors.torch import load_file, save_file

from edgewright import compiler
from edgewright.bundle import Generation
from edgewright.calibration.samples import Sample
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.cli import main
from edgewright.errors import UserError
from edgewright.models.decoder import DecoderLayer
from edgewright.models.layers.linear import Linear
from edgewright.models.layers.norm import RMSNorm
from edgewright.models.loading import load_original
from edgewright.models.registry import build
from edgewright.pipeline.plan import plan
from edgewright.quant.rtn import quantize_rtn
from edgewright.rewrites.channel_folds import scales
from edgewright.rewrites.smooth import Change, SmoothReport, rewrite_smooth
from edgewright.runtimes.eager import EagerSession
from edgewright.runtimes.generate import Stream, read_context

OUTLIERS = (3, 17, 29)  # channels whose activations are made 24 times as large


def planted(folder: Path, family: str, **options: Any) -> Path:
    """A tiny model; each norm's gain is large in a few channels. The linears were drawn without a thought of it."""
    path = tiny.write(folder / "model", CONFIGS[family], **options)
    model, weights = build(CONFIGS[family]), load_file(path / "model.safetensors")
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            gain, offset = weights[f"{name}.weight"].float(), module.offset
            outliers = [channel for channel in OUTLIERS if channel < len(gain)]
            gain[outliers] = (gain[outliers] + offset) * 24 - offset
            weights[f"{name}.weight"] = gain.to(weights[f"{name}.weight"].dtype)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def spec_of(path: Path) -> Generation:
    return plan(asking(str(path), bits=6.0, importance="uniform", max_context=48)).generation


def samples_of(spec: Generation, seed: int, count: int = 4) -> list[Sample]:
    rng = random.Random(seed)
    made = []
    for i in range(count):
        tokens = tuple(rng.randrange(4, spec.vocab) for _ in range(24 - i))
        decoded = (spec.decoder_start or 0, *tokens[: 12 + i]) if spec.task == "seq2seq" else ()
        context = tuple(rng.randrange(4, spec.context.vocab) for _ in range(20)) if spec.context is not None else ()
        made.append(Sample(tokens, decoded, context))
    return made


def logits(path: Path, spec: Generation, samples: list[Sample]) -> list[np.ndarray[Any, Any]]:
    """Of every token, with the whole model in memory and one sample after the other."""
    checkpoint = open_checkpoint(str(path))
    load_original(model := build(checkpoint.config), checkpoint)
    session = EagerSession(model.graphs())
    found = []
    for sample in samples:
        memory = read_context(session, spec, sample.context) if sample.context else None
        fed = np.array([sample.decoded if spec.task == "seq2seq" else sample.tokens], np.int64)
        stream = Stream(session, spec, [sample.tokens], fed.shape[1] + 1, memory)
        found.append(stream.feed(fed if spec.task == "seq2seq" else stream.pending, every=True)[0])
    return found


def smoothed(path: Path, folder: Path, bits: int = 4, group_size: int = 32) -> tuple[SmoothReport, Generation]:
    spec = spec_of(path)
    return rewrite_smooth(str(path), samples_of(spec, 1), folder / "smooth", bits, group_size), spec


@pytest.mark.parametrize("family", ["t5gemma", "llama", "gemma3_text", "olmo_hybrid", "dolphin", "mu", "hgrn2"])
def test_the_function_is_unchanged_and_outliers_are_folded(family: str, tmp_path: Path) -> None:
    path = planted(tmp_path, family)
    report, spec = smoothed(path, tmp_path)
    assert min(fold.ratio for fold in report.folds) < 0.7
    assert all(fold.ratio < 1.0 and fold.alpha > 0 for fold in report.folds)
    before, after = load_file(path / "model.safetensors"), load_file(tmp_path / "smooth" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    readers = {f"{reader}.weight" for fold in report.folds for reader in fold.readers}
    assert readers <= changed  # the logits are not unchanged because nothing is
    assert {f"{fold.source}.weight" for fold in report.folds} <= changed
    assert open_checkpoint(str(tmp_path / "smooth")).config == open_checkpoint(str(path)).config
    new = samples_of(spec, 2)
    for ours, theirs in zip(logits(tmp_path / "smooth", spec, new), logits(path, spec, new), strict=True):
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


def output_errors(path: Path, spec: Generation, samples: list[Sample]) -> dict[str, float]:
    """Linear -> |x (W - Q)^T|^2 / |x W^T|^2 with Q of 4 bits in groups of 32, x its own inputs in the float model."""
    checkpoint = open_checkpoint(str(path))
    load_original(model := build(checkpoint.config), checkpoint)
    squares: dict[str, torch.Tensor] = {}

    def hook(name: str, module: Linear) -> Any:
        weight = module.weight
        rounded = quantize_rtn(weight, 4, 32).dequantize()

        def add(_: Any, args: tuple[torch.Tensor]) -> None:
            x = args[0].reshape(-1, weight.shape[1])
            both = torch.stack([(x @ (weight - rounded).T).square().sum(), (x @ weight.T).square().sum()])
            squares[name] = squares.get(name, torch.zeros(2)) + both

        return add

    for name, module in model.named_modules():
        if isinstance(module, Linear):
            module.register_forward_pre_hook(hook(name, module))
    session = EagerSession(model.graphs())
    for sample in samples:
        stream = Stream(session, spec, [sample.tokens], len(sample.tokens) + 1, None)
        stream.feed(stream.pending, every=True)
    return {name: float(error / energy) for name, (error, energy) in squares.items()}


def test_rounding_loses_less_of_what_the_planted_outliers_carry(tmp_path: Path) -> None:
    path = planted(tmp_path, "llama")
    report, spec = smoothed(path, tmp_path)
    new = samples_of(spec, 2)
    before, after = output_errors(path, spec, new), output_errors(tmp_path / "smooth", spec, new)
    from_norms = [r for fold in report.folds if "norm" in fold.source for r in fold.readers]
    assert len(from_norms) == 3 * 5 + 1  # q, k, v, gate and up of every layer, and the head
    means = [float(np.mean([errors[name] for name in from_norms])) for errors in (before, after)]
    assert means[1] < 0.7 * means[0]  # on tokens that the exponents were not chosen on
    beside = [name for name in before if name.endswith("o_proj")]
    assert beside
    assert all(after[name] == pytest.approx(before[name], rel=1e-4) for name in beside)


def test_bf16_stays_bf16_where_that_is_exact(tmp_path: Path) -> None:
    path = planted(tmp_path, "llama")
    report, _ = smoothed(path, tmp_path)
    assert report.widened == ()
    assert {t.dtype for t in load_file(tmp_path / "smooth" / "model.safetensors").values()} == {torch.bfloat16}
    spec = spec_of(path)
    samples = samples_of(spec, 3)
    for ours, theirs in zip(logits(tmp_path / "smooth", spec, samples), logits(path, spec, samples), strict=True):
        np.testing.assert_array_equal(ours, theirs)  # powers of two round nothing


@pytest.mark.slow
def test_gains_held_less_one_become_float32_and_export(tmp_path: Path) -> None:
    report, _ = smoothed(planted(tmp_path, "gemma3_text"), tmp_path)
    assert report.widened
    assert all("norm" in name for name in report.widened)
    request = asking(str(tmp_path / "smooth"), ("onnx",), bits=6.0, max_context=48, prompts=4)
    made = compiler.export(request, tmp_path / "bundle")
    assert made.report is not None
    assert made.report.targets[0].passed


def test_a_change_of_a_tensor_is_exact_or_wider() -> None:
    scale = torch.tensor([0.25, 1.0, 8.0])
    half = torch.tensor([[1.0, 2.0, 3.0], [6e-8, 0.5, -1.0]], dtype=torch.float16)
    assert Change(columns=scale.clamp_min(1.0)).apply(half).dtype == torch.float16
    wide = Change(columns=scale).apply(half)  # 6e-8 is float16's smallest: a quarter of it is none
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide, half.float() * scale, rtol=0, atol=0)
    gain = torch.tensor([0.5, -0.25, 0.125], dtype=torch.bfloat16)
    torch.testing.assert_close(
        1 + Change(rows=scale, offset=1.0).apply(gain).float(), (1 + gain.float()) / scale, rtol=1e-6, atol=0
    )


def test_scales_are_powers_of_two_around_one() -> None:
    mean = torch.tensor([0.0, 0.01, 1.0, 100.0])
    scale = scales(mean, 0.5)
    assert torch.equal(torch.log2(scale), torch.log2(scale).round())
    assert scale.tolist() == sorted(scale.tolist())
    assert torch.equal(scales(mean, 0.0), torch.ones(4))
    assert torch.isfinite(scales(torch.zeros(4), 1.0)).all()


def test_a_norm_that_something_else_reads_is_left_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = planted(tmp_path, "llama")

    def forward(self: Any, h: Any, past_length: Any, k_cache: Any, v_cache: Any) -> Any:
        attended, k, v = self.self_attn(self.input_layernorm(h), past_length, k_cache, v_cache)
        normed = self.post_attention_layernorm(h + attended)
        return h + self.mlp(normed) + 0.1 * normed, k, v  # the gain is read twice

    monkeypatch.setattr(DecoderLayer, "forward", forward)
    report, spec = smoothed(path, tmp_path)
    named = {s: why for s, why in report.left.items() if "something besides" in why}
    assert set(named) == {f"model.layers.{i}.post_attention_layernorm" for i in range(3)}
    assert {f.source for f in report.folds} >= {f"model.layers.{i}.input_layernorm" for i in range(3)}
    after, before = load_file(tmp_path / "smooth" / "model.safetensors"), load_file(path / "model.safetensors")
    assert all(torch.equal(after[f"{s}.weight"], before[f"{s}.weight"]) for s in named)
    samples = samples_of(spec, 5)
    for ours, theirs in zip(logits(tmp_path / "smooth", spec, samples), logits(path, spec, samples), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_tied_head_keeps_the_last_norm_as_it_is(tmp_path: Path) -> None:
    report, _ = smoothed(planted(tmp_path, "gemma3_text"), tmp_path)
    assert "shares its weight" in report.left["model.norm"]
    assert "model.norm" not in {fold.source for fold in report.folds}


def test_a_model_without_anything_to_fold_is_refused_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = planted(tmp_path, "llama", tie_word_embeddings=True)

    def forward(self: Any, h: Any, past_length: Any, k_cache: Any, v_cache: Any) -> Any:
        attended, k, v = self.self_attn(2.0 * self.input_layernorm(h), past_length, k_cache, v_cache)
        return h + attended, k, v

    monkeypatch.setattr(DecoderLayer, "forward", forward)
    with pytest.raises(UserError, match=r"nothing can be folded in this llama: .*shares its weight") as refused:
        smoothed(path, tmp_path)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.glob("*smooth*"))


def test_an_encoder_without_logits_is_refused(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "model", FAMILIES["modernbert"])
    with pytest.raises(UserError, match="a modernbert has no logits to compare by"):
        rewrite_smooth(str(path), [], tmp_path / "out")


def edgewright(*arguments: Any) -> Any:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.mark.slow
def test_on_the_command_line(tmp_path: Path) -> None:
    words = tmp_path / "words.tsv"
    words.write_text("".join((tiny.EXAMPLE / "task.tsv").read_text().splitlines(keepends=True)[:64]))
    model, out = tiny.write_tiny_t5gemma(tmp_path / "model"), tmp_path / "out"
    asked = ("rewrite", "-m", model, "--smooth", "--bits", "3", "--calibration", words)
    result = edgewright(*asked, "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["folds"]
    assert report["bits"] == 3
    assert (out / "tokenizer.json").is_file()
    shown = edgewright(*asked, "-o", tmp_path / "again")
    assert "left as it was: " in shown.stdout
    assert report["folds"][0]["source"] in shown.stdout
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert "exists already" in edgewright(*asked, "-o", out).stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--smooth"], "--smooth measures activations on text: give --calibration FILE"),
        (["--smooth", "--adapt"], "one of them"),
        (["--adapt", "--bits", "4"], "--bits and --group-size are for --smooth"),
        (["--smooth", "--calibration", "x.txt", "--decoder", "y"], "--decoder is for --adapt"),
        (["--smooth", "--calibration", "x.txt"], "has no tokenizer"),
    ],
)
def test_refusals(options: list[str], words: str, tmp_path: Path) -> None:
    model = tiny.write_tiny_gemma3(tmp_path / "model")
    result = edgewright("rewrite", "-m", model, *options, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert words in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
