"""Which weights of a model can be quantized, and which must share a choice of bits."""

from __future__ import annotations

from ..models.language_model import LanguageModel
from ..models.layers.linear import Embedding, Linear
from ..models.registry import stored_name
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
        for family in getattr(module, "fused", ()):
            names = [f"{path}.{child}" for child in family if isinstance(getattr(module, child, None), Linear)]
            specs = [s for n in names if (s := _spec(model, n, layers)) is not None]
            taken |= set(names)
            if specs:
                units.append(Unit(f"{path}.{'+'.join(s.name.split('.')[-2] for s in specs)}", specs))
        if isinstance(module, Linear | Embedding) and path not in taken:
            spec = _spec(model, path, layers)
            if spec is not None:
                units.append(Unit(path, [spec]))
    return units


def protected_weights(model: LanguageModel) -> set[str]:
    """Weights that modules name in `protected` (gates, decays of recurrences): 16 bits unless the user overrides it."""
    return {
        f"{path}.{child}.weight".removeprefix(".")
        for path, module in model.named_modules()
        for child in getattr(module, "protected", ())
        if isinstance(getattr(module, child, None), Linear)
    }


def key_value_weights(model: LanguageModel) -> set[str]:
    """Weights that modules name in `key_value`: of keys and values, which one token's query reads for many tokens at once."""
    names = {
        f"{path}.{child}.weight".removeprefix(".")
        for path, module in model.named_modules()
        for child in getattr(module, "key_value", ())
        if isinstance(getattr(module, child, None), Linear)
    }
    return {stored_name(model, name) for name in names}


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
