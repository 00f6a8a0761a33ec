"""The audit log and the log's lines: who asked for what, never a text, whatever the disk does."""

import json
import logging
import os
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edge.errors import ConfigError
from edge.http import audit as module
from edge.http.access import Access
from edge.http.audit import AuditLog
from edge.http.caller import Exchange
from edge.http.keys import Key, KeyRing, add_key, hash_key
from edge.log_format import FIELDS, JsonFormatter, TextFormatter
from edge.settings.server import ServerSettings
from tests.fakes import MODEL_NAME, FakeEngine
from tests.serving import Served, wait_for

Serve = Callable[..., Served]
SECRET = "canary-7f3a"
CHAT = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 5}
SCOPE = {"client": ("192.0.2.7", 1234), "method": "GET", "raw_path": b"/v1/models"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
def audit(path: Path) -> Iterator[AuditLog]:
    audit = AuditLog(path, 1 << 20)
    audit.start()
    yield audit
    audit.stop()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _has_lines(path: Path, number: int) -> bool:
    return len(lines(path)) == number


def test_a_line_for_each_request(serve: Serve, audit: AuditLog, path: Path, tmp_path: Path) -> None:
    key = Key(name="hmi", sha256=hash_key("k"), scopes=frozenset({"generate"}))
    add_key(tmp_path / "keys.json", key)
    headers = {"authorization": "Bearer k", "x-request-id": "one"}
    access = Access(KeyRing(tmp_path / "keys.json"), ServerSettings(), local=True)
    server = serve(FakeEngine(reply=lambda _: SECRET), app={"access": access, "audit": audit})
    for number, body in enumerate((CHAT, CHAT | {"stream": True}, {"messages": SECRET}), 1):
        server.client.post(f"/v1/chat/completions?q={SECRET}", json=body, headers=headers)
        # A client may have its answer before the log has its line.
        wait_for(partial(_has_lines, path, number))
    server.client.post("/v1/chat/completions", json=CHAT)
    server.client.get("/health")
    wait_for(partial(_has_lines, path, 4))
    answered, streamed, wrong, unknown = lines(path)
    assert answered.pop("time") <= streamed.pop("time")
    assert 0 <= answered.pop("duration_s") < 20
    assert 0 <= streamed.pop("duration_s") < 20
    assert answered == {
        "id": "one",
        "key": "hmi",
        "address": "127.0.0.1",
        "method": "POST",
        "path": "/v1/chat/completions",
        "model": MODEL_NAME,
        "prompt_tokens": answered["prompt_tokens"],
        "output_tokens": 5,
        "status": 200,
    }
    assert answered["prompt_tokens"] > 10
    assert streamed == answered
    assert (wrong["status"], wrong["output_tokens"], wrong["model"]) == (400, 0, None)
    assert (unknown["status"], unknown["key"]) == (401, None)
    assert SECRET not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_client_that_leaves(serve: Serve, audit: AuditLog, path: Path) -> None:
    server = serve(FakeEngine(reply=lambda _: "x" * 3000, step_s=0.01), app={"audit": audit})
    with server.client.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True, "max_tokens": 3000}) as sent:
        assert next(sent.iter_lines())
    wait_for(partial(_has_lines, path, 1))
    assert lines(path)[0]["status"] == 200
    wait_for(lambda: server.service.stats().num_running == 0)


def test_full_files_are_kept_for_a_while(path: Path) -> None:
    audit = AuditLog(path, 1)  # each batch fills a file
    audit.start()
    for number in range(8):
        seen = {file: file.stat().st_ino for file in path.parent.iterdir()}
        audit.record(SCOPE, Exchange(str(number)), 200, 0.0)
        wait_for(lambda seen=seen: {f: f.stat().st_ino for f in path.parent.iterdir() if f.exists()} != seen)  # type: ignore[misc]
        wait_for(lambda: path.exists() and path.stat().st_size == 0)
    audit.stop()
    kept = [path.with_name(f"audit.jsonl.{n}") for n in (1, 2, 3, 4)]
    assert [lines(file)[0]["id"] for file in kept] == ["7", "6", "5", "4"]
    assert sorted(path.parent.iterdir()) == [path, *kept]
    assert {stat.S_IMODE(file.stat().st_mode) for file in kept} == {0o600}


def test_what_the_disk_refuses_is_counted(
    audit: AuditLog, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.write

    def half(descriptor: int, data: bytes) -> int:
        real(descriptor, data[:9])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "write", half)
    for number in (1, 2):
        audit.record(SCOPE, Exchange("lost"), 200, 0.0)
        wait_for(lambda number=number: audit._num_failed == number)  # type: ignore[misc]
    assert "No space left" in (audit.problem or "")
    monkeypatch.setattr(module.os, "write", real)
    audit.record(SCOPE, Exchange("kept"), 200, 0.0)
    wait_for(lambda: audit.problem is None)
    whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
    told, kept = map(json.loads, whole[-2:])
    assert (told["lost"], kept["id"]) == (2, "kept")
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


def test_what_finds_no_room_is_counted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 3)
    audit = AuditLog(path, 1 << 20)
    for number in range(5):
        audit.record(SCOPE, Exchange(str(number)), 200, 0.0)
    audit.start()
    audit.stop()
    assert [line.get("lost", line.get("id")) for line in lines(path)] == [2, "0", "1", "2"]


def test_a_file_that_cannot_be_opened_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "other")
    for path in (tmp_path / "no" / "folder", tmp_path, tmp_path / "link"):
        with pytest.raises(ConfigError) as caught:
            AuditLog(path, 1).start()
        assert "log.audit" in caught.value.hint


def record(message: str, **extra: Any) -> logging.LogRecord:
    made = logging.LogRecord("edge.x", logging.INFO, "f.py", 1, message, None, None)
    vars(made).update(extra)
    return made


def test_json_lines() -> None:
    line = json.loads(JsonFormatter().format(record("a\nb", **{FIELDS: {"request_id": "r", "status": 200}})))
    assert line.pop("time").endswith("+00:00")
    assert line == {"level": "info", "logger": "edge.x", "message": "a\nb", "request_id": "r", "status": 200}


def test_a_traceback_stays_within_its_json_line() -> None:
    try:
        int("x")
    except ValueError as error:
        exc_info = (type(error), error, error.__traceback__)
    text = JsonFormatter().format(record("failed", exc_info=exc_info))
    assert "\n" not in text
    assert "ValueError: invalid" in json.loads(text)["exception"]


def test_nobody_forges_text_lines() -> None:
    assert "\n" not in TextFormatter().format(record("a\n2026 ERROR b\x1b[2J"))


def test_requests_are_told_apart_in_json(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "edge.http.guard")
    serve().client.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "r-1"})
    wait_for(lambda: bool(caplog.records))
    line = json.loads(JsonFormatter().format(caplog.records[-1]))
    assert (line["request_id"], line["path"], line["status"]) == ("r-1", "/v1/chat/completions", 200)
    assert SECRET not in json.dumps(line)
