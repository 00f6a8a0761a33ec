"""The server as its clients' own libraries see it.

`make clients` brings them, `.ci/test-clients.sh` runs this folder; where they are missing, nothing here is collected.
Most of it talks to a server over the fake engine, whose answers are known; what takes a real model is marked so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge.bundle import verify_bundle
from edge.config import load_settings
from edge.loader import load_service
from edge.settings.server import ServerSettings
from tests.clients.script import reply
from tests.fakes import FakeEngine
from tests.serving import Served, served, serving, wait_for

ROOT = Path(__file__).parent.parent.parent
collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("litellm") is None else []


@pytest.fixture(scope="session", autouse=True)
def offline() -> Iterator[None]:
    """No client looks for anything beyond this machine."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "LITELLM_LOCAL_MODEL_COST_MAP", "DO_NOT_TRACK"):
            patch.setenv(name, "1")
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def server() -> Iterator[Served]:
    """A server whose model follows :func:`tests.clients.script.reply`."""
    engine = FakeEngine(reply, step_s=0.0005, context_length=4096, slots=4)
    with served(engine, max_queue=16, settings=ServerSettings(port=0)) as running:
        yield running


@pytest.fixture
def stops_working(server: Served) -> Callable[[], None]:
    """Asserts that nobody is being answered any more, soon, and long before a long answer is complete."""
    before = server.engine.num_steps

    def check() -> None:
        wait_for(lambda: server.service.stats().num_running == 0)
        assert server.engine.num_steps - before < 2500

    return check


@pytest.fixture(scope="session")
def bundle() -> Path:
    """The demo model's bundle, where `make model` has made it."""
    made = ROOT / "models" / "qwen2.5-coder-0.5b-instruct-balanced"
    if not made.is_dir():
        pytest.skip("the demo model is not here: make model")
    return made


@pytest.fixture(scope="session")
def demo(bundle: Path) -> Iterator[tuple[str, str]]:
    """A server with the demo model: its address and the model's name."""
    service = load_service(bundle, verify_bundle(bundle), load_settings(env={}))
    with serving(service, ServerSettings(port=0)) as (host, port):
        yield f"http://{host}:{port}", service.model.manifest.name
