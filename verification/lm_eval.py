"""A bundle as a model of lm-evaluation-harness: likelihoods, and greedy or sampled text.

No module imports this file: it needs lm-eval (extra `eval`), and importing it registers the model "edgewright".
`python -m edgewright.verification.lm_eval` is lm-eval's command line with that model.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..bundle import CHECKPOINT, Bundle, require_tokens
from ..calibration.prompts import Passage
from ..checkpoints.tokenizer import Tokenizer
from ..errors import UserError
from ..runtimes.answer import Answer, Stops
from ..runtimes.generate import generate
from ..runtimes.logits import log_softmax
from ..runtimes.registry import open_session
from ..runtimes.sampling import Sampling
from ..runtimes.session import Session
from .scores import predictions

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError:
    raise UserError("the evaluation harness needs lm-eval: pip install 'edgewright[eval]'") from None

NEW_TOKENS = 256
"""Tokens generated where a task does not say how many."""

_DRAWN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_SUPPORTED = {"until", "max_gen_toks", "do_sample", *_DRAWN}

_log = logging.getLogger(__name__)


@register_model("edgewright")
class BundleLM(TemplateLM):  # type: ignore[misc]
    """One artefact of a bundle. An encoder-decoder reads a context with its encoder, any other model before the continuation.

    Requests run one by one; continuations that differ in their last token alone share a run.

    Args:
        bundle: the bundle's folder.
        format: the artefact; without, the bundle's first.
        threads: 0 is OMP_NUM_THREADS, else all cores.
        session: runs in the artefact's place, such as the eager reference of the same model.
        batch_size, max_batch_size, device: lm-eval passes them to every model; they change nothing.

    Raises UserError for a bundle that does not generate, has no tokenizer, or whose artefact cannot be loaded.
    """

    def __init__(
        self,
        bundle: str | Path,
        format: str | None = None,
        threads: int = 0,
        session: Session | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        opened = Bundle.open(Path(str(bundle)))
        self.spec = opened.manifest.generation
        if self.spec.task in ("module", "embed"):
            kind = "a module" if self.spec.task == "module" else "a model of embeddings"
            raise UserError(f"{bundle} holds {kind}, which has no tokens to be scored")
        if not (opened.path / CHECKPOINT / "tokenizer.json").is_file():
            raise UserError(f"{bundle} has no tokenizer, so it cannot read a task; export from a checkpoint with one")
        opened.check_target(format or opened.manifest.targets[0].format)
        self.tokenizer = Tokenizer.from_dir(opened.path / CHECKPOINT)
        self.backend = "seq2seq" if self.spec.task == "seq2seq" else "causal"
        self._name = f"{opened.path.name}-{opened.manifest.source_fingerprint}"
        self._before, self._after = self.tokenizer.special_tokens()
        require_tokens([*self._before, *self._after, self.prefix_token_id], self.spec.vocab, str(bundle))
        if self.backend == "causal":
            self._after = []  # a prompt goes on, so it has no end token
        if session is None:
            session = open_session(opened, format or opened.manifest.targets[0].format, int(threads))
            if session.stand_in:
                _log.warning("%s", session.how)
        self._session: Session = session
        prefix = len(self.spec.context.prefix) if self.spec.context is not None else 0
        self.max_length = self.spec.max_context - prefix
        """Tokens of a prompt with its continuation; of an encoder-decoder those of either."""

    @property
    def eot_token_id(self) -> int:
        return min(self.spec.eos_ids, default=self.spec.pad_id)

    @property
    def prefix_token_id(self) -> int:
        """The token for an empty context: the tokenizer's first special token, else begin of text, else an end token."""
        bos = self.tokenizer.bos_id
        return (*self._before, *self._after, *([] if bos is None else [bos]), self.eot_token_id)[0]

    @property
    def tokenizer_name(self) -> str:
        return self._name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.tokenizer.chat_template or ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt that the bundle's chat template makes of messages. Raises UserError if there is no template."""
        text = self.tokenizer.apply_chat(chat_history, add_generation_prompt)
        if text is None:
            raise UserError("the bundle's tokenizer has no chat template; leave --apply_chat_template out")
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids with the special tokens of a prompt, unless `add_special_tokens` is False; none is added twice."""
        ids = self.tokenizer.encode(string, special=False)
        if ids:
            require_tokens(ids, self.spec.vocab, "the bundle")
        if add_special_tokens is False:
            return ids
        before = [] if ids[: len(self._before)] == self._before else self._before
        after = [] if self._after and ids[-len(self._after) :] == self._after else self._after
        return [*before, *ids, *after]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text, in windows as long as the model takes; each token is scored once."""
        totals = []
        for request in tqdm(requests, desc="edgewright: texts", disable=disable_tqdm):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            longest = self.max_length - 1 - len(self._before)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, max(1, longest), 1)
            parts = [make_disjoint_window(window) for window in windows]
            total = sum(self._score(tuple(before), [tuple(scored)])[0][0] for before, scored in parts)
            totals.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding gives exactly this) of each continuation after its context."""
        groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            groups.setdefault((tuple(context), tuple(continuation[:-1])), []).append(i)
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for (context, _), members in tqdm(groups.items(), desc="edgewright: contexts", disable=disable_tqdm):
            continuations = [tuple(requests[i][2]) for i in members]
            for i, value in zip(members, self._score(context, continuations), strict=True):
                scores[i] = value
                self.cache_hook.add_partial("loglikelihood", requests[i][0], value)
        return scores

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Text after each context, up to a stop string (not in the text), an end token, or the task's limit of tokens."""
        texts = []
        for i, request in enumerate(tqdm(requests, desc="edgewright: answers", disable=disable_tqdm)):
            context, asked = request.args[0], dict(normalize_gen_kwargs(request.args[1], NEW_TOKENS))
            if unknown := sorted(set(asked) - _SUPPORTED):
                raise UserError(
                    f"generation argument '{unknown[0]}' means nothing here; known: {', '.join(sorted(_SUPPORTED))}"
                )
            text = self._generate(context, asked, seed=i)
            texts.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _score(self, context: tuple[int, ...], continuations: Sequence[tuple[int, ...]]) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) of continuations that differ in their last token alone."""
        first = continuations[0]
        if not first:
            return [(0.0, True)] * len(continuations)
        room = self.max_length - (0 if self.backend == "seq2seq" else len(first))
        if len(first) > self.max_length or room < 1 + len(self._before) + len(self._after):
            raise UserError(
                f"a continuation of {len(first)} tokens does not fit the bundle's context of {self.spec.max_context}; "
                "export with a larger --max-context"
            )
        chunks = predictions(self._session, self.spec, Passage(first, self._fit(context, room)))
        rows = (row for logits, _ in chunks for row in logits)
        total, greedy = 0.0, True
        for token, row in zip(first[:-1], rows):  # the last row stays in the iterator
            total += float(log_softmax(row)[token])
            greedy = greedy and int(row.argmax()) == token
        last = next(rows)
        likelihoods, best = log_softmax(last), int(last.argmax())
        return [(total + float(likelihoods[c[-1]]), greedy and best == c[-1]) for c in continuations]

    def _fit(self, context: Sequence[int], room: int) -> tuple[int, ...]:
        """The last `room` tokens of a context with its special tokens, without which a model may compute nonsense."""
        before, after = self._before, self._after
        inner = list(context)
        if before and inner[: len(before)] == before:
            inner = inner[len(before) :]
        if after and inner[-len(after) :] == after:
            inner = inner[: -len(after)]
        kept = max(0, room - len(before) - len(after))
        if len(inner) > kept:
            _log.warning("a context of %d tokens is cut to its last %d", len(inner), kept)
            inner = inner[len(inner) - kept :]
        return (*before, *inner, *after) or (self.prefix_token_id,)

    def _generate(self, context: str, asked: dict[str, Any], seed: int) -> str:
        stops = [stop for stop in asked["until"] if stop]
        seq2seq = self.backend == "seq2seq"
        most = min(int(asked["max_gen_toks"]), self.max_length if seq2seq else self.max_length // 2)
        ids = self._fit(self.tok_encode(context), self.max_length - (0 if seq2seq else most))
        sampling = Sampling(seed=seed, **{name: asked[name] for name in _DRAWN if asked.get(name) is not None})
        # A special token decodes to no text, so a stop string that is one is compared by its id.
        ends = frozenset(i for stop in stops if (i := self.tokenizer.token_id(stop)) is not None)
        tokens = generate(self._session, self.spec, ids, most, sampling)
        return "".join(Answer(tokens, self.tokenizer.stream(), Stops(tuple(stops), ends)))


def main() -> None:
    """lm-eval's own command line, with `--model edgewright --model_args bundle=DIR,format=onnx` among its models."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
