"""Export a PyTorch module to an ONNX graph whose batch is a symbol, or fixed with a note that says why."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsc_split.errors import DscError, ExportError, UsageError
from dsc_split.partitioner.sources._options import LoadedModel, SourceOptions
from dsc_split.partitioner.sources._torch_inputs import TorchInputs, candidate_inputs, named_outputs
from dsc_split.partitioner.sources._torch_metadata import rename_symbol, set_module_metadata
from dsc_split.partitioner.sources._torch_model import TorchModel, describe
from dsc_split.partitioner.sources._torch_weights import is_untrained, recalibrate

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch
    from torch.export import ExportedProgram

__all__ = ["export_model"]

logger = logging.getLogger(__name__)

BATCH_SYMBOL = "batch"
EXAMPLE_BATCH = 2
"""Batch size of the example: the exporter takes a dimension of size 0 or 1 for a constant."""

_HOPELESS = ("DispatchError", "GuardOnDataDependentSymNode")
"""Errors of the exporter that happen at every batch size: a missing operator, control flow that depends on values."""


class _UnsupportedError(ExportError):
    """A part of the model has no ONNX counterpart, at any batch size."""


def export_model(model: TorchModel, options: SourceOptions) -> LoadedModel:
    """Export ``model`` with a symbolic batch, or with a fixed one if the model does not allow a symbol.

    Raises:
        UsageError: The inputs are not known, or the model does not run on them.
        ExportError: The model cannot be exported.
        ModelFileError: The sample does not fit.
    """
    candidates = candidate_inputs(model, options)
    try:
        return _export(model, _first_that_runs(model, candidates), None, options)
    except _UnsupportedError:
        raise
    except (ExportError, UsageError) as e:
        first: DscError = e
    inputs, last = candidates[0], first
    for batch in sorted({1, inputs.own_batch()}):
        try:
            _check_runs(model, inputs, batch)
            loaded = _export(model, inputs, batch, options)
        except (ExportError, UsageError) as e:
            last = e
            continue
        note = f"The batch is fixed at {batch}, because {first}"
        logger.warning("%s", note)
        return dataclasses.replace(loaded, notes=(note, *loaded.notes))
    if isinstance(last, UsageError):
        raise UsageError(
            f"{last} Give the right shapes with --input-shape, and integer inputs as the function's example "
            "inputs or with --sample."
        ) from last
    raise last


def _first_that_runs(model: TorchModel, candidates: list[TorchInputs]) -> TorchInputs:
    """Return the first candidate with which the module runs at another batch size than that of the example.

    The size is odd, because some models run at even sizes only.
    """
    first: UsageError | None = None
    for inputs in candidates:
        try:
            _check_runs(model, inputs, 3 if inputs.own_batch() != 3 else 5)
            return inputs
        except UsageError as e:
            first = first or e
    assert first is not None
    raise first


def _check_runs(model: TorchModel, inputs: TorchInputs, batch: int) -> None:
    args, kwargs = inputs.at_batch(batch)
    try:
        named_outputs(_call(model, args, kwargs))
    except ExportError:
        raise
    except Exception as e:
        raise UsageError(f"{model.name!r} does not run on inputs {inputs.describe(batch)}: {describe(e)}.") from e


def _call(model: TorchModel, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    import torch

    with torch.inference_mode():
        return model.module(*args, **kwargs)


def _export(model: TorchModel, inputs: TorchInputs, batch: int | None, options: SourceOptions) -> LoadedModel:
    """Export at a fixed batch size, or with a symbol if ``batch`` is ``None``."""
    origin, notes = _calibrate(model, inputs, batch or EXAMPLE_BATCH, options)
    exported, program = _run_exporter(model, inputs, batch, options)
    set_module_metadata(exported, program)
    max_batch = batch or options.max_batch
    if batch is None:
        _check_free(model, inputs, exported, options)
        max_batch = min(max_batch, _largest_batch(program, inputs))
    result = _call(model, *inputs.at_batch(batch or EXAMPLE_BATCH))
    _set_names(exported, inputs.names, [name for name, _ in named_outputs(result)], model.name)
    if max_batch < options.max_batch and batch is None:
        notes = (*notes, f"PyTorch says that the model takes batches up to {max_batch}.")

    def reference(feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        try:
            result = _call(model, *inputs.from_arrays(feeds))
        except Exception as e:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
            raise ExportError(f"{model.name!r} does not run on inputs {shapes}: {describe(e)}.") from e
        return [_as_array(tensor) for _, tensor in named_outputs(result)]

    return LoadedModel(
        model=exported,
        name=model.name,
        batch_symbol=BATCH_SYMBOL if batch is None else None,
        max_batch=max_batch,
        weights_origin=origin,
        normalisation=model.normalisation,
        reference=reference,
        notes=notes,
    )


def _as_array(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as the exporter does: a complex number is two real ones on a last axis."""
    import torch

    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    array: np.ndarray = real.contiguous().numpy()
    return array


def _calibrate(
    model: TorchModel, inputs: TorchInputs, batch: int, options: SourceOptions
) -> tuple[str, tuple[str, ...]]:
    """Recalibrate BatchNorm if the weights are only initialised; return the origin of the weights, and notes."""
    if not (options.calibrate and model.initialised and is_untrained(model.module)):
        return model.weights_origin, ()
    try:
        recalibrate(model.module, lambda run: _call(model, *inputs.at_batch(batch, seed=options.seed + run)))
    except ValueError as e:
        return model.weights_origin, (f"BatchNorm statistics were not recalibrated: {describe(e)}.",)
    return f"{model.weights_origin}, BatchNorm statistics recalibrated", ()


def _run_exporter(
    model: TorchModel, inputs: TorchInputs, batch: int | None, options: SourceOptions
) -> tuple[ir.Model, ExportedProgram]:
    import torch

    args, kwargs = inputs.at_batch(batch or EXAMPLE_BATCH)
    free = None
    if batch is None:
        free = inputs.dynamic_shapes(torch.export.Dim(BATCH_SYMBOL, min=1, max=max(options.max_batch, EXAMPLE_BATCH)))
    # The exporter takes few containers, and no numbers, as outputs; so the module returns the tensors only.
    hook = model.module.register_forward_hook(
        lambda module, args, result: tuple(tensor for _, tensor in named_outputs(result))
    )
    try:
        program = torch.onnx.export(model.module, args, kwargs=kwargs, dynamo=True, dynamic_shapes=free, verbose=False)
    except Exception as e:
        kind = _UnsupportedError if type(_innermost(e)).__name__ in _HOPELESS else ExportError
        raise kind(f"{model.name!r} cannot be exported: {_reason(e)}") from e
    finally:
        hook.remove()
    assert program is not None
    assert program.exported_program is not None
    return program.model, program.exported_program


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error: BaseException) -> str:
    """Return the first cause in the exporter's report, in one or two sentences."""
    cause = _innermost(error)
    text = str(cause)
    op = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", text)
    if op:
        return f"the operator {op.group(1)} has no ONNX counterpart in the exporter."
    violations = re.findall(r"^\s+- (.+)$", text, re.MULTILINE)
    said = violations[0] if violations and "onstraint" in text else text.strip().partition("\n")[0]
    said = re.sub(r" (If you're using|\(unhinted:|\(Size-like).*", "", " ".join(said.split())).rstrip(".")
    said = said if len(said) <= 200 else f"{said[:200]}..."
    where = _blamed_line(text)
    if "data-dependent" in text:
        return f"its control flow depends on values{where}: {said}. Use torch.where or torch.cond there."
    return f"{said}{where}." if violations else f"{type(cause).__name__}: {said}{where}."


def _blamed_line(text: str) -> str:
    """Return the line of the user's code that the exporter blames, in brackets; empty if it names none."""
    blamed = re.search(r'raised this error:\s+File "([^"]+)", line (\d+), in \w+\s+(.+)', text)
    if blamed is None:
        return ""
    return f" ({Path(blamed.group(1)).name}, line {blamed.group(2)}: {blamed.group(3).strip()})"


def _check_free(model: TorchModel, inputs: TorchInputs, exported: ir.Model, options: SourceOptions) -> None:
    """Check that the batch is one symbol, and rename it to ``batch``.

    If the model needs a fixed batch size, the exporter fixes it without an error; it is then run again for the reason.
    """
    symbols = set()
    for value, axis in zip(exported.graph.inputs, inputs.axes, strict=True):
        if axis is not None:
            assert value.shape is not None
            symbols.add(str(getattr(value.shape[axis], "value", value.shape[axis])))
    symbol = symbols.pop() if len(symbols) == 1 else ""
    if re.fullmatch(r"[A-Za-z_]\w*", symbol):
        rename_symbol(exported, symbol, BATCH_SYMBOL)
        return
    raise ExportError(f"{model.name!r} cannot be exported with a free batch: {_why_fixed(model, inputs, options)}")


def _why_fixed(model: TorchModel, inputs: TorchInputs, options: SourceOptions) -> str:
    import torch

    args, kwargs = inputs.at_batch(EXAMPLE_BATCH)
    free = torch.export.Dim(BATCH_SYMBOL, min=1, max=max(options.max_batch, EXAMPLE_BATCH))
    try:
        torch.export.export(model.module, args, dict(kwargs), dynamic_shapes=inputs.dynamic_shapes(free), strict=False)
    except Exception as e:
        return _reason(e)
    return "its operations hold for the example's batch size only."


def _largest_batch(program: ExportedProgram, inputs: TorchInputs) -> int:
    """Return the largest batch size that the exported program allows."""
    names = program.graph_signature.user_inputs
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    largest = np.iinfo(np.int64).max
    tensors = [node for node in placeholders if hasattr(node.meta.get("val"), "shape")]
    for node, axis in zip(tensors, inputs.axes, strict=True):
        if axis is not None:
            expression = getattr(node.meta["val"].shape[axis], "node", None)
            bounds = program.range_constraints.get(getattr(expression, "expr", None))
            if bounds is not None and bounds.upper.is_Integer:
                largest = min(largest, int(bounds.upper))
    return int(largest)


def _set_names(exported: ir.Model, inputs: tuple[str, ...], outputs: list[str], name: str) -> None:
    """Name the graph, its inputs and outputs; add a node for an output that is an input or another output."""
    import onnx_ir as ir

    graph = exported.graph
    graph.name = name
    for index, value in enumerate(graph.outputs):
        if value.producer() is None or any(value is other for other in list(graph.outputs)[:index]):
            node = ir.node("Identity", [value], name=f"node_output_{index}")
            copy = node.outputs[0]
            copy.name, copy.type, copy.shape = f"output_copy_{index}", value.type, value.shape
            node.metadata_props.update({"dsc_split.module": ""})
            graph.append(node)
            graph.outputs[index] = copy
    assert len(graph.inputs) == len(inputs)
    assert len(graph.outputs) == len(outputs)
    outputs = [f"{output}_out" if output in inputs else output for output in outputs]
    borders = [*graph.inputs, *graph.outputs]
    names = [*inputs, *outputs]
    taken = set(names)
    values = [*graph.initializers.values(), *(value for node in graph.all_nodes() for value in node.outputs)]
    for value in values:
        if value.name in taken and not any(value is border for border in borders):
            value.name = f"{value.name}_inner"
    # First to names that nothing has, because two values may swap their names.
    for step in ("\0{}", "{}"):
        for border, wanted in zip(borders, names, strict=True):
            border.name = step.format(wanted)
