"""GGUF files from a hub id, by huggingface_hub from a hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind
from helpers.gguf_files import write_gguf
from helpers.hub import hub

from edgewright.checkpoints.gguf_names import models_of
from edgewright.checkpoints.hub import is_hub_id

REPOSITORY = "owner/tiny-GGUF"
SCRIPT = """
import json, sys
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.errors import UserError
for model in sys.argv[1:]:
    try:
        opened = open_checkpoint(model)
        print(json.dumps([opened.source, opened.config["model_type"], [p.name for p in opened.files]]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("gguf")
    for name, kind in (("tiny-Q8_0.gguf", Kind.Q8_0), ("tiny-F16.gguf", Kind.F16), ("sub/tiny.Q4_0.gguf", Kind.Q4_0)):
        (folder / name).parent.mkdir(exist_ok=True)
        write_gguf(folder / name, kind=kind)
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.gguf"))}
    return found | {"README.md": b"-", "config.json": b"{}", "mmproj-F16.gguf": b"-", "tiny.imatrix": b"-"}


def opened(endpoint: str, home: Path, *models: str) -> list[object]:
    """What `open_checkpoint` gives for each, in a process whose hub is `endpoint`: [source, model type, files] or an error."""
    own = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    own |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *models],
        capture_output=True,
        text=True,
        env=os.environ | own,
        cwd=home,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_file_that_is_meant_is_fetched_and_no_other(files: dict[str, bytes], tmp_path: Path) -> None:
    one = {"tiny-F16.gguf": files["tiny-F16.gguf"], "mmproj-F16.gguf": b"-"}
    with hub({REPOSITORY: files, "owner/one": one, "owner/empty": {"README.md": b"-"}}) as held:
        names = ("Q8_0", "q4_0", "tiny-F16.gguf", "Q6_K", "tiny")
        models = [*(f"{REPOSITORY}:{name}" for name in names), REPOSITORY]
        models += ["owner/one", "owner/one:mmproj", "owner/empty:Q8_0"]
        by_type, by_case, by_name, missing, unclear, unnamed, *others = opened(held.endpoint, tmp_path, *models)
        alone, companion, nothing = others
    assert by_type == [f"{REPOSITORY}:Q8_0", "llama", ["tiny-Q8_0.gguf"]]
    assert by_case == [f"{REPOSITORY}:q4_0", "llama", ["tiny.Q4_0.gguf"]]
    assert by_name == [f"{REPOSITORY}:tiny-F16.gguf", "llama", ["tiny-F16.gguf"]]
    assert "no GGUF file there is called so; there are sub/tiny.Q4_0.gguf, tiny-F16.gguf, tiny-Q8_0" in str(missing)
    for said in (unclear, unnamed):
        assert "several GGUF models" in str(said)
        assert f"name one, as {REPOSITORY}:Q4_K_M does" in str(said)
    assert alone == ["owner/one", "llama", ["tiny-F16.gguf"]]  # a repository of one model needs no name
    assert "no GGUF file there is called so" in str(companion)
    assert "has no GGUF file; leave :Q8_0 out" in str(nothing)
    assert {n for n in held.sent if n.endswith("gguf")} == {"tiny-Q8_0.gguf", "tiny-F16.gguf", "sub/tiny.Q4_0.gguf"}
    assert "README.md" not in held.sent
    # The hub is gone: the cache has what was fetched.
    again, unknown = opened(held.endpoint, tmp_path, f"{REPOSITORY}:Q8_0", "owner/other:Q8_0")
    assert again == by_type
    assert "the hub gave nothing for that id" in str(unknown)


def test_parts_are_one_model() -> None:
    parts = [f"a/big-Q4_K_M-0000{i}-of-00002.gguf" for i in (2, 1)]
    assert models_of([*parts, "small-Q8_0.gguf", "a/mmproj-big.gguf"]) == [parts[::-1], ["small-Q8_0.gguf"]]


@pytest.mark.parametrize(
    ("model", "is_one"),
    [
        ("owner/name:Q4_K_M", True),
        ("owner/name:file.gguf", True),
        ("name:Q4_K_M", False),
        ("owner/name:", False),
        ("owner/name:a/b", False),
        ("owner/name.gguf:Q4_K_M", False),
        ("owner/name:..", False),
    ],
)
def test_names_with_a_file(model: str, is_one: bool) -> None:
    assert is_hub_id(model) is is_one
