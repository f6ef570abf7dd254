"""ONNX Runtime on the CPU as the reference of proofs: sessions with every optional noise off."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsc_split._support.child import Child, ChildOptions
from dsc_split._support.memory import says_out_of_memory
from dsc_split._support.optional import require
from dsc_split._support.records import read_record, to_document
from dsc_split.bundle import TensorInfo
from dsc_split.errors import BackendError, BackendUnavailable, DscError, OutOfMemoryError

__all__ = ["open_session", "run_in_worker", "run_session"]

logger = logging.getLogger(__name__)

TIME_LIMIT_S = 3600.0
"""Seconds that one run of a model may take."""


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
    if isinstance(error, MemoryError) or says_out_of_memory(text):
        return OutOfMemoryError(f"{what}: out of memory ({text[:200]})")
    return BackendError(f"{what}: {text[:600]}")


class TrialRun:
    """The program of the child process that runs a model once."""

    def run(self, model: str, inputs: Sequence[dict[str, Any]], batch: int) -> None:
        """Run the model of a file on random inputs, which are described as in the manifest."""
        from dsc_split.bundles._samples import make_inputs

        feed = make_inputs([read_record(item, TensorInfo) for item in inputs], batch, 0, None)
        run_session(open_session(Path(model)), feed, Path(model).name)


def run_in_worker(model: Path, inputs: Sequence[TensorInfo], batch: int, memory_bytes: int) -> None:
    """Run a model once in a process of its own, so that the end of memory ends that process alone.

    Args:
        model: The graph.
        inputs: Its inputs.
        batch: Batch size.
        memory_bytes: What the process may take.

    Raises:
        OutOfMemoryError: The process ran out of memory.
        BackendUnavailable: ONNX Runtime is not installed.
        BackendError: It failed otherwise, or took longer than an hour.
    """
    options = ChildOptions(
        label="the process that runs the model", memory_limit_bytes=memory_bytes, time_limit_s=TIME_LIMIT_S
    )
    with Child(options, TrialRun) as child:
        try:
            child.ask(TrialRun.run, str(model), [to_document(item) for item in inputs], batch)
        except (OutOfMemoryError, BackendUnavailable):
            raise
        except DscError as e:
            said = str(e).replace("\n", " ")
            raise BackendError(f"{model.name!r} does not run at batch {batch}: {said}") from e
