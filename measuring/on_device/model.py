"""A bundle's ONNX graphs and their generate loop, of one row, with onnxruntime and numpy alone.

It computes what the product's own session and loop compute; tests compare their tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

Array = NDArray[Any]
States = dict[str, list[Any]]
"""State name -> its OrtValues: one that kernels write in place, or two that change places at each call."""

PROVIDER = "CPUExecutionProvider"


class Model:
    """The graphs of a bundle's folder `onnx`, by its manifest."""

    def __init__(self, folder: Path, threads: int = 0) -> None:
        """threads: 0 is all cores."""
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.spec: dict[str, Any] = manifest["generation"]
        self.graphs: dict[str, Any] = {graph["name"]: graph for graph in manifest["graphs"]}
        self._states = {s["name"] for graph in self.graphs.values() for s in graph["states"]}
        self._bound: dict[str, tuple[States, list[Any]]] = {}
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.sessions = {
            name: ort.InferenceSession(str(folder / "onnx" / f"{name}.onnx"), options, providers=[PROVIDER])
            for name in self.graphs
        }

    def new_state(self, capacity: int, graph: str = "decoder") -> States:
        """Zeros of the states that `graph` updates; a KV cache has room for `capacity` tokens."""
        sizes = {"batch": 1, "capacity": capacity}
        made: States = {}
        for s in self.graphs[graph]["states"]:
            if s["updated"]:
                shape = [sizes.get(d, d) for d in s["shape"]]
                copies = 1 if s["kind"] == "kv" else 2
                made[s["name"]] = [ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, s["dtype"])) for _ in range(copies)]
        return made

    def run(self, graph: str, inputs: Mapping[str, Array], state: States) -> dict[str, Array]:
        """Run a graph. Updated states, and outputs that bear a state's name, go into `state`; the others are returned."""
        spec = self.graphs[graph]
        updated = [s for s in spec["states"] if s["updated"]]
        known = self._bound.get(graph)
        if known is None or known[0] is not state:
            turns = 2 if any(s["kind"] != "kv" for s in updated) else 1
            known = (state, [self._binding(graph, state, turn) for turn in range(turns)])
            self._bound[graph] = known
        binding = known[1][0]
        held = {name: np.ascontiguousarray(value) for name, value in inputs.items()}  # must outlive the run
        for name, value in held.items():
            binding.bind_cpu_input(name, value)
        for port in spec["outputs"]:
            binding.bind_output(port["name"])
        self.sessions[graph].run_with_iobinding(binding)
        values = binding.get_outputs()[len(updated) :]  # in the order of binding: the states were bound first
        results: dict[str, Array] = {}
        for port, value in zip(spec["outputs"], values):
            if port["name"] in self._states:
                state[port["name"]] = [value]
            else:
                results[port["name"]] = value.numpy()
        known[1].reverse()
        for s in updated:
            state[s["name"]].reverse()
        return results

    def _binding(self, graph: str, state: States, turn: int) -> Any:
        binding = self.sessions[graph].io_binding()
        for s in self.graphs[graph]["states"]:
            held = state[s["name"]]
            binding.bind_ortvalue_input(s["name"], held[turn % len(held)])
            if s["updated"]:
                binding.bind_ortvalue_output(f"{s['name']}_out", held[(turn + 1) % len(held)])
        return binding


class Stream:
    """One prompt that is being decoded.

    Attributes:
        past: positions in the state. capacity: positions that it has.
        pending: tokens [1, n] to be fed first: the prompt, of an encoder-decoder its decoder's start.
    """

    def __init__(self, model: Model, prompt: Sequence[int], new_tokens: int, memory: Array | None = None) -> None:
        """prompt: token ids; of a model that reads sound it does not matter. memory: [1, rows, hidden] of a context."""
        self.model, self.past = model, 0
        spec = model.spec
        self._extra: dict[str, Array] = {}
        self._slots = np.zeros(0, np.int64)
        if spec["task"] == "seq2seq":
            self.capacity = min(spec["max_context"], new_tokens + 1 + len(spec["forced"]))
            self._encode(prompt)
            return
        ids = list(prompt)
        if spec["context"] is not None:
            ids = self._splice(spec["context"], ids, memory)
        self.capacity = min(spec["max_context"], len(ids) + new_tokens)
        self.state = model.new_state(self.capacity)
        self.pending = np.array([ids], np.int64)

    def _encode(self, prompt: Sequence[int]) -> None:
        spec, model = self.model.spec, self.model
        self.state = model.new_state(self.capacity)
        inputs, mask = noise(spec["speech"]["sound"]) if spec["speech"] is not None else _text(prompt)
        encoded = model.run("encoder", inputs, self.state)
        model.run("cross_kv", {"encoder_hidden": encoded["encoder_hidden"]}, self.state)
        self._extra = {"encoder_mask": mask}
        self.pending = np.array([[spec["decoder_start"], *spec["forced"]]], np.int64)

    def _splice(self, context: dict[str, Any], prompt: list[int], memory: Array | None) -> list[int]:
        """The prompt with a token 0 for each row of memory; `_slots` has the row at each position, or -1."""
        rows = 0 if memory is None else memory.shape[1]
        early = int(context["splice"] == "released" and rows > 0)
        lead = len(context["prefix"]) - early
        self._extra = {"memory": np.zeros((1, 1, context["hidden"]), np.float32) if memory is None else memory}
        self._slots = np.array([*[-1] * lead, *range(rows), *[-1] * (early + len(prompt))], np.int64)
        return [*context["prefix"][:lead], *[0] * (rows + early), *prompt]

    def feed(self, tokens: Array) -> Array:
        """Append tokens [1, n]; returns the logits [vocab] after the last one."""
        most, count = self.model.spec["prefill_chunk"], tokens.shape[1]
        for at in range(0, count, most):
            part = tokens[:, at : at + most]
            inputs = {
                "input_ids": part,
                "past_length": np.array([self.past], np.int64),
                "logit_positions": np.array([part.shape[1] - 1], np.int64),
                **self._extra,
            }
            if self.model.spec["context"] is not None:
                slots = self._slots[self.past : self.past + part.shape[1]]
                inputs["slots"] = np.concatenate([slots, np.full(part.shape[1] - len(slots), -1, np.int64)])
            logits = self.model.run("decoder", inputs, self.state)["logits"]
            self.past += part.shape[1]
        last: Array = logits[0, -1]
        return last


def greedy(model: Model, prompt: Sequence[int], new_tokens: int, context: Sequence[int] = ()) -> list[int]:
    """The likeliest tokens after a prompt, up to an end token, `new_tokens` of them or the end of the context."""
    stream = Stream(model, prompt, new_tokens, read_context(model, context) if context else None)
    logits, written = stream.feed(stream.pending), list[int]()
    while True:
        token = int(logits.argmax())
        if token in model.spec["eos_ids"]:
            return written
        written.append(token)
        if len(written) >= new_tokens or stream.past >= stream.capacity:
            return written
        logits = stream.feed(np.array([[token]], np.int64))


def read_context(model: Model, ids: Sequence[int]) -> Array:
    """The memory [1, rows, hidden] of a context of token ids, read in parts of at most `window` tokens."""
    context = model.spec["context"]
    parts = [list(ids[at : at + context["window"]]) for at in range(0, len(ids), context["window"])]
    return np.concatenate([_memory(model, context, part) for part in parts], 1)


def _memory(model: Model, context: dict[str, Any], part: list[int]) -> Array:
    if not context["tokens"]:
        return model.run("context", {"input_ids": np.array([part], np.int64)}, {})["memory"]
    ids, most = np.array([[*part, *context["tokens"]]], np.int64), model.spec["prefill_chunk"]
    state = model.new_state(ids.shape[1], "context")
    rows = []
    for at in range(0, ids.shape[1], most):
        tokens = ids[:, at : at + most]
        wanted = np.arange(max(0, len(part) - at), tokens.shape[1], dtype=np.int64)
        inputs = {
            "input_ids": tokens,
            "past_length": np.array([at], np.int64),
            "logit_positions": wanted if len(wanted) else np.array([tokens.shape[1] - 1], np.int64),
        }
        memory = model.run("context", inputs, state)["memory"]
        if len(wanted):
            rows.append(memory)
    return np.concatenate(rows, 1)


def noise(sound: dict[str, Any]) -> tuple[dict[str, Array], Array]:
    """Encoder inputs of a window of noise, and where its output is real: the time of an encoder does not depend on values."""
    draw = np.random.default_rng(0)
    if sound["kind"] == "log-mel":
        shape = (1, sound["mels"], sound["window"] // sound["hop"])
        return {"input_features": draw.normal(size=shape).astype(np.float32)}, np.ones((1, sound["positions"]), bool)
    values = draw.normal(0.0, 0.1, (1, sound["positions"], sound["row"])).astype(np.float32)
    mask = np.ones((1, sound["positions"]), bool)
    return {"input_values": values, "encoder_mask": mask}, mask


def _text(prompt: Sequence[int]) -> tuple[dict[str, Array], Array]:
    mask = np.ones((1, len(prompt)), bool)
    return {"input_ids": np.array([list(prompt)], np.int64), "encoder_mask": mask}, mask
