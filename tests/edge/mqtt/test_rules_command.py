"""``qwedge mqtt try-rule``: what it shows without a model, and what it answers with one."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

import edge.cli
import edge.commands.local
from tests.fakes import FakeEngine, make_service

CONFIG = """
[[mqtt.rule]]
name = "advice"
subscribe = "plant/+/alarm"
publish = "plant/{1}/advice"
system = "Be brief."
prompt = "Machine {{ captures[0] }}: {{ json.text }}"
retain = true
schema = { type = "object", properties = { stop = { type = "boolean" } }, required = ["stop"] }

[[mqtt.rule]]
name = "tag"
subscribe = "shift/log"
publish = "shift/tag"
prompt = "{{ payload }}"
choices = ["Störung", "Wartung"]
"""
PAGE = Path(__file__).parents[3] / "docs" / "mqtt-rules.md"
ALARM = ("--topic", "plant/7/alarm", "--payload", '{"text": "hot"}')

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def try_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command with :data:`CONFIG`; gives status, output and errors."""
    file = tmp_path / "qwedge.toml"
    file.write_text(CONFIG, encoding="utf-8")

    def run(*args: str) -> tuple[int, str, str]:
        status = edge.cli.run(["mqtt", "try-rule", *args, "--config", str(file)])
        return (status, *capsys.readouterr())

    return run


def test_it_shows_prompt_form_and_topics(try_rule: Run) -> None:
    status, out, _ = try_rule("advice", *ALARM)
    assert status == 0
    for line in (
        "takes      plant/+/alarm, {1} = 7",
        "publishes  plant/7/advice, QoS 1, retained",
        "answer     JSON by the schema, 256 tokens at most",
        "--- system\nBe brief.",
        "--- user\nMachine 7: hot",
        "--- schema\n{",
    ):
        assert line in out
    assert "--- answer" not in out


def test_a_payload_may_come_from_a_file(try_rule: Run, tmp_path: Path) -> None:
    file = tmp_path / "log.txt"
    file.write_bytes("Förderband steht\0\0".encode())
    status, out, _ = try_rule("tag", "--topic", "shift/log", "--payload-file", str(file), "--json")
    assert status == 0
    report = json.loads(out)
    assert report["request"]["messages"][-1]["content"] == "Förderband steht"
    assert report["request"]["structured_outputs"] == {"choice": ["Störung", "Wartung"]}
    assert (report["captures"], report["publish"]) == ([], "shift/tag")


@pytest.mark.parametrize(
    ("args", "error", "hint"),
    [
        (("advise", *ALARM), "there is no rule 'advise'", "advice, tag"),
        (("advice", "--topic", "plant/alarm", "--payload", "x"), "takes no messages on plant/alarm", "plant/+/alarm"),
        (("advice", "--topic", "plant/7/alarm", "--payload", "x"), "lacks a value that the template needs", "prompt"),
        (("advice", "--topic", "plant/7/alarm"), "one payload", "--payload-file"),
        (("tag", "--topic", "shift/log", "--payload-file", "/nowhere"), "cannot be read", "--payload-file"),
        (("tag", "--topic", "shift/log", "--payload", "x", "--run"), "no bundle is given", "--bundle"),
    ],
)
def test_what_cannot_be_tried_is_said_in_one_line(try_rule: Run, args: tuple[str, ...], error: str, hint: str) -> None:
    status, out, err = try_rule(*args)
    assert (status, out) == (2, "")
    first, second = err.splitlines()
    assert error in first
    assert hint in second


def test_with_a_bundle_the_model_answers(try_rule: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    service = make_service(FakeEngine(reply=lambda _prompt: '{"stop": true}'))
    monkeypatch.setattr(edge.commands.local, "load", lambda _settings: service)
    status, out, _ = try_rule("advice", *ALARM, "--run")
    assert status == 0
    assert out.endswith('--- answer\n{"stop": true}\n')


def test_the_examples_of_the_page_work_as_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    configs = re.findall(r"```toml\n(.+?)```", page, re.DOTALL)
    commands = re.findall(r"```sh\nqwedge (.+?)\n```", page)
    assert len(configs) == len(commands) == 2
    outputs = []
    for text, command in zip(configs, commands, strict=True):
        words = shlex.split(command)
        file = tmp_path / words[words.index("--config") + 1]
        file.write_text(text, encoding="utf-8")
        assert edge.cli.run([str(file) if word == file.name else word for word in words]) == 0
        outputs.append(capsys.readouterr().out)
    assert re.search(r"```\n(rule       advice\n.+?)\.\.\.\n```", page, re.DOTALL)[1] in outputs[0]  # type: ignore[index]
    assert "answer     one of Störung, Wartung, Qualität, Material, Sonstiges, 16 tokens at most" in outputs[1]
    assert outputs[1].endswith("Eintrag: Lager an Presse 2 planmäßig geschmiert\nKategorie:\n")
