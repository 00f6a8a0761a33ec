"""Streaming text equals the whole text cut before the first stop string, however it is divided into tokens."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import RequestError
from edge.text_stream import TextStream
from edge.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(Path(__file__).parents[1] / "data/tokenizer/tokenizer.json")


def cut(text, stops):
    """The text before the stop string that is complete first (of several at once, the longest), and that string."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def stream(ids, stops):
    """Released pieces, the flushed rest last, and the stream."""
    text_stream = TextStream(TOKENIZER, stops)
    pieces = [text_stream.push(i) for i in ids]
    return [*pieces, text_stream.flush()], text_stream


small = st.text(alphabet="ab\nü电🙂", max_size=12)
stop_sets = st.lists(st.text(alphabet="ab\nü电🙂", min_size=1, max_size=4), max_size=4)
any_ids = st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=40)


@settings(deadline=None, max_examples=300)
@given(st.lists(small, max_size=6), stop_sets)
def test_text_in_any_tokenisation(parts, stops):
    # Encoding the parts one by one gives divisions that the tokenizer would not choose for the whole.
    ids = [i for part in parts for i in TOKENIZER.encode(part, special=False)]
    pieces, text_stream = stream(ids, stops)
    assert ("".join(pieces), text_stream.matched_stop) == cut(TOKENIZER.decode(ids), stops)
    assert text_stream.stopped is (text_stream.matched_stop is not None)


@settings(deadline=None, max_examples=300)
@given(any_ids, stop_sets | st.just(["\ufffd"]) | st.just([" ", "e", "\ufffd\ufffd"]))
def test_any_tokens_even_where_they_are_no_utf8(ids, stops):
    pieces, text_stream = stream(ids, stops)
    assert ("".join(pieces), text_stream.matched_stop) == cut(TOKENIZER.decode(ids), stops)


@settings(deadline=None)
@given(st.lists(small, max_size=6), stop_sets)
def test_nothing_is_released_that_a_stop_string_could_still_claim(parts, stops):
    ids = [i for part in parts for i in TOKENIZER.encode(part, special=False)]
    text_stream = TextStream(TOKENIZER, stops)
    released = ""
    for position, token_id in enumerate(ids):
        released += text_stream.push(token_id)
        if text_stream.stopped:
            break
        whole = b"".join(map(TOKENIZER.token_bytes, ids[: position + 1])).decode(errors="ignore")
        held = whole.removeprefix(released)
        longest = max((n for stop in stops for n in range(len(stop)) if whole.endswith(stop[:n])), default=0)
        assert len(held) == longest


def test_a_character_across_tokens_waits_for_its_last_byte():
    pieces, _ = stream(list(map(byte_id, "a🙂".encode())), [])
    assert pieces == ["a", "", "", "", "🙂", ""]


def test_an_incomplete_character_at_the_end():
    pieces, _ = stream(list(map(byte_id, "🙂".encode()[:3])), [])
    assert pieces == ["", "", "", "\ufffd"]


def test_special_tokens_give_no_text_and_added_ones_do():
    ids = [TOKENIZER.id_of(token) for token in ("<|im_start|>", "<think>", "<|im_end|>")]
    pieces, _ = stream(ids, [])
    assert pieces == ["", "<think>", "", ""]


def test_nothing_follows_a_stop():
    text_stream = TextStream(TOKENIZER, ["b"])
    assert [text_stream.push(i) for i in TOKENIZER.encode("a", special=False)] == ["a"]
    assert [text_stream.push(byte_id(byte)) for byte in b"bcd"] == ["", "", ""]
    assert text_stream.flush() == ""
    assert text_stream.matched_stop == "b"


def test_overlapping_beginnings_of_a_stop_string():
    text_stream = TextStream(TOKENIZER, ["aab"])
    released = [text_stream.push(byte_id(byte)) for byte in b"aaaab"]
    assert released == ["", "", "a", "a", ""]
    assert text_stream.stopped


def test_linear_in_adversarial_text():
    """Time for text that almost matches throughout: quadratic work would be 10,000 times this bound of steps."""
    stop = "a" * 2_000 + "b"
    text_stream = TextStream(TOKENIZER, [stop])
    token = byte_id(ord("a"))
    released = sum(len(text_stream.push(token)) for _ in range(20_000))
    assert released == 18_000
    assert len(text_stream.flush()) == 2_000


def test_empty_stop_string():
    with pytest.raises(RequestError, match="empty") as caught:
        TextStream(TOKENIZER, ["a", ""])
    assert caught.value.param == "stop"


def byte_id(byte):
    """The token that stands for one byte."""
    return next(i for i in range(TOKENIZER.vocab_size) if TOKENIZER.token_bytes(i) == bytes([byte]))


@pytest.mark.parametrize("stop", ["stop", "op </b> c", " d"])
def test_stop_strings_mean_nothing_between_tags(stop: str) -> None:
    text = "a <b>stop</b> <b>stop </b> c stop d"
    text_stream = TextStream(TOKENIZER, [stop], spared=("<b>", "</b>"))
    released = "".join(text_stream.push(token) for token in TOKENIZER.encode(text, special=False))
    expected = {"stop": "a <b>stop</b> <b>stop </b> c ", "op </b> c": text, " d": text[:-2]}
    assert released + text_stream.flush() == expected[stop]
