"""What verification must see: both paths, padding, long prompts, infinities; and the numbers it reports, computed plainly."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from formula import TABLE, VOCAB, Formula, log_softmax, logits_after
from tiny import EXAMPLE, T5GEMMA, write, write_tiny_llama
from tiny_families import FAMILIES

from edgewright import compiler
from edgewright.answer import answer
from edgewright.bundle import CHECKPOINT, Bundle, ContextSpec, Generation
from edgewright.checkpoint import open_checkpoint
from edgewright.cli import main
from edgewright.comparison import compare, perplexity, score_text
from edgewright.errors import UserError, VerificationFailure
from edgewright.graph import Graph, Port
from edgewright.models import build
from edgewright.models.layers import Linear
from edgewright.models.loading import load_dequantized, load_original
from edgewright.prompts import Passage, special_tokens, text_passages
from edgewright.runtimes.eager import EagerSession, Int8Session
from edgewright.runtimes.generate import Sampling, generate
from edgewright.runtimes.session import Array, Placement
from edgewright.tokenizer import Tokenizer
from edgewright.verdict import AGREEMENT, SLACK, TOLERANCE, Agreement, Report, TargetReport, TextScore, require
from edgewright.verification import verify

PROMPTS = [[3, 4, 5, 6], [7], [8, 9], [10, 11, 12, 13, 14, 15, 16], [5] * 9]
CAUSAL = Generation(task="causal", eos_ids=(1,), vocab=VOCAB, max_context=64, max_new_tokens=8)
SEQ2SEQ = Generation(
    task="seq2seq", decoder_start=2, eos_ids=(1,), pad_id=0, vocab=VOCAB, max_context=64, max_new_tokens=8
)


def one(candidate: Formula, spec: Generation, prompts: Sequence[Sequence[int]] = PROMPTS) -> Agreement:
    (found,) = compare(Formula(), [candidate], spec, prompts)
    return found


def agreement(**changes: Any) -> Agreement:
    return Agreement(**({"max_relative_error": 0.0, "mean_kl": 0.0, "top1": 1.0, "prompts": 4} | changes))


def target(lowering: Agreement, activations: str = "float32") -> TargetReport:
    return TargetReport("onnx", activations, lowering, lowering, Placement("CPU", {}), 1, 1)


# The comparison


@pytest.mark.parametrize("spec", [CAUSAL, SEQ2SEQ])
def test_a_session_agrees_with_itself(spec: Generation) -> None:
    first, second = compare(Formula(), [Formula(), Formula()], spec, PROMPTS)
    assert first == second
    assert (first.max_relative_error, first.mean_kl, first.top1) == (0.0, 0.0, 1.0)
    assert first.prompts_identical == first.prompts >= len(PROMPTS)
    tokens = [list(generate(Formula(), spec, p, spec.max_new_tokens)) for p in PROMPTS]
    assert first.positions >= sum(len(t) + 1 for t in tokens)
    if spec.task == "seq2seq":
        assert (first.prompts, first.positions) == (len(PROMPTS), sum(len(t) + 1 for t in tokens))


def test_the_numbers_are_what_their_names_say() -> None:
    """Over the positions behind each prompt, one prompt at a time, in plain loops."""

    def shifted(logits: Array, past: int, new: int) -> Array:
        return logits + 0.4 * np.sin(np.arange(VOCAB) + past)

    found = one(Formula(shifted), SEQ2SEQ)
    worst = scale = kl = 0.0
    same = positions = 0
    for prompt in PROMPTS:
        tokens = [2, *generate(Formula(), SEQ2SEQ, prompt, SEQ2SEQ.max_new_tokens)]
        source = TABLE[prompt].sum(0)
        for end in range(1, len(tokens) + 1):
            want = sum(0.7 ** (end - 1 - i) * TABLE[t] for i, t in enumerate(tokens[:end])) + 0.1 * source
            got = want + 0.4 * np.sin(np.arange(VOCAB) + end - 1)
            p, q = np.exp(want) / np.exp(want).sum(), np.exp(got) / np.exp(got).sum()
            worst, scale = max(worst, np.abs(want - got).max()), max(scale, np.abs(want).max())
            kl += float((p * np.log(p / q)).sum())
            same += int(want.argmax() == got.argmax())
            positions += 1
    assert found.positions == positions
    assert found.max_relative_error == pytest.approx(worst / scale, rel=1e-4)
    assert found.mean_kl == pytest.approx(kl / positions, rel=1e-4)
    assert found.top1 == pytest.approx(same / positions)


@pytest.mark.parametrize("spec", [CAUSAL, SEQ2SEQ])
def test_a_fault_in_the_decode_step_alone_is_seen(spec: Generation) -> None:
    found = one(Formula(lambda logits, past, new: logits[:, ::-1] if new == 1 and past > 1 else logits), spec)
    assert found.prompts_identical < found.prompts
    assert not target(found).passed


@pytest.mark.parametrize("spec", [CAUSAL, SEQ2SEQ])
def test_a_fault_in_the_prefill_alone_is_seen(spec: Generation) -> None:
    found = one(Formula(lambda logits, past, new: logits[:, ::-1] if new > 1 else logits), spec)
    assert found.max_relative_error > TOLERANCE
    assert not target(found).passed


def test_padding_that_is_read_is_seen() -> None:
    assert not target(one(Formula(reads_padding=True), SEQ2SEQ)).passed
    alone = one(Formula(reads_padding=True), SEQ2SEQ, [[3, 4, 5]])
    assert target(alone).passed  # nothing is padded there: it is the batch that finds the fault


def test_a_fault_that_only_long_prompts_meet_is_seen() -> None:
    spec = CAUSAL.model_copy(update={"max_context": 1024})
    found = one(Formula(lambda logits, past, new: -logits if past > 300 else logits), spec)
    assert found.prompts == len(PROMPTS) + 1
    assert found.prompts_identical == len(PROMPTS)
    assert not target(found).passed


def test_a_prompt_that_fills_the_context_is_compared() -> None:
    spec = CAUSAL.model_copy(update={"max_context": 10})
    assert target(one(Formula(), spec, [[5] * 9])).passed


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_candidate_that_is_not_finite_fails_and_reads_as_json(value: float) -> None:
    def broken(logits: Array, past: int, new: int) -> Array:
        return np.where(np.arange(VOCAB) == 18, value, logits)

    report = Report([target(one(Formula(broken), CAUSAL))])
    assert not report.passed
    text = json.dumps(report.to_json(), allow_nan=False)
    assert json.loads(text)["passed"] is False
    with pytest.raises(VerificationFailure, match="onnx: as shipped its logits are not finite"):
        require(report)


def test_a_reference_that_is_not_finite_is_no_reference() -> None:
    with pytest.raises(UserError, match="not finite"):
        compare(Formula(lambda logits, past, new: logits * math.nan), [Formula()], CAUSAL, PROMPTS)


# The verdict


@pytest.mark.parametrize(
    ("changes", "activations", "passes"),
    [
        ({}, "float32", True),
        ({"max_relative_error": TOLERANCE}, "float32", True),
        ({"max_relative_error": TOLERANCE * 1.01}, "float32", False),
        ({"prompts_identical": 3}, "float32", False),
        ({"top1": AGREEMENT, "prompts_identical": 0, "max_relative_error": 0.2}, "int8", True),
        ({"top1": AGREEMENT - 0.005, "positions": 400}, "int8", False),
    ],
)
def test_what_passes(changes: dict[str, Any], activations: str, passes: bool) -> None:
    lowering = agreement(**({"prompts_identical": 4, "positions": 40} | changes))
    report = Report([target(lowering, activations)])
    assert report.passed is passes
    values = report.to_json()
    assert values["passed"] is values["targets"][0]["passed"] is passes
    if passes:
        require(report)
    else:
        with pytest.raises(VerificationFailure, match=r"^onnx: "):
            require(report)


@pytest.mark.parametrize(
    ("positions", "others", "kl", "passes"),
    [
        (50, 0, 0.0, True),
        (50, 1, 1e-4, True),
        (50, 1, 1e-2, False),
        (50, 2, 1e-4, False),
        (300, 3, 1e-4, True),
        (300, 4, 1e-4, False),
    ],
)
def test_of_few_positions_one_near_tie_may_differ(positions: int, others: int, kl: float, passes: bool) -> None:
    found = agreement(top1=1 - others / positions, positions=positions, prompts_identical=0, mean_kl=kl)
    assert target(found, "float16").passed is passes


@pytest.mark.parametrize(
    ("top1", "kl", "passes"),
    [(0.85, 0.1, True), (0.8 - SLACK, 0.2, True), (0.8 - SLACK - 0.001, 0.1, False), (0.85, 0.201, False)],
)
def test_int8_activations_may_cost_what_they_cost_the_reference(top1: float, kl: float, passes: bool) -> None:
    found = target(agreement(top1=top1, mean_kl=kl, prompts_identical=1, positions=4000), "int8")
    assert not found.passed
    found.arithmetic = agreement(top1=0.8, mean_kl=0.1, prompts_identical=1, positions=4000)
    assert found.passed is passes
    assert "77.00%" in found.allowed


def test_of_few_positions_two_standard_errors_may_be_missing() -> None:
    found = target(agreement(top1=0.71, mean_kl=0.1, prompts_identical=1, positions=50), "int8")
    found.arithmetic = agreement(top1=0.8, mean_kl=0.1, prompts_identical=1, positions=50)
    assert found.passed
    assert "70.00%" in found.allowed  # two standard errors would be 0.16
    found.arithmetic.positions = 200
    assert "72.00%" in found.allowed  # 0.8 - 2 * sqrt(2 * 0.8 * 0.2 / 200)
    assert not found.passed


def test_what_ships_must_be_finite_and_on_its_own_device_near() -> None:
    good = agreement(prompts_identical=4, positions=40)
    infinite = agreement(max_relative_error=sys.float_info.max, prompts_identical=0, positions=40)
    far = agreement(top1=0.9, prompts_identical=0, positions=40)
    overflowing = replace(target(good), shipped=infinite)
    with pytest.raises(VerificationFailure, match="onnx: as shipped its logits are not finite"):
        require(Report([overflowing]))
    elsewhere = replace(target(good), shipped=far)
    require(Report([elsewhere]))
    with pytest.raises(VerificationFailure, match=r"top-1 agreement 90\.00%"):
        require(Report([replace(elsewhere, on_device=True)]))


def test_the_reference_with_int8_activations_rounds_each_row_of_the_quantized_linears_inputs(tmp_path: Path) -> None:
    """One linear by the formula of a scale and a zero point; a name that is not asked for stays as it is."""

    class One(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rounded, self.exact = Linear(8, 4), Linear(8, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.rounded(x), self.exact(x)

    torch.manual_seed(0)
    module = One()
    for linear in (module.rounded, module.exact):
        linear.weight = torch.nn.Parameter(torch.randn(4, 8), requires_grad=False)
    port = Port("x", torch.float32, (3, 8))
    outputs = (Port("a", torch.float32, (3, 4)), Port("b", torch.float32, (3, 4)))
    session = Int8Session([Graph("one", module, (port,), outputs)], {"rounded.weight"})
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32) * 5
    x[2] = np.abs(x[2]) + 1  # zero is among the steps though nothing of the row is near
    found = session.run("one", {"x": x}, {})
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    scale = (high - low) / 255
    zero = np.rint(-128 - low / scale)
    steps = (np.clip(np.rint(x / scale) + zero, -128, 127) - zero) * scale
    assert 0 < np.abs(steps - x).max() <= scale.max()
    np.testing.assert_allclose(found["a"], steps @ module.rounded.weight.numpy().T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["b"], x @ module.exact.weight.numpy().T, rtol=1e-5, atol=1e-5)
    assert not module.rounded._forward_pre_hooks


def test_the_first_target_that_fails_is_named() -> None:
    good = target(agreement(prompts_identical=4, positions=40))
    bad = target(agreement(prompts_identical=1, positions=40))
    bad.format = "second"
    with pytest.raises(VerificationFailure, match=r"^second: .* 1 of 4 prompts give the same tokens"):
        require(Report([good, bad, bad]))


# Perplexity and accuracy


MEMORY = Generation(
    task="memory",
    vocab=VOCAB,
    max_context=64,
    max_new_tokens=8,
    prefill_chunk=3,  # the splice lies across chunks
    context=ContextSpec(window=16, hidden=VOCAB, rows=4, vocab=VOCAB, prefix=(11, 12)),
)
PASSAGES = {
    "causal": [Passage((4, 5, 6, 7), (3,)), Passage((9,), (8,)), Passage((2, 3, 4), (5, 6, 7, 8))],
    "seq2seq": [Passage((4, 5, 6, 7), (3, 9, 1)), Passage((9,), (8, 1))],
    "memory": [Passage((4, 5, 6, 7), (), (3, 9, 10)), Passage((9, 10), (8,), (7, 6, 5, 4))],
}


def read_before(spec: Generation, passage: Passage) -> tuple[list[Array], Array | float]:
    """(the rows that Formula has before a passage's scored tokens, its source)."""
    if spec.task == "seq2seq":
        return [TABLE[2]], TABLE[list(passage.prompt)].sum(0)
    memory = []
    if spec.context is not None:
        context = list(passage.context)
        halves = TABLE[context[: len(context) // 2]].sum(0), TABLE[context].sum(0)
        memory = [*TABLE[list(spec.context.prefix)], *halves]
    return [*memory, *TABLE[list(passage.prompt)]], 0.0


@pytest.mark.parametrize("spec", [CAUSAL, CAUSAL.model_copy(update={"prefill_chunk": 2}), SEQ2SEQ, MEMORY])
def test_text_scores_are_those_of_plain_loops(spec: Generation) -> None:
    passages = PASSAGES[spec.task]

    def shift(position: int) -> Array:
        return 0.4 * np.sin(np.arange(VOCAB) + position)

    own, found = score_text(Formula(), [Formula(lambda x, past, new: x + shift(past))], spec, passages)
    losses: list[list[float]] = [[], []]
    kl, same = [], []
    for passage in passages:
        rows, source = read_before(spec, passage)
        for token in passage.scored:
            want = logits_after(rows, source)
            p, q = log_softmax(want), log_softmax(want + shift(len(rows) - 1))
            losses[0].append(-p[token])
            losses[1].append(-q[token])
            kl.append(float((np.exp(p) * (p - q)).sum()))
            same.append(p.argmax() == q.argmax())
            rows.append(TABLE[token])
    assert len(kl) == sum(len(p.scored) for p in passages)
    assert own == TextScore(pytest.approx(math.exp(np.mean(losses[0])), rel=1e-5), 0.0, 1.0)
    assert found.perplexity == pytest.approx(math.exp(np.mean(losses[1])), rel=1e-5)
    assert found.mean_kl == pytest.approx(np.mean(kl), rel=1e-4)
    assert found.top1 == np.mean(same)
    if spec.task == "causal":
        windows = [[*p.prompt, *p.scored] for p in passages if len(p.prompt) == 1]
        alone = score_text(Formula(), [], spec, [p for p in passages if len(p.prompt) == 1])
        assert perplexity(Formula(), spec, windows) == alone[0].perplexity


def test_a_text_on_which_a_candidate_overflows_reads_as_json() -> None:
    broken = Formula(lambda logits, past, new: logits * math.nan if past == 2 else logits)
    _, found = score_text(Formula(), [broken], CAUSAL, PASSAGES["causal"])
    assert found.perplexity > 1e300
    assert json.loads(json.dumps(asdict(found), allow_nan=False))["mean_kl"] > 1e300
    with pytest.raises(UserError, match="not finite"):
        score_text(broken, [Formula()], CAUSAL, PASSAGES["causal"])


def test_a_passage_needs_something_to_predict_its_first_token_from() -> None:
    with pytest.raises(ValueError, match="needs something before it"):
        score_text(Formula(), [], CAUSAL, [Passage((3, 4, 5))])


def test_passages_are_the_text_in_order_cut_as_each_task_reads_it(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(EXAMPLE)
    text = tmp_path / "text.txt"
    text.write_text(" ".join("knightoughwbcde" * 20))
    ids = tokenizer.encode(text.read_text(), special=False)
    assert special_tokens(tokenizer) == ([], [1])
    causal = CAUSAL.model_copy(update={"vocab": 70})
    for passage in text_passages(text, tokenizer, causal, 3):
        assert passage.prompt == (tokenizer.bos_id,)
        assert len(passage.scored) == 62
    assert [t for p in text_passages(text, tokenizer, causal, 99) for t in p.scored] == ids
    seq2seq = SEQ2SEQ.model_copy(update={"vocab": 70})
    found = text_passages(text, tokenizer, seq2seq, 99)
    assert [t for p in found for t in (*p.prompt[:-1], *p.scored)] == ids
    assert {p.prompt[-1] for p in found} == {1}
    assert max(len(p.prompt) for p in found) == max(len(p.scored) for p in found) == 64
    assert MEMORY.context is not None
    memory = MEMORY.model_copy(
        update={"vocab": 70, "context": MEMORY.context.model_copy(update={"vocab": 70, "hidden": 70, "window": 40})}
    )
    found = text_passages(text, tokenizer, memory, 99)
    assert [t for p in found for t in (*p.context, *p.scored)] == ids
    assert max(len(p.context) for p in found) == 32
    assert max(len(p.scored) for p in found) == 64 - 2 - 4
    wide = np.random.default_rng(0).standard_normal((70, 70)) / 9
    assert score_text(Formula(table=wide), [], memory, found)[0].top1 == 1.0  # the longest fits the context
    with pytest.raises(UserError, match=r"gives token \d+, the model has 19"):
        text_passages(text, tokenizer, CAUSAL, 3)
    text.write_text("k n")
    with pytest.raises(UserError, match="too little text"):
        text_passages(text, tokenizer, seq2seq, 3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, bundle) of a decoder-only model that can read. Must not be written to but for reports."""
    root = tmp_path_factory.mktemp("llama")
    model = write_tiny_llama(root / "model", num_hidden_layers=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLE / name, model / name)
    compiler.export(compiler.Request(str(model), bits=6.0), root / "bundle", check=False)
    return model, root / "bundle"


def test_a_decoder_only_bundle_with_text_and_task(llama: tuple[Path, Path], tmp_path: Path) -> None:
    model, path = llama
    bundle = Bundle.open(path)
    text, task = tmp_path / "text.txt", tmp_path / "task.tsv"
    text.write_text("k n i g h t o u g h " * 30)
    said = "".join(answer(path, "a b c", "onnx", None, None, Sampling(), 1)).strip()
    assert said
    task.write_text(f"a b c\tnot this | {said}\na b d\tcertainly not this\n")

    report = verify(path, str(model), task, text, threads=1)
    assert report.passed
    assert report.quantization is not None
    assert report.quantization.mean_kl > 0
    (found,) = report.targets
    assert found.task_accuracy == 0.5
    assert report.task_size == 2
    assert verify(path, None, task, task_limit=1, threads=1).targets[0].task_accuracy == 1.0

    assert (report.text_against, report.text_windows, report.text_positions) == ("original", 5, 300)
    quantized, original = open_checkpoint(str(path / CHECKPOINT)), open_checkpoint(str(model))
    reference, before = build(quantized.config), build(original.config)
    load_dequantized(reference, quantized)
    load_original(before, original)
    spec = bundle.manifest.generation
    assert quantized.tokenizer is not None
    passages = text_passages(text, quantized.tokenizer, spec, 16)
    eager = [EagerSession(m.graphs()) for m in (before, reference)]
    assert [report.original_text, report.dequantized_text] == score_text(eager[0], eager[1:], spec, passages)
    assert report.dequantized_text is not None
    assert report.dequantized_text.mean_kl > 0
    assert found.text is not None
    assert found.text.perplexity == pytest.approx(report.dequantized_text.perplexity, rel=0.05)  # int8 activations
    assert found.text.mean_kl > 0

    alone = verify(path, None, None, text, threads=1, text_windows=2)
    assert (alone.text_against, alone.text_windows, alone.original_text) == ("dequantized", 2, None)
    assert alone.dequantized_text == score_text(eager[1], [], spec, passages[:2])[0]
    assert alone.targets[0].text is not None
    assert 0 < alone.targets[0].text.mean_kl < found.text.mean_kl


@pytest.mark.parametrize("family", ["t5gemma", "dolphin"])
def test_text_and_task_through_encoders_and_contexts(family: str, tmp_path: Path) -> None:
    """As the command says it, with and without the original."""
    model = write(tmp_path / "model", T5GEMMA if family == "t5gemma" else FAMILIES["dolphin"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLE / name, model / name)
    path = tmp_path / "bundle"
    compiler.export(compiler.Request(str(model), bits=6.0), path, check=False)
    text, task = tmp_path / "text.txt", tmp_path / "task.tsv"
    text.write_text(" ".join("knightoughwbcde" * 20))
    task.write_text(("k n o t\t" if family == "dolphin" else "") + "k n i g h t\tanswer\n")

    def run(*arguments: Any) -> str:
        told = ["verify", path, "--text", text, "--text-windows", 2, "--task", task, "--threads", 1, *arguments]
        result = CliRunner().invoke(main, [str(a) for a in told])
        assert result.exit_code == 0, result.stderr
        return result.stdout

    values = json.loads(run("-m", model, "--json"))
    quantized, spec = open_checkpoint(str(path / CHECKPOINT)), Bundle.open(path).manifest.generation
    before, reference = build(quantized.config), build(quantized.config)
    load_original(before, open_checkpoint(str(model)))
    load_dequantized(reference, quantized)
    assert quantized.tokenizer is not None
    passages = text_passages(text, quantized.tokenizer, spec, 2)
    own, lossy = score_text(EagerSession(before.graphs()), [EagerSession(reference.graphs())], spec, passages)
    assert [values["original_text"], values["dequantized_text"]] == [asdict(own), asdict(lossy)]
    assert values["text_against"] == "original"
    assert values["text_windows"] == 2
    assert values["text_positions"] == sum(len(p.scored) for p in passages)
    (found,) = values["targets"]
    assert found["text"]["mean_kl"] == pytest.approx(lossy.mean_kl, rel=0.3)  # int8 activations
    assert found["text"]["perplexity"] == pytest.approx(lossy.perplexity, rel=0.02)
    assert values["original_task_accuracy"] == found["task_accuracy"] == 0
    alone = run()
    assert f"text: 2 windows, {values['text_positions']} tokens scored" in alone
    assert "against the dequantized weights" in alone
    assert "original weights" not in alone
    assert f"{lossy.perplexity:.4g}" in alone
    assert "task accuracy 0.0% of 1 prompts" in alone


def test_what_text_cannot_be_scored_on_is_refused(llama: tuple[Path, Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("")
    with pytest.raises(UserError, match="too little text"):
        verify(llama[1], None, None, text, threads=1)
    text.write_text("k n i g h t " * 30)
    path = Path(shutil.copytree(llama[1], tmp_path / "copy"))
    manifest = json.loads((path / "manifest.json").read_text())
    for name in [n for n in manifest["files"] if n.endswith(("tokenizer.json", "tokenizer_config.json"))]:
        (path / name).unlink()
        del manifest["files"][name]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="--text needs a tokenizer"):
        verify(path, None, None, text, threads=1)
    result = CliRunner().invoke(main, ["verify", str(llama[1]), "--text-windows", "3"])
    assert result.exit_code == 2
    assert "give --text FILE" in result.stderr


def test_a_changed_graph_fails_though_its_hash_is_mended(llama: tuple[Path, Path], tmp_path: Path) -> None:
    """The attention's scale, which no weight holds: only running the artefact can tell."""
    path = Path(shutil.copytree(llama[1], tmp_path / "copy"))
    file = path / "onnx" / "decoder.onnx"
    graph = onnx.load(file, load_external_data=False)
    node = next(n for n in graph.graph.node if n.op_type == "GroupQueryAttention")
    (scale,) = (a for a in node.attribute if a.name == "scale")
    scale.f *= 1.5
    file.write_bytes(graph.SerializeToString())
    with pytest.raises(VerificationFailure, match=r"onnx/decoder\.onnx: the file is not what was exported"):
        verify(path, threads=1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["onnx/decoder.onnx"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    report = verify(path, threads=1)
    assert not report.passed
    with pytest.raises(VerificationFailure, match="onnx: logits differ"):
        require(report)


def test_an_artefact_that_does_not_load_is_one_line(llama: tuple[Path, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(llama[1], tmp_path / "copy"))
    (path / "onnx" / "decoder.onnx").write_bytes(b"not a model")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["onnx/decoder.onnx"] = hashlib.sha256(b"not a model").hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="does not load") as caught:
        verify(path, threads=1)
    assert "\n" not in str(caught.value)


def test_memory_that_does_not_suffice_is_refused_before_work(
    llama: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgewright.memory.available_bytes", lambda: 1000)
    notes: list[str] = []
    with pytest.raises(UserError, match="takes memory"):
        verify(llama[1], threads=1, progress=notes.append)
    assert notes == ["checking file hashes"]
