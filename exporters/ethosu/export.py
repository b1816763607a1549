"""Arm Ethos-U: the encoder as one delegated `.pte` for each configuration.

The encoder at one static length -> rewrite by the table (`lowerings`) -> activations in fixed point (`activations`) -> TOSA by
ExecuTorch's Arm backend -> Vela. Beside each `.pte` lies the `.tosa` that Vela compiled: codes and scales are read back from it,
and it compiles to the very bytes in the `.pte`. The embedding and the mask stay on the host, in the same program.
"""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ...errors import UserError
from ...graph import Graph
from ...ops.quantized import dequantize
from ...system.quiet import quiet_torchao
from ...system.reading import one_line, read_json_object
from ...targets.ethosu.names import GRAPH, HOST_OPS
from ..artefact import Artefact, Options, Progress
from . import vela

NAMES = "weights.json"

POSITIONS = 64
"""The most source tokens of the program: the scores' memory grows with the square of it, and SRAM is small."""

_RANDOM_PROMPTS = 32


def export(graphs: Sequence[Graph], directory: Path, options: Options, progress: Progress = lambda _: None) -> Artefact:
    """Write `encoder.<configuration>.pte` and `.tosa` for each of `options.names`, and `weights.json`.

    The program takes sources of `min(options.max_positions, 64)` tokens, padded. Ranges of activations come from
    `options.prompts`, from random ids where there are none. Raises UserError for a model without an encoder, an unknown
    configuration, a weight in a form that the NPU cannot hold, and an op that it does not take.
    """
    quiet_torchao()
    encoder = next((g for g in graphs if g.name == GRAPH), None)
    if encoder is None:
        raise UserError("Ethos-U runs encoders, and this model has none; choose another --format")
    if not options.names:
        raise UserError("no Ethos-U configuration was given; for example ethos-u85-256")
    families = {accelerator: vela.family(accelerator) for accelerator in options.names}
    files: list[str] = [NAMES]
    ops: dict[str, dict[str, int]] = {}
    estimates: dict[str, object] = {}
    record: dict[str, Any] = {}
    for narrow in dict.fromkeys(family.narrow_matmul for family in families.values()):
        accelerators = [a for a, family in families.items() if family.narrow_matmul == narrow]
        progress(f"ethosu: activations in fixed point for {', '.join(accelerators)}")
        program, names = fixed(encoder, options, narrow)
        progress(f"ethosu: lowering for {', '.join(accelerators)}")
        edge, tosa = _lower(program, accelerators[0])
        for accelerator in accelerators:
            counts, estimate = _write(edge, tosa, accelerator, directory)
            ops[f"{GRAPH}.{accelerator}"] = counts
            estimates[f"{GRAPH} on {accelerator}"] = estimate
            files += [f"{GRAPH}.{accelerator}.{kind}" for kind in ("pte", "tosa")]
            record[accelerator] = names
    (directory / NAMES).write_text(json.dumps({"programs": record}, indent=1) + "\n")
    progress("ethosu: reading the weights back")
    _require_every_weight(encoder, dict(read_weights(directory)))
    facts: dict[str, object] = {
        "source_tokens": positions(encoder, options),
        "calibration_prompts": len(options.prompts),
        "vendor_simulated": {"simulator": "Arm's Vela", "note": "its estimate, no device", "programs": estimates},
    }
    return Artefact(tuple(files), ops, facts)


def positions(encoder: Graph, options: Options) -> int:
    """Source tokens of the program."""
    return min(POSITIONS, options.max_positions, encoder.bounds["source"][1])


def fixed(encoder: Graph, options: Options, narrow_matmul: bool) -> tuple[torch.export.ExportedProgram, dict[str, Any]]:
    """(the encoder in fixed point; the names of its weights, with the step from each linear's input to its output)."""
    from .activations import fixed_point
    from .lowerings import Rewriter

    length = positions(encoder, options)
    with torch.no_grad():
        program = torch.export.export(encoder.module, _inputs(encoder, [0], length))
        rewriter = Rewriter(_module(program), encoder.checkpoint_name)
        rewritten = rewriter.run().requires_grad_(False)
        calibration = [_inputs(encoder, p, length) for p in _prompts(options, length, rewriter.rows)]
        plain = torch.export.export(rewritten, calibration[0])
        module, steps = fixed_point(_module(plain), calibration, narrow_matmul)
        names = {"linears": dict(zip(rewriter.linears, steps, strict=True)), "table": rewriter.table}
        return torch.export.export(module, calibration[0]), names


def _module(program: torch.export.ExportedProgram) -> torch.fx.GraphModule:
    module = program.module(check_guards=False)
    assert isinstance(module, torch.fx.GraphModule)
    return module


def _prompts(options: Options, length: int, vocabulary: int) -> list[list[int]]:
    """Token ids for calibration: the prompts of the bundle, or random ones, the last of them of full length."""
    prompts = [list(p[:length]) for p in options.prompts if p]
    if prompts:
        return prompts
    generator = torch.Generator().manual_seed(0)
    sizes = [*torch.randint(1, length + 1, (_RANDOM_PROMPTS - 1,), generator=generator).tolist(), length]
    return [torch.randint(vocabulary, (size,), generator=generator).tolist() for size in sizes]


def _inputs(encoder: Graph, prompt: list[int], length: int) -> tuple[torch.Tensor, ...]:
    """ids [1, T] and mask [1, T] of a padded prompt, in the order of the graph's ports."""
    ids, mask = torch.zeros(1, length, dtype=torch.int64), torch.zeros(1, length, dtype=torch.bool)
    ids[0, : len(prompt)] = torch.tensor(prompt)
    mask[0, : len(prompt)] = True
    return tuple(mask if port.dtype == torch.bool else ids for port in encoder.inputs)


def _lower(program: torch.export.ExportedProgram, accelerator: str) -> tuple[Any, bytes]:
    """(the edge program with its delegate, the TOSA of the delegate).

    Raises UserError for an op that the NPU does not take, named, and for what does not compile.
    """
    import executorch.kernels.quantized  # noqa: F401  the kernels of the host's part
    from executorch.backends.arm.ethosu import EthosUPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.exir.backend.partitioner import Partitioner, PartitionResult
    from torch.fx.passes.operator_support import OperatorSupportBase

    from .internals import operator_support

    class NoMask(OperatorSupportBase):
        """The mask stays on the host on every NPU: the smaller ones have no ops on booleans."""

        def is_node_supported(self, submodules: Any, node: torch.fx.Node) -> bool:
            value = node.meta.get("val")
            return not (isinstance(value, torch.Tensor) and value.dtype == torch.bool)

    class OnePiece(Partitioner):  # type: ignore[misc]  # the library is untyped
        """Arm's partitioner, whose result must be one piece: several pieces would fail later, with no op in the message."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = EthosUPartitioner(spec, [NoMask()])
            self.delegation_spec = self.inner.delegation_spec

        def ops_to_not_decompose(self, ep: torch.export.ExportedProgram) -> Any:
            return self.inner.ops_to_not_decompose(ep)

        def partition(self, exported_program: torch.export.ExportedProgram) -> PartitionResult:
            result = self.inner.partition(exported_program)
            graph = result.tagged_exported_program.graph
            _require_one_delegate(graph, accelerator, operator_support(self.inner, exported_program))
            return result

    for name in ("executorch", "executorch.backends.arm"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(), vela.quiet():
        warnings.simplefilter("ignore")
        spec = vela.compile_spec(accelerator).dump_intermediate_artifacts_to(scratch)
        config = EdgeCompileConfig(_check_ir_validity=False)
        try:
            edge = to_edge_transform_and_lower(program, partitioner=[OnePiece()], compile_config=config)
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # the passes' and Vela's own types
            raise UserError(
                f"the encoder does not compile for {accelerator} ({one_line(error, 160)}); choose another --format"
            ) from error
        (tosa,) = Path(scratch).glob("output_tag*.tosa")
        return edge, tosa.read_bytes()


def _require_one_delegate(graph: torch.fx.Graph, accelerator: str, supported: Callable[[torch.fx.Node], bool]) -> None:
    """Raise UserError with the ops that the NPU did not take, by the tags of the partitioner.

    A refused op takes its neighbours along. The message has these only where no op is refused for itself.
    """
    from .internals import op_name

    called = [n for n in graph.nodes if n.op == "call_function"]
    hosted = {op.partition(".")[0] for op in HOST_OPS}
    untagged = {n: op_name(n.target) for n in called if "delegation_tag" not in n.meta}
    refused = {n: name for n, name in untagged.items() if name is not None and name not in hosted}
    if refused:
        themselves = {name for n, name in refused.items() if not supported(n)}
        named = sorted(themselves or {*refused.values()})
        raise UserError(f"{accelerator} does not take {', '.join(named[:3])} of the encoder; choose another --format")
    pieces = len({n.meta["delegation_tag"] for n in called if "delegation_tag" in n.meta})
    if pieces != 1:
        raise UserError(f"the encoder comes apart into {pieces} pieces on {accelerator}; choose another --format")


def _write(edge: Any, tosa: bytes, accelerator: str, directory: Path) -> tuple[dict[str, int], dict[str, object]]:
    """Write one configuration's files. Returns the ops by where they run, and Vela's estimate."""
    from ...targets.ethosu.files import DELEGATE, Program, TosaFile
    from .internals import replace_delegate, spec_list

    compiled, estimate = vela.command_stream(tosa, accelerator)
    (delegate,) = (m for m in edge.exported_program().graph_module.children() if hasattr(m, "compile_specs"))
    # The TOSA serves all of the family. And the specs had a path of this machine, which does not belong in the program.
    replace_delegate(delegate, compiled, spec_list(vela.compile_spec(accelerator)))
    path = directory / f"{GRAPH}.{accelerator}.pte"
    path.with_suffix(".tosa").write_bytes(tosa)
    path.write_bytes(edge.to_executorch().buffer)
    placed = {f"CPU: {op}": n for op, n in Program(path).host_ops().items()}
    placed |= {f"{DELEGATE}: {op}": n for op, n in TosaFile(path.with_suffix(".tosa")).ops().items()}
    return placed, estimate


def read_weights(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(checkpoint name, float32 [N, K]) of every quantized weight as the files hold it.

    Each `.tosa` is compiled again and must give the bytes of its `.pte`; all configurations must hold the same weights. Raises
    UserError for files that are damaged or do not belong together.
    """
    from ...targets.ethosu.files import Program, TosaFile

    path = directory / NAMES
    weights: dict[str, torch.Tensor] = {}
    for accelerator, names in _programs(path).items():
        program = Program(directory / f"{GRAPH}.{accelerator}.pte")
        tosa = TosaFile(directory / f"{GRAPH}.{accelerator}.tosa")
        if vela.command_stream(tosa.data, accelerator)[0] != program.delegate:
            raise UserError(f"{one_line(program.path)} was not compiled from the .tosa beside it; export again")
        codes, scales = program.table()
        values = {names["table"]: codes.to(torch.float32) * scales.unsqueeze(1)}
        stored = list(tosa.linears())
        if len(stored) != len(names["linears"]):
            raise UserError(f"{one_line(tosa.path)} has {len(stored)} linears, not those of {NAMES}; export again")
        for (name, step), linear in zip(names["linears"].items(), stored, strict=True):
            factors = (linear.factors * step).to(torch.float32)
            values[name] = linear.codes.to(torch.float32) * factors.unsqueeze(1)
        for name, value in values.items():
            if not torch.equal(weights.setdefault(name, value), value):
                raise UserError(
                    f"{one_line(name, 120)} is not the same in every configuration of {one_line(directory)}"
                )
    return iter(weights.items())


def _programs(path: Path) -> dict[str, dict[str, Any]]:
    """Configuration -> its entry in `weights.json`. Raises UserError for an entry of another form."""
    programs = read_json_object(path).get("programs")
    if not isinstance(programs, dict) or not programs:
        raise UserError(f"{one_line(path)} names no program; export again")
    for accelerator, names in programs.items():
        vela.family(str(accelerator))
        linears = names.get("linears") if isinstance(names, dict) else None
        if not isinstance(linears, dict) or not isinstance(names.get("table"), str):
            raise UserError(f"{one_line(path)} does not name the weights of {accelerator}; export again")
        if not all(isinstance(step, float) for step in linears.values()):
            raise UserError(f"{one_line(path)}: a step of {accelerator} is no number; export again")
    return programs


def _require_every_weight(encoder: Graph, stored: dict[str, torch.Tensor]) -> None:
    """Raise ValueError if the files do not hold every weight of the encoder bit for bit."""
    for path, module in encoder.module.named_modules():
        if hasattr(module, "codes"):
            part: Any = module
            name = encoder.checkpoint_name(f"{path}.weight")
            if not torch.equal(stored[name], dequantize(part.codes, part.scales, part.bits, part.group_size)):
                raise ValueError(f"the files do not hold the codes and scales of {name}")
