"""The page's device view in a real browser."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from edge.cooling import Throttling
from edge.http.routes.device import DeviceSources
from edge.log_buffer import LogBuffer
from edge.power import Sensors
from edge.settings.server import ServerSettings
from edge.throttle import ThrottleState
from tests.browser import ENTER, Browser
from tests.edge.http.page import MARKS, Serve, count, fits, open_page, stubbed, texts
from tests.edge.http.panel import device_with_mqtt
from tests.edge.managed import export_two, managed
from tests.fakes import MODEL_NAME, FakeEngine
from tests.serving import serving

pytestmark = MARKS

BUNDLES = [
    {"name": "coder-b", "version": "2", "size_bytes": 400e6, "signed_by": "plant", "active": True, "previous": False},
    {"name": "coder-a", "version": "1", "size_bytes": 390e6, "signed_by": None, "active": False, "previous": True},
    {"name": "<b>c</b>", "version": "1", "size_bytes": 1e9, "signed_by": None, "active": False, "previous": False},
]


def test_live_figures_and_charts(serve: Serve, browser: Browser) -> None:
    sources = DeviceSources(LogBuffer(), temperature_c=lambda: 51.5)
    server = serve(FakeEngine(reply=lambda _: "x" * 300, slots=2, step_s=0.01), app={"device": sources})
    with server.asking():
        open_page(browser, server, "device")
        browser.wait("document.querySelectorAll('#slots tr.busy').length === 1")
        assert "writing" in browser.text("#slots tr.busy")
        browser.wait("parseFloat(document.querySelector('[data-chart=tokens] .value').innerText) > 1")
    browser.wait("!document.querySelector('[data-chart=ttft]').hidden")
    facts = dict(zip(texts(browser, "#device-facts dt"), texts(browser, "#device-facts dd"), strict=True))
    assert facts["Model"].startswith(MODEL_NAME)
    assert facts["Temperature"] in {"51 °C", "52 °C"}
    assert facts["Waiting"] == "0 of 8"
    shown = browser.run(
        "return [...document.querySelectorAll('.chart')].filter((c) => !c.hidden).map((c) => c.dataset.chart)"
    )
    assert shown == ["tokens", "ttft", "load", "ram", "cache", "temperature"]
    assert count(browser, ".chart canvas") == len(shown)
    assert browser.run("return document.querySelector('[data-chart=ram] .plot').ariaLabel").startswith(
        "Memory of qwedge: "
    )
    browser.wait("document.querySelectorAll('#slots tr.busy').length === 0")


def test_it_says_what_slows_the_device_down(serve: Serve, browser: Browser) -> None:
    server = serve()
    server.service.metrics.sensors = Sensors(firmware=lambda: Throttling(("under_voltage", "hot")))
    assert server.service._loaded is not None
    server.service._loaded.scheduler._throttle.state = ThrottleState(4, "heat")
    open_page(browser, server, "device")
    browser.wait("document.querySelector('#device-name').innerText !== ''")
    facts = dict(zip(texts(browser, "#device-facts dt"), texts(browser, "#device-facts dd"), strict=True))
    assert facts["Slowed down"] == "to 75 %, as it is hot"
    assert facts["Clock held down by"] == "low voltage, heat"
    browser.wait("document.querySelectorAll('.chart:not([hidden])').length > 0")


def test_it_asks_only_while_it_is_to_be_seen(serve: Serve, browser: Browser) -> None:
    with stubbed(browser, {"GET v1/bundles": {"bundles": [], "operation": None}}):
        open_page(browser, serve(), "device")
        browser.wait("document.querySelector('#device-name').innerText !== ''")
        browser.click("header nav a")
        browser.wait("!document.querySelector('#chat-view').hidden")
        asked = (
            "return performance.getEntriesByType('resource').filter(({ name }) => name.includes('/v1/device')).length"
        )
        before = browser.run(asked)
        assert before >= 1
        browser.run("performance.clearResourceTimings()")
        browser.wait("performance.getEntriesByType('resource').some(({ name }) => name.endsWith('/health'))")
        assert browser.run(asked) == 0


def test_models_are_switched_with_confirmation_and_progress(serve: Serve, browser: Browser) -> None:
    running = {
        "id": "1",
        "kind": "switch",
        "name": "coder-a",
        "state": "running",
        "step": "loading",
        "progress": 0.4,
        "error": None,
    }
    failed = {**running, "state": "failed", "error": {"message": "it does not work", "hint": None}}
    answers = {
        "GET v1/bundles": {"bundles": BUNDLES, "operation": None},
        "POST v1/bundles/coder-a/switch": running,
        "POST v1/bundles/rollback": running,
        "POST v1/bundles/%3Cb%3Ec%3C%2Fb%3E/verify": running,
    }
    with stubbed(browser, answers):
        open_page(browser, serve(), "device")
        browser.wait("document.querySelectorAll('#bundles li').length === 3")
        rows = texts(browser, "#bundles li")
        assert "in use" in rows[0]
        assert "Roll back" in rows[1]
        assert "<b>c</b>" in rows[2]
        browser.click("#bundles li:nth-child(2) button")
        assert "Switch to coder-a?" in browser.text("#ask-question")
        browser.click("#ask-cancel")
        assert "POST" not in str(browser.run("return window.calls"))
        browser.click("#bundles li:nth-child(2) button")
        browser.run("window.answers['GET v1/bundles'] = arguments[0]", {"bundles": BUNDLES, "operation": running})
        browser.click("#ask-ok")
        browser.wait("document.querySelector('#bundle-operation progress')?.value === 0.4")
        assert "loading" in browser.text("#bundle-operation")
        assert browser.run(
            "return [...document.querySelectorAll('#bundles button')].every((button) => button.disabled)"
        )
        browser.run("window.answers['GET v1/bundles'] = arguments[0]", {"bundles": BUNDLES, "operation": failed})
        browser.wait("document.querySelector('#bundle-operation .problem')?.innerText.includes('it does not work')")
        browser.click("#bundles li:nth-child(2) button:nth-child(3)")
        browser.click("#ask-ok")
        browser.wait("window.calls.includes('POST v1/bundles/rollback')")
        browser.click("#bundles li:nth-child(3) button:nth-child(2)")
        browser.wait("window.calls.includes('POST v1/bundles/%3Cb%3Ec%3C%2Fb%3E/verify')")


def test_a_real_model_that_does_not_work_is_left_and_one_that_does_is_kept(browser: Browser, tmp_path: Path) -> None:
    exported = export_two(tmp_path)
    with (
        managed(exported, tmp_path) as device,
        serving(device.service, ServerSettings(port=0), management=device.management) as (host, port),
    ):
        browser.open(f"http://{host}:{port}/#/device")
        browser.wait("document.querySelectorAll('#bundles li').length === 2")
        for broken, state, active in (({"second"}, "failed", "first"), (set(), "done", "second")):
            device.broken = broken
            browser.wait("[...document.querySelectorAll('#bundles button')].every((button) => !button.disabled)")
            browser.run(
                "[...document.querySelectorAll('#bundles button')].find((b) => b.innerText === 'Switch').click()"
            )
            browser.click("#ask-ok")
            browser.wait(f"document.querySelector('#bundle-operation').innerText.includes('{state}')")
            assert device.active == active
        browser.wait("document.querySelector('#device-facts').innerText.includes('second')")


@pytest.mark.broker
def test_a_question_through_the_broker(browser: Browser) -> None:
    with device_with_mqtt(FakeEngine(reply=lambda _: "<b>hello</b>")) as server:
        open_page(browser, server, "device")
        browser.wait("document.querySelector('#mqtt-facts').innerText.includes('connected')")
        browser.type("#mqtt-text", "anybody?" + ENTER)
        browser.wait("document.querySelector('#mqtt-answer').innerText.includes('Answered through the broker')")
        assert "<b>hello</b>" in browser.text("#mqtt-answer")
        browser.wait("document.querySelector('#mqtt-messages').innerText.includes('done')")
        assert "hello" not in browser.text("#mqtt-messages")


def test_the_log_by_level(serve: Serve, browser: Browser) -> None:
    logs = LogBuffer()
    server = serve(app={"device": DeviceSources(logs)})
    for level, text in ((logging.INFO, "<i>plain</i>"), (logging.ERROR, "broken")):
        logs.handle(logging.LogRecord("edge.x", level, "", 0, text, None, None))
    open_page(browser, server, "device")
    browser.wait("document.querySelectorAll('#log-lines li').length === 2")
    assert "<i>plain</i>" in browser.text("#log-lines")
    browser.choose("#log-level", "error")
    browser.wait("document.querySelectorAll('#log-lines li').length === 1")
    logs.handle(logging.LogRecord("edge.x", logging.ERROR, "", 0, "again", None, None))
    browser.wait("document.querySelectorAll('#log-lines li').length === 2")


def test_it_fits_a_phone(browser: Browser, serve: Serve) -> None:
    browser.resize(360, 640, dark=True)
    with stubbed(browser, {"GET v1/bundles": {"bundles": BUNDLES, "operation": None}}):
        open_page(browser, serve(FakeEngine(slots=8)), "device")
        browser.wait("document.querySelectorAll('#bundles li').length === 3")
        assert fits(browser, 360, "device")


def test_a_device_that_goes_away_is_noticed_and_comes_back(serve: Serve, browser: Browser) -> None:
    with stubbed(browser, {"GET v1/bundles": {"bundles": [], "operation": None}}):
        open_page(browser, serve(), "device")
        browser.wait("document.querySelector('#device-name').innerText !== ''")
        browser.run("window.kept = fetch; window.fetch = () => Promise.reject(new TypeError('gone'))")
        browser.wait("document.querySelector('#device-problem').innerText.includes('cannot be reached')")
        browser.run("window.fetch = window.kept")
        browser.wait("document.querySelector('#device-problem').innerText === ''")
