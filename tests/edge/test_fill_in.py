"""Fill-in-the-middle: a prompt, a suffix, and the tokens that Coder models know for the gap."""

from __future__ import annotations

import pytest
import tokenizers

from edge.errors import RequestError
from edge.openai import parse_completion, prepare
from edge.openai.fill_in import fill_in_ids
from edge.tokenizer import Tokenizer
from tests.fakes import byte_tokenizer, make_model

FIM = ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"]


@pytest.fixture(scope="module")
def coder() -> Tokenizer:
    return _with_gaps()


def test_the_order_of_the_model(coder: Tokenizer) -> None:
    ids = fill_in_ids(coder, tuple(b"def f("), "): pass")
    assert coder.decode(ids) == "<|fim_prefix|>def f(<|fim_suffix|>): pass<|fim_middle|>"
    assert fill_in_ids(coder, (100, 101), "x") == (ids[0], 100, 101, coder.id_of("<|fim_suffix|>"), 120, ids[-1])


def test_special_tokens_in_code_are_text(coder: Tokenizer) -> None:
    assert not set(fill_in_ids(coder, (), "<|im_start|>")) & coder.special_ids


def test_the_gap_ends_where_the_model_goes_on_to_another_file() -> None:
    model = make_model()
    object.__setattr__(model, "tokenizer", _with_gaps())
    (generation,) = prepare(model, parse_completion({"prompt": "a", "suffix": "b", "stop": "\n\n"}))
    assert generation.stop[0] == "\n\n"
    assert {"<|file_sep|>", "<|repo_name|>", "<|fim_pad|>"} <= set(generation.stop)
    (quoted,) = prepare(model, parse_completion({"prompt": "<|im_end|>", "suffix": "b"}))
    assert not set(quoted.prompt_ids) & model.tokenizer.special_ids
    (plain,) = prepare(model, parse_completion({"prompt": "a", "suffix": ""}))
    assert (plain.prompt_ids, plain.stop) == ((97,), ())


def test_other_models_cannot() -> None:
    with pytest.raises(RequestError, match="cannot fill in") as caught:
        prepare(make_model(), parse_completion({"prompt": "a", "suffix": "b"}))
    assert (caught.value.param, caught.value.status) == ("suffix", 400)
    assert "Coder" in caught.value.hint


def _with_gaps() -> Tokenizer:
    backend = byte_tokenizer()
    backend.add_tokens([tokenizers.AddedToken(token, special=False) for token in FIM])
    return Tokenizer(backend)
