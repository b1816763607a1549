"""What both comparisons with transformers share: its model loaded, and where two models first differ.

transformers gets no code of the checkpoint, no pickle and no network.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..system.reading import one_line, shown
from ..system.stages import Stage
from .against import THEIRS
from .report import TOLERANCE


class Unknown(Exception):
    """transformers cannot say what this model computes. The text says why."""


@contextmanager
def their_work(cannot: str) -> Iterator[None]:
    """A part in which transformers is at work: what fails in it is no fault of ours. Raises Unknown."""
    try:
        with Stage(f"{THEIRS}{cannot}"):
            yield
    except Unknown:
        raise
    except Exception as error:  # whatever it stumbles on in a stranger's files, it cannot be compared with
        raise Unknown(f"it cannot {cannot} ({one_line(type(error).__name__)}: {one_line(error, 160)})") from None


def load_theirs(folder: str, auto: str, suffixes: tuple[str, ...] = (), optional: str = "") -> tuple[nn.Module, str]:
    """transformers' model in float32, and its version. Raises Unknown.

    auto: the library's class that finds the model's; suffixes: of `architectures` that are taken before it. optional: what is in
    the names of weights that may be missing.
    """
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    import transformers

    quiet: Any = transformers.logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    names = [n for n in (config.architectures or []) if isinstance(n, str) and suffixes and n.endswith(suffixes)]
    chosen = next((getattr(transformers, n) for n in names if hasattr(transformers, n)), None)
    chosen = chosen or getattr(transformers, auto)
    options = {"trust_remote_code": False} if chosen.__name__.startswith("Auto") else {}
    theirs, info = chosen.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    missing = sorted(name for name in info["missing_keys"] if not optional or optional not in name)
    if missing:
        raise Unknown(f"it does not find {len(missing)} weights ({shown(missing[0], 80)} and the like) in the files")
    return theirs.eval(), str(transformers.__version__)


def random_tokens(vocab: int, config: Mapping[str, Any], batch: int, length: int) -> torch.Tensor:
    """Random token ids [B, S], none of those that stand for something else than text."""
    special = {
        value for key, value in config.items() if key.endswith(("token_id", "token_index")) and type(value) is int
    }
    allowed = torch.tensor([i for i in range(min(vocab, 1 << 16)) if i not in special] or [0])
    generator = torch.Generator().manual_seed(0)
    return allowed[torch.randint(0, len(allowed), (batch, length), generator=generator)]


def stack_of(model: nn.Module, count: int, name: str) -> list[nn.Module]:
    """The layers of transformers' stack of so many layers; [] if none is found."""
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    named = [m for path, m in lists if name in path.split(".")] or [m for _, m in lists]
    return list(named[0]) if named else []


def watched(stacks: Mapping[str, Sequence[nn.Module]], run: Any) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
    """What `run` returns, and of each stack the input of its first layer and the outputs of all."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in stacks}
    hooks = []
    for name, layers in stacks.items():

        def keep(_: nn.Module, __: Any, out: Any, seen: list[torch.Tensor] = seen[name]) -> None:
            seen.append(out if isinstance(out, torch.Tensor) else out[0])

        def first(_: nn.Module, args: Any, kwargs: Any, seen: list[torch.Tensor] = seen[name]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        if layers:
            hooks.append(layers[0].register_forward_pre_hook(first, with_kwargs=True))
            hooks += [layer.register_forward_hook(keep) for layer in layers]
    try:
        return run(), seen
    finally:
        for hook in hooks:
            hook.remove()


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference relative to the largest value of `want`; infinite for other shapes or what is not finite."""
    if got.shape != want.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))


def _side_by_side(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """Gemma 3n's hidden states [streams, B, S, hidden], which lie side by side in ours."""
    return theirs.permute(1, 2, 0, 3).flatten(2) if theirs.ndim == ours.ndim + 1 else theirs


def first_difference(ours: Mapping[str, Sequence[torch.Tensor]], theirs: Mapping[str, Sequence[torch.Tensor]]) -> str:
    """The first part whose output differs, in words."""
    for name in sorted(ours, key=lambda n: n != "encoder"):
        pairs = list(zip(ours[name], theirs.get(name, []), strict=False))
        for i, (got, want) in enumerate(pairs):
            side = _side_by_side(want, got)
            if difference(got[:, : side.shape[1]], side) > TOLERANCE:  # of a sound there may be masked positions behind
                return f"the {name}'s embedding" if i == 0 else f"layer {i - 1} of the {name}"
        if not pairs:
            return f"the {name}, whose layers transformers does not show"
    return "what stands behind the last layer (norm, head or pooling)"
