"""Check that a side's engines compute the same as the reference."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsc_split._support.files import new_file
from dsc_split._support.progress import Progress, ProgressListener, silent
from dsc_split.bundles._records import CheckResult, CheckRow
from dsc_split.bundles._samples import golden_samples, read_samples, strip_prefix
from dsc_split.engines._registry import get_backend
from dsc_split.engines._source import GraphReader
from dsc_split.engines.side._load import SideEngines
from dsc_split.engines.side._sides import SideGraph, record_check
from dsc_split.errors import BackendError, BackendUnavailable, BundleError, DscError, UsageError
from dsc_split.partitioner.proof._proof import TOLERANCE, relative_error

if TYPE_CHECKING:
    import numpy as np

    from dsc_split.bundle import Bundle, Split, TensorInfo
    from dsc_split.engines._base import BackendLike, EngineLike
    from dsc_split.engines._target import Target

    Arrays = Mapping[str, np.ndarray]

__all__ = ["CheckResult", "CheckRow", "check_engines"]

logger = logging.getLogger(__name__)

PAIR_ID = "pair_id"
"""Key of the pairs' ID in a file of head outputs. Its tensors have keys ``SPLIT/NAME``."""


def check_engines(
    bundle: Bundle,
    side: str,
    target: str | Target | BackendLike | None = None,
    *,
    against: Path | None = None,
    save_tensors: Path | None = None,
    fallback: bool = False,
    progress: ProgressListener = silent,
) -> CheckResult:
    """Run a side's engines, compare their outputs with a reference, and write the errors to the manifest.

    The manifest of a packed bundle is not changed.

    Without ``against``, the reference is the golden samples in the bundle: for heads, the tensors of the cut and early
    outputs; tails get the tensors of the cut, and their outputs are compared.

    Args:
        bundle: The bundle.
        side: ``device`` or ``server``.
        target: Target of the engines; by default the side's last recorded one, or else ``onnxruntime:cpu``.
        against: An ``.npz`` file. With ``input:NAME`` and ``output:NAME`` arrays, for example from the model's
            framework: each whole pair is run, its other half on ``onnxruntime:cpu``, and the model's outputs are
            compared. Or the file of ``save_tensors`` from the device: the server's tails get the outputs of the
            device's heads, and the golden outputs are compared.
        save_tensors: File for the outputs of the device's heads on the golden samples.
        fallback: Whether to run the graphs on ONNX Runtime if the engines cannot be used here.
        progress: Called before each engine.

    Raises:
        UsageError: The side or the target is unknown, nothing was built for it, or ``against`` is not a file.
        BackendUnavailable: The back-end's library or its device is missing.
        BundleError: A graph or a file of samples is missing, damaged, or does not match.
        EngineFileError: An engine is damaged, or was built for something else.
        SignatureError: The bundle is packed, and its engines are not trusted.
    """
    engines = SideEngines(bundle, side, target, fallback=fallback)
    if save_tensors is not None and (side != "device" or against is not None):
        raise UsageError("tensors are saved by heads on golden samples: --side device, and no --against.")
    check = _choose_reference(bundle, engines, side, against)
    rows = []
    for done, graph in enumerate(engines.graphs):
        progress(Progress(stage=f"check {side}", label=graph.label, done=done, total=len(engines.graphs)))
        rows.append(_check_engine(check, graph, TOLERANCE[engines.precision(graph)]))
        logger.info("checked %s on %s: %s", graph.path, engines.backend.target, rows[-1].reason or "ok")
    progress(Progress(stage=f"check {side}", label="done", done=len(rows), total=len(rows)))
    result = CheckResult(
        side=side,
        target=str(engines.backend.target),
        against="golden samples" if against is None else against.name,
        fallback_reason=engines.fallback_reason,
        rows=tuple(rows),
        passed=all(row.passed for row in rows),
    )
    if save_tensors is not None and isinstance(check, _Golden):
        check.save(save_tensors)
    _record_errors(bundle, side, engines.backend, result)
    return result


def _choose_reference(bundle: Bundle, engines: SideEngines, side: str, against: Path | None) -> _Golden | _Against:
    """Choose the reference."""
    if against is None:
        return _Golden(bundle, engines)
    if not against.is_file():
        raise UsageError(f"there is no file {str(against)!r} to check against.")
    samples = read_samples(against, str(against))
    if PAIR_ID not in samples:
        return _Against(bundle, engines, against, samples)
    if side != "server":
        raise UsageError(f"{str(against)!r} holds what heads gave: feed it to the tails, with --side server.")
    if str(samples[PAIR_ID]) != bundle.manifest.pair_id:
        raise BundleError(
            f"{str(against)!r} was written from pairs {samples[PAIR_ID]}; this bundle has "
            f"{bundle.manifest.pair_id}. Write it again from a copy of this bundle: "
            "dsc-split check BUNDLE --side device --save-tensors FILE"
        )
    return _Golden(bundle, engines, crossing=samples)


def _record_errors(bundle: Bundle, side: str, backend: BackendLike, result: CheckResult) -> None:
    """Write the errors to the manifest; log a warning where that is not possible."""
    if bundle.is_packed:
        logger.warning("the errors are not noted: %r is packed, and is not written to", str(bundle.path))
        return
    try:
        record_check(bundle, side, backend, result.finite())
    except DscError as e:
        logger.warning("the errors are not noted in the manifest: %s", e)


def _check_engine(check: _Golden | _Against, graph: SideGraph, tolerance: float) -> CheckRow:
    """Compare one engine; if the back-end fails, the row does not pass."""
    max_abs: float | None = None
    max_rel: float | None = None
    reason = ""
    try:
        actual, expected = check.run(graph)
        errors = {name: relative_error(actual[name], want) for name, want in expected.items()}
        worst = max(errors, key=lambda name: errors[name][1])
        max_abs, max_rel = max(error[0] for error in errors.values()), errors[worst][1]
        if max_rel > tolerance:
            reason = f"{worst!r} is off by {max_rel:.2g} of its largest value; at most {tolerance:g} passes"
    except BackendUnavailable:
        raise
    except BackendError as e:
        reason = str(e)
    return CheckRow(
        graph=graph.path,
        label=graph.label,
        max_abs_error=max_abs,
        max_rel_error=max_rel,
        tolerance=tolerance,
        passed=not reason,
        reason=reason,
    )


class _Golden:
    """Runs each engine alone on the bundle's samples; tails optionally on the outputs of other heads."""

    def __init__(self, bundle: Bundle, engines: SideEngines, crossing: Arrays | None = None) -> None:
        self._bundle = bundle
        self._engines = engines
        self._crossing = crossing
        samples = golden_samples(bundle, None)
        if samples is None:
            raise UsageError(
                f"bundle {str(bundle.path)!r} has no golden samples: it was cut with --no-proof. "
                f"Cut it again without, or give --against FILE."
            )
        self._batch = bundle.manifest.sample_batch
        self._inputs: dict[str, np.ndarray] = strip_prefix(samples, "input:")
        self._outputs = strip_prefix(samples, "output:")
        self._head_outputs: dict[str, np.ndarray] = {}

    def run(self, graph: SideGraph) -> tuple[Arrays, Arrays]:
        """Return the engine's outputs, and the expected ones."""
        if graph.split is None:
            return self._run(graph, self._inputs, self._outputs), self._outputs
        samples = golden_samples(self._bundle, graph.split)
        if samples is None:
            raise BackendError(
                f"there are no golden samples for {graph.split.name!r}; it was cut without proof. "
                f"Cut it again, or give --against FILE."
            )
        crossing = strip_prefix(samples, "cut:")
        if graph.kind == "head":
            sent = {name: crossing[name] for name in crossing if name not in graph.split.passthrough}
            expected = sent | strip_prefix(samples, "early:")
            outputs = self._run(graph, self._inputs, expected)
            self._head_outputs |= {f"{graph.split.name}/{name}": outputs[name] for name in sent}
            return outputs, expected
        if self._crossing is not None:
            crossing = {name: self._from_head(graph.split, name) for name in crossing}
        expected = {name: self._outputs[name] for name in self._outputs if name not in graph.split.early_outputs}
        return self._run(graph, {**self._inputs, **crossing}, expected), expected

    def save(self, path: Path) -> None:
        """Write the outputs of the heads.

        Raises:
            DscError: The file cannot be written.
        """
        import numpy as np

        pair_id = np.array(self._bundle.manifest.pair_id)
        with new_file(path) as file:
            np.savez(file, **{PAIR_ID: pair_id, **self._head_outputs})  # type: ignore[arg-type]  # names are free

    def _from_head(self, split: Split, name: str) -> np.ndarray:
        if name in split.passthrough:
            return self._inputs[name]
        key, crossing = f"{split.name}/{name}", self._crossing or {}
        if key not in crossing:
            raise BackendError(f"the file to check against has no tensor {name!r} of {split.name!r}.")
        array: np.ndarray = crossing[key]
        return array

    def _run(self, graph: SideGraph, available: Arrays, wanted: Arrays) -> Arrays:
        """Run an engine on all samples, in parts where its largest batch is smaller."""
        batch = self._engines.nearest_batch(graph, self._batch)
        engine = self._engines.load(graph, batch)
        if batch == self._batch:
            return _run_once(engine, graph.path, available, wanted)
        crossing = graph.split.tensors if graph.split is not None else ()
        axes = {info.name: _batch_axis(info) for info in (*self._bundle.inputs, *self._bundle.outputs, *crossing)}
        with contextlib.closing(engine):
            parts = []
            for first in range(0, self._batch, batch):
                samples = range(first, first + batch)
                part = {
                    name: _take_samples(array, axes[name], samples, self._batch) for name, array in available.items()
                }
                parts.append(_run_open(engine, graph.path, part, wanted))
        return {name: _join_parts([part[name] for part in parts], axes[name], self._batch, batch) for name in wanted}


class _Against:
    """Runs the model or whole pairs on samples of a file; a pair's other half runs on ``onnxruntime:cpu``."""

    def __init__(self, bundle: Bundle, engines: SideEngines, path: Path, samples: Arrays) -> None:
        self._bundle = bundle
        self._engines = engines
        self._graphs = GraphReader(bundle)
        self._inputs, self._outputs = strip_prefix(samples, "input:"), strip_prefix(samples, "output:")
        want_inputs = {tensor.name for tensor in bundle.inputs}
        want_outputs = {tensor.name for tensor in bundle.outputs}
        if set(self._inputs) != want_inputs or not self._outputs or not set(self._outputs) <= want_outputs:
            raise BundleError(
                f"{str(path)!r} holds {sorted(samples)}; "
                f"{sorted('input:' + name for name in want_inputs)} and any of "
                f"{sorted('output:' + name for name in want_outputs)} were expected."
            )
        self._batch = bundle.batch_of({name: array.size for name, array in self._inputs.items()})

    def run(self, graph: SideGraph) -> tuple[Arrays, Arrays]:
        """Return the outputs of the model or the pair, and the expected ones."""
        engine = self._engines.load(graph, self._batch)
        if graph.split is None:
            return _run_once(engine, graph.path, self._inputs, self._outputs), self._outputs
        reference = get_backend("onnxruntime:cpu")
        if graph.kind == "head":
            return self._run_pair(graph.split, engine, reference.load(self._graphs.read(graph.split.tail)))
        return self._run_pair(graph.split, reference.load(self._graphs.read(graph.split.head)), engine)

    def _run_pair(self, split: Split, on_device: EngineLike, on_server: EngineLike) -> tuple[Arrays, Arrays]:
        sent = [tensor.name for tensor in split.tensors if tensor.name not in split.passthrough]
        head = _run_once(on_device, split.head, self._inputs, [*sent, *split.early_outputs])
        returned = [name for name in self._outputs if name not in split.early_outputs]
        tail = _run_once(on_server, split.tail, {**self._inputs, **head}, returned)
        return {**head, **tail}, self._outputs


def _batch_axis(info: TensorInfo) -> int | None:
    """Return the batch axis; ``None`` where there is none."""
    return next((axis for axis, size in enumerate(info.shape) if isinstance(size, str)), None)


def _take_samples(array: np.ndarray, axis: int | None, samples: range, batch: int) -> np.ndarray:
    """Take samples of an array of ``batch`` samples; the first one follows the last."""
    import numpy as np

    if axis is None:
        return array
    size = array.shape[axis]
    each = size // batch
    taken: np.ndarray = np.take(array, np.arange(samples.start * each, samples.stop * each) % size, axis=axis)
    return taken


def _join_parts(parts: Sequence[np.ndarray], axis: int | None, batch: int, part_batch: int) -> np.ndarray:
    """Join the outputs of parts, up to ``batch`` samples."""
    import numpy as np

    if axis is None:
        return parts[0]
    return _take_samples(np.concatenate(parts, axis=axis), axis, range(batch), part_batch * len(parts))


def _run_once(engine: EngineLike, graph: str, available: Arrays, wanted: Iterable[str]) -> dict[str, np.ndarray]:
    """Run an engine once, and close it."""
    with contextlib.closing(engine):
        return _run_open(engine, graph, available, wanted)


def _run_open(engine: EngineLike, graph: str, available: Arrays, wanted: Iterable[str]) -> dict[str, np.ndarray]:
    """Run an engine on its inputs among the arrays, and check that it returns the wanted outputs."""
    outputs = engine.run({spec.name: available[spec.name] for spec in engine.inputs if spec.name in available})
    missing = [name for name in wanted if name not in outputs]
    if missing:
        raise BackendError(f"{graph!r} gives {sorted(outputs)}; {missing} were expected, too. Export it again.")
    return outputs
