"""A session over files that strangers may have written: what its runtime raises or gives back is one line, not a traceback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..bundle import GraphSpec
from ..errors import UserError, VerificationFailure
from ..system.reading import one_line
from ..system.refusals import in_words, is_environment
from ..system.stages import Stage
from .session import Array, PlacedSession, Placement, StateBuffers


class Guarded:
    """`session` with its calls marked as stages, its outputs checked, its faults raised as `failure`.

    name: the target. where: what begins the line of a fault.
    """

    def __init__(
        self,
        session: PlacedSession,
        name: str,
        graphs: Sequence[GraphSpec],
        where: str,
        failure: type[UserError | VerificationFailure],
    ) -> None:
        self.session = session
        self.activations, self.how, self.stand_in = session.activations, session.how, session.stand_in
        self._where, self._failure = where, failure
        self._graphs = {g.name: g for g in graphs}
        self._stages = {g.name: Stage(f"{name}: running {g.name}") for g in graphs}

    def new_state(self, batch: int, capacity: int, graph: str = "decoder") -> StateBuffers:
        with self._stages[graph]:
            try:
                return self.session.new_state(batch, capacity, graph)
            except (UserError, VerificationFailure):
                raise
            except Exception as error:  # the runtimes raise a dozen types that share no base
                raise self._fault(graph, error) from error

    def run(self, graph: str, inputs: Mapping[str, Array], state: StateBuffers) -> dict[str, Array]:
        with self._stages[graph]:
            try:
                results = self.session.run(graph, inputs, state)
                self._check(self._graphs[graph], inputs, results)
            except (UserError, VerificationFailure):
                raise
            except Exception as error:
                raise self._fault(graph, error) from error
        return results

    def placement(self) -> Placement:
        return self.session.placement()

    def _check(self, spec: GraphSpec, inputs: Mapping[str, Array], results: Mapping[str, Array]) -> None:
        """Raise ValueError for an output of another shape or type than the graph's."""
        sizes = {d: n for p in spec.inputs for d, n in zip(p.shape, inputs[p.name].shape) if isinstance(d, str)}
        for port in spec.outputs:
            value = results.get(port.name)
            if value is None:
                continue  # a state, which stays with the session
            wanted = [sizes.get(d) if isinstance(d, str) else d for d in port.shape]
            shape = value.shape
            same = len(shape) == len(wanted) and all(w in (None, have) for w, have in zip(wanted, shape, strict=True))
            if not same or (value.dtype.kind == "f") != port.dtype.startswith(("float", "bfloat")):
                raise ValueError(f"{one_line(port.name, 60)} comes as {value.dtype} {list(shape)}")

    def _fault(self, graph: str, error: Exception) -> Exception:
        if isinstance(error, OSError) and is_environment(error):
            return UserError(f"{self._where}: {graph} cannot run here ({one_line(in_words(error), 160)}); mend that")
        kind = "" if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: "
        return self._failure(f"{self._where}: {graph} does not run ({kind}{one_line(error, 160)})")
