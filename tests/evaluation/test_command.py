"""``qwedge eval`` as its users meet it: targets, gates, files, errors."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from edge.config import ServerSettings
from export.quantize.recipes import RECIPES
from tests.command_line import Run, command_runner
from tests.export import tiny
from tests.fakes import FakeEngine, last_user_message
from tests.serving import Served, served
from tests.tiny_bundles import export_tiny

SUITE = """\
description: Counts
prompts: ["{{n}}"]
tests:
  - {vars: {n: [1, 2, 3, 4]}, metadata: {size: small}, assert: [{type: number, value: "{{n}}"}]}
  - {vars: {n: 50}, metadata: {size: large}, assert: [{type: number, value: 51}]}
"""


@pytest.fixture
def qwedge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return command_runner(monkeypatch, capsys, "eval")


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "counts.yaml"
    path.write_text(SUITE)
    return path


@pytest.fixture
def server() -> Iterator[Served]:
    with served(FakeEngine(reply=last_user_message), max_queue=8, settings=ServerSettings(port=0)) as running:
        yield running


def test_a_server_is_evaluated_and_files_are_written(qwedge: Run, suite: Path, server: Served, tmp_path: Path) -> None:
    json_file, html_file = tmp_path / "r.json", tmp_path / "r.html"
    done = qwedge(suite, "--url", server.url, "--json", json_file, "--html", html_file)
    assert done.status == 0, done.stderr
    assert "score    80.0%, 4 of 5 cases" in done.stdout
    assert "size     small 4/4, large 0/1" in done.stdout
    assert json.loads(json_file.read_text())["score"] == 0.8
    assert html_file.read_text().startswith("<!doctype html>")
    assert "5 of 5, 4 passed" in done.stderr


@pytest.mark.parametrize(("least", "status"), [("0.8", 0), ("0.81", 1)])
def test_a_gate_is_an_exit_status(qwedge: Run, suite: Path, server: Served, least: str, status: int) -> None:
    done = qwedge(suite, "--url", server.url, "--require", least)
    assert done.status == status
    assert ("failed: the score 0.8 is below the required 0.81" in done.stderr) == bool(status)


def test_a_baseline_says_what_became_worse(qwedge: Run, suite: Path, server: Served, tmp_path: Path) -> None:
    before = tmp_path / "before.json"
    assert qwedge(suite, "--url", server.url, "--json", before).status == 0
    with served(FakeEngine(reply=lambda _: "1"), max_queue=8, settings=ServerSettings(port=0)) as worse:
        done = qwedge(suite, "--url", worse.url, "--baseline", before, "--max-drop", "0.5")
        assert done.status == 1
        assert "-60.0%" in done.stdout
        assert re.search(r"lost +2, 3, 4\n", done.stdout)
        assert "fell by 0.6" in done.stderr
        done = qwedge(suite, "--url", worse.url, "--against", server.url, "--json", "-")
        assert json.loads(done.stdout)["comparison"]["lost"] == ["2", "3", "4"]


def test_what_the_end_needs_is_looked_at_before_any_question(
    qwedge: Run, suite: Path, server: Served, tmp_path: Path
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("prompts: [hello]\ntests:\n  - assert: [{type: regex, value: '.*'}]\n")
    assert qwedge(other, "--url", server.url, "--json", tmp_path / "other.json").status == 0
    steps = server.engine.num_steps
    done = qwedge(suite, "--url", server.url, "--baseline", tmp_path / "other.json")
    assert (done.status, "the baseline has no case of counts" in done.stderr) == (2, True)
    for option in ("--json", "--html", "--resume"):
        for file in (tmp_path / "missing" / "r", tmp_path):
            done = qwedge(suite, "--url", server.url, option, file)
            assert (done.status, f"{file} cannot be written" in done.stderr) == (2, True)
    assert server.engine.num_steps == steps


def test_parts_of_a_suite_and_going_on(qwedge: Run, suite: Path, server: Served, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert "4 of 4 cases" in qwedge(suite, "--url", server.url, "--where", "size=small", "--resume", log).stdout
    steps = server.engine.num_steps
    assert "2 of 2 cases" in qwedge(suite, "--url", server.url, "--limit", "2", "--resume", log).stdout
    assert server.engine.num_steps == steps


def test_the_list_names_what_runs_code(qwedge: Run) -> None:
    done = qwedge("--list")
    assert done.status == 0
    assert re.search(r"code +164 cases .*needs --allow-code", done.stdout)
    assert re.search(r"factory +\d+ cases", done.stdout)


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ((), "no suite is given"),
        (("nonsense",), "there is no suite 'nonsense'"),
        (("missing.yaml",), "missing.yaml cannot be read"),
        (("factory",), "no bundle is given"),
        (("factory", "--bundle", "x", "--against", "y", "--baseline", "z"), "do not go together"),
        (("factory", "--bundle", "x", "--url", "http://127.0.0.1:9"), "do not go together"),
        (("factory", "--url", "mqtt://127.0.0.1"), "is no address of HTTP"),
        (("factory", "--url", "http://127.0.0.1:9", "--record"), "is for bundles"),
        (("factory", "--max-drop", "0.1"), "needs something to compare with"),
        (("factory", "--where", "language"), "has no value"),
        (("factory", "--where", "language=fr"), "no case of factory is like that"),
        (("code", "--url", "http://127.0.0.1:9"), "no connection"),
        (("factory", "--url", "http://127.0.0.1:9"), "no connection"),
        (("factory", "--baseline", "/dev/null", "--url", "http://127.0.0.1:9"), "is no report"),
    ],
)
def test_wrong_command_lines_say_what_is_wrong(qwedge: Run, args: tuple[str, ...], error: str) -> None:
    done = qwedge(*args)
    assert done.status in {2, 6}
    assert error in done.stderr
    assert "hint: " in done.stderr


def test_a_bundle_is_loaded_evaluated_and_compared_with_itself(qwedge: Run, tmp_path: Path) -> None:
    export_tiny(tmp_path, tiny.qwen2_config(), RECIPES["int8"], name="tiny")
    plain = tmp_path / "plain.yaml"
    plain.write_text("prompts: [hello]\noptions: {max_tokens: 4}\ntests:\n  - assert: [{type: regex, value: '.*'}]\n")
    done = qwedge(plain, "--bundle", tmp_path / "bundle", "--against", tmp_path / "bundle", "--threads", "1")
    assert done.status == 0, done.stderr
    assert "plain: tiny (int8)" in done.stdout
    assert "+0.0% (+0.0% to +0.0%), 0 gained, 0 lost, p 1\n" in done.stdout
    done = qwedge(plain, "--bundle", tmp_path / "bundle", "--model", "tiny:missing", "--threads", "1")
    assert "the model 'tiny:missing' is not served here" in done.stderr


def test_why_there_is_no_answer_is_said(qwedge: Run, tmp_path: Path, server: Served) -> None:
    long = tmp_path / "long.yaml"
    test = {"vars": {"x": "word " * 40_000}, "assert": [{"type": "equals", "value": "x"}]}
    long.write_text(json.dumps({"prompts": ["{{x}}"], "tests": [test]}))
    done = qwedge(long, "--url", server.url)
    assert re.search(r"errors +1 cases got no answer, the first: .*tokens", done.stdout), done.stdout
    assert "took" not in done.stdout


class OtherServer(BaseHTTPRequestHandler):
    """A server of OpenAI's API that wants a key and tells nothing of timings."""

    keys: ClassVar[list[str | None]] = []

    def do_POST(self) -> None:
        self.keys.append(self.headers["Authorization"])
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        message = {"role": "assistant", "content": f"It is {question}."}
        body = json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_other_servers_get_their_key(qwedge: Run, suite: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("sk-123\n")
    with ThreadingHTTPServer(("127.0.0.1", 0), OtherServer) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{other.server_port}/v1"
        done = qwedge(suite, "--url", url, "--model", "any", "--key-file", key, "--json", tmp_path / "r.json")
        other.shutdown()
        thread.join()
    assert done.status == 0, done.stderr
    assert set(OtherServer.keys) == {"Bearer sk-123"}
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["score"] == 0.8
    assert report["figures"]["tokens_per_second_median"] is None
    assert "sk-123" not in (tmp_path / "r.json").read_text()
    key.write_text("two words\n")
    assert "holds no API key" in qwedge(suite, "--url", url, "--key-file", key).stderr
