"""The forward of calibration data: every linear of every family is reached, and what flows is what the model computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.calibration import opened, samples_of
from helpers.family_table import CONFIGS
from helpers.requests import asking

from edgewright.calibration.batches import merged, padded, parted
from edgewright.calibration.forward import CalibrationForward
from edgewright.calibration.hessians import hessian
from edgewright.calibration.memory_estimate import PROCESS_BYTES, gptq_bytes, tokens_within
from edgewright.calibration.samples import MOST_TOKENS, Sample, digest, read_samples
from edgewright.calibration.source import PART_TOKENS, Source
from edgewright.errors import UserError
from edgewright.models.layers.linear import Linear
from edgewright.models.loading import load_original
from edgewright.models.registry import build
from edgewright.ops import recurrence
from edgewright.pipeline.plan import plan
from edgewright.runtimes.eager import EagerSession
from edgewright.runtimes.generate import Stream, read_context
from edgewright.runtimes.text_embedding import embed_tokens


@pytest.mark.parametrize("part", [2048, 1], ids=["together", "in parts"])
@pytest.mark.parametrize("family", CONFIGS)
def test_the_forward_reaches_every_linear_and_gives_the_models_logits(family: str, part: int, tmp_path: Path) -> None:
    source = opened(family, tmp_path)
    checkpoint, spec = source.checkpoint, source.generation
    if spec.task == "module":
        pytest.skip("no generate loop: its example inputs are run, tested below")
    samples = samples_of(spec)
    source = replace(source, samples=samples, part_tokens=part)
    seen: dict[str, int] = {}

    def visit(name: str, module: Linear, inputs: list[torch.Tensor]) -> None:
        seen[name] = sum(len(rows) for rows in forward.all_rows(inputs))

    forward = CalibrationForward(model := source.build(), source, visit=visit)
    forward.to_head()
    linears = {
        model.tied.get(f"{path}.weight", f"{path}.weight")
        for path, module in model.named_modules()
        if isinstance(module, Linear)
    }
    assert set(seen) == linears
    assert all(p.is_meta for m in model.modules() if isinstance(m, Linear) for p in m.parameters())  # given back
    decoded = sum(len(s.decoded if spec.task == "seq2seq" else s.tokens) for s in samples)
    assert max(seen.values()) >= decoded

    logits, real = CalibrationForward(source.build(), source).logits(10**6)
    whole = build(checkpoint.config)
    load_original(whole, checkpoint)
    session = EagerSession(whole.graphs())
    if spec.task == "embed":
        assert real.shape == (len(samples), 1)
        want = embed_tokens(session, spec, [sample.tokens for sample in samples])
        np.testing.assert_allclose(logits[:, 0], want, rtol=1e-4, atol=2e-5)
        return
    for row, sample in enumerate(samples):
        memory = read_context(session, spec, sample.context) if sample.context else None
        fed = np.array([sample.decoded if spec.task == "seq2seq" else sample.tokens], np.int64)
        prompt = sample.tokens if sample.sound is None else sample.sound
        stream = Stream(session, spec, [prompt], fed.shape[1] + 1, memory)
        tokens = fed if spec.task == "seq2seq" else stream.pending
        want = stream.feed(tokens, every=True)[0]
        assert real[row].sum() == len(fed[0])
        loose = 2e-4 if family == "zamba2" else 2e-5  # the next test says why
        np.testing.assert_allclose(logits[row][real[row]], want[-len(fed[0]) :], rtol=1e-4, atol=loose)


def test_a_tiny_zamba_2_magnifies_one_rounding(tmp_path: Path) -> None:
    """Its gated norms read vectors of rms 0.01 and its scores are sharp, so a rounding becomes 1e-4; padding rounds otherwise."""
    source = opened("zamba2", tmp_path)
    spec, tokens = source.generation, list(samples_of(source.generation)[1].tokens)

    def logits(seed: int) -> np.ndarray:
        model = build(source.checkpoint.config)
        load_original(model, source.checkpoint)
        noise = torch.Generator().manual_seed(seed)

        def rounded(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
            return out * (1 + (torch.rand(out.shape, generator=noise) - 0.5) * 2**-22 * (seed > 0))

        model.model.embed_tokens.register_forward_hook(rounded)
        stream = Stream(EagerSession(model.graphs()), spec, [tokens], len(tokens) + 1, None)
        return stream.feed(stream.pending, every=True)[0]

    exact = logits(0)
    moved = max(float(np.abs(logits(seed) - exact).max()) for seed in range(1, 9))
    assert moved > 1e-4, "as exact as other families: give it their tolerance"


def test_parts_are_of_samples_of_like_length() -> None:
    lengths = [900, 50, 40, 900, 60, 30, 2000, 50]
    samples = [Sample(tuple(range(n))) for n in lengths]
    found = parted(samples, PART_TOKENS)
    assert sorted(i for part in found for i in part) == list(range(8))
    assert [[lengths[i] for i in part] for part in found] == [[2000], [900], [900], [60, 50, 50, 40, 30]]
    assert len(parted([Sample((1,) * 50)] * 650, PART_TOKENS)) == -(-650 // (PART_TOKENS // 50))
    assert parted([], PART_TOKENS) == []


@pytest.mark.parametrize("family", CONFIGS)
def test_parts_together_see_what_one_batch_sees(family: str, tmp_path: Path) -> None:
    source = opened(family, tmp_path)
    if source.generation.task == "module":
        pytest.skip("no samples to part")
    source = source.over(samples_of(source.generation, 5))
    reads: dict[str, int] = {}

    def seen(source: Source) -> dict[str, tuple[torch.Tensor, int]]:
        found: dict[str, tuple[torch.Tensor, int]] = {}

        def visit(name: str, module: Linear, inputs: list[torch.Tensor]) -> None:
            found[name] = hessian(forward, inputs)

        def transform(name: str, module: torch.nn.Module, value: torch.Tensor) -> torch.Tensor:
            reads[name] = reads.get(name, 0) + isinstance(module, Linear)
            return value

        forward = CalibrationForward(source.build(), source, transform, visit)
        forward.to_head()
        return found

    together = seen(source)
    once = dict(reads)
    reads.clear()
    apart = seen(replace(source, part_tokens=1))
    assert reads == once  # a weight is read for all parts together
    for name, (found, tokens) in together.items():
        assert apart[name][1] == tokens
        torch.testing.assert_close(apart[name][0], found, rtol=1e-3, atol=1e-4)


def test_logits_at_few_positions_are_some_of_them(tmp_path: Path) -> None:
    source = opened("llama", tmp_path)
    source = source.over(samples_of(source.generation))
    every, _ = CalibrationForward(source.build(), source).logits(10**6)
    few, real = CalibrationForward(source.build(), source).logits(3 * len(source.samples))
    assert few.shape[1] == 3
    assert real.shape == few.shape[:2]
    np.testing.assert_allclose(few[:, 0], every[:, 0], rtol=1e-4, atol=1e-5)


def test_a_module_runs_its_most_common_shape_as_one_batch() -> None:
    from edgewright.graph import Graph, Port

    def graph(first: int | str) -> Any:
        port = Port("x", torch.float32, (first, 4))
        made = Graph("encoder", torch.nn.Identity(), (port,), (port,))
        return type("Model", (), {"graphs": lambda self: [made]})()

    calls = [("encoder", {"x": torch.full((n, 4), float(n))}) for n in (2, 1, 1)]
    ((name, inputs),) = merged(graph("batch"), calls)
    assert name == "encoder"
    assert inputs["x"].shape == (2, 4)
    assert inputs["x"].eq(1.0).all()
    ((_, alone),) = merged(graph(2), calls)
    assert alone["x"].shape == (1, 4)


def test_samples_of_texts_and_tasks(tmp_path: Path) -> None:
    llama = opened("llama", tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h " * 200)
    with pytest.raises(UserError, match="has no tokenizer, which calibration data need"):
        read_samples(text, llama.checkpoint, llama.generation, 16)
    example = Path(__file__).parent.parent.parent / "examples" / "t5gemma-g2p"
    planned = plan(asking(str(example), bits=6.0))
    read = read_samples(example / "task.tsv", planned.checkpoint, planned.generation, 64, 500)
    assert 400 < sum(s.size for s in read) <= 500
    assert all(s.decoded[0] == planned.generation.decoder_start for s in read)
    halves = read_samples(text, planned.checkpoint, planned.generation, 8, 100)
    assert all(len(s.tokens) > 0 and len(s.decoded) > 1 for s in halves)
    assert digest(read) != digest(read[:-1])
    assert digest(read) == digest(list(read))
    causal = plan(asking(str(example.parent / "deltanet-g2p"), bits=6.0))
    windows = read_samples(text, causal.checkpoint, causal.generation, 8, 40)
    assert [len(s.tokens) for s in windows] == [8] * 5
    (tmp_path / "empty.txt").write_text("a")
    with pytest.raises(UserError, match=r"empty\.txt.*too little text"):
        read_samples(tmp_path / "empty.txt", causal.checkpoint, causal.generation, 8, 40)


def test_tokens_that_fit_a_memory_limit() -> None:
    model = build(CONFIGS["t5gemma"])
    assert tokens_within(model, 8 << 30) == MOST_TOKENS
    least = next(limit for limit in range(PROCESS_BYTES, 8 << 30, 1 << 20) if _fits(model, limit))
    assert 512 <= tokens_within(model, least) < MOST_TOKENS
    with pytest.raises(UserError, match=r"--memory-limit 0\.10 GiB is too little for GPTQ.*--quantizer rtn"):
        tokens_within(model, 100 << 20)


def test_the_memory_of_a_recurrence_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, counted in (("phi4flash", True), ("hgrn2", True), ("lfm2", False), ("t5gemma", False)):
        model = build(CONFIGS[name])
        before = gptq_bytes(model)[0]
        with monkeypatch.context() as patch:
            patch.setattr(recurrence, "WORK_BYTES", recurrence.WORK_BYTES + 1000)
            assert gptq_bytes(model)[0] - before == 1000 * counted


def _fits(model: Any, limit: int) -> bool:
    try:
        return tokens_within(model, limit) > 0
    except UserError:
        return False


def test_padding_is_on_the_right() -> None:
    ids, real = padded([[5, 6, 7], [8]], 0)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert real.tolist() == [[True, True, True], [True, False, False]]
