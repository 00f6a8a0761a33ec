"""``qwedge serve --warm FILE``: which files it takes, whom the prompts serve, and that mistakes show before serving."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx
import pytest

from edge.commands.warm import MAX_PROMPTS, prepare_prompts, read_prompts, warm_up
from edge.engine.prefix_cache import PrefixCache
from edge.errors import ConfigError, EngineError
from edge.metrics import Metrics
from edge.openai import parse_chat, parse_completion, prepare
from edge.scheduler import Scheduler
from edge.service import Event, Failed, Finished, Loaded, Service
from tests.edge.test_commands import serving
from tests.export import tiny
from tests.fakes import FakeEngine, make_model
from tests.tiny_bundles import export_tiny

RULES = "Answer briefly, in the language of the question, and never guess. " * 6


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def run(engine: FakeEngine) -> Service:
    scheduler = Scheduler(engine, max_queue=8, prefixes=PrefixCache(1 << 20))
    service = Service(Loaded(make_model(engine.context_length), scheduler), Metrics())
    service.start()
    return service


@pytest.fixture
def service() -> Iterator[Service]:
    service = run(FakeEngine(context_length=1024))
    yield service
    service.stop()


def warmed(service: Service, path: Path) -> list[str]:
    lines: list[str] = []
    warm_up(service, prepare_prompts(service.model, read_prompts(path)), lines.append)
    return lines


def num_cached(service: Service, body: dict[str, Any], identity: str = "") -> int:
    """Tokens that a client's request finds."""
    request = parse_completion(body) if "prompt" in body else parse_chat(body)
    events: SimpleQueue[Event] = SimpleQueue()
    (generation,) = prepare(service.model, request)
    service.submit(replace(generation, identity=identity), events.put)
    while not isinstance(event := events.get(timeout=60), Finished | Failed):
        pass
    return event.timings.num_cached_tokens


def test_a_text_is_one_system_prompt_for_everyone(service: Service, tmp_path: Path) -> None:
    path = tmp_path / "rules.txt"
    path.write_text(f"\ufeff{RULES}\n")
    assert [line.split(",")[0] for line in warmed(service, path)] == ["warm: prompt 1 of 1"]
    for number, identity in enumerate(("", "mqtt:alice")):
        body = {"messages": [message("system", RULES.strip()), message("user", f"{number}, please")]}
        assert num_cached(service, body, identity) >= len(RULES.strip())


def test_lines_hold_conversations_tools_and_prompts(service: Service, tmp_path: Path) -> None:
    function = {"name": "look_up", "description": "Look a word up in the dictionary.", "parameters": {}}
    lines: list[dict[str, Any]] = [
        {"messages": [message("system", RULES)], "tools": [{"type": "function", "function": function}]},
        {"prompt": "def fibonacci(n: int) -> int:\n    if n < 2:\n"},
        {"messages": [message("user", "For the eyes of one alone. " * 4)], "identity": "mqtt:alice"},
    ]
    path = tmp_path / "warm.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    assert len(warmed(service, path)) == 3
    asked = {**lines[0], "messages": [message("system", RULES), message("user", "Hi")]}
    assert num_cached(service, asked) > len(RULES) + 100, "the tools come before the rules"
    assert num_cached(service, {"messages": asked["messages"]}) == 0, "without tools it is another prompt"
    assert num_cached(service, {"prompt": lines[1]["prompt"] + "        return n"}) == len(lines[1]["prompt"])
    private = {"messages": lines[2]["messages"]}
    assert num_cached(service, private) == 0
    assert num_cached(service, private, "mqtt:bob") == 0
    assert num_cached(service, private, "mqtt:alice") > 100


def test_known_prompts_are_not_read_again(service: Service, tmp_path: Path) -> None:
    path = tmp_path / "rules.txt"
    path.write_text(RULES)
    first, second = warmed(service, path), warmed(service, path)
    assert "known" not in first[0]
    assert "of them known" in second[0]


GOOD = json.dumps({"prompt": "x"})


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, " cannot be read: No such file"),
        (b"", " is empty"),
        (b"\xff\xfe", " is not UTF-8 text"),
        (f"{GOOD}\n\n[1]", ", line 3: the line is not a JSON object"),
        (f"{GOOD}\n{{'prompt': 1}}", ", line 2: the line is not valid JSON at character 1"),
        ('{"prompt": "a\\ud800"}', ", line 1: the line holds a lone surrogate"),
        ('{"promt": "a"}', ", line 1: there is no key 'promt'"),
        ('{"prompt": "a", "messages": []}', ", line 1: needs either messages or a prompt"),
        ('{"identity": "a"}', ", line 1: needs either messages or a prompt"),
        ('{"prompt": "a", "identity": 1}', ", line 1: identity is no string"),
        ('{"prompt": ""}', ", line 1: the prompt is empty"),
        ('{"prompt": ["a", ""]}', ", line 1: the prompt is empty"),
        ('{"messages": []}', ", line 1: messages: "),
        ('{"messages": "hello"}', ", line 1: messages: "),
        ('{"messages": [{"role": "nobody", "content": "a"}]}', ", line 1: a message has an unknown role"),
        (f'{GOOD}\n{{"prompt": "{"long" * 256}"}}', ", line 2: the prompt has 1024 tokens but the context holds 1024"),
        (f"{GOOD}\n" * (MAX_PROMPTS + 1), " has 65 prompts"),
        (b" " * (8 << 20) + b"{}", " is larger than 8 MiB"),
    ],
)
def test_mistakes_are_found_before_anything_runs(tmp_path: Path, content: str | bytes | None, complaint: str) -> None:
    path = tmp_path / "warm.jsonl"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    model = make_model(1024)
    with pytest.raises(ConfigError) as caught:
        prepare_prompts(model, read_prompts(path))
    assert caught.value.message.startswith(f"{path}{complaint}")
    assert caught.value.hint
    assert "long" not in caught.value.message, "a message never quotes a prompt"


def test_a_failure_of_the_engine_is_told(tmp_path: Path) -> None:
    def fail(_prompt: str) -> str:
        raise RuntimeError("as the test wants it")

    path = tmp_path / "rules.txt"
    path.write_text(RULES)
    service = run(FakeEngine(reply=fail, context_length=1024))
    try:
        with pytest.raises(EngineError):
            warmed(service, path)
    finally:
        service.stop()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("warm")
    export_tiny(folder, tiny.qwen2_config(max_position_embeddings=1024))
    return folder / "bundle"


def test_the_first_request_finds_the_prompt_and_so_does_the_next_start(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "rules.txt"
    path.write_text(RULES)
    body = {"messages": [message("system", RULES.strip()), message("user", "Hi")], "max_tokens": 2}
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    for log in logs:
        store = str(tmp_path / "store")
        with serving(bundle, log, "--warm", str(path), QWEDGE_ENGINE_PREFIX_STORE=store) as server:
            assert "warm: prompt 1 of 1" in log.read_text(), "progress comes before the ready line"
            usage = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] > 256
            server.interrupt()
            assert server.process.wait(60) == 0
    assert ["of them known" in log.read_text() for log in logs] == [False, True]
