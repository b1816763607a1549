"""The table of per-layer inputs (Gemma 3n, Gemma 4): quantized by rows, and gathered from the mapped file, which is not loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from helpers import tiny
from helpers.requests import asking
from helpers.tiny_families import FAMILIES

from edgewright import compiler

pytestmark = pytest.mark.exports

ROWS = 1 << 17
EXTRA = 64

SCRIPT = """
import json, re, sys
from pathlib import Path
import numpy as np
from edgewright.bundle import Bundle
from edgewright.runtimes.registry import open_session

def anonymous():
    return int(re.search(r"RssAnon:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

def mapped():
    sizes, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith("weights.bin")
        elif inside and line.startswith("Rss:"):
            sizes += int(line.split()[1]) << 10
    return sizes

bundle = Bundle.open(Path(sys.argv[1]))
import onnxruntime
before = anonymous()
session = open_session(bundle, "onnx")
state = session.new_state(1, 32)
inputs = {"input_ids": np.array([[3, 5, 7]]), "past_length": np.zeros(1, np.int64), "logit_positions": np.zeros(1, np.int64)}
logits = session.run("decoder", inputs, state)["logits"]
assert np.isfinite(logits).all()
print(json.dumps({"anonymous": anonymous() - before, "mapped": mapped()}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts pages in /proc")
@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_a_table_is_not_loaded(family: str, tmp_path: Path) -> None:
    config = FAMILIES[family] | {"vocab_size_per_layer_input": ROWS, "hidden_size_per_layer_input": EXTRA}
    model = tiny.write(tmp_path / "model", config)
    request = asking(str(model), bits=4.5, widths=(4,), max_context=32, importance="uniform", verify=False)
    bundle = tmp_path / "bundle"
    planned = compiler.export(request, bundle).planned
    name = "model.embed_tokens_per_layer.weight"
    entry = planned.plan.entries[name]
    assert entry.bits == 4
    width = config["num_hidden_layers"] * EXTRA
    table = ROWS * width // 2 + ROWS * width // entry.group_size * 4
    graph = onnx.load(bundle / "onnx" / "decoder.onnx", load_external_data=False).graph
    gathers = [node for node in graph.node if node.op_type == "GatherBlockQuantized"]
    shapes = {t.name: list(t.dims) for t in graph.initializer}
    assert [ROWS, width // entry.group_size] in [
        shapes[node.input[2]] for node in gathers
    ]  # a scale for a row's every group
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(bundle)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    taken = json.loads(done.stdout)
    assert (bundle / "onnx" / "weights.bin").stat().st_size > table
    assert taken["anonymous"] < table / 2, (taken, table)
    assert taken["mapped"] < table / 2, (taken, table)
