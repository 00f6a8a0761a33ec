"""Bodies that are no requests, or hardly: seeded, for the test that none of them gets a 5xx."""

import copy
import gzip
import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

_RAW_VALUES = (
    b"NaN", b"-Infinity", b"1e400", b"-1e999", b'"\\ud800"', b'"\\udc00\\ud800"', b'"\xff\xfe"', b"9" * 400,
    b"0.1e-400", b"[" * 3000, b'{"a":' * 500, b"'x'", b"\x00", b'"\\u0000"', b"tru",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e308, "", "x", "1", "\0", "\u2028",
    "<|im_start|>", "<|im_end|>", "auto", "none", "required", "x" * 3000, [], [[]], {}, [None], [1], ["x"], [{}],
    [{"role": "user"}], [{"role": "user", "content": None}], [{"role": "user", "content": 3}],
    [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": [{"type": "image_url"}]}],
    [{"role": "robot", "content": "x"}], [{"role": "assistant", "tool_calls": [{}]}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
    [{"type": "function", "function": {"name": "f", "parameters": {"a": [None]}}}], {"type": "json_schema"},
    {"type": "text"}, {"include_usage": 1}, {"1": 101}, {"x": 1}, {"-1": 1}, {"258": 5}, {"999999": 1}, [300], [-1],
    [10**20], [0.5], ["a", "b"], [1, "a"], {"enable_thinking": "yes"}, list(range(40)),
)  # fmt: skip


def odd_bodies(rng: random.Random, count: int, base: dict[str, Any], fields: Sequence[str]) -> Iterator[bytes]:
    """``count`` bodies around a sound one.

    Args:
        rng: seeded.
        count: how many.
        base: the sound one.
        fields: names that mean something there.
    """
    ways = (_with_odd_values, _with_odd_nodes, _with_raw_value, _damaged, _encoded_otherwise, _noise)
    for _ in range(count):
        yield rng.choice(ways)(rng, copy.deepcopy(base), fields)


def _with_odd_values(rng: random.Random, body: dict[str, Any], fields: Sequence[str]) -> bytes:
    for _ in range(rng.randint(1, 3)):
        body[rng.choice(fields)] = copy.deepcopy(rng.choice(_VALUES))
    return json.dumps(body).encode()


def odd_nodes(rng: random.Random, count: int, base: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """``count`` bodies in which something is wrong somewhere inside."""
    for _ in range(count):
        body = copy.deepcopy(base)
        for _ in range(rng.randint(1, 2)):
            if places := list(_places(body)):
                _spoil(rng, *rng.choice(places))
        yield body


def _spoil(rng: random.Random, container: Any, key: Any) -> None:
    match rng.randrange(4):
        case 0:
            del container[key]
        case 1 if isinstance(container, dict):
            container[rng.choice(("", "x" * 300, "type", "$ref", "\ufffe"))] = copy.deepcopy(rng.choice(_VALUES))
        case 2:
            container[key] = _deep(rng.randint(2, 70), container[key])
        case _:
            container[key] = copy.deepcopy(rng.choice(_VALUES))


def _with_odd_nodes(rng: random.Random, body: dict[str, Any], fields: Sequence[str]) -> bytes:
    del fields
    return json.dumps(next(odd_nodes(rng, 1, body))).encode()


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a tree where something stands."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in keys:
        yield node, key
        yield from _places(node[key])


def _deep(levels: int, value: Any) -> Any:
    for _ in range(levels):
        value = {"a": value} if levels % 2 else [value]
    return value


def _encoded_otherwise(rng: random.Random, body: dict[str, Any], fields: Sequence[str]) -> bytes:
    del fields
    text = json.dumps({**body, "user": "ü世🙂"}, ensure_ascii=False)
    encodings = ("utf-16", "utf-16-be", "utf-32", "utf-7", "utf-8-sig", "cp1252", "shift_jis", "cp037")
    raw = text.encode(rng.choice(encodings), errors="replace")
    return gzip.compress(raw) if rng.random() < 0.2 else raw


def _with_raw_value(rng: random.Random, body: dict[str, Any], fields: Sequence[str]) -> bytes:
    body[rng.choice(fields)] = "@"
    return json.dumps(body).encode().replace(b'"@"', rng.choice(_RAW_VALUES))


def _damaged(rng: random.Random, body: dict[str, Any], _: Sequence[str]) -> bytes:
    text = bytearray(json.dumps(body).encode())
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text) + 1)
        text[at : at + rng.randint(0, 1)] = rng.randbytes(rng.randint(0, 1))
    return bytes(text[: rng.randint(0, len(text))] if rng.random() < 0.3 else text)


def _noise(rng: random.Random, _: dict[str, Any], __: Sequence[str]) -> bytes:
    return rng.choice((b"", b"null", b"[]", b'"x"', b"3", b"{}", b"{", rng.randbytes(rng.randint(1, 300))))
