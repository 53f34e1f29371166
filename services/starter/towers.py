"""The two networks. What they read is made by the product's own pre-processing (`embedmesh_encoder`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["AudioTower", "ImageTower"]

DIMENSIONS = 384


class _Residual(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outside)
        self.second = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outside)
        nn.init.zeros_(self.second_norm.weight)
        self.short = (
            nn.Sequential(
                nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity(),
                nn.Conv2d(inside, outside, 1, bias=False),
                nn.BatchNorm2d(outside),
            )
            if stride > 1 or inside != outside
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(y)) + self.short(x))


class ImageTower(nn.Module):
    """A small ResNet: float32 [n, 3, 48, 48] -> [n, 384], not normalised."""

    def __init__(self, widths: Sequence[int] = (32, 64, 128, 224), blocks: Sequence[int] = (1, 2, 2, 1)) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        )
        layers: list[nn.Module] = []
        inside = widths[0]
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            for block in range(count):
                layers.append(_Residual(inside, width, 2 if block == 0 and stage else 1))
                inside = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(2 * inside, DIMENSIONS)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Give the vectors."""
        x = self.body(self.stem(pixel_values))
        return self.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))


class _Residual1d(nn.Module):
    """Two convolutions over time; what lies behind a sound's end stays zero, so company in a batch changes nothing."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(inside, outside, 5, stride, 2, bias=False)
        self.first_norm = nn.BatchNorm1d(outside)
        self.second = nn.Conv1d(outside, outside, 5, 1, 2, bias=False)
        self.second_norm = nn.BatchNorm1d(outside)
        nn.init.zeros_(self.second_norm.weight)
        self.short = (
            nn.Conv1d(inside, outside, 1, stride, bias=False) if stride > 1 or inside != outside else nn.Identity()
        )
        self.stride = stride

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        short = self.short(x)
        mask = mask[:, :, :: self.stride]
        y = F.relu(self.first_norm(self.first(x))) * mask
        return F.relu(self.second_norm(self.second(y)) + short) * mask, mask


class AudioTower(nn.Module):
    """Convolutions over log-mel frames: float32 [n, frames, 64] and int64 [n, frames] -> [n, 384], not normalised.

    Every fourth frame becomes a state; states are pooled by their maximum and by attention.
    """

    def __init__(self, widths: Sequence[int] = (128, 192, 192), blocks: Sequence[int] = (1, 1, 2)) -> None:
        super().__init__()
        layers: list[_Residual1d] = []
        inside = 64
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            for block in range(count):
                layers.append(_Residual1d(inside, width, 2 if block == 0 and stage < 2 else 1))
                inside = width
        self.body = nn.ModuleList(layers)
        self.width = inside
        self.attention = nn.Conv1d(inside, 4, 1)
        self.head = nn.Sequential(nn.Linear(5 * inside, 768), nn.ReLU(), nn.Linear(768, DIMENSIONS))

    def states(self, input_features: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Give the states, [n, width, frames / 4], and which are within the sound, [n, 1, frames / 4]."""
        mask = attention_mask[:, None].to(input_features.dtype)
        x = input_features.transpose(1, 2) * mask
        for layer in self.body:
            x, mask = layer(x, mask)
        return x, mask

    def pooled(self, x: Tensor, mask: Tensor) -> Tensor:
        """Pool states to one vector."""
        weights = (self.attention(x) + (mask - 1) * 1e4).softmax(2)
        attended = (weights @ x.transpose(1, 2)).flatten(1)
        return self.head(torch.cat([attended, x.amax(2)], 1))  # x is at least 0, and 0 where there is nothing

    def forward(self, input_features: Tensor, attention_mask: Tensor) -> Tensor:
        """Give the vectors."""
        return self.pooled(*self.states(input_features, attention_mask))
