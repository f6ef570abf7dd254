"""The state of a GPU, read through a pretended NVML, and the same functions where there is none."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsc_split.engines import _fingerprint
from dsc_split.engines.gpu._jetson import power_mode
from dsc_split.engines.gpu._state import gpu_facts, gpu_state, lock_clocks, unlock_clocks
from dsc_split.errors import BackendError, BackendUnavailable, UsageError

GPU = {
    "name": "NVIDIA GeForce RTX 2080 Ti",
    "uuid": "GPU-11111111-aaaa",
    "bus_id": "0000:01:00.0",
    "capability": [7, 5],
    "sm": 1350,
    "memory": 7000,
    "max_sm": 2100,
    "max_memory": 7000,
    "temperature": 61,
    "reasons": 0x20 | 0x4,
    "power_mw": 181_500,
    "power_limit_mw": 250_000,
    "utilisation": 97,
}
OTHER = {**GPU, "uuid": "GPU-22222222-bbbb", "bus_id": "0000:02:00.0", "sm": 300, "mig": ["MIG-33333333-cccc"]}
FASTER = {**OTHER, "name": "NVIDIA RTX 6000 Ada Generation"}

Machine = Callable[..., Path]


@pytest.fixture
def machine(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Give this machine GPUs: ``machine(GPU, OTHER, nvmlInit=12)``; named functions fail with that code."""
    spec = importlib.util.spec_from_file_location("pynvml", root / "tests/data/fake_nvml/pynvml.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    state = tmp_path / "nvml.json"
    monkeypatch.setenv("FAKE_NVML", str(state))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)

    def build(*gpus: dict[str, Any], **errors: int) -> Path:
        state.write_text(json.dumps({"gpus": gpus, "errors": errors}))
        return state

    return build


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """The root folder of a system that is no Jetson."""
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


@pytest.fixture
def jetson(tmp_path: Path) -> Path:
    """The root folder of a Jetson Orin with its GPU throttled."""
    files = {
        "var/lib/nvpmodel/status": "pmode:0002\n",
        "etc/nvpmodel.conf": "# modes\n< POWER_MODEL ID=0 NAME=MAXN >\nCPU_ONLINE CORE_0 1\n"
        "< POWER_MODEL ID=2 NAME=MODE_15W >\n",
        "sys/class/devfreq/17000000.gpu/cur_freq": "306000000\n",
        "sys/class/devfreq/17000000.gpu/min_freq": "306000000\n",
        "sys/class/devfreq/17000000.gpu/max_freq": "1300500000\n",
        "sys/class/devfreq/15340000.vic/cur_freq": "1\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "50000\n",
        "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
        "sys/class/thermal/thermal_zone1/temp": "71250\n",
        "sys/class/thermal/cooling_device0/type": "gpu-throttle-alert\n",
        "sys/class/thermal/cooling_device0/cur_state": "1\n",
        "sys/class/thermal/cooling_device1/type": "cpu-throttle-alert\n",
        "sys/class/thermal/cooling_device1/cur_state": "0\n",
        "sys/class/thermal/cooling_device2/type": "pwm-fan\n",
        "sys/class/thermal/cooling_device2/cur_state": "1\n",
    }
    for name, text in files.items():
        path = tmp_path / "jetson" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "jetson"


# ---- readings ----------------------------------------------------------------------------------------------


def test_state_holds_clocks_temperature_and_the_names_of_throttle_reasons(machine: Machine, empty: Path) -> None:
    machine(GPU)

    assert gpu_state(root=empty) == {
        "gpu": "NVIDIA GeForce RTX 2080 Ti",
        "sm_clock_mhz": 1350,
        "memory_clock_mhz": 7000,
        "temperature_c": 61,
        "throttle_reasons": ["sw_power_cap", "sw_thermal_slowdown"],
        "power_w": 181.5,
        "utilisation_percent": 97,
    }


def test_older_driver_tells_its_throttle_reasons_by_the_older_function(machine: Machine, empty: Path) -> None:
    machine({**GPU, "reasons": 0x1 | 0x1000}, nvmlDeviceGetCurrentClocksEventReasons=13)

    assert gpu_state(root=empty)["throttle_reasons"] == ["gpu_idle", "bit 12"]


def test_what_a_gpu_does_not_tell_is_left_out(machine: Machine, empty: Path) -> None:
    machine({"name": "GPU", "uuid": "GPU-1", "sm": 900})

    assert gpu_state(root=empty) == {"gpu": "GPU", "sm_clock_mhz": 900}


def test_facts_are_stable_and_hold_limits_but_nothing_live(machine: Machine, empty: Path) -> None:
    machine({**GPU, "application_sm": 1545, "ecc": 0})
    once = gpu_facts(root=empty)
    machine({**GPU, "application_sm": 1545, "ecc": 0, "sm": 300, "temperature": 40, "reasons": 0, "power_mw": 1})

    assert gpu_facts(root=empty) == once
    assert once == {
        "name": "NVIDIA GeForce RTX 2080 Ti",
        "uuid": "GPU-11111111-aaaa",
        "driver_version": "580.65.06",
        "compute_capability": "7.5",
        "power_limit_w": 250.0,
        "max_sm_clock_mhz": 2100,
        "max_memory_clock_mhz": 7000,
        "application_sm_clock_mhz": 1545,
        "ecc": False,
    }


def test_fingerprint_describes_the_gpu_by_the_same_facts(machine: Machine) -> None:
    machine(GPU)

    assert _fingerprint.gpu()["uuid"] == GPU["uuid"]


def test_fingerprint_of_the_machine_holds_the_power_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "power_mode" not in _fingerprint.machine()
    monkeypatch.setattr(_fingerprint, "power_mode", lambda: "MODE_15W (0002)")

    assert _fingerprint.machine()["power_mode"] == "MODE_15W (0002)"


# ---- nothing to read ---------------------------------------------------------------------------------------


def test_without_the_package_the_reason_is_a_pip_command(monkeypatch: pytest.MonkeyPatch, empty: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)

    assert "pip install nvidia-ml-py" in gpu_state(root=empty)["unreadable"]
    assert gpu_facts(root=empty) == {}


def test_without_a_driver_the_reason_is_what_nvml_says(machine: Machine, empty: Path) -> None:
    machine(nvmlInit=12)

    assert gpu_state(root=empty) == {"unreadable": "NVML finds no GPU 0: NVML Shared Library Not Found"}
    assert gpu_facts(root=empty) == {}


def test_real_library_on_a_machine_without_a_driver_gives_its_reason(
    monkeypatch: pytest.MonkeyPatch, empty: Path
) -> None:
    nvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    try:
        nvml.nvmlInit()
        pytest.skip("this machine has an NVIDIA driver, and the test is of one without")
    except nvml.NVMLError as e:
        words = str(e)

    assert words in gpu_state(root=empty)["unreadable"]
    with pytest.raises(BackendUnavailable, match="NVML finds no GPU"):
        lock_clocks(300)


def test_gpu_that_answers_nothing_is_said_to(machine: Machine, empty: Path) -> None:
    machine({"uuid": "GPU-1"})

    assert gpu_state(root=empty) == {"unreadable": "NVML answers nothing about this GPU"}


# ---- which GPU ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("visible", "index", "uuid"),
    [
        (None, 0, GPU["uuid"]),
        (None, 1, OTHER["uuid"]),
        ("1", 0, OTHER["uuid"]),
        ("1, 0", 1, GPU["uuid"]),
        ("GPU-2222", 0, OTHER["uuid"]),
        ("0,-1", 0, GPU["uuid"]),
    ],
)
def test_gpu_is_the_one_that_cuda_shows(
    machine: Machine, empty: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, index: int, uuid: str
) -> None:
    machine(GPU, OTHER)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    assert gpu_facts(index, root=empty)["uuid"] == uuid


@pytest.mark.parametrize(
    ("visible", "words"),
    [
        ("", "CUDA_VISIBLE_DEVICES='' shows no GPU 0"),
        ("-1", "shows no GPU 0"),
        ("-1,0", "shows no GPU 0"),
        ("7", "none of them is '7'"),
        ("GPU-9", "none of them is 'GPU-9'"),
        ("MIG-9", "Not Found"),
    ],
)
def test_gpu_that_cuda_hides_is_unreadable(
    machine: Machine, empty: Path, monkeypatch: pytest.MonkeyPatch, visible: str, words: str
) -> None:
    machine(GPU, OTHER)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    assert words in gpu_state(root=empty)["unreadable"]


def test_mig_instance_has_its_own_name_and_the_clocks_of_its_gpu(
    machine: Machine, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(GPU, OTHER)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-33333333-cccc")

    assert gpu_facts(root=empty)["uuid"] == "MIG-33333333-cccc"
    state = gpu_state(root=empty)
    assert (state["gpu"], state["sm_clock_mhz"]) == ("NVIDIA GeForce RTX 2080 Ti MIG 1g.5gb", 300)


def test_among_gpus_of_several_kinds_cuda_is_asked_which_is_first(
    machine: Machine, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(GPU, FASTER)
    runtime = SimpleNamespace(cudaDeviceGetPCIBusId=lambda length, index: (0, b"0000:02:00.0\0"))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", runtime)

    assert gpu_facts(root=empty)["uuid"] == FASTER["uuid"]
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert gpu_facts(root=empty)["uuid"] == GPU["uuid"]


def test_among_gpus_of_several_kinds_without_cuda_the_remedy_is_named(
    machine: Machine, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(GPU, FASTER)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)

    assert "export CUDA_DEVICE_ORDER=PCI_BUS_ID" in gpu_state(root=empty)["unreadable"]


# ---- Jetson ------------------------------------------------------------------------------------------------


def test_jetson_tells_power_mode_clock_temperature_and_throttling_by_files(jetson: Path, machine: Machine) -> None:
    machine(nvmlInit=12)

    assert gpu_state(root=jetson) == {
        "sm_clock_mhz": 306,
        "temperature_c": 71.25,
        "throttle_reasons": ["gpu-throttle-alert"],
        "power_mode": "MODE_15W (0002)",
        "clocks_pinned": False,
    }
    assert gpu_facts(root=jetson) == {"max_sm_clock_mhz": 1300, "clocks_pinned": False}


def test_what_nvml_tells_on_jetson_comes_before_the_files(jetson: Path, machine: Machine) -> None:
    machine({"name": "Orin (nvgpu)", "uuid": "GPU-1", "sm": 612})

    state = gpu_state(root=jetson)

    assert (state["gpu"], state["sm_clock_mhz"], state["temperature_c"]) == ("Orin (nvgpu)", 612, 71.25)


def test_clocks_that_jetson_clocks_has_pinned_are_told(jetson: Path, machine: Machine) -> None:
    machine(nvmlInit=12)
    (jetson / "sys/class/devfreq/17000000.gpu/min_freq").write_text("1300500000\n")

    assert gpu_facts(root=jetson)["clocks_pinned"] is True


def test_power_mode_without_a_name_stays_a_number(jetson: Path) -> None:
    (jetson / "etc/nvpmodel.conf").unlink()

    assert power_mode(jetson) == "pmode:0002"


def test_power_mode_is_asked_for_where_no_file_tells(
    empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert power_mode(empty) is None
    program = tmp_path / "bin" / "nvpmodel"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'NV Power Mode: MAXN'\necho 0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")

    assert power_mode(empty) == "MAXN"


# ---- locked clocks -----------------------------------------------------------------------------------------


def locked(state: Path) -> Any:
    return json.loads(state.read_text())["gpus"][0].get("locked")


def test_clock_is_locked_and_unlocked(machine: Machine) -> None:
    state = machine(GPU)

    lock_clocks(300)
    assert locked(state) == [300, 300]
    unlock_clocks()
    assert locked(state) is None


def test_clock_beyond_what_the_gpu_has_is_refused(machine: Machine) -> None:
    state = machine(GPU)

    with pytest.raises(UsageError, match="locked at 5000 MHz: this GPU takes 300 to 2100 MHz"):
        lock_clocks(5000)
    assert locked(state) is None


@pytest.mark.parametrize(("code", "words"), [(4, "Only root may"), (3, "on Jetson choose a power mode"), (6, "smi")])
def test_clock_that_cannot_be_locked_says_what_to_do(machine: Machine, code: int, words: str) -> None:
    machine(GPU, nvmlDeviceSetGpuLockedClocks=code, nvmlDeviceGetSupportedMemoryClocks=3)

    with pytest.raises(BackendError, match=words):
        lock_clocks(300)


def test_clock_that_cannot_be_unlocked_says_what_to_do(machine: Machine) -> None:
    machine(GPU, nvmlDeviceResetGpuLockedClocks=4)

    with pytest.raises(BackendError, match="sudo nvidia-smi --reset-gpu-clocks"):
        unlock_clocks()
