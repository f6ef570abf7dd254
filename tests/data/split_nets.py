"""Small networks of the kinds that are split in practice."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class UNet(nn.Module):
    """Two levels down and up, with a skip connection over each."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.down2 = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU())
        self.bottom = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU())
        self.up2 = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.mix2 = nn.Conv2d(12, 4, 3, padding=1)
        self.up1 = nn.Upsample(scale_factor=2)
        self.mix1 = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        a = self.down1(image)
        b = self.down2(a)
        c = self.mix2(torch.cat([b, self.up2(self.bottom(b))], 1))
        return self.mix1(torch.cat([a, self.up1(c)], 1))


def unet() -> tuple[nn.Module, Tensor]:
    return UNet(), torch.zeros(1, 3, 32, 32)


class Lstm(nn.Module):
    """A recurrent network whose state comes in and goes out; the batch is on axis 1."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.rnn = nn.LSTM(8, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, (hn, cn) = self.rnn(self.embed(x), (h, c))
        return self.head(y), hn, cn


def lstm() -> nn.Module:
    return Lstm()


class Encoder(nn.Module):
    """A transformer encoder over tokens, with a padding mask as second input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 2)

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(tokens), src_key_padding_mask=padding)[:, 0])


def encoder() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    return Encoder(), (torch.ones(1, 7, dtype=torch.int64), torch.zeros(1, 7, dtype=torch.bool))


class EarlyExit(nn.Module):
    """A classifier with an exit after its first stage."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU())
        self.exit = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        self.stage2 = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU())
        self.final = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        a = self.stage1(image)
        early = self.exit(a)
        return {"early": early, "final": self.final(self.stage2(a))}


def early_exit() -> tuple[nn.Module, Tensor]:
    return EarlyExit(), torch.zeros(1, 3, 16, 16)
