"""The JSON Schemas in the package, made from the records; ``python -m tests.support.schemas`` writes them anew."""

from __future__ import annotations

import ast
import importlib
import json
from collections.abc import Iterator
from functools import cache
from inspect import getsource
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import inspect
from tests.support.paths import ROOT

from dsc_split._support.records import Record, Sha256, json_schema
from dsc_split.benchmarks.cells._cells import CellFile
from dsc_split.benchmarks.memory._reports import MemoryReport
from dsc_split.bundles._manifest import DIGEST
from dsc_split.bundles._records import Manifest
from dsc_split.engines._engine_file import EngineHeader

FOLDER = ROOT / "src/dsc_split/schemas"


class Schema(NamedTuple):
    """A schema in the package."""

    file: str
    kind: type[Record]
    title: str

    @property
    def path(self) -> Path:
        return FOLDER / self.file


SCHEMAS = (
    Schema("manifest-2.schema.json", Manifest, "dsc-split bundle manifest, version 2"),
    Schema("cell-1.schema.json", CellFile, "dsc-split cell, version 1"),
    Schema("memory-1.schema.json", MemoryReport, "dsc-split memory report, version 1"),
    Schema("engine-1.schema.json", EngineHeader, "header of a dsc-split engine file, version 1"),
)


def text_of(schema: Schema) -> str:
    """Return a schema's file: what msgspec makes of the record, with the fields' docstrings as descriptions.

    ``format`` and ``version`` have defaults for those who write documents, and are asked of those who send them.
    """
    document = json_schema(schema.kind, title=schema.title)
    document["description"] = "Keys that are not named here are ignored."
    definitions = document["$defs"]
    for kind in {*records_in(inspect.type_info(schema.kind))}:
        definition = definitions[kind.__name__]
        for key, words in docstrings_of(kind).items():
            definition["properties"][key]["description"] = words
        heads = [key for key in ("format", "version") if key in definition["properties"]]
        required = {*definition.get("required", ()), *heads}
        definition["required"] = [key for key in definition["properties"] if key in required]
    digest: dict[str, Any] = msgspec.json.schema(Sha256)
    digest["description"] = "SHA-256 of all the rest in canonical form: sorted keys, no blanks, ASCII."
    definitions[schema.kind.__name__]["properties"][DIGEST] = digest
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def records_in(kind: inspect.Type) -> Iterator[type[Record]]:
    """Yield the record types that documents of ``kind`` are made of."""
    if isinstance(kind, inspect.StructType):
        assert issubclass(kind.cls, Record)
        yield kind.cls
        for field in kind.fields:
            yield from records_in(field.type)
    elif isinstance(kind, inspect.UnionType):
        for one in kind.types:
            yield from records_in(one)
    elif isinstance(kind, inspect.TupleType):
        for one in kind.item_types:
            yield from records_in(one)
    elif isinstance(kind, inspect.VarTupleType):
        yield from records_in(kind.item_type)
    elif isinstance(kind, inspect.DictType):
        yield from records_in(kind.value_type)


def docstrings_of(kind: type[Record]) -> dict[str, str]:
    """Return the text below each field of a record, by key."""
    texts: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        texts |= texts_in(one.__module__).get(one.__name__, {}) if issubclass(one, Record) else {}
    keys = zip(kind.__struct_fields__, kind.__struct_encode_fields__, strict=True)
    return {key: texts[name] for name, key in keys if name in texts and name not in Record.__struct_fields__}


@cache
def texts_in(module: str) -> dict[str, dict[str, str]]:
    """Return the text below each field of a module's classes: by class, then by field."""
    tree = ast.parse(getsource(importlib.import_module(module)))
    return {
        item.name: {
            field.target.id: " ".join(below.value.value.split())
            for field, below in zip(item.body, item.body[1:], strict=False)
            if isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        }
        for item in tree.body
        if isinstance(item, ast.ClassDef)
    }


def main() -> None:
    """Write all schemas."""
    for schema in SCHEMAS:
        schema.path.write_text(text_of(schema), encoding="utf-8")


if __name__ == "__main__":
    main()
