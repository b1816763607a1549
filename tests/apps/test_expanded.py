"""The web's form of the graphs: float32 matrices made of the very codes and scales, in Python and by the client's JavaScript."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgewright.apps.contract import Expanded
from edgewright.apps.expanded import write_expanded
from edgewright.bundle import Bundle
from edgewright.errors import UserError
from edgewright.ops.packing import unpack
from edgewright.runtimes.generate import Stream
from edgewright.runtimes.onnx.session import OnnxSession
from edgewright.runtimes.registry import open_exact

RUNTIME = Path(__file__).resolve().parents[2] / "apps" / "web" / "runtime.js"


@pytest.fixture(scope="module")
def bundle(app_bundles: Callable[[str], Path]) -> Path:
    """A tiny T5Gemma with a tokenizer."""
    return app_bundles("t5gemma")


def expanded_bytes(form: Expanded, weights: bytes) -> bytes:
    """The file that a client makes, by numpy."""
    import torch

    out = np.zeros(form.bytes // 4, np.float32)
    for m in form.matrices:
        packed = np.frombuffer(weights, np.uint8, m.codes[1], m.codes[0]).reshape(m.rows, -1)
        codes = unpack(torch.from_numpy(packed.copy()), m.bits, m.columns).numpy().astype(np.int64)
        scales = np.frombuffer(weights, np.float32, m.scales[1] // 4, m.scales[0]).reshape(m.rows, -1)
        matrix = (codes - (1 << (m.bits - 1))).astype(np.float32) * np.repeat(scales, m.block, 1)
        out[m.offset // 4 : m.offset // 4 + matrix.size] = matrix.T.ravel()
    return out.tobytes()


def write(bundle: Path, folder: Path) -> Expanded:
    names = [g.name for g in Bundle.open(bundle).manifest.graphs]
    return write_expanded(bundle / "onnx", names, "weights.bin", folder)


def test_the_expanded_graphs_compute_the_same(bundle: Path, tmp_path: Path) -> None:
    """Prefill and steps, against the session with float32 activations."""
    form = write(bundle, tmp_path)
    shutil.copyfile(bundle / "onnx" / "weights.bin", tmp_path / "weights.bin")
    (tmp_path / form.file).write_bytes(expanded_bytes(form, (tmp_path / "weights.bin").read_bytes()))
    opened = Bundle.open(bundle)
    spec, exact = opened.manifest.generation, open_exact(opened, "onnx", 1)
    assert exact is not None
    ours = OnnxSession(tmp_path, opened.manifest.graphs, threads=1)
    streams = [Stream(session, spec, [[14, 17, 12, 10, 11, 23, 1]], 8) for session in (exact, ours)]
    want, got = (stream.prefill() for stream in streams)
    for _ in range(6):
        assert np.abs(want - got).max() <= 1e-4
        token = np.array([[int(want[0, -1].argmax())]], np.int64)
        want, got = (stream.feed(token) for stream in streams)


def test_no_quantized_product_is_left_and_nothing_is_stored_twice(bundle: Path, tmp_path: Path) -> None:
    form = write(bundle, tmp_path)
    codes = [m.codes for m in form.matrices]
    assert len(codes) == len(set(codes))
    ends = [(m.offset, m.offset + 4 * m.rows * m.columns) for m in form.matrices]
    assert all(end <= after for (_, end), (after, _) in pairwise(ends))
    assert ends[-1][1] == form.bytes
    for path in sorted(tmp_path.glob("*.onnx")):
        before, after = (onnx.load(p, load_external_data=False).graph for p in (bundle / "onnx" / path.name, path))
        ops = [[n.op_type for n in graph.node] for graph in (before, after)]
        assert "MatMulNBits" not in ops[1]
        assert ops[1].count("MatMul") == ops[0].count("MatMulNBits") + ops[0].count("MatMul")
        read = {name for node in after.node for name in node.input}
        assert {t.name for t in after.initializer} <= read


def test_the_same_graphs_give_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    forms = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        forms.append(write(bundle, tmp_path / name))
    assert forms[0] == forms[1]
    for path in (tmp_path / "a").glob("*.onnx"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize("change", ["bits", "zero points", "elsewhere"])
def test_a_product_that_no_export_has_is_refused(change: str, bundle: Path, tmp_path: Path) -> None:
    model = onnx.load(bundle / "onnx" / "decoder.onnx", load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "MatMulNBits")
    if change == "bits":
        next(a for a in node.attribute if a.name == "bits").i = 3
    elif change == "zero points":
        del node.input[3:]
        node.input.append(node.input[1])
    else:
        codes = next(t for t in model.graph.initializer if t.name == node.input[1])
        next(e for e in codes.external_data if e.key == "location").value = "other.bin"
    (tmp_path / "decoder.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="export the bundle again"):
        write_expanded(tmp_path, ["decoder"], "weights.bin", tmp_path)


SCRIPT = """
import { readFile, writeFile } from "node:fs/promises";
const [runtime, folder] = process.argv.slice(2);
const { expand } = await import(runtime);
const form = JSON.parse(await readFile(`${folder}/form.json`, "utf8"));
await writeFile(`${folder}/made.bin`, expand(form, new Uint8Array(await readFile(`${folder}/weights.bin`))));
"""


def test_the_client_expands_bit_for_bit(bundle: Path, tmp_path: Path) -> None:
    """Of the bundle, and of matrices of every width, odd numbers of rows, and offsets that are no multiple of 4."""
    if shutil.which("node") is None:
        pytest.skip("no node here")
    (tmp_path / "script.mjs").write_text(SCRIPT)
    form = write(bundle, tmp_path)
    rng, weights, matrices, offset = np.random.default_rng(0), bytearray(b"odd"), [], 0
    for bits, rows, columns, block in ((2, 19, 64, 32), (4, 33, 96, 32), (8, 1, 128, 128), (4, 16, 32, 32)):
        codes = rng.integers(0, 256, rows * columns * bits // 8, np.uint8).tobytes()
        scales = rng.standard_normal(rows * columns // block).astype(np.float32).tobytes()
        places = (len(weights), len(codes)), (len(weights) + len(codes), len(scales))
        weights += codes + scales + b"x"
        shape = {"offset": offset, "rows": rows, "columns": columns, "bits": bits, "block": block}
        matrices.append(shape | {"codes": places[0], "scales": places[1]})
        offset += 4 * rows * columns
    odd = Expanded.model_validate({"file": "e", "of": "weights.bin", "bytes": offset, "matrices": matrices})
    for which, data in ((form, (bundle / "onnx" / "weights.bin").read_bytes()), (odd, bytes(weights))):
        (tmp_path / "form.json").write_text(json.dumps(which.model_dump()))
        (tmp_path / "weights.bin").write_bytes(data)
        done = subprocess.run(
            ["node", str(tmp_path / "script.mjs"), str(RUNTIME), str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "made.bin").read_bytes() == expanded_bytes(which, data)
