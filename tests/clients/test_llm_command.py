"""The command `llm`, with the server among its extra models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients.script import A_CITY, CITY, QUESTION_OF_FORM, QUESTION_OF_WEATHER
from tests.fakes import MODEL_NAME
from tests.serving import Served

MODELS = """\
- model_id: qwedge
  model_name: {name}
  api_base: {url}/v1
  supports_tools: true
  supports_schema: true
"""
FUNCTION = "def get_weather(city: str) -> str:\n    'Tell the weather.'\n    return f'sunny in {city}'\n"
Llm = Callable[..., str]


@pytest.fixture
def llm(server: Served, tmp_path: Path) -> Llm:
    """Runs the command; gives what it prints."""
    (tmp_path / "extra-openai-models.yaml").write_text(MODELS.format(name=MODEL_NAME, url=server.url))
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "unused"}

    def run(*arguments: str) -> str:
        line = [sys.executable, "-m", "llm", *arguments]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60, check=False, input="")
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def test_a_prompt(llm: Llm) -> None:
    assert llm("-m", "qwedge", "Hi") == "You said: Hi"
    assert llm("-m", "qwedge", "--no-stream", "-s", "Be brief.", "-o", "temperature", "0", "Hi") == "You said: Hi"


def test_a_schema(llm: Llm) -> None:
    assert json.loads(llm("-m", "qwedge", "--schema", json.dumps(CITY), QUESTION_OF_FORM)) == A_CITY


def test_a_tool(llm: Llm) -> None:
    assert llm("-m", "qwedge", "--functions", FUNCTION, QUESTION_OF_WEATHER).endswith("It is sunny in Köln.")


def test_the_models(llm: Llm) -> None:
    assert "qwedge" in llm("models")
