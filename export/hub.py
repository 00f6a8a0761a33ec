"""Model repositories on a Hugging Face hub: data files only, never code, into a cache of qwedge's own.

``huggingface_hub`` resumes broken downloads and keeps each commit's files in a folder; it may retry for minutes when a
network swallows packets, so :meth:`Hub.answers` asks first.
"""

from __future__ import annotations

import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils.tqdm import tqdm

from edge.errors import CheckpointError
from export.files import DAMAGED, sha256_file
from export.progress import Progress, step

PROBE_TIMEOUT_S = 3.0
FOLDER_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt")
"""What is taken from a repository, from its top folder: nothing that could run."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_API_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Snapshot:
    """Files of one commit of a repository."""

    folder: Path
    revision: str


@dataclass(frozen=True)
class Hub:
    """One hub and the cache folder for it."""

    cache: Path
    endpoint: str = constants.ENDPOINT

    def answers(self) -> bool:
        """Whether the hub answers within :data:`PROBE_TIMEOUT_S`, name resolution included."""
        if constants.HF_HUB_OFFLINE:
            return False
        answered = threading.Event()
        # A thread, because resolving a name has no timeout of its own.
        probe = threading.Thread(target=self._probe, args=(answered,), daemon=True)
        probe.start()
        probe.join(PROBE_TIMEOUT_S)
        return answered.is_set()

    def _probe(self, answered: threading.Event) -> None:
        request = urllib.request.Request(self.endpoint, method="HEAD")  # noqa: S310 - the user's own endpoint
        with suppress(OSError):
            try:
                urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_S).close()  # noqa: S310 - as above
            except urllib.error.HTTPError as error:
                # A proxy speaks for a hub that is away with 407 or 5xx; any other status is the hub itself.
                if error.code == 407 or error.code >= 500:
                    return
            answered.set()

    def cached(self, repo: str, patterns: tuple[str, ...], revision: str | None = None) -> Snapshot | None:
        """A complete snapshot that was downloaded before, without asking the network."""
        try:
            return self._snapshot(repo, patterns, revision, local_files_only=True)
        except LocalEntryNotFoundError:
            return None

    def download(
        self, repo: str, patterns: tuple[str, ...], progress: Progress, *, revision: str | None = None
    ) -> Snapshot:
        """Download the matching files of a repository's top folder and check their hashes.

        Args:
            repo: ``organization/name``.
            patterns: file names or ``*.ending``.
            progress: draws the download.
            revision: branch, tag or commit; None is ``main``.

        Raises:
            CheckpointError: no such repository, no such files, no access, or the download failed.
        """
        with _translated_errors(repo):
            info = HfApi(endpoint=self.endpoint).model_info(
                repo, revision=revision, files_metadata=True, timeout=_API_TIMEOUT_S
            )
        files = {each.rfilename: each.size or 0 for each in info.siblings or []}
        wanted = {name: size for name, size in files.items() if _matches(name, patterns)}
        if not any(name.endswith((".safetensors", ".gguf")) for name in wanted):
            raise CheckpointError(f"{repo} holds no weights to export", hint=_no_weights_hint(files))
        with step(progress, f"downloading {repo}", sum(wanted.values())) as advance, _translated_errors(repo):
            # By its name, not by the commit just seen: this is what makes the cache know the name later.
            snapshot = self._snapshot(repo, patterns, revision, tqdm_class=_bar(advance))
        self._check_hashes(snapshot, progress)
        return snapshot

    def _snapshot(self, repo: str, patterns: tuple[str, ...], revision: str | None, **options: Any) -> Snapshot:
        folder = snapshot_download(
            repo,
            revision=revision,
            cache_dir=self.cache,
            endpoint=self.endpoint,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*"],
            **options,
        )
        return Snapshot(Path(folder), Path(folder).name)

    def _check_hashes(self, snapshot: Snapshot, progress: Progress) -> None:
        """The cache names large files by their SHA-256, but the client compares only sizes."""
        blobs = [path.resolve() for path in snapshot.folder.iterdir()]
        large = [blob for blob in blobs if _SHA256.fullmatch(blob.name)]
        with step(progress, "verifying", sum(blob.stat().st_size for blob in large)) as advance:
            for blob in large:
                if sha256_file(blob, progress=advance) != blob.name:
                    blob.unlink()
                    raise CheckpointError(f"a file of {snapshot.folder.name} arrived damaged", hint=DAMAGED)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return "/" not in name and any(Path(name).match(pattern) for pattern in patterns)


def _no_weights_hint(files: Iterable[str]) -> str:
    if ggufs := [name for name in files if name.endswith(".gguf")]:
        return f"it holds GGUF files: download one of them and give its path ({ggufs[0]}, ...)"
    return "only repositories with safetensors at their top can be exported"


@contextmanager
def _translated_errors(repo: str) -> Iterator[None]:
    try:
        yield
    except GatedRepoError:
        hint = "accept its terms on the hub, then set HF_TOKEN"
        raise CheckpointError(f"{repo} asks for consent first", hint=hint) from None
    except RepositoryNotFoundError:
        hint = "check the spelling: organization/name"
        raise CheckpointError(f"the hub has no public model {repo}", hint=hint) from None
    except Exception as error:  # noqa: BLE001 - the client lets errors of httpx and of its Rust parts through
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"downloading {repo} failed: {first_line}", hint="run it again to resume") from None


def _bar(advance: Callable[[int], None]) -> type[Any]:
    """A progress bar class for the hub's client that draws nothing and passes on the bytes written to disk."""
    lock = threading.Lock()

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # The client opens three bars: files, bytes from the network, and bytes on disk.
            self.counts = str(kwargs.get("desc", "")).startswith("Reconstructing")
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            if self.counts and n:
                with lock:
                    advance(int(n))

    return Bar
