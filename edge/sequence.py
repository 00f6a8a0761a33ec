"""A sequence: one prompt and its growing answer, and who hears of it.

The scheduler moves a sequence through WAITING, PREFILL and DECODE to FINISHED; docs/architecture.md tells its life.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from edge.engine.lora import Adapter
from edge.engine.sampler import Sampler
from edge.engine.speculation import Draft, PromptLookup
from edge.errors import QwedgeError

FinishReason = Literal["stop", "length"]


class Consumer(Protocol):
    """Receives what happens to one sequence. Called on the engine's thread: must return quickly and never raise."""

    def queued(self, position: int, eta_s: float) -> None:
        """``position`` sequences are ahead in the queue (0 = next)."""
        ...

    def started(self) -> None:
        """Prefill begins."""
        ...

    def token(self, token_id: int) -> FinishReason | None:
        """A token was generated (never an eos id); a reason ends the sequence with this token."""
        ...

    def finished(self, reason: FinishReason, timings: Timings) -> None:
        """Terminal: the sequence is complete."""
        ...

    def failed(self, error: QwedgeError, timings: Timings) -> None:
        """Terminal: cancelled, out of time, or the engine failed."""
        ...


class PromptReader(Protocol):
    """Reads along while a prompt is prefilled. Called on the engine's thread."""

    @property
    def reads(self) -> Literal["logits", "hidden"]:
        """What it is given of each token: logits [n, padded_vocab] of what follows, or hidden states [n, hidden]."""
        ...

    def __call__(self, start: int, rows: NDArray[np.float32], /) -> None:
        """Row i belongs to prompt token ``start + i``; the rows are valid during the call only."""
        ...


@dataclass(frozen=True)
class Timings:
    """Where a sequence's time went; seconds on the monotonic clock. Zero where a phase was not reached."""

    queue_s: float
    prefill_s: float
    """From leaving the queue to the first token: the engine's part of TTFT."""
    decode_s: float
    """From the first token to the last."""
    num_prompt_tokens: int
    num_output_tokens: int
    """Generated tokens, the closing eos included."""
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values were there already."""
    energy_j: float | None = None
    """Its share of what the machine has used meanwhile; None where nothing measures that."""

    @property
    def ttft_s(self) -> float:
        """Time to first token, the queue included."""
        return self.queue_s + self.prefill_s

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first; 0 with fewer than two tokens."""
        return self.decode_s / (self.num_output_tokens - 1) if self.num_output_tokens > 1 else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Output tokens after the first in a second; 0 with fewer than two tokens."""
        return 1 / self.tpot_s if self.tpot_s else 0.0


class SequenceStatus(Enum):
    """The life of a sequence."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """One prompt and its growing answer."""

    prompt_ids: NDArray[np.int64]  # [num_prompt_tokens]
    max_tokens: int
    """Most tokens to generate."""
    eos_ids: frozenset[int]
    sampler: Sampler
    consumer: Consumer
    deadline: float | None = None
    """On the clock of :func:`time.monotonic`."""
    request_id: str = ""
    """What it is asked after by."""
    identity: str = ""
    """Whose it is: cached prefixes are shared within an identity only (:func:`edge.engine.prefix.owned_by`)."""
    adapter: Adapter | None = None
    """What its tokens are computed with besides the model."""
    prompt_reader: PromptReader | None = None
    """Gets what the model makes of the whole prompt, in order and before the first token."""
    is_reusable: bool = True
    """Whether others may begin like it, so that its keys and values are worth keeping."""

    status: SequenceStatus = SequenceStatus.WAITING
    slot: int = -1
    num_computed_tokens: int = 0
    """Tokens whose keys and values are in the slot: 0 <= num_computed < num_prompt + num_output, from the first
    output on."""
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values came from another sequence."""
    snapshots_at: tuple[int, ...] = ()
    """Lengths of the prompt at which its state is to be kept (:mod:`edge.snapshots`)."""
    output_ids: list[int] = field(default_factory=list)
    lookup: PromptLookup | None = None
    """Where guesses come from, made when the first one is wanted."""
    cancelled: bool = False
    energy_j: float | None = None
    """Its share of what the machine has used so far; None where nothing measures that."""
    submitted_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    first_token_at: float | None = None

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.output_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def pending_ids(self) -> list[int]:
        """Outputs whose keys and values are not in the slot: the last one, or more after the slot was taken away."""
        return self.output_ids[self.num_computed_tokens - len(self.prompt_ids) :]

    def draft(self, most: int) -> Draft:
        """Up to ``most`` tokens that may come after the last output."""
        if most == 0:
            return Draft()
        if self.lookup is None:
            self.lookup = PromptLookup(self.prompt_ids.tolist())
        self.lookup.extend(self.output_ids[len(self.lookup) - len(self.prompt_ids) :])
        return self.lookup.draft(most, self.sampler.forced_tokens())

    def computed_ids(self) -> NDArray[np.int64]:
        """The tokens whose keys and values are in the slot [num_computed_tokens]."""
        return np.concatenate([self.prompt_ids, np.array(self.output_ids, np.int64)])[: self.num_computed_tokens]

    def timings(self) -> Timings:
        """Timings up to now."""
        now = time.monotonic()
        started = self.started_at if self.started_at is not None else now
        first = self.first_token_at if self.first_token_at is not None else now
        return Timings(
            queue_s=started - self.submitted_at,
            prefill_s=first - started,
            decode_s=now - first,
            num_prompt_tokens=len(self.prompt_ids),
            num_output_tokens=self.num_output_tokens,
            num_cached_tokens=self.num_cached_tokens,
            energy_j=self.energy_j,
        )
