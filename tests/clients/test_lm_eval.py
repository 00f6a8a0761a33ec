"""lm-evaluation-harness: log-probabilities of texts and of choices by echo, and generated answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge.bundle import TOKENIZER
from tests.fakes import MODEL_NAME, SPECIAL_TOKENS, byte_tokenizer
from tests.serving import Served

TASKS = Path(__file__).parent / "lm_eval"
Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture
def evaluate(tmp_path: Path) -> Evaluate:
    """Runs ``lm_eval`` on tasks of this folder; gives the metrics of each."""

    def run(tasks: str, *, url: str, model: str, tokenizer_json: str, eos: str) -> dict[str, Any]:
        (tmp_path / "tokenizer.json").write_text(tokenizer_json)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        options = {
            "model": model,
            "base_url": f"{url}/v1/completions",
            "tokenizer": tmp_path,
            "max_length": 1024,
            "num_concurrent": 2,
            "max_retries": 1,
        }
        line = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--tasks", tasks, "--batch_size", "3"]
        line += ["--model_args", ",".join(f"{name}={value}" for name, value in options.items())]
        line += ["--include_path", str(TASKS), "--output_path", str(tmp_path / "out.json")]
        environment = os.environ | {"HF_HOME": str(tmp_path / "cache")}
        done = subprocess.run(
            line, cwd=TASKS, env=environment, capture_output=True, text=True, timeout=150, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (file,) = tmp_path.glob("out*.json")
        return dict(json.loads(file.read_text())["results"])

    return run


def test_texts_and_answers(server: Served, evaluate: Evaluate) -> None:
    results = evaluate(
        "qwedge_rolling,qwedge_answers",
        url=server.url,
        model=MODEL_NAME,
        tokenizer_json=byte_tokenizer().to_str(),
        eos=SPECIAL_TOKENS[-1],
    )
    # The fake engine is sure of every token of what it knows.
    assert results["qwedge_rolling"]["bits_per_byte,none"] == 0
    assert results["qwedge_answers"]["exact_match,none"] == 1


@pytest.mark.model
def test_a_model_knows_the_answers(demo: tuple[str, str], bundle: Path, evaluate: Evaluate) -> None:
    url, name = demo
    tokenizer_json = (bundle / TOKENIZER).read_text(encoding="utf-8")
    results = evaluate("qwedge_capitals", url=url, model=name, tokenizer_json=tokenizer_json, eos="<|im_end|>")
    assert results["qwedge_capitals"]["acc,none"] == 1
