"""The streaming quantizer and its writer: the documented directory, byte for byte the same, in bounded memory."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from edgewright.checkpoints.opening import open_checkpoint
from edgewright.checkpoints.safetensors_writer import StreamingWriter
from edgewright.errors import UserError
from edgewright.quant import quantize_checkpoint as stream
from edgewright.quant.plan import BitPlan, Budget, Entry
from edgewright.quant.quantize_checkpoint import METADATA, QuantizedStats, quantize_checkpoint
from edgewright.quant.rtn import quantize_rtn
from edgewright.quant.tensor import QuantizedTensor

CONFIG = {"model_type": "tiny", "hidden_size": 64}


def make_checkpoint(directory: Path, **changes: torch.Tensor) -> Path:
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "embed.weight": torch.randn(50, 64, generator=generator).to(torch.bfloat16),
        "a.weight": torch.randn(33, 64, generator=generator) * 0.1,
        "b.weight": torch.randn(7, 96, generator=generator).to(torch.float16),
        "c.weight": torch.randn(9, 64, generator=generator),
        "norm.weight": torch.randn(65, generator=generator).to(torch.bfloat16),
        "half.bias": torch.tensor([1.0, 6e-8, -65504.0]).to(torch.float16),
        "conv.weight": torch.randn(5, 1, 3, generator=generator),
        "wide": torch.randn(4, 3, generator=generator, dtype=torch.float64),
        "scalar": torch.tensor(2.5),
        "steps": torch.tensor([1, 2, 3]),
        "unused": torch.zeros(3),
    } | changes
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "generation_config.json").write_text('{"eos_token_id": 1}')
    return directory


def make_plan(**changes: Entry) -> BitPlan:
    entries = {
        "embed.weight": Entry(8, 64, 1.0, ""),
        "a.weight": Entry(3, 32, 1.0, ""),
        "b.weight": Entry(4, 32, 1.0, ""),
        "c.weight": Entry(16, 64, 1.0, ""),
    } | changes
    return BitPlan(1, "zd", Budget("bits", 4.0), entries, 0.0, 0)


COPY = ("norm.weight", "half.bias", "conv.weight", "wide", "scalar", "steps")


def quantize(source: Path, target: Path, plan: BitPlan | None = None) -> QuantizedStats:
    return quantize_checkpoint(
        open_checkpoint(str(source)), plan or make_plan(), {"head.weight": "embed.weight"}, target, COPY
    )


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CHUNK_WEIGHTS", 300)


@pytest.mark.usefixtures("small_chunks")
def test_the_directory_holds_what_the_design_says(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "in")
    stats = quantize(source, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "plan.json",
    ]
    assert json.loads((tmp_path / "out/config.json").read_text()) == CONFIG
    assert BitPlan.read(tmp_path / "out/plan.json") == make_plan()
    original = {}
    with safe_open(source / "model.safetensors", "pt") as file:
        original = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata() == METADATA
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    quantized = ("embed.weight", "a.weight", "b.weight")
    assert set(found) == {f"{n}.{part}" for n in quantized for part in ("codes", "scales")} | {"c.weight", *COPY}
    for name in quantized:
        entry, weight = make_plan().entries[name], original[name]
        expected = quantize_rtn(weight.float(), entry.bits, entry.group_size)
        assert torch.equal(found[f"{name}.codes"], expected.codes)
        assert torch.equal(found[f"{name}.scales"], expected.scales)
        QuantizedTensor(
            found[f"{name}.codes"], found[f"{name}.scales"], entry.bits, entry.group_size, tuple(weight.shape)
        )
    assert torch.equal(found["c.weight"], original["c.weight"].to(torch.bfloat16))
    for name in COPY:
        wanted = original[name].float() if name == "wide" else original[name]
        assert found[name].dtype == wanted.dtype
        assert torch.equal(found[name], wanted)
    planned = 50 * (64 + 2) + 33 * (24 + 4) + 7 * (48 + 6) + 9 * 64 * 2
    weights = 50 * 64 + 33 * 64 + 7 * 96 + 9 * 64
    size = (tmp_path / "out/model.safetensors").stat().st_size
    assert stats == QuantizedStats(planned, weights, planned * 8 / weights, size)


def test_bytes_do_not_depend_on_chunks_threads_or_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_checkpoint(tmp_path / "in")
    digests = set()
    threads = torch.get_num_threads()
    try:
        for i, (count, chunk) in enumerate([(1, 200), (3, 200), (2, 1 << 20)]):
            torch.set_num_threads(count)
            monkeypatch.setattr(stream, "CHUNK_WEIGHTS", chunk)
            quantize(source, tmp_path / f"out{i}")
            digests.add(sha256(tmp_path / f"out{i}/model.safetensors"))
    finally:
        torch.set_num_threads(threads)
    quantize(source, tmp_path / "out0")  # over an older one
    assert digests == {sha256(tmp_path / "out0/model.safetensors")}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["a.weight", "c.weight", "conv.weight", "scalar"])
@pytest.mark.usefixtures("small_chunks")
def test_not_finite_is_refused_and_nothing_is_left(tmp_path: Path, name: str, bad: float) -> None:
    shape = {"a.weight": (33, 64), "c.weight": (9, 64), "conv.weight": (5, 1, 3), "scalar": ()}[name]
    broken = torch.ones(shape)
    broken.view(-1)[-1] = bad
    source = make_checkpoint(tmp_path / "in", **{name: broken})
    with pytest.raises(UserError, match=f"{name} holds NaN or infinite"):
        quantize(source, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_plans_that_do_not_fit(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "in")
    for changes, message in (
        ({"nowhere": Entry(4, 32, 1.0, "")}, "no tensor nowhere"),
        ({"unused": Entry(4, 32, 1.0, "")}, "only floating matrices"),
        ({"a.weight": Entry(4, 48, 1.0, "")}, "a.weight has group size 48"),
        ({"head.weight": Entry(4, 32, 1.0, "")}, "no tensor head.weight|stored as embed.weight"),
        ({"wide": Entry(16, 3, 1.0, "")}, "wide is to be kept unquantized"),
    ):
        with pytest.raises(UserError, match=message):
            quantize(source, tmp_path / "out", make_plan(**changes))
    assert not (tmp_path / "out").exists()


def test_weights_below_every_scale_are_refused(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "in", **{"a.weight": torch.full((33, 64), 1e-5)})
    with pytest.raises(UserError, match=r"a\.weight: its largest weight, 1e-05.*--override 'a\.weight=16'"):
        quantize(source, tmp_path / "out")
    source = make_checkpoint(tmp_path / "zero", **{"a.weight": torch.zeros(33, 64)})
    assert quantize(source, tmp_path / "out").weights > 0


def test_progress_is_told(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "in")))
    told: list[tuple[str, int, int]] = []
    quantize_checkpoint(checkpoint, make_plan(), {}, tmp_path / "out", COPY, lambda *args: told.append(args))
    assert {name for name, _, _ in told} == {*make_plan().entries, *COPY}
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1][1] == told[-1][2]


def test_writer_interleaves_aligns_and_renames(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    entries = [("odd", "U8", (3,)), ("wide", "F32", (2, 2)), ("empty", "F32", (0, 4)), ("half", "BF16", (1,))]
    with StreamingWriter(path, entries, {"b": "2", "a": "1"}) as writer:
        writer.write("odd", torch.tensor([1], dtype=torch.uint8))
        writer.write("wide", torch.tensor([[1.0, 2.0]]))
        writer.write("half", torch.ones(1, dtype=torch.bfloat16))
        assert not path.exists()
        writer.write("odd", torch.tensor([2, 3], dtype=torch.uint8))
        writer.write("wide", torch.tensor([[3.0, 4.0]]))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert (8 + length) % 64 == 0
    header = json.loads(raw[8 : 8 + length])
    for name, kind, _ in entries:
        assert header[name]["data_offsets"][0] % {"U8": 1, "BF16": 2, "F32": 4}[kind] == 0
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"a": "1", "b": "2"}
        assert file.get_tensor("odd").tolist() == [1, 2, 3]
        assert file.get_tensor("wide").tolist() == [[1.0, 2.0], [3.0, 4.0]]
        assert file.get_tensor("empty").shape == (0, 4)


def test_writer_refusals_leave_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="twice"):
        StreamingWriter(path, [("a", "U8", (1,)), ("a", "U8", (1,))], {})
    with pytest.raises(ValueError, match="'Q4'"):
        StreamingWriter(path, [("a", "Q4", (1,))], {})
    with pytest.raises(ValueError, match="1 of its 2 bytes"), StreamingWriter(path, [("a", "U8", (2,))], {}) as writer:
        writer.write("a", torch.zeros(1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="got more"), StreamingWriter(path, [("a", "U8", (2,))], {}) as writer:
        writer.write("a", torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="has dtype"), StreamingWriter(path, [("a", "U8", (2,))], {}) as writer:
        writer.write("a", torch.zeros(2))
    assert list(tmp_path.iterdir()) == []
    missing = tmp_path / "missing/x.safetensors"
    with pytest.raises(UserError, match="cannot be written"), StreamingWriter(missing, [("a", "U8", (2,))], {}):
        pass


MEMORY = """
import sys, threading, torch
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.quant.plan import BitPlan, Budget, Entry
from edgewright.quant.quantize_checkpoint import quantize_checkpoint
from edgewright.quant.rtn import quantize_rtn
from pathlib import Path
torch.set_num_threads(2)
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
quantize_rtn(torch.randn(64, 1024), 4, 64)
checkpoint = open_checkpoint(sys.argv[1])
plan = BitPlan(1, "zd", Budget("bits", 4.0), {"w": Entry(4, 64, 1.0, "")}, 0.0, 0)
before = peak = anonymous()
stop = threading.Event()
def watch():
    global peak
    while not stop.wait(0.005):
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch)
thread.start()
quantize_checkpoint(checkpoint, plan, {}, Path(sys.argv[2]), ["kept"])
stop.set()
thread.join()
print((peak - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of anonymous memory")
def test_anonymous_memory_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    tensors = {"w": torch.empty(37500, 2048).uniform_(-1, 1), "kept": torch.zeros(37500, 1024, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "in/model.safetensors")
    assert tensors["w"].nbytes > 300_000_000
    (tmp_path / "in/config.json").write_text(json.dumps(CONFIG))
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 150  # MiB; measured about 60 with two threads
