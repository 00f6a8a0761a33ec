"""Whether a bundle can be served here: a process of its own loads it and generates a few tokens."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from edge.bundle import Manifest, read_manifest
from edge.errors import StoreError

log = logging.getLogger(__name__)

TIMEOUT_S = 900
"""For verification, load and answer; a card reads 5 GB in two minutes."""
PROMPT = "The capital of France is"
NUM_TOKENS = 8
CONTEXT = 64


def self_test(path: Path) -> None:
    """Load a bundle and answer a prompt.

    Should the memory not suffice, the kernel ends the test rather than the server that may run beside it.

    Raises:
        BundleError: its manifest cannot be read.
        StoreError: the bundle does not load, or does not answer.
    """
    manifest = read_manifest(path)
    prompt = manifest.measured.get("self_test", {}).get("prompt", PROMPT)
    context = str(min(CONTEXT, manifest.context_length))
    line = [
        *(sys.executable, "-m", "edge.cli", "generate", "--raw", "--json", "--temperature", "0"),
        *("--bundle", os.fspath(path), "--max-tokens", str(NUM_TOKENS), "--context", context, prompt),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QWEDGE_")}
    with subprocess.Popen(
        line, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        with suppress(OSError):
            Path(f"/proc/{child.pid}/oom_score_adj").write_text("1000", encoding="ascii")
        try:
            stdout, stderr = child.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            raise _failed(manifest, f"it did not answer within {TIMEOUT_S} s") from None
    if child.returncode != 0:
        raise _failed(manifest, _reason(child.returncode, stderr))
    _compare(manifest, stdout)


def _compare(manifest: Manifest, stdout: str) -> None:
    """Say where this processor's first token is not the exporter's; kernels differ, so that is no failure."""
    text = json.loads(stdout)["choices"][0]["text"]
    expected = manifest.measured.get("self_test", {}).get("next_text", "")
    if not text.startswith(expected):
        log.warning("the self-test of %s begins with %r, where it was exported with %r", manifest.name, text, expected)


def _failed(manifest: Manifest, reason: str) -> StoreError:
    hint = "what was active before stays so; `qwedge doctor` says what this machine can do"
    return StoreError(f"the self-test of {manifest.name} failed: {reason}", hint=hint)


def _reason(status: int, stderr: str) -> str:
    if status < 0:
        return f"it was ended by signal {-status}; is there enough memory?"
    lines = [line for line in stderr.splitlines() if "error: " in line]
    return lines[-1].partition("error: ")[2] if lines else f"exit status {status}"
