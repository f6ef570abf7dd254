"""Small nets that the tests of sources load by ``FILE.py:FUNCTION``."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Plain(nn.Module):
    """A block, and a second one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Block(3)
        self.shared = Block(3)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(3, 4)

    def forward(self, image):
        x = self.shared(self.shared(self.stem(image)) * 2)
        return self.fc(self.drop(x.mean((2, 3))))


def plain():
    print("the user's own print")
    warnings.warn("the user's own warning", stacklevel=1)
    return Plain()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, 2, batch_first=True)

    def forward(self, x, state):
        y, state = self.lstm(x, state)
        return {"last": y[:, -1], "state": state}


def recurrent():
    # Two layers and a batch of 2: which axis of the state is the batch does not show in its shape.
    return Recurrent(), (torch.randn(2, 5, 4), (torch.zeros(2, 2, 6), torch.zeros(2, 2, 6)))


class Scan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 6)

    def forward(self, x):
        return self.gru(x)[0]


def scan():
    return Scan()


@dataclass
class Output:
    hidden: torch.Tensor
    loss: object = None
    pooled: torch.Tensor | None = None


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens, mask=None, labels=None):
        hidden = self.norm(self.embedding(tokens))
        if mask is not None:
            hidden = hidden * mask[..., None]
        return Output(hidden=hidden, pooled=hidden.mean(1))


def encoder():
    return Encoder(), {"mask": torch.ones(2, 6, dtype=torch.bool), "tokens": torch.ones(2, 6, dtype=torch.int64)}


def encoder_alone():
    return Encoder()


class Iterates(nn.Module):
    def forward(self, x):
        return torch.stack([item * 2 for item in x])


def iterates():
    return Iterates(), torch.randn(2, 3)


class Swaps(nn.Module):
    """Output names are names of inputs; one output is an input, one is a constant, some are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.output_1 = nn.Parameter(torch.ones(3))

    def forward(self, output_0, y):
        return y, output_0 * self.output_1, self.output_1, None, 3, y


def swaps():
    return Swaps(), (torch.randn(2, 3), torch.randn(2, 3))


class Steered(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x + 1
        return x * 2


def steered():
    return Steered(), torch.randn(2, 3)


class Decomposes(nn.Module):
    def forward(self, x):
        return torch.linalg.svd(x)[1]


def decomposes():
    return Decomposes(), torch.randn(2, 3, 4)


def no_module():
    return 3


def fails():
    raise KeyError("no luck")


not_callable = 7


class Complex(nn.Module):
    def forward(self, x):
        return x * 2, (x * 2).abs()


def complex_input():
    return Complex(), torch.randn(2, 4, dtype=torch.complex64)


class Restless(nn.Module):
    def forward(self, x):
        return (x.relu() + torch.randn_like(x)).tanh()


def restless():
    return Restless(), torch.randn(2, 8)


class SwitchesItself(nn.Module):
    """Puts itself into training mode, where a batch of 1 is too small."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(8)

    def forward(self, x):
        self.train()
        return self.bn(x).relu()


def switches_itself():
    return SwitchesItself(), torch.randn(2, 8)


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Linear(4, 4)), torch.randn(2, 4)
