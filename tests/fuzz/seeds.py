"""The honest files that mutants are made of: small, made when they are needed, nothing stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from helpers.gguf_files import write_gguf
from helpers.requests import asking
from helpers.tiny import EXAMPLE, write_tiny_llama

from edgewright import compiler
from edgewright.bundle import CHECKPOINT, Bundle
from edgewright.device_profiles.profile import list_profiles, to_toml
from edgewright.runtimes.context_memory import save_memory
from edgewright.targets.registry import TARGETS

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
_FORMATS = ("onnx", "executorch")


def write_seeds(folder: Path) -> None:
    """Fill `folder`: `model/` and `bundle/` (one layer), `model.gguf`, `plan.json`, `task.tsv`, `device.toml`, `memory`."""
    model = write_tiny_llama(folder / "model", num_hidden_layers=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLE / name, model / name)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "max_new_tokens": 8}))
    write_gguf(folder / "model.gguf")
    _write_vocabulary(folder / "vocabulary.gguf")
    formats = tuple(name for name in _FORMATS if TARGETS[name].installed)
    exported = compiler.export(asking(str(model), formats, verify=False), folder / "bundle")
    (folder / "plan.json").write_text(exported.planned.plan.to_json())
    (folder / "task.tsv").write_text("".join((EXAMPLE / "task.tsv").read_text().splitlines(keepends=True)[:6]))
    (folder / "device.toml").write_text(to_toml(list_profiles()[0]))
    save_memory(folder / "memory", np.zeros((1, 3, 64), np.float32), Bundle.open(folder / "bundle"))
    assert (folder / "bundle" / CHECKPOINT / "tokenizer.json").is_file()


def _write_vocabulary(path: Path) -> None:
    """A GGUF of a byte-level vocabulary alone."""
    writer = GGUFWriter(path, "llama")
    letters = [*"abcdefghij", "ab", "abc", "<s>", "</s>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(letters)
    writer.add_token_types([1] * 12 + [3] * 2)
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(12)
    writer.add_eos_token_id(13)
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
