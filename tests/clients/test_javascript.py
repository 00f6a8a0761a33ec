"""OpenAI's and Anthropic's own libraries for JavaScript."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fakes import MODEL_NAME
from tests.serving import Served

FOLDER = Path(__file__).parent / "javascript"
LIBRARIES = FOLDER / "node_modules"


@pytest.mark.skipif(not LIBRARIES.is_dir() or shutil.which("node") is None, reason="node or its packages are missing")
@pytest.mark.parametrize("script", ["openai.mjs", "anthropic.mjs"])
def test_a_script(server: Served, stops_working: Callable[[], None], script: str) -> None:
    line = ["node", script, server.url, MODEL_NAME]
    done = subprocess.run(line, cwd=FOLDER, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
    stops_working()
