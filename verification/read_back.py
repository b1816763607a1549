"""What stands in for a runtime that Edgewright does not have: the eager session on the weights that the artefact holds."""

from __future__ import annotations

from ..bundle import Bundle
from ..checkpoints.checkpoint import Checkpoint
from ..exporters.registry import exporter
from ..models.kv_cache import stored_as
from ..models.loading import load_dequantized
from ..models.registry import build, stored_name
from ..runtimes.eager import EagerSession
from ..runtimes.session import Placement


class ReadBackSession(EagerSession):
    """The graphs run by PyTorch in float32, on the weights read from the files of a target's artefact."""

    activations = "float32"
    how = "PyTorch on the weights in its files: Edgewright has no runtime for it"
    stand_in = True

    def __init__(self, bundle: Bundle, name: str, quantized: Checkpoint) -> None:
        """Raises UserError as the target's exporter does where the files cannot be read."""
        model = build(quantized.config)
        load_dequantized(model, quantized)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for stored, values in exporter(name).read_weights(bundle.path / name):
            parameters[stored_name(model, stored)].data = values.float()
        super().__init__(stored_as(model.graphs(), bundle.manifest.kv_cache))

    def placement(self) -> Placement:
        return Placement("", {}, source=self.how, known=False)
