"""Models that make one vector of a text: hidden states, a pooling over the tokens, then linears and a normalisation.

What follows the hidden states says the object `edgewright.embedding` of config.json, which `checkpoints.sentence_transformers`
makes of that library's files. Any family with a `text_encoder` can be such a model. Its one graph, `encoder`, keeps no cache.
Padding is behind the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..checkpoints.names import Names
from ..checkpoints.sentence_transformers import CONFIG, KEY, MOST_PROMPTS, POOLING, SIMILARITIES, prompts_fit
from ..errors import UserError
from ..graph import Graph, Port
from ..system.reading import shown
from .config import ConfigReader
from .language_model import LanguageModel, TextEncoder
from .layers.activations import activation
from .layers.linear import Linear

POOLINGS = tuple(POOLING.values())
"""The poolings; of several the results lie side by side."""

_ACTS = {
    "identity": None,
    "tanh": torch.tanh,
    "gelu": activation("gelu"),
    "relu": torch.relu,
    "silu": activation("silu"),
}
OUTPUT = "sentence_embedding"
_MOST_LINEARS = 8
_SMALLEST = 1e-12


@dataclass(frozen=True)
class DenseSpec:
    """A linear behind the pooling. act: a key of `_ACTS`."""

    inputs: int
    outputs: int
    bias: bool
    act: str


@dataclass(frozen=True)
class EmbeddingSpec:
    """What makes a vector of hidden states.

    Attributes:
        pooling: of `POOLINGS`.
        behind: what follows, in order; None is the normalisation to length 1.
        max_length: tokens of a text, special ones counted; 0 for as many as the model takes.
        lower_case: a text is put into lower case first.
        prompts: what is put before a text, by name. default_prompt: the name that holds where none is given.
        similarity: how two embeddings are meant to be compared.
    """

    pooling: tuple[str, ...]
    behind: tuple[DenseSpec | None, ...] = ()
    max_length: int = 0
    lower_case: bool = False
    prompts: tuple[tuple[str, str], ...] = ()
    default_prompt: str | None = None
    similarity: str = "cosine"

    @property
    def normalised(self) -> bool:
        """Whether embeddings have length 1."""
        return bool(self.behind) and self.behind[-1] is None

    @staticmethod
    def read(config: dict[str, Any]) -> EmbeddingSpec:
        """`edgewright.embedding` of config.json; mean pooling where it is absent. Raises UserError for a bad value."""
        if not described(config):
            return EmbeddingSpec(("mean",))
        section = ConfigReader(config, "").section(CONFIG).section(KEY)
        pooling = section.values.get("pooling")
        if (
            not isinstance(pooling, list)
            or not pooling
            or any(p not in POOLINGS or pooling.count(p) > 1 for p in pooling)
        ):
            raise section.error("pooling", pooling, f"some of {', '.join(POOLINGS)}")
        prompts = section.values.get("prompts") or {}
        if not isinstance(prompts, dict) or not prompts_fit(prompts):
            raise section.error("prompts", prompts, f"at most {MOST_PROMPTS} texts by name")
        default = section.values.get("default_prompt")
        if default is not None and (not isinstance(default, str) or default not in prompts):
            raise section.error("default_prompt", default, "one of the prompts")
        similarity = section.text("similarity", "cosine")
        if similarity not in SIMILARITIES:
            raise section.error("similarity", similarity, f"one of {', '.join(SIMILARITIES)}")
        return EmbeddingSpec(
            tuple(pooling),
            _behind(section),
            section.integer("max_length", 0, least=0),
            section.boolean("lower_case", False),
            tuple(sorted(prompts.items())),
            default,
            similarity,
        )


def _behind(section: ConfigReader) -> tuple[DenseSpec | None, ...]:
    entries = section.values.get("behind") or []
    if (
        not isinstance(entries, list)
        or len(entries) > 2 * _MOST_LINEARS
        or not all(isinstance(e, dict) for e in entries)
    ):
        raise section.error("behind", entries, f"a list of at most {2 * _MOST_LINEARS} objects")
    steps: list[DenseSpec | None] = []
    for entry in entries:
        inner = ConfigReader(entry, f"{section.where}behind.")
        kind = inner.text("kind")
        if kind not in ("dense", "normalize"):
            raise inner.error("kind", kind, "'dense' or 'normalize'")
        if kind == "normalize":
            steps.append(None)
            continue
        act = inner.text("act")
        if act not in _ACTS:
            raise inner.error("act", act, f"one of {', '.join(_ACTS)}")
        steps.append(DenseSpec(inner.integer("in"), inner.integer("out"), inner.boolean("bias", True), act))
    return tuple(steps)


def described(config: dict[str, Any]) -> bool:
    """Whether config.json says that a text becomes one vector, and how."""
    ours = config.get(CONFIG)
    return isinstance(ours, dict) and KEY in ours


def pooled_by(config: dict[str, Any], pooling: Sequence[str]) -> dict[str, Any]:
    """`config` with another pooling, or with that pooling alone where it describes no embedding."""
    ours = config.get(CONFIG) or {}
    return config | {CONFIG: ours | {KEY: ours.get(KEY, {}) | {"pooling": list(pooling)}}}


def poolings(config: dict[str, Any]) -> tuple[str, ...]:
    """The poolings that a config which a model was built of describes; () where it describes none."""
    return EmbeddingSpec.read(config).pooling if described(config) else ()


def pool(h: torch.Tensor, mask: torch.Tensor, kind: str) -> torch.Tensor:
    """One vector [B, hidden] of h [B, T, hidden]; mask: bool [B, T], true at real tokens, which come first.

    The weights of a sum are made before the sum, so that no number is larger than the hidden states: float16 holds it.
    """
    if kind == "max":
        return torch.where(mask.unsqueeze(-1), h, torch.full_like(h, -30000.0)).amax(1)
    real = mask.to(h.dtype)
    count = real.sum(1, keepdim=True)
    if kind == "cls":
        return h.select(1, 0)
    if kind == "last":
        weights = real - torch.cat((real, torch.zeros_like(count)), 1)[:, 1:]
    elif kind == "weighted_mean":
        # A token's number, as a share of all: whole numbers in float16 would be rounded.
        numbers = torch.arange(h.shape[1], device=h.device)
        before = (numbers.unsqueeze(1) <= numbers.unsqueeze(0)).to(h.dtype)
        weights = real * torch.matmul(real / count, before)
        weights = weights / weights.sum(1, keepdim=True)
    else:
        weights = real / count
    summed = (h * weights.unsqueeze(-1)).sum(1)
    return summed * torch.sqrt(count) if kind == "mean_sqrt_len" else summed


def unit_length(x: torch.Tensor) -> torch.Tensor:
    """x [..., D] of length 1. It is divided by its largest value first, whose square float16 might not hold."""
    x = x / x.abs().amax(-1, keepdim=True).clamp(min=_SMALLEST)
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + _SMALLEST)


class EmbedStep(nn.Module):
    """The graph: hidden states, pooling, what follows."""

    def __init__(self, model: EmbeddingModel) -> None:
        super().__init__()
        self.whole = model

    def forward(self, input_ids: torch.Tensor, encoder_mask: torch.Tensor) -> tuple[torch.Tensor]:
        """input_ids: int64 [B, T]; encoder_mask: bool [B, T], true at real tokens. Returns ([B, D],)."""
        h = self.whole.model.hidden_states(input_ids, encoder_mask)
        return (self.whole.vector(h, encoder_mask),)


class EmbeddingModel(LanguageModel):
    """A text encoder with what makes a vector of its hidden states.

    Attributes:
        embedding: how; size: numbers of a vector; vocab: token ids.
    """

    task = "embed"

    def __init__(self, config: dict[str, Any], encoder: TextEncoder) -> None:
        """Raises UserError for a bad description, or linears that do not fit each other."""
        super().__init__(config)
        self.embedding = spec = EmbeddingSpec.read(config)
        self.vocab, self._names = encoder.vocab, encoder.names
        self.model = encoder.stack
        self.max_context = min(encoder.positions, spec.max_length or encoder.positions)
        width = encoder.hidden * len(spec.pooling)
        linears: list[Linear] = []
        for dense in (step for step in spec.behind if step is not None):
            if dense.inputs != width:
                raise UserError(
                    f"config.json: a Dense behind the pooling takes {dense.inputs} numbers, and {width} come; "
                    "is its config.json of this model?"
                )
            linears.append(Linear(width, dense.outputs, dense.bias))
            width = dense.outputs
        self.dense = nn.ModuleList(linears)
        self.size = width
        self.tied = {}

    @property
    def names(self) -> Names:
        return self._names

    def vector(self, h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The embedding [B, size] of hidden states h [B, T, hidden]; mask: bool [B, T]."""
        parts = [pool(h, mask, kind) for kind in self.embedding.pooling]
        x = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        linears = iter(self.dense)
        for step in self.embedding.behind:
            if step is None:
                x = unit_length(x)
                continue
            x = next(linears)(x)
            act = _ACTS[step.act]
            x = x if act is None else act(x)
        return x

    def stacks(self) -> dict[str, nn.ModuleList]:
        return {"encoder": self.model.layers}

    def graphs(self) -> list[Graph]:
        return [
            Graph(
                name="encoder",
                module=EmbedStep(self),
                inputs=(
                    Port("input_ids", torch.int64, ("batch", "source")),
                    Port("encoder_mask", torch.bool, ("batch", "source")),
                ),
                outputs=(Port(OUTPUT, torch.float32, ("batch", self.size)),),
                example={"batch": 2, "source": 5},
                bounds={"batch": (1, 1024), "source": (1, self.max_context)},
            )
        ]


def embedding_model(config: dict[str, Any], backbone: LanguageModel) -> EmbeddingModel:
    """The model of the embeddings that `config` describes, of a family that also does something else.

    Its head is left out of what is read from files. Raises UserError for a family without a text encoder.
    """
    encoder = backbone.text_encoder()
    if encoder is None:
        raise UserError(
            f"model_type {shown(config.get('model_type'), 60)} makes no embeddings here; leave --pooling out, or "
            "give a model whose folder has no modules.json"
        )
    kept = {f"model.{name}" for name, _ in encoder.stack.named_parameters()}
    heads = {name for name, _ in backbone.named_parameters(remove_duplicate=False)} - kept
    names = backbone.names
    return EmbeddingModel(
        config, replace(encoder, names=Names(*names.rules, root=names.root, ignored=(*names.ignored, *sorted(heads))))
    )
