"""Full TensorRT without a GPU: the real TensorRT for RTX behind its name, on a pretended GPU.

What it builds is real, what it loads is pretended. It has what full TensorRT has, and lacks what that lacks.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tests.support import fake_cuda as fakes
from tests.support.manifests import stated

from dsc_split.bundle import Bundle
from dsc_split.engines import BuildOptions, BuildRow, SideEngines, build_engines, get_backend
from dsc_split.engines._engine_file import read_header
from dsc_split.engines.gpu import _cuda as cuda_module
from dsc_split.engines.tensorrt._library import TrtLogger, open_library
from dsc_split.errors import BackendUnavailable, EngineMismatch

rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install 'dsc-split[rtx]'")


VERSION = "11.4.0.106"
OF_RTX = {"ComputeCapability", "EngineValidity", "EngineInvalidityDiagnostics"}
OF_A_GPU = set("DataType TensorIOMode TensorLocation ExecutionContextAllocationStrategy IOutputAllocator".split())
"""What is asked for when an engine runs, and is pretended."""


class TimingCache:
    """Kernel timings, as bytes that say how often they were added to."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> memoryview:
        return memoryview(self.data)


class Part:
    """An object of the real library with something of ours in front of it."""

    def __init__(self, real: Any, library: FullTensorRT) -> None:
        vars(self).update(real=real, library=library)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["real"], name)


class Config(Part):
    """A builder's configuration with a timing cache."""

    cache: TimingCache | None = None

    def __getattr__(self, name: str) -> Any:
        if "compute_capab" in name:
            raise AttributeError(name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "cache":
            vars(self)[name] = value
        elif name == "progress_monitor":
            self.real.progress_monitor = value
        else:
            raise AttributeError(name)

    def set_flag(self, flag: Any) -> None:
        self.library.flags.append(flag.name)  # the real one would measure nothing, and miss nothing

    def create_timing_cache(self, data: bytes) -> TimingCache | None:
        self.library.timings_read.append(data)
        return TimingCache(data) if data.startswith(b"timings") or not data else None

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.cache = cache
        return True

    def get_timing_cache(self) -> TimingCache:
        assert self.cache is not None
        return TimingCache((self.cache.data or b"timings") + b"+")


class Builder(Part):
    """A builder for a GPU that the real one can build for without seeing it."""

    def create_builder_config(self) -> Config:
        config = self.real.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(rtx.ComputeCapability.SM89, 0)
        return Config(config, self.library)

    def build_serialized_network(self, network: Any, config: Config) -> bytes:
        plan = bytes(self.real.build_serialized_network(network, config.real))
        tensors = [
            [get(index) for index in range(count)]
            for get, count in ((network.get_input, network.num_inputs), (network.get_output, network.num_outputs))
        ]
        self.library.plans[plan] = [{item.name: fakes.DataType[item.dtype.name] for item in ends} for ends in tensors]
        return plan


class FullTensorRT(ModuleType):
    """The module ``tensorrt``."""

    def __init__(self, version: str = VERSION) -> None:
        super().__init__("tensorrt")
        self.__version__ = version
        self.has_config = not version.startswith("10.3.")  # it came with 10.11
        self.cuda = fakes.FakeCuda()
        self.plans: dict[bytes, list[dict[str, Any]]] = {}
        self.loaded: list[bytes] = []
        self.flags: list[str] = []
        self.timings_read: list[bytes] = []

    @property
    def BuilderFlag(self) -> Any:  # noqa: N802 - the library's name
        flags = rtx.BuilderFlag.__members__
        return SimpleNamespace(**{name: flags[name] for name in flags if name != "REQUIRE_USER_ALLOCATION"})

    def Builder(self, logger: Any) -> Builder:  # noqa: N802 - the library's name
        return Builder(rtx.Builder(logger), self)

    def Runtime(self, logger: Any) -> Any:  # noqa: N802 - the library's name
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: self._load(logger, bytes(plan)))

    def _load(self, logger: Any, plan: bytes) -> Any:
        self.loaded.append(plan)
        inputs, outputs = self.plans[plan]
        ours = TrtLogger()
        ours.native = logger
        trt = fakes.FakeTrt(
            cuda=self.cuda, inputs=inputs, outputs=outputs, rtx=False, logger=ours, has_config=self.has_config
        )
        return trt.Runtime(logger).deserialize_cuda_engine(memoryview(plan))

    def __getattr__(self, name: str) -> Any:
        if name in OF_RTX or name.startswith("__"):
            raise AttributeError(name)
        return getattr(fakes.FakeTrt if name in OF_A_GPU else rtx, name)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of its own, and the libraries as they were, for each test."""
    monkeypatch.setenv("DSC_SPLIT_CACHE", str(tmp_path / "cache"))
    open_library.cache_clear()
    yield tmp_path / "cache"
    open_library.cache_clear()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FullTensorRT]:
    """Put full TensorRT and a GPU into this machine: ``install("10.3.0")``."""

    def put(version: str = VERSION) -> FullTensorRT:
        trt = FullTensorRT(version)
        open_library.cache_clear()
        monkeypatch.setitem(sys.modules, "tensorrt", trt)
        monkeypatch.setattr(cuda_module, "open_cuda", lambda *, extra, primary=False: trt.cuda)
        return trt

    return put


@pytest.fixture
def trt(install: Callable[..., FullTensorRT]) -> FullTensorRT:
    """Full TensorRT on a machine with a GPU."""
    return install()


def build(bundle: Bundle, **options: Any) -> list[BuildRow]:
    """Build the device's engines, and give the rows."""
    return list(build_engines(bundle, "device", "tensorrt", BuildOptions(**{"batches": (1, 4), **options})).rows)


def reasons(rows: list[BuildRow]) -> set[str]:
    return {row.reason for row in rows}


# ---- building --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [VERSION, "10.3.0"])
def test_engines_are_built_for_the_gpu_that_is_here_and_loaded_at_once(
    bundle: Bundle, install: Callable[..., FullTensorRT], version: str
) -> None:
    trt = install(version)

    rows = build(bundle)

    assert reasons(rows) == {""}
    (entry,) = Bundle.open(bundle.path).manifest.targets.device
    assert entry.target == "tensorrt:cuda"
    facts = {"library": "tensorrt", "version": version, "gpu": "Pretended GPU", "compute_capability": "7.5"}
    assert entry.fingerprint.items() >= facts.items()
    header = read_header(bundle.path / str(rows[1].path))
    assert (header.library, header.library_version, header.architecture) == ("tensorrt", version, "cuda")
    assert [hashlib.sha256(plan).hexdigest() for plan in trt.loaded][1] == header.plan_sha256
    assert not trt.cuda.live  # and closed again
    assert SideEngines(Bundle.open(bundle.path), "device").backend.run_fingerprint()["gpu"] is not None


def test_a_plan_that_does_not_load_on_this_gpu_is_a_row_that_failed(bundle: Bundle, trt: FullTensorRT) -> None:
    trt.cuda.allow(0)

    whole, head = build(bundle)

    assert "(pretended)" in whole.reason
    assert head.reason == ""


def test_a_second_build_takes_the_engines_from_the_cache_and_loads_them(bundle: Bundle, trt: FullTensorRT) -> None:
    build(bundle)
    trt.loaded.clear()

    assert [row.cached for row in build(bundle)] == [True, True]
    assert len(trt.loaded) == 2


def test_another_gpu_or_version_builds_anew(bundle: Bundle, install: Callable[..., FullTensorRT]) -> None:
    install()
    build(bundle)
    install().cuda.name = "Another GPU"

    assert [row.cached for row in build(bundle)] == [False, False]
    install("11.5.0.1")
    assert [row.cached for row in build(bundle)] == [False, False]


# ---- timings ---------------------------------------------------------------------------------------------------


def test_timings_are_kept_for_the_next_build(bundle: Bundle, trt: FullTensorRT, cache: Path) -> None:
    build(bundle)

    (file,) = (cache / "timing").iterdir()
    assert file.name == "11.4.0.106-Pretended-GPU-7.5.cache"
    assert file.read_bytes() == b"timings++"
    assert trt.timings_read == [b"", b"timings+"]
    build(bundle, opt_batch=1)
    assert trt.timings_read[2:] == [b"timings++", b"timings+++"]
    assert trt.flags == []


def test_timings_of_another_gpu_or_version_are_not_read(
    bundle: Bundle, install: Callable[..., FullTensorRT], cache: Path
) -> None:
    install()
    build(bundle)
    other = install()
    other.cuda.name = "A/B GPU"
    build(bundle)
    newer = install("11.5.0.1")
    build(bundle)

    assert other.timings_read[0] == newer.timings_read[0] == b""
    assert sorted(path.name for path in (cache / "timing").iterdir()) == [
        "11.4.0.106-A-B-GPU-7.5.cache",
        "11.4.0.106-Pretended-GPU-7.5.cache",
        "11.5.0.1-Pretended-GPU-7.5.cache",
    ]


def test_timings_are_read_from_a_file_and_written_to_it(
    bundle: Bundle, trt: FullTensorRT, dsc: Callable[..., Any], tmp_path: Path, cache: Path
) -> None:
    file = tmp_path / "own.cache"
    file.write_bytes(b"timings of mine ")

    outcome = dsc("build", bundle.path, "--side", "device", "--target", "tensorrt", "--timing-cache", file)

    assert outcome.exit_code == 0, outcome.stderr
    assert trt.timings_read[0] == b"timings of mine "
    assert file.read_bytes() == b"timings of mine ++"
    assert not (cache / "timing").exists()


def test_timings_that_are_pinned_are_read_and_never_written(
    bundle: Bundle, trt: FullTensorRT, dsc: Callable[..., Any], tmp_path: Path
) -> None:
    file = tmp_path / "own.cache"
    file.write_bytes(b"timings")
    digest = hashlib.sha256(b"timings").hexdigest()
    pinned = ("--timing-cache", file, "--timing-cache-sha256", digest)

    outcome = dsc("build", bundle.path, "--side", "device", "--target", "tensorrt", *pinned)

    assert outcome.exit_code == 0, outcome.stderr
    assert file.read_bytes() == b"timings"
    assert trt.timings_read == [b"timings", b"timings"]
    assert trt.flags == ["ERROR_ON_TIMING_CACHE_MISS"] * 2
    (entry,) = Bundle.open(bundle.path).manifest.targets.device
    assert stated(entry.options).timing_cache_sha256 == digest
    options: Any = entry.fingerprint["options"]
    assert options["timing_cache_sha256"] == digest
    engines = SideEngines(Bundle.open(bundle.path), "device")
    engines.load(engines.graphs[0], 4).close()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"timings", f"has SHA-256 {hashlib.sha256(b'timings').hexdigest()}; {64 * '0'} was expected"),
        (None, "not there"),
    ],
)
def test_timings_that_are_not_those_pinned_are_refused(
    bundle: Bundle, trt: FullTensorRT, tmp_path: Path, content: bytes | None, words: str
) -> None:
    file = tmp_path / "own.cache"
    if content is not None:
        file.write_bytes(content)

    (reason,) = reasons(build(bundle, timing_cache=file, timing_cache_sha256=64 * "0"))

    assert f"timing cache {str(file)!r} " in reason
    assert words in reason
    assert file.exists() == (content is not None)
    assert Bundle.open(bundle.path).targets("device") == ()


def test_what_holds_no_timings_is_refused(bundle: Bundle, trt: FullTensorRT, tmp_path: Path) -> None:
    (tmp_path / "garbage").write_bytes(b"garbage")
    (tmp_path / "folder").mkdir()

    assert "is not of this TensorRT and GPU. Remove it" in build(bundle, timing_cache=tmp_path / "garbage")[0].reason
    assert "Is a directory" in build(bundle, timing_cache=tmp_path / "folder")[0].reason


def test_timings_that_cannot_be_written_cost_no_engine(
    bundle: Bundle, trt: FullTensorRT, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.mkdir()
    (cache / "timing").write_text("a file where the folder should be")

    assert reasons(build(bundle)) == {""}

    assert "is not kept: " in caplog.text


# ---- engines of another machine ---------------------------------------------------------------------------------


def test_engines_of_another_gpu_are_refused_with_the_command_that_rebuilds_them(
    bundle: Bundle, install: Callable[..., FullTensorRT]
) -> None:
    install()
    (row, _) = build(bundle)
    trt = install()
    trt.cuda.name, trt.cuda.compute_capability = "Another GPU", "8.9"

    with pytest.raises(EngineMismatch) as caught:
        SideEngines(Bundle.open(bundle.path), "device")

    message = str(caught.value)
    assert "were built for compute_capability '7.5', gpu 'Pretended GPU'" in message
    assert "found compute_capability '8.9', gpu 'Another GPU'" in message
    assert message.endswith(f"dsc-split build {bundle.path} --side device --target tensorrt:cuda --batches 1,4")
    with pytest.raises(EngineMismatch, match=r"for gpu Pretended GPU, compute_capability 7\.5; found gpu Another GPU"):
        get_backend("tensorrt").load(bundle.path / str(row.path))
    assert trt.loaded == []


def test_engines_of_another_version_are_refused_with_the_command_that_rebuilds_them(
    bundle: Bundle, install: Callable[..., FullTensorRT], dsc: Callable[..., Any]
) -> None:
    install("10.3.0")
    (row, _) = build(bundle)
    trt = install(VERSION)

    outcome = dsc("check", bundle.path, "--side", "device")
    assert outcome.exit_code == 6
    assert "were built for version '10.3.0'; found version '11.4.0.106'" in outcome.stderr
    with pytest.raises(EngineMismatch, match=r"for library_version 10\.3\.0; found library_version 11\.4\.0\.106"):
        get_backend("tensorrt").load(bundle.path / str(row.path))
    assert trt.loaded == []


@pytest.mark.parametrize(("name", "value"), [("system", "Windows"), ("machine", "aarch64")])
def test_engines_of_another_system_are_refused_before_they_are_loaded(
    bundle: Bundle, trt: FullTensorRT, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    (row, _) = build(bundle)
    trt.loaded.clear()
    monkeypatch.setattr(f"platform.{name}", lambda: value)

    with pytest.raises(EngineMismatch, match=f"were built for {name} '.*'; found {name} '{value}'"):
        SideEngines(Bundle.open(bundle.path), "device")
    with pytest.raises(EngineMismatch, match=f"built for {name} .*; found {name} {value}"):
        get_backend("tensorrt").load(bundle.path / str(row.path))
    assert trt.loaded == []


def test_an_engine_of_the_other_library_is_refused(bundle: Bundle, trt: FullTensorRT) -> None:
    (row, _) = build_engines(bundle, "device", "tensorrt-rtx:sm89", BuildOptions(batches=(1, 4))).rows

    with pytest.raises(
        EngineMismatch, match=r"built for library tensorrt_rtx, .*architecture sm89.*; found library tensor"
    ):
        get_backend("tensorrt").load(bundle.path / str(row.path))
    assert trt.loaded == []


# ---- what is missing --------------------------------------------------------------------------------------------


def test_a_version_that_is_too_old_is_refused(bundle: Bundle, install: Callable[..., FullTensorRT]) -> None:
    install("10.2.0.19")

    with pytest.raises(BackendUnavailable, match=r"tensorrt is 10\.2\.0\.19; 10\.3 or later was expected"):
        build(bundle)


def test_without_a_gpu_nothing_is_built(
    bundle: Bundle, trt: FullTensorRT, dsc: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(**options: Any) -> None:
        raise BackendUnavailable("no NVIDIA driver: libcuda.so.1 cannot be found. Install the driver.")

    monkeypatch.setattr(cuda_module, "open_cuda", nothing)

    outcome = dsc("build", bundle.path, "--side", "device", "--target", "tensorrt")

    assert outcome.exit_code == 5
    assert "target 'tensorrt:cuda' cannot be used: no NVIDIA driver" in outcome.stderr
    assert Bundle.open(bundle.path).targets("device") == ()
    assert not (bundle.path / "engines").exists()


@pytest.mark.parametrize(("library", "extra"), [("tensorrt", "tensorrt"), ("tensorrt_rtx", "rtx")])
@pytest.mark.parametrize(
    "raises",
    [
        "OSError('libnvinfer.so.11: cannot open shared object file: No such file or directory')",
        "ImportError('libnvinfer.so.11: cannot open shared object file: No such file or directory')",
        "ModuleNotFoundError(\"No module named 'tensorrt_libs'\", name='tensorrt_libs')",
    ],
)
def test_a_library_that_is_installed_and_does_not_load_says_why(
    library: str, extra: str, raises: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{library}.py").write_text(f"raise {raises}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, library, raising=False)
    target = "tensorrt" if library == "tensorrt" else "tensorrt-rtx:sm75"

    with pytest.raises(BackendUnavailable) as caught:
        get_backend(target)

    message = str(caught.value)
    assert f"{library!r} is installed and cannot be loaded: " in message
    assert raises.partition("(")[2].strip("'\"")[:16] in message
    assert f"pip install 'dsc-split[{extra}]'" in message


WITHOUT = """
import sys
sys.modules["tensorrt_rtx"] = sys.modules["tensorrt"] = None
from dsc_split.cli.main import main
main(sys.argv[1:])
"""


def run_without(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(("target", "extra"), [("tensorrt-rtx:sm75", "rtx"), ("tensorrt", "tensorrt")])
def test_a_build_without_the_library_gives_the_pip_command(bundle: Bundle, target: str, extra: str) -> None:
    before = (bundle.path / "manifest.json").read_bytes()

    done = run_without("build", str(bundle.path), "--side", "device", "--target", target)

    assert done.returncode == 5, done.stderr
    assert f"pip install 'dsc-split[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert (bundle.path / "manifest.json").read_bytes() == before


def test_an_export_without_the_library_gives_the_pip_command_before_it_begins(bundle: Bundle, tmp_path: Path) -> None:
    output = tmp_path / "exported"

    done = run_without("export", str(bundle.model_path), "--output", str(output), "--device", "tensorrt-rtx:sm75")

    assert done.returncode == 5, done.stderr
    assert "pip install 'dsc-split[rtx]'" in done.stderr
    assert not output.exists()
