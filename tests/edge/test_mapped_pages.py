"""Pages of mapped files can go at any time: what they hold is read again."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

from edge.engine.mapped_pages import MappedPages

SIZE = 1 << 20


def resident_kib(path: Path) -> int:
    """What of a file's mappings is in this process's memory."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


def test_pages_go_and_come_back_with_their_contents(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    pages = MappedPages(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), SIZE, mmap.MAP_PRIVATE) as mapping:
        content = mapping[:]
        assert resident_kib(path) == SIZE // 1024
        pages.note()
        pages.drop()
        assert resident_kib(path) == 0
        assert mapping[:] == content
        pages.drop()
        assert resident_kib(path) == 0


def test_a_mapping_somebody_wrote_into_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"\0" * SIZE)
    pages = MappedPages(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_COPY) as mapping:
        mapping[5000] = 7
        pages.note()
        pages.drop()
        assert mapping[5000] == 7


def test_mappings_of_somebody_else_are_left_alone(tmp_path: Path) -> None:
    """They may be gone when the pages are dropped, and their addresses another's memory."""
    path = tmp_path / "weights"
    path.write_bytes(b"\1" * SIZE)
    with path.open("rb") as file, mmap.mmap(file.fileno(), SIZE, mmap.MAP_PRIVATE) as others:
        assert others[:].count(1) == SIZE
        pages = MappedPages(path)
        pages.note()
        pages.drop()
        assert resident_kib(path) == SIZE // 1024


def test_a_file_that_is_not_mapped_is_no_error(tmp_path: Path) -> None:
    pages = MappedPages(tmp_path / "absent")
    pages.note()
    pages.drop()
