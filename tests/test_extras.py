"""The extras as pip resolves them, asked without installing anything."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

OFFLINE = re.compile(
    r"Temporary failure in name resolution|Name or service not known|Network is unreachable|Connection refused"
    r"|Could not fetch URL|NewConnectionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError"
)
GLIBC = {"jetpack-6": "2_35", "server": "2_39", "oldest": "2_28"}
"""Of Ubuntu 22.04, of Ubuntu 24.04, and the oldest that the packages are built for."""


@functools.cache
def metadata(root: Path) -> dict[str, Any]:
    """Read what ``pyproject.toml`` declares, by the build back-end itself."""
    command = [sys.executable, "-m", "hatchling", "metadata"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=True)
    declared: dict[str, Any] = json.loads(done.stdout)
    return declared


def requirements(root: Path, extra: str) -> list[str]:
    """List what installing an extra asks for, what every installation asks for included."""
    declared = metadata(root)
    return [*declared["dependencies"], *declared["optional-dependencies"][extra]]


def resolve(wanted: list[str], target: Path, *options: str) -> dict[str, Version]:
    """Ask pip what it would install; returns versions by distribution."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    command += ["--target", str(target), "--retries", "1", "--timeout", "20", *options, *wanted]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode and OFFLINE.search(done.stderr):
        pytest.skip(f"the package registry cannot be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    found = [item["metadata"] for item in json.loads(done.stdout)["install"]]
    return {re.sub(r"[-_.]+", "-", item["name"]).lower(): Version(item["version"]) for item in found}


def machine_options(python: str, machine: str, glibc: str) -> list[str]:
    """Tell pip of another machine. It then takes wheels alone, and judges markers by the machine it runs on."""
    newest = int(glibc.partition("_")[2])
    tags = [f"manylinux_2_{minor}_{machine}" for minor in range(newest, 16, -1)]
    options = ["--only-binary", ":all:", "--python-version", python, "--implementation", "cp"]
    options += [word for abi in ("cp" + python.replace(".", ""), "abi3", "none") for word in ("--abi", abi)]
    return options + [
        word for tag in [*tags, f"manylinux2014_{machine}", f"linux_{machine}"] for word in ("--platform", tag)
    ]


def wheels_of(wanted: list[str], package: str, *parts: str) -> list[str]:
    """Replace a package that exists as source alone by the wheels that it stands for."""
    front = next(Requirement(text) for text in wanted if Requirement(text).name == package)
    others = [text for text in wanted if Requirement(text).name != package]
    return others + [f"{package}-{part}{front.specifier}" for part in parts]


@pytest.mark.slow
def test_jetson_resolves_on_jetpack_6_with_the_bindings_of_cuda_12(root: Path, tmp_path: Path) -> None:
    found = resolve(requirements(root, "jetson"), tmp_path, *machine_options("3.10", "aarch64", GLIBC["jetpack-6"]))

    assert Version("12.6") <= found["cuda-bindings"] < Version("13")
    heavy = {"cuda-toolkit", "torch", "onnx", "onnxruntime", "tensorrt", "tensorrt-cu12", "tensorrt-cu13"}
    assert heavy & set(found) == set(), "TensorRT and CUDA come with the system"


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.10", "3.14"])
@pytest.mark.parametrize(("machine", "glibc"), [("x86_64", "oldest"), ("aarch64", "server")])
def test_rtx_resolves_from_python_3_10_to_3_14(
    root: Path, tmp_path: Path, python: str, machine: str, glibc: str
) -> None:
    wanted = wheels_of(requirements(root, "rtx"), "tensorrt-rtx-cu13", "bindings", "libs")

    found = resolve(wanted, tmp_path, *machine_options(python, machine, GLIBC[glibc]))

    assert found["cuda-bindings"].major == 13
    assert found["tensorrt-rtx-cu13-bindings"] == found["tensorrt-rtx-cu13-libs"]
    assert {"nvidia-ml-py", "numpy"} <= set(found)


@pytest.mark.slow
def test_rtx_resolves_on_this_machine(root: Path, tmp_path: Path) -> None:
    found = resolve(requirements(root, "rtx"), tmp_path)

    assert found["tensorrt-rtx-cu13"] == found["tensorrt-rtx-cu13-bindings"] == found["tensorrt-rtx-cu13-libs"]


@pytest.mark.slow
def test_tensorrt_resolves_but_for_the_libraries_that_its_own_registry_has(root: Path, tmp_path: Path) -> None:
    wanted = wheels_of(requirements(root, "tensorrt"), "tensorrt-cu13", "bindings")

    found = resolve(wanted, tmp_path, *machine_options("3.12", "x86_64", GLIBC["server"]))

    assert found["tensorrt-cu13-bindings"] >= Version("11")
    assert found["cuda-bindings"].major == 13


def test_jetson_and_the_rest_cannot_be_asked_for_together(root: Path) -> None:
    extras = metadata(root)["optional-dependencies"]

    bindings = {
        extra: Requirement(text).specifier
        for extra in ("jetson", "rtx", "tensorrt")
        for text in extras[extra]
        if Requirement(text).name == "cuda-bindings"
    }

    assert {extra: "12.9.10" in versions for extra, versions in bindings.items()} == {
        "jetson": True,
        "rtx": False,
        "tensorrt": False,
    }
    assert {extra: "13.5.0" in versions for extra, versions in bindings.items()} == {
        "jetson": False,
        "rtx": True,
        "tensorrt": True,
    }


def test_a_device_needs_no_framework(root: Path) -> None:
    declared = metadata(root)

    base = {Requirement(text).name for text in declared["dependencies"]}
    assert base == {"filelock", "msgspec", "numpy", "platformdirs", "psutil", "rich", "typer"}
    for extra in ("jetson", "rtx", "tensorrt"):
        names = {Requirement(text).name for text in declared["optional-dependencies"][extra]}
        assert names & {"torch", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "dsc-split"} == set(), extra


def test_registry_that_cannot_be_reached_skips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("PIP_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")

    with pytest.raises(pytest.skip.Exception, match="cannot be reached"):
        resolve(["numpy"], tmp_path)
