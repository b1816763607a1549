"""How an `edgewright::` op is defined: once, by its reference and its fake.

The reference is plain torch. Its name is the op's name and its signature is the op's schema; it is what the op computes in
eager mode, and it is the op's decomposition for a backend that has no lowering for the op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

DECOMPOSITIONS: dict[torch._ops.OpOverload, Callable[..., Any]] = {}
"""Each op with its reference, as `ExportedProgram.run_decompositions` takes it."""

_LIBRARY = torch.library.Library("edgewright", "DEF")  # type: ignore[no-untyped-call]

Reference = TypeVar("Reference", bound=Callable[..., Any])


def define(
    *, fake: Callable[..., Tensor | tuple[Tensor, ...]], eager: Callable[..., Any] | None = None
) -> Callable[[Reference], Reference]:
    """Register the decorated function as the op `edgewright::<its name>`, and return the function itself.

    The function takes tensors, numbers and optional tensors, and changes none of its arguments. fake: the op's arguments ->
    empty outputs with the shapes, types and strides of the real ones. eager: computes the op in eager mode where the
    reference alone would take too much memory.
    """

    def register(reference: Reference) -> Reference:
        # Not `torch.library.custom_op`: that imports torch._dynamo at the first call, and costs more than the op at each.
        name, schema = reference.__name__, torch.library.infer_schema(reference, mutates_args=())
        _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name, eager or reference, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"edgewright::{name}", fake, lib=_LIBRARY)
        DECOMPOSITIONS[getattr(torch.ops.edgewright, reference.__name__).default] = reference
        return reference

    return register
