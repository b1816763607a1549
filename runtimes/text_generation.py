"""Text from a bundle: its tokenizer, its session and the generate loop behind one object. No torch is imported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..audio.files import Samples, checked, read_sound
from ..bundle import CHECKPOINT, Bundle, ContextSpec, Generation, require_tokens
from ..checkpoints.tokenizer import Tokenizer
from ..errors import UserError
from ..system.reading import shown
from . import context_memory
from .generate import Sampling, generate, read_context
from .registry import import_runtime, open_session
from .session import Array, PlacedSession
from .transcribe import PLAINLY, SpeechOptions, require_speech, transcribe

GREEDY = Sampling()


@dataclass(frozen=True)
class SpokenText:
    """A piece of what was said. start, end: seconds. text: as the tokenizer gives it, mostly with a space before."""

    start: float
    end: float
    text: str


def open_bundle(path: str | Path, format: str | None = None, threads: int = 0, check: bool = True) -> OpenBundle:
    """Open the bundle at `path` to generate text with one of its targets.

    Args:
        path: the bundle's folder.
        format: the target, such as "onnx"; None is the bundle's first.
        threads: CPU threads of the target's runtime; 0 is all cores.
        check: whether the files that will be read are hashed first.

    Raises UserError if there is no bundle or no such target, or it holds a module, which generates nothing; VerificationFailure for
    a file that is not what was exported.
    """
    return OpenBundle(Bundle.open(path), format, threads, check)


class OpenBundle:
    """A bundle that generates text. Tokenizer and artefact are loaded at the first prompt and kept for the next ones.

    Attributes:
        bundle: path and manifest.
        format: the target that runs.
    """

    def __init__(self, bundle: Bundle, format: str | None = None, threads: int = 0, check: bool = True) -> None:
        """See `open_bundle`, which takes a path."""
        if bundle.manifest.generation.task == "module":
            raise UserError(
                f"{bundle.path} holds a module, which answers no prompt; 'edgewright verify' runs it on its examples"
            )
        self.bundle = bundle
        self.format = format or bundle.manifest.targets[0].format
        self._spec, self._threads = bundle.manifest.generation, threads
        bundle.target(self.format)
        if check:
            with ThreadPoolExecutor(1) as pool:  # importing takes about as long as hashing, and they share no lock
                checked = pool.submit(bundle.check_target, self.format)
                import_runtime(self.format)
            checked.result()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The bundle's own. Raises UserError if it has none."""
        return self._read_tokenizer()

    def _read_tokenizer(self, chat: bool = False) -> Tokenizer:
        """chat: a prompt will go through its chat template."""
        folder = self.bundle.path / CHECKPOINT
        if not (folder / "tokenizer.json").is_file():
            raise UserError(
                f"{self.bundle.path} has no tokenizer, so it cannot read text; "
                "export from a checkpoint with a tokenizer.json"
            )
        return Tokenizer.from_dir(folder, chat)

    @cached_property
    def session(self) -> PlacedSession:
        """The target's artefact, loaded. Raises UserError if the bundle has none or it does not load."""
        return open_session(self.bundle, self.format, self._threads)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling = GREEDY,
        chat: bool | None = None,
        context: str | None = None,
        memory: Array | None = None,
        target_language: str | None = None,
    ) -> Iterator[str]:
        """The text that follows a prompt, piece by piece as it is generated.

        Args:
            prompt: text, or the token ids that `encode_prompt` gives for it.
            max_new_tokens: at most so many tokens are generated; None is the model's default.
            sampling: how a token is drawn; greedy by default.
            chat: whether the chat template is applied to a text; None: where the tokenizer has one.
            context: for a decoder-decoder, text that it reads first.
            memory: for a decoder-decoder, what `read_context` or `load_memory` gave: [1, rows, hidden].
            target_language: for an encoder-decoder, the token that the answer begins with, as the tokenizer spells it.

        Raises UserError for an empty or too long prompt, a bundle without a tokenizer, an artefact that does not load,
        or a context, memory or language that the model does not take.
        """
        if self._spec.speech is not None:
            raise UserError(f"{self.bundle.path}: this model reads sound, not text: give --audio FILE ('transcribe')")
        ids = self.encode_prompt(prompt, chat) if isinstance(prompt, str) else prompt
        if context is not None and memory is not None:
            raise UserError("a context and a memory of one were both passed; pass one of them")
        if memory is not None:
            self.require_context_reader()
        elif context is not None:
            memory = self.read_context(context)
        spec = self._spec if target_language is None else self._speaking(target_language)
        new_tokens = min(max_new_tokens or spec.max_new_tokens, spec.max_context - 1)
        return self._text(generate(self.session, spec, ids, new_tokens, sampling, memory))

    def transcribe(
        self,
        sound: str | Path | Samples,
        options: SpeechOptions = PLAINLY,
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling = GREEDY,
    ) -> Iterator[SpokenText]:
        """What is said in a sound, piece by piece as it is found: one for each window, with timestamps one for each segment.

        Args:
            sound: a file that libsndfile reads, or samples float [n] of one channel at the model's rate (mostly 16,000 a second).
            options: language, task, timestamps.
            max_new_tokens: of a window at most; None is the model's limit.
            sampling: how a token is drawn; greedy by default.

        Raises UserError for a model of text, a sound that cannot be read, and a language or task that the model does not know.
        """
        rate = require_speech(self._spec).sound.rate
        samples = read_sound(Path(sound), rate) if isinstance(sound, str | Path) else checked(sound, "the sound")
        tokenizer = self.tokenizer
        for part in transcribe(self.session, self._spec, samples, options, max_new_tokens, sampling):
            yield SpokenText(part.start, part.end, tokenizer.decode(part.tokens))

    def _speaking(self, language: str) -> Generation:
        """How the bundle generates where every answer begins with a language's token. Raises UserError if there is none."""
        if self._spec.task != "seq2seq":
            raise UserError(f"--target-language {shown(language, 60)}: the model is no encoder-decoder; leave it out")
        token = self.tokenizer.token_id(language)
        if token is None or token >= self._spec.vocab:
            raise UserError(
                f"--target-language {shown(language, 60)} is no token of this model; give it as the tokenizer spells it, "
                "such as fra_Latn, fr_XX or __fr__"
            )
        return self._spec.model_copy(update={"forced": (token,)})

    def encode_prompt(self, prompt: str, chat: bool | None = None) -> list[int]:
        """Token ids of a prompt; `chat` as in `generate`.

        Raises UserError for an empty prompt, for `chat` without a template, and for tokens that the model does not have.
        """
        if not prompt.strip():
            raise UserError("the prompt is empty; give some text")
        if chat is not False and "tokenizer" not in self.__dict__:
            self.tokenizer = self._read_tokenizer(chat=True)
        text = None if chat is False else self.tokenizer.apply_chat([{"role": "user", "content": prompt}])
        if text is None and chat:
            raise UserError("--chat: the tokenizer has no chat template; leave --chat out")
        # The template writes its own special tokens.
        ids = self.tokenizer.encode(prompt) if text is None else self.tokenizer.encode(text, special=False)
        require_tokens(ids, self._spec.vocab, f"{self.bundle.path}: the prompt")
        return ids

    def encode_context(self, text: str) -> list[int]:
        """Token ids of a decoder-decoder's context.

        Raises UserError for another kind of model, and for tokens that the model does not have.
        """
        spec = self.require_context_reader()
        ids = self.tokenizer.encode(text, special=False)
        require_tokens(ids, spec.vocab, f"{self.bundle.path}: the context")
        return ids

    def read_context(self, context: str | Sequence[int]) -> Array:
        """The memory [1, rows, hidden] that a decoder-decoder makes of a context; it serves any number of prompts.

        context: text, or the token ids that `encode_context` gives for it. Raises UserError for an empty context and as
        `encode_context` does.
        """
        ids = self.encode_context(context) if isinstance(context, str) else context
        return read_context(self.session, self._spec, ids)

    def save_memory(self, path: Path, memory: Array) -> None:
        """Keep a memory in a file. Raises UserError if it cannot be written."""
        context_memory.save_memory(path, memory, self.bundle)

    def load_memory(self, path: Path) -> Array:
        """The memory [1, rows, hidden] in a file. Raises UserError if it is damaged or not of this model and weights."""
        return context_memory.load_memory(path, self.bundle, self.require_context_reader())

    def require_context_reader(self) -> ContextSpec:
        """How the model reads a context. Raises UserError unless it is a decoder-decoder."""
        if self._spec.task != "memory" or self._spec.context is None:
            raise UserError(
                f"{self.bundle.path}: this model keeps no memory of a context; give all of it as the prompt"
            )
        return self._spec.context

    def _text(self, tokens: Iterator[int]) -> Iterator[str]:
        stream = self.tokenizer.stream()
        for token in tokens:
            piece = stream.put(token)
            if piece:
                yield piece
        rest = stream.end()
        if rest:
            yield rest
