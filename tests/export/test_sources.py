"""Sources: a real HTTP server plays the hub, pip installs from a folder of real wheels; nothing leaves the machine."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import shutil
import socket
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from edge.errors import CheckpointError
from export import sources
from export.catalog import CatalogEntry, Piece, catalog
from export.hub import PROBE_TIMEOUT_S, Hub
from export.sources import Resolved, resolve, resolve_entry
from tests.export import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Recorder:
    """A progress that remembers its steps as (label, total, bytes done)."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int | None, int]] = []
        self._step: list[Any] = []

    def start(self, label: str, total_bytes: int | None) -> None:
        assert not self._step
        self._step = [label, total_bytes, 0]

    def advance(self, num_bytes: int) -> None:
        self._step[2] += num_bytes

    def finish(self) -> None:
        self.steps.append(tuple(self._step))
        self._step = []


class FakeHub(ThreadingHTTPServer):
    """The three calls of the hub's API that a download makes, over repositories in memory."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.corrupt: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        if path == "/":
            return self.answer(200, b"hub")
        parts = path.strip("/").split("/")
        repo = "/".join(parts[2:4]) if parts[0] == "api" else "/".join(parts[:2])
        files = self.server.repos.get(repo)
        if files is None:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if parts[0] != "api":
            return self.file(parts[-1], files)
        if "tree" in parts:
            return self.answer(200, json.dumps([_tree(name, data) for name, data in files.items()]).encode())
        siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
        return self.answer(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())

    def file(self, name: str, files: dict[str, bytes]) -> None:
        data = files[name]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_oid(data)}"'}
        self.answer(200, data[::-1] if name in self.server.corrupt else data, headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


def _oid(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _tree(name: str, data: bytes) -> dict[str, Any]:
    lfs = {"oid": _oid(data), "size": len(data), "pointerSize": 100}
    return {"type": "file", "path": name, "size": len(data), "oid": "0" * 40, "lfs": lfs}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tiny.write_folder(tmp_path_factory.mktemp("model") / "m", tiny.qwen2_config())
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def nobody() -> str:
    """An address where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def fails(source: str, cache: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        resolve(source, cache=cache, **options)
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestLocal:
    def test_a_folder_and_a_gguf(self, tmp_path: Path) -> None:
        folder = tiny.write_folder(tmp_path / "folder", tiny.qwen2_config())
        file = tiny.write_gguf(tmp_path / "m.gguf", tiny.qwen2_config())
        for path, kind in [(folder, "folder"), (file, "gguf")]:
            resolved = resolve(str(path), cache=tmp_path / "cache", offline=True)
            assert (resolved.path, resolved.origin.kind, resolved.origin.location) == (path, kind, path.name)
            with resolved.open() as checkpoint:
                assert checkpoint.config["model_type"] == "qwen2"
        assert not (tmp_path / "cache").exists()

    def test_a_typing_mistake_gets_the_nearest_name(self, tmp_path: Path) -> None:
        assert "did you mean qwen2.5-coder-0.5b-instruct?" in fails("qwen2.5-coder-0.5-instruct", tmp_path)
        assert "--list" in fails("/no/such/thing", tmp_path)
        assert "--list" in fails("", tmp_path)


class TestHub:
    def test_a_repository_is_downloaded_once(self, hub: FakeHub, model_files: dict[str, bytes], tmp_path: Path) -> None:
        hub.repos["Org/Tiny"] = {**model_files, "modeling_x.py": b"raise SystemExit", "pytorch_model.bin": b"x"}
        progress = Recorder()
        resolved = resolve("Org/Tiny", cache=tmp_path, endpoint=hub.url, progress=progress)
        assert (resolved.origin.kind, resolved.origin.location, resolved.origin.revision) == ("hub", "Org/Tiny", COMMIT)
        assert {path.name for path in resolved.path.iterdir()} == model_files.keys()
        total = sum(map(len, model_files.values()))
        assert ("downloading Org/Tiny", total, total) in progress.steps
        with resolved.open() as checkpoint:
            assert checkpoint.hash_files().revision == COMMIT
            assert len(checkpoint.tensors) == len(tiny.random_tensors(tiny.qwen2_config()))
        hub.requests.clear()
        again = resolve("Org/Tiny", cache=tmp_path, endpoint=hub.url)
        assert again == resolved
        assert hub.requests == []
        assert resolve("Org/Tiny", cache=tmp_path, endpoint=hub.url, offline=True) == resolved

    def test_a_file_that_arrives_changed_is_refused(
        self, hub: FakeHub, model_files: dict[str, bytes], tmp_path: Path
    ) -> None:
        hub.repos["Org/Tiny"] = model_files
        hub.corrupt.add("model.safetensors")
        assert "arrived damaged" in fails("Org/Tiny", tmp_path, endpoint=hub.url)
        hub.corrupt.clear()
        with resolve("Org/Tiny", cache=tmp_path, endpoint=hub.url).open() as checkpoint:
            assert checkpoint.config["model_type"] == "qwen2"

    def test_repositories_that_hold_nothing_to_export(self, hub: FakeHub, tmp_path: Path) -> None:
        hub.repos["Org/Gguf"] = {"a-q4.gguf": b"GGUF", "config.json": b"{}"}
        hub.repos["Org/Pickle"] = {"pytorch_model.bin": b"x", "config.json": b"{}"}
        assert "a-q4.gguf" in fails("Org/Gguf", tmp_path, endpoint=hub.url)
        assert "safetensors" in fails("Org/Pickle", tmp_path, endpoint=hub.url)
        assert "no public model Org/None" in fails("Org/None", tmp_path, endpoint=hub.url)

    def test_offline_asks_nobody(self, hub: FakeHub, tmp_path: Path) -> None:
        assert "network is off" in fails("Org/Tiny", tmp_path, endpoint=hub.url, offline=True)
        assert hub.requests == []

    def test_a_hub_that_refuses_is_noticed_at_once(self, nobody: str, tmp_path: Path) -> None:
        began = time.monotonic()
        assert "does not answer" in fails("Org/Tiny", tmp_path, endpoint=nobody)
        assert time.monotonic() - began < PROBE_TIMEOUT_S / 2

    def test_a_hub_that_swallows_packets_is_noticed_in_time(self, tmp_path: Path) -> None:
        with socket.socket() as deaf:
            deaf.bind(("127.0.0.1", 0))
            deaf.listen()
            began = time.monotonic()
            assert not Hub(tmp_path, f"http://127.0.0.1:{deaf.getsockname()[1]}").answers()
            assert time.monotonic() - began < PROBE_TIMEOUT_S + 0.5


PARTS = [b"GGUF" + bytes(range(256)) * 900, b"second" * 30_000]
WHOLE = b"".join(PARTS)


def build_wheel(folder: Path, number: int, part: bytes) -> Piece:
    """A wheel as pip accepts it, with one part inside."""
    package = f"qwedge_test_part{number}"
    member, info = f"{package}/data/part.bin", f"{package}-1.0.dist-info"
    files = {
        member: part,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    wheel = folder / f"{package}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        record = ""
        for name, data in files.items():
            archive.writestr(name, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record += f"{name},sha256={digest},{len(data)}\n"
        archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    name = package.replace("_", "-")
    return Piece(
        package=name,
        version="1.0",
        wheel_sha256=_oid(wheel.read_bytes()),
        member=member,
        size=len(part),
        sha256=_oid(part),
    )


def entry_of(pieces: list[Piece], **changes: Any) -> CatalogEntry:
    demo = catalog()["qwen2.5-coder-0.5b-instruct"].model_dump()
    pinned = {"name": "tiny", "hub": "Org/Gguf", "file": "tiny.gguf", "size": len(WHOLE), "sha256": _oid(WHOLE)}
    return CatalogEntry.model_validate(
        {**demo, **pinned, "pieces": [piece.model_dump() for piece in pieces], **changes}
    )


class TestPieces:
    @pytest.fixture
    def index(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """The folder that pip takes packages from."""
        (folder := tmp_path / "index").mkdir()
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        return folder

    @pytest.fixture
    def pieces(self, index: Path) -> list[Piece]:
        return [build_wheel(index, number, part) for number, part in enumerate(PARTS, 1)]

    @pytest.fixture
    def cache(self, tmp_path: Path) -> Path:
        return tmp_path / "cache"

    def resolve(self, entry: CatalogEntry, cache: Path, endpoint: str, **options: Any) -> Resolved:
        return resolve_entry(entry, cache=cache, hub=Hub(cache / "hub", endpoint), **options)

    @pytest.fixture
    def half(self, cache: Path) -> Path:
        """What a run leaves behind that was stopped while it wrote the second part."""
        (cache / "gguf").mkdir(parents=True)
        partial = cache / "gguf" / "tiny.gguf.part"
        partial.write_bytes(PARTS[0] + b"sec torn")
        return partial

    def test_a_hub_that_is_away_is_replaced_by_packages(
        self, pieces: list[Piece], cache: Path, nobody: str, index: Path
    ) -> None:
        progress = Recorder()
        resolved = self.resolve(entry_of(pieces), cache, nobody, progress=progress)
        assert resolved.path.read_bytes() == WHOLE
        assert (resolved.origin.kind, resolved.origin.location) == ("catalog", "tiny")
        assert ("downloading tiny.gguf in 2 pieces", len(WHOLE), len(WHOLE)) in progress.steps
        assert [path.name for path in (cache / "gguf").iterdir()] == ["tiny.gguf"]
        shutil.rmtree(index)
        assert self.resolve(entry_of(pieces), cache, nobody, offline=True) == resolved

    def test_the_hub_comes_first(self, pieces: list[Piece], cache: Path, hub: FakeHub) -> None:
        hub.repos["Org/Gguf"] = {"tiny.gguf": WHOLE, "other.gguf": b"x"}
        resolved = self.resolve(entry_of(pieces), cache, hub.url)
        assert resolved.path.read_bytes() == WHOLE
        assert resolved.origin.revision == COMMIT
        assert not (cache / "gguf").exists()
        assert not any("other.gguf" in request for request in hub.requests)
        hub.requests.clear()
        assert self.resolve(entry_of(pieces), cache, hub.url) == resolved
        assert hub.requests == []

    @pytest.mark.usefixtures("half")
    def test_a_hub_with_another_file_is_not_believed(self, pieces: list[Piece], cache: Path, hub: FakeHub) -> None:
        hub.repos["Org/Gguf"] = {"tiny.gguf": b"another"}
        assert self.resolve(entry_of(pieces), cache, hub.url).path.read_bytes() == WHOLE
        with pytest.raises(CheckpointError, match="not the pinned file"):
            self.resolve(entry_of([]), cache / "second", hub.url)

    @pytest.mark.usefixtures("half")
    def test_a_broken_run_continues_where_it_stopped(
        self, pieces: list[Piece], cache: Path, nobody: str, index: Path
    ) -> None:
        (index / "qwedge_test_part1-1.0-py3-none-any.whl").unlink()
        assert self.resolve(entry_of(pieces), cache, nobody).path.read_bytes() == WHOLE

    def test_a_package_that_is_missing_is_named(
        self, pieces: list[Piece], cache: Path, nobody: str, index: Path, half: Path
    ) -> None:
        (index / "qwedge_test_part2-1.0-py3-none-any.whl").unlink()
        with pytest.raises(CheckpointError, match=r"qwedge-test-part2 1\.0: ") as caught:
            self.resolve(entry_of(pieces), cache, nobody)
        assert "index" in caught.value.hint
        assert half.read_bytes() == PARTS[0]
        assert not (cache / "gguf" / "tiny.gguf").exists()

    @pytest.mark.usefixtures("half")
    def test_a_wheel_that_was_replaced_is_refused(
        self, pieces: list[Piece], cache: Path, nobody: str, index: Path
    ) -> None:
        build_wheel(index, 2, b"evil")
        with pytest.raises(CheckpointError, match=r"(?i)qwedge-test-part2.*hashes"):
            self.resolve(entry_of(pieces), cache, nobody)

    @pytest.mark.usefixtures("half")
    def test_a_cached_file_that_was_changed_is_fetched_again(
        self, pieces: list[Piece], cache: Path, nobody: str
    ) -> None:
        (cache / "gguf" / "tiny.gguf").write_bytes(bytes(len(WHOLE)))
        assert self.resolve(entry_of(pieces), cache, nobody).path.read_bytes() == WHOLE

    def test_two_at_once(self, pieces: list[Piece], cache: Path, nobody: str) -> None:
        import fcntl

        (cache / "gguf").mkdir(parents=True)
        with (cache / "gguf" / "tiny.gguf.part").open("wb") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            with pytest.raises(CheckpointError, match="another process"):
                self.resolve(entry_of(pieces), cache, nobody)

    def test_no_space(self, pieces: list[Piece], cache: Path, nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(CheckpointError, match="MiB free"):
            self.resolve(entry_of(pieces, size=1 << 60), cache, nobody)

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", str(cache / "gguf" / "tiny.gguf.part"))

        monkeypatch.setattr(sources, "assemble", full)
        with pytest.raises(CheckpointError, match=r"tiny\.gguf\.part: No space left"):
            self.resolve(entry_of(pieces), cache, nobody)

    def test_a_cache_that_cannot_be_made(self, pieces: list[Piece], tmp_path: Path, nobody: str) -> None:
        (blocker := tmp_path / "file").touch()
        with pytest.raises(CheckpointError, match="file"):
            self.resolve(entry_of(pieces), blocker / "cache", nobody)


def test_the_catalog_is_complete_and_pins_what_is_known() -> None:
    names = set(catalog())
    sizes = ("0.5b", "1.5b", "3b", "7b")
    assert names >= {f"qwen2.5-{size}-instruct" for size in sizes} | {
        f"qwen2.5-coder-{size}-instruct" for size in sizes
    }
    assert names >= {"qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-4b-instruct-2507"}
    demo = catalog()["qwen2.5-coder-0.5b-instruct"]
    assert demo.sha256 == "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
    for entry in catalog().values():
        assert entry.name == entry.name.lower()
        assert (entry.licence == "qwen-research") == ("-3b-" in entry.name)
        if entry.pieces:
            assert sum(piece.size for piece in entry.pieces) == entry.size
    assert [len(entry.pieces) for entry in catalog().values() if entry.pieces] == [6, 22]


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.delenv("QWEDGE_CACHE", raising=False)
    assert sources.default_cache() == Path("/xdg/qwedge")
    monkeypatch.setenv("QWEDGE_CACHE", "/chosen")
    assert sources.default_cache() == Path("/chosen")
