"""The engine's other half on a GPU: its session, its cache of keys and values, and its steps (docs/gpu.md).

The cache stays on the device: per slot and layer an array of its own, bound as past and present, in which attention
writes in place. What :mod:`edge.engine.kv_cache` does with page tables no GPU can: rows of a decode step are not shown
where they lie. So each slot's token is a step by itself, with the bits that it has alone. Ids, lengths and logits lie
where they lie for a processor; onnxruntime moves them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge.bundle import GRAPH, KVLayout
from edge.engine.kv_cache import Cache
from edge.engine.providers import SOFTWARE_ADAPTER, Provider
from edge.engine.session import ERRORS_ONLY, Session, Step
from edge.engine.steps import Append, Binder, PromptSteps, Sizes
from edge.errors import ConfigError

_NAMES: Final[dict[Provider, tuple[str, ...]]] = {
    "cuda": ("CUDAExecutionProvider",),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider"),
}
_WEBGPU: Final = "WebGpuExecutionProvider"


class DeviceArray(Protocol):
    """An array on a device: onnxruntime's OrtValue."""

    def numpy(self) -> NDArray[Any]:
        """A copy."""
        ...

    def update_inplace(self, array: NDArray[Any]) -> None:
        """Overwrite it with an array of its shape and type."""
        ...


class Device:
    """A GPU, as onnxruntime reaches it.

    Args:
        provider: cuda, tensorrt or webgpu, which :func:`edge.engine.providers.choose` has found usable.

    Raises:
        ConfigError: onnxruntime finds no device for it.
    """

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self._plugin = _register_webgpu() if provider == "webgpu" else None
        if self._plugin is None:
            # CUDA's libraries may be packages of Python's, which the system's loader does not look into.
            ort.preload_dlls(cudnn=False)

    def load(self, graph: Path, options: ort.SessionOptions) -> ort.InferenceSession:
        """A session that computes on the device.

        Raises:
            ConfigError: onnxruntime refuses.
        """
        names = _NAMES.get(self.provider)
        if self._plugin is not None:
            options.add_provider_for_devices([self._plugin], {})
        try:
            # By itself it would go on without the device, and say so nowhere but on the console.
            session = ort.InferenceSession(os.fspath(graph), options, names, enable_fallback=0)
        except Exception as error:  # noqa: BLE001 - onnxruntime has one class per status and no common base
            raise self._refused(_first_line(error)) from None
        if (names or (_WEBGPU,))[0] not in session.get_providers():
            raise self._refused("onnxruntime left it out")
        return session

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any]) -> DeviceArray:
        """An array on the device, with any content.

        Raises:
            ConfigError: the device has no room for it.
        """
        try:
            array: DeviceArray = ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype.type, **self._memory())
        except Exception as error:  # noqa: BLE001 - as above
            size = math.prod(shape) * dtype.itemsize
            hint = "serve with fewer --slots or a smaller --context"
            message = f"no {size >> 10} KiB for keys and values on the GPU: {_first_line(error)}"
            raise ConfigError(message, hint=hint) from None
        return array

    def _memory(self) -> dict[str, Any]:
        if self._plugin is None:
            return {"device_type": "cuda"}
        return {"memory_info": self._plugin.memory_info(ort.OrtDeviceMemoryType.DEFAULT)}

    def _refused(self, reason: str) -> ConfigError:
        hint = "qwedge doctor says what is there; a bundle exported with --target cpu runs on the processor"
        return ConfigError(f"{self.provider} cannot load the graph: {reason}", hint=hint)


class DeviceSession(Session):
    """A model loaded to a device; arguments and errors as for :class:`Session` and :class:`Device`."""

    def __init__(self, bundle: Path, device: Device, *, threads: int, spin_us: int, context: int) -> None:
        self._device = device
        super().__init__(bundle, threads=threads, spin_us=spin_us, context=context)

    def _load(self, bundle: Path, options: ort.SessionOptions) -> ort.InferenceSession:
        return self._device.load(bundle / GRAPH, options)

    def _new_step(self) -> Step:
        return _DeviceStep(self._session)


class _DeviceStep(Step):
    """A step whose inputs come from the processor, and whose cache is on the device."""

    def __init__(self, session: ort.InferenceSession) -> None:
        super().__init__(session)
        self._inputs: dict[str, NDArray[Any]] = {}

    def bind_input(self, name: str, array: NDArray[Any]) -> None:
        """Bind an input to an array, whose content is moved at each run."""
        self._inputs[name] = array

    def bind_cache(self, name: str, array: Cache | DeviceArray) -> None:
        """Bind a past input and its present output to the same array on the device."""
        self._binding.bind_ortvalue_input(f"past_key_values.{name}", array)
        self._binding.bind_ortvalue_output(f"present.{name}", array)

    def run(self) -> None:
        """Run the graph."""
        for name, array in self._inputs.items():  # binding is what moves them
            super().bind_input(name, array)
        super().run()


class DevicePool:
    """Slots of keys and values on a device; a slot's memory is taken when it is first used, and kept.

    Args:
        device: where they lie.
        layout: layers, heads, head dimension and type.
        slots: sequences it holds.
        context: tokens per slot.
    """

    def __init__(self, device: Device, layout: KVLayout, *, slots: int, context: int) -> None:
        self.layers = layout.layers
        self._device = device
        self._dtype = np.dtype(layout.dtype)
        self._shape = (1, layout.kv_heads, context, layout.head_dim)
        self._slots: list[list[DeviceArray]] = [[] for _ in range(slots)]

    def slot(self, layer: int, slot: int) -> tuple[DeviceArray, DeviceArray]:
        """Keys and values of one slot [1, kv_heads, context, head_dim] each, in place.

        Raises:
            ConfigError: the device has no room for them.
        """
        arrays = self._arrays(slot)
        return arrays[2 * layer], arrays[2 * layer + 1]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of a slot over another slot's."""
        self.write(target, self.read(source, length), length)

    def read(self, slot: int, length: int) -> Cache:
        """A copy of the first ``length`` tokens of a slot [2 * layers, kv_heads, length, head_dim]."""
        copy: Cache = np.stack([array.numpy()[0, :, :length] for array in self._arrays(slot)])
        return copy

    def write(self, slot: int, cache: Cache, length: int) -> None:
        """Put the first ``length`` tokens of what :meth:`read` returned into a slot."""
        whole = np.zeros(self._shape, self._dtype)
        for array, tokens in zip(self._arrays(slot), cache, strict=True):
            whole[0, :, :length] = tokens[:, :length]
            array.update_inplace(whole)

    def release(self, slot: int) -> None:
        """Nothing: the steps of the slot are bound to its memory."""

    def _arrays(self, slot: int) -> list[DeviceArray]:
        if not self._slots[slot]:
            self._slots[slot] = [self._device.empty(self._shape, self._dtype) for _ in range(2 * self.layers)]
        return self._slots[slot]


class DeviceSteps(PromptSteps):
    """The steps bound to a session on a device; what they return as in :class:`edge.engine.steps.Steps`."""

    def __init__(self, binder: Binder[DevicePool], sizes: Sizes) -> None:
        super().__init__(lambda slot, most, reads: Append(binder, slot, most=most, reads=reads, fills_up=False), sizes)
        self._padded_vocab = binder.logits.shape[1]
        self.drop_mapped = binder.session.drop_mapped

    def decode(self, slots: Sequence[int], ids: Sequence[int], past: Sequence[int]) -> NDArray[np.float32]:
        """Logits [n, padded_vocab] of tokens of any slots, one after the other."""
        logits = np.empty((len(ids), self._padded_vocab), np.float32)
        for i, (slot, token, length) in enumerate(zip(slots, ids, past, strict=True)):
            logits[i] = self._prefill(slot).run(np.array([token]), length)[0]
        return logits


def _register_webgpu() -> ort.OrtEpDevice:
    """WebGPU's device of onnxruntime's, whose package is a plugin.

    Raises:
        ConfigError: there is none.
    """
    if device := _webgpu_device():
        return device
    # Without it, onnxruntime offers WebGPU only beside GPUs on PCI, which those of ARM boards are not.
    os.environ.setdefault(SOFTWARE_ADAPTER, "1")
    ort.set_default_logger_severity(ERRORS_ONLY)  # it would warn that this is so
    path = import_module("onnxruntime_ep_webgpu").get_library_path()
    ort.register_execution_provider_library("webgpu", path)
    if device := _webgpu_device():
        return device
    hint = "is a Vulkan driver installed for this GPU? (vulkaninfo --summary)"
    raise ConfigError("onnxruntime finds no device for WebGPU", hint=hint)


def _webgpu_device() -> ort.OrtEpDevice | None:
    return next((each for each in ort.get_ep_devices() if each.ep_name == _WEBGPU), None)


def _first_line(error: Exception) -> str:
    """What onnxruntime says, without the condition in its source that did not hold."""
    return str(error).partition("\n")[0].rpartition(" was false. ")[2]
