"""What each platform's project can hold: its runtime, its tokenizer's parts, its limits."""

from __future__ import annotations

from dataclasses import dataclass

from ..device_profiles.profile import load
from ..errors import UserError
from ..system.reading import nearest, shown
from ..targets.onnx.releases import reaches
from .contract import App

GIB = 1 << 30

_STEPS = frozenset(
    {
        *("normalizer:NFC", "normalizer:Prepend", "normalizer:Replace"),
        *(
            "pre_tokenizer:WhitespaceSplit",
            "pre_tokenizer:Metaspace",
            "pre_tokenizer:Punctuation",
            "pre_tokenizer:Digits",
        ),
        *("pre_tokenizer:ByteLevel", "pre_tokenizer:Split", "pre_tokenizer:Split/Regex"),
        *("decoder:Metaspace", "decoder:ByteLevel", "decoder:ByteFallback", "decoder:Replace", "decoder:Fuse"),
        "decoder:Strip",
    }
)
_BERT = frozenset({"normalizer:BertNormalizer", "pre_tokenizer:BertPreTokenizer", "decoder:WordPiece"})


@dataclass(frozen=True)
class Platform:
    """A platform that projects are made for.

    runtime: its ONNX Runtime, the newest that can be counted on. models, steps: of tokenizers that its client has; None for all.
    most_memory: bytes that a process can address there; None for no limit of the platform's own. float_activations: its runtime
    has no int8 activations, and expands quantized matrices at every call: it gets a form whose weights are expanded once.
    model: where a project has what the model needs. most_file: bytes of the largest file that a project ships, None for no limit;
    fetches: whether its client can fetch the weights instead. embeds: whether its client makes vectors of texts. lowers: whether it
    puts a whole text into lower case as Python does. coreml: whether it also runs the Core ML package of a bundle that has one.
    """

    name: str
    runtime: str
    models: frozenset[str] | None
    steps: frozenset[str] | None
    most_memory: int | None
    float_activations: bool
    model: str = "model"
    most_file: int | None = None
    fetches: bool = False
    embeds: bool = False
    lowers: bool = True
    coreml: bool = False


PLATFORMS = {
    "android": Platform(
        name="android",
        runtime="1.29",
        models=frozenset({"WordLevel", "BPE", "Unigram"}),
        steps=_STEPS,
        most_memory=None,
        float_activations=False,
        model="app/src/main/assets/model",
        most_file=2 * GIB - 1,  # what an app's package and its reader count with
        fetches=True,
    ),
    "cpp": Platform(
        name="cpp",
        runtime="1.32",
        models=frozenset({"WordLevel", "WordPiece", "BPE", "Unigram"}),
        steps=_STEPS | _BERT,
        most_memory=None,
        float_activations=False,
        embeds=True,
        lowers=False,
    ),
    "react-native": Platform(
        name="react-native",
        runtime="1.24.3",
        models=None,
        steps=None,
        most_memory=None,
        float_activations=False,
        embeds=True,
    ),
    "swift": Platform(
        name="swift",
        runtime="1.29",  # the xcframework of a registry; Microsoft's own Swift package was found at 1.24.2
        models=frozenset({"WordLevel", "BPE", "Unigram"}),
        steps=_STEPS,
        most_memory=None,
        float_activations=False,
        coreml=True,
    ),
    "web": Platform(
        name="web",
        runtime="1.30",
        models=None,
        steps=None,
        most_memory=4 * GIB,  # WebAssembly's addresses of 32 bits
        float_activations=True,
        embeds=True,
    ),
}


def platform_named(name: str) -> Platform:
    """The platform of a name. Raises UserError, naming those there are, for another."""
    if name not in PLATFORMS:
        raise UserError(
            f"--platform {shown(name, 40)} is none of {', '.join(PLATFORMS)}{nearest(name, PLATFORMS)}; "
            "docs/using-the-onnx-graphs.md is for all others"
        )
    return PLATFORMS[name]


def require_fit(app: App, platform: Platform, most_memory: int | None) -> None:
    """Raise UserError where the platform's runtime does not open a graph, or the app needs more memory than there is.

    most_memory: of the device; None for the platform's own limit alone.
    """
    if app.embedding is not None and not platform.embeds:
        able = ", ".join(name for name, one in PLATFORMS.items() if one.embeds)
        raise UserError(f"--platform {platform.name} has no client for a model of embeddings; choose one of {able}")
    if app.embedding is not None and app.embedding.lower_case and app.tokenizer is not None and not platform.lowers:
        raise UserError(
            f"--platform {platform.name}: this model's texts are put into lower case before they are read, which its client does "
            "not do; choose another platform, or give the client token ids with --no-tokenizer"
        )
    for graph in app.graphs:
        if not reaches(platform.runtime, graph.onnxruntime):
            why = f" ({graph.because})" if graph.because else ""
            raise UserError(
                f"--platform {platform.name} has ONNX Runtime {platform.runtime}, and {graph.file} needs {graph.onnxruntime}"
                f"{why}; export again with --onnxruntime {platform.runtime}"
            )
    limits = [limit for limit in (platform.most_memory, most_memory) if limit is not None]
    if limits and app.memory.total > min(limits):
        raise UserError(
            f"--platform {platform.name}: the app takes about {app.memory.total / GIB:.2f} GiB (weights "
            f"{app.memory.weights / GIB:.2f}, states {app.memory.states / GIB:.2f}), and {min(limits) / GIB:.2f} GiB are there; "
            "export with fewer --bits, or a shorter --max-context"
        )


def device_memory(name: str) -> int:
    """Bytes of a device's memory, by its profile. Raises UserError for an unknown device, or one whose memory is not known."""
    size = load(name).memory.size
    if size is None:
        raise UserError(
            f"--device {shown(name, 60)}: its profile does not say how much memory it has; leave --device out"
        )
    return int(size.value)
