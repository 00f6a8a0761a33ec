"""Adapters from the request to the answer: names, files that come and go, what is refused, what is cached for whom."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from edge.adapter import AdapterConfig, read_adapter, read_config
from edge.bundle import read_manifest
from edge.config import load_settings
from edge.engine.engine import Engine
from edge.engine.lora import Adapter
from edge.engine.prefix import EVERYONE, is_everyones, owned_by, owners
from edge.engine.sampler import SamplingParams
from edge.errors import AdapterError, BundleError, ModelNotFoundError
from edge.loader import load_service
from edge.service import Delta, Event, Failed, Finished, GenerationRequest
from edge.settings.server import ServerSettings
from export.architectures import architecture_for
from export.checkpoint import open_checkpoint
from export.lora import projection_sizes
from export.pipeline import export_bundle
from export.progress import Silent
from export.quantize.recipes import RECIPES
from tests.export import peft, tiny
from tests.fakes import FakeEngine, make_service
from tests.serving import serving
from tests.tiny_bundles import export_tiny

CONFIG = tiny.qwen2_config()
SHAPES = {name: tensor.shape for name, tensor in tiny.random_tensors(CONFIG).items()}
SIZES = projection_sizes(architecture_for(CONFIG))
PROMPT = np.random.default_rng(0).integers(0, 200, 40).tolist()
TENSORS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model called ``tiny`` with the adapter ``one``."""
    folder = tmp_path_factory.mktemp("adapters")
    one = peft.write_adapter(folder / "one", peft.adapter_tensors(SHAPES, 8, seed=1))
    export_tiny(folder, CONFIG, name="tiny", adapters={"one": one})
    return folder / "bundle"


def environment(folder: Path) -> dict[str, str]:
    options = {"ENGINE_SLOTS": 3, "ENGINE_CONTEXT": 96, "ENGINE_THREADS": 1, "ENGINE_PREFIX_CACHE_MB": 8}
    return {f"QWEDGE_{name}": str(value) for name, value in {**options, "MODEL_ADAPTERS": folder}.items()}


@pytest.fixture
def client(bundle: Path, tmp_path: Path) -> Iterator[httpx.Client]:
    """Serves the bundle and the adapters in ``tmp_path / "adapters"``."""
    (tmp_path / "adapters").mkdir()
    service = load_service(bundle, read_manifest(bundle), load_settings(env=environment(tmp_path / "adapters")))
    with (
        serving(service, ServerSettings(port=0)) as (host, port),
        httpx.Client(base_url=f"http://{host}:{port}", timeout=60) as client,
    ):
        yield client


def complete(client: httpx.Client, model: str) -> httpx.Response:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    return client.post("/v1/completions", json=body)


def logprobs(client: httpx.Client, model: str) -> list[float]:
    """Log-probability of each answered token: a fingerprint of what computed it."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 1, "repetition_penalty": 1}
    values: list[float] = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]["token_logprobs"]
    return values


def test_models_are_listed_with_their_adapters(client: httpx.Client, tmp_path: Path) -> None:
    def listed() -> list[str]:
        return [model["id"] for model in client.get("/v1/models").json()["data"]]

    assert listed() == ["tiny", "tiny:one"]
    peft.write_adapter(tmp_path / "adapters" / "two", peft.adapter_tensors(SHAPES, 4))
    assert listed() == ["tiny", "tiny:one", "tiny:two"]
    assert client.get("/v1/models/tiny:two").json()["id"] == "tiny:two"
    assert client.get("/v1/models/tiny:three").status_code == 404


def test_the_name_chooses_the_adapter(client: httpx.Client, bundle: Path) -> None:
    answer = complete(client, "tiny:one").json()
    assert answer["model"] == "tiny:one"
    manifest = read_manifest(bundle)
    engine = Engine(bundle, manifest, slots=1, context=96, threads=1)
    (entry,) = manifest.adapters
    engine.use_adapter(0, engine.places.read(bundle / entry.file, AdapterConfig(entry.rank, entry.scale)))
    logits = engine.prefill(0, np.array(PROMPT), 0)[: manifest.vocab_size].astype(np.float64)
    shifted = logits - logits.max()
    expected = shifted[logits.argmax()] - np.log(np.exp(shifted).sum())
    assert logprobs(client, "tiny:one")[0] == pytest.approx(expected, abs=1e-5)
    assert logprobs(client, "tiny") != logprobs(client, "tiny:one")


@pytest.mark.parametrize("name", ["tiny:two", "tiny:", "tiny:../one", "other:one", "one", ":one", "tiny:one:one"])
def test_an_unknown_adapter_is_not_found(client: httpx.Client, name: str) -> None:
    response = complete(client, name)
    assert response.status_code == 404
    error = response.json()["error"]
    assert error["code"] == "model_not_found"
    assert "tiny, tiny:one" in json.dumps(error)


def test_adapters_come_change_and_go_while_serving(client: httpx.Client, tmp_path: Path) -> None:
    folder = tmp_path / "adapters" / "two"
    peft.write_adapter(folder, peft.adapter_tensors(SHAPES, 4, seed=2))
    first = logprobs(client, "tiny:two")
    assert logprobs(client, "tiny:two") == pytest.approx(first, abs=1e-5)
    peft.write_adapter(folder, peft.adapter_tensors(SHAPES, 20, seed=3))
    assert np.abs(np.subtract(logprobs(client, "tiny:two"), first)).max() > 1e-3
    shutil.rmtree(folder)
    assert complete(client, "tiny:two").status_code == 404


def test_an_adapter_that_cannot_be_used_is_not_found_until_it_is_mended(
    client: httpx.Client, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = peft.write_adapter(tmp_path / "adapters" / "two", peft.adapter_tensors(SHAPES, 4), use_dora=True)
    with caplog.at_level(logging.WARNING, "edge.adapters"):
        assert [complete(client, "tiny:two").status_code for _ in range(2)] == [404, 404]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["the adapter two cannot be used"]
    peft.write_adapter(folder, peft.adapter_tensors(SHAPES, 4))
    assert complete(client, "tiny:two").status_code == 200


def test_prefixes_are_shared_within_an_adapter_only(client: httpx.Client) -> None:
    def cached(model: str) -> int:
        usage = complete(client, model).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert [cached("tiny"), cached("tiny:one")] == [0, 0]
    assert [cached("tiny"), cached("tiny:one")] == [39, 39]


def test_a_sequence_keeps_its_adapter_when_its_slot_is_taken_away() -> None:
    """Two requests that do not fit the budget together; answers of the fake begin with the adapter's digest."""
    service = make_service(FakeEngine(reply=lambda prompt: prompt * 100), kv_cache_bytes=160 * 4)
    events: list[tuple[int, Event]] = []
    ended = threading.Semaphore(0)

    def on_event(index: int, event: Event) -> None:
        events.append((index, event))
        if isinstance(event, Finished | Failed):
            ended.release()

    adapters = (Adapter("one", frozenset(), 1, {}), None)
    requests = [GenerationRequest((97 + i,), SamplingParams(), adapter=each) for i, each in enumerate(adapters)]
    service.start()
    service.submit_all(requests, on_event)
    assert all(ended.acquire(timeout=60) for _ in requests)
    service.stop()
    texts = ["".join(event.text for index, event in events if index == i and isinstance(event, Delta)) for i in (0, 1)]
    assert texts == ["one: " + "a" * 100, "b" * 100]
    assert service.stats().num_preempted


def test_owners_of_prefixes() -> None:
    assert owners("a") == ("a", EVERYONE)
    assert owners(owned_by("a", "d")) == (owned_by("a", "d"), owned_by(EVERYONE, "d"))
    assert owned_by("a", "d") not in owners("a")
    assert [is_everyones(name) for name in (EVERYONE, owned_by(EVERYONE, "d"), "a", owned_by("a", "d"))] == [
        True, True, False, False,
    ]  # fmt: skip


def test_a_folder_of_adapters_needs_places(bundle: Path, tmp_path: Path) -> None:
    with open_checkpoint(bundle.parent / "checkpoint") as checkpoint:
        manifest = export_bundle(checkpoint, tmp_path / "plain", RECIPES["fp32"], progress=Silent()).manifest
    with pytest.raises(BundleError, match="no places for LoRA"):
        load_service(tmp_path / "plain", manifest, load_settings(env=environment(tmp_path)))
    service = load_service(tmp_path / "plain", manifest, load_settings(env={}))
    with pytest.raises(ModelNotFoundError):
        service.model.find_adapter(f"{manifest.name}:one")


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"bias": "lora_only"},
        {"peft_type": "LOHA"},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 4}},
        {"init_lora_weights": "pissa_niter_4"},
        {"r": 0},
        {"r": "8"},
        {"lora_alpha": None},
        {"lora_alpha": float("nan")},
    ],
    ids=str,
)
def test_what_is_more_than_plain_lora_is_refused(tmp_path: Path, settings: Mapping[str, Any]) -> None:
    folder = peft.write_adapter(tmp_path / "a", peft.adapter_tensors(SHAPES, 4), **settings)
    with pytest.raises(AdapterError, match=next(iter(settings))):
        read_config(folder / "adapter_config.json")


def test_the_scale_is_part_of_what_was_read(tmp_path: Path) -> None:
    tensors = peft.adapter_tensors(SHAPES, 4)
    folder = peft.write_adapter(tmp_path / "a", tensors, lora_alpha=6, use_rslora=True)
    config = read_config(folder / "adapter_config.json")
    assert config == AdapterConfig(rank=4, scale=3.0)
    file = read_adapter(folder / TENSORS, config, SIZES)
    a, b = file.pairs[1, "up_proj"]
    stem = "base_model.model.model.layers.1.mlp.up_proj"
    np.testing.assert_array_equal(a, tensors[f"{stem}.lora_A.weight"])
    np.testing.assert_array_equal(b, 3 * tensors[f"{stem}.lora_B.weight"])
    assert read_adapter(folder / TENSORS, AdapterConfig(4, 1.0), SIZES).digest != file.digest


@pytest.mark.parametrize(("dtype", "tolerance"), [("F32", 0), ("F16", 1e-3), ("BF16", 1e-2)])
def test_number_formats(tmp_path: Path, dtype: str, tolerance: float) -> None:
    tensors = peft.adapter_tensors(SHAPES, 4)
    folder = peft.write_adapter(tmp_path / "a", tensors, dtype=dtype)
    a, _ = read_adapter(folder / TENSORS, AdapterConfig(4, 1.0), SIZES).pairs[0, "q_proj"]
    expected = tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    np.testing.assert_allclose(a, expected, rtol=tolerance)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{Q}.lora_B.weight": None}, "lora_B of q_proj in layer 0 is missing"),
        ({f"{Q}.lora_A.weight": np.ones((4, 65), np.float32)}, "instead of"),
        ({f"{Q}.lora_A.weight": np.ones((5, 64), np.float32)}, "instead of"),
        ({f"{Q}.lora_B.weight": np.full((64, 4), np.nan, np.float32)}, "NaN"),
        ({f"{Q}.lora_B.weight": np.full((64, 4), 1e6, np.float32)}, "NaN, infinity or values beyond"),
        ({f"{Q}.lora_magnitude_vector": np.ones((1, 64), np.float32)}, "has no place"),
        ({f"{Q.replace('0', '2')}.lora_A.weight": np.ones((4, 64), np.float32)}, "has no place"),
        ({"base_model.model.lm_head.lora_A.weight": np.ones((4, 64), np.float32)}, "has no place"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, changes: Mapping[str, Any], message: str) -> None:
    changed = peft.adapter_tensors(SHAPES, 4) | changes
    tiny.write_safetensors(
        tmp_path / TENSORS, {name: each for name, each in changed.items() if each is not None}, "F32"
    )
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path / TENSORS, AdapterConfig(4, 2.0), SIZES)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """Cut anywhere, or with any byte of the header changed: an error of ours, or an adapter that fits."""
    path = tmp_path / TENSORS
    tiny.write_safetensors(path, peft.adapter_tensors(SHAPES, 2, targets=["q_proj"], layers=[0]), "F16")
    whole, config = path.read_bytes(), AdapterConfig(2, 1.0)
    header = 8 + int.from_bytes(whole[:8], "little")
    for end in {*range(0, header, 7), header, len(whole) - 1}:
        path.write_bytes(whole[:end])
        with pytest.raises(AdapterError):
            read_adapter(path, config, SIZES)
    path.write_bytes(whole + b"\0")
    with pytest.raises(AdapterError, match="after its last tensor"):
        read_adapter(path, config, SIZES)
    rng, refused = np.random.default_rng(0), 0
    for position in range(header):
        changed = bytearray(whole)
        changed[position] = int(rng.integers(0, 256))
        path.write_bytes(changed)
        try:
            read_adapter(path, config, SIZES)
        except AdapterError:
            refused += 1
    assert refused > header // 2
