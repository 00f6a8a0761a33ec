"""The web page in a real browser."""

import re
from collections.abc import Callable, Iterator

import pytest

from edge.http.routes.information import STATIC
from tests.browser import ENTER, ESCAPE, MISSING, Browser, chromium
from tests.fakes import FakeEngine, last_user_message
from tests.serving import Served, wait_for

pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(MISSING), reason=MISSING)]
Serve = Callable[..., Served]

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
"""


@pytest.fixture(scope="module")
def shared_browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def browser(shared_browser: Browser) -> Iterator[Browser]:
    """The browser with a desktop's window; fails the test if the page logged an error."""
    shared_browser.resize(1000, 760)
    shared_browser.console()
    yield shared_browser
    assert shared_browser.console() == []


def test_a_conversation(serve: Serve, browser: Browser) -> None:
    prompts: list[str] = []

    def reply(prompt: str) -> str:
        prompts.append(prompt)
        return f"**Echo** of {last_user_message(prompt)}"

    server = serve(FakeEngine(reply, prefill_chunk=4096))
    _open(browser, server)
    _ask(browser, "first")
    assert browser.text(".turn.assistant .markdown") == "Echo of first"
    assert browser.text(".turn.assistant strong") == "Echo"
    note = browser.text(".turn.assistant .note")
    assert re.fullmatch(r"[\d.]+ tokens/s · first token after \d\.\d\d s · 18 tokens", note.replace("\n", " "))
    browser.type("#prompt", "two\ue008\ue007\ue008lines")
    browser.press(ENTER)
    _finished(browser)
    # The model has seen the whole conversation, in Markdown's source form.
    assert prompts[-1].count("<|im_start|>") == 4
    assert "**Echo** of first<|im_end|>" in prompts[-1]
    assert browser.text(".turn.user:nth-of-type(3)") == "two\nlines"
    assert browser.run("return document.activeElement.id") == "prompt"


def test_stopping_ends_the_generation(serve: Serve, browser: Browser) -> None:
    server = serve(FakeEngine(reply=lambda _: "word " * 700, step_s=0.005))
    for stop in (lambda: browser.click("#stop"), lambda: browser.press(ESCAPE)):
        _open(browser, server)
        browser.type("#prompt", "go" + ENTER)
        browser.wait("document.querySelector('.turn.assistant .markdown').innerText.length > 20")
        stop()
        _finished(browser)
        wait_for(lambda: server.service.stats().num_running == 0, 1)
        assert browser.text(".turn.assistant .note") == "Stopped"


def test_a_new_chat_forgets(serve: Serve, browser: Browser) -> None:
    prompts: list[str] = []
    server = serve(FakeEngine(reply=lambda prompt: prompts.append(prompt) or "ok", prefill_chunk=4096))
    _open(browser, server)
    _ask(browser, "secret")
    browser.click("#new-chat")
    assert browser.run("return document.querySelectorAll('.turn').length") == 0
    _ask(browser, "hello")
    assert "secret" not in prompts[-1]


def test_settings_reach_the_model_and_survive_a_reload(serve: Serve, browser: Browser) -> None:
    prompts: list[str] = []
    server = serve(FakeEngine(reply=lambda prompt: prompts.append(prompt) or "x" * 50, prefill_chunk=4096))
    _open(browser, server)
    browser.click("#open-settings")
    browser.type("#system", "Be brief.")
    browser.type("#max-tokens", "7")
    browser.type("#temperature", "0.5" + ENTER)
    browser.wait("!document.querySelector('#settings').open")
    browser.open(server.url)
    _ask(browser, "hi")
    assert "system\nBe brief.<|im_end|>" in prompts[-1]
    assert browser.text(".turn.assistant .markdown") == "x" * 7
    assert "Cut off at the token limit" in browser.text(".turn.assistant .note")


def test_a_hostile_answer_stays_text(serve: Serve, browser: Browser) -> None:
    server = serve(FakeEngine(reply=lambda _: HOSTILE))
    _open(browser, server)
    _ask(browser, "<img src=x onerror='window.hacked = 13'>")
    assert browser.run("return window.hacked") is None
    inside = "document.querySelector('#turns')"
    for tag in ("script", "img", "svg", "iframe", "style", "[onerror]", "[onmouseover]"):
        assert browser.run(f"return {inside}.querySelectorAll(arguments[0]).length", tag) == 0
    links = browser.run(f"return [...{inside}.querySelectorAll('a')].map((link) => link.href)")
    assert all(link.startswith(("http://", "https://")) for link in links)
    text = browser.text("#turns")
    for piece in ("<script>window.hacked = 1</script>", "[a](javascript:window.hacked=4)", "onerror=window.hacked=12"):
        assert piece in text
    # The page loads nothing from elsewhere.
    loaded = browser.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert all(name.startswith(server.url) for name in loaded)


def test_code_can_be_copied(serve: Serve, browser: Browser) -> None:
    server = serve(FakeEngine(reply=lambda _: "```python\nx = '<b>'\n```"))
    browser.grant("clipboardReadWrite", "clipboardSanitizedWrite")
    _open(browser, server)
    _ask(browser, "code")
    assert browser.text(".code figcaption span") == "python"
    browser.click("[data-copy]")
    browser.wait("document.querySelector('[data-copy]').innerText === 'Copied'")
    assert browser.run("return navigator.clipboard.readText()") == "x = '<b>'"


def test_reasoning_is_folded_away(serve: Serve, browser: Browser) -> None:
    server = serve(FakeEngine(reply=lambda _: "<think>\nhm <b>\n</think>\n\n42"))
    _open(browser, server)
    _ask(browser, "?")
    assert browser.text(".turn.assistant .markdown") == "42"
    assert browser.run("return document.querySelector('.reasoning div').textContent") == "hm <b>"


def test_an_error_shows_its_hint_and_can_be_retried(serve: Serve, browser: Browser) -> None:
    failures = iter([True])

    def reply(_: str) -> str:
        if next(failures, False):
            raise RuntimeError("broken")
        return "fine"

    server = serve(FakeEngine(reply))
    _open(browser, server)
    _ask(browser, "hi")
    problem = browser.text(".problem")
    assert "the engine failed on this request" in problem
    assert "try again" in problem
    browser.click(".problem button")
    browser.wait("document.querySelector('.turn.assistant .markdown')?.innerText === 'fine'")
    assert browser.run("return document.querySelectorAll('.problem').length") == 0


def test_a_refusal_shows_its_hint(serve: Serve, browser: Browser) -> None:
    server = serve(FakeEngine(context_length=100))
    _open(browser, server)
    _ask(browser, "x" * 200)
    assert "the context holds 100" in browser.text(".problem")
    assert "shorten the prompt" in browser.text(".problem")
    # The browser itself logs each 4xx; the page has nothing to add.
    (logged,) = browser.console()
    assert "400 (Bad Request)" in logged


def test_the_status_line_follows_the_server(serve: Serve, browser: Browser) -> None:
    server = serve(FakeEngine(slots=1))
    server.engine.gate.clear()
    with server.asking(), server.asking():
        wait_for(lambda: server.service.stats().num_waiting == 1)
        _open(browser, server)
        browser.wait("document.querySelector('#status').innerText.includes('1 of 1 running · 1 waiting')")
        browser.type("#prompt", "me too" + ENTER)
        browser.wait("document.querySelector('.turn.assistant .note').innerText.startsWith('1 ahead of you')")
        server.engine.gate.set()
        _finished(browser)
    browser.wait("document.querySelector('#status').innerText === 'fake-0.1b · ready'")
    assert browser.run("return document.querySelector('#status').dataset.state") == "ok"


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone(serve: Serve, browser: Browser, *, dark: bool) -> None:
    wide = "| " + " | ".join(f"column {i}" for i in range(12)) + " |"
    text = f"{'long' * 40}\n\n{wide}\n{'|---' * 12}|\n{wide}\n\n```\n{'code ' * 60}\n```\n"
    server = serve(FakeEngine(reply=lambda _: text))
    browser.resize(360, 640, dark=dark)
    _open(browser, server)
    assert browser.run("return document.documentElement.scrollWidth") == 360
    _ask(browser, "y" * 120)
    assert browser.run("return document.documentElement.scrollWidth") == 360
    for selector in ("#prompt", "#send", "#new-chat", "#open-settings"):
        box = browser.run("return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()", selector)
        assert box["left"] >= 0
        assert box["right"] <= 360
        assert box["bottom"] <= 640
        assert box["height"] >= 32
    browser.click("#open-settings")
    box = browser.run("return document.querySelector('#settings').getBoundingClientRect().toJSON()")
    assert box["left"] >= 0
    assert box["right"] <= 360
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(19, 22, 21)") == dark


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a *b* **c** ~~f~~ `g`", "<p>a <em>b</em> <strong>c</strong> <s>f</s> <code>g</code></p>"),
        ("_d_ __e__", "<p><em>d</em> <strong>e</strong></p>"),
        ("2 * 3 * 4, snake_case_name, a__b__c", "<p>2 * 3 * 4, snake_case_name, a__b__c</p>"),
        ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
        ("## H ##\ntext", "<h2>H</h2><p>text</p>"),
        ("- a\n- b\n  - c\n- d", "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>"),
        ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
        ("1. a\n\n   more\n2. b", '<ol start="1"><li>a<p>more</p></li><li>b</li></ol>'),
        ("> a\n> > b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"),
        ("\\*a\\* \\<", "<p>*a* &lt;</p>"),
        ("\\[ x \\]", "<p>\\[ x \\]</p>"),
        ("``a`b``", "<p><code>a`b</code></p>"),
        ("---", "<hr>"),
        ("**bold `code*` end**", "<p><strong>bold <code>code*</code> end</strong></p>"),
        ("*unfinished", "<p>*unfinished</p>"),
        ("| a | b |\n|---|---|\n| 1 | `2` |",
         ('<div class="table" tabindex="0"><table><thead><tr><th>a</th><th>b</th></tr></thead>'
          "<tbody><tr><td>1</td><td><code>2</code></td></tr></tbody></table></div>")),
        ("a | b", "<p>a | b</p>"),
        ("[x](https://e.org/a_(b)) https://e.org/c.",
         ('<p><a href="https://e.org/a_(b)" target="_blank" rel="noopener noreferrer">x</a> '
          '<a href="https://e.org/c" target="_blank" rel="noopener noreferrer">https://e.org/c</a>.</p>')),
    ],
)  # fmt: skip
def test_markdown(server: Served, browser: Browser, source: str, expected: str) -> None:
    browser.open(server.url)
    assert _render(browser, source) == expected


def test_markdown_stays_quick_on_odd_text(server: Served, browser: Browser) -> None:
    browser.open(server.url)
    for source in (
        "> " * 5000 + "x",
        "- " * 5000,
        "*" * 20000,
        "**a " * 5000,
        "[" * 20000,
        "`" * 9999,
        "|" * 9999,
        "_a" * 9999,
    ):
        milliseconds = browser.run(
            "const start = performance.now();"
            "return import('/static/js/markdown.js').then((markdown) => {"
            "  markdown.renderMarkdown(arguments[0]); return performance.now() - start; })",
            source,
        )
        assert milliseconds < 1500, source[:10]


def test_the_page_has_nothing_inline_and_nothing_foreign() -> None:
    for path in STATIC.rglob("*.*"):
        text = path.read_text(encoding="utf-8")
        assert "innerHTML" not in text
        assert not re.search(r"""(src|href)=["'](https?:)?//""", text)
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]* src=)|<style|\son\w+=|style=", page)


def test_every_text_of_the_page_has_a_string() -> None:
    strings = (STATIC / "js" / "strings.js").read_text(encoding="utf-8")
    defined = set(re.findall(r"^  (\w+): \"", strings, re.MULTILINE))
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    used = set(re.findall(r'data-t[\w-]*="(\w+)"', page))
    for path in (STATIC / "js").glob("*.js"):
        used |= set(re.findall(r'\bt\("(\w+)"', path.read_text(encoding="utf-8")))
    assert used <= defined
    # The rest are keys that are computed: states of the server and places in the queue.
    assert defined - used <= {"draining", "stalled", "degraded", "ahead", "next", "connecting"}


def _open(browser: Browser, server: Served) -> None:
    browser.open(server.url)
    browser.wait("document.querySelector('#status').dataset.state !== 'connecting'")


def _ask(browser: Browser, text: str) -> None:
    browser.type("#prompt", text + ENTER)
    browser.wait("document.querySelector('.turn.assistant') !== null")
    _finished(browser)


def _finished(browser: Browser) -> None:
    browser.wait("document.querySelector('#stop').hidden")


def _render(browser: Browser, source: str) -> str:
    return str(
        browser.run(
            "return import('/static/js/markdown.js').then((markdown) => {"
            "  const box = document.createElement('div');"
            "  box.append(markdown.renderMarkdown(arguments[0])); return box.innerHTML; })",
            source,
        )
    )
