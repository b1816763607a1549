"""Split GGUF files, and folders with GGUF files in them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from helpers.gguf_files import write_gguf

from edgewright.checkpoints.gguf_file import read_gguf
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.errors import UserError

COUNT = 3


def split(directory: Path, stem: str = "m", count: int = COUNT, **changes: Any) -> list[Path]:
    """A tiny model in `count` parts as llama-gguf-split makes them. changes: metadata of all parts."""
    whole = directory / "whole.bin"
    write_gguf(whole)
    file = read_gguf(whole)
    names, paths = list(file.tensors), []
    for i in range(count):
        paths.append(directory / f"{stem}-{i + 1:05}-of-{count:05}.gguf")
        writer = GGUFWriter(paths[-1], "llama")
        if i == 0:
            for key, value in file.metadata.items():
                if key.startswith("llama."):
                    (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
        metadata = {"split.no": i, "split.count": count, "split.tensors.count": len(names)} | changes
        for key, value in metadata.items():
            writer.add_uint16(key, value)
        for name in names[i::count]:
            tensor = file.tensors[name]
            if len(tensor.shape) == 1:
                writer.add_tensor(name, np.asarray(tensor.data).view(np.float32).reshape(-1))
            else:
                writer.add_tensor(name, np.asarray(tensor.data), raw_dtype=tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_checkpoint(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_any_part_opens_all(tmp_path: Path) -> None:
    paths = split(tmp_path)
    shutil.copy(tmp_path / "whole.bin", tmp_path / "whole.gguf")
    whole = open_checkpoint(str(tmp_path / "whole.gguf"))
    for path in paths:
        opened = open_checkpoint(str(path))
        assert opened.config == whole.config
        assert set(opened.files) == set(paths)
        assert set(opened.names()) == set(whole.names())
        assert all(torch.equal(opened.tensor(name), whole.tensor(name)) for name in whole.names())


def test_parts_that_are_missing_or_of_another_model(tmp_path: Path) -> None:
    first, second, third = split(tmp_path)
    second.rename(tmp_path / "aside")
    assert f"part {second.name} of the model is not beside it" in refused(first)
    assert second.name in refused(third)
    shutil.copy(third, second)
    assert "not part 2 of 3" in refused(first)
    (tmp_path / "aside").rename(second)
    renamed = first.rename(tmp_path / "model.gguf")
    assert "name them NAME-00001-of-00003.gguf" in refused(renamed)
    assert first.name in refused(second)
    renamed.rename(first)
    second.write_bytes(second.read_bytes()[:5000])
    assert second.name in refused(first)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"split.tensors.count": 7}, "tensors in 3 parts, not 7"), ({"split.no": 0}, "not part 2 of 3")],
)
def test_parts_that_contradict_themselves(tmp_path: Path, changes: dict[str, int], reason: str) -> None:
    assert reason in refused(split(tmp_path, **changes)[0])


def test_one_tensor_in_two_parts(tmp_path: Path) -> None:
    first, second = split(tmp_path, count=2)
    data = first.read_bytes()
    assert b"output_norm.weight" in data + second.read_bytes()
    other = split(tmp_path / "other" if (tmp_path / "other").mkdir() is None else tmp_path, count=2)
    # The second part of a model whose tensors come in another order.
    swapped = other[0].read_bytes().replace(b"split.no\x02\x00\x00\x00\x00\x00", b"split.no\x02\x00\x00\x00\x01\x00")
    second.write_bytes(swapped)
    assert "is in two parts" in refused(first)


def test_a_folder_with_one_model(tmp_path: Path) -> None:
    path = tmp_path / "model-Q8_0.gguf"
    write_gguf(path)
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "config.json").write_text("{}")
    shutil.copy(path, tmp_path / "mmproj-F16.gguf")  # an encoder of images lies beside it
    opened = open_checkpoint(str(tmp_path))
    assert opened.files == (path,)
    assert opened.config["model_type"] == "llama"


def test_a_folder_with_one_split_model(tmp_path: Path) -> None:
    paths = split(tmp_path)
    (tmp_path / "whole.bin").unlink()
    assert open_checkpoint(str(tmp_path)).files == tuple(paths)


def test_a_folder_with_several_models(tmp_path: Path) -> None:
    split(tmp_path, "a")
    for name in ("b.gguf", "c.gguf"):
        write_gguf(tmp_path / name)
    message = refused(tmp_path)
    assert "several GGUF models: a-00001-of-00003.gguf, b.gguf, c.gguf; give the path of one" in message
    assert len([name for name in message.split() if name.startswith("a-")]) == 1


def test_safetensors_come_first(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert "config.json" in refused(tmp_path)
