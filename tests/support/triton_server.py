"""A real Triton, out of the wheel nvidia-pytriton, in a virtual environment of its own."""

from __future__ import annotations

import contextlib
import ctypes.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock
from tests.support.paths import ROOT

FOLDER = ROOT / ".cache" / "triton"
VENV = FOLDER / "venv"
BACKENDS = FOLDER / "backends"
DATA = ROOT / "tests" / "data" / "triton"
PACKAGES = ("nvidia-pytriton==0.7.0", "onnxruntime", "tritonclient[grpc]")
READY_S = 60.0
STOP_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Triton:
    """A server that is ready."""

    address: str
    """Of its gRPC service, on this machine alone."""
    python: Path
    """A Python that has tritonclient."""


def site_packages() -> Path:
    return VENV / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def require_triton() -> Path:
    """Give the server's program; set its environment up, once, or skip the test with the reason.

    The environment takes about 480 MB.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if not sys.platform.startswith("linux"):
        pytest.skip("Triton runs on Linux")
    if ctypes.util.find_library(f"python{version}") is None:
        pytest.skip(f"Triton's Python back-end needs libpython{version}: apt install libpython{version}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    stamp, wanted = VENV / ".complete", " ".join((version, *PACKAGES))
    with FileLock(FOLDER / ".lock"):
        if not stamp.is_file() or stamp.read_text() != wanted:
            set_up(stamp, wanted)
    return site_packages() / "pytriton" / "tritonserver" / "bin" / "tritonserver"


def set_up(stamp: Path, wanted: str) -> None:
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(VENV)],
        [str(VENV / "bin" / "python"), "-m", "pip", "install", "--quiet", *PACKAGES],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no Triton here: {(done.stderr.strip().splitlines() or ['pip failed'])[-1]}")
    stamp.write_text(wanted)


def make_backends(folder: Path) -> Path:
    """Put Triton's Python back-end together, and our stand-in for that of ONNX Runtime beside it."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    tritonserver = site_packages() / "pytriton" / "tritonserver"
    shutil.copytree(tritonserver / "backends" / "python", folder / "python")
    shutil.copytree(tritonserver / "python_backend_stubs" / version, folder / "python", dirs_exist_ok=True)
    shutil.copytree(DATA / "onnxruntime", folder / "onnxruntime")
    return folder


@contextlib.contextmanager
def running(program: Path, repository: Path, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], list[int], Path]]:
    """Start a server on a model repository, and end it after the block; gives its process, ports and log."""
    backends = make_backends(folder / "backends")
    ports = free_ports(2)
    log = folder / "log.txt"
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(site_packages() / "nvidia_pytriton.libs"),
        "PYTHONPATH": str(site_packages()),
    }
    command = [
        str(program),
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={ports[0]}",
        "--http-address=127.0.0.1",
        f"--http-port={ports[1]}",
        "--allow-metrics=false",
        "--model-control-mode=none",
        "--exit-timeout-secs=5",
    ]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process, ports, log
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def serve(program: Path, repository: Path, folder: Path) -> Iterator[Triton]:
    """Serve a model repository, with every model of it ready."""
    with running(program, repository, folder) as (process, (grpc_port, http_port), log):
        end_s = time.monotonic() + READY_S
        while not is_ready(http_port):
            assert process.poll() is None, log.read_text(errors="replace")[-6000:]
            assert time.monotonic() < end_s, log.read_text(errors="replace")[-6000:]
            time.sleep(0.05)
        yield Triton(address=f"127.0.0.1:{grpc_port}", python=VENV / "bin" / "python")


def is_ready(http_port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{http_port}/v2/health/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
