"""NVML, pretended. What GPUs there are and which functions fail stands in the JSON file that FAKE_NVML names.

{"gpus": [{"name": ..., "uuid": ..., "bus_id": ..., "mig": ["MIG-..."], "sm": 1500, ..., "locked": null}],
 "errors": {"nvmlDeviceGetName": 3}}
"""

# ruff: noqa: N802 - the names are NVML's

import functools
import json
import os
from pathlib import Path

NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_NO_PERMISSION, NVML_ERROR_NOT_FOUND = 3, 4, 6
NVML_ERROR_LIBRARY_NOT_FOUND, NVML_ERROR_FUNCTION_NOT_FOUND = 12, 13
WORDS = {
    3: "Not Supported",
    4: "Insufficient Permissions",
    6: "Not Found",
    12: "NVML Shared Library Not Found",
    13: "Function Not Found",
}


class NVMLError(Exception):
    def __init__(self, value):
        super().__init__(WORDS[value])
        self.value = value


class Utilisation:
    def __init__(self, gpu):
        self.gpu = gpu


def read():
    return json.loads(Path(os.environ["FAKE_NVML"]).read_text())


def write(state):
    path = Path(os.environ["FAKE_NVML"])
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(state))
    partial.replace(path)


def answers(function):
    """Make a function that may be told to fail."""

    @functools.wraps(function)
    def answer(*arguments):
        code = read().get("errors", {}).get(function.__name__)
        if code is not None:
            raise NVMLError(code)
        return function(*arguments)

    return answer


def value(handle, key):
    found = read()["gpus"][handle[0]]
    if key not in found:
        raise NVMLError(NVML_ERROR_NOT_SUPPORTED)
    return found[key]


def find(key, text):
    for number, gpu in enumerate(read()["gpus"]):
        if gpu[key] == text:
            return (number, None)
        if key == "uuid" and text in gpu.get("mig", ()):
            return (number, text)
    raise NVMLError(NVML_ERROR_NOT_FOUND)


def lock(handle, clocks):
    state = read()
    state["gpus"][handle[0]]["locked"] = clocks
    state["gpus"][handle[0]]["times_locked"] = state["gpus"][handle[0]].get("times_locked", 0) + (clocks is not None)
    write(state)


@answers
def nvmlInit():
    return None


@answers
def nvmlSystemGetDriverVersion():
    return "580.65.06"


@answers
def nvmlDeviceGetCount():
    return len(read()["gpus"])


@answers
def nvmlDeviceGetHandleByIndex(index):
    return (index, None)


@answers
def nvmlDeviceGetHandleByUUID(uuid):
    return find("uuid", uuid)


@answers
def nvmlDeviceGetHandleByPciBusId(bus_id):
    return find("bus_id", bus_id)


@answers
def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle):
    return (handle[0], None)


@answers
def nvmlDeviceGetName(handle):
    return value(handle, "name") + (" MIG 1g.5gb" if handle[1] else "")


@answers
def nvmlDeviceGetUUID(handle):
    return handle[1] or value(handle, "uuid")


def only_whole(handle):
    if handle[1] is not None:
        raise NVMLError(NVML_ERROR_NOT_SUPPORTED)


@answers
def nvmlDeviceGetCudaComputeCapability(handle):
    return value(handle, "capability")


@answers
def nvmlDeviceGetClockInfo(handle, kind):
    only_whole(handle)
    locked = read()["gpus"][handle[0]].get("locked")
    if kind == NVML_CLOCK_SM and locked:
        return locked[0]
    return value(handle, {NVML_CLOCK_SM: "sm", NVML_CLOCK_MEM: "memory"}[kind])


@answers
def nvmlDeviceGetMaxClockInfo(handle, kind):
    return value(handle, {NVML_CLOCK_SM: "max_sm", NVML_CLOCK_MEM: "max_memory"}[kind])


@answers
def nvmlDeviceGetApplicationsClock(handle, kind):
    return value(handle, {NVML_CLOCK_SM: "application_sm", NVML_CLOCK_MEM: "application_memory"}[kind])


@answers
def nvmlDeviceGetTemperature(handle, sensor):
    only_whole(handle)
    return value(handle, "temperature")


@answers
def nvmlDeviceGetCurrentClocksEventReasons(handle):
    return value(handle, "reasons")


@answers
def nvmlDeviceGetCurrentClocksThrottleReasons(handle):
    return value(handle, "reasons")


@answers
def nvmlDeviceGetPowerUsage(handle):
    return value(handle, "power_mw")


@answers
def nvmlDeviceGetPowerManagementLimit(handle):
    return value(handle, "power_limit_mw")


@answers
def nvmlDeviceGetUtilizationRates(handle):
    return Utilisation(value(handle, "utilisation"))


@answers
def nvmlDeviceGetEccMode(handle):
    return [value(handle, "ecc"), value(handle, "ecc")]


@answers
def nvmlDeviceGetSupportedMemoryClocks(handle):
    return [value(handle, "max_memory"), 405]


@answers
def nvmlDeviceGetSupportedGraphicsClocks(handle, memory):
    return list(range(value(handle, "max_sm"), 299, -15))


@answers
def nvmlDeviceSetGpuLockedClocks(handle, lowest, highest):
    lock(handle, [lowest, highest])


@answers
def nvmlDeviceResetGpuLockedClocks(handle):
    lock(handle, None)
