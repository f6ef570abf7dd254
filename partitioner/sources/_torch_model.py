"""A PyTorch model that is ready to be exported, and PyTorch's errors in one line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["TorchModel", "describe"]


@dataclass(frozen=True, kw_only=True)
class TorchModel:
    """A PyTorch module that is ready to be exported; its inputs are still to be found."""

    module: nn.Module
    """In evaluation mode, on the CPU."""
    name: str
    """Readable name."""
    weights_origin: str
    """Where the weights came from, in words for the manifest."""
    initialised: bool
    """Whether the weights seem to be initialised only; BatchNorm may then be recalibrated."""
    example: tuple[tuple[object, ...], Mapping[str, object]] | None = None
    """Positional and keyword arguments to call it with, of any batch size."""
    image_shape: tuple[int, ...] | None = None
    """Shape of the first input per sample, from the model's own configuration."""
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """Mean and standard deviation per channel, from the model's own configuration."""


def describe(error: BaseException) -> str:
    """Return the type and message of an exception in one short line."""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
    if len(text) > 300:
        text = text[:297] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
