"""The page's evaluate view in a real browser."""

from __future__ import annotations

from pathlib import Path

from tests.browser import Browser
from tests.edge.http.page import MARKS, count, fits, open_page, texts
from tests.edge.http.test_evaluation_routes import ended, evaluating, says, start

pytestmark = MARKS


def test_a_suite_is_run_and_compared(browser: Browser, tmp_path: Path) -> None:
    with evaluating(tmp_path, says("STOP")) as server:
        ended(server, start(server, limit=12)["id"])
    with evaluating(tmp_path, says("CHECK")) as server:
        second = ended(server, start(server, limit=12)["id"])
        open_page(browser, server, "evaluate")
        browser.wait("document.querySelectorAll('#runs tr').length === 2")
        browser.click("#runs tr:first-child button")
        browser.wait("document.querySelectorAll('#cases tr').length === 12")
        assert browser.text("#result-summary") == f"{second['passed']} of 12 passed"
        assert texts(browser, "#cases td:nth-child(2)").count("passed") == second["passed"]
        browser.choose("#compare", browser.run("return document.querySelector('#compare option:nth-child(2)').value"))
        browser.wait("document.querySelector('#result-summary').innerText.includes('gained')")
        assert browser.text("#result-summary").endswith("2 gained, 1 lost against fake-0.1b (int4) (p = 1)")
        assert set(texts(browser, "#cases td:nth-child(3)")) == {"passed", "failed"}
        browser.click("#only-failed")
        assert count(browser, "#cases tr") == 12 - second["passed"]
        browser.click("#cases details summary")
        assert "CHECK" in browser.text("#cases details")


def test_a_run_shows_its_progress_and_can_be_cancelled(browser: Browser, tmp_path: Path) -> None:
    with evaluating(tmp_path, says("<img src=x onerror=alert(1)>", step_s=0.005)) as server:
        open_page(browser, server, "evaluate")
        browser.wait("document.querySelectorAll('#suite option').length >= 2")
        options = texts(browser, "#suite option")
        assert any(option.startswith("factory") for option in options)
        assert not any(option.startswith("code") for option in options)
        browser.choose("#suite", "factory")
        browser.choose("#limit", "20")
        browser.click("#evaluate-start")
        browser.wait("document.querySelector('#evaluate-progress progress').value > 0")
        assert browser.run("return document.querySelector('#evaluate-start').disabled")
        assert "of 20" in browser.text("#evaluate-progress")
        browser.click("#evaluate-cancel")
        browser.wait("document.querySelector('#result-summary').innerText.includes('cancelled')")
        assert browser.run("return document.querySelector('#evaluate-progress').hidden")
        assert count(browser, "#cases img") == 0
        assert "<img src=x" in browser.run("return document.querySelector('#cases').textContent")


def test_it_fits_a_phone(browser: Browser, tmp_path: Path) -> None:
    browser.resize(360, 640)
    with evaluating(tmp_path, says("CHECK")) as server:
        ended(server, start(server, limit=5)["id"])
        open_page(browser, server, "evaluate")
        browser.wait("document.querySelectorAll('#runs tr').length === 1")
        browser.click("#runs button")
        browser.wait("document.querySelectorAll('#cases tr').length === 5")
        assert fits(browser, 360, "evaluate")
