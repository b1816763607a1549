"""A model of embeddings end to end: exported, verified, and its vectors beside transformers' own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from helpers.cli_runner import edgewright, passed, refused
from helpers.oracle import randomise
from helpers.requests import asking
from helpers.sentence_models import TEXTS, describe, linear, vectors, wordpiece
from safetensors.torch import load_file

import edgewright as ew
from edgewright import compiler
from edgewright.bundle import Bundle, EmbeddingSpec, Generation
from edgewright.checkpoints.tokenizer import Tokenizer
from edgewright.errors import UserError
from edgewright.runtimes import registry
from edgewright.runtimes.text_embedding import ROWS, embed_tokens, similarities
from edgewright.verification import checking
from edgewright.verification.report import Report, require
from edgewright.verification.similarity import recall, similarity_of

PROMPTS = {"prompts": {"query": "find ", "document": ""}, "similarity_fn_name": "dot"}
CORPUS = "\n\n".join(f"{a} and {b}" for a in TEXTS for b in TEXTS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with a tokenizer, a linear and prompts, that reads 40 tokens."""
    folder = tmp_path_factory.mktemp("bert")
    config = hf.BertConfig(
        vocab_size=56,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=48,
    )
    randomise(hf.BertModel(config), 1).save_pretrained(folder)
    return describe(wordpiece(folder), ("mean",), [linear(64, 48)], settings=PROMPTS, limits={"max_seq_length": 40})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(CORPUS)
    return file


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bundle") / "bundle"
    request = asking(str(model), widths=(8,), prompts=6)
    exported = compiler.export(request, output)
    assert exported.report is not None
    assert exported.report.passed
    return output


def wanted(model: Path, texts: list[str]) -> torch.Tensor:
    """By transformers and the library's formulas."""
    tokenizer = Tokenizer.from_dir(model)
    ids = [tokenizer.encode(text.strip())[:40] for text in texts]
    dense = [(load_file(model / "2_Dense" / "model.safetensors"), torch.tanh)]
    oracle = hf.BertModel.from_pretrained(model, attn_implementation="eager").eval()
    return vectors(oracle, ids, ("mean",), dense)


@pytest.mark.exports
def test_a_bundles_vectors_are_the_models(model: Path, bundle: Path) -> None:
    opened = ew.open_bundle(bundle)
    found = opened.embed(TEXTS)
    assert found.shape == (len(TEXTS), 48)
    assert found.dtype == np.float32
    want = wanted(model, list(TEXTS)).numpy()
    assert (found * want).sum(-1).min() > 0.999  # 8 bits
    for text, row in zip(TEXTS, found, strict=True):
        np.testing.assert_allclose(opened.embed([text])[0], row, atol=2e-3)  # int8 activations
    np.testing.assert_allclose(
        opened.embed(["snow"], prompt_name="query")[0], opened.embed(["find snow"])[0], atol=1e-6
    )


@pytest.mark.exports
def test_what_a_bundle_says_of_its_vectors(bundle: Path) -> None:
    spec = Bundle.open(bundle).manifest.generation
    assert (spec.task, spec.max_context, spec.vocab) == ("embed", 40, 56)
    assert spec.embedding == EmbeddingSpec(
        size=48, pooling=("mean",), normalised=True, similarity="dot", prompts={"query": "find ", "document": ""}
    )
    assert [g.name for g in Bundle.open(bundle).manifest.graphs] == ["encoder"]


@pytest.mark.exports
def test_the_command_prints_a_line_for_each_text(bundle: Path, tmp_path: Path) -> None:
    one = json.loads(passed(edgewright("run", str(bundle), "--embed", "--prompt", "snow")))
    assert one["tokens"] == 6
    np.testing.assert_allclose(one["embedding"], ew.open_bundle(bundle).embed(["snow"])[0], atol=1e-7)
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS) + "\n\n")
    done = edgewright("run", str(bundle), "--embed", "--texts", str(file), "--prompt-name", "query")
    lines = [json.loads(line) for line in passed(done).splitlines()]
    assert [len(line["embedding"]) for line in lines] == [48] * len(TEXTS)
    assert "1 of 6 texts were cut to 40 tokens" in done.stderr
    array = tmp_path / "vectors.npy"
    done = edgewright("run", str(bundle), "--embed", "--texts", str(file), "--prompt-name", "query", "-o", str(array))
    assert passed(done) == ""
    np.testing.assert_allclose(np.load(array), [line["embedding"] for line in lines], atol=1e-7)


@pytest.mark.exports
def test_the_command_refuses_in_one_line(bundle: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    for arguments, words in (
        (["--prompt", "snow"], "holds a model of embeddings, which generates nothing; use 'run --embed'"),
        (["--embed"], "--embed takes one of --prompt TEXT and --texts FILE"),
        (["--embed", "--prompt", " "], "text 1 is empty"),
        (["--embed", "--texts", str(empty)], "0 texts, a line each; give 1 to"),
        (
            ["--embed", "--prompt", "a", "--prompt-name", "title"],
            "--prompt-name title is no prompt of this model; it has: document, query",
        ),
        (["--embed", "--prompt", "a", "-n", "3"], "--max-new-tokens is for a model that generates"),
        (["--embed", "--prompt", "a", "-o", "vectors.txt"], "vectors are written as .npy"),
        (["--prompt", "a", "--prompt-name", "query"], "--prompt-name is for --embed"),
    ):
        assert words in refused(edgewright("run", str(bundle), *arguments))


@pytest.mark.exports
def test_verify_counts_cosines(model: Path, bundle: Path, corpus: Path, tmp_path: Path) -> None:
    task = tmp_path / "task.tsv"
    task.write_text("".join(f"{text[:12]}\t{text}\n" for text in TEXTS))
    options = ew.VerifyOptions(model=str(model), text=corpus, task=task, text_windows=20, against="none")
    report = checking.verify_here(bundle, options)
    (target,) = report.targets
    assert target.passed
    assert target.lowering.similarity is not None
    assert target.lowering.similarity.worst > 0.999999
    assert target.lowering.max_relative_error < 1e-4
    assert report.quantization is not None
    assert report.quantization.similarity is not None
    assert 0.999 < report.quantization.similarity.cosine < 1
    assert target.text is not None
    assert report.dequantized_text is not None
    assert (report.text_windows, target.text.texts) == (20, 20)  # type: ignore[union-attr]
    assert target.task_accuracy is not None
    assert checking.verify_here(bundle, ew.VerifyOptions(text=corpus)).text_against == "dequantized"
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report
    said = passed(edgewright("verify", str(bundle), "-m", str(model), "--text", str(corpus), "--task", str(task)))
    for words in ("cosine", "Spearman of pairs", "recall at 1"):
        assert words in " ".join(said.split())


@pytest.mark.exports
def test_a_wrong_artefact_fails_by_its_cosine(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = registry.Guarded.run

    def turned(self, graph, inputs, state):  # type: ignore[no-untyped-def]
        results = load(self, graph, inputs, state)
        return {name: value + np.float32(0.01) for name, value in results.items()}

    monkeypatch.setattr(registry.Guarded, "run", turned)
    found = checking.verify_here(bundle)
    assert not found.passed
    with pytest.raises(ew.VerificationFailure, match=r"onnx: vectors differ .* cosine 0\.99"):
        require(found)


@pytest.mark.slow
@pytest.mark.exports
def test_calibrated_bits_are_better_than_uniform_ones(model: Path, corpus: Path, tmp_path: Path) -> None:
    told: list[str] = []
    request = asking(str(model), bits=4.5, text=corpus, importance="fisher", norms="tuned", prompts=8)
    exported = compiler.export(request, tmp_path / "bundle", told.append)
    plan = exported.planned
    assert plan.plan.method == "fisher"
    assert {entry.quantizer for entry in plan.plan.entries.values()} == {"gptq"}
    assert plan.allocation is not None
    assert plan.allocation.scores.losses is not None
    assert any("1 - cosine a text" in line for line in told)
    assert exported.report is not None
    assert exported.report.passed


def test_texts_are_read_in_batches_of_like_length() -> None:
    seen: list[tuple[int, int]] = []

    class Counting:
        def run(self, graph, inputs, state):  # type: ignore[no-untyped-def]
            seen.append(inputs["input_ids"].shape)
            return {"sentence_embedding": inputs["encoder_mask"].sum(-1, keepdims=True).astype(np.float32)}

    embedding = EmbeddingSpec(size=1, pooling=("mean",), normalised=False)
    spec = Generation(task="embed", vocab=9, max_context=4096, max_new_tokens=1, embedding=embedding)
    lengths = [1 + 37 * i % 50 for i in range(40)] + [4096]
    found = embed_tokens(Counting(), spec, [[1] * n for n in lengths])  # type: ignore[arg-type]
    assert found[:, 0].tolist() == lengths
    assert seen[0] == (1, 4096)
    assert max(rows for rows, _ in seen) == ROWS
    with pytest.raises(UserError, match="a text has 4097 tokens, the model reads at most 4096"):
        embed_tokens(Counting(), spec, [[1] * 4097])  # type: ignore[arg-type]


def test_similarities_and_recall() -> None:
    a, b = np.array([[1.0, 0.0], [1.0, 2.0]], np.float32), np.array([[2.0, 0.1], [0.5, 1.0], [9.0, 9.0]], np.float32)
    cosine = a / np.linalg.norm(a, axis=1, keepdims=True) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T
    np.testing.assert_allclose(similarities(a, b, "cosine"), cosine, atol=1e-6)
    np.testing.assert_allclose(similarities(a, b, "dot"), a @ b.T, atol=1e-6)
    np.testing.assert_allclose(similarities(a, b, "euclidean")[0, 0], -np.hypot(1.0, 0.1), atol=1e-6)
    np.testing.assert_allclose(similarities(a, b, "manhattan")[0, 0], -1.1, atol=1e-6)
    table = {1: a[0], 2: a[1], 3: b[0], 4: b[1], 5: b[2]}

    class Table:
        def run(self, graph, inputs, state):  # type: ignore[no-untyped-def]
            return {"sentence_embedding": np.stack([table[int(row[0])] for row in inputs["input_ids"]])}

    for kind, right in (("cosine", 1.0), ("dot", 0.0), ("euclidean", 1.0)):
        embedding = EmbeddingSpec(size=2, pooling=("mean",), normalised=False, similarity=kind)
        spec = Generation(task="embed", vocab=9, max_context=8, max_new_tokens=1, embedding=embedding)
        assert recall(Table(), spec, [[1], [2]], [[3], [4], [5]], [{0}, {1}]) == right  # type: ignore[arg-type]


def test_a_similarity_of_vectors() -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((12, 16)).astype(np.float32)
    same = similarity_of(a, 3 * a)
    assert (same.cosine, same.worst, same.nearest, same.texts) == (pytest.approx(1), pytest.approx(1), 1.0, 12)
    assert same.spearman == pytest.approx(1)
    b = a.copy()
    b[4] = -b[4]
    turned = similarity_of(a, b)
    assert turned.worst == pytest.approx(-1)
    assert turned.cosine == pytest.approx(10 / 12)
    unit = b / np.linalg.norm(b, axis=1, keepdims=True), a / np.linalg.norm(a, axis=1, keepdims=True)
    pairs = np.triu_indices(12, 1)
    ranks = [np.argsort(np.argsort((u @ u.T)[pairs])) for u in unit]
    assert turned.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1])
    b[4, 0] = np.nan
    assert similarity_of(a, b).worst == -1
    with pytest.raises(UserError, match="not finite"):
        similarity_of(b, a)


def test_a_cut_text_keeps_its_special_tokens(model: Path) -> None:
    tokenizer = Tokenizer.from_dir(model)
    ids, lost = tokenizer.encode_within("abcdefghij", 6)
    assert (ids[0], ids[-1], len(ids), lost) == (2, 3, 6, 6)
    assert tokenizer.encode_within("abc", 6) == (tokenizer.encode("abc"), 0)
    assert tokenizer.encode_within("abc", 1) == ([2], 3)
