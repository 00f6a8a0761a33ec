"""The command line as its users meet it: processes, exit statuses, two streams."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import typer

import edge.cli
from edge import __version__
from edge.errors import OverloadedError
from tests.command_line import Run, command_runner
from tests.edge.bundles import write_bundle

ROOT = Path(__file__).parents[2]


def start(*args: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a process of its own."""
    line = [sys.executable, "-m", "edge.cli", *args]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def qwedge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return command_runner(monkeypatch, capsys)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def test_version_and_help_go_to_stdout() -> None:
    assert start("--version").stdout == f"qwedge {__version__}\n"
    for args in ((), ("--help",), ("-h",)):
        done = start(*args)
        assert (done.returncode, done.stderr) == (0, "")
        assert "verify" in done.stdout


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (("servve",), "error: no such command 'servve'"),
        (("activate",), "error: missing argument 'NAME'"),
        (("verify", "--jsn", "x"), "error: no such option: --jsn"),
        (("bench", "--repeats", "x"), "error: invalid value for '--repeats': must be a valid integer"),
    ],
)
def test_a_wrong_command_line_is_two_lines_and_status_2(args: tuple[str, ...], error: str, qwedge: Run) -> None:
    done = qwedge(*args)
    first, hint = done.stderr.splitlines()
    assert (done.status, done.stdout) == (2, "")
    assert first.startswith(error)
    assert hint.startswith("hint: see qwedge")


def test_verify_accepts_an_exported_bundle(bundle: Path, qwedge: Run) -> None:
    done = qwedge("verify", str(bundle))
    assert (done.status, done.stderr) == (0, "")
    assert done.stdout.startswith("ok: tiny 1, balanced, 5 files")
    assert json.loads(qwedge("verify", str(bundle), "--json").stdout)["ok"] is True


def test_verify_refuses_a_changed_byte_with_status_5(bundle: Path, qwedge: Run) -> None:
    weights = bundle / "model.onnx.data"
    weights.write_bytes(b"X" + weights.read_bytes()[1:])
    done = qwedge("verify", str(bundle), "--json")
    assert done.status == 5
    assert json.loads(done.stdout)["error"]["code"] == "bundle_invalid"
    assert done.stderr.startswith(f"error: {weights} was changed")
    assert "hint: " in done.stderr


def command_that(action: str) -> typer.Typer:
    """A command line whose only command fails as ``action`` says."""
    app = typer.Typer()
    app.callback()(lambda: None)

    def go() -> None:
        if action == "interrupt":
            raise KeyboardInterrupt
        if action == "overload":
            raise OverloadedError("the queue is full", hint="try again", retry_after_s=1)
        if action == "disk":
            raise OSError(errno.ENOSPC, "No space left on device", "report.json")
        raise RuntimeError("first line\nsecond line")

    app.command("go")(go)
    return app


@pytest.mark.parametrize(
    ("action", "status", "stderr"),
    [
        ("interrupt", 130, ""),
        ("overload", 6, "error: the queue is full\nhint: try again\n"),
        ("disk", 1, "error: report.json: No space left on device\nhint: check disk"),
        ("fault", 70, "internal error: RuntimeError: first line second line\nhint: this is a fault of qwedge"),
    ],
)
def test_every_failure_has_its_status_and_no_traceback(
    action: str, status: int, stderr: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(edge.cli, "build_app", lambda: command_that(action))
    monkeypatch.delenv("QWEDGE_LOG_LEVEL", raising=False)
    assert edge.cli.run(["go"]) == status
    assert capsys.readouterr().err.startswith(stderr)


def test_debugging_shows_where_a_fault_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(edge.cli, "build_app", lambda: command_that("fault"))
    monkeypatch.setenv("QWEDGE_LOG_LEVEL", "debug")
    assert edge.cli.run(["go"]) == 70
    assert "Traceback" in capsys.readouterr().err


def test_a_command_whose_extra_is_missing_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = EntryPoint("export", "package_that_is_not_there:register", edge.cli.COMMAND_GROUP)
    monkeypatch.setattr(edge.cli, "entry_points", lambda **_: [absent])
    assert edge.cli.run(["export", "anything", "--recipe", "int8"]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert "package_that_is_not_there" in error
    assert hint == "hint: pip install 'qwedge[export]'"


def test_a_closed_stdin_is_an_empty_one() -> None:
    line = ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "-m", "edge", "generate"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, "error: there is no prompt")


def test_ctrl_c_while_modules_are_imported_leaves_no_traceback() -> None:
    script = """
import sys
import edge.__main__

class Interrupt:
    @staticmethod
    def find_spec(name, *_):
        if name == "edge.commands":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt)
edge.__main__.main()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_a_reader_that_goes_away_is_no_error() -> None:
    line = f"{sys.executable} -m edge.cli --help | true"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
