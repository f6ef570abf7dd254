"""Check a side's engines against golden samples: what ships must compute what the reference computed."""

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
"""Key in a file of what heads gave: the pairs that they belong to. Tensors lie under ``SPLIT/NAME``."""


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
    """Run a side's engines, compare what they compute with a reference, and note the errors in the manifest.

    A packed bundle is not written to: the errors are then in the result alone.

    Without ``against``, the reference is the golden samples in the bundle: heads are compared in what crosses
    the cut and in their early outputs, tails are fed with what crosses and compared in the outputs.

    Args:
        bundle: The bundle.
        side: ``device`` or ``server``.
        target: Runs the engines; the side's last recorded one, else ``onnxruntime:cpu``, where not given.
        against: An ``.npz`` with ``input:NAME`` and ``output:NAME`` arrays, say from the framework that the
            model came from. Then each pair is run through, its other half on ``onnxruntime:cpu``, and the
            model's outputs are compared. Or what ``save_tensors`` has written on the device: then the server's
            tails are fed with what the device's own heads gave, and the golden outputs are compared.
        save_tensors: Where to write what the heads of the device give on the golden samples.
        fallback: Whether the graphs are run on ONNX Runtime where the engines cannot be used here.
        progress: Called before each engine.

    Raises:
        UsageError: The side or the target is unknown, nothing was built for it, or ``against`` is no such file.
        BackendUnavailable: The back-end's library or its device is not there.
        BundleError: A graph or a file of samples is missing, damaged, or does not fit.
        EngineFileError: An engine is damaged, or was built for something else.
        SignatureError: The bundle is packed, and its engines are not trusted.
    """
    engines = SideEngines(bundle, side, target, fallback=fallback)
    if save_tensors is not None and (side != "device" or against is not None):
        raise UsageError("tensors are saved by heads on golden samples: --side device, and no --against.")
    check = _how(bundle, engines, side, against)
    rows = []
    for done, graph in enumerate(engines.graphs):
        progress(Progress(stage=f"check {side}", label=graph.label, done=done, total=len(engines.graphs)))
        rows.append(_check(check, graph, TOLERANCE[engines.precision(graph)]))
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
    _record(bundle, side, engines.backend, result)
    return result


def _how(bundle: Bundle, engines: SideEngines, side: str, against: Path | None) -> _Golden | _Against:
    """Choose what to compare with."""
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


def _record(bundle: Bundle, side: str, backend: BackendLike, result: CheckResult) -> None:
    """Note the errors beside the target in the manifest; a bundle that cannot be written keeps what it has."""
    if bundle.is_packed:
        logger.warning("the errors are not noted: %r is packed, and is not written to", str(bundle.path))
        return
    try:
        record_check(bundle, side, backend, result.finite())
    except DscError as e:
        logger.warning("the errors are not noted in the manifest: %s", e)


def _check(check: _Golden | _Against, graph: SideGraph, tolerance: float) -> CheckRow:
    """Compare one engine; a back-end that fails is a row that did not pass."""
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
    """Each engine alone, on the bundle's own samples, or tails on what other heads gave for them."""

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
        self._given: dict[str, np.ndarray] = {}

    def run(self, graph: SideGraph) -> tuple[Arrays, Arrays]:
        """Return what the engine computes, and what it should compute."""
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
            self._given |= {f"{graph.split.name}/{name}": outputs[name] for name in sent}
            return outputs, expected
        if self._crossing is not None:
            crossing = {name: self._from_head(graph.split, name) for name in crossing}
        expected = {name: self._outputs[name] for name in self._outputs if name not in graph.split.early_outputs}
        return self._run(graph, {**self._inputs, **crossing}, expected), expected

    def save(self, path: Path) -> None:
        """Write what the heads gave.

        Raises:
            DscError: The file cannot be written.
        """
        import numpy as np

        pair_id = np.array(self._bundle.manifest.pair_id)
        with new_file(path) as file:
            np.savez(file, **{PAIR_ID: pair_id, **self._given})  # type: ignore[arg-type]  # names are free

    def _from_head(self, split: Split, name: str) -> np.ndarray:
        if name in split.passthrough:
            return self._inputs[name]
        key, crossing = f"{split.name}/{name}", self._crossing or {}
        if key not in crossing:
            raise BackendError(f"the file to check against has no tensor {name!r} of {split.name!r}.")
        array: np.ndarray = crossing[key]
        return array

    def _run(self, graph: SideGraph, available: Arrays, wanted: Arrays) -> Arrays:
        """Run an engine on all samples, some at a time where it takes no batch of so many."""
        batch = self._engines.nearest_batch(graph, self._batch)
        engine = self._engines.load(graph, batch)
        if batch == self._batch:
            return _run(engine, graph.path, available, wanted)
        crossing = graph.split.tensors if graph.split is not None else ()
        axes = {info.name: _batch_axis(info) for info in (*self._bundle.inputs, *self._bundle.outputs, *crossing)}
        with contextlib.closing(engine):
            parts = []
            for first in range(0, self._batch, batch):
                samples = range(first, first + batch)
                part = {name: _take(array, axes[name], samples, self._batch) for name, array in available.items()}
                parts.append(_call(engine, graph.path, part, wanted))
        return {name: _join([part[name] for part in parts], axes[name], self._batch, batch) for name in wanted}


class _Against:
    """Whole model or whole pairs, on samples from elsewhere; a pair's other half runs on the reference."""

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
        """Return what the whole way computes, and what it should compute."""
        engine = self._engines.load(graph, self._batch)
        if graph.split is None:
            return _run(engine, graph.path, self._inputs, self._outputs), self._outputs
        reference = get_backend("onnxruntime:cpu")
        if graph.kind == "head":
            return self._run_pair(graph.split, engine, reference.load(self._graphs.read(graph.split.tail)))
        return self._run_pair(graph.split, reference.load(self._graphs.read(graph.split.head)), engine)

    def _run_pair(self, split: Split, on_device: EngineLike, on_server: EngineLike) -> tuple[Arrays, Arrays]:
        sent = [tensor.name for tensor in split.tensors if tensor.name not in split.passthrough]
        head = _run(on_device, split.head, self._inputs, [*sent, *split.early_outputs])
        returned = [name for name in self._outputs if name not in split.early_outputs]
        tail = _run(on_server, split.tail, {**self._inputs, **head}, returned)
        return {**head, **tail}, self._outputs


def _batch_axis(info: TensorInfo) -> int | None:
    """Return the axis that the batch is on; ``None`` where there is none."""
    return next((axis for axis, size in enumerate(info.shape) if isinstance(size, str)), None)


def _take(array: np.ndarray, axis: int | None, samples: range, batch: int) -> np.ndarray:
    """Take some of the samples in an array of ``batch``, from the first one again after the last."""
    import numpy as np

    if axis is None:
        return array
    size = array.shape[axis]
    each = size // batch
    taken: np.ndarray = np.take(array, np.arange(samples.start * each, samples.stop * each) % size, axis=axis)
    return taken


def _join(parts: Sequence[np.ndarray], axis: int | None, batch: int, part_batch: int) -> np.ndarray:
    """Join what was computed for some samples at a time, up to ``batch`` of them."""
    import numpy as np

    if axis is None:
        return parts[0]
    return _take(np.concatenate(parts, axis=axis), axis, range(batch), part_batch * len(parts))


def _run(engine: EngineLike, graph: str, available: Arrays, wanted: Iterable[str]) -> dict[str, np.ndarray]:
    """Run an engine once, and close it."""
    with contextlib.closing(engine):
        return _call(engine, graph, available, wanted)


def _call(engine: EngineLike, graph: str, available: Arrays, wanted: Iterable[str]) -> dict[str, np.ndarray]:
    """Run an engine on those of the arrays that it takes, and see that it gives what is wanted."""
    outputs = engine.run({spec.name: available[spec.name] for spec in engine.inputs if spec.name in available})
    missing = [name for name in wanted if name not in outputs]
    if missing:
        raise BackendError(f"{graph!r} gives {sorted(outputs)}; {missing} were expected, too. Export it again.")
    return outputs
