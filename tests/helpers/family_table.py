"""The table of families and targets in docs/families.md: what computes a cell, and what reads and writes the table."""

from __future__ import annotations

import re
from pathlib import Path

from edgewright import compiler
from edgewright.runtimes.registry import has_runtime
from edgewright.targets.registry import TARGETS
from edgewright.verification.report import Report
from helpers import tiny
from helpers.requests import asking
from helpers.saved import saved
from helpers.tiny_families import EMBEDDERS, FAMILIES

DOCS = Path(__file__).parent.parent.parent / "docs" / "families.md"
FORMATS = tuple(name for name, target in TARGETS.items() if not target.graphs and has_runtime(name))
"""The columns of the table: the targets that take every graph and run here."""
CONFIGS = {"t5gemma": tiny.T5GEMMA, "llama": tiny.LLAMA, "gemma3_text": tiny.GEMMA3, **FAMILIES}
CONFIGS |= {f"{name} embedding": config for name, config in EMBEDDERS.items()}
MODULE = "helpers.user_modules:unet"
BITS = {"rwkv7": 8.0}
"""Bits a weight, where 6 are too few for a target: RWKV-7's low-rank projections keep 16, which are much of a tiny model."""
SAVED = ("mamba2", "bamba", "granitemoehybrid", "nemotron_h", "zamba2", "recurrent_gemma")
"""Families whose tiny model transformers writes, under the names of its files."""
NAMES = {
    "t5gemma": "T5Gemma",
    "t5gemma2": "T5Gemma 2",
    "mu": "Mu",
    "t5": "T5",
    "bart": "BART",
    "m2m_100": "M2M100",
    "mt5": "mT5",
    "umt5": "UMT5",
    "mbart": "mBART",
    "marian": "Marian",
    "pegasus": "Pegasus",
    "whisper": "Whisper",
    "moonshine": "Moonshine",
    "dolphin": "Dolphin",
    "arc_encoder": "ARC-Encoder",
    "phi4flash": "SambaY (Phi-4-mini-flash)",
    "qwen3_5_text": "Qwen3.5 (Gated DeltaNet)",
    "qwen3_next": "Qwen3-Next, dense (Gated DeltaNet)",
    "olmo_hybrid": "Olmo Hybrid (Gated DeltaNet)",
    "hgrn2": "HGRN-2",
    "falcon_h1": "Falcon-H1 (Mamba-2)",
    "mamba2": "Mamba-2",
    "bamba": "Bamba (Mamba-2)",
    "granitemoehybrid": "Granite 4, dense and H (Mamba-2)",
    "nemotron_h": "Nemotron-H (Mamba-2)",
    "zamba2": "Zamba 2 (Mamba-2)",
    "recurrent_gemma": "RecurrentGemma (RG-LRU)",
    "rwkv7": "RWKV-7",
    "lfm2": "LFM2 (short convolution)",
    "modernbert": "Ettin encoder (ModernBERT)",
    "modernbert-decoder": "Ettin decoder (ModernBERT)",
    "llama": "Llama",
    "qwen2": "Qwen2",
    "mistral": "Mistral",
    "ministral": "Ministral",
    "ministral3": "Ministral 3",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3",
    "gemma3n_text": "Gemma 3n",
    "gemma4_text": "Gemma 4, dense",
    "phi3": "Phi-3, Phi-4-mini",
    "smollm3": "SmolLM3",
    "granite": "Granite 3",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "exaone4": "EXAONE 4",
    "ernie4_5": "ERNIE 4.5",
    "hunyuan_v1_dense": "HunYuan (dense)",
    "stablelm": "StableLM 2",
    "gpt2": "GPT-2",
    "gpt_neox": "GPT-NeoX, Pythia",
    "bert": "BERT, MiniLM",
    "roberta": "RoBERTa",
    "xlm-roberta": "XLM-R",
    "distilbert": "DistilBERT",
    "modernbert embedding": "ModernBERT, embeddings",
    "gemma3_text embedding": "EmbeddingGemma",
    "qwen3 embedding": "Qwen3-Embedding",
    "module": "your own module (a U-Net with attention)",
}
"""model_type -> common name, in the order of the table; " embedding" is behind one that also does something else."""


def verified(family: str, form: str, folder: Path) -> Report:
    """The report of `export` of a family's tiny model at mixed bits to one target: exported, reloaded and compared."""
    write = saved if family in SAVED else tiny.write
    model = MODULE if family == "module" else str(write(folder / "model", CONFIGS[family]))
    context = None if family == "module" else 48
    result = compiler.export(
        asking(model, (form,), bits=BITS.get(family, 6.0), max_context=context, prompts=4), folder / "bundle"
    )
    widths = {entry.bits for entry in result.planned.plan.entries.values()}
    assert len(widths) > 1, widths  # mixed bits
    assert result.report is not None
    assert result.report.targets[0].weights == sum(e.bits < 16 for e in result.planned.plan.entries.values())
    return result.report


def documented() -> dict[tuple[str, str], str]:
    """(family, format) -> the cell in docs/families.md."""
    cells = {}
    by_name = {name: family for family, name in NAMES.items()}
    for line in DOCS.read_text().splitlines():
        parts = [p.strip() for p in line.strip("|").split("|")]
        if line.startswith("|") and parts[0] in by_name and len(parts) == 1 + len(FORMATS):
            cells |= {(by_name[parts[0]], form): cell for form, cell in zip(FORMATS, parts[1:], strict=True)}
    return cells


def row(family: str, cells: dict[tuple[str, str], str]) -> str:
    return f"| {' | '.join([NAMES[family], *(cells[family, form] for form in FORMATS)])} |"


def table(cells: dict[tuple[str, str], str]) -> str:
    head = ["family", *FORMATS]
    lines = [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head))]
    return "\n".join([*lines, *(row(family, cells) for family in NAMES)])


def cell(report: Report) -> str:
    """The cell of a verified artefact."""
    return f"yes ({re.sub('float', 'fp', report.targets[0].activations)})"
