"""The tokenizer against the library it is built on, and against forged special tokens."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import BundleError, RequestError
from edge.tokenizer import Tokenizer

PATH = Path(__file__).parents[1] / "data/tokenizer/tokenizer.json"
TOKENIZER = Tokenizer.load(PATH)
LIBRARY = tokenizers.Tokenizer.from_file(str(PATH))
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>"]
MARK = "\ue000\ue123"

fragments = st.sampled_from(
    [*SPECIAL, "<think>", "<", "|", ">", "<|im_", "end|>", "\n", " ", "  ", "user", "Tür", "电机"]
)
texts = st.lists(fragments | st.text(max_size=5), max_size=12).map("".join)


@settings(deadline=None)
@given(texts)
def test_special_encoding_equals_the_library(text):
    assert TOKENIZER.encode(text, special=True) == LIBRARY.encode(text, add_special_tokens=False).ids


@settings(deadline=None)
@given(texts)
def test_ordinary_encoding_gives_no_special_token_and_the_same_text(text):
    ids = TOKENIZER.encode(text, special=False)
    assert not TOKENIZER.special_ids.intersection(ids)
    assert TOKENIZER.decode(ids) == LIBRARY.normalizer.normalize_str(text)


@settings(deadline=None)
@given(texts)
def test_shielded_text_forms_no_special_token(text):
    ids = TOKENIZER.encode(TOKENIZER.shield(text, MARK), special=True, mark=MARK)
    assert not TOKENIZER.special_ids.intersection(ids)
    assert ids == TOKENIZER.encode(text, special=False)


@pytest.mark.parametrize("space", ["", "\n", " \t"])
@pytest.mark.parametrize("token", SPECIAL)
def test_a_template_that_strips_does_not_complete_a_special_token(token, space):
    for cut in range(1, len(token)):
        for before, text, after in (("", token[:cut], token[cut:]), (token[:cut], token[cut:], "")):
            stripped = TOKENIZER.shield(space + text + space, MARK).strip()
            ids = TOKENIZER.encode(before + stripped + after, special=True, mark=MARK)
            assert not TOKENIZER.special_ids.intersection(ids)
            assert TOKENIZER.decode(ids) == token


@settings(deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=30), st.booleans())
def test_decode_equals_the_library(ids, skip_special):
    assert TOKENIZER.decode(ids, skip_special=skip_special) == LIBRARY.decode(ids, skip_special_tokens=skip_special)


def test_token_bytes_are_exact():
    assert TOKENIZER.token_bytes(TOKENIZER.id_of("<|im_end|>")) == b"<|im_end|>"
    text = "Tür 电机\n\x00\x7f\xad 🙂"
    assert b"".join(map(TOKENIZER.token_bytes, TOKENIZER.encode(text, special=False))) == text.encode()
    single = {TOKENIZER.token_bytes(i) for i in range(TOKENIZER.vocab_size)}
    assert single.issuperset(bytes([byte]) for byte in range(256))
    assert TOKENIZER.token_bytes(TOKENIZER.vocab_size) == b""


def test_vocabulary():
    assert TOKENIZER.vocab_size == LIBRARY.get_vocab_size()
    assert TOKENIZER.special_ids == {LIBRARY.token_to_id(token) for token in SPECIAL}
    assert TOKENIZER.id_of("<think>") == LIBRARY.token_to_id("<think>")
    assert TOKENIZER.id_of("no such token") is None


def test_lone_surrogate():
    with pytest.raises(RequestError, match="not valid Unicode"):
        TOKENIZER.encode("a\ud800", special=True)


def test_truncation_and_padding_in_the_file_do_not_apply(tmp_path):
    library = tokenizers.Tokenizer.from_file(str(PATH))
    library.enable_truncation(3)
    library.enable_padding(length=50)
    library.save(str(tmp_path / "tokenizer.json"))
    text = "What is the temperature of the motor?"
    assert Tokenizer.load(tmp_path / "tokenizer.json").encode(text, special=False) == TOKENIZER.encode(
        text, special=False
    )


def test_a_vocabulary_without_special_tokens(tmp_path):
    plain = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = tokenizers.decoders.ByteLevel()
    plain.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.encode("abb", special=True) == [2, 1]
    assert tokenizer.shield("<a>", MARK) == "<a>"


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{", b"[]", b'{"version": "1.0"}', b"[" * 100_000])
def test_damaged_file(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(BundleError, match="is not a tokenizer"):
        Tokenizer.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(BundleError, match="cannot be read"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_a_tokenizer_that_is_not_byte_level(tmp_path):
    document = json.loads(PATH.read_text()) | {"decoder": {"type": "Fuse"}}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document))
    with pytest.raises(BundleError, match="byte-level"):
        Tokenizer.load(path)
