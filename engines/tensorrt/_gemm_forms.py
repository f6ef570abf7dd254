"""Rewrite a refused matrix product as a 1x1 convolution, as multiply and sum, or in float16.

A product with a fixed matrix is a 1x1 convolution over rows: ``[rows, K]`` is ``[rows, K, 1, 1]``, the matrix is the
kernel ``[N, K, 1, 1]``; the bytes stay the same. ``Reshape`` and ``Transpose`` nodes in the graph make the kernels, and
the builder folds them, so no weight is copied, and external data is not changed.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["PRODUCTS", "Forms", "Names", "NoFormError"]

PRODUCTS = frozenset({"Einsum", "Gemm", "MatMul"})
"""Ops that multiply matrices."""


class NoFormError(Exception):
    """An op has no equal form that SM75 accepts; the message is the reason."""


# ---- products as labelled axes -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Operand:
    """A tensor whose axes have one-letter labels, as in an Einsum."""

    value: ir.Value
    labels: str

    def size(self, label: str) -> int | None:
        """Return the size of an axis, or ``None`` where it is open."""
        shape = self.value.shape
        dim = shape[self.labels.index(label)] if shape is not None else None
        return dim if isinstance(dim, int) else None

    @property
    def is_static(self) -> bool:
        """Whether every size is known."""
        return all(self.size(label) is not None for label in self.labels)

    @property
    def is_constant(self) -> bool:
        """Whether it is a weight."""
        return self.value.const_value is not None

    def open_axes(self, labels: str) -> int:
        """Count the axes among ``labels`` whose size is open."""
        return sum(self.size(label) is None for label in labels)

    def elements(self, labels: str) -> int:
        """Multiply the sizes of some axes; return -1, which Reshape infers, where one is open."""
        sizes = [self.size(label) for label in labels]
        return -1 if None in sizes else math.prod(size for size in sizes if size is not None)


def _matmul_labels(left: ir.Value, right: ir.Value, node: ir.Node) -> tuple[str, str, str]:
    """Label the axes of a ``MatMul``; an axis of size 1 that is broadcast gets a separate label."""
    shapes = [[dim if isinstance(dim, int) else None for dim in value.shape or ()] for value in (left, right)]
    matrices = ["mk"[-len(shapes[0]) :], "kn"[: len(shapes[1])]]
    batch = [list(reversed(shape[: -len(matrix)])) for shape, matrix in zip(shapes, matrices, strict=True)]
    labels, out = ["", ""], ""
    for axis in range(max(map(len, batch))):
        shared, own = string.ascii_uppercase[axis], string.ascii_lowercase[axis]
        here = [sizes[axis] if axis < len(sizes) else -1 for sizes in batch]  # -1: no such axis
        stretched = (1 if here[1] == 1 else 0) if 1 in here and -1 not in here else None
        for place in (0, 1):
            if here[place] != -1:
                labels[place] = (own if place == stretched else shared) + labels[place]
        out = shared + out
    return labels[0] + matrices[0], labels[1] + matrices[1], out + "".join(matrices).replace("k", "")


def _einsum_labels(left: ir.Value, right: ir.Value, node: ir.Node) -> tuple[str, str, str]:
    """Read the labels of an ``Einsum`` of two tensors."""
    equation = "".join(node.attributes.get_string("equation", "").split())
    terms, arrow, out = equation.partition("->")
    first, _, second = terms.partition(",")
    if "." in equation:
        raise NoFormError(f"its equation {equation!r} leaves axes unnamed")
    if any(len(set(labels)) < len(labels) for labels in (first, second)):
        raise NoFormError(f"its equation {equation!r} takes a diagonal")
    return first, second, out if arrow else "".join(sorted(set(first) ^ set(second)))


# ---- the forms ---------------------------------------------------------------------------------------------


class Names:
    """Makes names that are not used in a model."""

    def __init__(self, model: ir.Model) -> None:
        self._taken: set[str | None] = set()
        for graph in model.graphs():
            for value in (*graph.inputs, *graph.initializers.values()):
                self._taken.add(value.name)
            for node in graph:
                self._taken.update((node.name, *(value.name for value in node.outputs)))

    def new(self, stem: str) -> str:
        """Return an unused name that begins with ``stem``."""
        name, number = stem, 1
        while name in self._taken:
            number += 1
            name = f"{stem}.{number}"
        self._taken.add(name)
        return name


class Forms:
    """Makes the nodes that replace one refused node."""

    def __init__(self, node: ir.Node, graph: ir.Graph, names: Names) -> None:
        self._node = node
        self._graph = graph
        self._names = names
        self._nodes: list[ir.Node] = []
        self._constants: list[ir.Value] = []

    def replace(self, results: Sequence[ir.Value]) -> None:
        """Replace the node by the new nodes; its outputs keep their names."""
        import onnx_ir as ir

        for value in self._constants:
            self._graph.register_initializer(value)
        ir.convenience.replace_nodes_and_values(
            self._graph, self._node, [self._node], self._nodes, self._node.outputs, results
        )

    def halve(self) -> list[ir.Value]:
        """Compute the node in float16, between casts."""
        import onnx_ir as ir

        cast: dict[ir.Value, ir.Value] = {}
        for value in self._node.inputs:
            if value is not None and value not in cast and value.dtype in (None, ir.DataType.FLOAT):
                cast[value] = self._op("Cast", value, to=int(ir.DataType.FLOAT16))
        inner = ir.Node(
            self._node.domain,
            self._node.op_type,
            [value if value is None else cast.get(value, value) for value in self._node.inputs],
            self._node.attributes,
            num_outputs=len(self._node.outputs),
            name=self._names.new(f"{self._node.name}.float16"),
        )
        for made, value in zip(inner.outputs, self._node.outputs, strict=True):
            made.name = self._names.new(f"{value.name}.float16") if value.name else ""
        self._nodes.append(inner)
        return [self._op("Cast", made, to=int(ir.DataType.FLOAT)) if made.name else made for made in inner.outputs]

    def convert(self, *, sums: bool) -> ir.Value:
        """Compute the node in float32 by ops that SM75 accepts.

        Args:
            sums: Whether a product of two computed tensors may be multiply and sum.

        Raises:
            NoFormError: There is no equal form; nothing was made.
        """
        values = [value for value in self._node.inputs if value is not None]
        if self._node.op_type == "Gemm":
            return self._gemm(*values, sums=sums)
        if len(values) != 2:
            raise NoFormError(f"it multiplies {len(values)} tensors at once")
        unknown = [value.name for value in values if value.shape is None]
        if unknown:
            raise NoFormError(f"the shape of {unknown[0]!r} is not known")
        label = _matmul_labels if self._node.op_type == "MatMul" else _einsum_labels
        left, right, out = label(values[0], values[1], self._node)
        return self._contract(_Operand(values[0], left), _Operand(values[1], right), out, sums=sums)

    def _gemm(self, a: ir.Value, b: ir.Value, c: ir.Value | None = None, *, sums: bool) -> ir.Value:
        attributes = self._node.attributes
        alpha, beta = (attributes.get_float(name, 1.0) for name in ("alpha", "beta"))
        left = _Operand(a, "km" if attributes.get_int("transA", 0) else "mk")
        right = _Operand(b, "nk" if attributes.get_int("transB", 0) else "kn")
        bias = c if alpha == beta == 1.0 and c is not None and _is_bias(c, right) else None
        result = self._contract(left, right, "mn", sums=sums, bias=bias)
        if alpha != 1.0:
            result = self._op("Mul", result, self._constant(np.float32(alpha)))
        if c is None or bias is not None:
            return result
        if beta != 1.0:
            c = self._op("Mul", c, self._constant(np.float32(beta)))
        return self._op("Add", result, c)

    def _contract(
        self, left: _Operand, right: _Operand, out: str, *, sums: bool, bias: ir.Value | None = None
    ) -> ir.Value:
        """Multiply two tensors, and sum over the labels that ``out`` lacks.

        Args:
            left: One tensor.
            right: The other.
            out: Labels of the result, in order.
            sums: Whether a product of two computed tensors may be multiply and sum.
            bias: Added along the axis that only ``right`` has; ``right`` is then a constant matrix.

        Raises:
            NoFormError: There is no equal form; nothing was made.
        """
        for matrix, rows in sorted(((right, left), (left, right)), key=lambda pair: not pair[0].is_constant):
            if matrix.is_static and _is_one_matrix(matrix, rows, out):
                return self._convolve(rows, matrix, out, bias)
        if sums:
            return self._multiply_and_sum(left, right, out)
        if left.is_constant or right.is_constant:
            raise NoFormError("it has one matrix per group, and a 1x1 convolution has one kernel")
        raise NoFormError("it multiplies two computed tensors, and a 1x1 convolution has one kernel")

    def _convolve(self, rows: _Operand, matrix: _Operand, out: str, bias: ir.Value | None) -> ir.Value:
        """Multiply by one matrix: a 1x1 convolution; its channels are the summed axes."""
        summed = "".join(label for label in rows.labels if label in matrix.labels)
        made = "".join(label for label in matrix.labels if label not in summed and label in out)
        before, found, after = rows.labels.partition(summed) if summed else (rows.labels, "", "")
        if found != summed or (rows.open_axes(before) and rows.open_axes(after)):
            before, after = "".join(label for label in rows.labels if label not in summed), ""
        kept = "".join(label for label in before + made + after if label in out)
        single = "".join(label for label in matrix.labels if label not in summed + made)
        kernel = self._transpose(matrix, single + made + summed)
        kernel = self._reshape(kernel, [matrix.elements(made), matrix.elements(summed), 1, 1])
        image = self._transpose(rows, before + summed + after)
        image = self._reshape(image, [rows.elements(before), matrix.elements(summed), rows.elements(after), 1])
        biases = [] if bias is None else [self._reshape(bias, [matrix.elements(made)])]
        result = self._op("Reshape", self._op("Conv", image, kernel, *biases), self._sizes(rows, matrix, kept))
        return self._transpose(_Operand(result, kept), out)

    def _sizes(self, rows: _Operand, matrix: _Operand, labels: str) -> ir.Value:
        """Return the sizes of some axes of two tensors as a shape for Reshape; the second tensor is static."""
        sizes = [rows.size(label) if label in rows.labels else matrix.size(label) for label in labels]
        if sizes.count(None) <= 1:
            return self._constant(np.array([-1 if size is None else size for size in sizes], np.int64))
        known = self._constant(np.array([matrix.size(label) for label in matrix.labels], np.int64))
        every = self._op("Concat", self._op("Shape", rows.value), known, axis=0)
        wanted = [(rows.labels + matrix.labels).index(label) for label in labels]
        return self._op("Gather", every, self._constant(np.array(wanted, np.int64)), axis=0)

    def _multiply_and_sum(self, left: _Operand, right: _Operand, out: str) -> ir.Value:
        """Broadcast and multiply two tensors, and sum; the compiler fuses both steps."""
        summed = "".join(dict.fromkeys(label for label in left.labels + right.labels if label not in out))
        order = out[:-1] + summed + out[-1:]
        factors = []
        for operand in (left, right):
            factor = self._transpose(operand, "".join(label for label in order if label in operand.labels))
            missing = [axis for axis, label in enumerate(order) if label not in operand.labels]
            if missing:
                factor = self._op("Unsqueeze", factor, self._constant(np.array(missing, np.int64)))
            factors.append(factor)
        result = self._op("Mul", *factors)
        if not summed:
            return result
        axes = self._constant(np.array([order.index(label) for label in summed], np.int64))
        return self._op("ReduceSum", result, axes, keepdims=0)

    # ---- single ops ----------------------------------------------------------------------------------------

    def _op(self, op_type: str, *inputs: ir.Value, **attributes: int | Sequence[int]) -> ir.Value:
        import onnx_ir as ir

        name = self._names.new(f"{self._node.name}.{op_type.lower()}")
        node = ir.node(op_type, inputs, attributes, name=name)
        node.outputs[0].name = self._names.new(f"{name}.output")
        self._nodes.append(node)
        return node.outputs[0]

    def _constant(self, array: np.ndarray | np.generic) -> ir.Value:
        import onnx_ir as ir

        name = self._names.new(f"{self._node.name}.constant")
        value = ir.val(name, const_value=ir.tensor(np.asarray(array), name=name))
        self._constants.append(value)
        return value

    def _reshape(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        return self._op("Reshape", value, self._constant(np.array(shape, np.int64)))

    def _transpose(self, operand: _Operand, labels: str) -> ir.Value:
        """Transpose a tensor into the axis order of ``labels``."""
        if operand.labels == labels:
            return operand.value
        return self._op("Transpose", operand.value, perm=[operand.labels.index(label) for label in labels])


def _is_one_matrix(matrix: _Operand, rows: _Operand, out: str) -> bool:
    """Return whether every row is multiplied by the same matrix, and no other axis is summed."""
    shared = any(label in out for label in matrix.labels if label in rows.labels)
    alone = [(x, label) for x, y in ((matrix, rows), (rows, matrix)) for label in x.labels if label not in y.labels]
    return not shared and all(label in out or x.size(label) == 1 for x, label in alone)


def _is_bias(c: ir.Value, right: _Operand) -> bool:
    """Return whether the last input of a ``Gemm`` is one constant for each column of a constant matrix."""
    if c.const_value is None or not right.is_constant:
        return False
    *ones, last = c.const_value.shape.numpy() or (1,)
    return last == right.size("n") and all(size == 1 for size in ones)
