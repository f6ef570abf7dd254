"""Make names for cuts and values, and find the modules that end at a cut."""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dsc_split.partitioner.graph._index import MODULE_CLASSES_KEY, GraphIndex

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["ModuleEnds", "matches_pattern", "unique_name", "unused_name"]

_MAX_NAME = 100
_RESERVED = re.compile(
    r"(?i)(con|prn|aux|nul|com\d|lpt\d|model|weights|(full|no)-offload|compressive|natural|frontier|all)(\.|$)"
)
"""File names that Windows reserves, and words with another meaning in a bundle or after ``--cuts``."""

_ACTIVATION_CLASSES = frozenset(
    "ReLU ReLU6 LeakyReLU PReLU RReLU ELU CELU SELU GELU SiLU Mish Sigmoid Tanh Hardswish Hardsigmoid Hardtanh "
    "Softplus Softsign Softshrink Hardshrink Tanhshrink LogSigmoid Threshold GLU Swish QuickGELU GELUTanh "
    "HardSwish HardSigmoid HardMish SwishMe HardSwishMe HardSigmoidMe MishMe".split()
)
_ACTIVATION_OPS = frozenset(
    "Relu LeakyRelu PRelu ThresholdedRelu Elu Celu Selu Gelu Mish Sigmoid Tanh HardSwish HardSigmoid Softplus "
    "Softsign Shrink Swish QuickGelu FastGelu BiasGelu".split()
)


def matches_pattern(path: str, pattern: str) -> bool:
    """Return whether a module path matches a pattern; ``*`` stands for any characters but a dot.

    The number of a repeated call (``relu@1``) does not count.
    """
    parts, patterns = re.sub(r"@\d+", "", path).split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def unique_name(suggestion: str, taken: set[str]) -> str:
    """Turn a suggestion into a safe file name that is not in ``taken``, and add it there.

    Args:
        suggestion: A text with any characters.
        taken: The names that are in use, in lower case.
    """
    name = re.sub(r"[^\w.@+-]", "_", suggestion, flags=re.ASCII).strip(".") or "cut"
    if name.startswith("-") or _RESERVED.match(name):
        name = f"_{name}"
    if len(name) > _MAX_NAME:
        name = f"{name[: _MAX_NAME - 9]}-{hashlib.sha256(suggestion.encode()).hexdigest()[:8]}"
    base, number = name, 2
    while name.lower() in taken:
        suffix = f"-{number}"
        name, number = base[: _MAX_NAME - len(suffix)] + suffix, number + 1
    taken.add(name.lower())
    return name


def unused_name(wanted: str, taken: set[str]) -> str:
    """Add underscores to a name until it is not in ``taken``, and add it there."""
    while wanted in taken:
        wanted += "_"
    taken.add(wanted)
    return wanted


class ModuleEnds:
    """Finds where in the graph each module ends."""

    def __init__(self, index: GraphIndex, model: ir.Model) -> None:
        self._index = index
        self._classes: dict[str, str] = json.loads(model.metadata_props.get(MODULE_CLASSES_KEY, "{}"))
        self._last: dict[str, int] = {}
        self._ordinal: dict[int, int] = {}
        seen: Counter[tuple[str, str]] = Counter()
        for position in index.data_nodes:
            kind = (index.modules[position], index.nodes[position].op_type)
            seen[kind] += 1
            self._ordinal[position] = seen[kind]
            for path in _with_parents(index.modules[position]):
                self._last[path] = position

    def ending_at(self, position: int, live: Sequence[ir.Value]) -> tuple[str, ...]:
        """List the modules whose output crosses after ``position``, the outermost first."""
        return tuple(path for path in self._shared_modules(live) if self._last[path] <= position)

    def suggest(self, position: int, live: Sequence[ir.Value], ending: Sequence[str]) -> str:
        """Suggest a name: the outermost module that ends here, else the innermost module and an op (``stem@Add.2``).

        Ops are counted within their module, because the exporter's tensor names differ between its versions.
        """
        if ending:
            return ending[0]
        inside = self._shared_modules(live)
        if not inside or len(live) > 1:
            return "+".join(value.name or "" for value in live)
        made = self._index.position[live[0]]
        number = self._ordinal[made]
        return f"{inside[-1]}@{self._index.nodes[made].op_type}" + (f".{number}" if number > 1 else "")

    def feeds_activation(self, live: Sequence[ir.Value]) -> bool:
        """Return whether one tensor crosses, and only the activation of its layer reads it."""
        if len(live) != 1:
            return False
        value = live[0]
        positions = self._index.readers.get(value, [])
        made_in = self._index.modules[self._index.position[value]] if value in self._index.position else None
        by_class = [self._is_activation_module(self._index.modules[position], made_in) for position in positions]
        return bool(positions) and (all(by_class) or self._is_activation_op(value, positions))

    def _is_activation_module(self, module: str, made_in: str | None) -> bool:
        return module != made_in and self._classes.get(module, "").rpartition(".")[2] in _ACTIVATION_CLASSES

    def _is_activation_op(self, value: ir.Value, positions: Sequence[int]) -> bool:
        nodes = [self._index.nodes[position] for position in positions]
        if len(nodes) == 1:
            node = nodes[0]
            return node.op_type in _ACTIVATION_OPS or (node.op_type == "Clip" and node.inputs[0] is value)
        gates = [node for node in nodes if node.op_type in ("Sigmoid", "HardSigmoid", "Tanh", "Erf")]
        products = [node for node in nodes if node.op_type == "Mul"]
        if len(nodes) != 2 or len(gates) != 1 or len(products) != 1:
            return False
        return gates[0].outputs[0] in products[0].inputs

    def _shared_modules(self, live: Sequence[ir.Value]) -> list[str]:
        """List the modules that all tensors were made in, the outermost first."""
        chains = [
            _with_parents(self._index.modules[self._index.position[value]]) if value in self._index.position else []
            for value in live
        ]
        return [path for path in chains[0] if all(path in chain for chain in chains[1:])] if chains else []


def _with_parents(path: str) -> list[str]:
    """``"a.b.c"`` to ``["a", "a.b", "a.b.c"]``; an empty path, which is the root, to none."""
    return list(itertools.accumulate(path.split("."), "{}.{}".format)) if path else []
