"""The folders of the boards: settings that the runtime takes, budgets that add up, figures with a source."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from edge.config import Settings, load_settings
from edge.http.audit import AuditLog
from tests.firmware.test_systemd import directives, install
from tests.firmware.tools import BOARDS, COMMON, FIRMWARE, ROOT, need, run

KNOWN_BOARDS = (
    "generic-arm64",
    "jetson-agx-orin",
    "jetson-orin-nano",
    "raspberry-pi-4",
    "raspberry-pi-5",
    "rk3588",
    "x86-n100",
)
RAM_MB = {"raspberry-pi-4": 4096, "raspberry-pi-5": 4096, "generic-arm64": 2048, "jetson-agx-orin": 32768}
"""The smallest of each board that its README names; 8 GB where there is no other."""
PROCESS_MB = 1100
"""A 0.5B in int4 on cores without dotprod, everything but caches included: the worst of the small models."""
KV_BYTES_PER_TOKEN = 24_576
"""Of Qwen2.5-0.5B: 24 layers, 2 heads, 64 values, keys and values, 4 bytes each."""


def settings(board: str) -> Settings:
    return load_settings(FIRMWARE / board / "edge.toml")


def test_there_is_a_folder_for_each_board() -> None:
    assert BOARDS == KNOWN_BOARDS


@pytest.mark.parametrize("board", BOARDS)
def test_the_runtime_takes_the_settings_and_each_has_a_reason(board: str) -> None:
    assert settings(board).mqtt.broker == "embedded"
    lines = (FIRMWARE / board / "edge.toml").read_text().splitlines()
    for before, line in pairwise(lines):
        if " = " in line and not line.startswith("#"):
            assert before.startswith("# "), f"{board}: {line} has no reason"


@pytest.mark.parametrize("board", BOARDS)
def test_the_caches_fit_below_the_limit_beside_a_model(board: str) -> None:
    limit = directives(FIRMWARE / board / "board.conf")["Service"]["MemoryMax"]
    limit_mb = RAM_MB.get(board, 8192) * int(limit.removesuffix("%")) / 100
    engine = settings(board).engine
    assert engine.kv_cache_mb is not None
    assert engine.kv_cache_mb + engine.prefix_cache_mb + PROCESS_MB <= limit_mb
    # One conversation of full length always fits, or it would be refused.
    assert engine.kv_cache_mb << 20 >= (engine.context or 4096) * KV_BYTES_PER_TOKEN


@pytest.mark.parametrize("board", BOARDS)
def test_the_boards_part_of_the_unit_is_understood(tmp_path: Path, board: str) -> None:
    unit = install(tmp_path, (FIRMWARE / board / "board.conf",))
    assert run(need("systemd-analyze", "systemd"), "verify", unit, cwd=tmp_path) == ""
    pinned = directives(FIRMWARE / board / "board.conf")["Service"].get("CPUAffinity")
    if pinned is not None:  # as many threads as cores that are left
        first, last = map(int, pinned.split("-"))
        assert settings(board).engine.threads == last - first + 1


@pytest.mark.parametrize("board", BOARDS)
def test_every_expected_figure_names_its_source(board: str) -> None:
    text = (FIRMWARE / board / "README.md").read_text()
    for heading in ("## Memory", "## Expected", "## Wiring"):
        assert heading in text
    assert f"BOARD={board} " in text
    rows = re.findall(r"^\| (.*) \| (.*) \| (.*) \|$", text.split("## Expected")[1].split("## Wiring")[0], re.MULTILINE)
    for what, figure, source in rows[2:]:
        has_figure = re.search(r"\d", figure) is not None
        assert source != "-" or not has_figure
        assert not (has_figure and "qwedge" in what) or "estimate" in source


@pytest.fixture
def audit(tmp_path: Path) -> Path:
    """The configuration for a log in a folder of ours, as the user who runs the tests."""
    text = (COMMON / "logrotate-qwedge").read_text()
    owner = run("id", "-un").strip()
    config = tmp_path / "logrotate.conf"
    config.write_text(text.replace("/var/log/qwedge", str(tmp_path)).replace("qwedge qwedge", f"{owner} {owner}"))
    config.chmod(0o644)
    return config


def test_rotating_the_audit_log_leaves_the_server_writing(audit: Path, tmp_path: Path) -> None:
    """logrotate empties the file under a server that has it open; what comes next is at its beginning."""
    logrotate = need("logrotate", "logrotate")
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, 1 << 20)
    log.start()
    log._write([{"n": 1}])
    run(logrotate, "--force", "--state", tmp_path / "state", audit)
    log._write([{"n": 2}])
    log.stop()
    assert path.read_text() == '{"n":2}\n'
    (rotated,) = tmp_path.glob("audit.jsonl-*.gz")
    assert run("zcat", rotated) == '{"n":1}\n'


def test_every_file_is_checked_by_a_test() -> None:
    """What is added without a test does not pass."""
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("*.py"))
    by_pattern = ("qwedge.service.d/*.conf", "systemd/qwedge-*.service", "mosquitto/qwedge-2.?.conf", "*.md")
    for path in sorted(FIRMWARE.rglob("*")):
        if path.is_file() and not any(path.match(pattern) for pattern in by_pattern):
            assert path.name in text, path


def test_links_in_the_pages_lead_somewhere() -> None:
    for page in [*sorted(FIRMWARE.rglob("*.md")), ROOT / "docs/firmware.md"]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert (page.parent / target).exists() or "://" in target, f"{page}: {target}"
