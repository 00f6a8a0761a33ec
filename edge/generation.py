"""What front ends ask of the service, and what they hear: requests and events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge.engine.grammar_source import Grammar
from edge.engine.logprobs import TokenLogprobs
from edge.engine.lora import Adapter
from edge.engine.pooling import Pooling
from edge.engine.sampler import SamplingParams
from edge.engine.thinking import Thinking
from edge.errors import QwedgeError
from edge.model import Model
from edge.sequence import FinishReason, Timings


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate; independent of the wire format."""

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int | None = None
    """Most tokens to generate; None = until the context is full; 0 = read the prompt only."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer and are not part of it."""
    stop_spares: tuple[str, str] | None = None
    """Tags between which stop strings mean nothing."""
    deadline_s: float | None = None
    """Seconds from submission after which the request fails with 408."""
    identity: str = ""
    """Who asks; cached prefixes are shared within an identity only."""
    request_id: str = ""
    """What it is asked after by, while it waits or runs; several may have the same."""
    ignore_eos: bool = False
    """Generate past end-of-sequence tokens: for benchmarks."""
    num_logprobs: int | None = None
    """Alternatives to report with each token's log-probability, 0 to 20; None reports nothing."""
    score_prompt: bool = False
    """Report the log-probabilities of the prompt's tokens too; needs ``num_logprobs``. Takes no cached prefix."""
    pooling: Pooling | None = None
    """Make one vector of the prompt instead of an answer; needs ``max_tokens`` 0. Takes no cached prefix."""
    adapter: Adapter | None = None
    """What answers besides the model: :meth:`Model.find_adapter` finds it."""
    prepared_for: Model | None = field(default=None, compare=False, repr=False)
    """Whose tokens these are; a request that a switch of models has overtaken is refused. None: whatever is served."""
    grammar: Grammar | None = None
    """The form the answer must have. On an event loop, :meth:`Model.check_grammar` comes first, in a worker thread."""
    thinking: Thinking | None = None
    """That a budget, or the grammar, comes after thoughts; None: the grammar holds from the first token."""


@dataclass(frozen=True)
class Queued:
    """The request waits behind ``position`` others."""

    position: int
    eta_s: float


@dataclass(frozen=True)
class Started:
    """Prefill begins."""


@dataclass(frozen=True)
class PromptScored:
    """The prompt was read: how probable its tokens were."""

    logprobs: tuple[TokenLogprobs, ...]
    """Of the second token to the last: nothing predicts the first."""


@dataclass(frozen=True)
class Pooled:
    """The prompt was read: the vector that it became."""

    vector: NDArray[np.float32]
    """[hidden_size], of whatever length it came out."""


@dataclass(frozen=True)
class Delta:
    """A token was generated."""

    text: str
    """Text that became final: valid UTF-8, free of stop strings; may be empty."""
    token_id: int
    logprobs: TokenLogprobs | None = None
    """Where the request asks for them."""


@dataclass(frozen=True)
class Finished:
    """Terminal: the answer is complete."""

    reason: FinishReason
    text: str
    """Text held back until now; append it to the deltas."""
    timings: Timings
    logprobs: TokenLogprobs | None = None
    """Of the token that ended the answer, where the model ended it and the request asks for them."""
    matched_stop: str | None = None
    """The stop string that ended the answer, where one did."""


@dataclass(frozen=True)
class Failed:
    """Terminal: no (complete) answer."""

    error: QwedgeError
    timings: Timings


Event = Queued | Started | PromptScored | Pooled | Delta | Finished | Failed
OnEvent = Callable[[Event], None]
OnIndexedEvent = Callable[[int, Event], None]
