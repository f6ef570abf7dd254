"""Load ONNX files of any origin: check them, and read them with their weights left on disk."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsc_split._support.optional import require
from dsc_split.bundles._onnx_scan import scan_graph
from dsc_split.bundles._samples import load_sample
from dsc_split.errors import ModelFileError, UsageError
from dsc_split.partitioner._weights_file import stored_tensors
from dsc_split.partitioner.graph._normalize import settle_shapes
from dsc_split.partitioner.graph._shapes import BATCH
from dsc_split.partitioner.sources._options import InputShape, LoadedModel, SourceOptions, parse_input_shapes

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import onnx_ir as ir

__all__ = ["load_onnx"]

logger = logging.getLogger(__name__)

_MIN_OPSET = 11
_BATCH_NAMES = frozenset(
    {"batch", "batch_size", "batchsize", "batch_dim", "n", "b", "bs", "bsz", "nbatch", "num_batch"}
)

_Dims = list["int | str | None"]


def load_onnx(path: Path, options: SourceOptions) -> LoadedModel:
    """Read an ONNX file as a source.

    Args:
        path: The file; its external data is in the same folder or below.
        options: ``input_shapes`` and ``sample`` give sizes to free dimensions.

    Raises:
        UsageError: There is no such file, or a dimension other than the batch has no size.
        ModelFileError: The file is damaged or hostile, or its opset is too old.
    """
    for package in ("onnx", "onnx_ir"):
        require(package, extra="onnx", purpose="read ONNX files")
    import onnx_ir as ir

    if not path.is_file():
        raise UsageError(f"no ONNX file {str(path)!r}.")
    proto = _read_model(path)
    external = _check_external_data(proto, path)
    _check_model(proto, path, external=external)
    try:
        model = ir.serde.deserialize_model(proto)
    except Exception as e:  # onnx_ir's errors have no common base below Exception
        raise ModelFileError(f"{str(path)!r} cannot be read: {e.__cause__ or e}") from e
    ir.external_data.set_base_dir(model.graph, path.parent)
    model.graph.name = model.graph.name or path.stem
    sample = load_sample(options.sample) if options.sample else {}
    layout = _settle_inputs(model, options, sample, path)
    settle_shapes(model, symbols=(BATCH, *layout.batch_symbols), sizes=layout.sizes)
    return LoadedModel(
        model=model,
        name=path.stem,
        batch_symbol=BATCH if layout.has_batch else None,
        max_batch=options.max_batch,
        weights_origin="from the model file",
        normalisation=None,
        notes=layout.notes,
        reference=None,
    )


def _read_model(path: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        proto = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError, RuntimeError) as e:
        raise ModelFileError(f"{str(path)!r} is no ONNX model, or is damaged: {e}") from e
    except OSError as e:
        raise ModelFileError(f"{str(path)!r} cannot be read: {e.strerror or e}") from e
    if not proto.graph.output or not proto.graph.node:
        raise ModelFileError(f"{str(path)!r} holds no graph with nodes and outputs; it is empty, or no ONNX model.")
    if scan_graph(path.read_bytes()).has_ep_context:
        raise ModelFileError(
            f"{str(path)!r} holds EPContext nodes: an engine that was compiled for one machine, which nothing can cut. "
            "Give the graph that it was compiled from."
        )
    opset = max((item.version for item in proto.opset_import if item.domain in ("", "ai.onnx")), default=None)
    if opset is not None and opset < _MIN_OPSET:
        raise ModelFileError(
            f"{str(path)!r} has opset {opset}; {_MIN_OPSET} or later is expected. Convert it: "
            f"onnx.version_converter.convert_version(model, {_MIN_OPSET + 6})"
        )
    return proto


def _check_model(proto: onnx.ModelProto, path: Path, *, external: bool) -> None:
    import onnx

    # A missing shape is allowed here, and the checker refuses it; so it sees a scalar meanwhile.
    shapeless = [
        info.type.tensor_type
        for info in [*proto.graph.input, *proto.graph.output]
        if info.type.WhichOneof("value") == "tensor_type" and not info.type.tensor_type.HasField("shape")
    ]
    if external and shapeless:
        return  # with external data the checker reads the file itself, where the shapes are missing
    for tensor in shapeless:
        tensor.shape.SetInParent()
    try:
        onnx.checker.check_model(str(path) if external else proto)
    except onnx.checker.ValidationError as e:
        first = str(e).strip().splitlines()[0]
        raise ModelFileError(f"{str(path)!r} is not valid ONNX: {first}") from e
    except ValueError:
        # The checker takes no message of more than 2 GB; ONNX Runtime will check the graph.
        logger.info("%s is too large for the ONNX checker", path)
    for tensor in shapeless:
        tensor.ClearField("shape")


def _check_external_data(proto: onnx.ModelProto, path: Path) -> bool:
    """Refuse weights that are missing, too short, or outside the model's folder; return whether there are any."""
    if proto.graph.sparse_initializer:
        name = proto.graph.sparse_initializer[0].values.name
        raise ModelFileError(
            f"{str(path)!r} has the sparse initialiser {name!r}; store it dense: cutting knows dense weights only."
        )
    folder = path.parent.resolve()
    sizes: dict[str, int] = {}
    for tensor in stored_tensors(proto):
        if tensor.data_location != tensor.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        what = f"{str(path)!r}: weights {tensor.name!r} lie in {location!r}"
        if location not in sizes:
            file = folder / location
            if not location or Path(location).is_absolute() or not file.resolve().is_relative_to(folder):
                raise ModelFileError(
                    f"{what}, which is outside the model's folder. Export the model with its weights beside it."
                )
            if not file.is_file():
                raise ModelFileError(f"{what}, which does not exist. Copy it beside the model.")
            sizes[location] = file.stat().st_size
        try:
            offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
        except ValueError as e:
            raise ModelFileError(f"{what}, at an offset or length that is no number.") from e
        if offset < 0 or length < 0 or offset + length > sizes[location]:
            raise ModelFileError(
                f"{what} from byte {offset} to {offset + length}, and the file has {sizes[location]} bytes. "
                "Copy it again."
            )
    return bool(sizes)


# ---- the batch, and every other dimension of the inputs ---------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Layout:
    has_batch: bool
    sizes: dict[str, int]
    batch_symbols: tuple[str, ...]
    notes: tuple[str, ...]


def _settle_inputs(model: ir.Model, options: SourceOptions, sample: Mapping[str, np.ndarray], path: Path) -> _Layout:
    """Decide which dimension is the batch, give every other one a size, and write the shapes of the inputs."""
    import onnx_ir as ir

    inputs = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    dims = {value.name or "": _dims_of(value) for value in inputs}
    for kind, values in (("input", inputs), ("output", model.graph.outputs)):
        for value in values:
            if value.type is not None and not isinstance(value.type, ir.TensorType):
                raise ModelFileError(f"{str(path)!r}: {kind} {value.name!r} is no tensor; only tensors can be sent.")
    for value in inputs:
        if value.dtype is ir.DataType.STRING:
            raise ModelFileError(f"{str(path)!r}: input {value.name!r} holds strings; only numbers can be sent.")
    sizes: dict[str, int] = {}
    stated = _stated_shapes(options, dims)
    for name, wanted in stated.items():
        _apply_shape(name, dims, wanted, sizes)
    for value in inputs:
        if value.shape is None and value.name not in stated:
            raise UsageError(
                f"the shape of input {value.name!r} is not stated in {str(path)!r}. "
                f"Give it without the batch: --input-shape {value.name}=3,224,224"
            )
    symbols = _batch_symbols(dims)
    notes = []
    if len(symbols) > 1:
        notes.append(f"the dimensions {', '.join(map(repr, symbols))} were taken for one batch")
    for name, shape in dims.items():
        for axis, dim in enumerate(shape):
            if dim in symbols:
                shape[axis] = BATCH
        if name in sample and sample[name].ndim == len(shape):
            for axis, dim in enumerate(shape):
                if dim != BATCH and not isinstance(dim, int):
                    _assign(shape, axis, int(sample[name].shape[axis]), sizes)
    for name, shape in dims.items():
        for axis, dim in enumerate(shape):
            if isinstance(dim, str) and dim in sizes:
                shape[axis] = sizes[dim]
            if shape[axis] is None or (isinstance(shape[axis], str) and shape[axis] != BATCH):
                given = ",".join(
                    "batch" if each == BATCH else str(each if isinstance(each, int) else "SIZE") for each in shape
                )
                which = repr(dim) if dim else "without a name"
                raise UsageError(
                    f"input {name!r} has the free dimension {which} on axis {axis}, besides the batch. "
                    f"Give its size: --input-shape {name}={given}"
                )
    for value in inputs:
        value.shape = ir.Shape([dim if dim is not None else 0 for dim in dims[value.name or ""]])
    has_batch = any(BATCH in shape for shape in dims.values())
    return _Layout(has_batch=has_batch, sizes=sizes, batch_symbols=symbols, notes=tuple(notes))


def _dims_of(value: ir.Value) -> _Dims:
    if value.shape is None:
        return []
    # Old exporters write -1 or 0 for a free dimension.
    return [(dim if dim > 0 else None) if isinstance(dim, int) else (dim.value or None) for dim in value.shape]


def _stated_shapes(options: SourceOptions, dims: Mapping[str, _Dims]) -> dict[str, InputShape]:
    stated: dict[str, InputShape] = {}
    for shape in parse_input_shapes(options.input_shapes):
        name = shape.name
        if name is None:
            fitting = [
                key for key, each in dims.items() if not each or len(each) in (len(shape.dims), len(shape.dims) - 1)
            ]
            if len(fitting) != 1:
                raise UsageError(
                    f"--input-shape {_text(shape.dims[1:])} names no input, and the model has "
                    f"{', '.join(map(repr, dims))}. Name it: --input-shape {next(iter(dims), 'NAME')}=..."
                )
            name = fitting[0]
        if name not in dims:
            raise UsageError(f"--input-shape names the input {name!r}; the model has {', '.join(map(repr, dims))}.")
        stated[name] = shape
    return stated


def _text(dims: Sequence[int | None]) -> str:
    return ",".join("batch" if dim is None else str(dim) for dim in dims)


def _apply_shape(name: str, dims: dict[str, _Dims], shape: InputShape, sizes: dict[str, int]) -> None:
    """Apply a stated shape to an input; it must agree with the fixed dimensions of the file."""
    own = dims[name]
    wanted = shape.dims
    if own and wanted[0] is None and len(wanted) == len(own) + 1:
        wanted = wanted[1:]  # every axis was given, the batch too
    if not own:
        dims[name] = [BATCH if dim is None else dim for dim in wanted]
        return
    if len(wanted) != len(own):
        raise UsageError(
            f"--input-shape {name}={_text(wanted)} has {len(wanted)} dimensions with the batch; "
            f"the model's input has {len(own)}."
        )
    for axis, size in enumerate(wanted):
        if size is None:
            _mark_batch(own, axis, dims)
        elif isinstance(own[axis], int) and size != own[axis]:
            raise UsageError(
                f"--input-shape {name}={_text(wanted)} asks for {size} on axis {axis}; "
                f"the model has {own[axis]} there, and it is fixed in the file."
            )
        else:
            _assign(own, axis, size, sizes)


def _mark_batch(own: _Dims, axis: int, dims: Mapping[str, _Dims]) -> None:
    """Mark one axis as the batch, and with it every axis whose dimension has the same name."""
    dim = own[axis]
    if isinstance(dim, int):
        return
    for other in dims.values():
        for at, each in enumerate(other):
            if (other is own and at == axis) or (dim is not None and each == dim):
                other[at] = BATCH


def _assign(shape: _Dims, axis: int, size: int, sizes: dict[str, int]) -> None:
    dim = shape[axis]
    if isinstance(dim, str):
        sizes[dim] = size
    shape[axis] = size


def _batch_symbols(dims: Mapping[str, _Dims]) -> tuple[str, ...]:
    """Find the symbols that mean the batch: by their names, else the first dimension of each input."""
    if any(BATCH in shape for shape in dims.values()):
        return (BATCH,)
    symbols = list(dict.fromkeys(dim for shape in dims.values() for dim in shape if isinstance(dim, str)))
    named = [symbol for symbol in symbols if symbol.lower() in _BATCH_NAMES or "batch" in symbol.lower()]
    in_front = list(dict.fromkeys(shape[0] for shape in dims.values() if shape and isinstance(shape[0], str)))
    chosen = named or in_front
    if not chosen:
        unnamed = [shape for shape in dims.values() if shape and shape[0] is None]
        for shape in unnamed:
            shape[0] = BATCH
        return (BATCH,) if unnamed else ()
    for shape in dims.values():
        if shape and shape[0] is None:
            shape[0] = chosen[0]
    return tuple(chosen)
