"""A user's modules in forms that every backend computes right: linears over patches, norms and activations by hand.

Each computes the same as PyTorch's own; a test compares them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...errors import UserError
from ..layers.activations import gelu_tanh
from ..layers.linear import Embedding, Linear


def replaced(module: nn.Module, source: str) -> nn.Module:
    """`module` with its linears, embeddings, convolutions, norms and activations replaced in place; weights are shared.

    source: what errors name. Raises UserError for a convolution that has no such form.
    """
    replacement: dict[int, nn.Module] = {}

    def of(path: str, old: nn.Module) -> nn.Module:
        if id(old) not in replacement:
            convert = _TABLE.get(type(old))
            try:
                replacement[id(old)] = old if convert is None else convert(old)
            except UserError as error:
                raise UserError(f"-m {source}: {path or 'the module'}: {error}") from None
        return replacement[id(old)]

    new = of("", module)
    if new is not module:
        return new.eval()
    for path, parent in list(module.named_modules()):
        if id(parent) in replacement and replacement[id(parent)] is not parent:
            continue  # it is replaced, so its children are ours
        for name, child in [(n, c) for n, c in parent._modules.items() if c is not None]:
            new = of(f"{path}.{name}".strip("."), child)
            if new is not child:
                setattr(parent, name, new.eval())
    return module


def tied(module: nn.Module, prefix: str) -> dict[str, str]:
    """Alias -> stored name of each parameter that several modules share; `prefix` stands before both."""
    first: dict[int, str] = {}
    aliases = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        if first.setdefault(id(p), name) != name:
            aliases[prefix + name] = prefix + first[id(p)]
    return aliases


def _shared(new: Any, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    """`new` with these values as parameters that need no gradient."""
    new.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight.detach(), False)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach(), False)
    return new


def _linear(old: nn.Linear) -> Linear:
    return _shared(Linear(old.in_features, old.out_features, old.bias is not None), old.weight, old.bias)  # type: ignore[no-any-return]


def _embedding(old: nn.Embedding) -> Embedding:
    if old.max_norm is not None:
        raise UserError("an embedding with max_norm changes its weights as it runs; leave max_norm out")
    return _shared(Embedding(old.num_embeddings, old.embedding_dim), old.weight)  # type: ignore[no-any-return]


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1])) if isinstance(value, tuple) else (int(value), int(value))


class Conv2d(nn.Module):
    """Convolution of x [B, C, H, W]: shifted views of the padded input, one for each tap, side by side, times a matrix.

    With one group `patches` is a `Linear` over [C * taps], which is quantized as any other. With more there is a product for
    each group, at 16 bits; a depthwise convolution is a sum over taps.
    """

    def __init__(self, old: nn.Conv2d) -> None:
        super().__init__()
        self.kernel, self.stride, self.dilation = _pair(old.kernel_size), _pair(old.stride), _pair(old.dilation)
        if isinstance(old.padding, str):
            total = [d * (k - 1) if old.padding == "same" else 0 for d, k in zip(self.dilation, self.kernel)]
            self.before, self.after = tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
        else:
            self.before = self.after = _pair(old.padding)
        if old.padding_mode != "zeros":
            raise UserError(f"padding_mode '{old.padding_mode}' is not supported; pad with zeros")
        self.groups, self.out_channels = old.groups, old.out_channels
        weight = old.weight.detach()
        # Taps first, channels within, as the views stand side by side.
        rows = weight.permute(0, 2, 3, 1).reshape(old.out_channels, -1).contiguous()
        if self.groups == 1:
            self.patches = _shared(Linear(rows.shape[1], rows.shape[0], old.bias is not None), rows, old.bias)
        else:
            self.weight = nn.Parameter(rows, False)
            self.bias = None if old.bias is None else nn.Parameter(old.bias.detach(), False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 2, 3, 1)  # channels last: they are the inputs of the linear
        x = nn.functional.pad(x, (0, 0, self.before[1], self.after[1], self.before[0], self.after[0]))
        height = (x.shape[1] - self.dilation[0] * (self.kernel[0] - 1) - 1) // self.stride[0] + 1
        width = (x.shape[2] - self.dilation[1] * (self.kernel[1] - 1) - 1) // self.stride[1] + 1
        views = []
        for i in range(self.kernel[0]):
            for j in range(self.kernel[1]):
                y, x_start = i * self.dilation[0], j * self.dilation[1]
                rows = x[:, y : y + (height - 1) * self.stride[0] + 1 : self.stride[0]]
                views.append(rows[:, :, x_start : x_start + (width - 1) * self.stride[1] + 1 : self.stride[1]])
        if self.groups == 1:
            out = self.patches(torch.cat(views, -1) if len(views) > 1 else views[0])
            return out.permute(0, 3, 1, 2)  # type: ignore[no-any-return]
        out = self._grouped(views)
        return (out if self.bias is None else out + self.bias.to(out.dtype)).permute(0, 3, 1, 2)

    def _grouped(self, views: list[torch.Tensor]) -> torch.Tensor:
        taps = self.weight.to(views[0].dtype).reshape(self.out_channels, len(views), -1)  # [O, taps, C / groups]
        if taps.shape[2] == 1 and self.out_channels == self.groups:
            out = views[0] * taps[:, 0, 0]
            for tap in range(1, len(views)):
                out = out + views[tap] * taps[:, tap, 0]
            return out
        size = views[0].shape[3] // self.groups
        per_group = self.out_channels // self.groups
        products = []
        for g in range(self.groups):
            inputs = torch.cat([v[..., g * size : (g + 1) * size] for v in views], -1)
            products.append(torch.matmul(inputs, taps[g * per_group : (g + 1) * per_group].reshape(per_group, -1).t()))
        return torch.cat(products, -1)


class Conv1d(nn.Module):
    """Convolution of x [B, C, L], as `Conv2d` with one row."""

    def __init__(self, old: nn.Conv1d) -> None:
        super().__init__()
        same = isinstance(old.padding, str)
        flat = nn.Conv2d(
            old.in_channels,
            old.out_channels,
            (1, int(old.kernel_size[0])),
            (1, int(old.stride[0])),
            old.padding if same else (0, int(old.padding[0])),  # type: ignore[arg-type]
            (1, int(old.dilation[0])),
            old.groups,
            old.bias is not None,
            old.padding_mode,
            device="meta",
        )
        flat.weight = nn.Parameter(old.weight.detach().unsqueeze(2), False)
        flat.bias = None if old.bias is None else nn.Parameter(old.bias.detach(), False)
        self.row = Conv2d(flat)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.row(x.unsqueeze(2)).squeeze(2)  # type: ignore[no-any-return]


class ConvTranspose2d(nn.Module):
    """Upsampling with patches that do not overlap (kernel = stride): a linear computes each pixel's patch."""

    def __init__(self, old: nn.ConvTranspose2d) -> None:
        super().__init__()
        self.kernel = _pair(old.kernel_size)
        apart = _pair(old.stride) == self.kernel and _pair(old.padding) == _pair(old.output_padding) == (0, 0)
        if not apart or old.groups != 1 or _pair(old.dilation) != (1, 1):
            raise UserError("a transposed convolution needs kernel = stride, no padding and one group; others overlap")
        self.out_channels = old.out_channels
        rows = old.weight.detach().permute(2, 3, 1, 0).reshape(-1, old.in_channels).contiguous()
        bias = None if old.bias is None else old.bias.detach().repeat(self.kernel[0] * self.kernel[1])
        self.patches = _shared(Linear(old.in_channels, rows.shape[0], bias is not None), rows, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = x.shape
        up, across = self.kernel
        out = self.patches(x.permute(0, 2, 3, 1)).reshape(batch, height, width, up, across, self.out_channels)
        out = out.permute(0, 5, 1, 3, 2, 4)
        return out.reshape(batch, self.out_channels, height * up, width * across)  # type: ignore[no-any-return]


class LayerNorm(nn.Module):
    """Layer normalisation over the last dimensions, by hand."""

    def __init__(self, old: nn.LayerNorm) -> None:
        super().__init__()
        self.dims, self.eps = tuple(range(-len(old.normalized_shape), 0)), old.eps
        self.weight = None if old.weight is None else nn.Parameter(old.weight.detach(), False)
        self.bias = None if old.bias is None else nn.Parameter(old.bias.detach(), False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(self.dims, keepdim=True)
        out = centred * torch.rsqrt((centred * centred).mean(self.dims, keepdim=True) + self.eps)
        if self.weight is not None:
            out = out * self.weight.to(x.dtype)
        return out if self.bias is None else out + self.bias.to(x.dtype)


class GroupNorm(nn.Module):
    """Group normalisation of x [B, C, …], by hand."""

    def __init__(self, old: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.eps, self.channels = old.num_groups, old.eps, old.num_channels
        self.weight = None if old.weight is None else nn.Parameter(old.weight.detach(), False)
        self.bias = None if old.bias is None else nn.Parameter(old.bias.detach(), False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grouped = x.reshape(x.shape[0], self.groups, -1)
        centred = grouped - grouped.mean(2, keepdim=True)
        out = (centred * torch.rsqrt((centred * centred).mean(2, keepdim=True) + self.eps)).reshape(x.shape)
        spread = (1, self.channels, *[1] * (x.dim() - 2))
        if self.weight is not None:
            out = out * self.weight.to(x.dtype).reshape(spread)
        return out if self.bias is None else out + self.bias.to(x.dtype).reshape(spread)


class BatchNorm(nn.Module):
    """Batch normalisation at inference: a factor and an offset for each channel."""

    def __init__(self, old: Any) -> None:
        super().__init__()
        if old.running_mean is None or old.running_var is None:
            raise UserError("a batch norm without running statistics normalises by its batch; train it with them")
        factor = torch.rsqrt(old.running_var + old.eps)
        if old.weight is not None:
            factor = factor * old.weight.detach()
        offset = -old.running_mean * factor
        self.factor = nn.Parameter(factor, False)
        self.offset = nn.Parameter(offset if old.bias is None else offset + old.bias.detach(), False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spread = (1, -1, *[1] * (x.dim() - 2))
        return x * self.factor.to(x.dtype).reshape(spread) + self.offset.to(x.dtype).reshape(spread)


class Pointwise(nn.Module):
    """An activation as a plain function."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.erf(x * 0.7071067811865476))


def _silu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


class Nothing(nn.Module):
    """The identity, for dropout at inference."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


_TABLE: dict[type, Callable[[Any], nn.Module]] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.ConvTranspose2d: ConvTranspose2d,
    nn.LayerNorm: LayerNorm,
    nn.GroupNorm: GroupNorm,
    nn.BatchNorm1d: BatchNorm,
    nn.BatchNorm2d: BatchNorm,
    nn.GELU: lambda old: Pointwise(_gelu if old.approximate == "none" else gelu_tanh),
    nn.SiLU: lambda old: Pointwise(_silu),
    nn.Dropout: lambda old: Nothing(),
    nn.Dropout2d: lambda old: Nothing(),
    nn.Identity: lambda old: Nothing(),
}
"""Exact type of a module -> its replacement. A module of another type stays, and its children are replaced."""
