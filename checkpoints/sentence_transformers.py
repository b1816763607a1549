"""The files of sentence-transformers beside a model: how its hidden states become one vector, and what goes before a text.

modules.json lists a chain: the transformer, a pooling, then linears and a normalisation. What it says becomes the object
`edgewright.embedding` of config.json, which `models.embedding` computes. Nothing that a file names is imported or run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from ..errors import UserError
from ..system.reading import MEBIBYTE, one_line, read_json_list, read_json_object, shown
from .checkpoint import Checkpoint, TensorInfo, TensorStore
from .named_store import NamedStore
from .names import Piece
from .safetensors_reader import SafetensorsStore

MODULES = "modules.json"
CONFIG, KEY = "edgewright", "embedding"
"""Where in config.json the description lies: `edgewright.embedding`."""

_SETTINGS = "config_sentence_transformers.json"
_OLDER = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
_LENGTHS = ("sentence_bert_config.json", *(f"sentence_{name}_config.json" for name in _OLDER[1:]))
_PACKAGE = "sentence_transformers."
_KNOWN = ("Transformer", "Pooling", "Dense", "Normalize")
_MOST_MODULES, MOST_PROMPTS, _LONGEST_PROMPT, _LARGEST = 16, 64, 4096, 1 << 20

POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last",
}
"""The library's flag -> our name of the pooling, in the order in which the library joins what such flags ask for."""

_BY_NAME = {"cls": "cls", "max": "max", "mean": "mean", "mean_sqrt_len_tokens": "mean_sqrt_len"} | {
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
_ACTIVATIONS = {"Identity": "identity", "Tanh": "tanh", "GELU": "gelu", "ReLU": "relu", "SiLU": "silu"}
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")


@dataclass(frozen=True)
class SentenceTransformer:
    """A folder with modules.json. transformer: the folder of the model itself. embedding: the description.

    dense: the folders of the linears behind the pooling.
    """

    transformer: Path
    embedding: dict[str, Any]
    dense: Sequence[Path] = field(default=())

    def joined(self, checkpoint: Checkpoint) -> Checkpoint:
        """The model's checkpoint with the description in its config and the linears among its tensors.

        Raises UserError for a linear whose weights are missing, or a pickle.
        """
        ours = checkpoint.config.get(CONFIG)
        described: dict[str, Any] = {**(ours if isinstance(ours, dict) else {}), KEY: self.embedding}
        stores = [checkpoint.store, *(_linear(folder, i) for i, folder in enumerate(self.dense))]
        store = checkpoint.store if len(stores) == 1 else JoinedStore(stores)
        return checkpoint.changed(config=checkpoint.config | {CONFIG: described}, store=store)


class JoinedStore:
    """The tensors of several stores. Raises UserError for a name that two of them have."""

    def __init__(self, stores: Sequence[TensorStore]) -> None:
        self.infos: dict[str, TensorInfo] = {}
        self._owner: dict[str, TensorStore] = {}
        for store in stores:
            for name, info in store.infos.items():
                if name in self._owner:
                    raise UserError(
                        f"{one_line(name)} is in two files of the checkpoint; is one of them another model's?"
                    )
                self.infos[name], self._owner[name] = info, store
        self.files = tuple(file for store in stores for file in store.files)

    def tensor(self, name: str) -> torch.Tensor:
        return self._owner[name].tensor(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._owner[name].rows(name, start, stop)

    def sample(self, name: str) -> bytes:
        return self._owner[name].sample(name)


def read_sentence_transformer(directory: Path) -> SentenceTransformer | None:
    """What modules.json and the files that it names say; None without it.

    Raises UserError for a module that is not known, a path that leaves the folder, a pooling or an activation that is not
    computed here, and any bad value.
    """
    if not (directory / MODULES).exists():
        return None
    chain = _chain(directory)
    if [kind for kind, _ in chain[:2]] != ["Transformer", "Pooling"]:
        kinds = ", ".join(kind for kind, _ in chain)
        raise UserError(f"{directory / MODULES}: the modules are {kinds}; a Transformer and a Pooling must come first")
    transformer = chain[0][1]
    settings = _object(directory / _SETTINGS)
    prompts, default = _prompts(directory / _SETTINGS, settings)
    embedding: dict[str, Any] = {"pooling": _pooling(chain[1][1] / "config.json", bool(prompts))}
    embedding["behind"], dense = [], []
    for kind, folder in chain[2:]:
        if kind == "Dense":
            dense.append(folder)
            embedding["behind"].append(_dense(folder / "config.json"))
        elif kind == "Normalize":
            embedding["behind"].append({"kind": "normalize"})
        else:
            raise UserError(f"{directory / MODULES}: a second {kind} follows the first; one of each is computed here")
    embedding |= _limits(transformer)
    if prompts:
        embedding |= {"prompts": prompts} | ({"default_prompt": default} if default is not None else {})
    return SentenceTransformer(transformer, embedding | {"similarity": _similarity(directory, settings)}, dense)


def _chain(directory: Path) -> list[tuple[str, Path]]:
    """(kind, folder) of each module, in order."""
    file = directory / MODULES
    entries = read_json_list(file)
    if not 2 <= len(entries) <= _MOST_MODULES:
        raise UserError(f"{file}: {len(entries)} modules; 2 to {_MOST_MODULES} are expected")
    chain = []
    for entry in entries:
        kind, path = (entry.get("type"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(path, str):
            raise UserError(f"{file}: {shown(entry, 80)} is no module; its type and path are strings")
        name = kind.rpartition(".")[2]
        if not kind.startswith(_PACKAGE) or name not in _KNOWN:
            known = ", ".join(_KNOWN)
            raise UserError(f"{file}: a module of type {shown(kind, 80)} is not computed here; those that are: {known}")
        if not _stays_inside(path):
            raise UserError(f"{file}: the path {shown(path, 80)} leaves the folder")
        chain.append((name, directory / path))
    return chain


def _stays_inside(path: str) -> bool:
    parts = PurePosixPath(path)
    return (
        len(path) <= 200
        and path.isprintable()
        and not parts.is_absolute()
        and ".." not in parts.parts
        and not (set(path) & set("\\:"))
    )


def _object(path: Path) -> dict[str, Any]:
    return read_json_object(path, MEBIBYTE) if path.exists() else {}


def _refuse_unknown(path: Path, values: Mapping[str, Any], known: Collection[str]) -> None:
    """What a key that is not read would change cannot be known."""
    for key, value in values.items():
        if key not in known and value not in (None, False, {}, []):
            raise UserError(
                f"{path}: {shown(key, 60)} is {shown(value, 60)}, which is not computed here; remove the key"
            )


def _pooling(path: Path, prompted: bool) -> list[str]:
    values = read_json_object(path, MEBIBYTE)
    sizes = {"word_embedding_dimension", "embedding_dimension"}
    _refuse_unknown(path, values, {*POOLING, *sizes, "include_prompt", "pooling_mode"})
    named = values.get("pooling_mode")
    if named is not None:
        names = named if isinstance(named, list) else [named]
        if not names or not all(isinstance(n, str) and n in _BY_NAME for n in names):
            raise UserError(f"{path}: pooling_mode is {shown(named, 60)}; known: {', '.join(_BY_NAME)}")
        chosen = list(dict.fromkeys(_BY_NAME[n] for n in names))
    else:
        chosen = [ours for flag, ours in POOLING.items() if _flag(path, values, flag, False)]
        if not chosen and "pooling_mode_mean_tokens" not in values:
            chosen = ["mean"]  # the library's default
    if not chosen:
        raise UserError(f"{path}: no pooling is switched on; one of {', '.join(POOLING)} must be true")
    if prompted and not _flag(path, values, "include_prompt", True):
        raise UserError(f"{path}: include_prompt is false, and prompts that are not pooled are not supported")
    return chosen


def _flag(path: Path, values: Mapping[str, Any], key: str, default: bool) -> bool:
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise UserError(f"{path}: {key} is {shown(value, 60)}, expected true or false")
    return value


def _size(path: Path, values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    if type(value) is not int or not 1 <= value <= _LARGEST:
        raise UserError(f"{path}: {key} is {shown(value, 60)}, expected an integer from 1 to {_LARGEST}")
    return value


def _dense(path: Path) -> dict[str, Any]:
    values = read_json_object(path, MEBIBYTE)
    ports = ("module_input_name", "module_output_name")
    _refuse_unknown(path, values, {"in_features", "out_features", "bias", "activation_function", *ports})
    for port in ports:
        if values.get(port) not in (None, "sentence_embedding"):
            raise UserError(f"{path}: {port} is {shown(values[port], 60)}; a linear of the embedding alone is computed")
    act = values.get("activation_function", "torch.nn.modules.activation.Tanh")  # the library's default
    name = act.rpartition(".")[2] if isinstance(act, str) else ""
    if name not in _ACTIVATIONS or not act.startswith("torch.nn."):
        raise UserError(
            f"{path}: activation_function is {shown(act, 80)}; known: {', '.join(_ACTIVATIONS)} of torch.nn"
        )
    return {
        "kind": "dense",
        "in": _size(path, values, "in_features"),
        "out": _size(path, values, "out_features"),
        "bias": _flag(path, values, "bias", True),
        "act": _ACTIVATIONS[name],
    }


def _linear(folder: Path, number: int) -> TensorStore:
    """The tensors of a Dense under the names of `models.embedding`."""
    if not (folder / "model.safetensors").is_file():
        if any((folder / name).exists() for name in ("pytorch_model.bin", "model.bin")):
            raise UserError(
                f"{folder}: weights as a pickle, which can run code when read, are refused; where you trust them, "
                "SentenceTransformer(OLD).save(NEW) writes safetensors"
            )
        raise UserError(f"{folder}: no model.safetensors, where the weights of a Dense should be; download it again")
    store = SafetensorsStore(folder, {"model.safetensors": set()})
    return NamedStore(store, {f"dense.{number}.{name.removeprefix('linear.')}": (Piece(name),) for name in store.infos})


def _limits(transformer: Path) -> dict[str, Any]:
    """How long a text may be, and whether it is put into lower case."""
    path = next((transformer / name for name in _LENGTHS if (transformer / name).exists()), transformer / _LENGTHS[0])
    values = _object(path)
    inert = {"tokenizer_name_or_path", "cache_dir", "transformer_task", "modality_config", "module_output_name"}
    _refuse_unknown(path, values, {"max_seq_length", "do_lower_case", *inert})
    if values.get("transformer_task") not in (None, "feature-extraction"):
        raise UserError(
            f"{path}: transformer_task is {shown(values['transformer_task'], 60)}; feature-extraction is known"
        )
    limits: dict[str, Any] = {}
    if values.get("max_seq_length") is not None:
        limits["max_length"] = _size(path, values, "max_seq_length")
    if _flag(path, values, "do_lower_case", False):
        limits["lower_case"] = True
    return limits


def _prompts(path: Path, settings: Mapping[str, Any]) -> tuple[dict[str, str], str | None]:
    """What is put before a text, by name, and the name that holds where none is given. Empty ones say nothing."""
    kind = settings.get("model_type")
    if kind not in (None, "SentenceTransformer"):
        raise UserError(f"{path}: model_type is {shown(kind, 60)}; a SentenceTransformer makes one vector of a text")
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict) or len(prompts) > MOST_PROMPTS:
        raise UserError(f"{path}: prompts is {shown(prompts, 60)}, expected at most {MOST_PROMPTS} texts by name")
    bad = next((name for name, text in prompts.items() if not prompts_fit({name: text})), None)
    if bad is not None:
        raise UserError(f"{path}: the prompt {shown(bad, 60)} is no text of at most {_LONGEST_PROMPT} characters")
    default = settings.get("default_prompt_name")
    if default is not None and (not isinstance(default, str) or default not in prompts):
        raise UserError(f"{path}: default_prompt_name is {shown(default, 60)}, which is none of the prompts")
    return dict(prompts), default


def prompts_fit(prompts: Mapping[str, Any]) -> bool:
    """Whether they are few enough, all texts, and none of them or their names is too long."""
    texts = all(isinstance(text, str) and len(text) <= _LONGEST_PROMPT for text in prompts.values())
    return texts and len(prompts) <= MOST_PROMPTS and all(0 < len(n) <= 80 and n.isprintable() for n in prompts)


def _similarity(directory: Path, settings: Mapping[str, Any]) -> str:
    name = settings.get("similarity_fn_name")
    if name is None:
        return "cosine"
    if not isinstance(name, str) or name not in SIMILARITIES:
        known = ", ".join(SIMILARITIES)
        raise UserError(f"{directory / _SETTINGS}: similarity_fn_name is {shown(name, 60)}; known: {known}")
    return name
