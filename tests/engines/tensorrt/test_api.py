"""What our code takes from TensorRT exists in every version that it is meant for, called as that version wants it.

Read from the source. In the files of the back-end the module is called ``trt`` (or ``self._trt``), and objects of the
library carry the names of the table ``OBJECTS``, or are what a method of ``MAKERS`` returned. A variable that is
annotated as something else than ``Any`` or ``Trt`` is ours, and so are those that ``OURS`` lists.

A name may be absent from a version where ``hasattr`` asks for it; below an ``if`` that asks for another name which this
version lacks, and in functions that are called there alone; and in a class that says that it is of the other library.
"""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.support.paths import ROOT

Surface = dict[str, Any]

PROGRAM = ROOT / "tests" / "support" / "print_bindings.py"
LIBRARY_OF = {
    "rtx": "tensorrt_rtx",
    "rtx-oldest": "tensorrt_rtx",
    "11": "tensorrt",
    "10-newest": "tensorrt",
    "10-oldest": "tensorrt",
}
"""The versions, and what they are imported as."""
UNAVAILABLE = 3

MODULE = "trt"
OBJECTS = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "error": "ParserError",
    "layer": "ILayer",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "runtime_cache": "IRuntimeCache",
    "runtime_config": "IRuntimeConfig",
    "tensor": "ITensor",
    "timing_cache": "ITimingCache",
}
MAKERS = {
    "create_builder_config": "IBuilderConfig",
    "create_execution_context": "IExecutionContext",
    "create_network": "INetworkDefinition",
    "create_optimization_profile": "IOptimizationProfile",
    "create_runtime_cache": "IRuntimeCache",
    "create_runtime_config": "IRuntimeConfig",
    "create_timing_cache": "ITimingCache",
    "deserialize_cuda_engine": "ICudaEngine",
}
OURS = {"_backend.py": {"profile"}, "_calls.py": {"profile", "tensor"}, "_engine.py": {"profile", "tensor"}}
THEIRS = {"Any", "Trt"}

Name = tuple[str, str]
"""A class, or the module, or "" where it is not known; and a name of it."""


@dataclass(frozen=True)
class Use:
    """One name that our code takes from the module, or from a class of it."""

    owner: str
    name: str
    place: str = ""
    positional: int | None = None
    keywords: frozenset[str] = frozenset()
    library: str = ""
    asked: frozenset[Name] = frozenset()

    def __str__(self) -> str:
        return f"{self.place}: {self.owner}.{self.name}"


@dataclass
class Collector(ast.NodeVisitor):
    """Collects the uses in one file, and the names that it asks for with ``hasattr`` before it uses them."""

    file: str
    uses: list[Use] = field(default_factory=list)
    guards: list[Use] = field(default_factory=list)
    classes: list[dict[str, str | None]] = field(default_factory=list)
    asked: list[set[Name]] = field(default_factory=lambda: [set()])
    asked_by_callers: dict[str, set[Name]] = field(default_factory=dict)
    library: str = ""

    def owner_of(self, node: ast.expr) -> str | None:
        """Name the class that an expression is of, or the module; ``None`` where it is nothing of the library."""
        if isinstance(node, ast.Call):
            made = node.func
            if isinstance(made, ast.Attribute) and self.owner_of(made.value) == MODULE and made.attr[0].isupper():
                return made.attr
            return MAKERS.get(made.attr) if isinstance(made, ast.Attribute) else None
        if isinstance(node, ast.Attribute):
            if self.owner_of(node.value) == MODULE:
                return node.attr
            name = node.attr
        elif isinstance(node, ast.Name):
            for known in reversed(self.classes):
                if node.id in known:
                    return known[node.id]
            name = node.id
        else:
            return None
        name = name.lstrip("_")
        if name in OURS.get(self.file, ()):
            return None
        return MODULE if name == MODULE else OBJECTS.get(name)

    def add(self, owner: ast.expr, name: str, node: ast.expr, call: ast.Call | None = None) -> None:
        """Note a use, with what it is called with."""
        found = self.owner_of(owner)
        if found is None or name.startswith("__"):
            return
        positional, keywords = None, frozenset[str]()
        if call and not any(isinstance(argument, ast.Starred) for argument in call.args):
            names = [keyword.arg for keyword in call.keywords]
            if None not in names:
                positional, keywords = len(call.args), frozenset(map(str, names))
        asked = frozenset().union(*self.asked)
        self.uses.append(Use(found, name, f"{self.file}:{node.lineno}", positional, keywords, self.library, asked))

    def guards_in(self, node: ast.AST) -> Iterator[Use]:
        """List the names that are asked for below a node."""
        for child in ast.walk(node):
            match child:
                case ast.Call(func=ast.Name(id="hasattr"), args=[owner, ast.Constant(value=str(name))]):
                    yield Use(self.owner_of(owner) or "", name, f"{self.file}:{child.lineno}")
                case ast.Call(func=ast.Name(id="getattr"), args=[owner, ast.Constant(value=str(name)), _]):
                    yield Use(self.owner_of(owner) or "", name, f"{self.file}:{child.lineno}")

    def asked_in(self, test: ast.expr) -> set[Name]:
        """List the names that the test of an ``if`` asks for."""
        return {(guard.owner, guard.name) for guard in self.guards_in(test)}

    def visit_Module(self, node: ast.Module) -> None:
        imports = [child for child in ast.walk(node) if isinstance(child, (ast.Import, ast.ImportFrom))]
        self.classes.append({alias.asname or alias.name: None for found in imports for alias in found.names})
        self.generic_visit(node)  # once to learn who calls whom after which question
        self.uses.clear()
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer = self.library
        for item in node.body:
            match item:
                case ast.Assign(targets=[ast.Name(id="library_name")], value=ast.Constant(value=str(library))):
                    self.library = library
        for base in node.bases:
            if isinstance(base, ast.Attribute) and self.owner_of(base.value) == MODULE:
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                        place = f"{self.file}:{method.lineno}"
                        self.uses.append(Use(base.attr, method.name, place, len(method.args.args) - 1))
        self.generic_visit(node)
        self.library = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.classes.append(classes_in(node))
        self.asked.append(set(self.asked_by_callers.get(node.name, ())))
        for statement in node.body:
            self.visit(statement)
            if isinstance(statement, ast.If) and isinstance(statement.body[-1], (ast.Return, ast.Raise)):
                self.asked[-1] |= self.asked_in(statement.test)
        self.asked.pop()
        self.classes.pop()

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        self.asked.append(self.asked_in(node.test))
        for statement in [*node.body, *node.orelse]:
            self.visit(statement)
        self.asked.pop()

    def visit_Call(self, node: ast.Call) -> None:
        match node:
            case ast.Call(func=ast.Name(id="hasattr" | "getattr"), args=[_, ast.Constant(), *_]):
                self.guards += [guard for guard in self.guards_in(node) if guard not in self.guards]
                if len(node.args) == 2 and isinstance(node.func, ast.Name) and node.func.id == "getattr":
                    self.add(node.args[0], str(ast.literal_eval(node.args[1])), node)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=name) | ast.Name(id=name)):
                asked = set[Name]().union(*self.asked)
                self.asked_by_callers[name] = self.asked_by_callers.get(name, asked) & asked
            case ast.Call(func=ast.Attribute(value=owner, attr=name)):
                self.add(owner, name, node, node)
                for child in [owner, *node.args, *node.keywords]:
                    self.visit(child)
                return
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.add(node.value, node.attr, node)
        self.generic_visit(node)


def classes_in(function: ast.FunctionDef) -> dict[str, str | None]:
    """Return the class of each name in a function; ``None`` where it is no class of the library."""
    classes: dict[str, str | None] = {}
    for node in ast.walk(function):
        match node:
            case ast.arg(arg=name, annotation=ast.expr() as kind) if ast.unparse(kind) not in THEIRS:
                classes[name] = None
            case ast.AnnAssign(target=ast.Name(id=name), annotation=kind) if ast.unparse(kind) not in THEIRS:
                classes[name] = None
            case ast.ExceptHandler(name=str(name)):
                classes[name] = None
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(func=ast.Attribute(attr=maker))):
                if maker in MAKERS:
                    classes[name] = MAKERS[maker]
    return classes


def collect(sources: dict[str, str]) -> tuple[list[Use], list[Use]]:
    """Collect the uses and the guards of several files."""
    uses, guards = [], []
    for file, source in sources.items():
        collector = Collector(file)
        collector.visit(ast.parse(source))
        uses += collector.uses
        guards += collector.guards
    return uses, guards


def has(surface: Surface, use: Use) -> bool:
    """Whether a version has a name. An absent class has no objects; one without members does not list them."""
    if use.owner == MODULE:
        return use.name in surface
    members = surface.get(use.owner)
    return members is None or use.name in members or set(members) == {"__init__"}


def accepts(surface: Surface, use: Use) -> bool:
    """Whether a version takes the arguments, as far as its docstrings tell."""
    if use.positional is None:
        return True
    if use.owner == MODULE:
        overloads = (surface[use.name] or {}).get("__init__", [])
    else:
        overloads = (surface.get(use.owner) or {}).get(use.name, [])
    return not overloads or any(fits(use, parameters) for parameters in overloads)


def fits(use: Use, parameters: list[str]) -> bool:
    """Whether one overload takes the arguments."""
    parameters = parameters[1:] if parameters[:1] == ["self"] else parameters
    names = [parameter.removesuffix("=") for parameter in parameters]
    given = set(names[: use.positional]) | use.keywords
    required = {parameter for parameter in parameters if not parameter.endswith("=")}
    return (use.positional or 0) <= len(names) and required <= given and use.keywords <= set(names[use.positional :])


def faults(sources: dict[str, str], surface: Surface, library: str = "tensorrt") -> list[str]:
    """List what a version lacks, or takes otherwise."""
    uses, guards = collect(sources)
    guarded = {(guard.owner, guard.name) for guard in guards}
    found = []
    for use in uses:
        if use.library not in ("", library):
            continue
        if has(surface, use):
            if not accepts(surface, use):
                found.append(f"{use} does not take {use.positional} arguments and {sorted(use.keywords)}")
        elif guarded.isdisjoint({(use.owner, use.name), ("", use.name)}) and all(
            name in names_of(surface, owner) for owner, name in use.asked
        ):
            found.append(f"{use} is not there")
    return found


def asked_in_vain(sources: dict[str, str], surfaces: list[Surface]) -> list[str]:
    """List the guards that no version passes: misspelt, or of a version that is gone."""
    return [
        f"{guard} is in no version"
        for guard in collect(sources)[1]
        if not any(guard.name in names_of(surface, guard.owner) for surface in surfaces)
    ]


def names_of(surface: Surface, owner: str) -> set[str]:
    """Return the names of a class or of the module; all there are where the owner is not known."""
    if owner == MODULE:
        return set(surface)
    if owner:
        return set(surface.get(owner) or ())
    return set(surface).union(*(members for members in surface.values() if members))


@functools.cache
def surface_of(version: str, cache: Path) -> Surface | str:
    """Read one version's names in a process of its own; the reason where it cannot be had."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), version, str(cache)], capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode == UNAVAILABLE:
        return done.stderr.strip()
    assert done.returncode == 0, done.stderr
    names: Surface = json.loads(done.stdout)["names"]
    return names


@pytest.fixture(scope="session")
def cache(root: Path) -> Path:
    return root / ".cache" / "bindings"


@pytest.fixture
def surface(request: pytest.FixtureRequest, cache: Path) -> Surface:
    found = surface_of(request.param, cache)
    if isinstance(found, str):
        pytest.skip(f"the bindings of {request.param} cannot be had: {found}")
    return found


@pytest.fixture(scope="session")
def sources(root: Path) -> dict[str, str]:
    """The files of the back-end."""
    files = sorted(
        set((root / "engines" / "tensorrt").glob("_*.py"))
        - {root / "engines" / "tensorrt" / name for name in ("__init__.py", "_gemm.py", "_gemm_forms.py")}
    )
    return {file.name: file.read_text(encoding="utf-8") for file in files}


# ---- our code against the real bindings --------------------------------------------------------------------


@pytest.mark.parametrize(("surface", "library"), LIBRARY_OF.items(), indirect=["surface"], ids=LIBRARY_OF)
def test_everything_that_the_back_end_uses_is_in_this_version(
    sources: dict[str, str], surface: Surface, library: str
) -> None:
    assert faults(sources, surface, library) == []


def test_everything_that_the_back_end_asks_for_is_in_some_version(sources: dict[str, str], cache: Path) -> None:
    found = [surface_of(version, cache) for version in LIBRARY_OF]
    if missing := [surface for surface in found if isinstance(surface, str)]:
        pytest.skip(f"the bindings of {len(missing)} versions cannot be had: {missing[0]}")

    assert asked_in_vain(sources, [surface for surface in found if not isinstance(surface, str)]) == []


def test_the_collector_sees_the_back_end(sources: dict[str, str]) -> None:
    uses, guards = collect(sources)

    assert {"Builder", "OnnxParser", "Runtime"} <= {use.name for use in uses if use.owner == MODULE}
    assert {"IBuilderConfig", "INetworkDefinition", "ICudaEngine"} <= {use.owner for use in uses}
    assert guards


# ---- the test can fail -------------------------------------------------------------------------------------

EXAMPLE: Surface = {
    "Builder": {
        "__init__": [["self", "logger"]],
        "create_builder_config": [["self"]],
        "create_network": [["self", "flags="]],
        "max_threads": [],
    },
    "BuilderFlag": {"TF32": []},
    "ComputeCapability": {"SM75": []},
    "IBuilderConfig": {"set_flag": [["self", "flag"]], "num_compute_capabilities": []},
    "INetworkDefinition": {"num_layers": []},
    "ParserError": {"code": []},
    "Runtime": {"deserialize_cuda_engine": []},
    "volume": None,
}


@pytest.mark.parametrize(
    "source",
    [
        "trt.Builder(logger).create_network(1).num_layers",
        "self._trt.Builder(logger=log)",
        "config.set_flag(trt.BuilderFlag.TF32)",
        "builder.create_network()",
        "builder.create_network(*given)",
        "builder.max_threads = 2",
        "if hasattr(config, 'made_up'): config.made_up = 1",
        "if hasattr(trt, 'MadeUp'): trt.MadeUp.SM75",
        "def f():\n    getattr(self._config, 'made_up', None)\n    self._config.made_up()",
        "def f():\n    try:\n        pass\n    except Failed as error:\n        error.made_up",
        "def f(config: Config) -> None:\n    config.made_up",
        "from cuda.bindings import runtime\nruntime.cudaMalloc(1)",
        "runtime_config.of_a_class_that_this_version_lacks()",
        "def f():\n    if hasattr(trt, 'Lacked'):\n        trt.LackedToo",
        "def f():\n    if not hasattr(trt, 'Lacked'):\n        return\n    trt.LackedToo",
        "if hasattr(trt, 'Lacked'):\n    f()\ndef f():\n    trt.LackedToo",
        "def f(self):\n    if hasattr(trt, 'Lacked'): self.g()\ndef g(self):\n    trt.LackedToo",
        "class A:\n    library_name = 'tensorrt_rtx'\n    def f(self):\n        trt.Lacked",
    ],
)
def test_right_use_is_no_fault(source: str) -> None:
    assert faults({"f.py": source}, EXAMPLE) == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("trt.MadeUp", "f.py:1: trt.MadeUp is not there"),
        ("trt.BuilderFlag.MADE_UP", "f.py:1: BuilderFlag.MADE_UP is not there"),
        ("x = 1\nself._trt.BuilderFlag.MADE_UP", "f.py:2: BuilderFlag.MADE_UP is not there"),
        ("builder.made_up()", "f.py:1: Builder.made_up is not there"),
        ("trt.Builder(logger).made_up", "f.py:1: Builder.made_up is not there"),
        ("getattr(trt, 'MadeUp')", "f.py:1: trt.MadeUp is not there"),
        ("def f(config: Any) -> None:\n    config.made_up", "f.py:2: IBuilderConfig.made_up is not there"),
        ("if hasattr(trt, 'volume'): config.made_up", "f.py:1: IBuilderConfig.made_up is not there"),
        ("def f():\n    if hasattr(trt, 'volume'):\n        trt.made_up", "f.py:3: trt.made_up is not there"),
        ("def f():\n    if hasattr(trt, 'lacked'):\n        pass\n    trt.made_up", "f.py:4: trt.made_up is not there"),
        ("if hasattr(trt, 'lacked'): f()\nf()\ndef f():\n    trt.made_up", "f.py:4: trt.made_up is not there"),
        ("class A:\n    library_name = 'tensorrt'\n    trt.made_up", "f.py:3: trt.made_up is not there"),
        (
            "def f():\n    made = builder.create_builder_config()\n    made.made_up",
            "f.py:3: IBuilderConfig.made_up is not there",
        ),
        ("trt.Builder(log).create_builder_config().made_up", "f.py:1: IBuilderConfig.made_up is not there"),
        ("class A(trt.Builder):\n    def made_up(self): ...", "f.py:2: Builder.made_up is not there"),
        (
            "class A(trt.IBuilderConfig):\n    def set_flag(self): ...",
            "f.py:2: IBuilderConfig.set_flag does not take 0 arguments and []",
        ),
        ("trt.Builder()", "f.py:1: trt.Builder does not take 0 arguments and []"),
        ("config.set_flag(1, 2)", "f.py:1: IBuilderConfig.set_flag does not take 2 arguments and []"),
        ("config.set_flag(value=1)", "f.py:1: IBuilderConfig.set_flag does not take 0 arguments and ['value']"),
        (
            "builder.create_network(1, flags=1)",
            "f.py:1: Builder.create_network does not take 1 arguments and ['flags']",
        ),
    ],
)
def test_wrong_use_is_found(source: str, fault: str) -> None:
    assert faults({"f.py": source}, EXAMPLE) == [fault]


def test_question_that_every_version_answers_with_no_is_found() -> None:
    source = "hasattr(trt, 'ComputeCapability')\nhasattr(config, 'set_flags')\nhasattr(thing, 'max_threads')"

    assert asked_in_vain({"f.py": source}, [EXAMPLE]) == ["f.py:2: IBuilderConfig.set_flags is in no version"]


@pytest.mark.parametrize(
    ("surface", "there"),
    [("rtx", True), ("rtx-oldest", True), ("11", False), ("10-oldest", False)],
    indirect=["surface"],
)
def test_versions_differ_where_they_are_known_to(surface: Surface, there: bool) -> None:
    assert has(surface, Use(MODULE, "ComputeCapability")) == there
    assert has(surface, Use("IBuilderConfig", "set_compute_capability")) == there
    assert has(surface, Use("BuilderFlag", "FP16")) == (not there and "FP16" in surface["BuilderFlag"])
    assert accepts(surface, Use("IBuilderConfig", "set_flag", positional=1))
    assert not accepts(surface, Use("IBuilderConfig", "set_flag", positional=0))
