"""Factories of modules as a user writes them: a vision block, a U-Net with attention, and ones that are refused."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """A convolution in groups, a batch norm, and an FFN on channels: the shape of a Next-ViT block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels // 16)
        self.norm = nn.BatchNorm2d(channels)
        self.ln = nn.LayerNorm(channels)
        self.attention = Attention(channels)
        self.fc1, self.act, self.fc2 = nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.norm(self.conv(x))
        batch, channels, height, width = x.shape
        y = self.ln(x.flatten(2).transpose(1, 2))
        y = y + self.attention(y)
        y = self.fc2(self.act(self.fc1(y)))
        return x + y.transpose(1, 2).reshape(batch, channels, height, width)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = parts[0], parts[1], parts[2]
        weights = torch.softmax(torch.matmul(q, k.transpose(-1, -2)) * (width // self.heads) ** -0.5, -1)
        return self.out(torch.matmul(weights, v).transpose(1, 2).reshape(batch, length, width))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.block = Block(32)
        self.down = nn.Conv2d(32, 64, 2, stride=2)
        self.depth = nn.Conv2d(64, 64, 3, padding="same", groups=64, bias=False)
        self.norm, self.act = nn.GroupNorm(4, 64), nn.SiLU()
        self.up = nn.ConvTranspose2d(64, 32, 2, stride=2)
        self.head = nn.Conv2d(32, 16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(self.stem(x))
        return self.head(x + self.up(self.act(self.norm(self.depth(self.down(x))))))


class Speech(nn.Module):
    """Two inputs, one of them a mask; two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(16, 32, 3, stride=2, padding=1, dilation=1)
        self.out = nn.Linear(32, 48)

    def forward(self, frames: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        h = torch.relu(self.conv(frames)).transpose(1, 2)
        logits = self.out(h)
        return {"logits": torch.where(mask.unsqueeze(-1), logits, torch.zeros_like(logits)), "pooled": h.mean(1)}


def settled(module: nn.Module, *shape: int) -> nn.Module:
    """Batch norms with statistics of their own."""
    torch.manual_seed(1)
    module.train()
    with torch.no_grad():
        for _ in range(3):
            module(torch.randn(*shape))
    return module


def unet() -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    return settled(UNet(), 1, 3, 16, 16), [torch.randn(1, 3, 16, 16) for _ in range(3)]


def speech() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    mask = torch.ones(1, 5, dtype=torch.bool)
    mask[:, 3:] = False
    return Speech(), {"frames": torch.randn(1, 16, 10), "mask": mask}


def broken() -> None:
    raise RuntimeError("no weights here")


def not_a_pair() -> nn.Module:
    return nn.Linear(3, 3)


class Undecided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if x.sum() > 0 else x


def undecided() -> tuple[nn.Module, torch.Tensor]:
    return Undecided(), torch.randn(1, 16)


def overlapping() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.ConvTranspose2d(16, 16, 3, stride=2)), torch.randn(1, 16, 4, 4)
