"""The commands with a real bundle, a real engine and a real broker: from `qwedge export` to Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
import psutil
import pytest

from tests.command_line import Run, command_runner
from tests.export import tiny
from tests.serving import wait_for

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60
CONTEXT = 16384
NEVER_STOP = {"logit_bias": {str(tiny.EOS): -100, str(tiny.BOS): -100}}


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "edge.cli", *args]


def environment(**changes: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("QWEDGE_")} | changes


@pytest.fixture
def qwedge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return command_runner(monkeypatch, capsys)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a long context, exported as a user would."""
    folder = tmp_path_factory.mktemp("commands")
    checkpoint = tiny.write_folder(folder / "checkpoint", tiny.qwen2_config(max_position_embeddings=CONTEXT))
    line = command("export", str(checkpoint), "-o", str(folder / "bundle"), "--name", "tiny")
    subprocess.run(line, cwd=ROOT, env=environment(), check=True, capture_output=True, timeout=TIMEOUT_S)
    return folder / "bundle"


@dataclass
class Server:
    """A running `qwedge serve`."""

    process: subprocess.Popen[str]
    ready: str
    """What it printed."""
    log: Path

    @property
    def url(self) -> str:
        match = re.search(r"http://\S+?:\d+", self.ready)
        assert match
        return match.group()

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def stream(self, max_tokens: int) -> Any:
        body = {"prompt": "hello world", "max_tokens": max_tokens, "stream": True, **NEVER_STOP}
        return httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=TIMEOUT_S)


@contextmanager
def serving(bundle: Path, log: Path, *args: str, **env: str) -> Iterator[Server]:
    line = command("serve", "--bundle", str(bundle), "--port", "0", "--threads", "1", *args)
    env = {"XDG_STATE_HOME": str(log.parent / "state")} | env
    with log.open("w") as stderr:
        process = subprocess.Popen(
            line, cwd=ROOT, env=environment(**env), stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    try:
        assert process.stdout is not None
        yield Server(process, read_ready(process.stdout, log), log)
    finally:
        process.kill()
        process.wait(TIMEOUT_S)
        assert process.stdout is not None
        process.stdout.close()


def read_ready(stdout: IO[str], log: Path) -> str:
    """The ready block: a line, then a paragraph of examples for each front end, each followed by an empty line."""
    text = ""
    while text.count("\n\n") < (3 if "mqtt://" in text else 2):
        line = stdout.readline()
        assert line, log.read_text()
        text += line
    return text


def wait_gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=5)
    return not alive


def test_generate_streams_or_prints_json(bundle: Path, qwedge: Run) -> None:
    options = ("--bundle", str(bundle), "--max-tokens", "8", "--temperature", "0", "--raw")
    as_json = json.loads(qwedge("generate", "hello", *options, "--json").stdout)
    streamed = qwedge("generate", *options, stdin="hello")
    assert (streamed.status, streamed.stderr) == (0, "")
    assert streamed.stdout == as_json["choices"][0]["text"] + "\n"
    assert as_json["usage"]["completion_tokens"] == 8


def test_generate_refuses_what_the_model_cannot_do(bundle: Path, qwedge: Run) -> None:
    for args, status, message in (
        (("hello",), 2, "error: no bundle is given"),
        (("hello", "--bundle", str(bundle), "--temperature", "9"), 2, "error: temperature is out of range"),
        (("hello " * CONTEXT, "--bundle", str(bundle)), 2, "error: the prompt has "),
        (("hello", "--bundle", str(bundle), "--context", "99999"), 2, "error: a context of 99999 tokens is more than"),
        (("hello", "--bundle", str(bundle.parent)), 5, "error: "),
    ):
        done = qwedge("generate", *args)
        assert (done.status, done.stdout) == (status, "")
        assert done.stderr.startswith(message)
        assert "\nhint: " in done.stderr
    assert qwedge("generate", "--bundle", str(bundle), stdin=" ").status == 2


def test_chat_answers_obeys_and_survives_ctrl_c(bundle: Path) -> None:
    line = command("chat", "--bundle", str(bundle), "--threads", "1", "--temperature", "0", "--context", str(CONTEXT))
    with subprocess.Popen(
        line,
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("/nonsense\nhello\n")
        process.stdin.flush()
        process.stdout.read(1)  # the answer has begun; greedy text of a random model goes on and on
        process.send_signal(signal.SIGINT)
        process.stdin.write("/system Be brief.\n/reset\n/exit\n")
        _, stderr = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    assert "/nonsense is no command" in stderr
    assert "(stopped)" in stderr


def test_bench_reports_consistent_figures(bundle: Path, qwedge: Run) -> None:
    options = (
        "--bundle",
        str(bundle),
        "--prompt-tokens",
        "32",
        "--output-tokens",
        "8",
        "--repeats",
        "3",
        "--threads",
        "1",
    )
    result = json.loads(qwedge("bench", *options, "--json").stdout)
    assert result["model"] == "tiny"
    assert (result["threads"], result["repeats"], len(result["samples"])) == (1, 3, 3)
    speeds = sorted(sample["decode_tokens_per_second"] for sample in result["samples"])
    assert result["decode_tokens_per_second"] == pytest.approx(speeds[1], abs=1e-3)
    gigabytes = result["decode_tokens_per_second"] * result["weight_bytes_per_token"] / 1e9
    assert result["weight_gb_per_second"] == pytest.approx(gigabytes, abs=1e-3)
    assert 0 < result["rss_loaded_bytes"] <= result["rss_peak_bytes"]
    assert "tokens/s" in qwedge("bench", *options).stdout


def test_serve_answers_and_ctrl_c_lets_running_requests_finish(bundle: Path, tmp_path: Path) -> None:
    with serving(bundle, tmp_path / "log") as server:
        assert httpx.get(f"{server.url}/health", timeout=TIMEOUT_S).json()["status"] == "ok"
        with server.stream(200) as response:
            lines = response.iter_lines()
            next(line for line in lines if line.startswith("data: "))
            server.interrupt()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2].replace(" ", "")
        assert server.process.wait(TIMEOUT_S) == 0


def test_what_does_not_finish_in_time_is_ended_with_an_error(bundle: Path, tmp_path: Path) -> None:
    with serving(bundle, tmp_path / "log", "--context", str(CONTEXT), QWEDGE_SERVER_DRAIN_S="0.2") as server:
        with server.stream(CONTEXT) as response:
            lines = response.iter_lines()
            next(line for line in lines if line.startswith("data: "))
            server.interrupt()
            rest = [line for line in lines if line]
        assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "unavailable"
        assert rest[-1] == "data: [DONE]"
        assert server.process.wait(TIMEOUT_S) == 0


@pytest.mark.broker
def test_a_second_ctrl_c_leaves_at_once_and_leaves_no_child(bundle: Path, tmp_path: Path) -> None:
    options = ("--context", str(CONTEXT), "--broker", "embedded")
    with serving(bundle, tmp_path / "log", *options, QWEDGE_MQTT_PORT="0") as server:
        children = server.children()
        assert [child.name() for child in children] == ["mosquitto"]
        with server.stream(CONTEXT) as response:
            lines = response.iter_lines()  # kept: httpx hangs up when it is collected
            next(lines)
            server.interrupt()
            time.sleep(0.3)
            server.interrupt()
            assert server.process.wait(5) == 130
        assert wait_gone(children)


@pytest.mark.broker
def test_the_printed_examples_work_and_nothing_is_left_behind(bundle: Path, tmp_path: Path) -> None:
    for program in ("curl", "mosquitto_pub", "mosquitto_sub"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    with serving(bundle, tmp_path / "log", "--broker", "embedded", QWEDGE_MQTT_PORT="0") as server:
        curl, subscribe, publish = examples(server.ready)
        answer = json.loads(run_example(curl))
        assert answer["model"] == "tiny"
        with subprocess.Popen(
            ["bash", "-c", f"exec {subscribe} -C 1"], stdout=subprocess.PIPE, text=True
        ) as subscriber:
            time.sleep(0.5)
            run_example(publish)
            output, _ = subscriber.communicate(timeout=TIMEOUT_S)
        assert json.loads(output.split(" ", 1)[1])["status"] == 200
        children = server.children()
        server.interrupt()
        assert server.process.wait(TIMEOUT_S) == 0
        assert wait_gone(children)


def examples(ready: str) -> list[str]:
    """The commands of the ready block, as a shell gets them."""
    body = re.sub(r"\s+# .*", "", ready.split("\n\n", 1)[1]).replace("\\\n", " ")
    return [line.strip() for line in body.splitlines() if line.strip()]


def run_example(line: str) -> str:
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.broker
def test_a_taken_broker_port_leaves_http_alone_with_a_line_that_says_so(bundle: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with serving(bundle, tmp_path / "log", "--broker", "embedded", QWEDGE_MQTT_PORT=port) as server:
            assert "mqtt" not in server.ready
            assert httpx.get(f"{server.url}/health", timeout=TIMEOUT_S).status_code == 200
            assert "HTTP alone, without MQTT" in server.log.read_text()


def test_a_taken_port_is_noticed_before_anything_else(qwedge: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = qwedge("serve", "--bundle", "/nowhere", "--port", port)
    error, hint = done.stderr.splitlines()
    assert done.status == 6
    assert error.startswith(f"error: cannot listen on 127.0.0.1:{port}")
    assert hint.startswith("hint: ")


@pytest.mark.broker
def test_a_journal_without_a_disk_degrades_mqtt_until_there_is_one(bundle: Path, tmp_path: Path) -> None:
    obstacle = tmp_path / "state"
    obstacle.touch()
    options = {"QWEDGE_MQTT_PORT": "0", "QWEDGE_MQTT_JOURNAL": str(obstacle / "journal")}
    with serving(bundle, tmp_path / "log", "--broker", "embedded", **options) as server:
        health = httpx.get(f"{server.url}/health", timeout=TIMEOUT_S)
        assert (health.status_code, health.json()["status"]) == (200, "degraded")
        assert health.json()["problem"] == "Not a directory"
        obstacle.unlink()
        wait_for(lambda: httpx.get(f"{server.url}/health", timeout=TIMEOUT_S).json()["status"] == "ok")
        assert (obstacle / "journal" / "journal.db").exists()


@pytest.mark.broker
def test_requests_are_kept_where_state_belongs(bundle: Path, tmp_path: Path) -> None:
    options = {"QWEDGE_MQTT_PORT": "0", "QWEDGE_MQTT_DEVICE": "edge-7", "XDG_STATE_HOME": str(tmp_path / "home")}
    with serving(bundle, tmp_path / "log", "--broker", "embedded", **options):
        assert (tmp_path / "home" / "qwedge" / "edge-7" / "journal" / "journal.db").exists()
