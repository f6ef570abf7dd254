"""Run models with ONNX Runtime on the CPU, the reference of all proofs, without its log output."""

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

Session = Any
"""An ``onnxruntime.InferenceSession``; ONNX Runtime has no types."""
TIME_LIMIT_S = 3600.0
"""Seconds that one run of a model may take."""


def open_session(model: Path | bytes, *, weights_folder: Path | None = None) -> Session:
    """Open a session on the CPU.

    Args:
        model: A file, or a serialised graph.
        weights_folder: Folder of the external data of a serialised graph.

    Raises:
        BackendUnavailable: ONNX Runtime is not installed.
        BackendError: ONNX Runtime refuses the model; the message names the op if ONNX Runtime does.
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
        raise _to_backend_error(e, f"ONNX Runtime cannot load {what}") from e


def run_session(session: Session, feed: Mapping[str, np.ndarray], what: str) -> dict[str, np.ndarray]:
    """Run a session, and return its outputs by name.

    Args:
        session: From :func:`open_session`.
        feed: Values by name; those that are no inputs of the session are ignored.
        what: Name of the model, for messages.

    Raises:
        BackendError: ONNX Runtime fails.
    """
    names = [item.name for item in session.get_outputs()]
    inputs = {item.name: feed[item.name] for item in session.get_inputs()}
    try:
        values = session.run(names, inputs)
    except Exception as e:  # as above
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        raise _to_backend_error(e, f"ONNX Runtime cannot run {what!r} on {shapes}") from e
    return dict(zip(names, values, strict=True))


def _to_backend_error(error: Exception, what: str) -> BackendError:
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error).strip())
    # The line of ONNX Runtime's source code helps no user, and has a path of the build machine.
    text = re.sub(r"/\S+/onnxruntime/\S+\.(?:cc|h):\d+ ?", "", text)
    if isinstance(error, MemoryError) or says_out_of_memory(text):
        return OutOfMemoryError(f"{what}: out of memory ({text[:200]})")
    return BackendError(f"{what}: {text[:600]}")


class TrialRun:
    """The program of the child process: it runs a model once."""

    def run(self, model: str, inputs: Sequence[dict[str, object]], batch: int) -> None:
        """Run the model of a file on random inputs; ``inputs`` describes them as the manifest does."""
        from dsc_split.bundles._samples import make_inputs

        feed = make_inputs([read_record(item, TensorInfo) for item in inputs], batch, 0, None)
        run_session(open_session(Path(model)), feed, Path(model).name)


def run_in_worker(model: Path, inputs: Sequence[TensorInfo], batch: int, memory_bytes: int) -> None:
    """Run a model once in a child process, so that only this process ends if memory runs out.

    Args:
        model: The graph.
        inputs: Its inputs.
        batch: Batch size.
        memory_bytes: Memory that the process may take.

    Raises:
        OutOfMemoryError: The process ran out of memory.
        BackendUnavailable: ONNX Runtime is not installed.
        BackendError: It failed for another reason, or took longer than an hour.
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
