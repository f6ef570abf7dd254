"""A side's engines as they lie in a bundle: found, compared with what is at hand, and loaded."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dsc_split.engines._options import BuildOptions
from dsc_split.engines._plan_file import REBUILD
from dsc_split.engines._registry import get_backend
from dsc_split.engines._sides import SideGraph, last_target, recorded_target, side_graphs
from dsc_split.engines._target import Target
from dsc_split.errors import BackendError, BundleError, EngineFileError, EngineMismatch, OutOfMemoryError, UsageError

if TYPE_CHECKING:
    from dsc_split.bundle import Bundle
    from dsc_split.engines._base import BackendLike, EngineLike

__all__ = ["SideEngines"]


class SideEngines:
    """The engines of one side, on one target.

    Attributes:
        backend: The back-end, with the options that its engines were built with.
        graphs: What runs on the side, the whole model first.
    """

    def __init__(self, bundle: Bundle, side: str, target: str | Target | BackendLike | None = None) -> None:
        """Find the engines.

        Args:
            bundle: The bundle.
            side: ``device`` or ``server``.
            target: Runs the engines; the side's last recorded one, else ``onnxruntime:cpu``, where not given.

        Raises:
            UsageError: The side or the target is unknown, or nothing was built for it.
            BackendUnavailable: The back-end's library is not there.
            EngineMismatch: The engines were built by another version of the library, or for another GPU.
            BundleError: A graph or an engine is missing, a graph was changed, or the manifest's options do not fit.
        """
        self._bundle = bundle
        self._side = side
        graphs = side_graphs(bundle, side, verify=False)
        if target is None:
            target = last_target(bundle, side)
        if isinstance(target, str):
            target = Target.parse(target)
        entry = recorded_target(bundle, side, str(target if isinstance(target, Target) else target.target))
        self.backend = _backend(bundle, side, target, entry)
        compiles = self.backend.compiles
        self.graphs: tuple[SideGraph, ...] = graphs if compiles else side_graphs(bundle, side)
        self._built: dict[tuple[str, int], dict[str, Any]] = {}
        self._failed: dict[str, str] = {}
        if compiles:
            if (
                entry is None
                or not {"options", "engines", "failed"} <= set(entry)
                or not (entry["engines"] or entry["failed"])
            ):
                raise UsageError(
                    f"bundle {str(bundle.path)!r} has no engines for target {str(self.backend.target)!r} "
                    f"on side {side!r}. Build them: {self._rebuild()}"
                )
            for item in entry["engines"]:
                if not bundle.file(item["path"]).is_file():
                    raise BundleError(
                        f"bundle {str(bundle.path)!r} lacks {item['path']!r}, which its manifest lists. "
                        f"Build it again: {self._rebuild()}"
                    )
            self._compare(entry["fingerprint"])
            self._built = {(item["graph"], item["profile"][2]): item for item in entry["engines"]}
            self._failed = {item["graph"]: item["reason"] for item in entry["failed"]}

    def load(self, graph: SideGraph, batch: int) -> EngineLike:
        """Load the engine that runs a graph at a batch size.

        Raises:
            BackendError: There is no such engine, or it cannot be loaded.
            OutOfMemoryError: It was built for smaller batches, for want of memory.
            EngineFileError: Its file is damaged; EngineMismatch, if it does not fit.
            BackendUnavailable: The device cannot be used.
        """
        if not self.backend.compiles:
            return self.backend.load(self._bundle.file(graph.path))
        item = self._find(graph, batch)
        listed = self._bundle.manifest["files"].get(item["path"])
        if listed is None:
            raise BundleError(f"the manifest does not list {item['path']!r}. Build it again: {self._rebuild()}")
        digest = self._bundle.graph_digest(graph.path)
        if item["graph_digest"] != digest:
            raise EngineMismatch(f"{item['path']!r} was built from another {graph.path!r}. Build it: {self._rebuild()}")
        try:
            return self.backend.load(self._bundle.file(item["path"]), sha256=listed["sha256"], digest=digest)
        except EngineFileError as e:
            command = f"Build it again: {self._rebuild()}"
            raise type(e)(str(e).replace(REBUILD, command)) from e

    def nearest_batch(self, graph: SideGraph, batch: int) -> int:
        """Give ``batch``, or the nearest batch size that an engine of a graph was built for."""
        profiles = [item["profile"] for (path, _), item in self._built.items() if path == graph.path]
        near = [min(max(batch, smallest), largest) for smallest, _, largest in profiles]
        return min(near, key=lambda size: abs(size - batch), default=batch)

    def precision(self, graph: SideGraph) -> str:
        """Say what the engine of a graph computes in: ``fp16``, or ``fp32`` where no operation is float16."""
        rewritten = [item["rewritten"] for (path, _), item in self._built.items() if path == graph.path]
        halved = any(item and item["halved"] for item in rewritten)
        return "fp16" if halved else str(self._bundle.manifest["precision"])

    def _find(self, graph: SideGraph, batch: int) -> dict[str, Any]:
        sizes = sorted(largest for path, largest in self._built if path == graph.path)
        fitting = [size for size in sizes if size >= batch]
        if fitting:
            return self._built[graph.path, fitting[0]]
        if graph.path in self._failed:
            raise BackendError(f"{graph.label}: there is no engine: {self._failed[graph.path]}")
        if not sizes:
            raise BackendError(
                f"{graph.label}: there is no engine for {str(self.backend.target)!r}. Build it: {self._rebuild()}"
            )
        lowered = self._built[graph.path, sizes[-1]]["lowered"]
        if lowered:
            raise OutOfMemoryError(f"{graph.label} was built for batches up to {sizes[-1]}: {lowered}")
        raise BackendError(
            f"{graph.label}: batch {batch} is larger than {sizes[-1]}, the largest that its engine was built for. "
            f"Build it: {self._rebuild(batch)}"
        )

    def _compare(self, recorded: Mapping[str, Any]) -> None:
        """Refuse engines that something else built than what is here."""
        found = self.backend.build_fingerprint()
        wrong = sorted(key for key in {*recorded, *found} if recorded.get(key) != found.get(key))
        if wrong:
            built = ", ".join(f"{key} {recorded.get(key)!r}" for key in wrong)
            here = ", ".join(f"{key} {found.get(key)!r}" for key in wrong)
            raise EngineMismatch(
                f"the engines of side {self._side!r} for {str(self.backend.target)!r} were built for {built}; "
                f"found {here}. Build them again: {self._rebuild()}"
            )

    def _rebuild(self, batch: int | None = None) -> str:
        """Give the command that builds the engines as they were built, also for ``batch``."""
        command = _build_command(self._bundle, self._side, self.backend.target)
        options = self.backend.options
        if options is None:
            return command
        return f"{command} {options.command(sorted({*options.batches, batch}) if batch else None)}"


def _backend(bundle: Bundle, side: str, target: Target | BackendLike, entry: Mapping[str, Any] | None) -> BackendLike:
    """Give the back-end, with the options that its engines were built with."""
    if entry is None or "options" not in entry:
        return get_backend(target)
    try:
        return get_backend(target, BuildOptions.from_json(entry["options"]))
    except UsageError as e:
        raise BundleError(
            f"manifest {str(bundle.path / 'manifest.json')!r}: the options of target {entry['target']!r} on side "
            f"{side!r} are wrong: {e} Build its engines again: {_build_command(bundle, side, entry['target'])}"
        ) from e


def _build_command(bundle: Bundle, side: str, target: object) -> str:
    """Give the command that builds a side's engines, with the usual options."""
    return f"dsc-split build {shlex.quote(str(bundle.path))} --side {side} --target {target}"
