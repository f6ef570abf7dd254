"""What ``dsc-split doctor`` finds on this machine, and on machines that are made up."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dsc_split import __version__
from dsc_split.cli import _console, _doctor
from dsc_split.engines import Backend, EngineSource, Target
from dsc_split.engines import _doctor as room
from dsc_split.engines._doctor import Examination, TargetState, examine
from dsc_split.engines.gpu._list import list_gpus
from dsc_split.errors import BackendUnavailable

Dsc = Callable[..., Any]

GIB = 2**30
BLOCKED = ("onnxruntime", "tensorrt", "tensorrt_rtx", "torch")


class NVMLError(Exception):
    pass


def nvml(gpus: list[tuple[str, int, int]], *, fails: str = "") -> ModuleType:
    """Make an NVML with these GPUs: name, major and minor of the compute capability."""

    def initialise() -> None:
        if fails:
            raise NVMLError(fails)

    def memory(gpu: tuple[str, int, int]) -> SimpleNamespace:
        if "Orin" in gpu[0]:
            raise NVMLError("Not Supported")
        return SimpleNamespace(total=8 * GIB)

    module = ModuleType("pynvml")
    vars(module).update(
        NVMLError=NVMLError,
        nvmlInit=initialise,
        nvmlShutdown=lambda: None,
        nvmlSystemGetCudaDriverVersion_v2=lambda: 13020,
        nvmlSystemGetDriverVersion=lambda: "595.10",
        nvmlDeviceGetCount=lambda: len(gpus),
        nvmlDeviceGetHandleByIndex=lambda index: gpus[index],
        nvmlDeviceGetName=lambda gpu: gpu[0],
        nvmlDeviceGetCudaComputeCapability=lambda gpu: gpu[1:],
        nvmlDeviceGetMemoryInfo=memory,
    )
    return module


def runtime(version: int, gpus: list[tuple[str, int, int]]) -> ModuleType:
    """Make a CUDA runtime with these GPUs."""
    module = ModuleType("cuda.bindings.runtime")
    properties = [
        SimpleNamespace(name=name.encode(), major=major, minor=minor, totalGlobalMem=32 * GIB)
        for name, major, minor in gpus
    ]
    vars(module).update(
        cudaDriverGetVersion=lambda: (0, version),
        cudaGetDeviceCount=lambda: (0 if gpus else 100, len(gpus)),
        cudaGetErrorString=lambda error: (0, b"no CUDA-capable device is detected"),
        cudaGetDeviceProperties=lambda index: (0, properties[index]),
    )
    return module


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give this machine other GPUs: ``machine(nvml=..., cuda=...)``."""

    def become(nvml: ModuleType | None, cuda: ModuleType | None) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)

    return become


@pytest.fixture(scope="module")
def here() -> Examination:
    """This machine, looked at once."""
    return examine()


def state(examination: Examination, target: str) -> TargetState:
    return next(state for state in examination.targets if state.target == target)


# ---- this machine ------------------------------------------------------------------------------------------


def test_doctor_prints_one_json_document_that_lists_the_extras(dsc: Dsc) -> None:
    outcome = dsc("doctor", "--json")

    document = json.loads(outcome.stdout)
    assert outcome.exit_code == 0
    assert document["dsc_split"] == __version__
    assert document["memory_bytes"] > 0
    found = {package["name"]: package for package in document["packages"]}
    assert found["onnxruntime"]["pip"].endswith("pip install 'dsc-split[cpu]'")
    assert found["tensorrt-rtx-cu13"]["extra"] == "rtx"
    assert {"cuda-bindings", "onnx", "torch", "timm", "matplotlib"} <= set(found)
    assert ("CPUExecutionProvider" in document["onnxruntime_providers"]) == bool(found["onnxruntime"]["version"])
    targets = {state["target"]: state for state in document.get("targets")}
    assert {"onnxruntime:cpu", "onnxruntime:cuda", "tensorrt:cuda", "tensorrt-rtx:sm75"} <= set(targets)
    assert targets["onnxruntime:cpu"]["works"]
    assert targets["onnxruntime:cpu"]["library"].startswith("onnxruntime 1.")


def test_every_target_that_does_not_run_says_why(here: Examination) -> None:
    assert [state.target for state in here.targets if not state.runs and not state.why] == []
    assert [state.target for state in here.targets if state.runs and state.why] == []


def test_machine_without_gpu_builds_for_others_and_runs_nothing_of_theirs(here: Examination) -> None:
    if here.gpus or importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("needs tensorrt-rtx, and no GPU")

    found = state(here, "tensorrt-rtx:sm75")
    assert (found.builds, found.runs, found.works) == (True, False, True)
    assert (found.library or "").startswith("tensorrt_rtx 1.")
    assert re.search("no NVIDIA driver|no GPU", found.why)
    assert here.no_gpu


def test_doctor_without_optional_packages_names_what_installs_them() -> None:
    script = (
        f"import sys\nfor name in {BLOCKED!r}: sys.modules[name] = None\n"
        "from dsc_split.cli.main import main\n"
        "main(['doctor'])"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == BackendUnavailable.exit_code, done.stderr
    assert done.stderr == ""
    assert re.search(r"ONNX Runtime providers +none", done.stdout)
    assert re.search(r"onnxruntime:cpu +no +'onnxruntime' is not installed; it is needed to run", done.stdout)
    commands = dict(line.split("  # ") for line in done.stdout.splitlines() if "  # " in line)
    assert commands["pip install 'dsc-split[rtx]'"].startswith("tensorrt-rtx:sm75, sm80")
    assert "tensorrt:cuda" in commands["pip install 'dsc-split[tensorrt]'"]


# ---- other machines ----------------------------------------------------------------------------------------


def test_gpus_are_listed_with_the_targets_that_they_can_run(machine: Callable[..., None]) -> None:
    machine(nvml([("RTX 2080 Ti", 7, 5), ("H100", 9, 0), ("GTX 1080", 6, 1)]), None)

    gpus, cuda_driver, why = list_gpus()

    assert (cuda_driver, why) == ("13.2", "")
    assert [gpu.architecture for gpu in gpus] == ["sm75", "sm90", "sm61"]
    assert gpus[0].targets == ("onnxruntime:cuda", "tensorrt:cuda", "tensorrt-rtx:sm75")
    assert (gpus[0].memory_bytes, gpus[0].driver, gpus[0].note) == (8 * GIB, "595.10", "")
    assert gpus[1].targets == ("onnxruntime:cuda", "tensorrt:cuda")
    assert gpus[1].note == "TensorRT for RTX has no SM90: build with full TensorRT on this machine"
    assert (gpus[2].targets, gpus[2].note) == (("onnxruntime:cuda",), "SM61 is too old for TensorRT")


@pytest.mark.parametrize("nvml_of_it", [None, nvml([], fails="Driver Not Loaded"), nvml([])])
def test_cuda_is_asked_where_nvml_does_not_tell(machine: Callable[..., None], nvml_of_it: ModuleType | None) -> None:
    machine(nvml_of_it, runtime(12060, [("Orin", 8, 7)]))

    (gpu,), cuda_driver, why = list_gpus()

    assert (gpu.name, gpu.architecture, gpu.memory_bytes, gpu.driver) == ("Orin", "sm87", 32 * GIB, None)
    assert gpu.targets == ("onnxruntime:cuda", "tensorrt:cuda")
    assert why == ""
    assert cuda_driver == "12.6"


@pytest.mark.parametrize(
    ("nvml_of_it", "cuda", "words"),
    [
        (None, None, "nvidia-ml-py is not installed; cuda-bindings is not installed"),
        (nvml([], fails="Driver Not Loaded"), runtime(0, []), "NVML: Driver Not Loaded; CUDA: there is no driver"),
        (nvml([]), runtime(13000, []), "NVML: the driver lists no GPU; CUDA: no CUDA-capable device is detected"),
    ],
)
def test_where_there_is_no_gpu_the_reason_is_named(
    machine: Callable[..., None], nvml_of_it: ModuleType | None, cuda: ModuleType | None, words: str
) -> None:
    machine(nvml_of_it, cuda)

    gpus, _, why = list_gpus()

    assert (gpus, why) == ((), words)


def test_memory_that_the_gpu_shares_is_told_by_cuda_on_jetson(machine: Callable[..., None]) -> None:
    orin = ("Orin", 8, 7)
    machine(nvml([orin]), runtime(12060, [orin]))

    assert [gpu.memory_bytes for gpu in list_gpus()[0]] == [0]
    assert [gpu.memory_bytes for gpu in list_gpus(jetson=True)[0]] == [32 * GIB]


@pytest.fixture
def jetson(machine: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """Make the root folder of a Jetson without TensorRT: ``jetson(36)``."""

    def make(release: int) -> Path:
        machine(nvml([("Orin", 8, 7)]), runtime(12060, [("Orin", 8, 7)]))
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
        (tmp_path / "etc").mkdir()
        (tmp_path / "etc/nv_tegra_release").write_text(f"# R{release} (release), REVISION: 4.0, GCID: 37537400\n")
        return tmp_path

    return make


def test_jetpack_6_is_told_to_take_tensorrt_from_the_system(jetson: Callable[[int], Path]) -> None:
    found = examine(jetson(36))

    assert found.jetson == 36
    assert "apt-get install python3-libnvinfer" in str(state(found, "tensorrt:cuda").mend)
    assert state(found, "tensorrt-rtx:sm75").mend is None
    extras = {package.name: package.extra for package in found.packages}
    assert extras["cuda-bindings"] == "jetson"
    assert extras.keys() & {"tensorrt-cu13", "tensorrt-rtx-cu13"} == set()


def test_later_jetpack_has_the_packages_of_cuda_13(jetson: Callable[[int], Path]) -> None:
    found = examine(jetson(38))

    assert found.jetson == 38
    assert state(found, "tensorrt:cuda").mend == "pip install 'dsc-split[tensorrt]'"
    assert "jetson" not in {package.extra for package in found.packages}


class Stub(Backend):
    """A back-end whose library and device are there."""

    compiles = True

    def _require(self) -> None: ...

    def _build_facts(self) -> dict[str, Any]:
        return {"library": "tensorrt_rtx", "version": "1.7.1.116"}

    def _load(self, source: Path | EngineSource, sha256: str | None, digest: str | None) -> Any: ...


@pytest.mark.parametrize(
    ("gpus", "runs", "why"),
    [
        ([("RTX 4090", 8, 9)], True, ""),
        ([("RTX 2080 Ti", 7, 5), ("RTX 4090", 8, 9)], True, ""),
        ([("RTX 2080 Ti", 7, 5)], False, "it needs another GPU than RTX 2080 Ti (SM75)"),
        ([], False, "no GPU was seen"),
    ],
)
def test_target_runs_where_one_of_the_gpus_is_its_own(
    machine: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    gpus: list[tuple[str, int, int]],
    runs: bool,
    why: str,
) -> None:
    machine(nvml(gpus), None)
    monkeypatch.setattr(room, "get_backend", lambda text: Stub(Target.parse(text), extra="rtx"))

    found = state(examine(), "tensorrt-rtx:sm89")

    assert found == TargetState(
        target="tensorrt-rtx:sm89", builds=True, runs=runs, library="tensorrt_rtx 1.7.1.116", why=why, mend=None
    )


def test_library_that_is_installed_and_does_not_load_is_a_problem(tmp_path: Path) -> None:
    package = tmp_path / "tensorrt_rtx"
    package.mkdir()
    (package / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    script = (
        f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nsys.modules['torch'] = None\n"
        "from dsc_split.cli.main import main\n"
        "main(['doctor', '--json'])"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)

    document = json.loads(done.stdout)
    assert done.returncode == 1, done.stderr
    (problem,) = document["problems"]
    assert "'tensorrt_rtx' is installed and cannot be loaded: libcudart.so.13" in problem


def test_back_end_that_raises_anything_leaves_the_rest_to_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(text: str) -> Any:
        raise RuntimeError("undefined symbol: cudaGraphLaunch")

    monkeypatch.setattr(room, "get_backend", explode)

    found = examine()

    assert state(found, "onnxruntime:cpu").why == "RuntimeError: undefined symbol: cudaGraphLaunch"
    assert found.problems == tuple(
        f"back-end {name!r} cannot be tried: RuntimeError: undefined symbol: cudaGraphLaunch"
        for name in ("onnxruntime", "tensorrt", "tensorrt-rtx")
    )
    assert found.exit_code == BackendUnavailable.exit_code


# ---- what is printed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "'tensorrt' is not installed; it is needed to run. Install it: pip install 'dsc-split[tensorrt]'",
            ("'tensorrt' is not installed; it is needed to run", "pip install 'dsc-split[tensorrt]'"),
        ),
        (
            "target 'x:y' cannot be used: only CPU. Install the one that has: pip uninstall a; pip install 'b[c]'",
            ("only CPU", "pip uninstall a; pip install 'b[c]'"),
        ),
        (
            "'ort' is needed to run on target 'x:y'. Install it: pip install 'b[c]'",
            ("'ort' is needed to run on target 'x:y'", "pip install 'b[c]'"),
        ),
        ("cannot read the state: pip install nvidia-ml-py", ("cannot read the state", "pip install nvidia-ml-py")),
        ("no NVIDIA driver. Install the driver: dsc-split doctor", ("no NVIDIA driver. Install the driver", None)),
    ],
)
def test_messages_are_split_into_the_reason_and_the_command(message: str, expected: tuple[str, str | None]) -> None:
    assert room._split_message(message, "x:y") == expected


@pytest.mark.parametrize(
    ("works", "problems", "exit_code"), [(True, (), 0), (True, ("broken",), 1), (False, (), 5), (False, ("broken",), 5)]
)
def test_exit_code_says_whether_anything_works(
    here: Examination, works: bool, problems: tuple[str, ...], exit_code: int
) -> None:
    states = tuple(replace(found, builds=False, runs=works) for found in here.targets)

    assert replace(here, targets=states, problems=problems).exit_code == exit_code


def test_everything_fits_eighty_columns_but_the_commands(
    here: Examination, machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    machine(nvml([("NVIDIA GeForce RTX 2080 Ti", 7, 5), ("NVIDIA H100 80GB HBM3", 9, 0)]), None)
    monkeypatch.setattr(_console.out, "_width", 80)

    _doctor._show(replace(here, gpus=list_gpus()[0]))

    lines = capfd.readouterr().out.splitlines()
    assert [line for line in lines if len(line.rstrip()) > 80 and "  # " not in line] == []
    assert "…" not in "".join(lines)
    assert sum("tensorrt-rtx:sm75" in line for line in lines) >= 2
    assert any("H100" in line and "SM90" in line for line in lines)
