"""What holds for all tests."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator

import pytest

# Tests import onnxruntime by itself too; see edge/engine/__init__.py.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in the background so, and programs under test would not hear Ctrl-C either.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """State goes to a folder of the tests: what is served here must not meet what this machine serves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("STATE_DIRECTORY", raising=False)
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """Commands that run in this process set the log up; the next test must not find their level and handlers."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers
