"""What a plan is built from: the shapes of a profile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dsc_split.bundle import TensorInfo
from dsc_split.engines._engine_file import ShapeBounds
from dsc_split.engines.tensorrt._build import Shapes, profile_shapes
from dsc_split.errors import BackendError

LARGEST = 2**31 - 1


def tensor(name: str, size: int) -> TensorInfo:
    """Describe a float32 tensor of ``[batch, size]``."""
    return TensorInfo(name=name, dtype="float32", shape=("batch", size), elements_by_batch=(size, 0), itemsize=4)


def shapes_of(tensors: dict[str, TensorInfo], profile: tuple[int, int, int]) -> Shapes:
    """Return the shapes of a network ``x -> y`` of which the bundle knows some tensors."""
    parsed: Any = SimpleNamespace(inputs=[SimpleNamespace(name="x")], outputs=[SimpleNamespace(name="y")])
    return profile_shapes(parsed, tensors, profile)


def test_an_input_has_a_shape_at_each_batch_of_the_profile() -> None:
    shapes = shapes_of({"x": tensor("x", 3), "y": tensor("y", 1)}, (1, 8, 64))

    assert shapes == {"x": ShapeBounds(min=(1, 3), opt=(8, 3), max=(64, 3))}


def test_a_tensor_of_as_many_elements_as_are_taken_has_a_shape() -> None:
    shapes = shapes_of({"x": tensor("x", 1), "y": tensor("y", 1)}, (1, 1, LARGEST))

    assert shapes["x"].max == (LARGEST, 1)


@pytest.mark.parametrize(("name", "x", "y"), [("x", 3, 1), ("y", 1, 3)])
def test_a_tensor_of_more_elements_than_are_taken_is_refused_by_name(name: str, x: int, y: int) -> None:
    batch = LARGEST // 3 + 1

    with pytest.raises(BackendError) as caught:
        shapes_of({"x": tensor("x", x), "y": tensor("y", y)}, (1, 8, batch))

    assert str(caught.value).startswith(
        f"tensor {name!r} has {3 * batch} elements at batch {batch}; at most {LARGEST} can be had."
    )


def test_an_input_that_the_bundle_does_not_know_is_refused_by_name() -> None:
    with pytest.raises(BackendError, match=r"input 'x' is not in the bundle's manifest"):
        shapes_of({"y": tensor("y", 1)}, (1, 1, 1))
