"""Qualcomm NPU: the artefact, where its ops run, the emulated run, hostile files."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers import tiny
from helpers.requests import asking, changed
from safetensors.torch import load_file, save_file

from edgewright.bundle import Bundle, GraphSpec
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.compiler import export
from edgewright.errors import UserError
from edgewright.exporters.artefact import Options
from edgewright.models.loading import CODES, load_dequantized, quantized_parts
from edgewright.models.registry import build
from edgewright.ops.quantized import dequantize
from edgewright.quant.overrides import Override
from edgewright.runtimes.eager import EagerSession
from edgewright.runtimes.qnn.session import QnnSession
from edgewright.targets.qnn.context import NAME, PROGRAMS, Programs

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_qnn") is None, reason="onnxruntime-qnn is not installed"
)
CONTEXT = {"llama": 160, "t5gemma": 64}
VERSIONS = {"llama": (73, 75), "t5gemma": (75,)}
WIDTHS = {
    r"layers\.0\..*[qkv]_proj": 2,
    r"layers\.0\..*o_proj": 5,
    r"layers\.0\..*down_proj": 3,
    r"layers\.1\..*[qkv]_proj": 8,
}


@dataclass
class Made:
    name: str
    bundle: Bundle
    directory: Path
    graphs: tuple[GraphSpec, ...]
    reference: EagerSession
    session: QnnSession

    @property
    def entry(self) -> Any:
        return self.bundle.target("qnn")


@pytest.fixture(scope="module", params=["llama", pytest.param("t5gemma", marks=pytest.mark.slow)])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    changes = {"max_position_embeddings": 160} if name == "llama" else {}
    getattr(tiny, f"write_tiny_{name}")(folder / "model", **changes)
    wanted = asking(
        str(folder / "model"),
        formats=("qnn",),
        bits=5.0,
        groups=(32,),
        widths=(2, 3, 4, 5, 6, 8),
        overrides=tuple(Override(pattern, bits) for pattern, bits in WIDTHS.items()),
        max_context=CONTEXT[name],
        own={"qnn": VERSIONS[name]},
    )
    export(changed(wanted, verify=False), folder / "bundle")
    checkpoint = open_checkpoint(str(folder / "bundle" / "checkpoint"))
    plain = build(checkpoint.config)
    load_dequantized(plain, checkpoint)
    bundle = Bundle.open(folder / "bundle")
    directory, graphs = folder / "bundle" / "qnn", bundle.manifest.graphs
    return Made(name, bundle, directory, graphs, EagerSession(plain.graphs()), QnnSession(directory, graphs, threads=1))


# ---- the artefact ---------------------------------------------------------------------------------------------------


def test_weights_read_back_from_the_files_are_the_checkpoints_to_the_bit(made: Made) -> None:
    from edgewright.exporters.qnn.export import read_weights

    checkpoint = open_checkpoint(str(made.bundle.path / "checkpoint"))
    model = build(checkpoint.config)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
    found, widths = set(), set()
    for held, values in read_weights(made.directory):
        name = model.tied.get(held, held)
        codes, scales, bits, group = quantized_parts(checkpoint, name, shapes[name])
        assert torch.equal(values, dequantize(codes, scales, bits, group)), name
        found.add(name)
        widths.add(bits)
    stored = {n.removesuffix(CODES) for n in checkpoint.names() if n.endswith(CODES)}
    assert found == stored
    assert {2, 3, 5, 8} <= widths


def test_all_but_the_embedding_is_one_context_on_the_npu(made: Made) -> None:
    placed = made.session.placement()
    assert placed.accelerator == NAME
    assert placed.known
    assert placed.fallback == {}
    embeds = {stem for stem, ops in made.entry.ops.items() if "com.microsoft::GatherBlockQuantized" in ops}
    assert placed.host == {stem: {"GatherBlockQuantized": 1} for stem in embeds}
    for stem, ops in made.entry.ops.items():
        assert placed.accelerated[stem]["MatMulNBits"] == ops["com.microsoft::MatMulNBits"]
    for contexts in made.entry.facts["context_nodes_measured_at_build"].values():
        assert contexts == dict.fromkeys(made.entry.ops, 1)


def test_an_op_the_npu_did_not_take_is_reported_as_fallback(made: Made, tmp_path: Path) -> None:
    copy = _copied(made, tmp_path)

    def demote(listed: dict[str, Any]) -> None:
        for programs in listed["placement"].values():
            for providers in programs.values():
                providers.setdefault("CPUExecutionProvider", {})["Softmax"] = 2

    _edit(copy, demote)
    fallback = QnnSession(copy, made.graphs, threads=1).placement().fallback
    assert fallback == {stem: {"Softmax": 2} for stem in made.entry.ops}


def test_programs_are_static_and_an_encoder_has_a_short_one(made: Made) -> None:
    listed = Programs.read(made.directory)
    assert sorted(listed.placement) == sorted(VERSIONS[made.name])
    sizes = {stem: dict(p.sizes) for stem, p in listed.programs.items()}
    if made.name == "llama":
        step = {"batch": 1, "capacity": 160, "sequence": 1, "logits": 1}
        assert sizes == {"decoder_step": step, "decoder_chunk": step | {"sequence": 128, "logits": 32}}
    else:
        assert sizes["encoder_32"] == {"batch": 1, "source": 32}
        assert sizes["encoder_64"] == sizes["cross_kv_64"] == {"batch": 1, "source": 64}
        assert sizes["decoder_step"] == {"batch": 1, "source": 64, "capacity": 64, "sequence": 1, "logits": 1}
    assert {f.removeprefix("qnn/") for f in made.entry.files} == {p.name for p in made.directory.iterdir()}


def test_a_large_vocabulary_asks_for_few_logits_at_a_time() -> None:
    from edgewright.exporters.qnn.programs import programs

    with torch.device("meta"):
        graph = build(tiny.merged(tiny.LLAMA, {"vocab_size": 1 << 18})).graphs()[0]
    assert programs(graph, 64)["decoder_chunk"].sizes["logits"] == 4


def test_the_vendors_simulator_gives_latency_and_traffic_the_same_each_time(made: Made, tmp_path: Path) -> None:
    from edgewright.exporters.qnn.compile import SOC, compile_programs

    fact = made.entry.facts["vendor_simulated"]
    assert fact["soc_model"] == SOC
    assert SOC in fact["simulator"]
    assert "proxy" in fact["note"]
    assert set(fact["programs"]) == set(made.entry.ops)
    for found in fact["programs"].values():
        assert 0 < found["microseconds_lower"] <= found["microseconds"] <= found["microseconds_upper"]
        assert found["ddr_fill_bytes"] > 0
    copy = _copied(made, tmp_path)
    (copy / "decoder_step.v75.onnx").unlink()
    again = compile_programs(copy, ["decoder_step"], (75,), "embedding.bin", lambda _: None)
    assert again["estimates"]["decoder_step"] == fact["programs"]["decoder_step"]


# ---- the emulated run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [10, 40])
def test_the_emulated_run_computes_what_the_reference_does(made: Made, length: int) -> None:
    """A prompt, a step, then several tokens, in a padded batch of 2; float16 differs, a wrong graph would by far more.

    40 tokens take the long encoder, or more logits than one call of the chunk gives.
    """
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(3, 60, (2, length)), np.ones((2, length), bool)
    mask[1, length - 3 :] = False
    logits = []
    for candidate in (made.reference, made.session):
        state = candidate.new_state(2, length + 8)
        prompt, extra = ids, {}
        if made.name == "t5gemma":
            encoded = candidate.run("encoder", {"input_ids": ids, "encoder_mask": mask}, state)
            assert encoded["encoder_hidden"].shape[:2] == (2, length)
            candidate.run("cross_kv", encoded, state)
            prompt, extra = ids[:, :2], {"encoder_mask": mask}
        out, past = [], 0
        for tokens in (prompt, ids[:, :1], ids[:, 2:5]):
            wanted = np.arange(tokens.shape[1])
            feeds = {"input_ids": tokens, "past_length": np.array([past]), "logit_positions": wanted, **extra}
            out.append(candidate.run("decoder", feeds, state)["logits"])
            past += tokens.shape[1]
        logits.append(np.concatenate(out, 1))
    assert logits[1].shape == logits[0].shape
    assert logits[1].dtype == np.float32
    assert np.abs(logits[0] - logits[1]).max() < 2e-2 * np.abs(logits[0]).max()


@pytest.mark.slow
def test_a_residual_beyond_float16_is_computed_right(tmp_path: Path) -> None:
    tiny.write_tiny_llama(tmp_path / "model", num_hidden_layers=2)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    for name, tensor in stored.items():
        if name.endswith("embed_tokens.weight"):
            tensor *= 2e5
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor *= 1e4
    save_file(stored, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    wanted = asking(str(tmp_path / "model"), formats=("qnn",), bits=8.0, widths=(4, 8), max_context=32)
    export(changed(wanted, verify=False), tmp_path / "bundle")
    checkpoint = open_checkpoint(str(tmp_path / "bundle" / "checkpoint"))
    plain = build(checkpoint.config)
    load_dequantized(plain, checkpoint)
    largest: list[float] = []
    plain.get_submodule("model.norm").register_forward_hook(
        lambda _m, given, _o: largest.append(float(given[0].abs().max()))
    )
    specs = Bundle.open(tmp_path / "bundle").manifest.graphs
    ids = np.random.default_rng(0).integers(3, 60, (1, 20))
    feeds = {"input_ids": ids, "past_length": np.array([0]), "logit_positions": np.arange(20)}
    sessions = (EagerSession(plain.graphs()), QnnSession(tmp_path / "bundle" / "qnn", specs, threads=1))
    want, got = (s.run("decoder", feeds, s.new_state(1, 20))["logits"] for s in sessions)
    assert max(largest) > 65504
    assert np.abs(want - got).max() < 2e-2 * np.abs(want).max()


def test_a_chunk_that_would_not_fit_the_end_of_the_cache_begins_earlier(made: Made) -> None:
    """140 tokens in a cache of 160: the second chunk of 128 begins at 32."""
    if made.name != "llama":
        pytest.skip("behind an encoder there are steps alone")
    ids = np.random.default_rng(1).integers(3, 60, (1, 140))
    calls: list[int] = []
    chunk = made.session._loaded["decoder_chunk"]

    class Counting:
        def run(self, names: list[str], feeds: dict[str, Any]) -> Any:
            calls.append(int(feeds["past_length"][0]))
            return chunk.run(names, feeds)

    made.session._loaded["decoder_chunk"] = Counting()
    feeds = {"input_ids": ids, "past_length": np.array([0]), "logit_positions": np.array([3, 131, 139])}
    try:
        want, got = (s.run("decoder", feeds, s.new_state(1, 150))["logits"] for s in (made.reference, made.session))
    finally:
        made.session._loaded["decoder_chunk"] = chunk
    assert calls == [0, 32]
    assert np.abs(want - got).max() < 2e-2 * np.abs(want).max()


def test_the_newest_version_runs_unless_another_is_asked_for(made: Made) -> None:
    assert made.session.version == 75
    assert made.session.activations == "float16"
    assert "v75" in made.session.how
    assert ("emulator" in made.session.how) == made.session.stand_in
    if 73 in VERSIONS[made.name]:
        other = QnnSession(made.directory, made.graphs, threads=1, version=73)
        assert other.version == 73
        assert "v73" in other.how
    with pytest.raises(UserError, match="no context binary for HTP v69"):
        QnnSession(made.directory, made.graphs, version=69)


def test_the_programs_refuse_what_they_were_not_made_for(made: Made) -> None:
    context = CONTEXT[made.name]
    with pytest.raises(UserError, match=f"{context + 1} tokens do not fit the {context}"):
        made.session.new_state(1, context + 1)
    if made.name == "t5gemma":
        long = {"input_ids": np.zeros((1, 70), np.int64), "encoder_mask": np.ones((1, 70), bool)}
        with pytest.raises(UserError, match="a source of 70 tokens; these programs take 64"):
            made.session.run("encoder", long, {})
    else:
        feeds = {
            "input_ids": np.ones((1, 2), np.int64),
            "past_length": np.array([159]),
            "logit_positions": np.array([1]),
        }
        with pytest.raises(UserError, match="161 tokens do not fit the 160"):
            made.session.run("decoder", feeds, made.session.new_state(1, 160))


@pytest.mark.parametrize(("asked", "said"), [((), "no HTP version"), ((70,), "HTP version 70"), ((75, 99), "99")])
def test_an_unknown_htp_version_is_refused_before_any_work(asked: tuple[int, ...], said: str, tmp_path: Path) -> None:
    from edgewright.exporters.qnn.export import export as export_qnn

    with pytest.raises(UserError, match=said):
        export_qnn([], tmp_path, Options(32, choices=asked))
    assert not list(tmp_path.iterdir())


def test_a_program_that_does_not_compile_is_one_line(tmp_path: Path) -> None:
    from edgewright.exporters.qnn.compile import compile_programs

    (tmp_path / "broken.onnx").write_bytes(b"not an onnx file")
    with pytest.raises(UserError, match=r"broken\.onnx does not compile for HTP v75") as caught:
        compile_programs(tmp_path, ["broken"], (75,), "embedding.bin", lambda _: None)
    assert "\n" not in str(caught.value)


def test_a_compiler_that_ends_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgewright.exporters.qnn.compile import compile_programs

    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(UserError, match="the compiler ended with status 1"):
        compile_programs(tmp_path, ["any"], (75,), "embedding.bin", lambda _: None)


def test_the_emulators_greeting_stays_off_standard_output(made: Made) -> None:
    code = (
        "import sys; from pathlib import Path; from edgewright.targets.qnn.context import session;"
        "session(Path(sys.argv[1]), {'htp_arch': '75'}, {}, 1); print('answer')"
    )
    path = made.directory / "decoder_step.v75.onnx"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, check=True, text=True)
    assert done.stdout == "answer\n"


# ---- hostile files --------------------------------------------------------------------------------------------------


def _copied(made: Made, folder: Path) -> Path:
    return Path(shutil.copytree(made.directory, folder / "qnn"))


def _edit(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    listed = json.loads((directory / PROGRAMS).read_text())
    change(listed)
    (directory / PROGRAMS).write_text(json.dumps(listed))


def _longer(listed: dict[str, Any]) -> None:
    listed["programs"]["decoder_step"]["sizes"]["capacity"] += 1


def _stranger(listed: dict[str, Any]) -> None:
    listed["programs"]["decoder_step"]["graph"] = "stranger"


def _unsized(listed: dict[str, Any]) -> None:
    del listed["programs"]["decoder_step"]["sizes"]["capacity"]


def _huge(listed: dict[str, Any]) -> None:
    listed["programs"]["decoder_step"]["sizes"]["capacity"] = 1 << 40


def _negative(listed: dict[str, Any]) -> None:
    listed["placement"]["75"]["decoder_step"][NAME]["Softmax"] = -1


def _outside(listed: dict[str, Any]) -> None:
    listed["programs"]["../../etc/decoder"] = listed["programs"]["decoder_step"]


def _unplaced(listed: dict[str, Any]) -> None:
    del listed["placement"]["75"]["decoder_step"]


def _wordy(listed: dict[str, Any]) -> None:
    listed["placement"]["newest"] = listed["placement"].pop("75")


def _absent(listed: dict[str, Any]) -> None:
    listed["placement"]["81"] = listed["placement"]["75"]


def _emptied(listed: dict[str, Any]) -> None:
    listed["programs"].clear()


CHANGES = (
    (_longer, "not as programs.json says"),
    (_stranger, "unknown graph"),
    (_unsized, "does not say how large"),
    (_huge, "less than or equal"),
    (_negative, "greater than or equal"),
    (_outside, "should match pattern"),
    (_unplaced, "does not have the programs"),
    (_wordy, "valid integer"),
    (_absent, r"v81\.onnx is missing"),
    (_emptied, "at least 1 item"),
)


@pytest.mark.parametrize(("change", "said"), CHANGES, ids=[c.__name__ for c, _ in CHANGES])
def test_a_damaged_list_of_programs_is_refused_in_one_line(
    made: Made, tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    copy = _copied(made, tmp_path)
    _edit(copy, change)
    with pytest.raises(UserError, match=said) as caught:
        QnnSession(copy, made.graphs, threads=1)
    assert "\n" not in str(caught.value)


def test_a_compiled_file_that_points_out_of_its_folder_is_refused(made: Made, tmp_path: Path) -> None:
    copy = _copied(made, tmp_path)
    path = copy / "decoder_step.v75.onnx"
    model = onnx.load(str(path), load_external_data=False)
    attributes = {a.name: a for n in model.graph.node if n.op_type == "EPContext" for a in n.attribute}
    shutil.copyfile(copy / attributes["ep_cache_context"].s.decode(), tmp_path / "elsewhere.bin")
    for name in (b"../elsewhere.bin", b"absent.bin"):
        attributes["ep_cache_context"].s = name
        onnx.save(model, str(path))
        with pytest.raises(UserError, match="not in its folder"):
            QnnSession(copy, made.graphs, threads=1)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match="not a whole ONNX file"):
        QnnSession(copy, made.graphs, threads=1)
