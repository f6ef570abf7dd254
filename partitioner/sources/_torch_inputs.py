"""Arguments and results of a PyTorch module: named tensors, and which axis of each is the batch."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from dsc_split.bundles._samples import load_sample, make_array
from dsc_split.errors import ExportError, ModelFileError, UsageError
from dsc_split.partitioner.sources._options import InputShape, SourceOptions, parse_input_shapes

if TYPE_CHECKING:
    import torch

    from dsc_split.partitioner.sources._torch_model import TorchModel

__all__ = ["TorchInputs", "candidate_inputs", "named_outputs"]

MAX_CANDIDATES = 64
"""How many placements of the batch axes are tried if the inputs allow several."""

Arguments = tuple[tuple[object, ...], dict[str, object]]
"""Positional and keyword arguments of a call."""
Tree = Any
"""A tensor, or containers of tensors nested in any way."""


@dataclass(frozen=True, kw_only=True)
class TorchInputs:
    """The arguments of a call. Their tensors have names and a batch axis; other values are passed on as they are."""

    args: tuple[object, ...]
    """Positional arguments, as in the example."""
    kwargs: dict[str, object]
    """Keyword arguments, in the order of the signature."""
    positional: tuple[str, ...]
    """Names of the parameters that take one positional argument each."""
    variadic: str
    """Name of the parameter that takes all further positional arguments."""
    names: tuple[str, ...] = ()
    """Names of the tensors in the arguments, in the order in which the exporter takes them."""
    axes: tuple[int | None, ...] = ()
    """The batch axis of each tensor; ``None`` if it does not depend on the batch."""

    def by_parameter(self) -> dict[str, object]:
        """Return the arguments by parameter name, in order."""
        named = dict(zip(self.positional, self.args, strict=False))
        rest = self.args[len(self.positional) :]
        return named | ({self.variadic: rest} if rest else {}) | self.kwargs

    def tensors(self) -> list[torch.Tensor]:
        """List the tensors of the example."""
        from torch.utils import _pytree

        return [leaf for leaf in _pytree.tree_leaves((self.args, self.kwargs)) if _is_tensor(leaf)]

    def own_batch(self) -> int:
        """Return the batch size of the example."""
        pairs = zip(self.tensors(), self.axes, strict=True)
        return next(tensor.shape[axis] for tensor, axis in pairs if axis is not None)

    def replaced(self, replacements: Sequence[object], *, clear_others: bool = False) -> TorchInputs:
        """Replace every tensor, in order; ``clear_others`` replaces all other values by ``None``."""
        from torch.utils import _pytree

        leaves, spec = _pytree.tree_flatten((self.args, self.kwargs))
        rest = iter(replacements)
        filled = [next(rest) if _is_tensor(leaf) else None if clear_others else leaf for leaf in leaves]
        args, kwargs = _pytree.tree_unflatten(filled, spec)
        return dataclasses.replace(self, args=args, kwargs=kwargs)

    def at_batch(self, batch: int, seed: int | None = None) -> Arguments:
        """Return the arguments at a batch size: the example, repeated or cut; with ``seed``, floats are random."""
        import torch

        tensors = []
        for index, (tensor, axis) in enumerate(zip(self.tensors(), self.axes, strict=True)):
            if axis is not None:
                tensor = tensor.index_select(axis, torch.arange(batch) % tensor.shape[axis])
            if seed is not None and tensor.is_floating_point():
                made = make_array(tuple(tensor.shape), np.dtype(np.float32), (seed, index))
                tensor = torch.from_numpy(made).to(tensor.dtype)
            tensors.append(tensor)
        filled = self.replaced(tensors)
        return filled.args, filled.kwargs

    def from_arrays(self, feeds: Mapping[str, np.ndarray]) -> Arguments:
        """Return the arguments, with tensors from arrays by name."""
        filled = self.replaced(
            [_from_array(feeds[name], example) for name, example in zip(self.names, self.tensors(), strict=True)]
        )
        return filled.args, filled.kwargs

    def dynamic_shapes(self, batch: object) -> dict[str, object]:
        """Return which dimensions are free, by parameter, as the exporter takes it.

        Args:
            batch: The free dimension, a ``torch.export.Dim``.
        """
        marks = [None if axis is None else {axis: batch} for axis in self.axes]
        return self.replaced(marks, clear_others=True).by_parameter()

    def describe(self, batch: int) -> str:
        """Name every tensor with its shape at a batch size, for messages."""
        words = []
        for name, tensor, axis in zip(self.names, self.tensors(), self.axes, strict=True):
            shape = [batch if index == axis else size for index, size in enumerate(tensor.shape)]
            words.append(f"{name} {shape} {str(tensor.dtype).removeprefix('torch.')}")
        return ", ".join(words)


def candidate_inputs(model: TorchModel, options: SourceOptions) -> list[TorchInputs]:
    """Make inputs from the example, the sample, ``--input-shape`` and the model's configuration.

    Returns:
        One or several, the likeliest first; if the batch axes are not stated, they differ in these.

    Raises:
        UsageError: The shape of an input is not known, or the model has no input of a name that was given.
        ModelFileError: The sample does not fit.
    """
    shapes = {shape.name: shape for shape in parse_input_shapes(options.input_shapes)}
    sample = load_sample(options.sample) if options.sample is not None else {}
    parameters = list(inspect.signature(model.module.forward).parameters.values())
    args, kwargs = model.example or _make_arguments(model, parameters, shapes, sample)
    if args and not kwargs and isinstance(args[-1], dict) and len(args) <= len(parameters):
        # The exporter would take a dict that comes last for keyword arguments.
        args, kwargs = args[:-1], {parameters[len(args) - 1].name: args[-1]}
    order = {parameter.name: place for place, parameter in enumerate(parameters)}
    variadic = next((p.name for p in parameters if p.kind == p.VAR_POSITIONAL), "args")
    inputs = TorchInputs(
        args=_to_torch(args),
        kwargs=_to_torch({name: kwargs[name] for name in sorted(kwargs, key=lambda name: order.get(name, len(order)))}),
        positional=tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)),
        variadic=variadic,
    )
    inputs = dataclasses.replace(inputs, names=_tensor_names(inputs))
    if not inputs.names:
        raise UsageError(f"the example inputs of {model.name!r} hold no tensor. Return (module, example inputs).")
    if None in shapes:
        if len(inputs.names) > 1:
            raise UsageError(
                f"--input-shape without a name, and {model.name!r} has inputs "
                f"{', '.join(map(repr, inputs.names))}. Give NAME=SHAPE."
            )
        shapes[inputs.names[0]] = shapes.pop(None)
    for name in [*shapes, *sample]:
        if name not in inputs.names:
            raise UsageError(
                f"{model.name!r} has no input {name!r}; its inputs are {', '.join(map(repr, inputs.names))}."
            )
    inputs = inputs.replaced(
        [
            _override(name, tensor, shapes.get(name), sample.get(name), options.seed)
            for name, tensor in zip(inputs.names, inputs.tensors(), strict=True)
        ]
    )
    return [dataclasses.replace(inputs, axes=axes) for axes in _batch_axes(inputs, shapes)]


def _make_arguments(
    model: TorchModel,
    parameters: list[inspect.Parameter],
    shapes: Mapping[str | None, InputShape],
    sample: Mapping[str, np.ndarray],
) -> Arguments:
    """Make arguments for a module that came without example inputs."""
    import torch

    plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    known = [p.name for p in plain]
    for name in [*filter(None, shapes), *sample]:
        if name not in known:
            raise UsageError(f"{model.name!r} has no input {name!r}; its inputs are {', '.join(map(repr, known))}.")
    required = [p.name for p in plain if p.default is p.empty]
    wanted = [name for name in known if name in required or name in shapes or name in sample]
    if not wanted:
        raise UsageError(
            f"the inputs of {model.name!r} cannot be told from its forward. Return (module, example inputs)."
        )
    arguments: dict[str, object] = {}
    for name in wanted:
        if name in sample:
            arguments[name] = sample[name]
            continue
        shape = shapes.get(name) or (shapes.get(None) if len(wanted) == 1 else None)
        if shape is not None:
            arguments[name] = torch.zeros(shape.at(2))
        elif model.image_shape is not None and name == wanted[0]:
            arguments[name] = torch.zeros(2, *model.image_shape)
        else:
            text = "SHAPE" if len(wanted) == 1 else f"{name}=SHAPE"
            raise UsageError(
                f"the shape of input {name!r} of {model.name!r} is not known. Give it without the batch: "
                f"--input-shape {text}, as in 3,224,224; or give real inputs with --sample."
            )
    by_position = [p.name for p in plain if p.kind != p.KEYWORD_ONLY]
    count = next((i for i, name in enumerate(by_position) if name not in arguments), len(by_position))
    args = tuple(arguments.pop(name) for name in by_position[:count])
    return args, arguments


def _to_torch(tree: Tree) -> Tree:
    """Turn arrays into tensors, and move tensors to the CPU. Arrays of float64 become float32."""
    import torch
    from torch.utils import _pytree

    def convert(leaf: object) -> object:
        if isinstance(leaf, np.ndarray):
            try:
                tensor = torch.from_numpy(np.array(leaf))
            except TypeError as e:
                raise ModelFileError(f"an input has type {leaf.dtype}, which PyTorch does not know.") from e
            return tensor.float() if tensor.dtype == torch.float64 else tensor
        return leaf.detach().cpu() if isinstance(leaf, torch.Tensor) else leaf

    return _pytree.tree_map(convert, tree)


def _from_array(array: np.ndarray, example: torch.Tensor) -> torch.Tensor:
    """Turn an input of the graph into one of the module; the graph has a complex number as two real ones."""
    import torch

    tensor = torch.from_numpy(np.array(array))
    return torch.view_as_complex(tensor) if example.is_complex() else tensor.to(example.dtype)


def _is_tensor(leaf: object) -> TypeGuard[torch.Tensor]:
    import torch

    return isinstance(leaf, torch.Tensor)


def _tensor_names(inputs: TorchInputs) -> tuple[str, ...]:
    """Name every tensor after its parameter and its place in the argument."""
    from torch.utils import _pytree

    names: list[str] = []
    for parameter, value in inputs.by_parameter().items():
        for path, leaf in _pytree.tree_flatten_with_path(value)[0]:
            if _is_tensor(leaf):
                parts = [re.sub(r"\W", "", str(part)) for part in path]
                names.append(_unique("_".join([parameter, *parts]), names))
    return tuple(names)


def _unique(name: str, taken: Sequence[str]) -> str:
    while name in taken:
        name += "_"
    return name


def _override(
    name: str, tensor: torch.Tensor, shape: InputShape | None, array: np.ndarray | None, seed: int
) -> torch.Tensor:
    """Apply the shape and the sample that the user gave for an input to its example."""
    import torch

    if array is not None:
        real = _to_torch(array)
        if real.is_floating_point() != tensor.is_floating_point():
            raise ModelFileError(f"sample {name!r} is {array.dtype}; the input takes {tensor.dtype}.")
        tensor = real.to(tensor.dtype)
        if 0 in tensor.shape:
            raise ModelFileError(f"sample {name!r} has shape {list(tensor.shape)}, which holds nothing.")
    if shape is None:
        return tensor
    axis = shape.batch_axis
    size = tensor.shape[axis] if tensor.ndim == len(shape.dims) else 2
    if tuple(tensor.shape) == shape.at(size):
        return tensor
    if array is not None:
        raise ModelFileError(
            f"sample {name!r} has shape {list(tensor.shape)}; --input-shape says "
            f"{['batch' if dim is None else dim for dim in shape.dims]}."
        )
    numpy_dtype = np.dtype(str(tensor.dtype).removeprefix("torch.")) if tensor.dtype != torch.bfloat16 else None
    made = make_array(shape.at(2), numpy_dtype or np.dtype(np.float32), (seed, len(name)))
    return torch.from_numpy(made).to(tensor.dtype)


def _batch_axes(inputs: TorchInputs, shapes: Mapping[str | None, InputShape]) -> list[tuple[int | None, ...]]:
    """List which axes of the tensors may be the batch, the likeliest choice first.

    The batch size of the example is that of its first tensor. In the other tensors, every axis of that size may be
    the batch, or no axis.
    """
    tensors = inputs.tensors()
    stated = [shapes[name].batch_axis if name in shapes else None for name in inputs.names]
    sizes = [tensor.shape[axis or 0] for tensor, axis in zip(tensors, stated, strict=True) if tensor.ndim]
    options: list[list[int | None]] = []
    for tensor, axis in zip(tensors, stated, strict=True):
        if axis is not None:
            options.append([axis])
        else:
            options.append([i for i, size in enumerate(tensor.shape) if size == sizes[0]] + [None])
    combinations = itertools.islice(itertools.product(*(range(len(choice)) for choice in options)), 10_000)
    ranked = sorted(combinations, key=sum)
    placed = [tuple(choice[i] for choice, i in zip(options, ranks, strict=True)) for ranks in ranked]
    with_batch = [axes for axes in placed if any(axis is not None for axis in axes)]
    if not with_batch:
        raise UsageError(f"none of the inputs {inputs.describe(1)} has an axis for the batch. Give some that have.")
    return with_batch[:MAX_CANDIDATES]


def named_outputs(result: object) -> list[tuple[str, torch.Tensor]]:
    """List the tensors in the result of a module, in order, with names.

    Raises:
        ExportError: Something in it is neither a tensor nor a container of tensors.
    """
    found = list(_tensors_with_paths(result, ()))
    if len(found) == 1 and not any(isinstance(part, str) for part in found[0][0]):
        return [("output", found[0][1])]
    names: list[str] = []
    for path, _ in found:
        parts = [str(part) for part in path]
        if not path or isinstance(path[0], int):
            parts.insert(0, "output")
        names.append(_unique(re.sub(r"[^\w.]", "_", "_".join(parts)), names))
    return list(zip(names, (tensor for _, tensor in found), strict=True))


def _tensors_with_paths(
    value: object, path: tuple[str | int, ...]
) -> Iterator[tuple[tuple[str | int, ...], torch.Tensor]]:
    if _is_tensor(value):
        yield path, value
        return
    items: Iterable[tuple[str | int, object]]
    if value is None or isinstance(value, (bool, int, float, str)):
        items = ()
    elif isinstance(value, Mapping):
        items = ((str(key), item) for key, item in value.items())
    elif hasattr(value, "_fields"):
        items = ((field, getattr(value, field)) for field in value._fields)
    elif isinstance(value, (tuple, list)):
        items = enumerate(value)
    elif dataclasses.is_dataclass(value):
        items = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    else:
        raise ExportError(
            f"the model returns a value of type {type(value).__name__}; tensors were expected, or tuples, "
            "lists, dicts and dataclasses of tensors. Wrap the model so that it returns its tensors."
        )
    for key, item in items:
        yield from _tensors_with_paths(item, (*path, key))
