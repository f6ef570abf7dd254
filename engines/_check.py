"""Check a side's engines against golden samples: what ships must compute what the reference computed."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsc_split._progress import Progress, ProgressListener, silent
from dsc_split.engines._registry import get_backend
from dsc_split.engines._sides import SideGraph, golden_samples, read_samples, side_graphs, strip_prefix
from dsc_split.errors import BackendError, BackendUnavailable, BundleError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from dsc_split.bundle import Bundle, Split
    from dsc_split.engines._base import BackendLike, EngineLike
    from dsc_split.engines._target import Target

    Arrays = Mapping[str, np.ndarray]

__all__ = ["CheckResult", "CheckRow", "check_engines"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CheckRow:
    """One engine that was run on the samples."""

    graph: str
    """Path of the graph, relative to the bundle."""
    label: str
    """What it is, in words."""
    max_abs_error: float | None
    """Largest absolute difference over all outputs; ``None`` where nothing could be compared."""
    max_rel_error: float | None
    """Largest ``max|difference| / max|reference|`` of one output; infinite where type or shape differ."""
    passed: bool
    """Whether the relative error is within the tolerance."""
    reason: str
    """Why it did not pass; empty where it did."""


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What :func:`check_engines` found."""

    side: str
    """``device`` or ``server``."""
    target: str
    """The target, in its canonical text."""
    against: str
    """What was compared with: ``golden samples``, or the file that was given."""
    tolerance: float
    """Largest relative error that passes, for the bundle's precision."""
    rows: tuple[CheckRow, ...]
    """One per graph of the side, the whole model first."""

    @property
    def passed(self) -> bool:
        """Whether every engine passed."""
        return all(row.passed for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Give the result as JSON takes it: an error that is infinite is ``null``."""
        rows = [
            {name: value if value != math.inf else None for name, value in dataclasses.asdict(row).items()}
            for row in self.rows
        ]
        return {**dataclasses.asdict(self), "passed": self.passed, "rows": rows}


def check_engines(
    bundle: Bundle,
    side: str,
    target: str | Target | BackendLike | None = None,
    *,
    against: Path | None = None,
    progress: ProgressListener = silent,
) -> CheckResult:
    """Run a side's engines and compare what they compute with a reference.

    Without ``against``, the reference is the golden samples in the bundle: heads are compared in what crosses
    the cut and in their early outputs, tails are fed with what crosses and compared in the outputs.

    Args:
        bundle: The bundle.
        side: ``device`` or ``server``.
        target: Runs the engines; the side's last recorded one, else ``onnxruntime:cpu``, where not given.
        against: An ``.npz`` with ``input:NAME`` and ``output:NAME`` arrays, say from the framework that the
            model came from. Then each pair is run through, its other half on ``onnxruntime:cpu``, and the
            model's outputs are compared.
        progress: Called before each engine.

    Raises:
        UsageError: The side or the target is unknown, or ``against`` is no such file.
        BackendUnavailable: The back-end's library or its device is not there.
        BundleError: A graph or a file of samples is missing, damaged, or does not fit.
    """
    from dsc_split.partitioner._proof import TOLERANCE

    backend = get_backend(target if target is not None else last_target(bundle, side))
    graphs = side_graphs(bundle, side)
    check: _Golden | _Against = _Golden(bundle, backend) if against is None else _Against(bundle, backend, against)
    tolerance = TOLERANCE[bundle.manifest["precision"]]
    rows = []
    for done, graph in enumerate(graphs):
        progress(Progress(stage=f"check {side}", label=graph.label, done=done, total=len(graphs)))
        rows.append(_check(check, graph, tolerance))
        logger.info("checked %s on %s: %s", graph.path, backend.target, rows[-1].reason or "ok")
    progress(Progress(stage=f"check {side}", label="done", done=len(graphs), total=len(graphs)))
    return CheckResult(
        side=side,
        target=str(backend.target),
        against="golden samples" if against is None else str(against),
        tolerance=tolerance,
        rows=tuple(rows),
    )


def last_target(bundle: Bundle, side: str) -> str:
    """Give the target of ``side`` that was asked for last, else ``onnxruntime:cpu``."""
    recorded = bundle.manifest["targets"].get(side) or ()
    return str(recorded[-1]["target"]) if recorded else "onnxruntime:cpu"


def _check(check: _Golden | _Against, graph: SideGraph, tolerance: float) -> CheckRow:
    """Compare one engine; a back-end that fails is a row that did not pass."""
    from dsc_split.partitioner._proof import relative_error

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
        passed=not reason,
        reason=reason,
    )


class _Golden:
    """Each engine alone, on the bundle's own samples."""

    def __init__(self, bundle: Bundle, backend: BackendLike) -> None:
        self._bundle = bundle
        self._backend = backend
        samples = golden_samples(bundle, None)
        if samples is None:
            raise UsageError(
                f"bundle {str(bundle.path)!r} has no golden samples: it was cut with --no-proof. "
                f"Cut it again without, or give --against FILE."
            )
        self._inputs = strip_prefix(samples, "input:")
        self._outputs = strip_prefix(samples, "output:")

    def run(self, graph: SideGraph) -> tuple[Arrays, Arrays]:
        """Give what the engine computes, and what it should compute."""
        available, expected = dict(self._inputs), dict(self._outputs)
        if graph.split is not None:
            samples = golden_samples(self._bundle, graph.split)
            if samples is None:
                raise BackendError(
                    f"there are no golden samples for {graph.split.name!r}; it was cut without proof. "
                    f"Cut it again, or give --against FILE."
                )
            crossing, early = strip_prefix(samples, "cut:"), strip_prefix(samples, "early:")
            if graph.kind == "head":
                expected = {name: crossing[name] for name in crossing if name not in graph.split.passthrough} | early
            else:
                available |= crossing
                expected = {name: expected[name] for name in expected if name not in graph.split.early_outputs}
        return _run(self._bundle, self._backend, graph.path, available, expected), expected


class _Against:
    """Whole model or whole pairs, on samples from elsewhere; a pair's other half runs on the reference."""

    def __init__(self, bundle: Bundle, backend: BackendLike, path: Path) -> None:
        if not path.is_file():
            raise UsageError(f"there is no file {str(path)!r} to check against.")
        samples = read_samples(path)
        self._bundle = bundle
        self._backend = backend
        self._inputs, self._outputs = strip_prefix(samples, "input:"), strip_prefix(samples, "output:")
        want_inputs = {tensor.name for tensor in bundle.inputs}
        want_outputs = {tensor.name for tensor in bundle.outputs}
        if set(self._inputs) != want_inputs or not self._outputs or not set(self._outputs) <= want_outputs:
            raise BundleError(
                f"{str(path)!r} holds {sorted(samples)}; "
                f"{sorted('input:' + name for name in want_inputs)} and any of "
                f"{sorted('output:' + name for name in want_outputs)} were expected."
            )

    def run(self, graph: SideGraph) -> tuple[Arrays, Arrays]:
        """Give what the whole way computes, and what it should compute."""
        if graph.split is None:
            return _run(self._bundle, self._backend, graph.path, self._inputs, self._outputs), self._outputs
        reference = get_backend("onnxruntime:cpu")
        on_device, on_server = (self._backend, reference) if graph.kind == "head" else (reference, self._backend)
        return self._run_pair(graph.split, on_device, on_server), self._outputs

    def _run_pair(self, split: Split, on_device: BackendLike, on_server: BackendLike) -> Arrays:
        sent = [tensor.name for tensor in split.tensors if tensor.name not in split.passthrough]
        head = _run(self._bundle, on_device, split.head, self._inputs, [*sent, *split.early_outputs])
        returned = [name for name in self._outputs if name not in split.early_outputs]
        tail = _run(self._bundle, on_server, split.tail, {**self._inputs, **head}, returned)
        return {**head, **tail}


def _run(
    bundle: Bundle, backend: BackendLike, graph: str, available: Arrays, wanted: list[str] | Arrays
) -> dict[str, np.ndarray]:
    """Run a graph on those of the arrays that it takes, and see that it gives what is wanted."""
    engine: EngineLike = backend.load(bundle.file(graph))
    try:
        outputs = engine.run({spec.name: available[spec.name] for spec in engine.inputs if spec.name in available})
    finally:
        engine.close()
    missing = [name for name in wanted if name not in outputs]
    if missing:
        raise BackendError(f"{graph!r} gives {sorted(outputs)}; {missing} were expected, too. Export it again.")
    return outputs
