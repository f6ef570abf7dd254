"""The back-ends TensorRT and TensorRT for RTX.

TensorRT for RTX builds for any GPU that it knows, on any machine, also without a GPU. Full TensorRT builds on the GPU
that runs the engine, because it times its kernels there.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsc_split._support.files import write_bytes
from dsc_split.bundles._records import Rewritten
from dsc_split.engines._base import BuildJob
from dsc_split.engines._cache import cache_folder
from dsc_split.engines._options import BuildOptions
from dsc_split.engines.tensorrt._backend import TrtBackend
from dsc_split.errors import BackendError, BackendUnavailable, DscError, UsageError

if TYPE_CHECKING:
    from dsc_split._support.records import Facts
    from dsc_split.engines.tensorrt._gemm import LeftGemm
    from dsc_split.engines.tensorrt._library import Trt

__all__ = ["TensorRTBackend", "TensorRTRTXBackend"]

logger = logging.getLogger(__name__)

_OTHER_WAYS = {"conv": ("sum", "fp16"), "sum": ("fp16",), "fp16": ()}
"""For each policy for float32 matrix products, those that rewrite more of them."""


def _refusal(left: Sequence[LeftGemm], policy: str) -> str:
    """Return the message about an operation that SM75 lacks, with advice."""
    first = next((item for item in left if not item.is_product), left[0])
    ways = _OTHER_WAYS[policy] if first.is_product else tuple({"fp16"} - {policy})
    more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
    words = f"SM75 has no float32 form of this product: {first.reason}" if first.is_product else first.reason
    listed = ", ".join([*(f"--gemm {way}" for way in ways), "--precision fp16 at the export", "another target"])
    return f"{first.op_type} node {first.name!r}{more}: {words}. Ways out: {listed}."


class TensorRTRTXBackend(TrtBackend):
    """TensorRT for RTX: builds for the GPU that the target names, on any machine."""

    library_name = "tensorrt_rtx"
    tied_to_system = False

    def _require(self) -> None:
        if self.options is not None and self.options.timing_cache is not None:
            raise UsageError(f"target {str(self.target)!r} times no kernels: leave --timing-cache out.")
        super()._require()

    def _gpu_facts(self) -> Facts:
        return {}  # the target's architecture is enough

    def _configure(self, config: Trt, *, capturable: bool) -> None:
        trt = self._library.trt
        if capturable and hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        name = self.target.architecture.upper()
        capability = getattr(trt.ComputeCapability, name, None)
        if capability is None:
            known = ", ".join(key.lower() for key in trt.ComputeCapability.__members__ if key.startswith("SM"))
            raise BackendError(f"TensorRT for RTX {self._library.version} does not know {name}, only {known}.")
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability, 0)

    @property
    def _runs_here(self) -> bool:
        try:
            return f"sm{self._cuda().compute_capability.replace('.', '')}" == self.target.architecture
        except BackendUnavailable:
            return False

    def _prepare_graph(self, job: BuildJob, options: BuildOptions) -> tuple[bytes, Rewritten | None]:
        """Rewrite float32 matrix products for SM75, and check that the graph computes the same.

        Raises:
            BackendError: A product cannot be rewritten, or the rewritten graph computes something else.
        """
        if self.target.architecture != "sm75":
            return super()._prepare_graph(job, options)
        from dsc_split.engines.tensorrt._gemm import digest, prove_rewrite, rewrite_gemm
        from dsc_split.partitioner._weights_file import encode_graph
        from dsc_split.partitioner.proof._proof import TOLERANCE

        try:
            rewrite = rewrite_gemm(job.graph, policy=options.gemm)
        except BackendUnavailable as e:  # only this engine fails
            raise BackendError(f"a float32 graph has to be looked over for SM75: {e}") from e
        if rewrite.left:
            raise BackendError(_refusal(rewrite.left, options.gemm))
        count = len(rewrite.converted) + len(rewrite.summed) + len(rewrite.halved)
        if not count:
            return super()._prepare_graph(job, options)
        job.tell("prove the rewritten graph")
        try:
            _, max_rel = prove_rewrite(job.graph, rewrite, [job.feeds()])
        except BackendUnavailable as e:
            raise BackendError(f"a graph that is rewritten for SM75 has to be proven: {e}") from e
        tolerance = TOLERANCE["fp16" if rewrite.halved else job.precision]
        if max_rel > tolerance:
            raise BackendError(
                f"with {count} operations rewritten for SM75 the graph is "
                f"off by {max_rel:.2g} of its largest value; at most {tolerance:g} is expected. Choose another target, "
                "or --precision fp16 at the export."
            )
        return encode_graph(rewrite.model), Rewritten(
            why="SM75 has no float32 form of these operations",
            converted=rewrite.converted,
            summed=rewrite.summed,
            halved=rewrite.halved,
            graph_sha256=digest(rewrite),
            max_rel_error=max_rel,
        )


class TensorRTBackend(TrtBackend):
    """Full TensorRT: builds on the GPU that runs the engine."""

    library_name = "tensorrt"
    tied_to_system = True
    _runs_here = True

    def _gpu_facts(self) -> Facts:
        cuda = self._cuda()
        return {"gpu": cuda.name, "compute_capability": cuda.compute_capability}

    def _configure(self, config: Trt, *, capturable: bool) -> None:
        """Load the kernel timings of earlier builds: the builder then chooses the same kernels, and is faster.

        Raises:
            BackendError: The file cannot be used.
        """
        options = self.options
        path = self._timing_cache
        pinned = options.timing_cache_sha256 if options is not None else None
        data = path.read_bytes() if path.exists() else b""
        if pinned is not None:
            if not path.exists():
                raise BackendError(f"timing cache {str(path)!r} is not there; SHA-256 {pinned} was expected.")
            found = hashlib.sha256(data).hexdigest()
            if found != pinned:
                raise BackendError(f"timing cache {str(path)!r} has SHA-256 {found}; {pinned} was expected.")
            config.set_flag(self._library.trt.BuilderFlag.ERROR_ON_TIMING_CACHE_MISS)
        cache = config.create_timing_cache(data)
        if cache is None or not config.set_timing_cache(cache, False):
            raise BackendError(f"timing cache {str(path)!r} is not of this TensorRT and GPU. Remove it.")

    def _after_build(self, config: Trt) -> None:
        if self.options is None or self.options.timing_cache_sha256 is None:
            path = self._timing_cache
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(path, bytes(config.get_timing_cache().serialize()))
            except (OSError, DscError) as e:
                logger.warning("timing cache %r is not kept: %s", str(path), e)

    @property
    def _timing_cache(self) -> Path:
        """File of kernel timings, one for each version and GPU."""
        if self.options is not None and self.options.timing_cache is not None:
            return self.options.timing_cache
        cuda = self._cuda()
        name = f"{self._library.version}-{cuda.name}-{cuda.compute_capability}"
        return cache_folder() / "timing" / f"{re.sub('[^A-Za-z0-9.]+', '-', name)}.cache"
