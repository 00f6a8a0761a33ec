"""Which provider computes: libraries and machines as they come, found without any of them."""

from __future__ import annotations

import random
import re
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge.bundle import KVLayout, StateLayout, Target, read_manifest
from edge.config import load_settings
from edge.engine.cuda import Gpu, jetson, read_library
from edge.engine.providers import PROVIDERS_OF, SOFTWARE_ADAPTER, Machine, choose, survey
from edge.errors import BundleError, ConfigError
from edge.loader import load_bundle
from tests.edge.bundles import write_bundle

PYPI_ARM64 = [(2, 89), (2, 90), (2, 120), (2, 121)]
"""Kinds and architectures of what onnxruntime-gpu 1.31.1 for ARM64 holds: 2 is machine code, 1 PTX."""
ORIN, THOR, ADA, H200 = Gpu(87, on_chip=True), Gpu(110, on_chip=True), Gpu(89, on_chip=False), Gpu(90, on_chip=False)


def elf(code: Sequence[tuple[int, int]], needed: Sequence[str]) -> bytes:
    """A 64-bit library with nothing but GPU code and the names of the libraries that it loads."""
    pieces = [
        struct.pack("<HHIQIIHHI", kind, 1, 64, 24, 0, 0, 0, 0, sm).ljust(64, b"\0") + b"x" * 24 for kind, sm in code
    ]
    fatbins = [struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(piece)) + piece for piece in pieces]
    names = b"\0" + b"".join(name.encode() + b"\0" for name in needed)
    places = [names.index(b"\0" + name.encode() + b"\0") + 1 for name in needed]
    contents = {
        ".nv_fatbin": (b"\0" * 8).join(fatbins),
        ".dynstr": names,
        ".dynamic": b"".join(struct.pack("<QQ", 1, place) for place in places) + struct.pack("<QQ", 0, 0),
    }
    titles = b"\0" + b"".join(title.encode() + b"\0" for title in contents) + b".shstrtab\0"
    body, headers = bytes(64), [bytes(64)]
    for title, content in [*contents.items(), (".shstrtab", titles)]:
        place = titles.index(title.encode() + b"\0")
        headers.append(struct.pack("<IIQQQQIIQQ", place, 1, 0, 0, len(body), len(content), 0, 0, 8, 0))
        body += content + b"\0" * (-len(content) % 8)
    start = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 3, 183, 1, 0, 0, len(body), 0, 64, 0, 0, 64, 5, 4)
    return start + body[64:] + b"".join(headers)


def machine(
    folder: Path, gpu: Gpu | None, code: Sequence[tuple[int, int]] | None = None, needed: Sequence[str] = ()
) -> Machine:
    """A machine with this GPU, whose onnxruntime has this code for GPUs; None = it is the one for processors."""
    if code is not None:
        (folder / "libonnxruntime_providers_cuda.so").write_bytes(elf(code, ["libc.so.6", *needed]))
    is_jetson = gpu is not None and gpu.on_chip
    return Machine(libraries=folder, webgpu=False, gpu=gpu, jetson=is_jetson, render_nodes=gpu is not None)


def test_the_code_of_a_library_is_read_from_its_headers(tmp_path: Path) -> None:
    path = tmp_path / "lib.so"
    path.write_bytes(elf([(2, 87), (1, 90), (2, 87)], ["libcudart.so.12", "libc.so.6"]))
    library = read_library(path)
    assert library.kernels == {87}
    assert library.ptx == {90}
    assert library.needed == ("libcudart.so.12", "libc.so.6")


def test_a_library_of_this_system_names_what_it_needs() -> None:
    package = Machine.here().libraries
    assert package
    library = read_library(package / "libonnxruntime_providers_shared.so")
    assert "libc.so.6" in library.needed
    assert not library.kernels


def test_damaged_libraries_are_told_and_never_loop(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng, whole, path = random.Random(seed), elf(PYPI_ARM64, ["libcudart.so.13"]), tmp_path / "lib.so"
    for _ in range(300):
        damaged = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.5 else whole)
        for _ in range(rng.randrange(8) if damaged else 0):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            read_library(path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017 - either outcome is right


@pytest.mark.parametrize(
    ("gpu", "code", "runs"),
    [
        (ORIN, PYPI_ARM64, False),
        (THOR, PYPI_ARM64, False),
        (H200, PYPI_ARM64, True),
        (Gpu(86, on_chip=False), [(2, 80)], True),  # later of the same generation
        (ORIN, [(2, 80), (2, 86)], False),  # but not for a Jetson
        (ORIN, [(2, 87)], True),
        (ORIN, [(1, 80)], True),  # the driver compiles it
        (ADA, [(1, 90)], False),
        (Gpu(80, on_chip=False), [(2, 86)], False),
        (ORIN, [], True),  # not known: the first run will tell
    ],
)
def test_kernels_and_gpus(tmp_path: Path, gpu: Gpu, code: Sequence[tuple[int, int]], *, runs: bool) -> None:
    (tmp_path / "lib.so").write_bytes(elf(code, []))
    assert read_library(tmp_path / "lib.so").runs_on(gpu) == runs


def test_a_jetson_is_known_by_its_device_tree(tmp_path: Path) -> None:
    tree = tmp_path / "compatible"
    assert jetson(tree) is None
    tree.write_bytes(b"nvidia,p3768-0000+p3767-0005\0nvidia,p3767-0005\0nvidia,tegra234\0")
    assert jetson(tree) == 87
    tree.write_bytes(b"raspberrypi,5-model-b\0brcm,bcm2712\0")
    assert jetson(tree) is None


@pytest.mark.parametrize(
    ("facts", "reason", "hint"),
    [
        ((None, None), "has no CUDA", "onnxruntime-gpu"),
        ((ORIN, None), "has no CUDA", "JetPack"),
        ((None, PYPI_ARM64), "no NVIDIA GPU answers", "driver"),
        ((ORIN, PYPI_ARM64), "this GPU is sm_87, .* has kernels for sm_89, sm_90, sm_120, sm_121", "JetPack"),
        ((Gpu(70, on_chip=False), PYPI_ARM64), "this GPU is sm_70", "docs/gpu.md"),
        ((H200, PYPI_ARM64, ["libcudart.so.99"]), "libcudart.so.99 cannot be loaded", "nvidia-"),
    ],
)
def test_why_cuda_cannot_be_used(tmp_path: Path, facts: tuple[Any, ...], reason: str, hint: str) -> None:
    where = machine(tmp_path, *facts)
    finding = next(each for each in survey(where) if each.provider == "cuda")
    assert not finding.usable
    assert re.search(reason, finding.reason)
    assert hint in finding.hint
    with pytest.raises(ConfigError, match=f"engine.provider cuda cannot be used: .*{reason}"):
        choose("cuda", "cuda", where)
    with pytest.raises(ConfigError, match=f"the bundle was made for cuda, .*{reason}") as refused:
        choose("auto", "cuda", where)
    assert "--target cpu" in str(refused.value.hint)


def test_cuda_with_kernels_for_the_gpu_is_taken_for_its_bundles(tmp_path: Path) -> None:
    where = machine(tmp_path, ORIN, [(2, 87)])
    chosen = choose("auto", "cuda", where)
    assert chosen.name == "cuda"
    assert "sm_87" in chosen.reason
    assert choose("auto", "cpu", where).name == "cpu"
    with pytest.raises(ConfigError, match="cannot run a bundle that was made for cpu") as refused:
        choose("cuda", "cpu", where)
    assert "--target cuda" in str(refused.value.hint)


def test_tensorrt_needs_cuda_and_its_own_library(tmp_path: Path) -> None:
    def says(where: Machine) -> str:
        finding = next(each for each in survey(where) if each.provider == "tensorrt")
        assert finding.usable == (not finding.hint)
        return finding.reason

    assert "no TensorRT" in says(machine(tmp_path, ORIN, [(2, 87)]))
    (tmp_path / "libonnxruntime_providers_tensorrt.so").write_bytes(elf([], ["libnvinfer.so.99"]))
    assert "libnvinfer.so.99" in says(machine(tmp_path, ORIN, [(2, 87)]))
    assert "it needs CUDA" in says(machine(tmp_path, ORIN, PYPI_ARM64))
    (tmp_path / "libonnxruntime_providers_tensorrt.so").write_bytes(elf([], []))
    assert choose("tensorrt", "cuda", machine(tmp_path, ORIN, [(2, 87)])).name == "tensorrt"


def test_webgpu_needs_its_package_and_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = machine(tmp_path, None)
    monkeypatch.delenv(SOFTWARE_ADAPTER, raising=False)
    with pytest.raises(ConfigError, match="onnxruntime-ep-webgpu is not installed") as refused:
        choose("webgpu", "webgpu", where)
    assert "pip install" in str(refused.value.hint)
    with pytest.raises(ConfigError, match=r"libvulkan.so.1 cannot be loaded|there is no GPU with a driver"):
        choose("webgpu", "webgpu", replace(where, webgpu=True))


@pytest.mark.parametrize("target", ["cuda", "webgpu"])
def test_the_processor_refuses_bundles_for_gpus(tmp_path: Path, target: Target) -> None:
    with pytest.raises(ConfigError, match=f"engine.provider cpu cannot run a bundle that was made for {target}"):
        choose("cpu", target, machine(tmp_path, None))


def test_a_bundle_for_a_gpu_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    manifest = read_manifest(write_bundle(tmp_path / "bundle")).model_copy(update={"target": "cuda"})
    assert manifest.target == "cuda"
    settings = load_settings(None, {"QWEDGE_ENGINE_PROVIDER": "cpu"})
    with pytest.raises(ConfigError, match="made for cuda"):
        load_bundle(tmp_path / "bundle", manifest, settings)


def test_manifests_name_a_target_that_can_run_the_graph(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    manifest = read_manifest(folder)
    assert manifest.target == "cpu"
    state = StateLayout(layers=1, conv_channels=1, conv_kernel=1, value_heads=1, key_dim=1, value_dim=1)
    int8 = KVLayout(layers=1, kv_heads=1, head_dim=16, dtype="int8")
    for changes, told in (({"state": state}, "states"), ({"kv": int8}, "int8 cache"), ({"target": "npu"}, "target")):
        damaged = manifest.model_copy(update={"target": "cuda", **changes})
        (folder / "manifest.json").write_text(damaged.model_dump_json(warnings="none"))
        with pytest.raises(BundleError, match=told):
            read_manifest(folder)


def test_every_target_has_a_provider_and_every_provider_a_finding() -> None:
    named = {provider for providers in PROVIDERS_OF.values() for provider in providers}
    found = survey()
    assert named == {finding.provider for finding in found}
    assert all(finding.reason and (finding.usable or finding.hint) for finding in found)


def test_nothing_is_imported_to_look() -> None:
    code = (
        "import sys; from edge.engine.providers import survey; survey();"
        "print({'onnxruntime', 'onnxruntime_ep_webgpu'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"
