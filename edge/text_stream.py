"""Token ids to text while they are generated: whole characters only, and nothing that may belong to a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from edge.errors import RequestError
from edge.tokenizer import Tokenizer


class TextStream:
    """The text of one sequence, released as soon as it is final.

    A character that lies across tokens waits for its last byte, and the beginning of a stop string waits until it is
    clear whether the rest follows. Special tokens give no text. The stop string that is complete first ends the text;
    of several complete at the same character the longest counts, so the result does not depend on how the text was cut
    into tokens. Time is linear in the text, for each stop string.

    Args:
        tokenizer: gives the bytes of a token.
        stop: strings that end the text and are not part of it.
        spared: tags between which stop strings mean nothing, as inside of a tool call.

    Raises:
        RequestError: a stop string is empty.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, spared: tuple[str, str] | None = None
    ) -> None:
        if not all(stop):
            raise RequestError("a stop string is empty", hint="leave it out", param="stop")
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._matchers = [_Matcher(text) for text in dict.fromkeys(stop)]
        self._spared = _Spared(*spared) if spared and stop else None
        self._held = ""  # decoded, not released
        self._matched_stop: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; the text is complete then."""
        return self._matched_stop is not None

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the text."""
        return self._matched_stop

    def push(self, token_id: int) -> str:
        """Add a token and return the text that became final, which may be empty."""
        if self.stopped or token_id in self._tokenizer.special_ids:
            return ""
        return self._add(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def flush(self) -> str:
        """Return what was held back, once no token follows; an incomplete character becomes U+FFFD."""
        if self.stopped:
            return ""
        released = self._add(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return released + rest

    def _add(self, text: str) -> str:
        for index, char in enumerate(text):
            if self._spared is not None and self._spared.advance(char):
                for matcher in self._matchers:
                    matcher.num_matched = 0
                continue
            complete = [matcher for matcher in self._matchers if matcher.advance(char)]
            if complete:
                self._matched_stop = max((matcher.pattern for matcher in complete), key=len)
                before = self._held + text[: index + 1]
                self._held = ""
                return before[: -len(self._matched_stop)]
        self._held += text
        final = len(self._held) - max((matcher.num_matched for matcher in self._matchers), default=0)
        released, self._held = self._held[:final], self._held[final:]
        return released


class _Spared:
    """Follows a text into blocks between two tags, and out of them."""

    def __init__(self, opening: str, closing: str) -> None:
        self._tags = (opening, closing)
        self._is_inside = False
        self._next = _Matcher(opening)

    def advance(self, char: str) -> bool:
        """Take the next character; whether it is inside of a block, or the last one of a tag."""
        was_inside = self._is_inside
        if self._next.advance(char):
            self._is_inside = not was_inside
            self._next = _Matcher(self._tags[self._is_inside])
        return was_inside or self._is_inside


class _Matcher:
    """Finds one string in a text that arrives by characters (Knuth, Morris, Pratt)."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.num_matched = 0
        """Characters at the end of the text so far that begin the pattern."""
        # For each length of a matched beginning: the next shorter beginning that also ends there.
        self._shorter = [0] * (len(pattern) + 1)
        length = 0
        for end in range(1, len(pattern)):
            length = self._extend(length, pattern[end])
            self._shorter[end + 1] = length

    def advance(self, char: str) -> bool:
        """Take the next character; True when it completes the pattern, after which the matcher is spent."""
        self.num_matched = self._extend(self.num_matched, char)
        return self.num_matched == len(self.pattern)

    def _extend(self, length: int, char: str) -> int:
        while length and self.pattern[length] != char:
            length = self._shorter[length]
        return length + (self.pattern[length] == char)
