"""Bundles: whatever was changed, is missing, was added or lies is refused before anything is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge import __version__
from edge.bundle import (
    GRAPH,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    SCHEMA_VERSION,
    SIGNATURE,
    WEIGHTS,
    KVLayout,
    Manifest,
    publish_bundle,
    read_manifest,
    verify_bundle,
)
from edge.errors import BundleError
from tests.edge.bundles import FILES, write_bundle, write_files


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def refusal(bundle: Path) -> str:
    with pytest.raises(BundleError) as caught:
        verify_bundle(bundle)
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    return caught.value.message


def change_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    change(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def test_an_untouched_bundle_is_accepted_and_every_byte_was_read(bundle: Path) -> None:
    done: list[int] = []
    manifest = verify_bundle(bundle, progress=done.append)
    assert manifest == read_manifest(bundle)
    assert sum(done) == sum(len(content) for content in FILES.values())


@pytest.mark.parametrize("name", [name for name, content in FILES.items() if content])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_one_changed_bit(bundle: Path, name: str, place: str) -> None:
    content = bytearray(FILES[name])
    content[{"first": 0, "middle": len(content) // 2, "last": -1}[place]] ^= 1
    (bundle / name).write_bytes(content)
    assert refusal(bundle) == f"{bundle / name} was changed: its SHA-256 is not the manifest's"


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    assert refusal(bundle) == f"{bundle / name} is missing"


@pytest.mark.parametrize("content", [b"", FILES[WEIGHTS][:-1], FILES[WEIGHTS] + b"\0"])
def test_another_size(bundle: Path, content: bytes) -> None:
    (bundle / WEIGHTS).write_bytes(content)
    assert refusal(bundle) == f"{bundle / WEIGHTS} has {len(content)} bytes, the manifest says {len(FILES[WEIGHTS])}"


@pytest.mark.parametrize("name", ["zz.bin", ".hidden", "model.onnx.data.bak"])
def test_an_extra_file(bundle: Path, name: str) -> None:
    (bundle / name).touch()
    assert refusal(bundle).endswith(f"does not list: {name}")


def test_an_extra_folder(bundle: Path) -> None:
    (bundle / "more").mkdir()
    assert refusal(bundle).endswith("does not list: more")


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_links_to_the_right_bytes(bundle: Path, tmp_path: Path, link: Callable[[Path, Path], None]) -> None:
    """onnxruntime would follow them, and what they lead to can change after the check."""
    (bundle / GRAPH).rename(tmp_path / GRAPH)
    link(bundle / GRAPH, tmp_path / GRAPH)
    assert str(bundle / GRAPH) in refusal(bundle)


def test_a_pipe_is_refused_without_waiting_for_a_writer(bundle: Path) -> None:
    (bundle / "extra.txt").unlink()
    os.mkfifo(bundle / "extra.txt")
    assert "is not a plain file" in refusal(bundle)


def test_a_folder_in_place_of_a_file(bundle: Path) -> None:
    (bundle / "extra.txt").unlink()
    (bundle / "extra.txt").mkdir()
    assert str(bundle / "extra.txt") in refusal(bundle)


class TestManifest:
    def test_none(self, bundle: Path, tmp_path: Path) -> None:
        (bundle / MANIFEST).unlink()
        assert refusal(bundle) == f"{bundle} is not a bundle: it has no {MANIFEST}"
        assert refusal(tmp_path / "nowhere").endswith("is not a bundle: there is no such folder")

    def test_what_was_given_instead(self, bundle: Path, tmp_path: Path) -> None:
        """A file of the bundle, what a bundle could be made from, or a packed one: the hint says what to do."""
        for name in ("model.gguf", "bundle.tar", "notes.txt"):
            (tmp_path / name).touch()
        (tmp_path / "config.json").touch()
        hints = {
            bundle / GRAPH: f"give the folder it is in: {bundle}",
            tmp_path / "model.gguf": f"make one with: qwedge export {tmp_path / 'model.gguf'} -o DIR",
            tmp_path / "bundle.tar": f"if it holds a bundle, install it: qwedge install {tmp_path / 'bundle.tar'}",
            tmp_path / "notes.txt": "make one with: qwedge export MODEL -o DIR",
            tmp_path: f"make one with: qwedge export {tmp_path} -o DIR",
        }
        for given, hint in hints.items():
            with pytest.raises(BundleError) as caught:
                read_manifest(given)
            assert caught.value.hint == hint

    @pytest.mark.parametrize("text", ["", "{", "null", "[]", "3", '{"a": 1}', "[" * 100_000, "{}"])
    def test_no_manifest_in_it(self, bundle: Path, text: str) -> None:
        (bundle / MANIFEST).write_text(text)
        assert str(bundle / MANIFEST) in refusal(bundle)

    def test_not_unicode(self, bundle: Path) -> None:
        (bundle / MANIFEST).write_bytes(b"\xff\xfe{}")
        assert "cannot be read" in refusal(bundle)

    def test_larger_than_any_manifest(self, bundle: Path) -> None:
        (bundle / MANIFEST).write_bytes(b" " * (MAX_MANIFEST_BYTES + 1))
        assert "is larger than" in refusal(bundle)

    @pytest.mark.parametrize("field", [name for name, info in Manifest.model_fields.items() if info.is_required()])
    def test_a_missing_field_is_named(self, bundle: Path, field: str) -> None:
        change_manifest(bundle, lambda manifest: manifest.pop(field))
        assert field in refusal(bundle)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("name", "../up"),
            ("name", "Big"),
            ("parameter_count", 0),
            ("context_length", -1),
            ("counter", -1),
            ("counter", 1 << 63),
            ("vocab_size", "eight"),
            ("kv", {"layers": 1, "kv_heads": 1, "head_dim": 0}),
            ("kv", {"layers": 1, "kv_heads": 1, "head_dim": 8, "colour": "red"}),
            ("kv", {"layers": 1, "kv_heads": 1, "head_dim": 8, "dtype": "int4"}),
            ("recipe", "int4"),
            ("files", []),
            ("surprise", 1),
        ],
    )
    def test_a_wrong_field_is_named(self, bundle: Path, field: str, value: Any) -> None:
        change_manifest(bundle, lambda manifest: manifest.update({field: value}))
        assert f"malformed at {field}" in refusal(bundle)

    @pytest.mark.parametrize(
        "path", ["../outside", "/etc/passwd", "a/b", "a\\b", "..", ".", "", "x\0y", MANIFEST, SIGNATURE]
    )
    def test_a_path_out_of_the_bundle(self, bundle: Path, path: str) -> None:
        change_manifest(bundle, lambda manifest: manifest["files"][-1].update(path=path))
        assert "must be a plain file name" in refusal(bundle)

    def test_a_file_listed_twice(self, bundle: Path) -> None:
        change_manifest(bundle, lambda manifest: manifest["files"].append(manifest["files"][0]))
        assert "lists a file twice" in refusal(bundle)

    def test_a_manifest_that_leaves_out_the_weights(self, bundle: Path) -> None:
        (bundle / WEIGHTS).unlink()
        change_manifest(bundle, lambda manifest: manifest["files"].pop(1))
        assert f"does not list {WEIGHTS}" in refusal(bundle)

    @pytest.mark.parametrize("sha256", ["", "0" * 63, "G" * 64, "A" * 64])
    def test_a_hash_that_is_none(self, bundle: Path, sha256: str) -> None:
        change_manifest(bundle, lambda manifest: manifest["files"][0].update(sha256=sha256))
        assert "malformed at files.0.sha256" in refusal(bundle)

    @pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 0, "1", None])
    def test_another_schema(self, bundle: Path, version: Any) -> None:
        change_manifest(bundle, lambda manifest: manifest.update(schema_version=version, new_in_this_schema=True))
        assert f"schema_version {version!r}" in refusal(bundle)

    @pytest.mark.parametrize("version", ["99.0.0", "0.1000", "1"])
    def test_a_bundle_that_needs_a_newer_runtime(self, bundle: Path, version: str) -> None:
        change_manifest(bundle, lambda manifest: manifest.update(min_runtime_version=version))
        assert refusal(bundle) == f"the bundle needs qwedge {version}, this is {__version__}"

    @pytest.mark.parametrize("version", ["", "new", "1.x", "-1", "0.1.0; rm"])
    def test_a_version_that_is_none(self, bundle: Path, version: str) -> None:
        change_manifest(bundle, lambda manifest: manifest.update(min_runtime_version=version))
        assert "malformed at min_runtime_version" in refusal(bundle)


def test_the_cache_of_one_token() -> None:
    """Keys and values, of 24 layers, with 2 heads of 64 numbers each."""
    assert KVLayout(layers=24, kv_heads=2, head_dim=64).bytes_per_token == 2 * 24 * 2 * 64 * 4
    assert KVLayout(layers=24, kv_heads=2, head_dim=64, dtype="int8").bytes_per_token == 2 * 24 * 2 * 64


class TestPublishing:
    def test_nothing_is_there_until_everything_is(self, tmp_path: Path) -> None:
        manifest = write_files(tmp_path / "staging")
        publish_bundle(tmp_path / "staging", tmp_path / "bundle", manifest)
        assert not (tmp_path / "staging").exists()
        assert verify_bundle(tmp_path / "bundle") == manifest

    def test_files_are_flushed_before_the_rename_and_the_parent_after_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        manifest = write_files(tmp_path / "staging")
        events: list[str] = []
        rename, fsync = Path.rename, os.fsync

        def watched_rename(path: Path, target: Path) -> Path:
            events.append("rename")
            return rename(path, target)

        def watched_fsync(descriptor: int) -> None:
            events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
            fsync(descriptor)

        monkeypatch.setattr(Path, "rename", watched_rename)
        monkeypatch.setattr(os, "fsync", watched_fsync)
        publish_bundle(tmp_path / "staging", tmp_path / "bundle", manifest)
        assert set(events[:-3]) == {*FILES, MANIFEST}
        assert events[-3:] == ["staging", "rename", tmp_path.name]

    def test_what_is_there_stays(self, bundle: Path, tmp_path: Path) -> None:
        manifest = write_files(tmp_path / "second")
        with pytest.raises(BundleError, match="exists already"):
            publish_bundle(tmp_path / "second", bundle, manifest)
        assert verify_bundle(bundle)
