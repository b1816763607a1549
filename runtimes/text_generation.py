"""Text from a bundle: its tokenizer, its session and the generate loop behind one object. No torch is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..audio.files import Samples, checked, read_sound
from ..bundle import CHECKPOINT, Bundle, ContextSpec, Generation, require_tokens
from ..checkpoints.prompt import AS_IT_IS, ChatOptions, Prompt, read_prompt
from ..checkpoints.tokenizer import Tokenizer
from ..errors import UserError
from ..system.reading import shown
from . import context_memory
from .answer import NO_STOPS, Answer, Stops
from .generate import generate, read_context
from .registry import import_runtime, open_session
from .sampling import Sampling
from .session import Array, PlacedSession
from .text_embedding import embed_tokens
from .transcribe import PLAINLY, SpeechOptions, require_speech, transcribe


@dataclass(frozen=True)
class SpokenText:
    """A piece of what was said. start, end: seconds. text: as the tokenizer gives it, mostly with a space before."""

    start: float
    end: float
    text: str


def open_bundle(path: str | Path, format: str | None = None, threads: int = 0, check: bool = True) -> OpenBundle:
    """Open the bundle at `path` to generate text, or vectors of texts, with one of its targets.

    Args:
        path: the bundle's folder.
        format: the target, such as "onnx"; None is the bundle's first.
        threads: CPU threads of the target's runtime; 0 is OMP_NUM_THREADS, else all cores.
        check: whether the files that will be read are hashed first.

    Raises UserError if there is no bundle or no such target, or it holds a module, which reads no text; VerificationFailure for a
    file that is not what was exported.
    """
    return OpenBundle(Bundle.open(path), format, threads, check)


class OpenBundle:
    """A bundle that generates text, or makes vectors of texts.

    Tokenizer and artefact are loaded at the first prompt and kept for the next ones.

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

    @property
    def size(self) -> int:
        """Bytes of the target's files."""
        files = [self.bundle.path / name for name in self.bundle.target(self.format).files]
        return sum(file.stat().st_size for file in files if file.is_file())

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
        sampling: Sampling | None = None,
        chat: bool | None = None,
        stops: Stops = NO_STOPS,
        context: str | None = None,
        memory: Array | None = None,
        target_language: str | None = None,
    ) -> Answer:
        """The text that follows a prompt, piece by piece as it is generated.

        Args:
            prompt: text, or the token ids of a `read_prompt`.
            max_new_tokens: at most so many tokens are generated; None is the model's default.
            sampling: how a token is drawn; None: as the model's makers have it.
            chat: whether the chat template is applied to a text; None: where the tokenizer has one.
            stops: what ends the answer beside the model's end tokens.
            context: for a decoder-decoder, text that it reads first.
            memory: for a decoder-decoder, what `read_context` or `load_memory` gave: [1, rows, hidden].
            target_language: for an encoder-decoder, the token that the answer begins with, as the tokenizer spells it.

        Raises UserError for an empty or too long prompt, a bundle without a tokenizer, an artefact that does not load,
        or a context, memory or language that the model does not take.
        """
        self.require_generator()
        if self._spec.speech is not None:
            raise UserError(f"{self.bundle.path}: this model reads sound, not text: give --audio FILE ('transcribe')")
        ids = self.read_prompt(prompt, ChatOptions(use=chat)).ids if isinstance(prompt, str) else list(prompt)
        if context is not None and memory is not None:
            raise UserError("a context and a memory of one were both passed; pass one of them")
        if memory is not None:
            self.require_context_reader()
        elif context is not None:
            memory = self.read_context(context)
        spec = self._spec if target_language is None else self._speaking(target_language)
        new_tokens = min(max_new_tokens or spec.max_new_tokens, spec.max_context - 1)
        chosen = self.default_sampling() if sampling is None else sampling
        tokens = generate(self.session, spec, ids, new_tokens, chosen, memory)
        return Answer(tokens, self.tokenizer.stream(), stops, len(ids))

    def require_generator(self) -> None:
        """Raise UserError for a bundle of a model of embeddings, which generates nothing."""
        if self._spec.task == "embed":
            raise UserError(
                f"{self.bundle.path} holds a model of embeddings, which generates nothing; use 'run --embed' (`embed`)"
            )

    def embed(
        self, texts: Sequence[str], *, prompt_name: str | None = None, progress: Callable[[str], None] = lambda _: None
    ) -> Array:
        """The vectors float32 [n, D] of texts, for a bundle of a model of embeddings.

        Args:
            texts: any number, none of them empty. One that is longer than the model reads is cut.
            prompt_name: of the prompts in `bundle.manifest.generation.embedding`, the one that is put before each text, such as
                "query"; None is the model's default, mostly none.
            progress: is told how many texts were cut.

        Raises UserError for another kind of bundle, an empty text, a prompt that the model does not have, a bundle without a
        tokenizer, or an artefact that does not load.
        """
        return self.embed_ids(self.encode_texts(texts, prompt_name, progress))

    def embed_ids(self, texts: Sequence[Sequence[int]]) -> Array:
        """The vectors of texts as `encode_texts` gives them."""
        return embed_tokens(self.session, self._spec, texts)

    def encode_texts(
        self, texts: Sequence[str], prompt_name: str | None = None, progress: Callable[[str], None] = lambda _: None
    ) -> list[list[int]]:
        """Token ids of each text, as `embed` reads it. Raises UserError as `embed` does."""
        spec = self._spec
        if spec.embedding is None:
            raise UserError(f"{self.bundle.path} holds a model that makes no embeddings; leave --embed out")
        prompt, ids, cut = spec.embedding.prompt(prompt_name), [], 0
        for number, text in enumerate(texts, 1):
            if not text.strip():
                raise UserError(f"text {number} is empty; give some text")
            tokens, lost = self.tokenizer.encode_within(spec.embedding.prepared(text, prompt), spec.max_context)
            require_tokens(tokens, spec.vocab, f"{self.bundle.path}: text {number}")
            ids.append(tokens)
            cut += lost > 0
        if cut:
            progress(f"{cut} of {len(ids)} texts were cut to {spec.max_context} tokens")
        return ids

    def transcribe(
        self,
        sound: str | Path | Samples,
        options: SpeechOptions = PLAINLY,
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
    ) -> Iterator[SpokenText]:
        """What is said in a sound, piece by piece as it is found: one for each window, with timestamps one for each segment.

        Args:
            sound: a file that libsndfile reads, or samples float [n] of one channel at the model's rate (mostly 16,000 a second).
            options: language, task, timestamps.
            max_new_tokens: of a window at most; None is the model's limit.
            sampling: how a token is drawn; None: as the model's makers have it.

        Raises UserError for a model of text, a sound that cannot be read, and a language or task that the model does not know.
        """
        rate = require_speech(self._spec).sound.rate
        samples = read_sound(Path(sound), rate) if isinstance(sound, str | Path) else checked(sound, "the sound")
        tokenizer, drawn = self.tokenizer, self.default_sampling() if sampling is None else sampling
        for part in transcribe(self.session, self._spec, samples, options, max_new_tokens, drawn):
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

    def read_prompt(self, prompt: str, chat: ChatOptions = AS_IT_IS) -> Prompt:
        """The tokens of a prompt, through the chat template where there is one, with a note of what was put right.

        Raises UserError for an empty prompt, options that need a template where there is none, and for tokens that the model does
        not have.
        """
        if chat.use is not False and "tokenizer" not in self.__dict__:
            self.tokenizer = self._read_tokenizer(chat=True)
        read = read_prompt(self.tokenizer, prompt, self._spec.task != "seq2seq", chat)
        require_tokens(read.ids, self._spec.vocab, f"{self.bundle.path}: the prompt")
        return read

    def token_ids(self, tokens: Sequence[str]) -> frozenset[int]:
        """The ids of tokens as the tokenizer spells them, or of ids as text. Raises UserError for one that it does not have."""
        ids = set()
        for token in tokens:
            found = self.tokenizer.token_id(token)
            if found is None and token.isdecimal() and len(token) < 10:
                found = int(token)
            if found is None:
                raise UserError(
                    f"--stop-token {shown(token, 40)} is no token of this model; give it as the tokenizer spells it"
                )
            ids.add(found)
        return frozenset(ids)

    def default_sampling(self, seed: int = 0) -> Sampling:
        """How the model's makers have a token drawn, by their generation_config.json; greedy where they do not say."""
        return Sampling(**(self._spec.sampling.model_dump() if self._spec.sampling is not None else {}), seed=seed)

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
