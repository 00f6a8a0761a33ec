"""The model store: what is installed, active, tried, left and removed; and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from edge.bundle import MANIFEST, SIGNATURE, WEIGHTS, sign_bundle, verify_bundle
from edge.errors import BundleError, BundleNotFoundError, ConfigError, SignatureError, StoreError, UnavailableError
from edge.signing import PrivateKey, Trust, make_keys
from edge.store import Installed, Store, find_sources, open_source
from tests.edge.bundles import FILES, write_bundle


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def add(store: Store, tmp_path: Path) -> Callable[..., Installed]:
    """Installs a bundle whose graph is `text`."""

    def add(text: str, *, name: str = "tiny", counter: int = 0) -> Installed:
        files = {**FILES, "model.onnx": text.encode()}
        folder = write_bundle(tmp_path / "sources" / f"{name}-{text}-{counter}", files, name=name, counter=counter)
        return store.install(open_source(folder))

    return add


def activate(store: Store, installed: Installed) -> None:
    """Switch and let it work."""
    store.activate(installed.name, test=False)
    store.healthy(installed.name)


def state(store: Store) -> dict[str, str]:
    """What is said of each bundle, by the text of its graph."""
    words = ("active", "previous", "failed")
    return {
        (each.path / "model.onnx").read_text(): " ".join(word for word in words if getattr(each, word))
        for each in store.list()
    }


def test_a_store_that_nobody_used(store: Store) -> None:
    assert store.list() == ()
    assert store.active() is None
    assert store.active_path() is None
    assert store.starting() is None
    assert not store.folder.exists()


def test_what_is_installed_is_listed_and_verifies(store: Store, add: Callable[..., Installed]) -> None:
    installed = add("one", counter=3)
    assert store.list() == (installed,)
    assert (installed.model, installed.counter, installed.signed_by) == ("tiny", 3, None)
    assert installed.size_bytes == sum(entry.size for entry in verify_bundle(installed.path).files)
    assert store.verify(installed.name) == installed
    assert json.loads(json.dumps(installed.describe()))["name"] == installed.name
    assert store.active() is None


def test_the_same_bundle_twice_is_one(store: Store, add: Callable[..., Installed], tmp_path: Path) -> None:
    first = add("one")
    assert store.install(open_source(tmp_path / "sources" / "tiny-one-0")) == first
    assert store.list() == (first,)


def test_a_bundle_is_found_by_its_models_name_where_that_is_enough(store: Store, add: Callable[..., Installed]) -> None:
    one, other = add("one"), add("other", name="large")
    assert store.find("large") == other
    two = add("two")
    with pytest.raises(StoreError, match="there are 2 bundles of tiny") as caught:
        store.find("tiny")
    assert one.name in caught.value.hint
    assert store.find(two.name) == two
    with pytest.raises(BundleNotFoundError, match="there is no bundle nothing"):
        store.find("nothing")


class TestSwitching:
    def test_there_and_back(self, store: Store, add: Callable[..., Installed]) -> None:
        activate(store, add("one"))
        activate(store, add("two"))
        assert state(store) == {"one": "previous", "two": "active"}
        assert store.rollback().active
        assert state(store) == {"one": "active", "two": "previous"}, "it may not work any more"
        assert store.rollback().active
        assert state(store) == {"one": "", "two": "active"}, "one has not shown that it still works"
        with pytest.raises(StoreError, match="no bundle to go back to"):
            store.rollback()

    def test_going_back_skips_what_never_worked(self, store: Store, add: Callable[..., Installed]) -> None:
        activate(store, add("one"))
        store.activate(add("two").name, test=False)
        activate(store, add("three"))
        assert state(store) == {"one": "previous", "two": "", "three": "active"}

    def test_to_what_is_active_already(self, store: Store, add: Callable[..., Installed]) -> None:
        activate(store, add("one"))
        before = (store.folder / "state.json").read_bytes()
        store.activate("tiny", test=False)
        assert (store.folder / "state.json").read_bytes() == before

    @pytest.mark.parametrize("change", ["bit", "missing", "extra"])
    def test_a_damaged_bundle_does_not_become_active(
        self, store: Store, add: Callable[..., Installed], change: str
    ) -> None:
        activate(store, add("one"))
        two = add("two")
        match change:
            case "bit":
                content = bytearray((two.path / WEIGHTS).read_bytes())
                content[5000] ^= 1
                (two.path / WEIGHTS).unlink()  # it is shared with the other bundle
                (two.path / WEIGHTS).write_bytes(content)
            case "missing":
                (two.path / WEIGHTS).unlink()
            case "extra":
                (two.path / "more").touch()
        with pytest.raises(BundleError):
            store.activate(two.name, test=False)
        assert state(store)["one"] == "active"

    def test_a_gate_that_is_not_passed(self, store: Store, add: Callable[..., Installed]) -> None:
        activate(store, add("one"))
        seen = []

        def gate(installed: Installed) -> None:
            seen.append(installed.name)
            raise StoreError("it scores 0.4, and 0.6 is required")

        two = add("two")
        with pytest.raises(StoreError, match="is required"):
            store.activate(two.name, test=False, gates=[gate])
        assert seen == [two.name]
        assert state(store) == {"one": "active", "two": ""}

    def test_a_bundle_that_does_not_load_fails_the_self_test(self, store: Store, add: Callable[..., Installed]) -> None:
        """It verifies, but there is no model in it."""
        activate(store, add("one"))
        with pytest.raises(StoreError, match="the self-test of tiny failed") as caught:
            store.activate(add("two").name)
        assert "stays so" in caught.value.hint
        assert state(store) == {"one": "active", "two": ""}


class TestTrial:
    def test_one_that_ends_too_often_is_left(self, store: Store, add: Callable[..., Installed]) -> None:
        activate(store, add("one"))
        store.activate(add("two").name, test=False)
        for _ in range(3):
            installed = store.starting()
            assert installed is not None
            assert (installed.path / "model.onnx").read_text() == "two"
        installed = store.starting()
        assert installed is not None
        assert (installed.path / "model.onnx").read_text() == "one"
        assert state(store) == {"one": "active", "two": "failed"}

    def test_one_that_worked_may_end_as_often_as_it_likes(self, store: Store, add: Callable[..., Installed]) -> None:
        activate(store, add("one"))
        activate(store, add("two"))
        before = (store.folder / "state.json").stat().st_mtime_ns
        for _ in range(9):
            store.starting()
        assert state(store) == {"one": "previous", "two": "active"}
        assert (store.folder / "state.json").stat().st_mtime_ns == before, "a start without a trial writes nothing"

    def test_a_start_that_was_ended_on_purpose_does_not_count(
        self, store: Store, add: Callable[..., Installed]
    ) -> None:
        activate(store, add("one"))
        two = store.activate(add("two").name, test=False)
        for _ in range(9):
            store.starting()
            store.stopped(two.name)
        assert state(store)["two"] == "active"

    def test_the_first_bundle_stays_as_there_is_no_other(self, store: Store, add: Callable[..., Installed]) -> None:
        one = store.activate(add("one").name, test=False)
        for _ in range(9):
            assert store.starting() == one
        assert store.failed(one.name) is None

    def test_one_that_does_not_work_is_left_at_once(self, store: Store, add: Callable[..., Installed]) -> None:
        one = add("one")
        activate(store, one)
        two = store.activate(add("two").name, test=False)
        instead = store.failed(two.name)
        assert instead is not None
        assert instead.name == one.name
        assert state(store) == {"one": "active", "two": "failed"}
        assert store.failed(two.name) == instead, "it is told of once more, and nothing changes"
        activate(store, two)
        assert state(store) == {"one": "previous", "two": "active"}

    def test_nothing_is_said_of_a_bundle_that_is_not_active(self, store: Store, add: Callable[..., Installed]) -> None:
        one = add("one")
        store.activate(one.name, test=False)
        two = store.activate(add("two").name, test=False)
        store.healthy(one.name)
        store.stopped(one.name)
        assert store.starting() == two
        assert json.loads((store.folder / "state.json").read_text())["starts"] == 1


class TestCounters:
    def test_a_lower_one_is_refused_once_a_higher_one_has_worked(
        self, store: Store, add: Callable[..., Installed]
    ) -> None:
        old = add("old", counter=3)
        new = add("new", counter=5)
        activate(store, old)
        store.activate(new.name, test=False)
        store.activate(old.name, test=False)  # the new one has not worked yet
        activate(store, new)
        for step in (lambda: store.activate(old.name, test=False), store.rollback, lambda: add("older", counter=4)):
            with pytest.raises(StoreError, match="is older than one with 5 that worked here"):
                step()
        assert state(store)["new"] == "active"
        assert store.activate(old.name, test=False, allow_downgrade=True).active

    def test_models_of_other_names_count_for_themselves(self, store: Store, add: Callable[..., Installed]) -> None:
        activate(store, add("one", counter=9))
        activate(store, add("two", name="large", counter=1))
        assert store.rollback().counter == 9

    def test_a_damaged_bundle_does_not_bring_an_older_one_back(
        self, store: Store, add: Callable[..., Installed]
    ) -> None:
        """Else whoever can damage a file could."""
        activate(store, add("old", counter=1))
        new = add("new", counter=2)
        activate(store, new)
        assert store.failed(new.name) is None
        assert state(store)["new"] == "active"


class TestRemoval:
    def test_of_what_is_not_in_use(self, store: Store, add: Callable[..., Installed]) -> None:
        activate(store, add("one"))
        two = add("two")
        store.remove(two.name)
        assert state(store) == {"one": "active"}
        assert [path.name for path in (store.folder / "bundles").iterdir()] == [store.list()[0].name]
        assert store.verify("tiny")

    def test_of_what_is_in_use(self, store: Store, add: Callable[..., Installed]) -> None:
        one = add("one")
        activate(store, one)
        two = store.activate(add("two").name, test=False)
        for name, why in ((one.name, "may be gone back to"), (two.name, "is active")):
            with pytest.raises(StoreError, match=why):
                store.remove(name)
        store.healthy(two.name)
        store.remove(one.name)
        assert state(store) == {"two": "active"}
        with pytest.raises(StoreError, match="no bundle to go back to"):
            store.rollback()

    def test_of_what_is_being_served(self, store: Store, add: Callable[..., Installed]) -> None:
        one, two = add("one"), add("two")
        activate(store, one)
        with store.serving(two):
            with pytest.raises(UnavailableError, match="is being served"):
                store.remove(two.name)
            assert store.gc() == ()
        assert store.gc() == (two.name,)

    def test_gc_keeps_what_is_needed(self, store: Store, add: Callable[..., Installed]) -> None:
        for text in ("one", "two", "three"):
            activate(store, add(text))
        (store.folder / "bundles" / ".tiny@0.partial").mkdir()
        (store.folder / "bundles" / ".tiny@0.part").touch()
        gone = [each.name for each in store.list() if (each.path / "model.onnx").read_text() == "one"]
        assert list(store.gc()) == gone
        assert state(store) == {"two": "previous", "three": "active"}
        assert len(list((store.folder / "bundles").iterdir())) == 2


class TestTrust:
    @pytest.fixture
    def trusting(self, tmp_path: Path) -> Store:
        make_keys(tmp_path / "keys", "plant")
        return Store(tmp_path / "store", trust=Trust(tmp_path / "keys"))

    def test_signed_bundles_say_by_whom(self, trusting: Store, tmp_path: Path) -> None:
        source = write_bundle(tmp_path / "signed")
        sign_bundle(source, PrivateKey.load(tmp_path / "keys" / "plant.key"))
        assert trusting.install(open_source(source)).signed_by == "plant"
        assert trusting.activate("tiny", test=False).signed_by == "plant"
        assert Store(trusting.folder).list()[0].signed_by is None, "nobody is trusted there"

    def test_unsigned_ones_are_not_copied(self, trusting: Store, tmp_path: Path) -> None:
        with pytest.raises(SignatureError, match="is not signed"):
            trusting.install(open_source(write_bundle(tmp_path / "unsigned")))
        assert trusting.list() == ()

    def test_unsigned_ones_from_before_are_not_activated(
        self, trusting: Store, store: Store, add: Callable[..., Installed]
    ) -> None:
        one, two = add("one"), add("two")
        activate(store, one)
        activate(store, two)
        assert [each.signed_by for each in trusting.list()] == [None, None]
        for step in (trusting.rollback, lambda: trusting.activate(one.name), lambda: trusting.verify(two.name)):
            with pytest.raises(SignatureError, match="is not signed"):
                step()
        assert trusting.failed(two.name) is None

    def test_a_signature_that_comes_later(self, trusting: Store, store: Store, tmp_path: Path) -> None:
        source = write_bundle(tmp_path / "bundle")
        store.install(open_source(source))
        sign_bundle(source, PrivateKey.load(tmp_path / "keys" / "plant.key"))
        assert trusting.install(open_source(source)).signed_by == "plant"
        assert len(trusting.list()) == 1


class TestTheFolder:
    def test_one_command_at_a_time(self, store: Store, add: Callable[..., Installed]) -> None:
        refused = []

        def gate(_: Installed) -> None:
            with pytest.raises(UnavailableError, match="another command works on the model store"):
                Store(store.folder).gc()
            refused.append(Store(store.folder).starting())  # a server does not wait for commands

        store.activate(add("one").name, test=False, gates=[gate])
        assert refused == [None]

    def test_others_must_not_write_to_it(self, store: Store, add: Callable[..., Installed]) -> None:
        add("one")
        store.folder.chmod(0o777)
        with pytest.raises(ConfigError, match="others may write"):
            store.gc()

    def test_a_damaged_state(self, store: Store, add: Callable[..., Installed]) -> None:
        activate(store, add("one"))
        for text in ("", "{}x", '{"active": "../../etc"}', '{"schema_version": 2}'):
            (store.folder / "state.json").write_text(text)
            with pytest.raises(StoreError, match="is damaged") as caught:
                store.starting()
            assert str(store.folder / "state.json") in caught.value.hint

    @pytest.mark.parametrize("step", ["starting", "failed", "healthy"])
    def test_a_server_goes_on_where_the_disk_refuses(
        self, store: Store, add: Callable[..., Installed], step: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        activate(store, add("one"))
        two = store.activate(add("two").name, test=False)

        def full(*_: object) -> None:
            raise OSError(28, os.strerror(28))

        monkeypatch.setattr("edge.store.state.replace_durably", full)
        match step:
            case "starting":
                assert store.starting() == two
            case "failed":
                instead = store.failed(two.name)
                assert instead is not None
                assert (instead.path / "model.onnx").read_text() == "one"
            case "healthy":
                store.healthy(two.name)
        assert state(store) == {"one": "previous", "two": "active"}, "nothing was written"

    def test_a_bundle_that_lost_its_manifest_is_left_out(self, store: Store, add: Callable[..., Installed]) -> None:
        add("one")
        two = add("two")
        (two.path / MANIFEST).unlink()
        assert list(state(store)) == ["one"]
        assert two.name in store.gc()


class TestWatching:
    def test_every_byte_is_shown(self, store: Store, tmp_path: Path) -> None:
        source = write_bundle(tmp_path / "bundle")
        size = sum(len(content) for content in FILES.values())
        shown: dict[str, int] = {}

        def watch(label: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
            assert total == size
            shown[label] = 0

            def progress(count: int) -> None:
                shown[label] += count

            return nullcontext(progress)

        installed = store.install(open_source(source), watch=watch)
        store.verify(installed.name, watch=watch)
        assert shown == {"installing": size, "verifying": size}


def test_a_stick_with_several_bundles(tmp_path: Path) -> None:
    stick = tmp_path / "stick"
    for name in ("b", "a"):
        write_bundle(stick / name)
    (stick / "photos").mkdir()
    (stick / "c.tar").touch()
    (stick / ".Trash").mkdir()
    shutil.copytree(stick / "a", stick / ".Trash" / "old")
    assert [path.name for path in find_sources(stick)] == ["a", "b", "c.tar"]
    assert find_sources(stick / "a") == (stick / "a",)
    assert not (stick / "a" / SIGNATURE).exists()
