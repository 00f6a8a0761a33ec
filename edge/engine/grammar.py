"""Constrained decoding: which tokens keep an answer inside a grammar, by llguidance [1].

:class:`Grammars` compiles what a request asks for (:class:`~edge.engine.grammar_source.Grammar`) for one vocabulary, a
:class:`Constraint` follows one answer through it. Nothing of llguidance is loaded before the first grammar arrives.

[1] https://github.com/guidance-ai/llguidance
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from edge.engine.grammar_source import MAX_SOURCE_BYTES, Grammar, llguidance_source
from edge.errors import RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

CACHED_GRAMMARS = 8
_INITIAL_LEXER_FUEL = 300_000
_STEP_LEXER_FUEL = 100_000
_STEP_MAX_ITEMS = 20_000
"""Compiling, and the lexer's and the parser's part of a mask, may take about 10, 7 and 5 ms on a PC."""
_MAX_GRAMMAR_SIZE = 50_000
_MAX_LEXER_STATES = 25_000
"""Of 1 to 2 KB."""
_MAX_REASON = 160
_OVERLAP_ABOVE_S = 0.0005
"""A mask that takes longer is worth handing to another thread."""

Floats = NDArray[np.float32]


class Vocabulary(Protocol):
    """What a grammar needs to know of a tokenizer; :class:`edge.tokenizer.Tokenizer` does."""

    special_ids: frozenset[int]

    def token_bytes(self, token_id: int) -> bytes:
        """Exact bytes of a token; none for an id without a token."""
        ...

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text."""
        ...


class Grammars:
    """Compiles grammars for one vocabulary and remembers the latest. Thread-safe.

    Args:
        vocabulary: the tokens.
        vocab_size: number of real token ids.
        eos_ids: tokens that end an answer.
    """

    def __init__(self, vocabulary: Vocabulary, vocab_size: int, eos_ids: frozenset[int]) -> None:
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._binding: LLTokenizer | None = None
        self._bind_once = threading.Lock()
        self._changed = threading.Lock()
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()  # guarded by _changed
        self._worker = ThreadPoolExecutor(1, "grammar")  # starts its thread with the first slow mask

    def constraint(self, grammar: Grammar) -> Constraint:
        """A constraint for a new answer; quick for a grammar that was compiled lately.

        The first call takes up to a second and 20 MB to index the vocabulary: not on an event loop.

        Raises:
            RequestError: the grammar is malformed or too large.
        """
        matcher = self._known(grammar) or self._compile(grammar)
        return Constraint(matcher.deep_copy(), self._vocab_size, self._eos_ids, grammar.param, self._worker)

    def _known(self, grammar: Grammar) -> LLMatcher | None:
        with self._changed:
            if matcher := self._compiled.get(grammar):
                self._compiled.move_to_end(grammar)
            return matcher

    def _compile(self, grammar: Grammar) -> LLMatcher:
        if len(grammar.source.encode()) > MAX_SOURCE_BYTES:
            raise _refused(grammar.param, f"it is larger than {MAX_SOURCE_BYTES} bytes")
        from llguidance import LLMatcher, LLParserLimits  # noqa: PLC0415 - a service without grammars does without

        limits = LLParserLimits(
            initial_lexer_fuel=_INITIAL_LEXER_FUEL,
            step_lexer_fuel=_STEP_LEXER_FUEL,
            step_max_items=_STEP_MAX_ITEMS,
            max_lexer_states=_MAX_LEXER_STATES,
            max_grammar_size=_MAX_GRAMMAR_SIZE,
            verbose_errors=False,
        )
        try:
            source = llguidance_source(grammar)
        except ValueError as error:
            raise _refused(grammar.param, str(error)) from None
        matcher = LLMatcher(self._bind(), source, log_level=0, limits=limits)
        if error_text := matcher.get_error():
            raise _refused(grammar.param, error_text)
        with self._changed:
            self._compiled[grammar] = matcher
            while len(self._compiled) > CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
        return matcher

    def _bind(self) -> LLTokenizer:
        from llguidance import LLTokenizer  # noqa: PLC0415 - a service without grammars does without

        with self._bind_once:
            if self._binding is None:
                adapter = _Adapter(self._vocabulary, self._vocab_size, self._eos_ids)
                wrapper = cast("TokenizerWrapper", adapter)
                # Without slices, indices for long strings: masks take 0.05 ms more, memory 36 MB less.
                self._binding = LLTokenizer(wrapper, eos_token=sorted(self._eos_ids), slices=[])
                del adapter.tokens  # copied; they are 10 MB
            return self._binding


class Constraint:
    """Where one answer stands in its grammar.

    Not thread-safe; the engine's thread owns it.

    Args:
        matcher: llguidance's state at the start of the grammar.
        vocab_size: number of real token ids.
        eos_ids: tokens that end an answer.
        param: the field of the request the grammar came from, for errors.
        worker: computes slow masks.
    """

    def __init__(
        self, matcher: LLMatcher, vocab_size: int, eos_ids: frozenset[int], param: str, worker: ThreadPoolExecutor
    ) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._param = param
        self._worker = worker
        self._bits = np.zeros(-(-vocab_size // 32), np.uint32)
        self._masked = np.empty((self._bits.nbytes, 8), np.float32)
        self._current = False
        self._pending: Future[None] | None = None
        self._slow = False
        self._ended = False

    def mask(self, logits: Floats) -> Floats:
        """A copy of ``logits`` [vocab_size] with ``-inf`` for every token the grammar does not allow next.

        The copy is the caller's until the next call.

        Raises:
            RequestError: going on exceeds the limits of the grammar.
        """
        masked = self._masked.reshape(-1)[: self._vocab_size]
        if self._ended:
            masked.fill(-np.inf)
            eos = list(self._eos_ids)
            masked[eos] = logits[eos]
            return masked
        self._settle()
        if not self._current:
            self._compute()
        # The least of logit and ceiling: no branch for each token, as a masked copy would have.
        # A mode other than "raise" lets numpy write to `out` without a copy; all bytes are valid rows.
        np.take(_CEILINGS, self._bits.view(np.uint8), axis=0, out=self._masked, mode="clip")
        return np.minimum(logits, masked, out=masked)

    def accept(self, token_id: int) -> None:
        """The answer goes on with this token, which :meth:`mask` has allowed.

        Raises:
            RequestError: going on exceeds the limits of the grammar.
        """
        if token_id in self._eos_ids:
            self._ended = True
            return
        self._settle()
        self._current = False
        self._matcher.consume_token(token_id)
        self._check()

    def forced_tokens(self) -> list[int]:
        """Tokens that the grammar prescribes next; empty where it leaves a choice. Changes nothing."""
        if self._ended:
            return []
        self._settle()
        return [token for token in self._matcher.compute_ff_tokens() if token not in self._eos_ids]

    def prepare(self) -> None:
        """Begin with the next mask in another thread, if masks of this grammar have been slow."""
        if self._slow and self._pending is None and not (self._current or self._ended):
            self._pending = self._worker.submit(self._compute)

    def _settle(self) -> None:
        """Wait for the other thread: the matcher belongs to one at a time."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _compute(self) -> None:
        began = time.perf_counter()
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._slow = time.perf_counter() - began > _OVERLAP_ABOVE_S
        self._check()
        self._current = True

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _refused(self._param, self._matcher.get_error())


class _Adapter:
    """A vocabulary in the shape that llguidance wants (its ``TokenizerWrapper``)."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, vocab_size: int, eos_ids: frozenset[int]) -> None:
        self._vocabulary = vocabulary
        self.eos_token_id = min(eos_ids)
        self.special_token_ids = sorted(vocabulary.special_ids | eos_ids)
        self.tokens = [vocabulary.token_bytes(token_id) for token_id in range(vocab_size)]

    def __call__(self, text: bytes | str) -> list[int]:
        """Token ids of valid UTF-8."""
        return self._vocabulary.encode(text if isinstance(text, str) else text.decode(), special=False)


_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_CEILINGS = np.where(_BITS, np.float32(np.inf), np.float32(-np.inf))
"""For each byte of a mask, what its eight tokens' logits may be at most [256, 8]."""


def _refused(param: str, reason: str) -> RequestError:
    line = next(iter(reason.splitlines()), "").strip(" :")
    line = "".join(char if char.isprintable() else "?" for char in line[:_MAX_REASON])
    hint = "simplify or correct it; see docs/http-api.md for the limits"
    return RequestError(f"the grammar is not usable: {line}", hint=hint, param=param)
