"""Lookup tables that are damaged on purpose: what the Python and the C++ reader must refuse, or accept, alike."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from random import Random

from tests.support.paths import DATA, GOLDEN

HOSTILE_FOLDER = DATA / "tables" / "hostile"

VALUES = [
    *(b"null true false [] {} [0] [1,2] [2,1] [null,1] [1,2,3] [[]] [{}]".split()),
    *(b"0 -0 -0.0 1 2 7 1.0 1e0 10E-1 0.1 -1 -1.5 5e-324 1e-400 -1e-400 1e300 1.7976931348623157e308".split()),
    *(b"1.7976931348623159e308 1e400 -1e400 NaN Infinity -Infinity nan 01 +1 .5 1. 1e 0x1 1_0 /**/1".split()),
    *(str(2**bits + more).encode() for bits in (20, 31, 42, 53, 63, 64) for more in (-1, 0, 1)),
    *(b"9" * digits for digits in (308, 309, 310, 5000)),
    *(b'"" "text" "bytes" "elements" "split" "full-offload" "no-offload" "features.4.0" "1" "tru\xc3\xa9"'.split()),
    *(rb'"\u0000" "\ud83d\ude00" "\ud800" "\udc00" "\ud800\ud800" "\ud800x" "\uD800\u0041" "\x" "\u12" "\/"'.split()),
    *(b'"\xff" "\xc0\x80" "\xed\xa0\x80" "\xf4\x90\x80\x80" "\xc3" "\x7f" "\x00" "\x01" "unclosed \xe2\x82'.split()),
    *(b'{"a":1} {"a":1,"a":2} {"":0} {"a":{"b":1,"b":1}} [1,] {"a":1,} [1 [1} {"a"} {a:1} \'text\' truE'.split()),
    b"",
    b" ",
    b'"\n"',
    b"1 2",
]
"""What may stand in the place of a value: valid ones, ones that are out of range, and what is no JSON."""


class Raw(bytes):
    """Bytes that are written as they are."""


class Pairs(list[list[object]]):
    """An object as ``[key, value]`` pairs, so that a key can stand twice."""


def hostile_documents() -> dict[str, bytes]:
    """Read every file of the folder of hostile tables."""
    return {path.name: path.read_bytes() for path in sorted(HOSTILE_FOLDER.iterdir())}


def truncated_documents() -> list[bytes]:
    """Cut the golden table off before every byte."""
    data = json.dumps(json.loads(GOLDEN.read_text()), separators=(",", ":")).encode()
    return [data[:length] for length in range(len(data))]


def special_documents() -> list[bytes]:
    """List documents about the limits of text, nesting and size."""
    golden = GOLDEN.read_bytes()
    inner = golden.rstrip()[:-1]
    documents = [
        golden,
        golden.replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + golden,
        golden.decode().encode("utf-16"),
        golden + b"\x00",
        golden + b"\x00 x",
        b"\x00" + golden,
        golden + b"x",
        golden + golden,
        golden + b" " * 1000,
        b" \t\r\n" + golden,
        b"\x0b" + golden,
        golden + b"\xc2\xa0",
        b"// table\n" + golden,
        *(b"", b" ", b"1", b"null", b'"text"', b"[]", b"{}", b"[" * 100_000, b'{"a":' * 100_000, b"]", b"NaN"),
        b"[" * 8 * 2**20,
        b"[" * 8 * 2**20 + b"[",
        golden + b" " * (8 * 2**20 - len(golden)),
        golden + b" " * (8 * 2**20 - len(golden) + 1),
        b"[" + b"0," * (4 * 2**20 - 2) + b"0]",
    ]
    for levels in (1, 62, 63, 64, 65, 1000):
        documents.append(inner + b',"later":' + b"[" * levels + b"]" * levels + b"}")
        documents.append(inner + b',"later":' + b'{"a":' * levels + b"0" + b"}" * levels + b"}")
    documents += [inner + b',"later":' + value + b"}" for value in VALUES]
    documents += [golden.replace(b'"source": "paper"', b'"source": ' + value) for value in VALUES]
    return documents


def damaged_document(random: Random) -> bytes:
    """Change the golden table in one to three places: values, keys, order, or bytes."""
    tree = _tree()
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        random.choice(_CHANGES)(tree, random)
    data = _written(tree)
    if random.random() < 0.1:
        at = random.randrange(len(data) + 1)
        kept = at + random.choice((0, 0, 1, 2, 50))
        data = data[:at] + random.choice((b"", bytes([random.randrange(256)]), data[at : at + 40])) + data[kept:]
    return data


# ---- changes -----------------------------------------------------------------------------------------------


def _replace(tree: object, random: Random) -> None:
    items, at = _somewhere(tree, random)
    _put(items, at, Raw(random.choice(VALUES)))


def _nudge(tree: object, random: Random) -> None:
    """Put another number in the place of one, so that tables stay plausible."""
    for _ in range(20):
        items, at = _somewhere(tree, random)
        value = _value(items, at)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            factor = random.choice((0, 0.5, 1 - 1e-10, 1 + 1e-10, 1 + 1e-8, 2, 1000))
            return _put(items, at, type(value)(value * factor))
    return None


def _delete(tree: object, random: Random) -> None:
    items, at = _somewhere(tree, random)
    del items[at]


def _duplicate(tree: object, random: Random) -> None:
    items, at = _somewhere(tree, random)
    items.insert(random.randrange(len(items) + 1), items[at])


def _swap(tree: object, random: Random) -> None:
    items, at = _somewhere(tree, random)
    other = random.randrange(len(items))
    items[at], items[other] = items[other], items[at]


def _move(tree: object, random: Random) -> None:
    """Put a copy of one value in the place of another."""
    source, source_at = _somewhere(tree, random)
    items, at = _somewhere(tree, random)
    _put(items, at, Raw(_written(_value(source, source_at))))


def _rename(tree: object, random: Random) -> None:
    items, at = _somewhere(tree, random)
    if isinstance(items, Pairs):
        other, other_at = _somewhere(tree, random)
        items[at] = [other[other_at][0] if isinstance(other, Pairs) else "later", items[at][1]]


_CHANGES: list[Callable[[object, Random], None]] = [
    _replace,
    _replace,
    _replace,
    _nudge,
    _nudge,
    _delete,
    _duplicate,
    _swap,
    _move,
    _rename,
]


def _somewhere(tree: object, random: Random) -> tuple[list[object], int]:
    """Choose a list or object, and a position in it, each value of the tree as likely as any other."""
    places: list[tuple[list[object], int]] = []
    waiting = [tree]
    while waiting:
        items = waiting.pop()
        if isinstance(items, list):
            places += [(items, at) for at in range(len(items))]
            waiting += [_value(items, at) for at in range(len(items))]
    nowhere: list[object] = [None]
    return random.choice(places or [(nowhere, 0)])


def _value(items: list[object], at: int) -> object:
    return items[at][1] if isinstance(items, Pairs) else items[at]


def _put(items: list[object], at: int, value: object) -> None:
    items[at] = [items[at][0], value] if isinstance(items, Pairs) else value


def _tree() -> object:
    return json.loads(_golden_text(), object_pairs_hook=lambda pairs: Pairs(list(pair) for pair in pairs))


@functools.cache
def _golden_text() -> str:
    return GOLDEN.read_text()


def _written(value: object) -> bytes:
    if isinstance(value, Raw):
        return bytes(value)
    if isinstance(value, Pairs):
        return b"{" + b",\n".join(json.dumps(key).encode() + b":" + _written(item) for key, item in value) + b"}"
    if isinstance(value, list):
        return b"[" + b",".join(map(_written, value)) + b"]"
    return json.dumps(value).encode()
