"""Bundles for apps, the projects made of them, and the C++ client compiled once. Tools that are not here skip a test."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from edgewright.apps.embed import EmbedOptions, Project, embed
from edgewright.compiler import export

from . import tiny
from .requests import asking
from .shared import ONE_LAYER, shared_bundle

ROOT = Path(__file__).resolve().parent.parent.parent
TOOLS = Path(os.environ.get("EDGEWRIGHT_TOOLS", ROOT / ".tools"))
ONNXRUNTIME = TOOLS / "onnxruntime"
EXAMPLES = ("deltanet-g2p", "dolphin-packages", "t5gemma-g2p")
CONTEXT = {"dolphin-packages": 320}
WARNINGS = ("-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror")
SANITIZERS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def make_bundle(name: str, folder: Path, run: Path) -> Path:
    """The bundle of an example, or of a tiny model that is shared in this run. run: see `shared_bundle`."""
    if name not in EXAMPLES:
        return shared_bundle(run, name, folder / "shared")[1]
    context = CONTEXT.get(name, 64)
    request = asking(str(ROOT / "examples" / name), bits=4.5, importance="zd", max_context=context, verify=False)
    return export(request, folder / "bundle").path


def bundle_for(onnxruntime: str, name: str, folder: Path) -> Path:
    """The same for an ONNX Runtime of that age, made anew."""
    model = ROOT / "examples" / name
    if not model.exists():
        model = getattr(tiny, f"write_tiny_{name}")(folder / "model", **ONE_LAYER[name])
    bits, context = 4.5 if name in EXAMPLES else 6.0, CONTEXT.get(name, 64)
    own = {"onnx": (onnxruntime,)}
    request = asking(str(model), bits=bits, importance="zd", max_context=context, verify=False, own=own)
    return export(request, folder / "bundle").path


PROMPTS = {
    "prompts": {"query": "find ", "document": ""},
    "default_prompt_name": "document",
    "similarity_fn_name": "dot",
}


def make_embedding_bundle(folder: Path, onnxruntime: str | None = None) -> Path:
    """A BERT of two layers with WordPiece, a linear behind its mean and prompts, that reads 40 tokens, as a bundle."""
    import transformers as hf

    from .oracle import randomise
    from .sentence_models import describe, linear, wordpiece

    model = folder / "model"
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.BertConfig(vocab_size=56, max_position_embeddings=48, **sizes)
    bert = randomise(hf.BertModel(config), 1)
    for name, weight in bert.named_parameters():  # so that texts have vectors apart
        if "LayerNorm.weight" in name:
            weight.data.fill_(1)
        elif weight.dim() == 1:
            weight.data.mul_(0.1)
    bert.save_pretrained(model)
    describe(wordpiece(model), ("mean",), [linear(64, 48)], settings=PROMPTS, limits={"max_seq_length": 40})
    own = {} if onnxruntime is None else {"onnx": (onnxruntime,)}
    return export(asking(str(model), bits=8.0, importance="zd", verify=False, own=own), folder / "bundle").path


def project(bundle: Path, folder: Path, platform: str = "cpp", **options: object) -> Project:
    return embed(bundle, folder, EmbedOptions(platform, **options), lambda _: None)  # type: ignore[arg-type]


@cache
def compiled(source: Path, binary: Path, *flags: str) -> Path:
    """The command line of a C++ project. Skips where a compiler, a header or the library is missing."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    if not (ONNXRUNTIME / "include" / "onnxruntime_c_api.h").is_file():
        pytest.skip("no headers of ONNX Runtime here: make apps-tools")
    if not Path("/usr/include/nlohmann/json.hpp").is_file():
        pytest.skip("no nlohmann-json here: apt-get install nlohmann-json3-dev")
    library = ONNXRUNTIME / "lib"
    command = ["g++", "-std=c++20", *WARNINGS, *flags, f"-I{source}", "-isystem", str(ONNXRUNTIME / "include")]
    command += [str(source / "main.cpp"), str(source / "edgewright.cpp"), f"-L{library}", "-lonnxruntime"]
    command += [f"-Wl,-rpath,{library}", "-o", str(binary)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return binary


def client(binary: Path, *arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [str(binary), *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300)
