"""The structure of the code, as DESIGN and docs/architecture.md promise it."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WORKSTATION_ONLY = {
    "export",
    "gguf",
    "huggingface_hub",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "optimum",
    "safetensors",
    "torch",
    "transformers",
}
LAYERS = (
    {
        "edge",
        "edge.errors",
        "edge.log_buffer",
        "edge.log_format",
        "edge.adapter",
        "edge.background",
        "edge.bundle",
        "edge.config",
        "edge.cooling",
        "edge.durable",
        "edge.lifecycle",
        "edge.machine",
        "edge.oms",
        "edge.pem",
        "edge.power",
        "edge.sbom",
        "edge.settings",
        "edge.signing",
        "edge.starts",
        "edge.store",
        "edge.sysfs",
        "edge.throttle",
        "edge.trust",
        "edge.violations",
    },
    {"edge.engine"},
    {
        "edge.adapters",
        "edge.scheduler",
        "edge.scheduler_stats",
        "edge.batch",
        "edge.decode_step",
        "edge.energy_shares",
        "edge.planning",
        "edge.prefill_step",
        "edge.slots",
        "edge.snapshots",
        "edge.sequence",
        "edge.tokenizer",
        "edge.chat",
        "edge.text_stream",
        "edge.metrics",
        "edge.journal",
        "edge.journal_file",
        "edge.journal_index",
    },
    {"edge.model", "edge.generation", "edge.assembly", "edge.service", "edge.loader", "edge.management"},
    {"edge.openai"},
    {"edge.anthropic", "edge.ollama"},
    {"edge.http", "edge.mqtt"},
    {"edge.client"},
    {"edge.evaluation"},
    {"edge.doctor"},
    {"edge.commands"},
    {"edge.cli"},
    {"edge.__main__"},
)
"""From the bottom up: a module imports from its own layer and those below."""
MAX_RUNTIME_PACKAGES = 40


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, inside functions too; `from a import b` counts as both `a` and `a.b`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer_of(module: str) -> int | None:
    parts = module.split(".")
    name = "edge" if len(parts) == 1 else ".".join(parts[:2])
    return next((level for level, modules in enumerate(LAYERS) if name in modules), None)


@pytest.mark.parametrize("path", sources("edge"), ids=module_name)
def test_the_runtime_needs_nothing_of_the_workstation(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports_of(path)} & WORKSTATION_ONLY


@pytest.mark.parametrize("path", sources("edge"), ids=module_name)
def test_only_the_sessions_know_onnxruntime(path: Path) -> None:
    uses = any(name.split(".")[0] == "onnxruntime" for name in imports_of(path))
    assert uses == (module_name(path) in {"edge.engine.session", "edge.engine.device"})


@pytest.mark.parametrize("path", sources("edge"), ids=module_name)
def test_imports_run_one_way(path: Path) -> None:
    own = layer_of(module_name(path))
    assert own is not None, "give the module a layer"
    upward = {name for name in imports_of(path) if name.startswith("edge.") and (layer_of(name) or 0) > own}
    assert not upward


@pytest.mark.parametrize("path", sources("export"), ids=module_name)
def test_the_exporter_knows_only_what_lies_in_a_bundle_and_the_errors(path: Path) -> None:
    allowed = re.compile(r"edge|edge\.__version__|edge\.(adapter|bundle|errors|signing)(\.\w+)*")
    names = {name for name in imports_of(path) if name.split(".")[0] == "edge"}
    assert {name for name in names if not allowed.fullmatch(name)} == set()


IMPORT_EVERYTHING = """
import importlib, json, logging, os, signal, sys, threading
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # else it would be set, the one thing that imports change
before = os.environ.copy(), os.getcwd(), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
effects = []

def watch(event, args):
    if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        effects.append(f"writes {args[0]}")
    elif event in {"socket.connect", "socket.bind", "subprocess.Popen", "os.mkdir", "os.remove", "os.fork"}:
        effects.append(event)

sys.addaudithook(watch)
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
if threading.active_count() > 1:
    effects.append("starts a thread")
if logging.getLogger().handlers:
    effects.append("configures logging")
if before != (os.environ.copy(), os.getcwd(), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)):
    effects.append("changes the process")
print(json.dumps({"effects": effects, "modules": sorted(sys.modules)}))
"""


def import_in_a_fresh_process(*modules: str) -> dict[str, list[str]]:
    line = [sys.executable, "-B", "-c", IMPORT_EVERYTHING, json.dumps(modules)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_importing_the_runtime_has_no_effect() -> None:
    result = import_in_a_fresh_process(*(module_name(path) for path in sources("edge")))
    assert result["effects"] == []
    assert not {name.split(".")[0] for name in result["modules"]} & WORKSTATION_ONLY


@pytest.mark.parametrize("module", ["edge.engine.session", "export.segments", "export.verify", "export.oracle"])
def test_onnxruntime_tells_nobody_anything(module: str, tmp_path: Path) -> None:
    """It would write a device id and events below the user's home when it is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-B", "-c", f"import {module}"], cwd=ROOT, env=environment, check=True, timeout=60)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_starts_without_the_heavy_packages() -> None:
    loaded = {name.split(".")[0] for name in import_in_a_fresh_process("edge.cli")["modules"]}
    assert not loaded & {"onnxruntime", "numpy", "fastapi", "starlette", "uvicorn", "paho", "tokenizers", "rich"}
    assert "psutil" not in loaded


def test_the_client_comes_without_the_engine() -> None:
    modules = import_in_a_fresh_process("edge.client")["modules"]
    assert not {name.split(".")[0] for name in modules} & {"onnxruntime", "numpy", "tokenizers", "fastapi", "starlette"}
    assert not {name for name in modules if name.startswith(("edge.engine", "edge.service", "edge.openai"))}


def test_the_server_starts_without_what_only_describes_it() -> None:
    modules = import_in_a_fresh_process("edge.loader", "edge.http.app", "edge.http.server")["modules"]
    assert "fastapi" not in {name.split(".")[0] for name in modules}


def test_the_device_installs_few_packages() -> None:
    lock = (ROOT / ".locks" / "runtime.txt").read_text(encoding="utf-8")
    packages = set(re.findall(r"^([a-z0-9-]+)==", lock, re.MULTILINE))
    assert {"onnxruntime", "fastapi", "paho-mqtt"} <= packages
    assert len(packages) <= MAX_RUNTIME_PACKAGES


@pytest.mark.parametrize("name", ["runtime", "export", "dev", "oracle", "clients"])
def test_locks_pin_hashes_and_name_no_index(name: str) -> None:
    lock = (ROOT / ".locks" / f"{name}.txt").read_text(encoding="utf-8")
    entries = re.split(r"^(?=[a-z0-9])", lock, flags=re.MULTILINE)[1:]
    assert entries
    assert [entry for entry in entries if "==" not in entry or "--hash=sha256:" not in entry] == []
    assert re.search(r"https?://|index-url|find-links", lock) is None
