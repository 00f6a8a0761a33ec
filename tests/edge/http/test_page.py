"""The page's chat in a real browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from edge.http.access import Access
from edge.http.keys import Key, KeyRing, add_key, hash_key, new_key
from edge.settings.server import ServerSettings
from tests.browser import ENTER, ESCAPE, SHIFT, TAB, Browser
from tests.edge.http.page import ANSWER, MARKS, Serve, ask, count, finished, fits, open_page, stubbed, texts
from tests.fakes import FakeEngine, last_user_message
from tests.serving import Served, wait_for

pytestmark = MARKS

HOSTILE = """\
<script>window.hacked = 1</script><img src="/x" onerror="window.hacked = 2"><svg onload="window.hacked = 3">

[a](javascript:window.hacked=4) [b](data:text/html,<script>window.hacked=5</script>) ![c](http://evil.example/c.png)
<a href="javascript:window.hacked=6">d</a> [e](java\tscript:window.hacked=7) [f]( https://ok.example/f )

`<b>x</b>` **<iframe src="http://evil.example/"></iframe>** [g](https://ok.example/"onmouseover="window.hacked=8)

```html"><script>window.hacked = 9</script>
</code></pre><script>window.hacked = 10</script>
```

| <script>window.hacked = 11</script> | b |
|---|---|
| <img src=x onerror=window.hacked=12> | <style>*{display:none}</style> |

<math><mtext><table><mglyph><style><img src=x onerror=window.hacked=13></style></mglyph></table></mtext></math>
<svg><a xlink:href="javascript:window.hacked=14"><text>h</text></a><animate onbegin=window.hacked=15></svg>

[i]: javascript:window.hacked=16
[i] <javascript:window.hacked=17> ![j](javascript:window.hacked=18) [k](vbscript:x) [l](file:///etc/passwd)

```json
{"a": "</script><script>window.hacked = 19</script>"}
```
"""


def test_a_conversation(serve: Serve, browser: Browser) -> None:
    prompts: list[str] = []

    def reply(prompt: str) -> str:
        prompts.append(prompt)
        return f"**Echo** of {last_user_message(prompt)}"

    server = serve(FakeEngine(reply, prefill_chunk=4096))
    open_page(browser, server)
    ask(browser, "first")
    assert browser.text(ANSWER) == "Echo of first"
    assert browser.text(".turn.assistant strong") == "Echo"
    figures = browser.text(".turn.assistant .figures")
    assert re.fullmatch(r"[\d.,]+ tokens/s · first token after \d\.\d\d s · 18 tokens", figures)
    browser.type("#prompt", f"two{SHIFT}{ENTER}{SHIFT}lines")
    browser.press(ENTER)
    browser.wait("document.querySelectorAll('.turn.assistant').length === 2")
    finished(browser)
    # The model has seen the whole conversation, in Markdown's source form.
    assert prompts[-1].count("<|im_start|>") == 4
    assert "**Echo** of first<|im_end|>" in prompts[-1]
    assert texts(browser, ".bubble") == ["first", "two\nlines"]
    assert browser.run("return document.activeElement.id") == "prompt"


def test_stopping_ends_the_generation(serve: Serve, browser: Browser) -> None:
    server = serve(FakeEngine(reply=lambda _: "word " * 700, step_s=0.005))
    open_page(browser, server)
    for stop in (lambda: browser.click("#stop"), lambda: browser.press(ESCAPE)):
        browser.click("#new-chat")
        browser.type("#prompt", "go" + ENTER)
        browser.wait(f"document.querySelector('{ANSWER}')?.innerText.length > 20")
        stop()
        finished(browser)
        wait_for(lambda: server.service.stats().num_running == 0)
        assert browser.text(".turn.assistant .figures") == "Stopped"


def test_conversations_survive_a_reload(serve: Serve, browser: Browser) -> None:
    prompts: list[str] = []
    engine = FakeEngine(lambda prompt: prompts.append(prompt) or f"re: {last_user_message(prompt)}", prefill_chunk=4096)
    server = serve(engine)
    open_page(browser, server)
    ask(browser, "apples")
    browser.click("#new-chat")
    assert count(browser, ".turn") == 0
    ask(browser, "pears")
    assert "apples" not in prompts[-1]
    open_page(browser, server)
    assert texts(browser, ".bubble") == ["pears"]
    assert texts(browser, ANSWER) == ["re: pears"]
    assert texts(browser, "#conversations .title") == ["pears", "apples"]
    browser.click("#conversations li:nth-child(2) .title")
    assert texts(browser, ANSWER) == ["re: apples"]
    ask(browser, "more")
    assert prompts[-1].count("apples") == 2
    browser.click("#conversations li:nth-child(1) .rename")
    browser.type("#ask-text", "Fruit" + ENTER)
    browser.wait("document.querySelector('#title').innerText === 'Fruit'")
    browser.click("#conversations li:nth-child(2) .remove")
    assert "pears" in browser.text("#ask-question")
    browser.click("#ask-ok")
    browser.wait("document.querySelectorAll('#conversations li').length === 1")
    open_page(browser, server)
    assert texts(browser, "#conversations .title") == ["Fruit"]
    assert texts(browser, ANSWER) == ["re: apples", "re: more"]


def test_a_reload_in_mid_answer_keeps_the_question(serve: Serve, browser: Browser) -> None:
    server = serve(FakeEngine(reply=lambda _: "word " * 2000, step_s=0.005))
    open_page(browser, server)
    browser.type("#prompt", "tell me" + ENTER)
    browser.wait(f"document.querySelector('{ANSWER}')?.innerText.length > 10")
    open_page(browser, server)
    assert texts(browser, ".bubble") == ["tell me"]
    assert browser.text(".turn.assistant .figures") == "Stopped"
    wait_for(lambda: server.service.stats().num_running == 0)


def test_a_question_can_be_edited_and_an_answer_written_anew(serve: Serve, browser: Browser) -> None:
    prompts: list[str] = []
    server = serve(FakeEngine(lambda prompt: prompts.append(prompt) or f"{len(prompts)}", prefill_chunk=4096))
    open_page(browser, server)
    ask(browser, "one")
    ask(browser, "two")
    browser.click(".turn.assistant:last-child .note button:last-child")
    browser.wait(f"[...document.querySelectorAll('{ANSWER}')].at(-1).innerText === '3'")
    finished(browser)
    assert prompts[2] == prompts[1]
    browser.click(".turn.user .note button:last-child")
    browser.wait("document.activeElement.closest('.editor')")
    browser.press(ESCAPE)
    assert browser.text(".bubble") == "one"
    browser.click(".turn.user .note button:last-child")
    browser.run("document.querySelector('.editor textarea').value = ''")
    browser.type(".editor textarea", "uno" + ENTER)
    browser.wait(f"document.querySelector('{ANSWER}')?.innerText === '4'")
    finished(browser)
    assert texts(browser, ".bubble") == ["uno"]
    assert "two" not in prompts[-1]


def test_settings_reach_the_model_and_survive_a_reload(serve: Serve, browser: Browser) -> None:
    prompts: list[str] = []
    server = serve(FakeEngine(reply=lambda prompt: prompts.append(prompt) or "x" * 50, prefill_chunk=4096))
    open_page(browser, server)
    browser.click("#open-settings")
    browser.type("#system", "Be brief.")
    browser.type("#max_tokens", "7")
    browser.type("#temperature", "0.5" + ENTER)
    browser.wait("!document.querySelector('#settings').open")
    open_page(browser, server)
    ask(browser, "hi")
    assert "system\nBe brief.<|im_end|>" in prompts[-1]
    assert browser.text(ANSWER) == "x" * 7
    assert "Cut off at the token limit" in browser.text(".turn.assistant .figures")


def test_model_and_sampling_are_chosen(serve: Serve, browser: Browser) -> None:
    models = {"data": [{"id": "fake-0.1b"}, {"id": "fake-0.1b:alarms"}]}
    with stubbed(browser, {"GET v1/models": models, "POST v1/chat/completions": None}):
        open_page(browser, serve())
        browser.wait("!document.querySelector('#model-choice').hidden")
        browser.choose("#model", "fake-0.1b:alarms")
        browser.click("#open-settings")
        for field, value in (
            ("top_p", "0.5"),
            ("top_k", "20"),
            ("min_p", "0.05"),
            ("repetition_penalty", "1.1"),
            ("seed", "7"),
        ):
            browser.type(f"#{field}", value)
        browser.run(
            "const e = document.querySelector('#thinking'); e.value = 'off'; e.dispatchEvent(new Event('input'))"
        )
        browser.press(ESCAPE)
        ask(browser, "hi")
        (body,) = browser.run("return window.bodies")
    sent = json.loads(body)
    assert sent["model"] == "fake-0.1b:alarms"
    assert (sent["top_p"], sent["top_k"], sent["min_p"]) == (0.5, 20, 0.05)
    assert (sent["repetition_penalty"], sent["seed"], sent["enable_thinking"]) == (1.1, 7, False)
    assert "ended early" in browser.text(".problem")  # what the stub sends is no stream


def test_answers_follow_a_json_schema(serve: Serve, browser: Browser) -> None:
    server = serve(FakeEngine(reply=lambda _: '{"ok": true}'))
    open_page(browser, server)
    browser.click("#open-settings")
    browser.type("#schema", '{"type": ')
    assert "no JSON" in browser.text("#schema-problem")
    browser.type("#schema", '"object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}')
    assert not browser.run("return document.querySelector('#schema-problem').offsetHeight")
    browser.press(ESCAPE)
    assert "JSON schema" in browser.text("#schema-note")
    browser.run(
        "window.sent = []; const real = fetch;"
        "window.fetch = (path, options) => { if (options?.body) sent.push(options.body); return real(path, options); }"
    )
    ask(browser, "well?")
    (body,) = browser.run("return window.sent")
    assert json.loads(body)["response_format"]["json_schema"]["schema"]["required"] == ["ok"]
    assert json.loads(browser.text(ANSWER)) == {"ok": True}
    browser.click("#drop-schema")
    ask(browser, "and now?")
    assert "response_format" not in json.loads(browser.run("return window.sent")[-1])


def test_a_hostile_answer_stays_text(serve: Serve, browser: Browser) -> None:
    server = serve(FakeEngine(reply=lambda _: f"<think>\n{HOSTILE}\n</think>\n\n{HOSTILE}", context_length=16384))
    open_page(browser, server)
    ask(browser, "<img src=x onerror='window.hacked = 20'>")
    browser.click(".reasoning summary")
    assert browser.run("return window.hacked") is None
    for tag in ("script", "img", "svg", "iframe", "style", "math", "mglyph", "[onerror]", "[onmouseover]", "[style]"):
        assert count(browser, f"#turns {tag}") == 0
    links = browser.run("return [...document.querySelectorAll('#turns a')].map((link) => link.href)")
    assert links
    assert all(link.startswith(("http://", "https://")) for link in links)
    text = browser.text(ANSWER)
    for piece in ("<script>window.hacked = 1</script>", "[a](javascript:window.hacked=4)", "onerror=window.hacked=12"):
        assert piece in text
    assert "window.hacked = 20" in browser.text("#conversations")
    # Nothing was loaded from elsewhere, and no script could make HTML of a text if it wanted to.
    loaded = browser.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert all(name.startswith(server.url) for name in loaded)
    refused = "try { document.body.innerHTML = '<b>'; return 'taken'; } catch (error) { return error.name; }"
    assert browser.run(refused) == "TypeError"
    browser.console()  # the browser tells of what it has just refused


def test_code_is_coloured_and_can_be_copied(serve: Serve, browser: Browser) -> None:
    server = serve(FakeEngine(reply=lambda _: "```python\nx = '<b>'  # no\n```\n```cobol\nMOVE 1\n```"))
    browser.grant("clipboardReadWrite", "clipboardSanitizedWrite")
    open_page(browser, server)
    ask(browser, "code")
    assert texts(browser, ".code figcaption span") == ["python", "cobol"]
    assert texts(browser, ".hl-string") == ["'<b>'"]
    browser.click(".copy-code")
    browser.wait("document.querySelector('.copy-code').innerText === 'Copied'")
    assert browser.run("return navigator.clipboard.readText()") == "x = '<b>'  # no"
    browser.click(".turn.assistant .note button")
    browser.wait("document.querySelector('.turn.assistant .note button').innerText === 'Copied'")
    assert str(browser.run("return navigator.clipboard.readText()")).startswith("```python")


def test_thoughts_are_folded_away(serve: Serve, browser: Browser) -> None:
    server = serve(FakeEngine(reply=lambda _: "<think>\nhm <b>\n</think>\n\n42"))
    open_page(browser, server)
    ask(browser, "?")
    assert browser.text(ANSWER) == "42"
    assert not browser.run("return document.querySelector('.reasoning').open")
    browser.click(".reasoning summary")
    assert browser.text(".reasoning div") == "hm <b>"


def test_energy_is_shown_where_it_is_measured(server: Served, browser: Browser) -> None:
    open_page(browser, server)
    shown = browser.run(
        "return import('/static/js/chat/turns.js').then(({ AnswerTurn }) => new AnswerTurn("
        "{ role: 'assistant', content: 'x', figures: { tokens: 5, energy_j: 12.34 } }, () => {}).node.textContent)"
    )
    assert "5 tokens · 12.3 J" in shown


def test_an_error_shows_its_hint_and_can_be_retried(serve: Serve, browser: Browser) -> None:
    failures = iter([True])

    def reply(_: str) -> str:
        if next(failures, False):
            raise RuntimeError("broken")
        return "fine"

    open_page(browser, serve(FakeEngine(reply)))
    ask(browser, "hi")
    problem = browser.text(".problem")
    assert "the engine failed on this request" in problem
    assert "try again" in problem
    browser.click(".problem button")
    browser.wait(f"document.querySelector('{ANSWER}')?.innerText === 'fine'")
    assert count(browser, ".problem") == 0


def test_a_refusal_shows_its_hint(serve: Serve, browser: Browser) -> None:
    open_page(browser, serve(FakeEngine(context_length=100)))
    ask(browser, "x" * 200)
    assert "the context holds 100" in browser.text(".problem")
    assert "shorten the prompt" in browser.text(".problem")
    # The browser itself logs each 4xx; the page has nothing to add.
    (logged,) = browser.console()
    assert "400 (Bad Request)" in logged


def test_the_status_line_and_the_place_in_the_queue(serve: Serve, browser: Browser) -> None:
    server = serve(FakeEngine(slots=1))
    with server.occupied():
        open_page(browser, server)
        browser.wait("document.querySelector('#status').innerText.includes('1 of 1 running · 1 waiting')")
        browser.type("#prompt", "me too" + ENTER)
        browser.wait("document.querySelector('.turn.assistant .figures')?.innerText.startsWith('1 ahead of you')")
        server.engine.gate.set()
        finished(browser)
    browser.wait("document.querySelector('#status').innerText === 'fake-0.1b · ready'")
    assert browser.run("return document.querySelector('#status').dataset.state") == "ok"


def test_the_language_can_be_changed(serve: Serve, browser: Browser) -> None:
    server = serve()
    open_page(browser, server)
    ask(browser, "hi")
    browser.click("#open-settings")
    for code, send, retry in (("de", "Senden", "Noch einmal"), ("zh", "发送", "重试"), ("en", "Send", "Try again")):
        browser.choose("#language", code)
        browser.wait(
            f"document.documentElement.lang === '{code}' && document.querySelector('#send').innerText === '{send}'"
        )
        assert retry in browser.text(".turn.assistant .note")
        assert "[object" not in browser.text("body")
    browser.choose("#language", "zh")
    open_page(browser, server)
    assert browser.text("#send") == "发送"
    assert "词元/秒" in browser.text(".turn.assistant .figures")


def test_the_theme_follows_the_system_and_the_user(serve: Serve, browser: Browser) -> None:
    server = serve()
    dark, light = "rgb(19, 22, 21)", "rgb(251, 251, 250)"

    def background() -> str:
        return str(browser.run("return getComputedStyle(document.body).backgroundColor"))

    for system, expected in ((True, dark), (False, light)):
        browser.resize(1100, 760, dark=system)
        open_page(browser, server)
        assert background() == expected
    browser.click("#open-settings")
    browser.choose("#theme", "dark")
    browser.wait(f"getComputedStyle(document.body).backgroundColor === '{dark}'")
    open_page(browser, server)
    assert background() == dark


@pytest.mark.parametrize("still", [False, True])
def test_nothing_moves_for_those_who_do_not_want_it(serve: Serve, browser: Browser, *, still: bool) -> None:
    server = serve()
    browser.resize(1100, 760, still=still)
    open_page(browser, server)
    server.engine.gate.clear()
    browser.type("#prompt", "hi" + ENTER)
    browser.wait("document.querySelector('.waiting')")
    moves = "return getComputedStyle(document.querySelector('.waiting'), '::after').animationName"
    assert browser.run(moves) == ("none" if still else "blink")
    server.engine.gate.set()
    finished(browser)


def test_export_and_import(serve: Serve, browser: Browser, tmp_path: Path) -> None:
    browser.download_to(tmp_path)
    server, other = serve(), serve()
    open_page(browser, server)
    ask(browser, "keep me")
    browser.click("#export")
    wait_for(lambda: any(tmp_path.glob("*.json")))
    (file,) = tmp_path.glob("*.json")
    (conversation,) = json.loads(file.read_text(encoding="utf-8"))["conversations"]
    assert [message["role"] for message in conversation["messages"]] == ["user", "assistant"]
    open_page(browser, other)
    assert count(browser, "#conversations li") == 0
    browser.type("#import-file", str(file))
    browser.wait("document.querySelectorAll('#conversations li').length === 1")
    browser.click("#conversations .title")
    assert texts(browser, ANSWER) == ["You said: keep me"]
    for wrong in (
        "{",
        '{"format": "qwedge-conversations", "version": 1, "conversations": [{"messages": [{"role": 1}]}]}',
    ):
        broken = tmp_path / "broken.json"
        broken.write_text(wrong, encoding="utf-8")
        browser.type("#import-file", str(broken))
        browser.wait("document.querySelector('#storage-problem').innerText.includes('holds no conversations')")
    assert count(browser, "#conversations li") == 1


def test_a_key_is_asked_for_once_and_kept_for_the_tab(serve: Serve, browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "http" / "keys.json"
    key = new_key()
    add_key(path, Key(name="hmi", sha256=hash_key(key), scopes=frozenset({"generate", "read"})))
    ring = KeyRing(path)
    ring.load()
    server = serve(app={"access": Access(ring, ServerSettings(), local=False)})
    open_page(browser, server)
    browser.wait("document.querySelector('#key-dialog').open")
    browser.type("#key", "wrong" + ENTER)
    browser.wait("document.querySelector('#key-dialog').open && !document.querySelector('#key-wrong').hidden")
    browser.type("#key", key + ENTER)
    browser.wait("!document.querySelector('#key-dialog').open")
    ask(browser, "hi")
    assert browser.text(ANSWER) == "You said: hi"
    open_page(browser, server)
    ask(browser, "again")
    assert not browser.run("return document.querySelector('#key-dialog').open")
    assert key not in str(browser.run("return JSON.stringify(localStorage)"))
    assert all("401" in line for line in browser.console())


def test_the_page_works_by_keyboard_alone(serve: Serve, browser: Browser) -> None:
    server = serve()
    open_page(browser, server)
    assert browser.run("return document.activeElement.id") == "prompt"
    browser.press(*"hi", ENTER)
    browser.wait("document.querySelectorAll('.turn.assistant').length === 1")
    finished(browser)
    seen = _tab_through(browser, 40)
    assert {"open-settings", "new-chat", "export", "import", "prompt"} <= set(seen)
    assert [name for name in seen if name.startswith("#/")][:3] == ["#/chat", "#/device", "#/evaluate"]
    _tab_to(browser, "open-settings")
    browser.press(ENTER)
    browser.wait("document.querySelector('#settings').open")
    browser.press(ESCAPE)
    browser.wait("!document.querySelector('#settings').open")
    assert browser.run("return document.activeElement.id") == "open-settings"
    _tab_to(browser, "#/evaluate")
    browser.press(ENTER)
    browser.wait("document.querySelector('#evaluate-problem').innerText.includes('runs no evaluations')")
    browser.console()  # this server has no evaluations, which the browser logs as 404


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone(serve: Serve, browser: Browser, *, dark: bool) -> None:
    wide = "| " + " | ".join(f"column {i}" for i in range(12)) + " |"
    text = f"{'long' * 40}\n\n{wide}\n{'|---' * 12}|\n{wide}\n\n```\n{'code ' * 60}\n```\n"
    server = serve(FakeEngine(reply=lambda _: text))
    browser.resize(360, 640, dark=dark)
    open_page(browser, server)
    assert fits(browser, 360, "chat")
    ask(browser, "y" * 120)
    assert fits(browser, 360, "chat")
    for selector in ("#prompt", "#send", "#open-sidebar", "#open-settings"):
        _inside(browser, selector, 360, 640)
    browser.click("#open-sidebar")
    _inside(browser, "#new-chat", 360, 640)
    browser.press(ESCAPE)
    assert browser.run("return document.querySelector('#open-sidebar').getAttribute('aria-expanded')") == "false"
    browser.click("#open-settings")
    box = browser.run("return document.querySelector('#settings').getBoundingClientRect().toJSON()")
    assert box["left"] >= 0
    assert box["right"] <= 360


def _inside(browser: Browser, selector: str, width: int, height: int) -> None:
    box: Any = browser.run("return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()", selector)
    assert box["left"] >= 0
    assert box["right"] <= width
    assert box["bottom"] <= height
    assert box["height"] >= 32


def _tab_through(browser: Browser, times: int) -> list[str]:
    """Names of what has the focus, one after the other."""
    seen = []
    for _ in range(times):
        browser.press(TAB)
        seen.append(_focused(browser))
    return seen


def _tab_to(browser: Browser, name: str) -> None:
    for _ in range(60):
        browser.press(TAB)
        if _focused(browser) == name:
            return
    raise AssertionError(f"{name} cannot be reached")


def _focused(browser: Browser) -> str:
    script = "const e = document.activeElement; return e.id || e.getAttribute('href') || e.className || e.tagName"
    return str(browser.run(script))
