"""The fake at the engine seam: real scheduler, service and text side over an engine that plays back written answers.

A :class:`FakeEngine` obeys :class:`edge.engine.interface.Engine`. It reads the prompt back as text, asks its ``reply``
function for the answer, and returns logits that make exactly that answer the likeliest, byte by byte. So front ends are
tested fast and without a model, while queueing, cancelling, streaming and stop strings are the product's own.

    service = make_service(FakeEngine(reply=lambda prompt: "Hello"))
    service.start()
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from edge.bundle import GENERATION, GRAPH, TOKENIZER, WEIGHTS, FileEntry, KVLayout, Manifest, Source
from edge.chat import ChatTemplate
from edge.engine.kv_cache import Cache
from edge.engine.lora import Adapter
from edge.engine.prefix_cache import PrefixCache
from edge.engine.state_pool import State
from edge.metrics import Metrics
from edge.model import Model
from edge.scheduler import Scheduler
from edge.service import Loaded, Service
from edge.tokenizer import Tokenizer

MODEL_NAME = "fake-0.1b"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS_ID = 256 + SPECIAL_TOKENS.index("<|im_end|>")
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
PADDED_VOCAB_SIZE = 264
HIDDEN_SIZE = 4
CHAT_TEMPLATE = """\
{%- if tools %}<|im_start|>system
# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls %}
<tool_call>
{{ call.function | tojson }}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}
{%- endif %}"""

Reply = Callable[[str], str]


def last_user_message(prompt: str) -> str:
    """What the user said last, from a prompt rendered with :data:`CHAT_TEMPLATE`; a plain prompt stays itself."""
    return prompt.rsplit("<|im_start|>user\n", 1)[-1].split("<|im_end|>", 1)[0]


class FakeEngine:
    """Plays back ``reply(prompt)``.

    Args:
        reply: from the prompt's text to the answer's text; an exception from it is an engine failure in prefill.
        step_s: seconds that every prefill chunk and every decode step takes.
        slots: sequences at once.
        context_length: tokens (bytes of text) per sequence.
        prefill_chunk: most tokens of one prefill step.
        draft_tokens: tokens of a decode step beyond one for each slot.
        fail_after: raise in the decode step that follows this many tokens of an answer.
    """

    def __init__(
        self,
        reply: Reply = lambda prompt: f"You said: {last_user_message(prompt)}",
        *,
        step_s: float = 0.0,
        slots: int = 2,
        context_length: int = 4096,
        prefill_chunk: int = 64,
        draft_tokens: int = 0,
        fail_after: int | None = None,
    ) -> None:
        self.slots = slots
        self.rows = slots + draft_tokens
        self.context_length = context_length
        self.prefill_chunk = prefill_chunk
        self.score_chunk = 16
        self.bytes_per_token = 4
        self.bytes_per_slot = 0
        self.num_steps = 0
        """Prefill chunks and decode steps so far: it stops growing when nobody wants an answer any more."""
        self.naps = 0
        """How often it was put to sleep."""
        self.asleep = False
        self.gate = threading.Event()
        """Cleared, the engine hangs in its next step until it is set again."""
        self.gate.set()
        self._reply = reply
        self.step_s = step_s
        """May be changed while it works."""
        self._fail_after = fail_after
        self._prompts: list[list[int]] = [[] for _ in range(slots)]
        self._answers: list[list[int]] = [[] for _ in range(slots)]
        self._adapters: list[Adapter | None] = [None] * slots

    def prefill(self, slot: int, ids: NDArray[np.int64], past: int) -> NDArray[np.float32]:
        """See :class:`edge.engine.interface.Engine`."""
        self._step()
        self._prompts[slot] = [*self._prompts[slot][:past], *ids.tolist()]
        self._answers[slot] = [*self._answer(slot).encode(), EOS_ID]
        logits: NDArray[np.float32] = _logits([self._answers[slot][0]])[0]
        return logits

    def score(self, slot: int, ids: NDArray[np.int64], past: int) -> NDArray[np.float32]:
        """See :class:`edge.engine.interface.Engine`; it expects the prompt to go on just as it does."""
        logits = _logits([*ids.tolist()[1:], 0])
        logits[-1] = self.prefill(slot, ids, past)
        return logits

    def embed(self, slot: int, ids: NDArray[np.int64], past: int) -> NDArray[np.float32]:
        """See :class:`edge.engine.interface.Engine`: the hidden state of a byte counts which of four kinds it is."""
        self.prefill(slot, ids, past)
        hidden: NDArray[np.float32] = np.eye(HIDDEN_SIZE, dtype=np.float32)[ids % HIDDEN_SIZE]
        return hidden

    def decode(self, slots: Sequence[int], ids: Sequence[int], past: Sequence[int]) -> NDArray[np.float32]:
        """See :class:`edge.engine.interface.Engine`."""
        assert len(ids) <= self.rows
        self._step()
        return _logits([self._next(slot, before) for slot, before in zip(slots, past, strict=True)])

    def use_adapter(self, slot: int, adapter: Adapter | None) -> None:
        """See :class:`edge.engine.interface.Engine`."""
        self._adapters[slot] = adapter

    def kept_length(self, slot: int, most: int) -> int:
        """See :class:`edge.engine.interface.Engine`."""
        del slot  # a grammar may make an answer longer than the written one: nothing to check it against
        return most

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """See :class:`edge.engine.interface.Engine`."""
        self._prompts[target] = self._tokens(source, length)

    def read_slot(self, slot: int, length: int) -> NDArray[np.float32]:
        """See :class:`edge.engine.interface.Engine`; the ids themselves stand for their keys and values."""
        return np.array(self._tokens(slot, length), np.float32).reshape(1, 1, length, 1)

    def write_slot(self, slot: int, cache: Cache, length: int) -> None:
        """See :class:`edge.engine.interface.Engine`."""
        self._prompts[slot] = cache[0, 0, :length, 0].astype(int).tolist()

    def read_state(self, slot: int, length: int) -> None:
        """See :class:`edge.engine.interface.Engine`; it has none."""

    def write_state(self, slot: int, state: State, length: int) -> None:
        """See :class:`edge.engine.interface.Engine`; nobody may call it."""
        raise AssertionError(slot, state, length)

    def release_slot(self, slot: int) -> None:
        """See :class:`edge.engine.interface.Engine`."""
        self._prompts[slot] = []
        self._answers[slot] = []
        self._adapters[slot] = None

    def rest(self) -> None:
        """See :class:`edge.engine.interface.Engine`."""

    def sleep(self) -> None:
        """See :class:`edge.engine.interface.Engine`."""
        self.naps += 1
        self.asleep = True

    def wake(self) -> None:
        """See :class:`edge.engine.interface.Engine`."""
        self.asleep = False

    def _answer(self, slot: int) -> str:
        """With an adapter, an answer begins with its digest."""
        answer, adapter = self._reply(_text(self._prompts[slot])), self._adapters[slot]
        return f"{adapter.digest}: {answer}" if adapter else answer

    def _tokens(self, slot: int, length: int) -> list[int]:
        tokens = [*self._prompts[slot], *self._answers[slot]][:length]
        # A grammar may have had more written than the answer holds.
        return [*tokens, *[0] * (length - len(tokens))]

    def _next(self, slot: int, past: int) -> int:
        num_output = past - len(self._prompts[slot]) + 1
        assert num_output > 0
        if self._fail_after is not None and num_output >= self._fail_after:
            raise RuntimeError("the fake engine was told to fail")
        return self._answers[slot][min(num_output, len(self._answers[slot]) - 1)]

    def _step(self) -> None:
        assert not self.asleep
        self.num_steps += 1
        self.gate.wait()
        if self.step_s:
            time.sleep(self.step_s)


def make_model(context_length: int = 4096, *, template: str | None = CHAT_TEMPLATE) -> Model:
    """The text side of a bundle whose tokens are bytes: id = byte value, then :data:`SPECIAL_TOKENS`."""
    return Model(
        manifest=make_manifest(context_length),
        tokenizer=Tokenizer(byte_tokenizer()),
        template=None if template is None else ChatTemplate(template),
        eos_ids=frozenset({EOS_ID}),
        sampling_defaults={"temperature": 0.0},
        context_length=context_length,
    )


def make_service(
    engine: FakeEngine | None = None,
    *,
    max_queue: int = 8,
    template: str | None = CHAT_TEMPLATE,
    prefix_cache_bytes: int = 0,
    **options: Any,
) -> Service:
    """A service over the fake engine, not started yet; ``options`` are the scheduler's."""
    engine = engine or FakeEngine()
    model = make_model(engine.context_length, template=template)
    scheduler = Scheduler(engine, max_queue=max_queue, prefixes=PrefixCache(prefix_cache_bytes), **options)
    return Service(Loaded(model, scheduler), Metrics())


def byte_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level BPE without merges: one token for each byte of UTF-8."""
    vocab = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def make_manifest(context_length: int = 4096) -> Manifest:
    """A valid manifest for files that do not exist."""
    return Manifest(
        schema_version=1,
        name=MODEL_NAME,
        version="1",
        model_type="qwen2",
        parameter_count=1,
        recipe={"name": "int4"},
        context_length=context_length,
        vocab_size=VOCAB_SIZE,
        padded_vocab_size=PADDED_VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        kv=KVLayout(layers=1, kv_heads=1, head_dim=2),
        weight_bytes_per_token=1,
        source=Source(kind="folder", location="fake"),
        files=[FileEntry(path=name, size=0, sha256="0" * 64) for name in (GRAPH, WEIGHTS, TOKENIZER, GENERATION)],
        min_runtime_version="0.1.0",
    )


def _byte_symbols() -> list[str]:
    """The printable stand-ins that byte-level BPE uses for the bytes 0..255 (GPT-2's bytes_to_unicode)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    stand_ins = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(stand_ins)) for byte in range(256)]


def _text(ids: list[int]) -> str:
    pieces = [bytes([i]) if i < 256 else SPECIAL_TOKENS[i - 256].encode() for i in ids]
    return b"".join(pieces).decode("utf-8", errors="replace")


def _logits(ids: list[int]) -> NDArray[np.float32]:
    """Logits [len(ids), padded_vocab] under which row i's likeliest token is ids[i] at any sane temperature."""
    logits = np.zeros((len(ids), PADDED_VOCAB_SIZE), dtype=np.float32)
    logits[np.arange(len(ids)), ids] = 1000.0
    return logits
