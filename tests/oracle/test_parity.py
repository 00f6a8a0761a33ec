"""The fp32 graph against transformers and against optimum's own export: prefill, decode and chunked prefill."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge.errors import ConfigError, ExportError
from export.build import build_graph
from export.checkpoint import open_checkpoint
from export.oracle import Oracle, verify_against
from export.progress import Silent
from tests.export import tiny, tiny_qwen3_5

TOLERANCE = 1e-4
"""Absolute, for a logit: what the issue asks for."""
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2": tiny.qwen2_config(),
    "qwen2-untied": tiny.qwen2_config(tie_word_embeddings=False),
    "qwen2-one-kv-head": tiny.qwen2_config(num_key_value_heads=1, num_hidden_layers=3),
    "qwen2-no-grouping": tiny.qwen2_config(num_key_value_heads=4, rope_theta=10_000.0),
    "qwen2-large-eps": tiny.qwen2_config(rms_norm_eps=1e-3),
    "qwen3": tiny.qwen3_config(),
    "qwen3-untied": tiny.qwen3_config(tie_word_embeddings=False, num_key_value_heads=1),
    "qwen3-odd-counts": tiny.qwen3_config(head_dim=16, num_attention_heads=6, num_key_value_heads=3),
    "qwen3-wide-heads": tiny.qwen3_config(head_dim=64, num_key_value_heads=4),
}


@pytest.mark.parametrize("oracle", Oracle)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_graph_computes_what_the_oracle_computes(shape: str, oracle: Oracle, tmp_path: Path) -> None:
    with open_checkpoint(tiny.write_folder(tmp_path / "m", SHAPES[shape], seed=3)) as checkpoint:
        result = verify_against(oracle, checkpoint, progress=Silent())
    assert result["by_phase"].keys() == {"prefill", "decode", "chunked"}
    assert 0 < result["max_difference"] * result["largest_logit"] < TOLERANCE


def test_a_rotary_base_in_the_style_of_transformers_5(tmp_path: Path) -> None:
    config = tiny.qwen2_config(rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    del config["rope_theta"]
    with open_checkpoint(tiny.write_folder(tmp_path / "m", config)) as checkpoint:
        verify_against(Oracle.TRANSFORMERS, checkpoint, progress=Silent())


def test_a_gguf_is_compared_too(tmp_path: Path) -> None:
    with open_checkpoint(tiny.write_gguf(tmp_path / "m.gguf", tiny.qwen3_config())) as checkpoint:
        assert verify_against(Oracle.TRANSFORMERS, checkpoint, progress=Silent())["max_difference"] < TOLERANCE


@pytest.mark.parametrize("change", [{"rope_theta": 999_000.0}, {"rms_norm_eps": 3e-6}])
def test_a_graph_that_is_slightly_wrong_is_refused(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = open_checkpoint(tiny.write_folder(tmp_path / "wrong", tiny.qwen2_config(**change)))
    monkeypatch.setattr("export.oracle.build_graph", lambda _, *args, **options: build_graph(wrong, *args, **options))
    right = open_checkpoint(tiny.write_folder(tmp_path / "m", tiny.qwen2_config()))
    with wrong, right, pytest.raises(ExportError, match="differs from transformers"):
        verify_against(Oracle.TRANSFORMERS, right, progress=Silent())


def test_the_command_writes_the_comparison_into_the_manifest(tmp_path: Path) -> None:
    folder = tiny.write_folder(tmp_path / "m", tiny.qwen2_config())
    line = ["-m", "edge.cli", "export", str(folder), "-o", str(tmp_path / "bundle"), "--verify", "optimum", "--json"]
    done = subprocess.run([sys.executable, *line], capture_output=True, text=True, timeout=120, check=True)
    result = json.loads(done.stdout)
    assert result["oracle"] == result["manifest"]["measured"]["oracle"]
    assert result["oracle"]["oracle"] == "optimum"
    assert done.stderr.splitlines()[0] == "asking optimum ..."
    assert all(line.endswith("...") for line in done.stderr.splitlines()), done.stderr


def test_a_model_that_this_transformers_does_not_know_is_told_apart(tmp_path: Path) -> None:
    with open_checkpoint(tiny.write_folder(tmp_path / "m", tiny_qwen3_5.config())) as checkpoint:
        with pytest.raises(ConfigError, match=r"transformers 4\.\S+ knows no qwen3_5") as caught:
            verify_against(Oracle.TRANSFORMERS, checkpoint, progress=Silent())
        assert "transformers 5" in caught.value.hint
