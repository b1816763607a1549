"""HTP context binaries as a `Session`: static programs of batch 1, with every input padded to them. No torch is imported.

Rows of a batch run one after the other. An encoder runs in the shortest program that takes its source. A decoder reads several
tokens in a program for chunks, where there is one, else one token at a time; a chunk that would write padding into its states is
not used. A graph without symbolic dimensions is one program. On x86 the binaries run in Qualcomm's emulator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle import GraphSpec, PortSpec, StateSpec
from ...errors import UserError
from ...targets.onnx.graph_check import check_graph
from ...targets.qnn import emulated
from ...targets.qnn.context import HOST_OPS, NAME, PROGRAMS, Program, Programs, compiled, session
from ..session import DTYPES, Array, PlacedSession, Placement, StateBuffers, place, require_room, sized, state_bytes


class QnnSession:
    """The programs of a bundle's `qnn` folder for one HTP version; None is the newest in the folder."""

    activations = "float16"
    stand_in = emulated()

    def __init__(
        self, directory: Path, graphs: Sequence[GraphSpec], threads: int = 0, version: int | None = None
    ) -> None:
        """Load every program. Raises UserError if one is missing, damaged, or not of these graphs."""
        listed = Programs.read(directory)
        have = sorted(listed.placement)
        if version is not None and version not in have:
            raise UserError(
                f"{directory}: no context binary for HTP v{version}, only for {', '.join(map(str, have))}; "
                "export again with that version"
            )
        self.version = have[-1] if version is None else version
        self.how = (
            f"Qualcomm's emulator of HTP v{self.version} on this x86 machine"
            if emulated()
            else f"the NPU itself, through binaries for HTP v{self.version}"
        )
        self._graphs = {g.name: g for g in graphs}
        self._states: dict[str, StateSpec] = {s.name: s for g in graphs for s in g.states}
        self._units = listed.placement[self.version]
        self._programs = listed.programs
        self._loaded: dict[str, Any] = {}
        for stem, program in listed.programs.items():
            if program.graph not in self._graphs:
                raise UserError(f"{directory / PROGRAMS}: {stem} is of an unknown graph; export again")
            path = directory / compiled(stem, self.version)
            check_graph(path)
            check_inside(path)
            self._loaded[stem] = session(path, {"htp_arch": str(self.version)}, {}, threads)
            self._check_ports(path, self._graphs[program.graph], program, self._loaded[stem])
        lost = [name for name in self._graphs if not self._of(name)]
        if lost:
            raise UserError(f"{directory / PROGRAMS}: no program of the graph {lost[0]}; export again")
        self._capacity = {g: max(p.sizes.get("capacity", 0) for p in self._programs_of(g)) for g in self._graphs}

    @staticmethod
    def _check_ports(path: Path, spec: GraphSpec, program: Program, loaded: Any) -> None:
        """Raise UserError unless the binary's ports have the sizes in `programs.json`, by which they are fed and read."""
        sizes: dict[str, int] = {str(k): v for k, v in program.sizes.items()}
        updated = [s.model_copy(update={"name": f"{s.name}_out"}) for s in spec.updated_states]
        for ports, actual in (
            ([*spec.inputs, *spec.states], loaded.get_inputs()),
            ([*spec.outputs, *updated], loaded.get_outputs()),
        ):
            shapes = {i.name: list(i.shape) for i in actual}
            for port in ports:
                if any(isinstance(d, str) and d not in sizes for d in port.shape):
                    raise UserError(f"{path}: {PROGRAMS} does not say how large {port.name} is; export again")
                if shapes.get(port.name) != list(sized(port.shape, sizes)):
                    raise UserError(f"{path}: {port.name} is not as {PROGRAMS} says; export again")

    def new_state(self, batch: int, capacity: int, graph: str = "decoder") -> StateBuffers:
        """Zeroed float16 arrays of the states that `graph` updates; caches are as long as those of its programs.

        Raises UserError for a capacity beyond them.
        """
        most = self._capacity[graph]
        if most and capacity > most:
            raise UserError(
                f"{capacity} tokens do not fit the {most} these programs were made for; "
                "export with a longer --max-context"
            )
        sizes = {"batch": batch, "capacity": most}
        require_room(state_bytes(self._graphs[graph].updated_states, sizes), most)
        return {s.name: np.zeros(sized(s.shape, sizes), np.float16) for s in self._graphs[graph].updated_states}

    def run(self, graph: str, inputs: Mapping[str, Array], state: StateBuffers) -> dict[str, Array]:
        """As `Session.run`. Raises UserError for a source longer than the programs take."""
        spec = self._graphs[graph]
        lengths = {d: inputs[p.name].shape[i] for p in spec.inputs for i, d in enumerate(p.shape) if isinstance(d, str)}
        if not lengths:  # no symbolic dimension: one program
            outputs = self._call(self._of(graph)[0], inputs, {s.name: state[s.name] for s in spec.states})
            return {name: value.astype(np.float32) for name, value in outputs.items()}
        for name in set(lengths) - {"batch", "source", "sequence", "logits"}:
            most = max(p.sizes.get(name, 0) for p in self._programs_of(graph))
            if lengths[name] > most:
                raise UserError(f"{graph}: {lengths[name]} {name} rows; these programs take {most}")
        rows = []
        for row in range(lengths["batch"]):
            one = {p.name: inputs[p.name][row : row + 1] if "batch" in p.shape else inputs[p.name] for p in spec.inputs}
            carried = {
                s.name: state[s.name][row : row + 1] for s in spec.states
            }  # views: updates are written into the state
            if "sequence" in lengths:
                rows.append(self._decode(spec, one, carried, lengths.get("source", 0)))
            else:
                rows.append(self._call(self._fitting(graph, lengths.get("source", 0))[0], one, carried))
        results: dict[str, Array] = {}
        for port in spec.outputs:
            value = np.concatenate([r[port.name] for r in rows])
            if port.name in self._states:
                state[port.name] = value  # with its padding, which the graph that reads it masks
            else:
                cut = tuple(slice(0, lengths[d]) if d == "source" else slice(None) for d in port.shape)
                results[port.name] = value[cut].astype(np.float32)
        return results

    def placement(self) -> Placement:
        """The ops inside the context binaries, as onnxruntime assigned them when it compiled."""
        return place(self._units, (NAME,), HOST_OPS, "onnxruntime's own assignment when it compiled the binaries")

    def _programs_of(self, graph: str) -> list[Program]:
        return [p for p in self._programs.values() if p.graph == graph]

    def _of(self, graph: str) -> list[str]:
        """The names of a graph's programs: short sources first, chunks before single tokens."""

        def order(stem: str) -> tuple[int, int]:
            sizes = self._programs[stem].sizes
            return sizes.get("source", 0), -sizes.get("sequence", 0)

        return sorted((s for s, p in self._programs.items() if p.graph == graph), key=order)

    def _fitting(self, graph: str, source: int) -> list[str]:
        """The names of a graph's programs that take a source of this length. Raises UserError if there is none."""
        most = max(self._programs[s].sizes.get("source", source) for s in self._of(graph))
        if source > most:
            raise UserError(
                f"a source of {source} tokens; these programs take {most}: export with a longer --max-context"
            )
        return [s for s in self._of(graph) if self._programs[s].sizes.get("source", source) >= source]

    def _decode(
        self, spec: GraphSpec, inputs: dict[str, Array], carried: dict[str, Array], source: int
    ) -> dict[str, Array]:
        """Feed one row's new tokens in chunks and single tokens; returns the outputs at `logit_positions`."""
        ids, past = inputs["input_ids"], int(inputs["past_length"][0])
        wanted = [int(p) for p in inputs["logit_positions"]]
        name = next(p.name for p in spec.outputs if "logits" in p.shape)
        by_position: dict[int, Array] = {}
        at, count, most = 0, ids.shape[1], self._capacity[spec.name]
        if most and past + count > most:
            raise UserError(f"{past + count} tokens do not fit the {most} these programs were made for")
        growing = [s.name for s in spec.states if "capacity" in s.shape]
        carries = [s.name for s in spec.updated_states if s.name not in growing]
        while at < count:
            stem, begin = self._part(self._fitting(spec.name, source), past, at, count, exact=bool(carries))
            sizes = self._programs[stem].sizes
            stop = min(begin + sizes["sequence"], count)
            # Padding behind the tokens goes into the cache, and is overwritten before anything reads it.
            fed = inputs | {p.name: _cut(p, inputs[p.name], begin, stop) for p in spec.inputs if "sequence" in p.shape}
            fed["past_length"] = np.array([past + begin], np.int64)
            inside = [p for p in wanted if at <= p < stop] or [stop - 1]
            before = {n: carried[n].copy() for n in carries}
            for i in range(0, len(inside), sizes["logits"]):  # each run writes the same into the cache
                for n, value in before.items():
                    carried[n][...] = value
                some = inside[i : i + sizes["logits"]]
                positions = np.array(some + some[-1:] * (sizes["logits"] - len(some)), np.int64) - begin
                logits = self._call(stem, fed | {"logit_positions": positions}, carried)[name]
                by_position |= {p: logits[:, j : j + 1] for j, p in enumerate(some)}
            at = stop
        return {name: np.concatenate([by_position[p] for p in wanted], 1)}

    def _part(self, stems: list[str], past: int, at: int, count: int, exact: bool) -> tuple[str, int]:
        """(program, its first token) to feed the tokens from `at` on.

        Where a chunk would not fit into the end of the cache, it begins earlier and feeds tokens of this call again. exact: a
        chunk may neither begin earlier nor end in padding.
        """
        for stem in stems:
            sizes = self._programs[stem].sizes
            length = sizes["sequence"]
            if length == 1 or (exact and count - at >= length):
                return stem, at
            begin = min(at, sizes.get("capacity", past + at + length) - length - past)
            if not exact and count - at > 1 and begin >= 0:
                return stem, begin
        raise UserError(f"no program takes a single token; {PROGRAMS} is damaged: export again")

    def _call(self, stem: str, inputs: Mapping[str, Array], carried: dict[str, Array]) -> dict[str, Array]:
        """Run one program on one row, padded to its sizes; updated states are written into the arrays of `carried`."""
        program = self._programs[stem]
        spec = self._graphs[program.graph]
        sizes: dict[str, int] = {str(k): v for k, v in program.sizes.items()}
        feeds = {p.name: _fit(p, inputs[p.name], sizes) for p in spec.inputs}
        feeds |= {s.name: _fit(s, carried[s.name], sizes) for s in spec.states}
        names = [p.name for p in spec.outputs] + [f"{s.name}_out" for s in spec.updated_states]
        results = dict(zip(names, self._loaded[stem].run(names, feeds), strict=True))
        for s in spec.updated_states:
            value = results.pop(f"{s.name}_out")
            carried[s.name][tuple(slice(0, d) for d in value.shape)] = value
        return results


def _cut(port: PortSpec, value: Array, begin: int, stop: int) -> Array:
    """The tokens from `begin` to `stop` of an input."""
    return value[tuple(slice(begin, stop) if d == "sequence" else slice(None) for d in port.shape)]


def _fit(port: PortSpec, value: Array, sizes: Mapping[str, int]) -> Array:
    """`value` in a program's shape: cut, or padded with zeros (a mask with false); floats as float16."""
    shape = sized(port.shape, sizes)
    value = value[tuple(slice(0, d) for d in shape)]
    value = np.pad(value, [(0, d - have) for d, have in zip(shape, value.shape, strict=True)])
    return np.ascontiguousarray(value, np.float16 if port.dtype == "float32" else DTYPES[port.dtype])


def check_inside(path: Path) -> None:
    """Raise UserError if a compiled file refers to a file outside its folder, or to one that does not exist."""
    import onnx

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf's own types
        raise UserError(f"{path}: not an ONNX file ({type(error).__name__}); export again") from None
    named = [a.s.decode("utf-8", "replace") for n in graph.node for a in n.attribute if a.name == "ep_cache_context"]
    named += [e.value for t in graph.initializer for e in t.external_data if e.key == "location"]
    if any(a.name == "embed_mode" and a.i for n in graph.node for a in n.attribute):
        raise UserError(f"{path}: its binary lies inside it; export again")
    for name in named:
        if Path(name).name != name or not (path.parent / name).is_file():
            raise UserError(f"{path}: it points at {name!r:.80}, which is not in its folder; export again")


def open_session(folder: Path, graphs: Sequence[GraphSpec], threads: int, exact: bool) -> PlacedSession:
    """As `runtimes.registry` asks for it. There is no exact one."""
    return QnnSession(folder, graphs, threads)
