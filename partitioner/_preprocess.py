"""Add the scaling and normalisation of 8-bit images to a graph, so that images are sent as they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dsc_split.errors import UsageError
from dsc_split.partitioner.graph._names import unused_name

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["add_uint8_input"]


def add_uint8_input(model: ir.Model, mean: Sequence[float], std: Sequence[float]) -> ir.Model:
    """Change every image input of ``model`` to ``uint8``, and compute ``(x / 255 - mean) / std`` in the graph.

    Args:
        model: Changed in place. An image is a float input of rank 4 whose axis 1, the channels, is as long as
            ``mean``; it keeps its name.
        mean: Mean per channel, of values in 0..1.
        std: Standard deviation per channel, of values in 0..1.

    Returns:
        ``model`` itself.

    Raises:
        UsageError: No input is an image, or ``mean`` and ``std`` are no channel statistics.
    """
    if len(mean) != len(std) or not mean:
        raise UsageError(
            f"--mean has {len(mean)} values and --std has {len(std)}; one per channel was expected of each."
        )
    if not all(map(math.isfinite, [*mean, *std])) or min(std) <= 0:
        raise UsageError(f"--mean {list(mean)} --std {list(std)}: finite numbers were expected, and --std above 0.")
    images = [value for value in model.graph.inputs if _is_image(value, len(mean))]
    if not images:
        found = ", ".join(f"{value.name} {value.dtype} {value.shape}" for value in model.graph.inputs)
        raise UsageError(
            f"--uint8-input: no input is a float image of {len(mean)} channels on axis 1; the inputs are "
            f"{found}. Give --mean and --std with one value per channel, or leave --uint8-input out."
        )
    for image in images:
        _prepend(model.graph, image, mean, std)
    return model


def _is_image(value: ir.Value, channels: int) -> bool:
    return (
        value.dtype is not None
        and value.dtype.is_floating_point()
        and value.shape is not None
        and len(value.shape) == 4
        and value.shape[1] == channels
    )


def _prepend(graph: ir.Graph, image: ir.Value, mean: Sequence[float], std: Sequence[float]) -> None:
    """Replace ``image`` by a ``uint8`` input of the same name and the nodes that normalise it."""
    import onnx_ir as ir

    assert image.name is not None
    assert image.dtype is not None
    made = [*graph.inputs, *(value for node in graph.all_nodes() for value in node.outputs)]
    taken = {*graph.initializers, *(value.name for value in made if value.name)}

    def name(suffix: str) -> str:
        return unused_name(f"{image_name}_{suffix}", taken)

    def constant(suffix: str, values: np.ndarray) -> ir.Value:
        array = values.reshape(1, -1, 1, 1).astype(image_dtype.numpy())
        value = ir.Value(
            name=name(suffix),
            shape=ir.Shape(array.shape),
            type=ir.TensorType(image_dtype),
            const_value=ir.tensor(array, dtype=image_dtype),
        )
        assert value.const_value is not None
        value.const_value.name = value.name
        graph.register_initializer(value)
        return value

    def node(op_type: str, inputs: list[ir.Value], attributes: dict[str, int], suffix: str) -> ir.Node:
        made = ir.node(op_type, inputs, attributes, name=name(f"node_{suffix}"))
        result = made.outputs[0]
        result.name, result.shape, result.type = name(suffix), image.shape, ir.TensorType(image_dtype)
        return made

    image_name, image_dtype = image.name, image.dtype
    mean_array, std_array = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    raw = ir.Value(name=image_name, shape=image.shape, type=ir.TensorType(ir.DataType.UINT8))
    cast = node("Cast", [raw], {"to": int(image_dtype)}, "float")
    scaled = node("Mul", [cast.outputs[0], constant("scale", 1 / (255 * std_array))], {}, "scaled")
    shifted = node("Add", [scaled.outputs[0], constant("offset", -mean_array / std_array)], {}, "normalised")
    ir.convenience.replace_all_uses_with(image, shifted.outputs[0], replace_graph_outputs=True)
    position = next(i for i, value in enumerate(graph.inputs) if value is image)
    graph.inputs[position] = raw
    image.name = name("before")
    first = next(iter(graph), None)
    if first is None:
        graph.extend([cast, scaled, shifted])
    else:
        graph.insert_before(first, [cast, scaled, shifted])
