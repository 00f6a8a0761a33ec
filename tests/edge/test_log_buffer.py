"""The ring of the newest log lines."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import pytest

from edge.log_buffer import MAX_MESSAGE, LogBuffer


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    logger = logging.getLogger("tests.log_buffer")
    logger.setLevel(logging.DEBUG)
    yield logger
    logger.handlers.clear()


def test_the_oldest_lines_go_and_numbers_show_it(log: logging.Logger) -> None:
    buffer = LogBuffer(capacity=3)
    log.addHandler(buffer)
    for number in range(5):
        log.info("line %d", number)
    lines = buffer.after(0)
    assert [(line.number, line.message) for line in lines] == [(3, "line 2"), (4, "line 3"), (5, "line 4")]
    assert [line.number for line in buffer.after(4)] == [5]
    assert buffer.after(5) == []
    assert [line.number for line in buffer.after(0, most=2)] == [4, 5]


def test_levels(log: logging.Logger) -> None:
    buffer = LogBuffer()
    log.addHandler(buffer)
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
        log.log(level, "x")
    assert [line.level for line in buffer.after(0, logging.WARNING)] == ["WARNING", "ERROR", "CRITICAL"]


def test_an_exception_leaves_its_type_only(log: logging.Logger) -> None:
    buffer = LogBuffer()
    log.addHandler(buffer)
    try:
        int("the user's secret question")
    except ValueError:
        log.exception("it failed")
    (line,) = buffer.after(0)
    assert line.message == "it failed (ValueError)"
    log.info("x" * 10_000)
    assert len(buffer.after(1)[0].message) == MAX_MESSAGE


def test_many_threads_lose_no_line(log: logging.Logger) -> None:
    buffer = LogBuffer(capacity=4000)
    log.addHandler(buffer)
    threads = [threading.Thread(target=lambda: [log.info("x") for _ in range(500)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [line.number for line in buffer.after(0, most=4000)] == list(range(1, 4001))
