"""Hub ids: which files of a repository are fetched, and which GGUF of several is meant."""

from __future__ import annotations

import glob
import logging
import re
from pathlib import Path, PurePosixPath

from ..errors import UserError
from ..system.reading import one_line
from . import mistral_layout
from .adapter_config import CONFIG as ADAPTER_CONFIG
from .gguf_names import listed, models_of
from .safetensors_reader import INDEX

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_FILES = (
    *("*.safetensors", INDEX, "config.json", "generation_config.json", mistral_layout.PARAMS, ADAPTER_CONFIG),
    *("quantize_config.json", "quant_config.json", "hf_quant_config.json"),
    *("modules.json", "sentence_*config.json", "config_sentence_transformers.json", "*/config.json"),
    *("tokenizer*.json", "chat_template*", "*.model", "tokenizer.model.v[0-9]", "tekken.json", "*.tiktoken"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.spm"),
    *("special_tokens_map.json", "added_tokens.json", "additional_chat_templates/*.jinja"),
)
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*(:[\w.-]+)?)?", re.ASCII)


def is_hub_id(model: str) -> bool:
    """Whether it looks like "name", "owner/name" or "owner/name:FILE", FILE being a part of a GGUF's name."""
    repository = model.partition(":")[0]
    looks_like_file = repository.lower().endswith((".gguf", ".safetensors", ".json", *PICKLES))
    return bool(_ID.fullmatch(model)) and ".." not in model and "--" not in model and not looks_like_file


def download(model: str) -> Path:
    """The folder of a repository's configs, tokenizer and safetensors; where it has none of these, its GGUF file.

    Of several GGUF files the one that "owner/name:FILE" means, such as Q4_K_M, and all parts of a split one. Pickles and code are
    not downloaded. Raises UserError for what the hub and the cache do not have, and where it is not clear which file is meant.
    """
    import huggingface_hub  # here, as its import is slow

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of patterns that no file has
    repository, _, wanted = model.partition(":")

    def fetched(patterns: list[str]) -> Path:
        try:
            return Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))
        except Exception as error:  # the hub's, the HTTP client's and the file system's errors share no base
            raise UserError(
                f"no directory {model!r}, and the hub gave nothing for that id ({one_line(error, 120)}); "
                "check the name and the network, or download the model and give its directory"
            ) from error

    folder = fetched(list(_FILES))
    if not wanted and (any(folder.glob("*.safetensors")) or (folder / INDEX).exists()):
        return folder
    try:
        # Not list_repo_files: it tries again for half a minute where there is no network.
        names = [file.rfilename for file in huggingface_hub.model_info(repository).siblings or []]
    except Exception:  # the hub is not there: what the cache has of it
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    models = models_of([name for name in names if name.lower().endswith(".gguf") and _stays_inside(name)])
    if not models:
        if wanted:
            raise UserError(f"{one_line(model)}: the repository has no GGUF file; leave :{one_line(wanted, 60)} out")
        return folder
    files = _chosen(model, wanted, models)
    fetched([glob.escape(name) for name in files])
    return folder / files[0]


def _chosen(model: str, wanted: str, models: list[list[str]]) -> list[str]:
    """The files of the one that is meant. models: of each its files, in order."""
    found = [files for files in models if _is_meant(wanted, files[0])] if wanted else models
    if len(found) == 1:
        return found[0]
    repository = model.partition(":")[0]
    if not found:
        raise UserError(f"{one_line(model)}: no GGUF file there is called so; there are {listed(models)}")
    raise UserError(f"{one_line(model)}: several GGUF models: {listed(found)}; name one, as {repository}:Q4_K_M does")


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and name.isprintable() and not set(name) & set("\\:")


def _is_meant(wanted: str, file: str) -> bool:
    """Whether `wanted` is the file's name or a part of it between separators, such as Q4_K_M, in capitals or not."""
    path = PurePosixPath(file)
    if wanted.lower() in (path.name.lower(), path.stem.lower()):
        return True
    return re.search(rf"(?<![^-._/]){re.escape(wanted)}(?![^-._/])", file, re.IGNORECASE) is not None
