"""Opening safetensors checkpoints: views of the mapped file, and one line for everything hostile."""

from __future__ import annotations

import fnmatch
import json
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from edgewright.checkpoints.checkpoint import Checkpoint, check_finite
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.errors import UserError

CONFIG = {"model_type": "llama", "hidden_size": 4}


def write_model(directory: Path, tensors: dict[str, torch.Tensor] | None = None, **config: object) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(tensors or {"a.weight": torch.arange(12.0).reshape(3, 4)}, directory / "model.safetensors")
    return directory


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def refused(model: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        open_checkpoint(str(model))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


def test_reads_names_dtypes_values_and_configs(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.randn(3, 4, dtype=torch.bfloat16),
        "b.codes": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
        "scalar": torch.tensor(2.5),
    }
    write_model(tmp_path, tensors)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    opened = open_checkpoint(str(tmp_path))
    assert sorted(opened.names()) == sorted(tensors)
    assert opened.config == CONFIG
    assert opened.generation == {"eos_token_id": [1, 2]}
    assert opened.tokenizer is None
    for name, tensor in tensors.items():
        assert opened.info(name).dtype == tensor.dtype
        assert opened.info(name).shape == tuple(tensor.shape)
        assert torch.equal(opened.tensor(name), tensor)
    part = opened.rows("a.weight", 1, 3)
    assert part.dtype == torch.float32
    assert torch.equal(part, tensors["a.weight"][1:3].float())
    assert opened.rows("a.weight", 2, 2).shape == (0, 4)
    for start, stop in ((0, 4), (-1, 2), (2, 1)):
        with pytest.raises(IndexError):
            opened.rows("a.weight", start, stop)
    with pytest.raises(IndexError):
        opened.rows("scalar", 0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_tensors_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    def anonymous_kib() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))

    size = 64 << 20
    write_model(tmp_path, {"big": torch.ones(size // 4096, 1024), "half": torch.ones(size // 4096, 1024).half()})
    opened = open_checkpoint(str(tmp_path))
    opened.tensor("half")[:1].sum()  # whatever torch allocates once
    before = anonymous_kib()
    big = opened.tensor("big")
    assert float(big.sum()) == size // 4
    check_finite("big", big)
    check_finite("half", opened.tensor("half"))
    opened.fingerprint()
    assert anonymous_kib() - before < 8 << 10
    assert float(opened.rows("half", 0, 8).sum()) == 8 * 1024
    assert opened.rows("big", 5, 9).data_ptr() == big[5:9].data_ptr()


def test_expect_names_what_is_wrong(tmp_path: Path) -> None:
    tensors = {
        "w": torch.zeros(2, 3),
        "i": torch.zeros(2, dtype=torch.int8),
        "f8": torch.zeros(2).to(torch.float8_e4m3fn),
    }
    opened = open_checkpoint(str(write_model(tmp_path, tensors)))
    assert opened.expect("w", (2, 3)).shape == (2, 3)
    for name, shape, word in (("w", (3, 2), "[2, 3]"), ("x", (1,), "x"), ("i", (2,), "int8"), ("f8", (2,), "float8")):
        with pytest.raises(UserError, match=word.replace("[", r"\[").replace("]", r"\]")):
            opened.expect(name, shape)
    with pytest.raises(UserError):
        opened.tensor("x")
    with pytest.raises(UserError):
        opened.rows("x", 0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_check_finite(dtype: torch.dtype, bad: float) -> None:
    tensor = torch.zeros(3, 5, dtype=dtype)
    check_finite("t", tensor)
    check_finite("empty", tensor[:0])
    tensor[1, 4] = bad
    with pytest.raises(UserError, match=r"layer\.weight"):
        check_finite("layer.weight", tensor)


def shards(directory: Path, first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> Path:
    write_model(directory)
    (directory / "model.safetensors").unlink()
    save_file(first, directory / "model-00001-of-00002.safetensors")
    save_file(second, directory / "model-00002-of-00002.safetensors")
    return directory


def write_index(directory: Path, weight_map: object) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_shards_with_and_without_an_index(tmp_path: Path) -> None:
    shards(tmp_path, {"a": torch.ones(2)}, {"b": torch.zeros(3)})
    assert sorted(open_checkpoint(str(tmp_path)).names()) == ["a", "b"]
    write_index(tmp_path, {"a": ONE, "b": TWO})
    opened = open_checkpoint(str(tmp_path))
    assert torch.equal(opened.tensor("b"), torch.zeros(3))
    save_file({"a": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    assert len(open_checkpoint(str(tmp_path)).files) == 2  # the index says which files count


def test_bad_shards(tmp_path: Path) -> None:
    twice = shards(tmp_path / "twice", {"a": torch.ones(2)}, {"a": torch.ones(2)})
    assert "both" in refused(twice)
    whole = shards(tmp_path / "whole", {"a": torch.ones(2)}, {"b": torch.ones(2)})
    for file in (
        "../whole/" + ONE,
        str(whole / ONE),
        "x.bin",
        "a\\..\\b.safetensors",
        "sub/../" + ONE,
        7,
        "c:x.safetensors",
    ):
        write_index(whole, {"a": ONE, "b": file})
        assert "index" in refused(whole)
    write_index(whole, {"a": ONE, "c": TWO})
    assert "lacks c" in refused(whole)
    write_index(whole, {"a": ONE, "b": "model-00003-of-00003.safetensors"})
    assert "missing" in refused(whole)
    for weight_map in ({}, [], None, "x"):
        write_index(whole, weight_map)
        assert "weight_map" in refused(whole)
    write_index(whole, {"a": ONE, "b": TWO})
    save_file({"z": torch.ones(1)}, whole / "model.safetensors")
    assert "stale" in refused(whole)


F32_4 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": F32_4}, b"\0" * 8),  # truncated
        ({"a": F32_4}, b"\0" * 24),  # more than the header accounts for
        ({"a": F32_4, "b": {**F32_4, "data_offsets": [8, 24]}}, b"\0" * 24),  # overlap
        ({"a": F32_4, "b": {**F32_4, "data_offsets": [20, 36]}}, b"\0" * 36),  # hole
        ({"a": {**F32_4, "shape": [5]}}, b"\0" * 16),
        ({"a": {**F32_4, "shape": [-4]}}, b"\0" * 16),
        ({"a": {**F32_4, "shape": [1 << 62, 1 << 62]}}, b"\0" * 16),
        ({"a": {**F32_4, "dtype": "Q4_0"}}, b"\0" * 16),  # unknown dtype
        ({"a": {"dtype": "C64", "shape": [2], "data_offsets": [0, 16]}}, b"\0" * 16),  # known, of no use
        ({"a": {**F32_4, "data_offsets": [16, 0]}}, b"\0" * 16),
        ({}, b""),
        ([], b""),
        (b"{", b""),
        (b"\xff\xfe", b""),
        (b"[" * 5000, b""),
    ],
)
def test_bad_headers(tmp_path: Path, header: object, data: bytes) -> None:
    write_model(tmp_path)
    write_raw(tmp_path / "model.safetensors", header, data)
    assert str(tmp_path) in refused(tmp_path)


def test_header_lengths_that_lie(tmp_path: Path) -> None:
    write_model(tmp_path)
    file = tmp_path / "model.safetensors"
    for length in (10**6, (1 << 63) - 1, (1 << 64) - 1, 0, 3):
        write_raw(file, {"a": F32_4}, b"\0" * 16, length)
        refused(tmp_path)
    for content in (b"", b"\0\0\0", b"\0" * 8, b"not a model at all, not even close"):
        file.write_bytes(content)
        refused(tmp_path)
    file.unlink()
    file.mkdir()
    refused(tmp_path)


def test_truncating_a_whole_file_anywhere_is_seen(tmp_path: Path) -> None:
    write_model(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for size in range(0, len(whole), 7):
        file.write_bytes(whole[:size])
        refused(tmp_path)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[1]", "object"),
        (b"null", "object"),
        (b"{}", "model_type"),
        (b'{"model_type": 3}', "model_type"),
        (b"\xff\xfe{}", "UTF-8"),
        (b"[" * 100_000, "JSON"),
        (b" " * (17 << 20), "bytes"),
        (b'{"model_type": "llama", "n": ' + b"9" * 5000 + b"}", "JSON"),
    ],
)
def test_bad_config(tmp_path: Path, text: bytes, word: str) -> None:
    write_model(tmp_path)
    (tmp_path / "config.json").write_bytes(text)
    assert word in refused(tmp_path)


def test_bad_generation_config(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "generation_config.json").write_text("[]")
    assert "generation_config.json" in refused(tmp_path)


def test_directories_that_hold_no_model(tmp_path: Path) -> None:
    assert "empty" in refused(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "save_pretrained" in refused(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert "pickle" in refused(tmp_path)
    assert "pickle" in refused(tmp_path / "pytorch_model.bin")
    (tmp_path / "pytorch_model.bin").unlink()
    assert "no *.safetensors" in refused(tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "m.gguf")
    assert "m.gguf" in refused(tmp_path)
    (tmp_path / "m.gguf").rename(tmp_path / "notes.txt")
    assert "config.json" in refused(tmp_path)
    assert "directory" in refused(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    "name",
    ["", "./nowhere", "no/such/dir/here", "/nowhere", "a\0b", "a\nb", "x.gguf", "../x", "a--b", "é/x", "n" * 5000],
)
def test_names_that_are_neither_path_nor_hub_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    refused(name)


TOKENIZER_FILES = [
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tekken.json"),
    *("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "tokenizer.model", "tokenizer.model.v3"),
    *("spiece.model", "sentencepiece.bpe.model", "qwen.tiktoken", "vocab.json", "vocab.txt", "merges.txt"),
]


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked: dict[str, list[str]] = {}

    def snapshot(model: str, allow_patterns: list[str]) -> str:
        asked[model] = allow_patterns
        return str(write_model(tmp_path / "cache"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    opened = open_checkpoint("owner/some-model_1.5")
    assert opened.source == "owner/some-model_1.5"
    assert opened.names() == ["a.weight"]
    patterns = asked["owner/some-model_1.5"]
    assert "*.safetensors" in patterns
    assert not any(p.endswith((".bin", ".pt", ".pth", ".py", "*")) for p in patterns if p != "chat_template*")
    for file in TOKENIZER_FILES:
        assert any(fnmatch.fnmatch(file, pattern) for pattern in patterns), file

    def unreachable(*_: object, **__: object) -> str:
        raise OSError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    assert "network" in refused("owner/some-model_1.5")


def test_fingerprint_tells_models_apart_and_does_not_move(tmp_path: Path) -> None:
    def print_of(directory: Path) -> str:
        return open_checkpoint(str(directory)).fingerprint()

    values = {"a": torch.arange(5000.0), "b": torch.tensor(1.0)}
    first = print_of(write_model(tmp_path / "one", values))
    assert len(first) == 64
    assert first == print_of(write_model(tmp_path / "two", values))
    assert first != print_of(write_model(tmp_path / "three", {**values, "b": torch.tensor(2.0)}))
    assert first != print_of(write_model(tmp_path / "four", {**values, "a": values["a"] + 1}))
    assert first != print_of(write_model(tmp_path / "five", values, hidden_size=5))


def test_tokenizer_is_read_lazily_and_says_what_is_wrong(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    opened: Checkpoint = open_checkpoint(str(tmp_path))
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        _ = opened.tokenizer
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UserError, match=r"tokenizer\.model: .*download it again"):
        _ = opened.tokenizer
