"""The page's files: complete, light, licensed, readable in the light and in the dark, and nothing of them inline."""

from __future__ import annotations

import hashlib
import itertools
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from edge.http.routes.information import STATIC

ROOT = Path(__file__).parents[3]
VENDOR = STATIC / "vendor"
LANGUAGES = ("en", "de", "zh")
MAX_BYTES = 400_000
TEXT, LARGE = 4.5, 3.0
"""Contrasts that WCAG 2.2 wants for text (1.4.3) and for what controls are recognised by (1.4.11)."""
COMPUTED = re.compile(r"(status|chart|fact|slot|bundle|confirm|state|step|mqtt|limit|throttle)_\w+")
"""Keys that are put together: `t(`fact_${name}`)`."""


def own_files(pattern: str) -> list[Path]:
    return [path for path in STATIC.rglob(pattern) if VENDOR not in path.parents]


def strings(language: str) -> dict[str, str]:
    text = (STATIC / "js" / "strings" / f"{language}.js").read_text(encoding="utf-8")
    found = re.findall(r'^  (\w+): "(.*)",$', text, re.MULTILINE)
    assert len(found) == len(dict(found)) == text.count(': "')
    return dict(found)


def test_nothing_is_inline_and_nothing_is_made_from_text() -> None:
    for path in [*own_files("*.js"), *own_files("*.css"), *own_files("*.svg"), STATIC / "index.html"]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser", text
        )
        assert not re.search(r"""(src|href|url\(|import|fetch\()\s*[=(]?\s*["']?(https?:)?//""", text), path
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]* src=)|<style|\son\w+=|style=", page)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_has_every_text(language: str) -> None:
    english, own = strings("en"), strings(language)
    assert list(own) == list(english)
    for key, text in english.items():
        assert set(re.findall(r"\{\w+\}", own[key])) == set(re.findall(r"\{\w+\}", text)), key
        assert own[key].strip() == own[key] != ""
    if language != "en":
        same = [key for key, text in english.items() if text == own[key]]
        assert len(same) < 35, same
    if language == "zh":
        assert [key for key, text in own.items() if not re.search(r"[\u4e00-\u9fff]", text)] == [
            "ofTotal",
            "operation",
            "evaluating",
        ]


def test_every_text_of_the_page_has_a_string_and_every_string_is_used() -> None:
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    scripts = "".join(path.read_text(encoding="utf-8") for path in own_files("*.js") if path.parent.name != "strings")
    in_page = set(re.findall(r'data-t[\w-]*="(\w+)"', page))
    asked_for = set(re.findall(r'\b(?:t|button)\("(\w+)"', scripts))
    defined = set(strings("en"))
    assert in_page | asked_for <= defined
    in_scripts = set(re.findall(r'"(\w+)"', scripts))
    assert {key for key in defined - in_page - in_scripts if not COMPUTED.fullmatch(key)} == set()


def test_facts_and_charts_have_names() -> None:
    english = strings("en")
    for path in (STATIC / "js" / "device").glob("*.js"):
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r'\[\["?(\w+)"?, |^    \["(\w+)", ', text, re.MULTILINE):
            assert f"fact_{''.join(name)}" in english
        for name in re.findall(r'\{ name: "(\w+)", unit', text):
            assert f"chart_{name}" in english


PAIRS = [
    *itertools.product(("text", "faint", "accent", "danger", "ok", "warn"), ("page", "surface"), (TEXT,)),
    *itertools.product(("text", "faint", "accent"), ("sunken",), (TEXT,)),
    *itertools.product(("text", "danger"), ("danger-surface",), (TEXT,)),
    *itertools.product(
        [f"code-{name}" for name in ("keyword", "string", "number", "name", "comment")], ["sunken"], [TEXT]
    ),
    ("accent-text", "accent", TEXT),
    *itertools.product(("edge", "accent"), ("page", "surface"), (LARGE,)),
]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast(theme: str) -> None:
    light, dark = _colours("colours.css"), _colours("dark.css")
    assert set(light) == set(dark)
    colours = light if theme == "light" else dark
    weak = {
        f"{one} on {other}": round(ratio, 2)
        for one, other, least in PAIRS
        if (ratio := _contrast(colours[one], colours[other])) < least
    }
    assert weak == {}


def test_colours_stand_in_one_place() -> None:
    for path in own_files("*.css"):
        if path.name not in {"colours.css", "dark.css"}:
            text = re.sub(r"rgb\(0 0 0 / 45%\)", "", path.read_text(encoding="utf-8"))  # behind dialogs
            assert not re.search(r"#[0-9a-f]{3,8}\b(?!-)|rgb\(|hsl\(", text), path
            used = set(re.findall(r"var\(--([\w-]+)\)", text)) - {"radius", "mono", "column"}
            assert used <= set(_colours("colours.css"))


def test_vendored_files_are_those_that_are_recorded() -> None:
    table = (VENDOR / "README.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (\S+\.(?:js|css)) \| (\S+) \| (\S+) \| (\S+) \| \S+ \| ([0-9a-f]{64}) \|$", table, re.MULTILINE
    )
    files = {path.relative_to(VENDOR).as_posix() for path in VENDOR.rglob("*.*") if path.suffix in {".js", ".css"}}
    assert {found[0] for found in rows} == files
    licences = (VENDOR / "LICENCES.txt").read_text(encoding="utf-8")
    for name, package, version, licence, digest in rows:
        content = (VENDOR / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest, name
        assert re.fullmatch(r"\d+\.\d+\.\d+", version)
        assert licence in {"MIT", "BSD-3-Clause"}
        assert package.removeprefix("@").split("/")[0].rstrip("js").rstrip(".").lower() in licences.lower()


def test_the_page_is_light() -> None:
    assert sum(path.stat().st_size for path in STATIC.rglob("*.*") if path.is_file()) < MAX_BYTES


def test_the_wheel_contains_the_page(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {path.relative_to(ROOT).as_posix() for path in STATIC.rglob("*") if path.is_file()}
    assert wanted
    assert wanted <= packed


def _colours(name: str) -> dict[str, str]:
    text = (STATIC / "css" / name).read_text(encoding="utf-8")
    return dict(re.findall(r"--([\w-]+): ([^;]+);", text))


def _contrast(one: str, other: str) -> float:
    """https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio"""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
