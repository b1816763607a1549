"""lm-evaluation-harness drives a bundle: a local task end to end, and the numbers, cuts and stops in plain loops."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.formula_session import Formula, log_softmax, logits_after

from edgewright.bundle import Bundle
from edgewright.checkpoints.tokenizer import Tokenizer
from edgewright.errors import UserError
from edgewright.runtimes.generate import Stream, generate
from edgewright.runtimes.registry import open_session

lm_eval = pytest.importorskip("lm_eval")

from edgewright.verification.lm_eval import BundleLM  # noqa: E402
from edgewright.verification.scores import perplexity  # noqa: E402

WIDE = np.random.default_rng(3).standard_normal((80, 80))
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def llama(tiny_bundle: Callable[[str], tuple[Path, Path]]) -> Path:
    """A decoder-only bundle of 64 tokens whose tokenizer puts an end behind a prompt."""
    return tiny_bundle("llama")[1]


@pytest.fixture(scope="module")
def t5gemma(tiny_bundle: Callable[[str], tuple[Path, Path]]) -> Path:
    return tiny_bundle("t5gemma")[1]


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=a, arguments=a) for a in arguments]


def own_loglikelihood(bundle: Path, context: Sequence[int], continuation: Sequence[int]) -> float:
    """A token at a time through the artefact, each step on its own."""
    opened = Bundle.open(bundle)
    spec = opened.manifest.generation
    session, total, rest = open_session(opened, "onnx", 1), 0.0, list(continuation)
    stream = Stream(session, spec, [list(context)], len(rest) + 1)
    logits = stream.prefill()
    for token in rest:
        total += float(log_softmax(logits[0, -1].astype(np.float64))[token])
        logits = stream.feed(np.array([[token]], np.int64))
    return total


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "t5gemma"])
def test_local_tasks_end_to_end(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """simple_evaluate by the model's registered name; what it reports against the artefact run by hand."""
    import datasets
    from lm_eval.tasks import TaskManager

    bundle: Path = request.getfixturevalue(kind)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    opened = Bundle.open(bundle)
    spec, session = opened.manifest.generation, open_session(opened, "onnx", 1)
    tokenizer = Tokenizer.from_dir(bundle / "checkpoint")

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, special=kind == "t5gemma")

    docs = [
        {"question": "k n i g h t", "choices": ["a", "b c", "d"], "text": " ".join("toughknight")},
        {"question": "b o u g h", "choices": ["e", "f", "g h"], "text": " ".join("kneeboughs" * 9)},
    ]
    for doc in docs:
        likelihoods = [
            own_loglikelihood(bundle, ids(doc["question"]), tokenizer.encode(f" {c}", special=False))
            for c in doc["choices"]
        ]
        doc["likelihoods"], doc["gold"] = likelihoods, int(np.argmax(likelihoods))
        doc["answer"] = tokenizer.decode(list(generate(session, spec, ids(doc["question"]), 6)))
    docs[1]["gold"] = int(np.argmin(docs[1]["likelihoods"]))
    docs[1]["answer"] = "not this"
    (tmp_path / "docs.json").write_text(json.dumps([{k: v for k, v in d.items() if k != "likelihoods"} for d in docs]))
    for name, task in TASKS.items():
        settings = {"task": f"edgewright_{name}", "dataset_path": "json", "test_split": "test", "num_fewshot": 0}
        settings["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "docs.json")}}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(settings | task))  # JSON is YAML

    evaluated = lm_eval.simple_evaluate(
        model="edgewright",
        model_args=f"bundle={bundle},format=onnx,threads=1",
        tasks=[f"edgewright_{name}" for name in TASKS],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    assert evaluated is not None
    results, samples = evaluated["results"], evaluated["samples"]
    assert results["edgewright_choice"]["acc,none"] == 0.5
    assert results["edgewright_writing"]["exact_match,none"] == 0.5
    for doc, sample in zip(docs, samples["edgewright_choice"], strict=True):
        got = [float(response[0][0]) for response in sample["resps"]]
        assert got == pytest.approx(doc["likelihoods"], rel=1e-5)
    text_bytes = sum(len(d["text"].encode()) for d in docs)
    short, long = (tokenizer.encode(d["text"], special=False) for d in docs)
    assert len(long) == 90  # a second window scores the rest behind as much as fits
    if kind == "llama":
        total = -math.log(perplexity(session, spec, [[2, *short]])) * len(short)
        total -= math.log(perplexity(session, spec, [[2, *long[:63]]])) * 63
        total += own_loglikelihood(bundle, long[26:63], long[63:])
    else:
        total = own_loglikelihood(bundle, [1], short) + own_loglikelihood(bundle, [1], long[:63])
        total += own_loglikelihood(bundle, [*long[26:63], 1], long[63:])
    want = math.exp(-total / text_bytes)
    # Other batches: a code of the int8 activations may fall to the other side.
    assert results["edgewright_rolling"]["byte_perplexity,none"] == pytest.approx(want, rel=1e-3)


# The numbers, without a model


def model(bundle: Path, **changes: Any) -> BundleLM:
    lm = BundleLM(bundle, session=Formula(table=WIDE, **changes))
    lm.spec = lm.spec.model_copy(update={"vocab": 80})
    return lm


def test_likelihoods_are_those_of_plain_loops(llama: Path) -> None:
    """One-token continuations of one context, which are one run, among others."""
    lm = model(llama)
    asked = [("k n", " i"), ("k n", " g h t"), ("k n", " o"), ("k n", " g h u"), ("", "k n i"), ("k n ", "i")]
    scores = lm.loglikelihood(requests(*asked), disable_tqdm=True)
    for (context, continuation), (total, greedy) in zip(asked, scores, strict=True):
        before = lm.tokenizer.encode(context.strip(), special=False) or [2]
        tokens = lm.tokenizer.encode(continuation, special=False)
        sequence, want, best = list(before), 0.0, True
        for token in tokens:
            p = log_softmax(logits_after(WIDE[sequence]))
            want, best = want + p[token], best and int(p.argmax()) == token
            sequence.append(token)
        assert (total, greedy) == (pytest.approx(want, rel=1e-5), best)
    assert scores[0] == scores[5]


def test_greedy_is_what_generation_gives_ties_included(llama: Path) -> None:
    lm = model(llama, change=lambda logits, past, new: np.round(logits / 4))  # ties everywhere
    for context in ("k n", "t o u", "b", "q u e"):
        (text,) = lm.generate_until(requests((context, {"until": [], "max_gen_toks": 1})), disable_tqdm=True)
        if not text:
            continue  # an end, or a token that is no text
        others = [" a", " b", " c", " d", f" {text}"]
        scores = lm.loglikelihood(requests(*[(context, other) for other in others]), disable_tqdm=True)
        assert [greedy for _, greedy in scores] == [other.strip() == text for other in others]


@pytest.mark.slow
def test_a_long_context_keeps_its_end_and_what_does_not_fit_is_refused(llama: Path, t5gemma: Path) -> None:
    letters = "abcdefghij" * 12
    for bundle in (llama, t5gemma):
        lm = model(bundle)
        ((full, _),) = lm.loglikelihood(requests((" ".join(letters), " k n")), disable_tqdm=True)
        room = 62 if bundle == llama else 63  # two tokens of its own, or the end that the encoder reads
        ((cut, _),) = lm.loglikelihood(requests((" ".join(letters[-room:]), " k n")), disable_tqdm=True)
        ((shorter, _),) = lm.loglikelihood(requests((" ".join(letters[-3:]), " k n")), disable_tqdm=True)
        assert full == cut != shorter
        with pytest.raises(UserError, match="a continuation of 70 tokens does not fit"):
            lm.loglikelihood(requests(("k", " " + " ".join(letters[:70]))), disable_tqdm=True)
        (text,) = lm.generate_until(
            requests((" ".join(letters), {"until": [], "max_gen_toks": 900})), disable_tqdm=True
        )
        assert isinstance(text, str)


def test_text_ends_before_the_first_stop_or_at_the_allowed_length(llama: Path) -> None:
    lm = model(llama)
    context = "k n"
    (full,) = lm.generate_until(requests((context, {"until": [], "max_gen_toks": 12})), disable_tqdm=True)
    tokens = list(generate(lm._session, lm.spec, lm.tok_encode(context), 12))
    assert full == lm.tokenizer.decode(tokens)
    assert len(full) > 4
    middle = full[2:5]
    for until in ([middle], [full[-1] + "!", middle], middle):
        (text,) = lm.generate_until(requests((context, {"until": until, "max_gen_toks": 12})), disable_tqdm=True)
        assert text == full[: full.find(middle)]
    (text,) = lm.generate_until(requests((context, {"until": ["no such"], "max_gen_toks": 2})), disable_tqdm=True)
    assert text == lm.tokenizer.decode(tokens[:2])
    sampled = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 3.0}
    both = lm.generate_until(requests((context, sampled), (context, sampled)), disable_tqdm=True)
    assert both == lm.generate_until(requests((context, sampled), (context, sampled)), disable_tqdm=True)
    assert both[0] != both[1]
    with pytest.raises(UserError, match="'num_beams' means nothing here"):
        lm.generate_until(requests((context, {"until": [], "num_beams": 4})), disable_tqdm=True)


def test_a_special_token_is_a_stop(llama: Path) -> None:
    """It decodes to no text, and the spec need not name it as an end."""
    lm = model(llama, change=lambda logits, past, new: np.where(np.arange(80) == (2 if past == 4 else 9), 99.0, logits))
    bos = next(t for t in ("<bos>", "<s>") if lm.tokenizer.token_id(t) == 2)
    asked = {"until": [bos], "max_gen_toks": 12}
    assert lm.generate_until(requests(("k n", asked)), disable_tqdm=True) == [lm.tokenizer.decode([9] * 3)]


@pytest.mark.slow
def test_special_tokens_are_kept_once(llama: Path, t5gemma: Path) -> None:
    assert model(llama).tok_encode("k n")[-1] != 1  # an end stands behind a text, not inside it
    lm = model(t5gemma)
    assert lm.tok_encode("k n")[-1] == 1
    assert lm._fit(lm.tok_encode("k n"), 2) == (lm.tok_encode("k n")[1], 1)
    assert lm._fit((), 5) == (1,)
    with pytest.raises(UserError, match="no chat template"):
        lm.apply_chat_template([{"role": "user", "content": "k n"}])


def test_what_cannot_be_evaluated_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no coreml artefact; it has: onnx"):
        BundleLM(llama, format="coreml")
    path = Path(shutil.copytree(llama, tmp_path / "copy"))
    (path / "checkpoint" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        BundleLM(path)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["generation"]["task"] = "module"
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="holds a module"):
        BundleLM(path)
