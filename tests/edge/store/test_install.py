"""Copying into the store: from folders and tar files, resumed, shared, and never half."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from edge.bundle import GRAPH, MANIFEST, WEIGHTS, verify_bundle
from edge.errors import BundleError, StoreError
from edge.store import Store, copying, open_source
from edge.store.source import Source
from tests.edge.bundles import FILES, write_bundle

WEIGHT_BYTES = len(FILES[WEIGHTS])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refusal(store: Store, path: Path) -> str:
    with pytest.raises((BundleError, StoreError)) as caught:
        store.install(open_source(path))
    assert caught.value.hint
    assert store.list() == ()
    return caught.value.message


class TestFolders:
    def test_the_copy_is_the_bundle(self, store: Store, bundle: Path) -> None:
        installed = store.install(open_source(bundle))
        assert contents(installed.path) == contents(bundle)

    def test_files_beside_the_bundles_are_left_behind(self, store: Store, bundle: Path) -> None:
        """As sticks have them; the bundle in the store holds what the manifest lists."""
        (bundle / ".DS_Store").touch()
        (bundle / "folder").mkdir()
        verify_bundle(store.install(open_source(bundle)).path)

    def test_a_changed_file(self, store: Store, bundle: Path) -> None:
        (bundle / GRAPH).write_bytes(b"other" * 9)
        assert refusal(store, bundle) == f"{GRAPH} of {bundle} was changed: its SHA-256 is not the manifest's"
        (bundle / GRAPH).write_bytes(FILES[GRAPH])
        verify_bundle(store.install(open_source(bundle)).path)

    def test_a_file_of_another_size(self, store: Store, bundle: Path) -> None:
        (bundle / GRAPH).write_bytes(b"x")
        assert refusal(store, bundle) == f"{GRAPH} of {bundle} has 1 bytes, the manifest says 45"

    def test_a_missing_file(self, store: Store, bundle: Path) -> None:
        (bundle / GRAPH).unlink()
        assert refusal(store, bundle) == f"{bundle} lacks the file {GRAPH}"

    def test_a_link(self, store: Store, bundle: Path, tmp_path: Path) -> None:
        (bundle / GRAPH).rename(tmp_path / GRAPH)
        (bundle / GRAPH).symlink_to(tmp_path / GRAPH)
        assert "cannot be used" in refusal(store, bundle)

    def test_no_room(self, store: Store, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = shutil.disk_usage(bundle)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=(16 << 20) + WEIGHT_BYTES))
        assert refusal(store, bundle) == "tiny takes 2.1 MB, and there are 2.1 MB free"
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=(16 << 20) + WEIGHT_BYTES + 1000))
        store.install(open_source(bundle))


@pytest.mark.parametrize("damage", ["bit", "missing", "extra", "folder"])
def test_installing_it_again_repairs_it(store: Store, bundle: Path, damage: str) -> None:
    installed = store.install(open_source(bundle))
    weights = installed.path / WEIGHTS
    match damage:
        case "bit":
            with weights.open("r+b") as file:
                file.write(b"x")
        case "missing":
            weights.unlink()
        case "extra":
            (installed.path / "planted").touch()
        case "folder":
            (installed.path / "planted").mkdir()
            (installed.path / "planted" / "deeper").touch()
    with pytest.raises(BundleError):
        store.verify("tiny")
    assert store.install(open_source(bundle)).path == installed.path
    assert store.verify("tiny")
    assert contents(installed.path) == contents(bundle)


class TestResuming:
    @pytest.fixture
    def stop_at(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
        """Has the source fail after so many bytes; gives how many are read from now on."""
        monkeypatch.setattr(copying, "CHUNK", 1 << 16)
        read, original = [0], Source.read

        def stop_at(limit: int) -> list[int]:
            read[0] = 0

            def limited(source: Source, file: io.FileIO, position: int, count: int) -> bytes:
                if read[0] >= limit:
                    raise KeyboardInterrupt
                data = original(source, file, position, count)
                read[0] += len(data)
                return data

            monkeypatch.setattr(Source, "read", limited)
            return read

        return stop_at

    @pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
    def test_what_was_copied_is_not_copied_again(
        self, store: Store, bundle: Path, share: float, stop_at: Callable[[int], list[int]]
    ) -> None:
        total = sum(len(content) for content in FILES.values())
        read = stop_at(int(share * total))
        with pytest.raises(KeyboardInterrupt):
            store.install(open_source(bundle))
        before = read[0]
        assert store.list() == ()
        read = stop_at(10 * total)
        assert contents(store.install(open_source(bundle)).path) == contents(bundle)
        assert read[0] == total - before

    @pytest.mark.parametrize("tail", [b"", b"\0" * 5000, bytes(range(256)) * 9000])
    def test_what_a_power_cut_left_is_not_believed(
        self, store: Store, bundle: Path, tail: bytes, stop_at: Callable[[int], list[int]]
    ) -> None:
        """Zeros at the end of the file, or another file's bytes, or more than there should be."""
        stop_at(WEIGHT_BYTES // 2)
        with pytest.raises(KeyboardInterrupt):
            store.install(open_source(bundle))
        [part] = (store.folder / "bundles").glob(".*.part")
        with part.open("ab") as file:
            file.write(tail)
        stop_at(1 << 40)
        assert contents(store.install(open_source(bundle)).path) == contents(bundle)

    def test_a_damaged_file_of_an_earlier_copy(
        self, store: Store, bundle: Path, stop_at: Callable[[int], list[int]]
    ) -> None:
        stop_at(WEIGHT_BYTES // 2)
        with pytest.raises(KeyboardInterrupt):
            store.install(open_source(bundle))
        [staging] = (store.folder / "bundles").glob(".*.partial")
        (staging / GRAPH).write_bytes(b"other" * 9)
        (staging / "planted").touch()
        stop_at(1 << 40)
        assert contents(store.install(open_source(bundle)).path) == contents(bundle)


class TestSharing:
    @pytest.fixture
    def second(self, tmp_path: Path) -> Path:
        """Differs in its graph alone."""
        return write_bundle(tmp_path / "second", {**FILES, GRAPH: b"second"})

    def test_equal_files_are_there_once(self, store: Store, bundle: Path, second: Path) -> None:
        first, other = store.install(open_source(bundle)), store.install(open_source(second))
        assert (first.path / WEIGHTS).samefile(other.path / WEIGHTS)
        assert not (first.path / GRAPH).samefile(other.path / GRAPH)
        for installed in (first, other):
            verify_bundle(installed.path)
        store.remove(first.name)
        assert contents(verified(other.path)) == contents(second)
        assert (other.path / WEIGHTS).stat().st_nlink == 1

    def test_they_need_no_room(self, store: Store, bundle: Path, second: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        store.install(open_source(bundle))
        usage = shutil.disk_usage(bundle)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=(16 << 20) + 1000))
        verify_bundle(store.install(open_source(second)).path)

    def test_a_damaged_one_is_copied(self, store: Store, bundle: Path, second: Path) -> None:
        first = store.install(open_source(bundle))
        with (first.path / WEIGHTS).open("r+b") as file:
            file.write(b"x")
        verify_bundle(store.install(open_source(second)).path)

    def test_a_file_system_without_links(
        self, store: Store, bundle: Path, second: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        store.install(open_source(bundle))
        monkeypatch.setattr(Path, "hardlink_to", refuse)
        installed = store.install(open_source(second))
        assert (verified(installed.path) / WEIGHTS).stat().st_nlink == 1

    def test_a_name_outside_the_store_is_not_accepted(
        self, store: Store, bundle: Path, second: Path, tmp_path: Path
    ) -> None:
        first = store.install(open_source(bundle))
        store.install(open_source(second))
        (tmp_path / "elsewhere").hardlink_to(first.path / WEIGHTS)
        with pytest.raises(BundleError, match="is not a plain file"):
            verify_bundle(first.path)


def verified(path: Path) -> Path:
    verify_bundle(path)
    return path


def make_tar(path: Path, members: Iterable[tuple[str, bytes | tarfile.TarInfo]], **options: int) -> Path:
    with tarfile.open(path, "w", **options) as tar:  # type: ignore[call-overload]
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


class TestTars:
    @pytest.mark.parametrize("folder", ["", "./", "model/"])
    @pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_of_python(self, store: Store, bundle: Path, tmp_path: Path, folder: str, form: int) -> None:
        members = [(folder + name, content) for name, content in contents(bundle).items()]
        path = make_tar(tmp_path / "b.tar", members, format=form)
        assert contents(store.install(open_source(path)).path) == contents(bundle)

    @pytest.mark.parametrize("form", ["gnu", "posix", "ustar"])
    @pytest.mark.parametrize("whole", [True, False])
    def test_of_the_command_tar(self, store: Store, bundle: Path, tmp_path: Path, form: str, whole: bool) -> None:
        path = tmp_path / "b.tar"
        what = ["-C", bundle.parent, bundle.name] if whole else ["-C", bundle, "."]
        subprocess.run(["tar", f"--format={form}", "-cf", path, *what], check=True)
        assert contents(store.install(open_source(path)).path) == contents(bundle)

    def test_large_sizes_in_pax_headers(self, store: Store, bundle: Path, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "b.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for name, content in contents(bundle).items():
                info = tarfile.TarInfo(name)
                info.size, info.pax_headers = len(content), {"size": str(len(content)), "comment": "é" * 99}
                tar.addfile(info, io.BytesIO(content))
        assert contents(store.install(open_source(tmp_path / "b.tar")).path) == contents(bundle)

    def test_the_extended_header_of_a_folder_is_not_that_of_the_next_file(
        self, store: Store, bundle: Path, tmp_path: Path
    ) -> None:
        with tarfile.open(tmp_path / "b.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            folder = tarfile.TarInfo("model")
            folder.type, folder.pax_headers = tarfile.DIRTYPE, {"path": "model/elsewhere", "size": "0"}
            tar.addfile(folder)
            for name, content in contents(bundle).items():
                info = tarfile.TarInfo(f"model/{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        assert contents(store.install(open_source(tmp_path / "b.tar")).path) == contents(bundle)

    @pytest.mark.parametrize("name", ["/etc/passwd", "../up", "a/../../up", "a/b/c", "more/model.onnx", "..", "//x"])
    def test_names_out_of_the_bundle(self, store: Store, bundle: Path, tmp_path: Path, name: str) -> None:
        path = make_tar(tmp_path / "b.tar", [*contents(bundle).items(), (name, b"x")])
        assert "is not in the bundle's one folder" in refusal(store, path)

    @pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"L"])
    def test_what_is_no_plain_file(self, store: Store, bundle: Path, tmp_path: Path, kind: bytes) -> None:
        link = tarfile.TarInfo("extra")
        link.type, link.linkname = kind, "/etc/passwd"
        path = make_tar(tmp_path / "b.tar", [*contents(bundle).items(), ("extra", link)])
        assert "'extra' is no plain file" in refusal(store, path)

    def test_a_name_that_comes_twice(self, store: Store, bundle: Path, tmp_path: Path) -> None:
        path = make_tar(tmp_path / "b.tar", [*contents(bundle).items(), (f"./{GRAPH}", FILES[GRAPH])])
        assert f"'{GRAPH}' is there twice" in refusal(store, path)

    def test_a_file_of_another_size(self, store: Store, bundle: Path, tmp_path: Path) -> None:
        path = make_tar(tmp_path / "b.tar", (contents(bundle) | {GRAPH: b"x"}).items())
        assert refusal(store, path) == f"{GRAPH} of {path} has 1 bytes, the manifest says 45"

    def test_no_bundle_in_it(self, store: Store, bundle: Path, tmp_path: Path) -> None:
        files = contents(bundle)
        del files[MANIFEST]
        assert "it has no manifest.json" in refusal(store, make_tar(tmp_path / "b.tar", files.items()))
        assert "it has no manifest.json" in refusal(store, make_tar(tmp_path / "c.tar", []))
        (tmp_path / "d.tar").write_bytes(b"PK\3\4" * 999)
        assert "it is no tar file, or damaged" in refusal(store, tmp_path / "d.tar")

    def test_a_manifest_without_end(self, store: Store, tmp_path: Path) -> None:
        path = make_tar(tmp_path / "b.tar", [(MANIFEST, b" " * (2 << 20))])
        assert "is larger than" in refusal(store, path)

    def test_an_extended_header_without_end(self, store: Store, tmp_path: Path) -> None:
        header = tarfile.TarInfo("x")
        header.type, header.size = tarfile.XHDTYPE, 1 << 33
        path = tmp_path / "b.tar"
        path.write_bytes(header.tobuf())
        os.truncate(path, 1 << 34)
        assert "a header is too long" in refusal(store, path)

    @pytest.mark.parametrize("record", [b"junk", b"9999 a=b\n", b"0 a=b\n", b"5 size\n", b"21 GNU.sparse.major=1\n"])
    def test_malformed_extended_headers(self, store: Store, tmp_path: Path, record: bytes) -> None:
        header = tarfile.TarInfo("x")
        header.type, header.size = tarfile.XHDTYPE, len(record)
        (tmp_path / "b.tar").write_bytes(header.tobuf() + record.ljust(512, b"\0") + bytes(1024))
        assert "is no tar file of a bundle" in refusal(store, tmp_path / "b.tar")

    def test_more_files_than_any_bundle_has(self, store: Store, bundle: Path, tmp_path: Path) -> None:
        many = [(f"{number}", b"") for number in range(600)]
        path = make_tar(tmp_path / "b.tar", [*contents(bundle).items(), *many])
        assert "it holds more files than any bundle" in refusal(store, path)

    def test_every_cut(self, store: Store, bundle: Path, tmp_path: Path) -> None:
        whole = make_tar(tmp_path / "b.tar", contents(bundle).items()).read_bytes()
        for length in (1, 511, 512, 700, 5000, len(whole) // 2, len(whole.rstrip(b"\0")) - 1):
            (tmp_path / "b.tar").write_bytes(whole[:length])
            assert refusal(store, tmp_path / "b.tar")

    def test_another_suffix_says_what_to_do(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "b.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" * 300)
        assert "no tar file" in refusal(store, tmp_path / "b.tar.zst")
