"""ONNX Runtime on the CPU as the reference of proofs: sessions with every optional noise off."""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsc_split._support.optional import require
from dsc_split._support.records import Record, read_record, to_document
from dsc_split.bundle import TensorInfo
from dsc_split.errors import BackendError, OutOfMemoryError

__all__ = ["open_session", "run_in_worker", "run_session"]

logger = logging.getLogger(__name__)

_OUT_OF_MEMORY = re.compile(
    r"bad_?alloc|failed to allocate|out of memory|cannot allocate memory|Available memory of", re.I
)


def open_session(model: Path | bytes, *, weights_folder: Path | None = None) -> Any:
    """Open an ``onnxruntime.InferenceSession`` on the CPU.

    Args:
        model: A file, or a serialised graph.
        weights_folder: Where the external data of a serialised graph lies.

    Raises:
        BackendUnavailable: ONNX Runtime is not installed.
        BackendError: ONNX Runtime refuses the model; the message names the op where it does.
    """
    ort = require("onnxruntime", extra="cpu", purpose="run graphs on the CPU, the reference of every proof")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if weights_folder is not None:
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(weights_folder))
    what = repr(model.name) if isinstance(model, Path) else "the graph"
    try:
        return ort.InferenceSession(
            model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"]
        )
    except Exception as e:  # ONNX Runtime's errors have no common base below Exception
        raise _as_ours(e, f"ONNX Runtime cannot load {what}") from e


def run_session(session: Any, feed: Mapping[str, np.ndarray[Any, Any]], what: str) -> dict[str, np.ndarray[Any, Any]]:
    """Run a session on the inputs that it has, and name its outputs.

    Args:
        session: From :func:`open_session`.
        feed: Values by name; names that are no inputs of the session are left out.
        what: What is run, for messages.

    Raises:
        BackendError: ONNX Runtime fails.
    """
    names = [item.name for item in session.get_outputs()]
    inputs = {item.name: feed[item.name] for item in session.get_inputs()}
    try:
        values = session.run(names, inputs)
    except Exception as e:  # as above
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        raise _as_ours(e, f"ONNX Runtime cannot run {what!r} on {shapes}") from e
    return dict(zip(names, values, strict=True))


def _as_ours(error: Exception, what: str) -> BackendError:
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error).strip())
    # Where in ONNX Runtime's own sources it was noticed helps nobody, and names a path of the build machine.
    text = re.sub(r"/\S+/onnxruntime/\S+\.(?:cc|h):\d+ ?", "", text)
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(text):
        return OutOfMemoryError(f"{what}: out of memory ({text[:200]})")
    return BackendError(f"{what}: {text[:600]}")


class _Request(Record):
    """What :func:`run_in_worker` asks of its process."""

    model: str
    """The graph's file."""
    inputs: tuple[TensorInfo, ...]
    """Its inputs."""
    batch: int
    """Batch size."""
    memory_bytes: int
    """What the process may take."""


def run_in_worker(model: Path, inputs: Sequence[TensorInfo], batch: int, memory_bytes: int) -> None:
    """Run a model once in a process of its own, so that the end of memory ends that process alone.

    Args:
        model: The graph.
        inputs: Its inputs.
        batch: Batch size.
        memory_bytes: What the process may take.

    Raises:
        OutOfMemoryError: The process ran out of memory.
        BackendError: It failed otherwise.
    """
    request = _Request(model=str(model), inputs=tuple(inputs), batch=batch, memory_bytes=memory_bytes)
    process = subprocess.run(
        [sys.executable, "-m", "dsc_split.partitioner.proof._reference"],
        input=json.dumps(to_document(request)).encode(),
        capture_output=True,
        check=False,
    )
    if process.returncode == 0:
        return
    text = process.stderr.decode(errors="replace").strip().splitlines()
    last = text[-1] if text else f"exit status {process.returncode}"
    if process.returncode in (-signal.SIGKILL, _EXIT_OUT_OF_MEMORY) or _OUT_OF_MEMORY.search(last):
        raise OutOfMemoryError(last if process.returncode == _EXIT_OUT_OF_MEMORY else "the process was killed")
    raise BackendError(f"{model.name!r} does not run at batch {batch}: {last}")


_EXIT_OUT_OF_MEMORY = 77


def _worker() -> int:
    import resource

    from dsc_split.bundles._samples import make_inputs

    request = read_record(json.loads(sys.stdin.read()), _Request)
    resource.setrlimit(resource.RLIMIT_DATA, (request.memory_bytes, request.memory_bytes))
    model = Path(request.model)
    try:
        run_session(open_session(model), make_inputs(request.inputs, request.batch, 0, None), model.name)
    except (OutOfMemoryError, MemoryError) as e:
        print(e, file=sys.stderr)
        return _EXIT_OUT_OF_MEMORY
    except BackendError as e:
        print(str(e).replace("\n", " "), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_worker())
