"""Prove that head then tail computes the same as the whole model; measure errors for all checks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsc_split._support.memory import default_memory_limit_bytes
from dsc_split.bundle import Split, TensorInfo
from dsc_split.errors import OutOfMemoryError

__all__ = [
    "SEEDS",
    "TOLERANCE",
    "PairError",
    "Reference",
    "largest_batch",
    "prove_pair",
    "relative_error",
    "run_reference",
]

logger = logging.getLogger(__name__)

TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3}
"""Largest ``max|difference| / max|reference|`` of a pair that passes, by precision of the graph."""

SEEDS = (0, 1)
"""Seeds of the inputs that a pair is proven on."""

Arrays = Mapping[str, np.ndarray]


def relative_error(actual: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Measure how far ``actual`` is from ``expected``.

    Args:
        actual: The computed values, of any shape and type.
        expected: The right values.

    Returns:
        ``(max|difference|, max|difference| / max|expected|)``. Both are infinite if shapes or types differ, if
        integers, booleans or strings are not equal, or if NaN or an infinity is in one of the two only.
    """
    wrong = (float("inf"), float("inf"))
    actual, expected = (array.astype(str) if array.dtype == object else array for array in (actual, expected))
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return wrong
    if expected.dtype.kind not in "fc":
        return (0.0, 0.0) if np.array_equal(actual, expected) else wrong
    wide = np.complex128 if expected.dtype.kind == "c" else np.float64
    got, want = actual.astype(wide, copy=False), expected.astype(wide, copy=False)
    finite = np.isfinite(want)
    if not np.array_equal(finite, np.isfinite(got)):
        return wrong
    if not np.array_equal(got[~finite], want[~finite], equal_nan=True):
        return wrong
    if not finite.any():
        return 0.0, 0.0
    difference = float(np.abs(got[finite] - want[finite]).max())
    scale = float(np.abs(want[finite]).max())
    if difference == 0.0:
        return 0.0, 0.0
    return difference, difference / scale if scale > 0.0 else float("inf")


@dataclass(frozen=True, kw_only=True)
class PairError:
    """The largest error of head then tail against the whole model, over all batches, seeds and outputs."""

    max_abs: float
    """Largest absolute difference."""
    max_rel: float
    """Largest ``max|difference| / max|reference|`` of one output."""
    worst_output: str
    """The output that has ``max_rel``."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The outputs of the whole model for one set of inputs."""

    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


def run_reference(
    model_path: Path, inputs: Sequence[TensorInfo], batches: Sequence[int], sample: Arrays | None
) -> list[Reference]:
    """Run the whole model at every batch size and seed, with ONNX Runtime on the CPU.

    Raises:
        BackendError: ONNX Runtime cannot load or run the model.
    """
    from dsc_split.bundles._samples import make_inputs
    from dsc_split.partitioner.proof._reference import open_session, run_session

    session = open_session(model_path)
    references = []
    for batch in batches:
        for seed in SEEDS:
            feed = make_inputs(inputs, batch, seed, sample if seed == SEEDS[0] else None)
            references.append(Reference(inputs=feed, outputs=run_session(session, feed, model_path.name)))
    return references


def prove_pair(
    head_graph: bytes,
    tail_graph: bytes,
    split: Split,
    references: Sequence[Reference],
    *,
    weights_folder: Path,
) -> PairError:
    """Run head then tail on every reference, and compare the outputs.

    Args:
        head_graph: The serialised head.
        tail_graph: The serialised tail.
        split: Which tensors cross, and which outputs stay on the device.
        references: From :func:`run_reference`.
        weights_folder: The folder of the weights file.

    Raises:
        BackendError: The head or the tail cannot be loaded or run.
    """
    from dsc_split.partitioner.proof._reference import open_session, run_session

    head = open_session(head_graph, weights_folder=weights_folder)
    tail = open_session(tail_graph, weights_folder=weights_folder)
    worst = PairError(max_abs=0.0, max_rel=0.0, worst_output="")
    for reference in references:
        from_head = run_session(head, reference.inputs, split.head)
        crossing = {
            tensor.name: reference.inputs[tensor.name] if tensor.name in split.passthrough else from_head[tensor.name]
            for tensor in split.tensors
        }
        outputs = {name: from_head[name] for name in split.early_outputs}
        outputs.update(run_session(tail, crossing, split.tail))
        for name, expected in reference.outputs.items():
            max_abs, max_rel = relative_error(outputs[name], expected)
            if max_rel > worst.max_rel or not worst.worst_output:
                worst = PairError(max_abs=max_abs, max_rel=max_rel, worst_output=name)
    logger.debug("pair %s: %s", split.name, worst)
    return worst


def largest_batch(
    model_path: Path, inputs: Sequence[TensorInfo], wanted: int, memory_bytes: int | None = None
) -> tuple[int, str]:
    """Find the largest batch up to ``wanted`` that the whole model runs at, in a worker process.

    Returns:
        The batch size, and why it is smaller than ``wanted``; an empty text if it is not.

    Raises:
        BackendError: The model does not run, for another reason than memory.
    """
    from dsc_split.partitioner.proof._reference import run_in_worker

    memory_bytes = memory_bytes or default_memory_limit_bytes()
    batch, reason = wanted, ""
    while True:
        try:
            if batch > 1 and sum(info.size_bytes(batch) for info in inputs) > memory_bytes:
                raise OutOfMemoryError("the inputs alone are larger than what is free")
            run_in_worker(model_path, inputs, batch, memory_bytes)
        except OutOfMemoryError as e:
            if batch <= 1:
                raise
            reason = f"batch {batch} ran out of memory: {e}"
            batch = max(batch // 2, 1)
        else:
            return batch, reason
