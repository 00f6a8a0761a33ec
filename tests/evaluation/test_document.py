"""Reading YAML: what JSON could say, where it stands, and nothing else."""

from __future__ import annotations

import pytest

from edge.errors import ConfigError
from edge.evaluation.document import MAX_BYTES, read_document


def test_values_are_those_of_json_and_of_yaml_1_2() -> None:
    text = b"a: no\nb: 12:30\nc: 2026-01-02\nd: 010\ne: 1.5e3\nf: null\ng: true\nh: [1, -2, .5]\ni: 'x'\nj: <<\nk:\n"
    value = read_document("s.yaml", text).value
    assert value == {
        "a": "no", "b": "12:30", "c": "2026-01-02", "d": 10, "e": 1500.0, "f": None, "g": True, "h": [1, -2, 0.5],
        "i": "x", "j": "<<", "k": None,
    }  # fmt: skip


def test_every_value_has_its_line() -> None:
    document = read_document("s.yaml", b"a: 1\nb:\n  - c: 2\n    d: 3\n  - 4\n")
    assert document.lines[("b", 0, "d")] == 4
    assert document.lines[("b", 1)] == 5
    assert "s.yaml, line 3: wrong" in str(document.error(("b", 0, "missing", "inner"), "wrong"))


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        (b"a: &x [1]\nb: *x\n", 2, "aliases are not allowed"),
        (b"a: 1\na: 2\n", 2, "twice"),
        (b"a: !!python/object/apply:os.system ['true']\n", 1, "tag"),
        (b"a: !!binary aGk=\n", 1, "tag"),
        (b"a: !mine 1\n", 1, "tag"),
        (b"a: !!int x\n", 1, "tag"),
        (b"a:\n - !!seq [1]\n", 2, "tag"),
        (b"? [1]\n: 2\n", 1, "must be a string"),
        (b"a:\n  - 1\n b: 2\n", 3, "block"),
        (b"a: 1e999\n", 1, "too large"),
        (b"a: " + b"9" * 100, 1, "digits"),
        (b"1: 2\n...\n---\nb: 3\n", 3, "another document"),
    ],
)
def test_what_is_not_allowed_names_its_line(text: bytes, line: int, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        read_document("s.yaml", text)
    assert f"s.yaml, line {line}:" in caught.value.message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "empty"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"[" * 5000, "nested"),
        (b"a: " + b"[" * 40 + b"]" * 40, "nested deeper"),
        (b"#" * (MAX_BYTES + 1), "larger"),
        (b"a: \x07", "no YAML"),
    ],
)
def test_files_that_are_none(text: bytes, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        read_document("s.yaml", text)


def test_aliases_cannot_multiply() -> None:
    levels = [b"a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [b"a%d: &a%d [%s]" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 12)]
    with pytest.raises(ConfigError, match="line 2: aliases"):
        read_document("bomb.yaml", b"\n".join(levels))
