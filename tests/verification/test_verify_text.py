"""Perplexity, KL and task accuracy of artefacts: the numbers computed plainly, and bundles compared end to end."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from helpers.formula_session import TABLE, VOCAB, Formula, log_softmax, logits_after
from helpers.generations import CAUSAL, SEQ2SEQ
from helpers.requests import asking
from helpers.tiny import EXAMPLE, T5GEMMA, write
from helpers.tiny_families import FAMILIES

from edgewright import compiler
from edgewright.bundle import CHECKPOINT, Bundle, ContextSpec, Generation
from edgewright.calibration.prompts import Passage, text_passages
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.checkpoints.tokenizer import Tokenizer
from edgewright.cli import main
from edgewright.errors import UserError, VerificationFailure
from edgewright.models.loading import load_dequantized, load_original
from edgewright.models.registry import build
from edgewright.runtimes.eager import EagerSession
from edgewright.runtimes.session import Array
from edgewright.runtimes.text_generation import open_bundle
from edgewright.verification.checking import VerifyOptions, verify_here
from edgewright.verification.report import TextScore, require
from edgewright.verification.scores import perplexity, score_text

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

    own, score = score_text(Formula(), [Formula(lambda x, past, new: x + shift(past))], spec, passages)
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
    assert score.perplexity == pytest.approx(math.exp(np.mean(losses[1])), rel=1e-5)
    assert score.mean_kl == pytest.approx(np.mean(kl), rel=1e-4)
    assert score.top1 == np.mean(same)
    if spec.task == "causal":
        windows = [[*p.prompt, *p.scored] for p in passages if len(p.prompt) == 1]
        alone = score_text(Formula(), [], spec, [p for p in passages if len(p.prompt) == 1])
        assert perplexity(Formula(), spec, windows) == alone[0].perplexity


def test_a_text_on_which_a_candidate_overflows_reads_as_json() -> None:
    broken = Formula(lambda logits, past, new: logits * math.nan if past == 2 else logits)
    _, score = score_text(Formula(), [broken], CAUSAL, PASSAGES["causal"])
    assert score.perplexity > 1e300
    assert json.loads(json.dumps(asdict(score), allow_nan=False))["mean_kl"] > 1e300
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
    assert tokenizer.special_tokens() == ([], [1])
    causal = CAUSAL.model_copy(update={"vocab": 70})
    for passage in text_passages(text, tokenizer, causal, 3):
        assert passage.prompt == (tokenizer.bos_id,)
        assert len(passage.scored) == 62
    assert [t for p in text_passages(text, tokenizer, causal, 99) for t in p.scored] == ids
    seq2seq = SEQ2SEQ.model_copy(update={"vocab": 70})
    read = text_passages(text, tokenizer, seq2seq, 99)
    assert [t for p in read for t in (*p.prompt[:-1], *p.scored)] == ids
    assert {p.prompt[-1] for p in read} == {1}
    assert max(len(p.prompt) for p in read) == max(len(p.scored) for p in read) == 64
    assert MEMORY.context is not None
    memory = MEMORY.model_copy(
        update={"vocab": 70, "context": MEMORY.context.model_copy(update={"vocab": 70, "hidden": 70, "window": 40})}
    )
    read = text_passages(text, tokenizer, memory, 99)
    assert [t for p in read for t in (*p.context, *p.scored)] == ids
    assert max(len(p.context) for p in read) == 32
    assert max(len(p.scored) for p in read) == 64 - 2 - 4
    wide = np.random.default_rng(0).standard_normal((70, 70)) / 9
    assert score_text(Formula(table=wide), [], memory, read)[0].top1 == 1.0  # the longest fits the context
    with pytest.raises(UserError, match=r"gives token \d+, the model has 19"):
        text_passages(text, tokenizer, CAUSAL, 3)
    text.write_text("k n")
    with pytest.raises(UserError, match="too little text"):
        text_passages(text, tokenizer, seq2seq, 3)


@pytest.fixture(scope="module")
def llama(tiny_bundle: Callable[[str], tuple[Path, Path]]) -> tuple[Path, Path]:
    """(checkpoint, bundle) of a decoder-only model that can read. Must not be written to but for reports."""
    return tiny_bundle("llama")


@pytest.mark.slow
def test_a_decoder_only_bundle_with_text_and_task(llama: tuple[Path, Path], tmp_path: Path) -> None:
    model, path = llama
    bundle = Bundle.open(path)
    text, task = tmp_path / "text.txt", tmp_path / "task.tsv"
    text.write_text("k n i g h t o u g h " * 30)
    generated = "".join(open_bundle(path, "onnx", threads=1).generate("a b c")).strip()
    assert generated
    task.write_text(f"a b c\tnot this | {generated}\na b d\tcertainly not this\n")

    report = verify_here(path, VerifyOptions(model=str(model), task=task, text=text, threads=1))
    assert report.passed
    assert report.quantization is not None
    assert report.quantization.mean_kl > 0
    (target,) = report.targets
    assert target.task_accuracy == 0.5
    assert report.task_size == 2
    assert verify_here(path, VerifyOptions(task=task, task_limit=1, threads=1)).targets[0].task_accuracy == 1.0

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
    assert target.text is not None
    assert target.text.perplexity == pytest.approx(report.dequantized_text.perplexity, rel=0.05)  # int8 activations
    assert target.text.mean_kl > 0

    alone = verify_here(path, VerifyOptions(text=text, text_windows=2, threads=1))
    assert (alone.text_against, alone.text_windows, alone.original_text) == ("dequantized", 2, None)
    assert alone.dequantized_text == score_text(eager[1], [], spec, passages[:2])[0]
    assert alone.targets[0].text is not None
    assert 0 < alone.targets[0].text.mean_kl < target.text.mean_kl


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5gemma", "dolphin"])
def test_text_and_task_through_encoders_and_contexts(family: str, tmp_path: Path) -> None:
    """As the command says it, with and without the original."""
    model = write(tmp_path / "model", T5GEMMA if family == "t5gemma" else FAMILIES["dolphin"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLE / name, model / name)
    path = tmp_path / "bundle"
    compiler.export(asking(str(model), bits=6.0, verify=False), path)
    text, task = tmp_path / "text.txt", tmp_path / "task.tsv"
    text.write_text(" ".join("knightoughwbcde" * 20))
    task.write_text(("k n o t\t" if family == "dolphin" else "") + "k n i g h t\tanswer\n")

    def run(*arguments: Any) -> str:
        command = ["verify", path, "--text", text, "--text-windows", 2, "--task", task, "--threads", 1, *arguments]
        result = CliRunner().invoke(main, [str(a) for a in command])
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
    (target,) = values["targets"]
    assert target["text"]["mean_kl"] == pytest.approx(lossy.mean_kl, rel=0.3)  # int8 activations
    assert target["text"]["perplexity"] == pytest.approx(lossy.perplexity, rel=0.02)
    assert values["original_task_accuracy"] == target["task_accuracy"] == 0
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
        verify_here(llama[1], VerifyOptions(text=text, threads=1))
    text.write_text("k n i g h t " * 30)
    path = Path(shutil.copytree(llama[1], tmp_path / "copy"))
    manifest = json.loads((path / "manifest.json").read_text())
    for name in [n for n in manifest["files"] if n.endswith(("tokenizer.json", "tokenizer_config.json"))]:
        (path / name).unlink()
        del manifest["files"][name]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="--text needs a tokenizer"):
        verify_here(path, VerifyOptions(text=text, threads=1))
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
        verify_here(path, VerifyOptions(threads=1))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["onnx/decoder.onnx"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    report = verify_here(path, VerifyOptions(threads=1))
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
        verify_here(path, VerifyOptions(threads=1))
    assert "\n" not in str(caught.value)


def test_memory_that_does_not_suffice_is_refused_before_work(
    llama: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgewright.system.memory.available_bytes", lambda: 1000)
    notes: list[str] = []
    with pytest.raises(UserError, match="takes memory"):
        verify_here(llama[1], VerifyOptions(threads=1), notes.append)
    assert notes == ["checking file hashes"]
