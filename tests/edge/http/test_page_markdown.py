"""What the page makes of Markdown: elements of a short list, quickly, whatever the text."""

from __future__ import annotations

import pytest

from tests.browser import Browser
from tests.edge.http.page import MARKS, open_page
from tests.serving import Served

pytestmark = MARKS
LINK = 'target="_blank" rel="noopener noreferrer"'


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a *b* **c** ~~f~~ `g`", "<p>a <em>b</em> <strong>c</strong> <s>f</s> <code>g</code></p>"),
        ("2 * 3 * 4, snake_case_name, a__b__c", "<p>2 * 3 * 4, snake_case_name, a__b__c</p>"),
        ("one\ntwo\n\nthree", "<p>one<br>two</p>|<p>three</p>"),
        ("## H ##\ntext", "<h2>H</h2>|<p>text</p>"),
        ("- a\n- b\n  - c\n- d", "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>"),
        ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
        ("> a\n> > b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"),
        ("\\*a\\* \\<", "<p>*a* &lt;</p>"),
        ("\\[ x_1 \\] \\(y\\)", "<p>\\[ x_1 \\] \\(y\\)</p>"),
        ("---", "<hr>"),
        ("*unfinished", "<p>*unfinished</p>"),
        ("<b>x</b> &lt;", "<p>&lt;b&gt;x&lt;/b&gt; &lt;</p>"),
        ("<div onclick=x>\n\ny", "<p>&lt;div onclick=x&gt;</p>|<p>y</p>"),
        ("| a | b |\n|---|--:|\n| 1 | `2` |",
         ('<div class="table" tabindex="0"><table><thead><tr><th>a</th><th class="right">b</th></tr></thead>'
          '<tbody><tr><td>1</td><td class="right"><code>2</code></td></tr></tbody></table></div>')),
        ("[x](https://e.org/a_(b)) https://e.org/c.",
         (f'<p><a href="https://e.org/a_(b)" {LINK}>x</a> '
          f'<a href="https://e.org/c" {LINK}>https://e.org/c</a>.</p>')),
        ("[x](/v1/models) [y](ftp://e.org)", "<p><span>x</span> <span>y</span></p>"),
        ("![a cat](https://e.org/cat.png)", f'<p><a href="https://e.org/cat.png" {LINK}>a cat</a></p>'),
        ("www.example.org", "<p>www.example.org</p>"),
    ],
)  # fmt: skip
def test_markdown(server: Served, browser: Browser, source: str, expected: str) -> None:
    assert _render(browser, server, source) == expected


def test_a_growing_text_keeps_its_finished_blocks_and_ends_as_if_it_had_come_at_once(
    server: Served, browser: Browser
) -> None:
    source = "# T\n\nA *b*\n\n- c\n- d\n\n```python\nx = 1\n\ny = 2\n```\n\n| a |\n|---|\n| 1 |\n\n> q\n\nend"
    _open(browser, server)
    pieces, whole, kept = browser.run(
        "return import('/static/js/markdown/markdown.js').then(({ MarkdownView }) => {"
        "  const boxes = [document.createElement('div'), document.createElement('div')];"
        "  const [growing, once] = boxes.map((box) => new MarkdownView(box)); let kept = true, first = null;"
        "  for (let n = 1; n <= arguments[0].length; n += 1) {"
        "    growing.show(arguments[0].slice(0, n));"
        "    if (n > 6) { first ??= boxes[0].firstChild; kept &&= first === boxes[0].firstChild; }"
        "  }"
        "  once.show(arguments[0]); return [...boxes.map((box) => box.innerHTML), kept]; })",
        source,
    )
    assert pieces == whole
    assert "hl-number" in whole
    assert kept


def test_markdown_stays_quick_on_odd_text(server: Served, browser: Browser) -> None:
    _open(browser, server)
    for source in (
        "> " * 5000 + "x",
        "- " * 5000,
        "*" * 20000,
        "**a " * 5000,
        "[" * 20000,
        "`" * 9999,
        "|" * 9999,
        "_a" * 9999,
        "![](" * 5000,
        "<!--" * 5000,
        "a\n" * 10000,
        "```python\n" + "'''" * 5000,
        "```c\n" + "/*" * 5000,
        "x" * 300_000,
    ):
        milliseconds = browser.run(
            "const start = performance.now();"
            "return import('/static/js/markdown/markdown.js').then(({ MarkdownView }) => {"
            "  new MarkdownView(document.createElement('div')).show(arguments[0]);"
            "  return performance.now() - start; })",
            source,
        )
        assert milliseconds < 1500, source[:10]


def _open(browser: Browser, server: Served) -> None:
    if browser.run("return location.origin") != server.url:
        open_page(browser, server)


def _render(browser: Browser, server: Served, source: str) -> str:
    _open(browser, server)
    return str(
        browser.run(
            "return import('/static/js/markdown/markdown.js').then(({ MarkdownView }) => {"
            "  const box = document.createElement('div'); new MarkdownView(box).show(arguments[0]);"
            "  return [...box.children].map((block) => block.innerHTML).join('|'); })",
            source,
        )
    )
