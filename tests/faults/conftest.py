"""Commands that are killed, starved and run beside each other, on a bundle that is tiny and real."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

import onnx
from onnx import TensorProto, helper, numpy_helper
from tests.support.commands import Commands
from tests.support.fault_cases import BENCH, BUILD, EXPORT, restore
from tests.support.paths import ROOT


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """The warm process; its engine cache is its own."""
    environment = {
        **os.environ,
        "DSC_SPLIT_CACHE": str(tmp_path_factory.mktemp("cache")),
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, str(ROOT / "tests" / "support" / "warm_server.py")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield Commands(process)
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x -Conv- a -Relu- b -Conv- c -Relu- y      the weights are large enough to lie in a file of their own"""
    chance = np.random.default_rng(0)
    weights = {
        "v": chance.normal(size=(16, 3, 3, 3)).astype(np.float32),
        "w": chance.normal(size=(8, 16, 3, 3)).astype(np.float32),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "v"], ["a"], pads=[1, 1, 1, 1], strides=[4, 4]),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("Conv", ["b", "w"], ["c"], pads=[1, 1, 1, 1], strides=[2, 2]),
            helper.make_node("Relu", ["c"], ["y"]),
        ],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8, 2, 2])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = tmp_path_factory.mktemp("network") / "net.onnx"
    onnx.save(model, str(path))
    return path


@pytest.fixture(scope="session")
def base(commands: Commands, network: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``bundle``: one pair, engines of the server, times of both sides, and its table."""
    folder = tmp_path_factory.mktemp("base")
    shutil.copy(network, folder / "net.onnx")
    for arguments in (EXPORT, BUILD, BENCH):
        run = commands(*arguments, folder=folder)
        assert run.status == 0, run.output
    return folder


@pytest.fixture
def work(base: Path, tmp_path: Path) -> Path:
    """A copy of ``base`` to break."""
    return restore(base, tmp_path / "work")
