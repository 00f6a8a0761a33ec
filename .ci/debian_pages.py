"""Pages that Debian wants in a package: ``debian_pages.py SITE DOC MAN``.

Writes ``copyright`` (DEP-5, from the metadata of the wheels in SITE) and ``changelog.gz`` (from CHANGELOG.md) to DOC,
and ``man1/qwedge.1.gz`` (from the help of the command line) to MAN. Dates come from ``SOURCE_DATE_EPOCH``.
"""

from __future__ import annotations

import gzip
import os
import re
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from email.message import Message
from email.parser import HeaderParser
from email.utils import format_datetime
from pathlib import Path
from typing import Any, Final

from typer.main import get_command

from edge.cli import build_app

ROOT: Final = Path(__file__).resolve().parent.parent
WIDTH: Final = 78
MAX_INLINE: Final = 6000
"""Characters of a licence's text that is repeated; a longer one is named by its file."""
NOTICE: Final = re.compile(r"^\W*(Copyright (?:\(c\)|©|\d).*?)\s*$", re.IGNORECASE | re.MULTILINE)
CLASSIFIER: Final = "License :: OSI Approved :: "


def main(site: str, doc: str, man: str) -> None:
    """Write all of them."""
    when = datetime.fromtimestamp(int(os.environ["SOURCE_DATE_EPOCH"]), UTC)
    Path(doc, "copyright").write_text(copyright_page(Path(site)), encoding="utf-8")
    _compress(Path(doc, "changelog.gz"), changelog((ROOT / "CHANGELOG.md").read_text(), _version(), when))
    _compress(Path(man, "man1/qwedge.1.gz"), man_page(get_command(build_app()), when))


def _version() -> str:
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def _compress(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


# --- copyright ----------


def copyright_page(site: Path) -> str:
    """A stanza for qwedge and one for each wheel, with the licence that its metadata names."""
    head = "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\nUpstream-Name: qwedge\n"
    own = "\n".join(["Files: *", "Copyright: the authors of qwedge", "License: Apache-2.0", *_common("Apache-2.0")])
    wheels = [_wheel(site, info) for info in sorted(site.glob("*.dist-info")) if not info.name.startswith("qwedge-")]
    return "\n\n".join([head.rstrip(), own, *wheels]) + "\n"


def _wheel(site: Path, info: Path) -> str:
    metadata = HeaderParser().parsestr((info / "METADATA").read_text(encoding="utf-8"))
    # The pattern of a path is from the root of the package's sources, which here is that of its files.
    folder = str(site)[str(site).index("usr/lib/") :]
    files = sorted({f"{folder}/{name}" for name in _top_level(info)})
    texts = [path for path in sorted(info.rglob("*")) if path.is_file() and _is_licence(path)]
    notices = _notices(texts) or [_author(metadata)]
    return "\n".join(
        [
            "Files: " + "\n ".join(files),
            "Copyright: " + "\n ".join(notices),
            f"License: {_licence(metadata)}",
            *_body(texts, site, folder),
            f"Comment: {metadata['Name']} {metadata['Version']}, a wheel from the Python Package Index.",
        ]
    )


def _top_level(info: Path) -> Iterator[str]:
    """Names in the site folder, as patterns; of a namespace that several wheels share, what is below it."""
    for line in (info / "RECORD").read_text(encoding="utf-8").splitlines():
        parts = line.removeprefix('"').split(",", 1)[0].removesuffix('"').split("/")
        depth = 2 if parts[0] in {"google", "opentelemetry"} else 1
        if parts[0] != ".." and "__pycache__" not in parts:
            yield "/".join([*parts[:depth], *(["*"] if len(parts) > depth else [])]).replace(" ", "?")


def _is_licence(path: Path) -> bool:
    return re.match(r"(?i)(licen[cs]e|copying|notice|edl-|epl-)", path.name) is not None


def _notices(texts: list[Path]) -> list[str]:
    found = (notice for path in texts for notice in NOTICE.findall(path.read_text(encoding="utf-8", errors="replace")))
    return list(dict.fromkeys(" ".join(notice.split()) for notice in found if "[yyyy]" not in notice))


def _author(metadata: Message) -> str:
    named = (metadata[key] for key in ("Author", "Author-email", "Maintainer-email"))
    return next((str(name) for name in named if name), f"the authors of {metadata['Name']}")


def _licence(metadata: Message) -> str:
    """The licence's short name: the SPDX expression, or what older metadata has."""
    if metadata["License-Expression"]:
        return str(metadata["License-Expression"]).replace(" AND ", " and ").replace(" OR ", " or ")
    stated = str(metadata["License"] or "")
    if not stated or "\n" in stated:
        classes = (str(value) for value in metadata.get_all("Classifier", []))
        stated = next((value.removeprefix(CLASSIFIER) for value in classes if value.startswith(CLASSIFIER)), "unknown")
    return stated.replace(" ", "-")


def _body(texts: list[Path], site: Path, folder: str) -> list[str]:
    """The licence's text, indented; a long one is where the wheel has it."""
    if not texts:
        return [" The wheel has no text of it; see its project."]
    lines = []
    for path in texts:
        text = path.read_text(encoding="utf-8", errors="replace").strip()
        where = f"/{folder}/{path.relative_to(site)}"
        lines += _indented(text) if len(text) <= MAX_INLINE else [f" The text is in this package: {where}"]
        lines.append(" .")
    return lines[:-1]


def _indented(text: str) -> list[str]:
    return [f" {line.rstrip()}" if line.strip() else " ." for line in text.expandtabs().splitlines()]


def _common(name: str) -> list[str]:
    return [f" On Debian systems the text is in /usr/share/common-licenses/{name}"]


# --- changelog ----------


def changelog(text: str, version: str, when: datetime) -> str:
    """Debian's form of the sections of CHANGELOG.md; what is not released yet is this version's."""
    parts = re.split(r"^## \[(.+?)\](?: - (\S+))?$", text, flags=re.MULTILINE)[1:]
    entries = []
    for name, date, body in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        if body.strip():
            time = datetime.fromisoformat(date).replace(tzinfo=UTC) if date else when
            entries.append(_release(version if name == "Unreleased" else name, body, time))
    return "\n".join(entries)


def _release(version: str, body: str, when: datetime) -> str:
    lines = [f"qwedge ({version}) unstable; urgency=medium", ""]
    for group in re.split(r"^### ", body, flags=re.MULTILINE)[1:]:
        title, _, items = group.partition("\n")
        for item in re.split(r"^- ", items, flags=re.MULTILINE)[1:]:
            lines += textwrap.wrap(
                f"{title}: {' '.join(item.split())}", WIDTH, initial_indent="  * ", subsequent_indent="    "
            )
    return "\n".join([*lines, "", f" -- {_maintainer()}  {format_datetime(when)}", ""])


def _maintainer() -> str:
    return f"{os.environ.get('DEBFULLNAME', 'qwedge')} <{os.environ.get('DEBEMAIL', 'qwedge@example.org')}>"


# --- man page ----------


def man_page(program: Any, when: datetime) -> str:
    """qwedge(1): the help of every command, each option with its meaning."""
    lines = [
        f'.TH QWEDGE 1 "{when:%Y-%m-%d}" "qwedge {_version()}" "User commands"',
        ".SH NAME",
        r"qwedge \- language models on devices without internet",
        ".SH SYNOPSIS",
        r".B qwedge",
        r".RI [ OPTIONS ] " + r"\ COMMAND\ [ ARGUMENTS ]",
        ".SH DESCRIPTION",
        *_paragraphs(program.help),
        r"Here, as root or with \fBsudo \-u qwedge qwedge\fR, the state is that of the service, in /var/lib/qwedge.",
        ".SH OPTIONS",
        *_options(program),
        ".SH COMMANDS",
        *(line for path, command in _commands(program, []) for line in _command(path, command)),
        '.SH "EXIT STATUS"',
        *_statuses(),
        ".SH FILES",
        *_entry("/etc/qwedge/edge.toml", "settings of the service"),
        *_entry("/etc/qwedge/credentials, /etc/qwedge/trusted", "secrets; keys that bundles are checked with"),
        *_entry("/var/lib/qwedge", "models and state"),
        *_entry("/usr/share/doc/qwedge", "the manual"),
        '.SH "SEE ALSO"',
        ".BR qwedge\\-board (8)",
    ]
    return "\n".join(lines) + "\n"


def _commands(group: Any, path: list[str]) -> Iterator[tuple[list[str], Any]]:
    """Every command with its words, a group before its members."""
    for name, command in sorted(group.commands.items()):
        yield [*path, name], command
        if hasattr(command, "commands"):
            yield from _commands(command, [*path, name])


def _command(path: list[str], command: Any) -> list[str]:
    arguments = [
        str(parameter.metavar or parameter.name.upper()) for parameter in command.params if not _flags(parameter)
    ]
    title = " ".join(["qwedge", *path, *arguments])
    return [f'.SS "{_escape(title)}"', *_paragraphs(command.help), *_options(command)]


def _options(command: Any) -> list[str]:
    rows = [(_flags(parameter), parameter.help or "") for parameter in command.params if _flags(parameter)]
    return [line for flags, text in rows for line in _entry(flags, text)]


def _flags(parameter: Any) -> str:
    """What is typed for an option; empty for an argument."""
    names = [name for name in [*parameter.opts, *parameter.secondary_opts] if name.startswith("-")]
    metavar = (
        "" if not names or getattr(parameter, "is_flag", False) else f" {parameter.metavar or parameter.name.upper()}"
    )
    return f"{', '.join(names)}{metavar}"


def _statuses() -> list[str]:
    """The table of the documentation."""
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", (ROOT / "docs/cli.md").read_text(), re.MULTILINE)
    return [line for status, meaning in rows for line in _entry(status, meaning)]


def _entry(term: str, text: str) -> list[str]:
    return [".TP", f".B {_escape(term)}", _text(text)]


def _paragraphs(text: str | None) -> list[str]:
    return [line for paragraph in (text or "").split("\n\n") for line in (".PP", _text(paragraph))]


def _text(text: str) -> str:
    """One line of running text, which no macro begins."""
    line = _escape(" ".join(text.replace("\b", "").split()))
    return f"\\&{line}" if line.startswith((".", "'")) else line


def _escape(text: str) -> str:
    return text.replace("\\", "\\e").replace("-", "\\-")


if __name__ == "__main__":
    main(*sys.argv[1:])
