"""Bodies that are no requests, or hardly: seeded, for the test that none of them gets a 5xx."""

import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

_FIELDS = (
    "messages",
    "prompt",
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "logit_bias",
    "stop",
    "max_tokens",
    "max_completion_tokens",
    "stream",
    "stream_options",
    "n",
    "tools",
    "tool_choice",
    "response_format",
    "enable_thinking",
    "chat_template_kwargs",
    "logprobs",
    "top_logprobs",
    "echo",
    "suffix",
    "user",
)
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


def malformed_bodies(rng: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """``count`` pairs of path and body, for OpenAI's two."""
    for _ in range(count):
        chat = rng.random() < 0.6
        path = "/v1/chat/completions" if chat else "/v1/completions"
        base: dict[str, Any] = {"max_tokens": 2}
        base |= {"messages": [{"role": "user", "content": "Hi"}]} if chat else {"prompt": "Hi"}
        yield path, next(odd_bodies(rng, 1, base, _FIELDS))


def odd_bodies(rng: random.Random, count: int, base: dict[str, Any], fields: Sequence[str]) -> Iterator[bytes]:
    """``count`` bodies around a sound one."""
    for _ in range(count):
        yield rng.choice((_with_odd_values, _with_raw_value, _damaged, _noise))(rng, dict(base), fields)


def _with_odd_values(rng: random.Random, body: dict[str, Any], fields: Sequence[str]) -> bytes:
    for _ in range(rng.randint(1, 3)):
        body[rng.choice(fields)] = rng.choice(_VALUES)
    return json.dumps(body).encode()


def _with_raw_value(rng: random.Random, body: dict[str, Any], fields: Sequence[str]) -> bytes:
    body[rng.choice(fields)] = "@"
    return json.dumps(body).encode().replace(b'"@"', rng.choice(_RAW_VALUES))


def _damaged(rng: random.Random, body: dict[str, Any], _: Sequence[str]) -> bytes:
    text = bytearray(json.dumps(body).encode())
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text))
        text[at : at + rng.randint(0, 1)] = rng.randbytes(rng.randint(0, 1))
    return bytes(text[: rng.randint(0, len(text))] if rng.random() < 0.3 else text)


def _noise(rng: random.Random, _: dict[str, Any], __: Sequence[str]) -> bytes:
    return rng.choice((b"", b"null", b"[]", b'"x"', b"3", b"{}", b"{", rng.randbytes(rng.randint(1, 300))))
