"""Print what a TensorRT binding offers, as JSON: a program, for two versions cannot be imported into one process.

    python print_bindings.py VERSION CACHE-FOLDER

The bindings are a wheel of their own, of a megabyte. They are imported without the library: a stub that defines the
nine functions they link to is enough to read classes, methods, enumerations and signatures. Ends with exit code 3, and
the reason on stderr, where the bindings or a compiler for the stub cannot be had.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

SYMBOLS = """
createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL getBuilderPluginRegistry
createNvOnnxParser_INTERNAL createNvOnnxParserRefitter_INTERNAL getNvOnnxParserVersion getPluginRegistry
initLibNvInferPlugins
""".split()

UNAVAILABLE = 3


class NotHereError(Exception):
    """The bindings cannot be had on this machine; the message says why."""


@dataclass(frozen=True)
class Bindings:
    """One version of the bindings."""

    module: str
    """What to import."""
    requirements: tuple[str, ...]
    """What pip may be asked for, best first; empty where it must be installed already."""
    libraries: tuple[str, ...]
    """What the bindings link to, by soname."""


RTX = ("libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1")


def full(major: int) -> tuple[str, ...]:
    """Name the libraries of full TensorRT."""
    return tuple(f"lib{name}.so.{major}" for name in ("nvinfer", "nvonnxparser", "nvinfer_plugin"))


def pinned(package: str, *versions: str) -> tuple[str, ...]:
    """Spell requirements of one package, best first."""
    return tuple(f"{package}=={version}" for version in versions)


VERSIONS = {
    "rtx": Bindings("tensorrt_rtx_bindings", (), RTX),
    # The oldest that the extra admits; later ones where there is no wheel of it for this Python.
    "rtx-oldest": Bindings(
        "tensorrt_rtx_bindings", pinned("tensorrt-rtx-cu13-bindings", "1.5.0.114", "1.6.1.120", "1.7.1.116"), RTX
    ),
    "11": Bindings("tensorrt_bindings", (), full(11)),
    # JetPack 6 has 10.3.
    "10-oldest": Bindings(
        "tensorrt_bindings", pinned("tensorrt-cu12-bindings", "10.3.0", "10.8.0.43", "10.15.1.29"), full(10)
    ),
    "10-newest": Bindings("tensorrt_bindings", pinned("tensorrt-cu13-bindings", "10.16.1.11"), full(10)),
}


def download(requirement: str, folder: Path) -> None:
    """Unpack the wheel of ``requirement`` into ``folder``, which appears all at once."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command = [*pip, "--retries", "1", "--timeout", "20", "--dest", scratch, requirement]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        except subprocess.TimeoutExpired as e:
            raise NotHereError(f"pip takes too long to download {requirement}") from e
        if done.returncode:
            raise NotHereError(f"pip: {done.stderr.strip().splitlines()[-1]}")
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            wheel.extractall(unpacked)
        unpacked.rename(folder)


def compile_stub(soname: str, symbols: list[str], folder: Path) -> Path:
    """Compile a library that defines ``symbols`` and does nothing."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "g++"))), None)
    if compiler is None:
        raise NotHereError("there is no C compiler for the stub library")
    library = folder / soname
    source = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in symbols)
    command = [compiler, "-x", "c", "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", str(library), "-"]
    subprocess.run(command, input=source, text=True, check=True, timeout=60)
    return library


def load(bindings: Bindings, cache: Path) -> Any:
    """Import the bindings, stubs in place of the library.

    Raises:
        NotHereError: They are not installed, or pip or the compiler fails.
    """
    if not bindings.requirements and importlib.util.find_spec(bindings.module) is None:
        raise NotHereError(f"{bindings.module!r} is not installed")
    cache.mkdir(parents=True, exist_ok=True)
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    refused = []
    for requirement in bindings.requirements:
        folder = cache / f"{requirement}-{tag}"
        try:
            with filelock.FileLock(f"{folder}.lock"):
                if not folder.is_dir():
                    download(requirement, folder)
        except NotHereError as e:
            refused.append(str(e))
            continue
        sys.path.insert(0, os.fspath(folder))
        break
    else:
        if bindings.requirements:
            raise NotHereError(refused[0])
    with tempfile.TemporaryDirectory() as scratch:
        for soname, symbols in zip(bindings.libraries, [SYMBOLS, [], []], strict=False):
            ctypes.CDLL(os.fspath(compile_stub(soname, symbols, Path(scratch))), mode=ctypes.RTLD_GLOBAL)
        try:
            return importlib.import_module(bindings.module)
        except ImportError as e:
            raise NotHereError(f"{bindings.module!r} does not import: {e}") from e


def signatures(doc: str | None, name: str) -> list[list[str]]:
    """Read a method's overloads out of its docstring: each the list of its parameters, ``=`` where optional."""
    found = []
    for match in re.finditer(rf"^(?:\d+\. )?{re.escape(name)}\((.*)\) -> ", doc or "", re.MULTILINE):
        parameters = []
        for text in split_at_commas(match[1]):
            label, _, rest = text.strip().partition(":")
            if label not in ("/", "*"):
                parameters.append(label + ("=" if " = " in rest else ""))
        if parameters != ["*args", "**kwargs"]:
            found.append(parameters)
    return found


def split_at_commas(text: str) -> list[str]:
    """Split at the commas that stand in no bracket."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "[(<{") - (letter in "])>}")
        if letter == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [part for part in [*parts, text[start:]] if part.strip()]


def surface(module: Any) -> dict[str, Any]:
    """List a module's names; of a class its members, and what its methods take."""
    names: dict[str, Any] = {}
    for name in dir(module):
        value = getattr(module, name)
        if isinstance(value, type):
            members = ["__init__", *(member for member in dir(value) if not member.startswith("_"))]
            names[name] = {member: signatures(getattr(value, member).__doc__, member) for member in members}
        else:
            names[name] = None
    return {"version": module.__version__, "names": names}


def main() -> int:
    """Run the program; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version", choices=VERSIONS)
    parser.add_argument("cache", type=Path)
    arguments = parser.parse_args()
    try:
        print(json.dumps(surface(load(VERSIONS[arguments.version], arguments.cache))))
    except NotHereError as e:
        print(e, file=sys.stderr)
        return UNAVAILABLE
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
