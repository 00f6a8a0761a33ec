"""What is asked of every contestant in a round.

A workload is a function from a :class:`Stage` to figures by name (:mod:`tests.bench.peers.report` says what they
mean). A round runs them in the order of :data:`WORKLOADS` on one fresh process; ``restart``, ``long`` and ``raw`` start
another.
"""

from __future__ import annotations

import difflib
import json
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from tests.bench.peers import prompts
from tests.bench.peers.contestants import Contestant, Serving
from tests.bench.peers.meters import ProportionalMemory, memory_mb, warm_page_cache
from tests.bench.peers.prompts import Reader, chat
from tests.bench.peers.running import Ask, Running

SLOTS = 8
CONTEXT = 4096
"""Tokens for which a server has room; the largest workload of several clients needs 2,000."""
LONG_CONTEXT = 8192
LONG_PROMPT = 7500
PROMPT_TOKENS = 512
OUTPUT_TOKENS = 128
SYSTEM_TOKENS = 1000

_ASSISTANT = "You are the assistant of a bottling plant. Answer in plain sentences."

Figures = dict[str, float]


class Stage:
    """One contestant's turn: its process, and what the workloads need besides."""

    def __init__(self, contestant: Contestant, serving: Serving, reader: Reader) -> None:
        self.contestant = contestant
        self.reader = reader
        self.serving = serving
        self._stack = ExitStack()
        self._server: Running | None = None
        self.start_s = 0.0
        """From starting the process to the first token of its first answer."""

    @property
    def server(self) -> Running:
        """The running process; the first use starts it."""
        return self._server or self.open(self.serving)

    def open(self, serving: Serving) -> Running:
        """End the process and start another one; its first answer warms it up."""
        self.close()
        warm_page_cache(self.contestant.files())
        began = time.perf_counter()
        server = self._server = self._stack.enter_context(self.contestant.start(serving))
        ready_s = time.perf_counter() - began
        hello = server.ask(Ask(chat("You are friendly.", "Say hello in one sentence."), 8))
        self.start_s = ready_s + hello.first_s
        return server

    def close(self) -> None:
        """End the process."""
        self._server = None
        self._stack.close()


def start(stage: Stage) -> Figures:
    """Cold start to the first token, with a warm page cache."""
    stage.open(stage.serving)
    return {"start_s": stage.start_s}


def plain(stage: Stage) -> Figures:
    """128 tokens of plain text after a prompt of 512."""
    task = (
        "These are rules of our plant.\n{}\n\nNow tell a new colleague at length, in your own words and as a story of"
        " several pages, what a working day at the plant is like. Do not repeat the rules."
    )
    text = prompts.manual(1, 40)
    messages = stage.reader.fit(lambda part: chat(_ASSISTANT, task.format(part)), text, PROMPT_TOKENS)
    answer = stage.server.ask(Ask(messages, OUTPUT_TOKENS, fixed=True))
    return {
        "prefill_tokens_per_second": (answer.prompt_tokens - answer.cached_tokens) / answer.first_s,
        "decode_tokens_per_second": answer.decode_tokens_per_second,
        "plain_tokens": answer.output_tokens,
    }


def clients(stage: Stage) -> Figures:
    """Eight clients at once, every second one with a prompt of 300 tokens; 128 tokens for each."""
    short = "Tell me at length about the history of {}, beginning in antiquity."
    long = "These are rules of our plant.\n{}\n\nExplain at length why such rules are needed, with examples."
    subjects = ("the water pump", "the glass bottle", "the steam engine", "the conveyor belt")
    asks = []
    for number, subject in enumerate(subjects):
        role = f"You are guide number {number} of a museum of technology."
        text = prompts.manual(10 + number, 20)
        asks.append(chat(role, short.format(subject)))
        asks.append(stage.reader.fit(lambda part, role=role: chat(role, long.format(part)), text, 300))  # type: ignore[misc]
    answers, wall_s = stage.server.ask_all([Ask(messages, OUTPUT_TOKENS, fixed=True) for messages in asks])
    return {"clients_tokens_per_second": sum(answer.output_tokens for answer in answers) / wall_s}


def extraction(stage: Stage) -> Figures:
    """Six events of a log of 600 tokens as JSON by a schema."""
    task = (
        "List the six events of this log in their order as JSON. The message of an event is the text behind its code,"
        " to the end of that line; leave out the remarks below it.\n\n"
    )
    # The first grammar of a process costs extra, once: 0.4 s here.
    stage.server.ask(Ask(chat("You are friendly.", "Greet me as JSON."), 8, schema=prompts.GREETING_SCHEMA))
    messages = chat("You extract events from logs of machines.", task + prompts.alarm_log())
    answer = stage.server.ask(Ask(messages, 640, schema=prompts.EVENTS_SCHEMA))
    return {
        "extraction_tokens_per_second": answer.output_tokens / answer.total_s,
        "extraction_s": answer.total_s,
        "extraction_right": found_events(answer.text),
    }


def edit(stage: Stage) -> Figures:
    """A method of a Python module renamed, which copies most of it."""
    answer = stage.server.ask(_edit())
    return {
        "edit_tokens_per_second": answer.output_tokens / answer.total_s,
        "edit_s": answer.total_s,
        "edit_likeness": likeness(answer.text),
    }


def _edit() -> Ask:
    task = (
        "Rename the method calc to mean_pressure everywhere. Answer with the whole changed file and nothing else.\n\n"
    )
    return Ask(chat("You edit Python code.", f"{task}```python\n{prompts.CODE}```"), 512)


def prefix(stage: Stage) -> Figures:
    """A system prompt of 1,000 tokens: its first use, and two more with other questions."""
    cold = stage.server.ask(_question(stage, "Who may restart a machine?"))
    again = [
        stage.server.ask(_question(stage, text))
        for text in ("When is a machine cleaned?", "What must I do before I open a machine?")
    ]
    cached_s = statistics.mean(answer.first_s for answer in again)
    return {
        "cold_s": cold.first_s,
        "cached_s": cached_s,
        "cached_share": cached_s / cold.first_s,
        "cached_tokens": again[0].cached_tokens,
    }


def memory(stage: Stage) -> Figures:
    """The process after all of the above; and what it really takes, while the edit is made once more."""
    with ProportionalMemory(stage.server.pid) as proportional:
        stage.server.ask(_edit())
    return {
        "proportional_mb": proportional.peak_mb,
        **{f"{name}_mb": value for name, value in memory_mb(stage.server.pid).items()},
    }


def restart(stage: Stage) -> Figures:
    """The same system prompt after a restart of the server."""
    stage.server.ask(_question(stage, "Who orders spare parts?"))
    stage.server.keep()
    server = stage.open(stage.serving)
    server.recall()
    answer = server.ask(_question(stage, "What happens after a format change?"))
    return {"restart_s": answer.first_s, "restart_cached_tokens": answer.cached_tokens}


def long(stage: Stage) -> Figures:
    """A prompt of 7,500 tokens, on a server for one client."""
    server = stage.open(replace(stage.serving, slots=1, context=LONG_CONTEXT))
    task = "This is the log of a shift.\n{}\n\nWrite a long report about this shift in plain sentences."
    text = prompts.shift_log(2, 400)
    messages = stage.reader.fit(lambda part: chat(_ASSISTANT, task.format(part)), text, LONG_PROMPT)
    answer = server.ask(Ask(messages, 64, fixed=True))
    return {
        "long_s": answer.first_s,
        "long_decode_tokens_per_second": answer.decode_tokens_per_second,
        "long_peak_mb": memory_mb(server.pid)["peak"],
    }


def raw(stage: Stage) -> Figures:
    """The contestant's own benchmark, without a server."""
    stage.close()
    speeds = stage.contestant.raw(stage.serving, PROMPT_TOKENS, OUTPUT_TOKENS)
    return {} if speeds is None else dict(zip(("raw_prefill", "raw_decode"), speeds, strict=True))


Workload = Callable[[Stage], Figures]
WORKLOADS: Mapping[str, Workload] = {
    function.__name__: function
    for function in (start, plain, clients, extraction, edit, prefix, memory, restart, long, raw)
}
"""In the order in which a round runs them."""
FULL_ONLY = frozenset({"long", "raw"})
"""Left out of the quick run, which takes 15 to 20 minutes for the 0.5B on 2 cores."""


def found_events(text: str) -> int:
    """How many of the log's events an answer has right, message aside."""
    try:
        events: list[dict[str, Any]] = json.loads(text)["events"]
    except (ValueError, KeyError, TypeError):
        return 0
    names = ("time", "device", "severity", "code")
    found = {tuple(event.get(name) for name in names) for event in events}
    return len(found & {tuple(getattr(event, name) for name in names) for event in prompts.EVENTS})


def likeness(text: str) -> float:
    """How much of the expected file an answer is, from 0 to 1; the fence around it does not count."""
    lines = [line for line in text.strip().splitlines() if not line.startswith("```")]
    return difflib.SequenceMatcher(None, lines, prompts.EDITED_CODE.splitlines(), autojunk=False).ratio()


def _question(stage: Stage, text: str) -> Ask:
    system = stage.reader.fit(
        lambda part: [{"role": "system", "content": f"You know the rules of this plant.\n{part}"}],
        prompts.manual(3, 60),
        SYSTEM_TOKENS,
    )
    return Ask([*system, {"role": "user", "content": text}], 8)
