"""Prefixes on disk, so that a restart does not forget them (docs/operations.md).

The store keeps the token ids of its files in memory, reads keys and values when a prompt needs them, and writes in a
thread of its own. Nothing here raises once the store is open: without a disk that works there are fewer hits, that is
all. What a file holds is used only if this device wrote it (HMAC-SHA256, with a key that never leaves the folder) for
exactly this model.

Writing wears flash out, so a beginning is written only where it spares :data:`MIN_STORED_TOKENS` more tokens of prefill
than what is on disk already. :class:`edge.engine.prefix_cache.PrefixCache` decides which beginnings those are.
"""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge.engine.prefix import Prefix, begins_with, common_length, longest_match, owners, suits
from edge.engine.prefix_file import Head, UnusableError, can_hold, read_arrays, write_prefix
from edge.engine.private_folder import NotPlainError, PrivateFolder
from edge.errors import QwedgeError

log = logging.getLogger(__name__)

MIN_STORED_TOKENS = 256
"""Prefilling fewer takes about as long as a slow disk takes to read them."""
MAX_FILES = 256
"""Every look-up compares a prompt with all of them; with real models the budget is reached first."""
MAX_QUEUED = 2
"""Prefixes that wait to be written; each holds its memory meanwhile. One more is dropped."""
_KEY = "key"
_SUFFIX = ".prefix"


@dataclass(frozen=True)
class StoreStats:
    """What a store has done since it was opened."""

    num_files: int
    num_bytes: int
    """On disk."""
    num_loaded: int
    """Prefixes read and used."""
    num_written: int
    num_dropped: int
    """Not written: too many were waiting, or the disk refused."""
    num_unusable: int
    """Files that were damaged, changed, or another model's or device's."""
    num_failures: int
    """Reads that failed for want of memory or by the disk's fault."""
    read_only: bool


@dataclass(frozen=True)
class StoredPrefix:
    """A file of the store."""

    name: str
    head: Head


@dataclass(frozen=True)
class _Job:
    prefix: Prefix
    head: Head


class PrefixStore:
    """The files of one folder; made by :meth:`open`. The engine's thread and the writer's use it at the same time.

    Args:
        folder: open; the store closes it.
        key: authenticates files.
        model: describes model, cache layout and runtime; entries of any other description are removed.
        budget_bytes: most bytes of all files; the least recently used go first.
    """

    def __init__(self, folder: PrivateFolder, key: bytes, model: bytes, budget_bytes: int) -> None:
        self._folder = folder
        self._key = key
        self._binding = self._digest(b"model", model)
        self._budget = budget_bytes
        self._changed = threading.Condition()
        self._files: OrderedDict[str, StoredPrefix] = OrderedDict()  # least recently used first; guarded by _changed
        self._jobs: deque[_Job] = deque()  # the first is being written; guarded by _changed
        self._used: set[str] = set()  # files whose time of last use is not on disk yet; guarded by _changed
        self._closing = False  # guarded by _changed
        self._read_only = folder.read_only
        self._num_bytes = self._num_loaded = self._num_written = 0
        self._num_dropped = self._num_unusable = self._num_failures = 0
        self._writer = threading.Thread(target=self._write_all, name="prefix-store", daemon=True)

    @classmethod
    def open(cls, path: Path, budget_bytes: int, model: bytes) -> PrefixStore | None:
        """Open a folder, and make it where it is missing; None, with a line in the log, where that is not possible.

        Args:
            path: the folder.
            budget_bytes: as for the class.
            model: as for the class.
        """
        try:
            folder = PrivateFolder.open(path)
        except (QwedgeError, OSError) as error:
            log.warning("prefixes are not kept on disk: %s", error)
            return None
        try:
            store = cls(folder, folder.secret(_KEY), model, budget_bytes)
            store._index()
        except OSError as error:
            log.warning("prefixes are not kept on disk: %s", error)
            folder.close()
            return None
        if folder.read_only:
            log.warning("%s is read-only: prefixes are read from it, and none are added", path)
        log.info("%s holds %d prefix(es) of earlier runs", path, store.stats().num_files)
        store._writer.start()
        return store

    def longest(self, identity: str, ids: NDArray[np.int64]) -> tuple[StoredPrefix, int] | None:
        """The file that can stand for the most tokens of the prompt ``ids`` [n], and for how many. That is a use."""
        owners = self._owners(identity)
        with self._changed:
            usable = (
                (stored, stored.head.ids)
                for stored in reversed(self._files.values())
                if stored.head.owner in owners and suits(stored.head.ids, ids, is_whole=stored.head.is_whole)
            )
            best = longest_match(usable, ids)
            if best is not None:
                self._files.move_to_end(best[0].name)
                self._used.add(best[0].name)
        return best

    def load(self, stored: StoredPrefix, identity: str) -> Prefix | None:
        """Read a file that :meth:`longest` found for ``identity``.

        None if there is no file, memory or disk for it; then it is not found again either.
        """
        try:
            with self._folder.read(stored.name) as file:
                cache, state = read_arrays(file, stored.head, self._key)
            ids = stored.head.ids.astype(np.int64)
        except (UnusableError, NotPlainError):
            self._num_unusable += 1
            log.warning("removed %s from %s: it is damaged or was changed", stored.name, self._folder.path)
            self._remove(stored)
        except FileNotFoundError:
            self._forget(stored)  # the writer needed the room meanwhile, or somebody tidied up
        except (OSError, MemoryError) as error:
            self._num_failures += 1
            if self._num_failures == 1:
                log.warning("cannot read a prefix from %s: %s", self._folder.path, error or "out of memory")
            self._forget(stored)
        else:
            self._num_loaded += 1
            owner = next(each for each in owners(identity) if stored.head.owner == self._owner(each))
            return Prefix(owner, ids, cache, state)
        return None

    def save(self, prefix: Prefix, length: int) -> None:
        """Write the first ``length`` tokens of a prefix in the background, if that is worth a write."""
        with self._changed:
            if self._closing or not self._is_news(prefix, length):
                return
            if len(self._jobs) >= MAX_QUEUED:
                self._num_dropped += 1
                return
            self._jobs.append(_Job(prefix, self._head(prefix, length)))
            self._changed.notify_all()

    def close(self, prefixes: Iterable[Prefix], timeout_s: float) -> None:
        """Write what waits and then ``prefixes``, as far as there is time, and let go of the folder.

        Args:
            prefixes: the most important first.
            timeout_s: what is not being written by then is not written at all.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._writer.join(timeout_s)
        if self._writer.is_alive():
            log.warning("%s is too slow: some prefixes are not kept", self._folder.path)
            return  # the writer still uses the folder, which ends with the process
        for prefix in prefixes:
            if time.monotonic() < deadline and self._is_news(prefix, len(prefix.ids)):
                self._write(_Job(prefix, self._head(prefix, len(prefix.ids))))
        self._touch_used()
        self._folder.close()
        log.info(
            "%s holds %d prefix(es); %d read, %d written, %d not written, %d unusable, %d failures", *self._summary()
        )

    def stats(self) -> StoreStats:
        """The figures right now."""
        with self._changed:
            return StoreStats(
                num_files=len(self._files),
                num_bytes=self._num_bytes,
                num_loaded=self._num_loaded,
                num_written=self._num_written,
                num_dropped=self._num_dropped,
                num_unusable=self._num_unusable,
                num_failures=self._num_failures,
                read_only=self._read_only,
            )

    def _summary(self) -> tuple[object, ...]:
        now = self.stats()
        done = (now.num_loaded, now.num_written, now.num_dropped, now.num_unusable, now.num_failures)
        return self._folder.path, now.num_files, *done

    def _is_news(self, prefix: Prefix, length: int) -> bool:
        """Whether that much of a prefix is worth a write, beside what is on disk or waits for it."""
        if self._read_only or length < MIN_STORED_TOKENS or not can_hold(prefix.cache):
            return False
        owners, ids = self._owners(prefix.identity), prefix.ids[:length]
        heads = [stored.head for stored in self._files.values()] + [job.head for job in self._jobs]
        # What has a state spares nothing to a prompt that goes on in another way.
        mine = (
            head.ids for head in heads if head.owner in owners and (not head.is_whole or begins_with(ids, head.ids))
        )
        known = (common_length(its_ids, ids) for its_ids in mine)
        return length - max(known, default=0) >= MIN_STORED_TOKENS

    def _head(self, prefix: Prefix, length: int) -> Head:
        layers, heads, _, head_dim = prefix.cache.shape
        shape = (layers, heads, length, head_dim)
        ids = prefix.ids[:length].astype(np.int32)
        state_size = 0 if prefix.state is None else prefix.state.size
        return Head(self._binding, self._owner(prefix.identity), ids, prefix.cache.dtype, shape, state_size)

    def _write_all(self) -> None:
        """The writer's thread."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closing)
                if not self._jobs:
                    return
                job = self._jobs[0]
            self._write(job)
            with self._changed:
                self._jobs.popleft()

    def _write(self, job: _Job) -> None:
        if self._read_only or job.head.file_size > self._budget:
            self._num_dropped += 1
            return
        self._make_room(job.head.file_size)
        stored = StoredPrefix(secrets.token_hex(16) + _SUFFIX, job.head)
        fill = partial(write_prefix, head=job.head, cache=job.prefix.cache, state=job.prefix.state, key=self._key)
        try:
            self._folder.write(stored.name, fill)
        except MemoryError:
            self._num_dropped += 1
        except OSError as error:
            self._num_dropped += 1
            self._read_only = True
            log.warning("%s takes no more prefixes until a restart: %s", self._folder.path, error)
        else:
            self._num_written += 1
            self._add(stored)
            self._remove_extended(stored)

    def _make_room(self, size: int) -> None:
        """Remove the least recently used files until one of ``size`` bytes fits."""
        with self._changed:
            oldest = iter(list(self._files.values()))
            while self._files and (self._num_bytes + size > self._budget or len(self._files) >= MAX_FILES):
                self._remove(next(oldest))

    def _remove_extended(self, newest: StoredPrefix) -> None:
        """Remove the files whose tokens are the beginning of the newest one's, unless they are of use by themselves."""
        if newest.head.is_whole:
            return
        with self._changed:
            for stored in list(self._files.values()):
                same = stored is not newest and stored.head.owner == newest.head.owner
                if same and begins_with(newest.head.ids, stored.head.ids):
                    self._remove(stored)

    def _index(self) -> None:
        """Take stock of the folder: the oldest first, as far as the budget goes; the rest is removed."""
        found: list[tuple[int, StoredPrefix]] = []
        for name in self._folder.names(_SUFFIX):
            try:
                with self._folder.read(name) as file:
                    stored = StoredPrefix(name, Head.read(file, self._binding))
                    found.append((os.fstat(file.fileno()).st_mtime_ns, stored))
            except (UnusableError, NotPlainError):
                self._num_unusable += 1
                self._folder.remove(name)
            except OSError:
                self._num_failures += 1
        if self._num_unusable:
            reason = "damaged, or made by another model, version or device"
            log.warning("removed %d file(s) from %s: %s", self._num_unusable, self._folder.path, reason)
        for _, stored in sorted(found, key=lambda pair: pair[0]):
            self._add(stored)
        self._make_room(0)

    def _touch_used(self) -> None:
        """Put the times of last use on disk, one write each, so that a restart knows what is oldest."""
        now = time.time_ns()
        for rank, name in enumerate(self._files):
            if name in self._used:
                self._folder.touch(name, now + rank)

    def _add(self, stored: StoredPrefix) -> None:
        with self._changed:
            self._files[stored.name] = stored
            self._num_bytes += stored.head.file_size

    def _forget(self, stored: StoredPrefix) -> None:
        with self._changed:
            if self._files.pop(stored.name, None):
                self._num_bytes -= stored.head.file_size

    def _remove(self, stored: StoredPrefix) -> None:
        self._forget(stored)
        self._folder.remove(stored.name)

    def _owners(self, identity: str) -> tuple[bytes, bytes]:
        own, everyones = owners(identity)
        return self._owner(own), self._owner(everyones)

    def _owner(self, identity: str) -> bytes:
        return self._digest(b"identity", identity.encode())

    def _digest(self, purpose: bytes, value: bytes) -> bytes:
        return hmac.digest(self._key, purpose + b"\0" + value, "sha256")
