"""`qwedge export` as its users meet it: a result on stdout, or one error line and one hint, and never a traceback."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Kind

import edge.cli
from edge.bundle import verify_bundle
from export.catalog import catalog
from export.quantize.recipes import RECIPES
from tests.export import tiny

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Done:
    """One finished command."""

    status: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """Its error, when it is the two lines that it must be."""
        *steps, error, hint = self.stderr.splitlines()
        assert self.status
        assert self.stdout == ""
        assert all(step.endswith(" ...") for step in steps), self.stderr
        assert error.startswith("error: ")
        assert hint.startswith("hint: ")
        assert "Traceback" not in self.stderr
        return f"{error}\n{hint}"


Run = Callable[..., Done]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run `qwedge export` in this process, with an empty cache."""
    monkeypatch.setenv("QWEDGE_CACHE", str(tmp_path / "cache"))

    def run(*args: object) -> Done:
        capsys.readouterr()
        status = edge.cli.run(["export", *map(str, args)])
        captured = capsys.readouterr()
        return Done(status, captured.out, captured.err)

    return run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.write_folder(tmp_path / "Tiny", tiny.qwen2_config())


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out" / "bundle"


def test_the_result_is_on_stdout_and_the_steps_on_stderr(source: Path, output: Path) -> None:
    line = [sys.executable, "-m", "edge.cli", "export", str(source), "-o", str(output)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QWEDGE_")}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    labels = [text.split()[0] for text in done.stdout.splitlines()]
    assert labels == ["bundle", "model", "size", "context", "kernels", "self-test", "time"]
    assert "tiny, 80,448 parameters, balanced" in done.stdout
    steps = [text.partition(" (")[0] for text in done.stderr.splitlines()]
    assert steps == ["balanced weights", "verifying the bundle ...", "hashing"]
    verify_bundle(output)


def test_json_has_the_whole_manifest(run: Run, source: Path, output: Path) -> None:
    done = run(source, "-o", output, "--json", "--recipe", "int8", "--name", "plant", "--context", 64)
    result = json.loads(done.stdout)
    assert done.status == 0
    assert result["folder"] == str(output)
    assert result["manifest"] == verify_bundle(output).model_dump(mode="json")
    assert (result["manifest"]["name"], result["manifest"]["recipe"]["name"]) == ("plant", "int8")
    assert result["manifest"]["context_length"] == 64
    assert result["bytes"] == sum(path.stat().st_size for path in output.iterdir() if path.name != "manifest.json")
    assert (result["oracle"], result["notes"]) == (None, [])


def test_an_int8_cache_is_named_with_what_it_costs(run: Run, source: Path, output: Path) -> None:
    done = run(source, "-o", output, "--kv", "int8")
    assert done.status == 0
    labels = [text.split()[0] for text in done.stdout.splitlines()]
    assert labels == ["bundle", "model", "size", "context", "cache", "kernels", "self-test", "time"]
    assert "128 bytes of cache each" in done.stdout
    assert "calibrating the cache ..." in done.stderr
    assert verify_bundle(output).kv.dtype == "int8"


def test_calibration_is_in_the_manifest(run: Run, source: Path, output: Path) -> None:
    done = run(source, "-o", output, "--calibrate", "built-in")
    assert done.status == 0
    calibration = verify_bundle(output).recipe["calibration"]
    assert (calibration["method"], calibration["text"]) == ("gptq", "built-in")
    assert "balanced, calibrated" in done.stdout


def test_the_recipes_explain_themselves(run: Run) -> None:
    done = run("--explain")
    assert done.status == 0
    assert [line.partition(":")[0] for line in done.stdout.splitlines() if line[:1].islower()] == list(RECIPES)
    assert "  gate and up           4 bits, asymmetric, blocks of 128" in done.stdout
    assert (
        "  in narrow models      query and key alone 8 bits, symmetric, blocks of 64\n"
        "                        down of outer layers 8 bits, symmetric, blocks of 64\n"
    ) in done.stdout
    assert "    and calibrated      down 8 bits, symmetric, blocks of 64\n" in done.stdout
    assert all(len(line) <= 120 for line in done.stdout.splitlines())
    listed = json.loads(run("--explain", "--json").stdout)
    assert [recipe["name"] for recipe in listed] == list(RECIPES)
    assert all(recipe["purpose"] for recipe in listed)
    assert listed[0]["measured"]
    assert [listed[0][name]["down"]["bits"] for name in ("layer", "narrow", "narrow_calibrated")] == [4, 4, 8]


def test_a_gguf_is_a_source_and_says_what_it_left_out(run: Run, output: Path, tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "tiny.gguf", tiny.qwen3_config(), kind=Kind.Q4_0, head_kind=Kind.Q8_0)
    done = run(path, "-o", output)
    assert done.status == 0
    assert "note: " in done.stderr
    assert verify_bundle(output).source.kind == "gguf"


def test_the_catalog(run: Run) -> None:
    done = run("--list")
    assert done.status == 0
    header, *rows = done.stdout.splitlines()
    assert header.split() == ["NAME", "PARAMS", "DOWNLOAD", "LICENCE", "NOTE"]
    assert [row.split()[0] for row in rows] == list(catalog())
    assert all(len(row) <= 120 for row in rows)
    listed = json.loads(run("--list", "--json").stdout)
    assert [entry["name"] for entry in listed] == list(catalog())
    assert all(entry["licence"] and entry["parameters"] > 4e8 for entry in listed)


@pytest.mark.parametrize(
    ("args", "status", "expected"),
    [
        ((), 2, "SOURCE and --output are needed"),
        (("{source}",), 2, "SOURCE and --output are needed"),
        (("{source}", "-o", "{output}", "--recipe", "int3"), 2, "'int3' is not one of 'balanced', 'fast',"),
        (("{source}", "-o", "{output}", "--calibrate", "nothing.txt"), 2, "cannot calibrate with nothing.txt: No such"),
        (("{source}", "-o", "{output}", "--kv", "int4"), 2, "'int4' is not one of 'float32', 'int8'"),
        (("{source}", "-o", "{output}", "--name", "My Model"), 2, "'My Model' cannot be a model name"),
        (
            ("{source}", "-o", "{output}", "--context", "0"),
            2,
            "'--context': must be greater than or equal",
        ),
        (("{source}", "-o", "{output}", "--context", "4k"), 2, "'--context': must be a valid integer"),
        (("{source}", "-o", "{output}", "--context", "257"), 2, "this model has 1 to 256 positions"),
        (("{source}", "-o", "{source}"), 2, "exists already"),
        (("{source}/nowhere", "-o", "{output}"), 3, "is no folder, GGUF file, hub id or catalog name"),
        (("qwen2.5-coder-0.5b", "-o", "{output}"), 3, "did you mean qwen2.5-coder-0.5b-instruct?"),
        (("qwen3-0.6b", "-o", "{output}", "--offline"), 3, "not in the cache and the network is off"),
        (("Qwen/Qwen3-0.6B", "-o", "{output}", "--offline"), 3, "Qwen/Qwen3-0.6B is not in the cache"),
    ],
)
def test_wrong_arguments(
    run: Run, source: Path, output: Path, *, args: tuple[str, ...], status: int, expected: str
) -> None:
    done = run(*(arg.format(source=source, output=output) for arg in args))
    assert done.status == status
    assert expected in done.error
    assert not output.parent.exists() or list(output.parent.iterdir()) == []


def truncate_gguf(folder: Path) -> Path:
    path = tiny.write_gguf(folder / "tiny.gguf", tiny.qwen2_config())
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def lie_in_the_header(folder: Path) -> Path:
    weights = tiny.write_folder(folder / "m", tiny.qwen2_config()) / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(struct.pack("<Q", 1 << 40) + content[8:])
    return folder / "m"


def shift_the_offsets(folder: Path) -> Path:
    weights = tiny.write_folder(folder / "m", tiny.qwen2_config()) / "model.safetensors"
    content = weights.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"]["data_offsets"][1] += 2
    text = json.dumps(header).encode()
    weights.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return folder / "m"


def with_config(folder: Path, **changes: Any) -> Path:
    tiny.write_folder(folder / "m", tiny.qwen2_config())
    tiny.write_json(folder / "m" / "config.json", tiny.qwen2_config(**changes))
    return folder / "m"


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (truncate_gguf, "tiny.gguf"),
        (lie_in_the_header, "claims a header of 1099511627776 bytes"),
        (shift_the_offsets, "tensor 'model.norm.weight'"),
        (lambda folder: with_config(folder, model_type="llama"), "the model type 'llama' is not supported"),
        (lambda folder: with_config(folder, num_hidden_layers=3), "the checkpoint lacks model.layers.2."),
        (lambda folder: with_config(folder, intermediate_size=97), "tensors of the wrong shape"),
        (lambda folder: with_config(folder, rms_norm_eps="small"), "rms_norm_eps is 'small'"),
        (lambda folder: with_config(folder, rope_scaling={"rope_type": "yarn"}), "rope scaling of type 'yarn'"),
    ],
)
def test_bad_checkpoints(run: Run, output: Path, tmp_path: Path, make: Callable[[Path], Path], expected: str) -> None:
    done = run(make(tmp_path), "-o", output)
    assert done.status == 3
    assert expected in done.error
    assert not output.parent.exists() or list(output.parent.iterdir()) == []


@pytest.mark.skipif(find_spec("transformers") is not None, reason="the oracle is installed here")
@pytest.mark.parametrize("oracle", ["transformers", "optimum"])
def test_an_oracle_that_is_not_installed(run: Run, source: Path, output: Path, oracle: str) -> None:
    done = run(source, "-o", output, "--verify", oracle)
    assert done.status == 2
    assert f"--verify {oracle} needs torch" in done.error
    assert "make oracle" in done.error
    assert not output.parent.exists()


@pytest.mark.skipif(find_spec("transformers") is not None, reason="the oracle environment has other versions")
def test_the_export_needs_neither_torch_nor_transformers(run: Run, source: Path, output: Path) -> None:
    assert run(source, "-o", output).status == 0
    assert {"torch", "transformers", "onnxscript"}.isdisjoint(sys.modules)
