"""The quantization loss: the dequantized weights against the original ones, and what each artefact is worth on a task or text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..bundle import Bundle
from ..calibration.prompts import Passage, Task, paragraphs, read_task, text_passages
from ..checkpoints.checkpoint import Checkpoint
from ..errors import UserError
from ..models.loading import load_original
from ..models.opening import open_model
from ..models.registry import build
from ..runtimes.eager import EagerSession
from ..runtimes.session import Session
from .compare import Probe
from .report import Agreement, TextScore
from .scores import score_text, task_accuracy, word_error_rate
from .similarity import Similarity, score_texts

Progress = Callable[[str], None]


@dataclass(frozen=True)
class QualityData:
    """What quality is measured on: a task, passages of a text, or whole texts for a model of embeddings; else none.

    file: the task's.
    """

    task: Task | None
    passages: Sequence[Passage]
    texts: Sequence[Sequence[int]] = ()
    file: Path | None = None

    def __bool__(self) -> bool:
        return self.task is not None or bool(self.passages) or bool(self.texts)

    @property
    def pieces(self) -> tuple[int, int]:
        """How many windows or texts there are, and how many tokens of them count."""
        scored = [p.scored for p in self.passages] or self.texts
        return len(scored), sum(map(len, scored))

    @staticmethod
    def read(
        bundle: Bundle,
        quantized: Checkpoint,
        task: Path | None,
        task_limit: int | None,
        text: Path | None,
        windows: int,
    ) -> QualityData:
        """Read a task file's first `task_limit` prompts and a text's first `windows` windows.

        Raises UserError for files that cannot be read, a bundle without a tokenizer, or one of a module.
        """
        spec = bundle.manifest.generation
        if spec.task == "module" and (task is not None or text is not None):
            raise UserError("--task and --text need a model that generates; this bundle's graphs are run as they are")
        examples = read_task(task, task_limit, spec.task == "memory") if task is not None else None
        if text is None:
            return QualityData(examples, [], (), task)
        if spec.speech is not None:
            raise UserError("--text is read as a prompt, and this model reads sound; give --task FILE.tsv of sounds")
        if quantized.tokenizer is None:
            raise UserError("--text needs a tokenizer, and the bundle has none")
        if spec.task == "embed":
            return QualityData(examples, [], paragraphs(text, quantized.tokenizer, spec, windows), task)
        return QualityData(examples, text_passages(text, quantized.tokenizer, spec, windows), (), task)


def open_original(bundle: Bundle, model: str, adapter: str | None = None) -> Checkpoint:
    """The checkpoint that a bundle was made from, with the adapter that was merged and the pooling that was chosen.

    Raises UserError if it is another.
    """
    original = open_model(model, adapter, bundle.manifest.generation.pooling)
    if original.fingerprint() != bundle.manifest.source_fingerprint:
        given = f"{model} with --adapter {adapter}" if adapter else model
        raise UserError(f"{given} is not the checkpoint this bundle was made from ({bundle.manifest.source})")
    return original


def load_original_session(quantized: Checkpoint, original: Checkpoint) -> EagerSession:
    """The original weights in float32, run by PyTorch."""
    model = build(quantized.config)
    load_original(model, original)
    return EagerSession(model.graphs())


class Quality:
    """Measures sessions on the data, beside the original weights where they are there, else beside the dequantized ones."""

    def __init__(
        self,
        bundle: Bundle,
        data: QualityData,
        dequantized: Session,
        original: Session | None,
        progress: Progress,
    ) -> None:
        self._bundle, self._data, self._progress = bundle, data, progress
        self._dequantized, self._original = dequantized, original
        self.original_text: TextScore | None = None
        self.dequantized_text: TextScore | Similarity | None = None

    def task_accuracy(self, name: str, session: Session) -> float | None:
        """An artefact's accuracy on the task; None without one, and of a model that reads sound."""
        if self._data.task is None or self._hears:
            return None
        self._progress(f"{name}: {len(self._data.task.prompts)} task prompts")
        return task_accuracy(session, self._bundle, self._data.task)

    def word_error_rate(self, name: str, session: Session) -> float | None:
        """An artefact's word error rate on a task of sounds; None without one, and of a model that reads text."""
        if self._data.task is None or self._data.file is None or not self._hears:
            return None
        self._progress(f"{name}: {len(self._data.task.prompts)} sounds")
        return word_error_rate(session, self._bundle, self._data.task, self._data.file)

    @property
    def _hears(self) -> bool:
        return self._bundle.manifest.generation.speech is not None

    def text_score(self, name: str, session: Session) -> TextScore | Similarity | None:
        """An artefact's score on the text; None without one. The base's own scores are kept as attributes."""
        if self._data.texts:
            return self._texts_score(name, session)
        passages = self._data.passages
        if not passages:
            return None
        self._progress(f"{name}: {len(passages)} windows of text")
        spec = self._bundle.manifest.generation
        if self._original is None:
            self.dequantized_text, score = score_text(self._dequantized, [session], spec, passages)
        elif self.dequantized_text is None:
            self.original_text, self.dequantized_text, score = score_text(
                self._original, [self._dequantized, session], spec, passages
            )
        else:
            _, score = score_text(self._original, [session], spec, passages)
        return score

    def _texts_score(self, name: str, session: Session) -> Similarity:
        texts, spec = self._data.texts, self._bundle.manifest.generation
        self._progress(f"{name}: {len(texts)} texts")
        if self._original is None:
            (score,) = score_texts(self._dequantized, [session], spec, texts)
        elif self.dequantized_text is None:
            self.dequantized_text, score = score_texts(self._original, [self._dequantized, session], spec, texts)
        else:
            (score,) = score_texts(self._original, [session], spec, texts)
        return score

    def quantization(self, probe: Probe) -> Agreement | None:
        """The dequantized weights compared with the original ones; None without those."""
        if self._original is None:
            return None
        self._progress("quantization loss: the dequantized against the original weights")
        (agreement,) = probe.compare(self._original, [self._dequantized])
        return agreement

    def original_accuracy(self) -> float | None:
        """The original's accuracy on the task; None without original or task."""
        return None if self._original is None else self.task_accuracy("original", self._original)

    def original_word_error_rate(self) -> float | None:
        """The original's word error rate on a task of sounds; None without original or task."""
        return None if self._original is None else self.word_error_rate("original", self._original)
