"""Evaluations from the question to the report: in this process, over HTTP, interrupted and taken up again."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from edge.config import ServerSettings
from edge.errors import ConfigError, EngineError, UnavailableError
from edge.evaluation import (
    Report,
    ResultLog,
    ServiceTarget,
    Suite,
    compare,
    evaluate,
    load_suite,
    page,
    url_target,
)
from edge.evaluation.answer import Answer
from edge.evaluation.compare import mcnemar
from edge.evaluation.report import Result, Share
from tests.fakes import FakeEngine, last_user_message, make_service
from tests.serving import served

SUITE = """\
description: Echoes
prompts: ["{{q}}"]
tests:
"""
CASE = """\
  - vars: {{q: "q{n}"}}
    metadata: {{parity: {parity}}}
    assert:
      - {{type: contains, value: "q{n}", weight: 3, metric: echo}}
      - {{type: not-contains, value: "wrong"}}
"""


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    path = tmp_path / "echoes.yaml"
    cases = (CASE.format(n=n, parity="even" if n % 2 == 0 else "odd") for n in range(10, 22))
    path.write_text(SUITE + "".join(cases))
    return load_suite(path)


def reply(prompt: str) -> str:
    """Echoes; of every third question it says that it is wrong."""
    question = last_user_message(prompt)
    return f"wrong {question}" if int(question[1:]) % 3 == 0 else question


class Scripted:
    """A target that answers by a function, and counts."""

    name = "scripted"
    parallel = 3

    def __init__(self, answer: Any, **facts: Any) -> None:
        self._answer = answer
        self.facts: Mapping[str, Any] = facts
        self.asked: list[str] = []
        self._lock = threading.Lock()

    def answer(self, body: Mapping[str, Any]) -> Answer:
        question = body["messages"][-1]["content"]
        with self._lock:
            self.asked.append(question)
        text = self._answer(question)
        return Answer(text, latency_ms=10.0, completion_tokens=2, energy_j=0.5)


@pytest.fixture
def service_target() -> Iterator[ServiceTarget]:
    service = make_service(FakeEngine(reply=reply, slots=2))
    service.start()
    yield ServiceTarget(service, 2)
    service.stop()


def test_a_service_is_evaluated(suite: Suite, service_target: ServiceTarget) -> None:
    told: list[Result] = []
    report = evaluate(suite, service_target, on_result=told.append)
    assert (report.share.passed, report.share.count) == (8, 12)
    assert report.score == pytest.approx(8 / 12)
    assert report.points == pytest.approx((8 + 4 * 0.75) / 12)
    assert report.groups()["parity"] == {"even": Share(4, 6), "odd": Share(4, 6)}
    assert report.metrics() == {"echo": 1.0}
    assert [result.id for result in report.results] == [str(n) for n in range(1, 13)]
    assert len(told) == 12
    assert report.facts["model"] == "fake-0.1b"
    figures = report.figures()
    assert figures["completion_tokens"] == 8 * 4 + 4 * 10  # bytes, and the end
    assert figures["energy_j"] is None
    assert figures["latency_ms_median"]


def test_a_server_is_evaluated(suite: Suite) -> None:
    with (
        served(FakeEngine(reply=reply), max_queue=2, settings=ServerSettings(port=0)) as server,
        url_target(server.url, model=None, parallel=6, timeout_s=30) as target,
    ):
        report = evaluate(suite, target)
    assert report.share == Share(8, 12)
    assert report.num_errors == 0
    assert report.facts["url"] == server.url


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(UnavailableError), url_target("http://127.0.0.1:9", model=None, parallel=1, timeout_s=2):
        pass


def test_code_needs_leave(tmp_path: Path) -> None:
    path = tmp_path / "code.yaml"
    path.write_text("prompts: [x]\ntests:\n  - assert: [{type: code-runs, value: assert f(2) == 4}]\n")
    target = Scripted(lambda _: "```python\ndef f(x):\n    return x * x\n```")
    with pytest.raises(ConfigError, match="executes code") as caught:
        evaluate(load_suite(path), target)
    assert "--allow-code" in caught.value.hint
    assert target.asked == []
    assert evaluate(load_suite(path), target, allow_code=True).score == 1.0


def test_functions_of_humaneval_are_judged_by_their_tests() -> None:
    suite = load_suite("code").limited(3)
    right = "def strlen(s): pass"
    report = evaluate(suite, Scripted(lambda _: right), allow_code=True)
    assert report.score == 0.0
    solutions = {
        "from typing import List": "def has_close_elements(numbers, threshold):\n    return any(abs(a - b) < threshold "
        "for i, a in enumerate(numbers) for b in numbers[:i])",
    }
    first = evaluate(suite, Scripted(lambda q: next((s for k, s in solutions.items() if k in q), "")), allow_code=True)
    assert first.results[0].passed, first.results[0].verdicts


def test_an_answer_that_fails_is_a_case_that_fails(suite: Suite) -> None:
    def fail_once(question: str) -> str:
        if question == "q12":
            raise EngineError("broken")
        return question

    report = evaluate(suite, Scripted(fail_once))
    assert report.num_errors == 1
    failed = next(result for result in report.results if result.error)
    assert (failed.id, failed.passed, failed.error) == ("3", False, "broken")


def test_a_target_that_is_gone_ends_it(suite: Suite) -> None:
    def gone(_question: str) -> str:
        raise UnavailableError("gone")

    with pytest.raises(UnavailableError):
        evaluate(suite, Scripted(gone))


def test_an_interrupted_evaluation_goes_on(suite: Suite, tmp_path: Path) -> None:
    log = ResultLog(tmp_path / "log.jsonl")
    count = 0

    def interrupt(_result: Result) -> None:
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt

    first = Scripted(str, version=1)
    with pytest.raises(KeyboardInterrupt):
        evaluate(suite, first, parallel=1, log=log, on_result=interrupt)
    # The power failed while a line was written.
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"target": "half of a li')
    second = Scripted(str, version=1)
    report = evaluate(suite, second, log=log)
    assert report.score == 1.0
    assert len(second.asked) == 12 - 5
    third = Scripted(str, version=1)
    assert evaluate(suite, third, log=log).results == report.results
    assert third.asked == []


def test_results_of_others_are_not_taken(suite: Suite, tmp_path: Path) -> None:
    log = ResultLog(tmp_path / "log.jsonl")
    evaluate(suite, Scripted(str, version=1), log=log)
    other = Scripted(str, version=2)
    evaluate(suite, other, log=log)
    assert len(other.asked) == 12
    path = tmp_path / "echoes.yaml"
    path.write_text(path.read_text().replace('value: "q15"', 'value: "q16"'))
    again = Scripted(str, version=1)
    evaluate(load_suite(path), again, log=log)
    assert again.asked == ["q15"]


def test_failed_answers_are_asked_again(suite: Suite, tmp_path: Path) -> None:
    def fail(_question: str) -> str:
        raise EngineError("broken")

    log = ResultLog(tmp_path / "log.jsonl")
    assert evaluate(suite, Scripted(fail), log=log).num_errors == 12
    assert evaluate(suite, Scripted(str), log=log).score == 1.0


def test_reports_survive_their_json(suite: Suite, tmp_path: Path) -> None:
    report = evaluate(suite, Scripted(str, version=1))
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report.as_json()))
    assert Report.read(path) == report
    for text in ("", "[]", "{}", '{"schema_version": 99}', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ConfigError, match="no report"):
            Report.read(path)


def test_reports_follow_their_schema(suite: Suite) -> None:
    from edge.evaluation.json_schema import check, check_schema

    schema = json.loads(Path("docs/schemas/evaluation.schema.json").read_text())
    check_schema(schema)
    before = evaluate(suite, Scripted(lambda _: "no"))
    report = evaluate(suite, Scripted(str))
    value = report.as_json() | {"comparison": compare(report, before).as_json()}
    check(json.loads(json.dumps(value)), schema)


def test_comparisons_count_flips(suite: Suite) -> None:
    before = evaluate(suite, Scripted(lambda q: q if q < "q18" else "no"))
    now = evaluate(suite, Scripted(lambda q: q if q > "q10" else "no"))
    found = compare(now, before)
    assert found.gained == ("9", "10", "11", "12")
    assert found.lost == ("1",)
    assert found.difference == pytest.approx(3 / 12)
    assert found.interval[0] < found.difference < found.interval[1]
    assert found.p_value == pytest.approx(0.375)  # 2 * (1 + 5) / 32
    assert compare(now, now).interval == (0.0, 0.0)
    other = Report(**{**vars(before), "results": ()})
    with pytest.raises(ConfigError, match="no case"):
        compare(now, other)


def test_mcnemars_test_is_exact() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 10) == pytest.approx(2 / 1024)
    assert mcnemar(3000, 2000) < 1e-40


def test_wilsons_interval() -> None:
    # Wilson (1927) for 8 of 10.
    low, high = Share(8, 10).interval
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)


def test_the_page_shows_and_escapes(suite: Suite) -> None:
    evil = "<script>alert(1)</script>\" onload='x' &amp;"
    report = evaluate(suite, Scripted(lambda _: evil, url=evil))
    before = evaluate(suite, Scripted(str))
    html = page(report, compare(report, before))
    assert "<script" not in html
    assert "onload='" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "default-src 'none'" in html
    assert "src=" not in html
    assert "href=" not in html
    assert html.count("<details>") == 12
    assert "0.0%" in html
    assert "12 lost" in html
    assert "a probability of 0.00049.</p>" in html
    assert '<th scope="row">tokens of answers</th><td>24</td>' in html


@pytest.mark.parametrize("question", ["", " \n "])
def test_questions_may_be_blank(tmp_path: Path, question: str) -> None:
    path = tmp_path / "blank.yaml"
    test = {"vars": {"x": question}, "assert": [{"type": "regex", "value": "x"}]}
    path.write_text(json.dumps({"prompts": ["{{x}}"], "tests": [test]}))
    assert "<summary>" in page(evaluate(load_suite(str(path)), Scripted(str)))
