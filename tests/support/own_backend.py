"""A back-end that is none of ours: its engines are copies of the graphs, made for one GPU and version."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

from dsc_split.engines import (
    BuildJob,
    BuildOptions,
    BuiltEngine,
    EngineFacts,
    EngineLike,
    EngineSource,
    Target,
    get_backend,
)

__all__ = ["OwnBackend"]

COUNTER = itertools.count(10)


class OwnBackend:
    """Builds another file each time, as TensorRT does."""

    compiles = True

    def __init__(
        self, *, target: str = "tensorrt:cuda", gpu: str = "Orin", version: str = "1", power: str = "25W"
    ) -> None:
        self.target = Target.parse(target)
        self.options: BuildOptions | None = BuildOptions(batches=(1, 4))
        self.gpu, self.version, self.power = gpu, version, power
        self.built: list[Path] = []
        self.loaded: list[str] = []

    def build_fingerprint(self) -> dict[str, Any]:
        return {"library": "own", "version": self.version, "architecture": "cuda", "gpu": self.gpu}

    def run_fingerprint(self) -> dict[str, Any]:
        gpu = {"name": self.gpu, "driver": "580"}
        return {**self.build_fingerprint(), "gpu": gpu, "power_mode": self.power, "host": "here", "slowdown": 1.0}

    def live_state(self) -> dict[str, Any]:
        return {}

    def build(self, job: BuildJob) -> BuiltEngine | None:
        data = b"OWN%05d" % next(COUNTER) + job.source.data
        job.output.write_bytes(data)
        self.built.append(job.output)
        sha256 = hashlib.sha256(data).hexdigest()
        facts = EngineFacts(profile=job.profile)
        return BuiltEngine(path=job.output, sha256=sha256, size_bytes=len(data), facts=facts, cached=False)

    def load(self, source: Path | EngineSource, *, sha256: str | None = None, digest: str | None = None) -> EngineLike:
        assert isinstance(source, EngineSource)
        assert hashlib.sha256(source.data).hexdigest() == source.sha256 == sha256
        assert source.data.startswith(b"OWN")
        self.loaded.append(source.name)
        graph = EngineSource(name=source.name, data=source.data[8:], sha256="")
        return get_backend("onnxruntime:cpu").load(graph)
