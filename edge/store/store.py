"""The store: a folder of bundles, the state that says which is active, and what may be done to them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from edge.bundle import MANIFEST, Manifest, Progress, parse_manifest, read_manifest, verify_bundle
from edge.errors import BundleError, BundleNotFoundError, StoreError, UnavailableError
from edge.store.copying import copy_bundle
from edge.store.disk import discard, disk_errors, in_use, locked, make_folder
from edge.store.installed import Installed
from edge.store.self_test import self_test
from edge.store.source import Source
from edge.store.state import MAX_STARTS, State, StateFile

if TYPE_CHECKING:  # this brings the cryptography
    from edge.signing import Trust

log = logging.getLogger(__name__)

Gate = Callable[[Installed], None]
"""What a bundle must pass before it is switched to; raises a QwedgeError where it does not."""
Watch = Callable[[str, int], AbstractContextManager[Progress | None]]
"""Shows a long step: called with its name and its bytes, gives what is called with bytes done."""


def unwatched(_label: str, _total: int) -> AbstractContextManager[None]:
    """Shows nothing."""
    return nullcontext()


class Store:
    """A model store; nothing is read or written before a method is called.

    Commands that change bundles (install, activate, rollback, remove, gc) run one at a time, whichever process they
    come from. What a server calls (starting, failed, healthy, stopped) does not wait for them.

    Args:
        folder: where the bundles are.
        trust: the keys of which one must have signed a bundle; None = signatures are not looked at.
    """

    def __init__(self, folder: Path, *, trust: Trust | None = None) -> None:
        self.folder = folder
        self.trust = trust
        self._bundles = folder / "bundles"
        self._state = StateFile(folder)

    def list(self) -> tuple[Installed, ...]:
        """The installed bundles, by name; one whose manifest cannot be read is left out.

        Raises:
            StoreError: the store cannot be read.
        """
        state = self._read_state()
        with disk_errors(self.folder):
            names = sorted(path.name for path in self._bundles.iterdir()) if self._bundles.exists() else []
        found = []
        for name in names:
            try:
                if not name.startswith("."):
                    found.append(self._look(name, state))
            except BundleError as error:
                log.warning("%s", error)
        return tuple(found)

    def active_path(self) -> Path | None:
        """The folder of what the next start serves, without a look at it; None where nothing was activated.

        Raises:
            StoreError: the store cannot be read.
        """
        active = self._read_state().active
        return None if active is None else self._bundles / active

    def active(self) -> Installed | None:
        """What the next start serves; None where nothing was activated.

        Raises:
            StoreError: the store cannot be read.
            BundleError: the bundle's manifest cannot be read.
        """
        state = self._read_state()
        return self._look(state.active, state) if state.active is not None else None

    def find(self, name: str) -> Installed:
        """A bundle by its name in the store, or by its model's name where only one has that.

        Raises:
            StoreError: there are several.
            BundleNotFoundError: there is none.
        """
        bundles = self.list()
        found = [each for each in bundles if each.name == name] or [each for each in bundles if each.model == name]
        if len(found) == 1:
            return found[0]
        names = ", ".join(each.name for each in found or bundles)
        if found:
            raise StoreError(f"there are {len(found)} bundles of {name}", hint=f"choose one: {names}")
        hint = f"there are {names}" if names else "qwedge install BUNDLE"
        raise BundleNotFoundError(f"there is no bundle {name}", hint=hint)

    def verify(self, name: str, *, watch: Watch = unwatched) -> Installed:
        """Check signature and every file of a bundle.

        Raises:
            StoreError: there is no such bundle.
            BundleError: it is damaged, or no trusted key signed it.
        """
        installed = self.find(name)
        with watch("verifying", installed.size_bytes) as progress:
            verify_bundle(installed.path, trust=self.trust, progress=progress)
        return installed

    def install(self, source: Source, *, watch: Watch = unwatched, allow_downgrade: bool = False) -> Installed:
        """Copy a bundle into the store; what is active does not change.

        An interrupted copy goes on where it stopped. Files that another installed bundle has too are linked.

        Args:
            source: where it lies.
            watch: shows the copy.
            allow_downgrade: also a bundle with a lower counter than one of its name that has worked here.

        Raises:
            BundleError: the source is no bundle, damaged, or no trusted key signed it.
            StoreError: its counter is too low, there is no room, or the disk refused.
            UnavailableError: another command works on the store.
        """
        if self.trust is not None:
            self.trust.check(source.manifest, source.signature, str(source.path))
        manifest = parse_manifest(source.manifest, source.path / MANIFEST)
        name = f"{manifest.name}@{sha256(source.manifest).hexdigest()[:12]}"
        with self._working():
            state = self._read_state()
            _check_counter(manifest, state, allow_downgrade=allow_downgrade)
            with watch("installing", sum(entry.size for entry in manifest.files)) as progress:
                copy_bundle(source, manifest, self._bundles / name, progress)
            return self._look(name, state)

    def activate(
        self,
        name: str,
        *,
        gates: Sequence[Gate] = (),
        test: bool = True,
        allow_downgrade: bool = False,
        watch: Watch = unwatched,
    ) -> Installed:
        """Switch to a bundle once it has been verified and tested; the next start serves it, on trial at first.

        Args:
            name: as for :meth:`find`.
            gates: what it must pass besides.
            test: whether a process loads it and generates a few tokens first.
            allow_downgrade: as for :meth:`install`.
            watch: shows the verification.

        Raises:
            StoreError: there is no such bundle, its counter is too low, or the self-test failed.
            BundleError: it is damaged, or no trusted key signed it.
            UnavailableError: another command works on the store.
        """
        with self._working():
            installed = self._admit(self.find(name), allow_downgrade=allow_downgrade, watch=watch)
            if installed.active:
                return installed
            if test:
                self_test(installed.path)
            for gate in gates:
                gate(installed)
            return self._look(installed.name, self._state.change(lambda state: state.switched_to(installed.name)))

    def rollback(self, *, allow_downgrade: bool = False, watch: Watch = unwatched) -> Installed:
        """Make the bundle active again that was before; the one that is active stays installed.

        Args:
            allow_downgrade: as for :meth:`install`.
            watch: shows the verification.

        Raises:
            StoreError: there is none before, or its counter is too low.
            BundleError: it is damaged, or no trusted key signed it.
            UnavailableError: another command works on the store.
        """
        with self._working():
            previous = self._read_state().previous
            if previous is None:
                raise StoreError("there is no bundle to go back to", hint="qwedge list shows what can be activated")
            self._admit(self.find(previous), allow_downgrade=allow_downgrade, watch=watch)
            state = self._state.change(
                lambda state: state.switched_to(previous) if state.previous == previous else state
            )
            return self._look(previous, state)

    def remove(self, name: str) -> None:
        """Remove a bundle.

        Raises:
            StoreError: there is no such bundle, it is active, or the active one may have to go back to it.
            UnavailableError: it is being served, or another command works on the store.
        """
        with self._working():
            installed = self.find(name)
            if installed.active:
                raise StoreError(f"{installed.name} is active", hint="activate another one first")
            if installed.previous and self._read_state().starts is not None:
                hint = "the active bundle has not shown yet that it works; try again when it has"
                raise StoreError(f"{installed.name} may be gone back to", hint=hint)
            with in_use(installed.path, alone=True) as free:
                if not free:
                    raise UnavailableError(f"{installed.name} is being served", hint="restart the server first")
                self._state.change(lambda state: state.without(installed.name))
                discard(installed.path)

    def gc(self) -> tuple[str, ...]:
        """Remove what is neither active nor where to go back to nor being served, and what interrupted copies left.

        Returns:
            The names of the removed bundles.

        Raises:
            StoreError: the disk refused.
            UnavailableError: another command works on the store.
        """
        removed = []
        with self._working():
            state = self._read_state()
            for path in sorted(self._bundles.iterdir()):
                if path.name in {state.active, state.previous}:
                    continue
                with in_use(path, alone=True) as free:
                    if free:
                        discard(path)
                        removed.append(path.name)
        return tuple(name for name in removed if not name.startswith("."))

    def starting(self) -> Installed | None:
        """What to load now; None where nothing was activated. A bundle on trial that has ended too often is left.

        Raises:
            StoreError: the store cannot be read.
            BundleError: the bundle's manifest cannot be read.
        """
        before = self._read_state().active
        if before is None:
            return None
        state = self._change_if_possible(State.started)
        assert state.active is not None
        if state.active != before:
            log.error("%s ended %d times before it had worked: back to %s", before, MAX_STARTS, state.active)
        return self._look(state.active, state)

    def failed(self, name: str) -> Installed | None:
        """A bundle that was loaded, or should have been, does not work: go back to the one before.

        Returns:
            What to load instead; None where there is nothing else, or its counter is too low.

        Raises:
            StoreError: the store cannot be read.
            BundleError: the manifest of the bundle before cannot be read.
        """

        def give_up(state: State) -> State:
            return state.given_up() if state.active == name and self._may_go_back(state) else state

        active = self._change_if_possible(give_up).active
        if active is None or active == name:
            return None
        log.error("%s does not work: back to %s", name, active)
        return self._look(active, self._read_state())

    def healthy(self, name: str) -> None:
        """A bundle works: its trial is over, and lower counters of its model's name are refused from now on.

        Raises:
            StoreError: the store cannot be read.
            BundleError: the bundle's manifest cannot be read.
        """
        manifest = read_manifest(self._bundles / name)
        self._change_if_possible(
            lambda state: state.proven(manifest.name, manifest.counter) if state.active == name else state
        )

    def stopped(self, name: str) -> None:
        """The server ends because it was asked to: on trial, its start does not count.

        Raises:
            StoreError: the store cannot be read.
        """
        self._change_if_possible(lambda state: state.stopped() if state.active == name else state)

    @contextmanager
    def serving(self, installed: Installed) -> Iterator[None]:
        """Keep a bundle from being removed until the block ends."""
        with disk_errors(self.folder), in_use(installed.path):
            yield

    def _admit(self, installed: Installed, *, allow_downgrade: bool, watch: Watch) -> Installed:
        """Check what must hold of a bundle before it may become active."""
        manifest = read_manifest(installed.path, trust=self.trust)
        _check_counter(manifest, self._read_state(), allow_downgrade=allow_downgrade)
        return self.verify(installed.name, watch=watch)

    def _may_go_back(self, state: State) -> bool:
        if state.previous is None:
            return False
        try:
            _check_counter(read_manifest(self._bundles / state.previous, trust=self.trust), state)
        except (BundleError, StoreError) as error:
            log.warning("%s", error)
            return False
        return True

    def _look(self, name: str, state: State) -> Installed:
        return Installed.read(self._bundles / name, state, self.trust)

    def _read_state(self) -> State:
        with disk_errors(self.folder):
            return self._state.read()

    def _change_if_possible(self, step: Callable[[State], State]) -> State:
        """What a server must know goes on without the disk: where that refuses, only this process takes the step."""
        try:
            return self._state.change(step)
        except OSError as error:
            log.warning("%s cannot be written: %s", self.folder, error.strerror)
            return step(self._read_state())

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Keep other commands that change bundles out."""
        with disk_errors(self.folder):
            make_folder(self.folder)
            make_folder(self._bundles)
            with locked(self.folder / "lock", wait=False) as alone:
                if not alone:
                    hint = "wait until it has ended"
                    raise UnavailableError(f"another command works on the model store {self.folder}", hint=hint)
                yield


def _check_counter(manifest: Manifest, state: State, *, allow_downgrade: bool = False) -> None:
    """Refuse what would bring back a bundle from before one that has worked here."""
    lowest = state.counters.get(manifest.name, 0)
    if manifest.counter < lowest and not allow_downgrade:
        hint = "--allow-downgrade takes it nevertheless, with the faults that were repaired since"
        raise StoreError(
            f"{manifest.name} with the counter {manifest.counter} is older than one with {lowest} that worked here",
            hint=hint,
        )
