"""What records take, what they say of what they do not take, and that what was read is written as it was."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
from msgspec import UNSET, UnsetType, field
from msgspec.structs import replace
from tests.support.paths import DATA

from dsc_split._support.records import (
    Count,
    Facts,
    Integer,
    NotNegative,
    Positive,
    Record,
    Sha256,
    Text,
    read_record,
    to_document,
)
from dsc_split.bundle import Bundle
from dsc_split.bundles._manifest import encode_manifest, parse_manifest
from dsc_split.errors import DamagedError

WRITTEN = DATA / "written"


class Leaf(Record):
    name: Text
    """A name."""
    digest: Sha256 | UnsetType = UNSET
    """A digest."""

    def __post_init__(self) -> None:
        if "/" in self.name:
            raise ValueError(f"the name is {self.name!r}; one without a slash was expected.")


class Tree(Record):
    leaf: Leaf
    """A record."""
    leaves: tuple[Leaf, ...] = ()
    """A list."""
    by_path: dict[str, Leaf] = field(default_factory=dict)
    """An object with free keys."""
    pair: tuple[Integer, Integer] = (0, 0)
    """A list of two."""
    kind: Literal["b", "a"] | None = None
    """One of some texts."""
    size: Count | Text = 0
    """One of two types."""
    ratio: NotNegative | None = None
    """A number."""
    batch: Positive = field(default=1, name="from")
    """A number whose key is no name."""
    flag: bool = False
    """A flag."""
    facts: Facts = field(default_factory=dict)
    """Any object."""


LEAF: dict[str, Any] = {"name": "x"}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "document: got []; expected an object."),
        ({}, "leaf: the key is missing."),
        ({"leaf": {}}, "leaf.name: the key is missing."),
        ({"leaf": {"name": 5}}, "leaf.name: got 5; expected a text."),
        ({"leaf": {"name": ""}}, "leaf.name: got ''; expected a text."),
        ({"leaf": {"name": "a/b"}}, "leaf: the name is 'a/b'; one without a slash was expected."),
        ({"leaf": {"name": "x", "digest": "0"}}, "leaf.digest: got '0'; expected 64 hexadecimal digits."),
        ({"leaf": {"name": "x", "digest": 64 * "g"}}, "expected 64 hexadecimal digits."),
        ({"leaf": {"name": "x", "digest": 64 * "0" + "\n"}}, "expected 64 hexadecimal digits."),
        ({"leaf": None}, "leaf: got None; expected an object."),
        ({"leaf": LEAF, "leaves": {}}, "leaves: got {}; expected a list."),
        ({"leaf": LEAF, "leaves": [LEAF, {}]}, "leaves[1].name: the key is missing."),
        ({"leaf": LEAF, "leaves": [LEAF, 1]}, "leaves[1]: got 1; expected an object."),
        ({"leaf": LEAF, "pair": [1]}, "pair: got [1]; expected a list of 2 items."),
        ({"leaf": LEAF, "pair": [1, 1.5]}, "pair[1]: got 1.5; expected a whole number."),
        ({"leaf": LEAF, "pair": [1, True]}, "pair[1]: got True; expected a whole number."),
        ({"leaf": LEAF, "kind": "c"}, "kind: got 'c'; expected 'a' or 'b' or null."),
        ({"leaf": LEAF, "kind": 1}, "kind: got 1; expected 'a' or 'b' or null."),
        ({"leaf": LEAF, "size": -1}, "size: got -1; expected a whole number from 0 or a text."),
        ({"leaf": LEAF, "ratio": -0.5}, "ratio: got -0.5; expected a number from 0 or null."),
        ({"leaf": LEAF, "from": 0}, "from: got 0; expected a whole number from 1."),
        ({"leaf": LEAF, "from": 2**53 + 1}, "expected a whole number from 1 to 9007199254740992."),
        ({"leaf": LEAF, "flag": 1}, "flag: got 1; expected true or false."),
        ({"leaf": LEAF, "facts": [1]}, "facts: got [1]; expected an object."),
    ],
)
def test_message_says_where_what_was_found_and_what_was_expected(document: object, message: str) -> None:
    with pytest.raises(DamagedError) as caught:
        read_record(document, Tree)

    assert str(caught.value).endswith(message)
    assert message.startswith("expected") or str(caught.value) == message


@pytest.mark.parametrize("key", ["onnx/a.onnx", "b", "", "it's", "[0]", "$.leaf"])
def test_free_key_whose_value_is_wrong_is_found_by_name(key: str) -> None:
    right = {f"{position}": LEAF for position in range(20)}

    with pytest.raises(DamagedError) as caught:
        read_record({"leaf": LEAF, "by_path": {**right, key: {"name": 5}, "z": LEAF}}, Tree)

    assert str(caught.value) == f"by_path[{key!r}].name: got 5; expected a text."


def test_the_first_of_two_wrong_free_keys_is_named() -> None:
    with pytest.raises(DamagedError, match=r"by_path\['first'\]\.name: the key is missing"):
        read_record({"leaf": LEAF, "by_path": {"right": LEAF, "first": {}, "second": {}}}, Tree)


def test_unknown_keys_are_written_again_wherever_they_stand_also_of_a_record_that_is_changed() -> None:
    later = {**LEAF, "since": [1, {"a": None}], "": 5}
    document = {
        "leaf": later,
        "leaves": [LEAF, later],
        "by_path": {"a/b": later, "": LEAF},
        "then": {},
        "facts": {"": 1},
    }

    tree = read_record(document, Tree)
    changed = replace(tree, leaf=replace(tree.leaf, name="y"))

    assert plain(to_document(tree)) == {**plain(to_document(Tree(leaf=Leaf(name="x")))), **document}
    assert plain(to_document(changed))["leaf"] == {**later, "name": "y"}
    assert len({tree.leaf, tree.leaves[1], Leaf(name="x")}) == 2


def test_unknown_key_of_a_record_that_refuses_them_is_named() -> None:
    class Strict(Record, forbid_unknown_fields=True):
        x: int = 0

    for key in ("y", ""):
        with pytest.raises(DamagedError, match=f"^{key}: the key is unknown"):
            read_record({key: "a"}, Strict)


def plain(document: object) -> Any:
    """Return a document as it comes back from JSON."""
    return json.loads(json.dumps(document))


def test_keys_that_are_not_stated_are_not_written_and_defaults_are() -> None:
    document = to_document(Tree(leaf=Leaf(name="x")))

    assert document["leaf"] == {"name": "x"}
    assert document["from"] == 1
    assert read_record(document, Tree) == Tree(leaf=Leaf(name="x"))


def test_record_that_is_changed_is_another_one() -> None:
    with pytest.raises(AttributeError):
        Leaf(name="x").name = "y"  # type: ignore[misc]  # what is tested


@pytest.mark.parametrize("name", ["manifest-1", "manifest-2.dscb"])
def test_manifest_of_an_older_dsc_split_says_the_same_after_it_was_read_and_written(name: str) -> None:
    data = Bundle.open(WRITTEN / name).storage.read("manifest.json")
    document = json.loads(data)

    written = encode_manifest(parse_manifest(data, "manifest"))

    if document["version"] == 2:
        assert written == data
    brought: dict[str, Any] = {"version": 2, "revision": 0, "sealed": False, "side": None, "left_out": {}}
    ours = json.loads(written)
    assert {**document, **(brought if document["version"] == 1 else {}), "body_sha256": ours["body_sha256"]} == ours
