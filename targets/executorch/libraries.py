"""Which of ExecuTorch's libraries a program needs. An app links them whole: each registers its kernels as it is loaded."""

from __future__ import annotations

from collections.abc import Iterable

from ...errors import UserError
from ...system.reading import one_line

FACT = "libraries"
"""The name of this among an artefact's facts: CMake target -> what of it the program calls."""

RUNTIME = "executorch"
"""The runtime itself, which has the kernels `executorch_prim::` and the loader of programs."""

_KERNELS = {
    "executorch_prim": RUNTIME,
    "aten": "optimized_native_cpu_ops_lib",
    "dim_order_ops": "optimized_native_cpu_ops_lib",
    "quantized_decomposed": "quantized_ops_lib",
    "llama": "custom_ops",
}
"""Namespace of a kernel -> the CMake target that registers it."""

_DELEGATES = {"XnnpackBackend": "xnnpack_backend"}


def libraries(kernels: Iterable[str], delegates: Iterable[str]) -> dict[str, list[str]]:
    """CMake target -> the kernels (`aten::where.self`) and delegates that it brings, both sorted.

    Raises UserError for a kernel or a delegate of none of them.
    """
    found: dict[str, set[str]] = {}
    for table, names in ((_KERNELS, kernels), (_DELEGATES, delegates)):
        for name in names:
            library = table.get(name.partition("::")[0])
            if library is None:
                raise UserError(f"{one_line(name, 80)} is in none of ExecuTorch's libraries; export again")
            found.setdefault(library, set()).add(name)
    return {library: sorted(found[library]) for library in sorted(found)}
