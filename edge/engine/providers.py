"""Which of onnxruntime's execution providers computes: what can be used here, and what a bundle was made for.

Everything is found without importing onnxruntime, and nothing is loaded that cannot be: a provider's library lies in
its package, the GPU answers for itself (``edge.engine.cuda``). Each wheel of onnxruntime-gpu has machine code for some
GPUs only, and with others it fails in the first kernel of the first request; docs/gpu.md has the table.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from edge.bundle import Target
from edge.engine.cuda import Gpu, Library, can_load, find_gpu, jetson, read_library
from edge.errors import ConfigError

Provider = Literal["cpu", "cuda", "tensorrt", "webgpu"]
"""What can compute."""
SOFTWARE_ADAPTER: Final = "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER"
"""Environment: with 1, WebGPU may compute on a processor that plays a GPU."""
PROVIDERS_OF: Final[dict[Target, tuple[Provider, ...]]] = {
    "cpu": ("cpu",),
    "cuda": ("cuda", "tensorrt"),
    "webgpu": ("webgpu",),
}
"""What can run a bundle, by what it was made for; the first one is taken where nobody says which."""
_DRI = Path("/dev/dri")
_CUDA_HINT = "install onnxruntime-gpu in place of onnxruntime"
_JETSON_HINT = "install the wheel of onnxruntime-gpu that NVIDIA makes for this JetPack, or build one (docs/gpu.md)"
_KERNELS_HINT = "take a wheel of onnxruntime-gpu with kernels for it, or build one (docs/gpu.md)"
_LIBRARIES_HINT = "install the CUDA libraries of this version, or the packages nvidia-* that hold them (docs/gpu.md)"
_VULKAN_HINT = "install a Vulkan driver: apt-get install libvulkan1 mesa-vulkan-drivers"


@dataclass(frozen=True)
class Finding:
    """Whether a provider can be used here."""

    provider: Provider
    usable: bool
    reason: str
    """Why, or why not; for people."""
    hint: str = ""
    """What would make it usable."""


@dataclass(frozen=True)
class Choice:
    """The provider of a session."""

    name: Provider
    reason: str
    """Why this one; for people."""


MADE_FOR_CPU: Final = Choice("cpu", "the bundle was made for it")


@dataclass(frozen=True)
class Machine:
    """Where to look; tests look elsewhere."""

    libraries: Path | None
    """Folder of onnxruntime's libraries; None where it is not installed."""
    webgpu: bool
    """The package onnxruntime-ep-webgpu is installed."""
    gpu: Gpu | None
    """NVIDIA's."""
    jetson: bool
    render_nodes: bool
    """Some GPU has a driver that programs may compute with."""

    @classmethod
    def here(cls) -> Machine:
        """This machine and this Python."""
        package = _package("onnxruntime")
        return cls(
            libraries=package and package / "capi",
            webgpu=_package("onnxruntime_ep_webgpu") is not None,
            gpu=find_gpu(),
            jetson=jetson() is not None,
            render_nodes=any(_DRI.glob("renderD*")),
        )


def survey(machine: Machine | None = None) -> list[Finding]:
    """What every provider says to this machine, the CPU first."""
    machine = machine or Machine.here()
    cuda = _cuda(machine)
    return [Finding("cpu", usable=True, reason="always there"), cuda, _tensorrt(machine, cuda), _webgpu(machine)]


def choose(wanted: Literal["auto"] | Provider, target: Target, machine: Machine | None = None) -> Choice:
    """The provider that computes a bundle.

    Args:
        wanted: the setting ``engine.provider``.
        target: what the bundle was made for.
        machine: where to look; None = here.

    Raises:
        ConfigError: what is wanted cannot be used, or not with this bundle; or the bundle was made for what cannot be
            used.
    """
    if wanted == "auto" and target == "cpu":
        return MADE_FOR_CPU
    provider = PROVIDERS_OF[target][0] if wanted == "auto" else wanted
    finding = next(each for each in survey(machine) if each.provider == provider)
    if wanted == "auto" and not finding.usable:
        hint = f"{finding.hint}; or export the bundle with --target cpu"
        raise ConfigError(f"the bundle was made for {target}, which cannot be used: {finding.reason}", hint=hint)
    if not finding.usable:
        raise ConfigError(f"engine.provider {wanted} cannot be used: {finding.reason}", hint=finding.hint)
    if provider not in PROVIDERS_OF[target]:
        hint = f"set engine.provider to auto, or export the bundle with --target {_target(provider)}"
        raise ConfigError(f"engine.provider {wanted} cannot run a bundle that was made for {target}", hint=hint)
    return Choice(provider, finding.reason)


def _target(provider: Provider) -> Target:
    return next(target for target, providers in PROVIDERS_OF.items() if provider in providers)


def _cuda(machine: Machine) -> Finding:
    library = machine.libraries and machine.libraries / "libonnxruntime_providers_cuda.so"
    install = _JETSON_HINT if machine.jetson else _CUDA_HINT
    if library is None or not library.exists():
        return Finding("cuda", usable=False, reason="the installed onnxruntime has no CUDA", hint=install)
    if machine.gpu is None:
        hint = "install NVIDIA's driver; in a container, hand the GPU in"
        return Finding("cuda", usable=False, reason="no NVIDIA GPU answers (libcuda.so.1)", hint=hint)
    try:
        facts = read_library(library)
    except (OSError, ValueError) as error:
        return Finding("cuda", usable=False, reason=str(error), hint=install)
    kernels = _kernels(facts)
    if not facts.runs_on(machine.gpu):
        reason = f"this GPU is sm_{machine.gpu.sm}, the installed onnxruntime has kernels for {kernels}"
        hint = (
            _JETSON_HINT if machine.gpu.on_chip else "take a wheel of onnxruntime-gpu with kernels for it (docs/gpu.md)"
        )
        return Finding("cuda", usable=False, reason=reason, hint=hint)
    if missing := _missing(facts):
        reason = f"{', '.join(missing)} cannot be loaded"
        return Finding("cuda", usable=False, reason=reason, hint=_LIBRARIES_HINT)
    return Finding("cuda", usable=True, reason=f"this GPU is sm_{machine.gpu.sm}, with kernels for {kernels}")


def _kernels(library: Library) -> str:
    names = [f"sm_{sm}" for sm in sorted(library.kernels)] + [f"compute_{sm}" for sm in sorted(library.ptx)]
    return ", ".join(names) or "GPUs that it does not name"


def _tensorrt(machine: Machine, cuda: Finding) -> Finding:
    library = machine.libraries and machine.libraries / "libonnxruntime_providers_tensorrt.so"
    if library is None or not library.exists():
        reason, hint = "the installed onnxruntime has no TensorRT", "use cuda, which runs the quantized products anyway"
        return Finding("tensorrt", usable=False, reason=reason, hint=hint)
    if not cuda.usable:
        return Finding("tensorrt", usable=False, reason=f"it needs CUDA: {cuda.reason}", hint=cuda.hint)
    try:
        missing = _missing(read_library(library))
    except (OSError, ValueError) as error:
        return Finding("tensorrt", usable=False, reason=str(error), hint="install onnxruntime again")
    if missing:
        reason = f"{', '.join(missing)} cannot be loaded"
        return Finding("tensorrt", usable=False, reason=reason, hint="install TensorRT")
    return Finding("tensorrt", usable=True, reason="what it cannot take, CUDA computes")


def _webgpu(machine: Machine) -> Finding:
    if not machine.webgpu:
        reason, hint = "onnxruntime-ep-webgpu is not installed", "pip install onnxruntime-ep-webgpu==0.4.0"
        return Finding("webgpu", usable=False, reason=reason, hint=hint)
    try:
        ctypes.CDLL("libvulkan.so.1")
    except OSError:
        return Finding("webgpu", usable=False, reason="libvulkan.so.1 cannot be loaded", hint=_VULKAN_HINT)
    if machine.render_nodes:
        return Finding("webgpu", usable=True, reason="there is a GPU with a driver (/dev/dri/renderD*)")
    if os.environ.get(SOFTWARE_ADAPTER) == "1":
        return Finding("webgpu", usable=True, reason=f"on a GPU that is played by the processor ({SOFTWARE_ADAPTER})")
    reason = "there is no GPU with a driver (/dev/dri/renderD*)"
    return Finding("webgpu", usable=False, reason=reason, hint="in a container, hand /dev/dri in")


def _missing(library: Library) -> list[str]:
    """NVIDIA's libraries that it needs and that are nowhere."""
    return [name for name in library.needed if name.startswith(("libcu", "libnv")) and not can_load(name)]


def _package(name: str) -> Path | None:
    """Folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None
