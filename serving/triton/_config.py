"""The contents of a model's ``config.pbtxt`` for Triton, and its text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from dsc_split.bundle import TensorInfo

__all__ = [
    "ModelConfig",
    "TensorEntry",
    "WireTensor",
    "describe_tensors",
    "encode_config",
    "stacks_samples",
    "unservable",
]

BATCH = "batch"
"""The batch in the shapes of a bundle and of the list of models."""

TYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
    "bfloat16": "BF16",
    "string": "BYTES",
}
"""Element types of ONNX, and their names in the Open Inference Protocol; Triton has no others."""


class TensorEntry(TypedDict):
    """An input or output in the list of models."""

    name: str
    datatype: str
    shape: list[int | str]


@dataclass(frozen=True, kw_only=True)
class WireTensor:
    """An input or output as it is in requests to the server."""

    name: str
    """ONNX value name, and Triton's."""
    datatype: str
    """Element type as the Open Inference Protocol names it: ``FP32``."""
    shape: tuple[int | str, ...]
    """Its shape in a request: ``batch`` is first if samples are stacked; -1 means any size."""
    is_flat: bool
    """Whether it has one number per sample: shape ``(batch,)`` in the graph and ``(batch, 1)`` in a request."""

    @property
    def dims(self) -> tuple[int, ...]:
        """The shape without the batch, for the configuration."""
        return tuple(dim for dim in self.shape if isinstance(dim, int))

    def to_json(self) -> TensorEntry:
        """Return the form of the list of models."""
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The configuration of a model."""

    name: str
    """Name of the model, and of its folder."""
    backend: str
    """``onnxruntime`` or ``tensorrt``."""
    max_batch: int
    """Largest batch size; 0 if samples are not stacked along axis 0, and shapes are used as they are."""
    inputs: tuple[WireTensor, ...]
    """The tensors of a request."""
    outputs: tuple[WireTensor, ...]
    """The tensors of an answer."""
    instances: int
    """Number of copies that run at once on each GPU."""
    max_queue_delay_us: int | None
    """Microseconds that a request may wait for others to join a batch; ``None``: requests are not joined."""
    files: Mapping[str, str]
    """File of each compute capability (``8.6``); the key is empty if one file is for all."""
    parameters: Mapping[str, str]
    """Notes for clients."""


def stacks_samples(tensors: Iterable[TensorInfo], fixed_batch: int | None) -> bool:
    """Return whether the batch is axis 0 of every tensor, and in no other axis: Triton can then join requests."""
    return fixed_batch is None and all(
        info.shape[:1] == (BATCH,) and all(isinstance(dim, int) for dim in info.shape[1:]) for info in tensors
    )


def unservable(tensors: Iterable[TensorInfo], *, stacked: bool) -> str:
    """Return why Triton cannot take one of the tensors; empty if it can take all."""
    for info in tensors:
        if info.dtype not in TYPES:
            return f"tensor {info.name!r} has element type {info.dtype}, which Triton does not have"
        if not info.shape and not stacked:
            return f"tensor {info.name!r} is a scalar, which Triton does not carry"
    return ""


def describe_tensors(tensors: Iterable[TensorInfo], *, stacked: bool) -> tuple[WireTensor, ...]:
    """Describe tensors as they are in requests.

    Args:
        tensors: Tensors that Triton can take, see :func:`unservable`.
        stacked: The result of :func:`stacks_samples` for all tensors of the model.
    """
    return tuple(_describe(info, stacked=stacked) for info in tensors)


def _describe(info: TensorInfo, *, stacked: bool) -> WireTensor:
    # Triton takes no size of 0, but -1 includes it.
    sizes = [dim if isinstance(dim, int) and dim > 0 else -1 for dim in info.shape[int(stacked) :]]
    is_flat = stacked and not sizes
    shape: tuple[int | str, ...] = (BATCH, *(sizes or [1])) if stacked else tuple(sizes)
    return WireTensor(name=info.name, datatype=TYPES[info.dtype], shape=shape, is_flat=is_flat)


def encode_config(config: ModelConfig) -> bytes:
    """Return a configuration in protobuf's text format."""
    lines = [f"name: {_quote(config.name)}", f"backend: {_quote(config.backend)}"]
    lines += [f"max_batch_size: {config.max_batch}"]
    for kind, tensors in (("input", config.inputs), ("output", config.outputs)):
        for tensor in tensors:
            lines += _block(kind, _tensor_lines(tensor))
    for capability, name in sorted(config.files.items()):
        if capability:
            lines += _block("cc_model_filenames", [f"key: {_quote(capability)}", f"value: {_quote(name)}"])
        else:
            lines += [f"default_model_filename: {_quote(name)}"]
    lines += _block("version_policy", ["specific { versions: [ 1 ] }"])
    if config.max_batch and config.max_queue_delay_us is not None:
        lines += _block("dynamic_batching", [f"max_queue_delay_microseconds: {config.max_queue_delay_us}"])
    kind = "KIND_GPU" if config.backend == "tensorrt" else "KIND_AUTO"
    lines += _block("instance_group", [f"count: {config.instances}", f"kind: {kind}"])
    for key, value in sorted(config.parameters.items()):
        lines += _block("parameters", [f"key: {_quote(key)}", f"value {{ string_value: {_quote(value)} }}"])
    return "".join(f"{line}\n" for line in lines).encode()


def _tensor_lines(tensor: WireTensor) -> list[str]:
    kind = "STRING" if tensor.datatype == "BYTES" else tensor.datatype
    lines = [f"name: {_quote(tensor.name)}", f"data_type: TYPE_{kind}"]
    lines += [f"dims: [ {', '.join(map(str, tensor.dims))} ]"]
    return [*lines, "reshape { shape: [ ] }"] if tensor.is_flat else lines


def _block(name: str, lines: Sequence[str]) -> list[str]:
    return [f"{name} {{", *(f"  {line}" for line in lines), "}"]


def _quote(text: str) -> str:
    """Quote a text for protobuf's text format; it may have any characters."""
    plain = {ord(" "), *range(0x21, 0x7F)} - {ord('"'), ord("\\")}
    return '"' + "".join(chr(byte) if byte in plain else f"\\{byte:03o}" for byte in text.encode()) + '"'
