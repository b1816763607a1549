"""Which weights of a model can be quantized, and which must share a choice of bits."""

from __future__ import annotations

from ..models.language_model import LanguageModel
from ..models.layers.block import Block
from ..models.layers.linear import Embedding, Linear
from .plan import Unit, WeightSpec

SMALLEST_BLOCK = 16  # the smallest block of inputs any target holds; other widths stay as they are


def quantizable_units(model: LanguageModel) -> list[Unit]:
    """The units of a built model (its parameters may be on the meta device), in the model's order.

    Linears that a module names in `fused` are one unit. An alias of a tied weight is no unit: the stored weight counts for
    both. A weight whose inputs are no multiple of 16 is left out and stays unquantized.
    """
    layers = _layers(model)
    units: list[Unit] = []
    taken: set[str] = set()
    for path, module in model.named_modules():
        for family in module.fused if isinstance(module, Block) else ():
            names = [f"{path}.{child}" for child in module.plain_linears(family)]
            specs = [s for n in names if (s := _spec(model, n, layers)) is not None]
            taken |= set(names)
            if specs:
                units.append(Unit(f"{path}.{'+'.join(s.name.split('.')[-2] for s in specs)}", specs))
        if isinstance(module, Linear | Embedding) and path not in taken:
            spec = _spec(model, path, layers)
            if spec is not None:
                units.append(Unit(path, [spec]))
    return units


def _layers(model: LanguageModel) -> list[tuple[str, str, int]]:
    """(path prefix, stack, layer index) of every layer."""
    paths = {id(module): path for path, module in model.named_modules()}
    return [
        (f"{paths[id(layer)]}.", stack, i)
        for stack, modules in model.stacks().items()
        for i, layer in enumerate(modules)
    ]


def _spec(model: LanguageModel, path: str, layers: list[tuple[str, str, int]]) -> WeightSpec | None:
    name = f"{path}.weight"
    rows, columns = model.get_parameter(name).shape
    if name in model.tied or columns % SMALLEST_BLOCK:
        return None
    for prefix, stack, index in layers:
        if path.startswith(prefix):
            return WeightSpec(name, (int(rows), int(columns)), index, stack)
    return WeightSpec(
        name, (int(rows), int(columns)), None, path.split(".")[0] if "." not in path else path.split(".")[-2]
    )
