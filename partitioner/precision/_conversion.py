"""Convert an exported graph to float16, store it, and measure its error against float32."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsc_split.bundles._records import Conversion
from dsc_split.errors import ExportError, UsageError
from dsc_split.partitioner._load import input_infos
from dsc_split.partitioner._weights_file import StoredFile, encode_graph, store_graph, store_weights
from dsc_split.partitioner.precision._float16 import HalfReport, leaves_float32, precision_of, to_half
from dsc_split.partitioner.precision._rounding import half_values, keep_roundings
from dsc_split.partitioner.proof._proof import Arrays, Reference, relative_error, run_reference
from dsc_split.partitioner.proof._reference import open_session, run_session

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

__all__ = ["Converted", "check_precision", "convert_to_half", "must_convert"]

logger = logging.getLogger(__name__)

_LOOKED_AT_ONCE = 64

_NOTED_ABOVE = 1e-2
"""Above this error of an output, as a share of its largest value, there is a note. One rounding is off by at most
5e-4, and a whole network by about 1e-3."""

_REFUSED_ABOVE = 0.1
"""Above this error of an output, as a share of its largest value, no bundle is made: roundings alone do not add up to
it, so a number overflowed, vanished or cancelled out."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A float16 graph that is stored in its folder, and its results."""

    stored: StoredFile
    """The graph's file."""
    weights: StoredFile | None
    """The weights' file; ``None`` if all weights are in the graph."""
    references: list[Reference]
    """Its outputs for the inputs that the float32 graph was run on, rounded if its own inputs are float16."""
    conversion: Conversion
    """The conversion's record in the manifest."""
    notes: list[str]
    """Sentences the user should read."""


def check_precision(precision: str | None, io_precision: str | None) -> None:
    """Refuse words that are no precision, and ``io_precision`` if nothing is converted.

    Raises:
        UsageError: The message names the option.
    """
    for option, given in (("--precision", precision), ("--io-precision", io_precision)):
        if given not in (None, "fp32", "fp16"):
            raise UsageError(f"{option} is {given!r}; fp32 or fp16 is expected.")
    if io_precision is not None and precision != "fp16":
        raise UsageError(f"--io-precision {io_precision} goes with --precision fp16 only; without it, nothing changes.")


def must_convert(model: ir.Model, precision: str | None, io_precision: str | None) -> bool:
    """Return whether a graph has to be converted to the precision that was asked for.

    A graph with float16 in it is converted too, if something else in it is float32 and may become float16. With
    ``io_precision`` ``fp32``, float32 inputs and outputs do not count, and float16 ones are refused.

    Raises:
        UsageError: It cannot be converted to that precision.
    """
    import onnx_ir as ir

    own = precision_of(model)
    types = {value.dtype for node in model.graph for value in node.outputs}
    if precision == "fp32" and own == "fp16":
        raise UsageError(
            "--precision fp32: the graph is computed in 16-bit floats, and what they lost does not come back. Export "
            "the model in float32, or leave --precision out."
        )
    if precision != "fp16":
        return False
    if ir.DataType.BFLOAT16 in types:
        raise UsageError("--precision fp16: the graph is computed in bfloat16. Export the model in float32 first.")
    if own == "fp16":
        half = [
            value.name for value in (*model.graph.inputs, *model.graph.outputs) if value.dtype == ir.DataType.FLOAT16
        ]
        if io_precision == "fp32" and half:
            raise UsageError(
                f"--io-precision fp32: {half[0]!r} is float16 already, and inputs and outputs stay as they are with "
                "it. Leave --io-precision out."
            )
        return leaves_float32(model, io_precision=io_precision)
    if ir.DataType.FLOAT not in types:
        raise UsageError("--precision fp16: nothing in the graph is float32, so there is nothing to convert.")
    return True


def convert_to_half(
    model: ir.Model,
    io_precision: str | None,
    *,
    wide: Path,
    folder: Path,
    references: Sequence[Reference],
    batches: Sequence[int],
    sample: Arrays | None,
    comparable: bool,
) -> Converted:
    """Convert a graph to float16, store it, and run it on the inputs of the float32 graph.

    The error is measured with every rounding that the graph asks for; ONNX Runtime leaves out most of them on the CPU.

    Args:
        model: The float32 graph, whose weights are in a file; changed in place.
        io_precision: As for :func:`to_half`.
        wide: The float32 graph's file.
        folder: Where to write ``model.onnx`` and ``weights.data``.
        references: Results of the float32 graph.
        batches: The batch sizes of ``references``.
        sample: The sample of ``references``.
        comparable: Whether the graph returns the same in every run.

    Raises:
        ExportError: Nothing became float16, or an output is far off or no longer finite; the message names the first
            such value.
        BackendError: ONNX Runtime cannot run the float16 graph.
        DscError: A file cannot be written.
    """
    report = to_half(model, io_precision=io_precision)
    if precision_of(model) != "fp16":
        kept = ", ".join(sorted({op.op_type for op in report.kept_float32}))
        raise ExportError(
            f"--precision fp16: nothing in the graph can be computed in float16 ({kept} stay float32). Export it with "
            "--precision fp32."
        )
    weights = store_weights(model, folder / "weights.data")
    path = folder / "model.onnx"
    stored = store_graph(model, path)
    halves = run_reference(path, input_infos(model), batches, sample)
    notes = _weight_notes(report)
    max_abs, max_rel = None, None
    if comparable:
        rounded = _round_everywhere(model)
        session = open_session(encode_graph(rounded), weights_folder=folder)
        answers = [
            Reference(inputs=half.inputs, outputs=run_session(session, half.inputs, path.name)) for half in halves
        ]
        _check_finite(wide, rounded, folder, references, answers)
        max_abs, max_rel, more = _measure(references, answers, notes)
        notes += more
    for note in notes:
        logger.warning("%s", note)
    conversion = Conversion(
        source="fp32",
        io_precision="fp32" if io_precision == "fp32" else "fp16",
        weights_converted=report.weights_converted,
        weights_overflowed=report.weights_overflowed,
        weights_vanished=report.weights_vanished,
        kept_float32=report.kept_float32,
        max_abs_error=max_abs,
        max_rel_error=max_rel,
    )
    return Converted(stored=stored, weights=weights, references=halves, conversion=conversion, notes=notes)


def _weight_notes(report: HalfReport) -> list[str]:
    if not report.weights_overflowed:
        return []
    names = ", ".join(map(repr, report.overflowed_in[:3])) + (", ..." if report.overflowed_in[3:] else "")
    return [f"weights beyond float16, {report.weights_overflowed} of them, became its largest, 65504, in {names}"]


def _round_everywhere(model: ir.Model) -> onnx.ModelProto:
    """Return a copy of a graph in which ONNX Runtime rounds each float16 value, as a GPU does."""
    import onnx_ir as ir

    copy = ir.serde.deserialize_model(ir.serde.serialize_model(model))
    keep_roundings(copy, half_values(copy))
    return ir.serde.serialize_model(copy)


def _measure(
    references: Sequence[Reference], halves: Sequence[Reference], causes: Sequence[str]
) -> tuple[float | None, float | None, list[str]]:
    """Measure the error of float outputs against float32, and note which other outputs differ.

    Raises:
        ExportError: An output is too far off; the message repeats ``causes``.
    """
    max_abs, max_rel = 0.0, dict[str, float]()
    different = dict[str, None]()
    for wide, half in zip(references, halves, strict=True):
        for name, expected in wide.outputs.items():
            off_abs, off_rel = relative_error(half.outputs[name].astype(expected.dtype), expected)
            if expected.dtype.kind == "f" and np.isfinite(off_rel):
                max_abs, max_rel[name] = max(max_abs, off_abs), max(max_rel.get(name, 0.0), off_rel)
            elif off_rel > 0:
                different[name] = None
    notes = [f"output {name!r} is not the same as in float32 on every input that was tried" for name in different]
    if not max_rel:
        return None, None, notes
    worst = max(max_rel, key=max_rel.__getitem__)
    off = f"float16 is off by {max_rel[worst]:.2g} of the largest value of output {worst!r}"
    if max_rel[worst] > _REFUSED_ABOVE:
        known = "".join(f" {cause[0].upper()}{cause[1:]}." for cause in causes)
        raise ExportError(
            f"{off}; at most {_REFUSED_ABOVE:g} is expected.{known} Export the model with --precision fp32, scale what "
            "is too large or too small for float16, or give real inputs with --sample FILE.npz if it is the random "
            "ones that do not suit the model."
        )
    if max_rel[worst] > _NOTED_ABOVE:
        notes.append(off)
    return max_abs, max_rel[worst], notes


# ---- values that are no longer finite ----------------------------------------------------------------------


def _check_finite(
    wide: Path, graph: onnx.ModelProto, folder: Path, references: Sequence[Reference], halves: Sequence[Reference]
) -> None:
    for before, after in zip(references, halves, strict=True):
        lost = [name for name in before.outputs if _loses_finite(before.outputs[name], after.outputs[name])]
        if lost:
            raise ExportError(
                f"in float16, output {lost[0]!r} is not finite where it is in float32. "
                f"{_first_lost(wide, graph, folder, before, after)} Export the model with --precision fp32, or scale "
                "what comes before that down."
            )


def _loses_finite(before: np.ndarray, after: np.ndarray) -> bool:
    if before.dtype.kind != "f" or before.shape != after.shape:
        return False
    return bool((np.isfinite(before) & ~np.isfinite(after)).any())


def _first_lost(wide: Path, graph: onnx.ModelProto, folder: Path, before: Reference, after: Reference) -> str:
    """Name in a sentence the first value, in graph order, that is finite in float32 and not in float16."""
    import onnx

    graphs = (onnx.load(str(wide), load_external_data=False), graph)
    made = [{name: node for node in each.graph.node for name in node.output if name} for each in graphs]
    names = [name for name in made[1] if name in made[0]]
    for start in range(0, len(names), _LOOKED_AT_ONCE):
        chunk = names[start : start + _LOOKED_AT_ONCE]
        seen = [
            _run_for(each, chunk, beside, reference.inputs)
            for each, beside, reference in zip(graphs, (wide.parent, folder), (before, after), strict=True)
        ]
        for name in chunk:
            if all(isinstance(values[name], np.ndarray) for values in seen) and _loses_finite(*(v[name] for v in seen)):
                node = made[1][name]
                largest = np.abs(seen[0][name][np.isfinite(seen[0][name])]).max()
                return (
                    f"The first value that float16 loses is {name!r}, made by {node.op_type} {node.name!r}; in float32 "
                    f"its largest is {largest:.3g}, and float16 ends at 65504."
                )
    return "No value before it could be told to be the cause."


def _run_for(graph: onnx.ModelProto, names: Sequence[str], folder: Path, feed: Arrays) -> dict[str, np.ndarray]:
    """Run a graph and return the values of these names."""
    import onnx

    del graph.graph.output[:]
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return run_session(open_session(encode_graph(graph), weights_folder=folder), feed, "the graph")
