"""`qwedge plan` against what it predicts: packed weights, the cache's pages, exported shapes, published figures."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import edge.cli
import edge.loader
from edge.bundle import GRAPH, KVLayout, Manifest, Source, read_manifest
from edge.config import load_settings
from edge.engine.kv_cache import KVPool
from edge.errors import BundleError, ConfigError
from edge.machine import isa_features
from edge.planning.available import Available, read_available
from edge.planning.boards import board_named, known_boards
from edge.planning.check import check_memory, least_memory
from edge.planning.graph_file import read_shape
from edge.planning.machine import has_int8_kernels
from edge.planning.memory import Serving, kv_bytes, one_conversation, packed_bytes, predict_memory
from edge.planning.models import NARROW, Part, known_models, known_recipes, shape_of
from edge.planning.plan import make_plan, table
from edge.planning.probe import measure, sample
from edge.planning.shape import Product, Shape
from edge.planning.speed import predict_speed
from export.architectures import architecture_for
from export.catalog import catalog
from export.graph import GraphBuilder
from export.quantize import recipes
from export.quantize.recipes import RECIPES
from export.weights import DataFile
from tests.edge import published
from tests.edge.published import MOST_DEVIATION, Row
from tests.export import tiny
from tests.export.test_configs import UnreadWeights, open_published
from tests.tiny_bundles import export_tiny

ROOT = Path(__file__).parents[2]
PLANNING = ROOT / "docs" / "planning.md"
CONFIGS = {
    "qwen2.5-0.5b": "Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b": "Qwen2.5-1.5B-Instruct",
    "qwen2.5-3b": "Qwen2.5-3B-Instruct",
    "qwen2.5-7b": "Qwen2.5-7B-Instruct",
    "qwen3-0.6b": "Qwen3-0.6B",
    "qwen3-1.7b": "Qwen3-1.7B",
    "qwen3-4b": "Qwen3-4B",
    "qwen3-8b": "Qwen3-8B",
    "qwen3.5-0.8b": "Qwen3.5-0.8B",
    "qwen3.5-2b": "Qwen3.5-2B",
    "qwen3.5-4b": "Qwen3.5-4B",
    "qwen3.5-9b": "Qwen3.5-9B",
}
Run = Callable[..., tuple[int, str, str]]
PLENTY = Available(hard=1 << 40, soft=1 << 40, limit="this machine has", resident=0)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real one of a tiny model."""
    folder = tmp_path_factory.mktemp("planning")
    export_tiny(folder, tiny.qwen2_config(), RECIPES["balanced"])
    return folder / "bundle"


def built(model: str, recipe: str, folder: Path) -> tuple[Path, Manifest]:
    """The graph that the exporter makes of a published config, without weights, and as much manifest as it needs."""
    with open_published(CONFIGS[model], folder / "m") as checkpoint, DataFile(folder) as file:
        architecture = architecture_for(checkpoint.config)
        fitted = RECIPES[recipe].fitted(checkpoint.config["hidden_size"], is_calibrated=False)
        graph = GraphBuilder(UnreadWeights(checkpoint, fitted, file, lambda _: None))
        bytes_per_token = architecture.build(graph, 1024).bytes_per_token
        (folder / GRAPH).write_bytes(ir.serde.serialize_model(graph.model(model)).SerializeToString())
    manifest = Manifest.model_construct(
        name=model,
        recipe=fitted.describe(),
        context_length=architecture.max_positions,
        vocab_size=architecture.padded_vocab_size,
        padded_vocab_size=architecture.padded_vocab_size,
        kv=architecture.kv_layout(),
        state=architecture.state_layout(),
        weight_bytes_per_token=bytes_per_token,
        source=Source(kind="catalog", location=model),
        files=[],
    )
    return folder, manifest


def counted(shape: Shape) -> Counter[Product]:
    """Its products, equal ones together."""
    result: Counter[Product] = Counter()
    for product in shape.products:
        result[replace(product, count=1)] += product.count
    return result


def test_each_board_with_settings_can_be_planned_for() -> None:
    folders = {path.parent.name: path.parent for path in (ROOT / "firmware-configs").glob("*/edge.toml")}
    assert known_boards().keys() == folders.keys()
    for name, board in known_boards().items():
        share = re.search(r"^MemoryMax=(\d+)%$", (folders[name] / "board.conf").read_text(), re.MULTILINE)
        assert share is not None
        assert board.memory_share == int(share[1]) / 100
        threads = tomllib.loads((folders[name] / "edge.toml").read_text())["engine"].get("threads", board.cores)
        assert threads == board.cores


def test_the_recipes_are_those_of_the_export() -> None:
    assert known_recipes().keys() == RECIPES.keys()
    assert NARROW == recipes.NARROW
    for name, recipe in known_recipes().items():
        described = RECIPES[name].describe()
        _same({"table": recipe.table}, {"table": described["table"]}, name)
        for model in known_models().values():
            expected = RECIPES[name].fitted(model.hidden_size, is_calibrated=False).layer.describe()
            _same(dict(recipe.layer_of(model)), expected, name)
        assert recipe.scales == described["scales"]
        assert recipe.candidates == described["head"].get("candidates", 0)
        assert recipe.corrected == described["head"].get("corrected", 0)


def _same(mine: Mapping[str, Part | None], expected: Mapping[str, Mapping[str, Any]], name: str) -> None:
    """These parts have these formats, and no others have any."""
    numbers = {part: (form.bits, form.block, form.symmetric) for part, form in mine.items() if form is not None}
    assert numbers == {
        part: (32, 1, False) if form["format"] == "float32" else (form["bits"], form["block"], form["symmetric"])
        for part, form in expected.items()
    }, name


def test_every_model_of_the_catalog_is_known() -> None:
    names = [name for key, model in known_models().items() for name in (key, *model.also)]
    assert len(names) == len(set(names))
    assert catalog().keys() <= set(names)
    assert known_models().keys() == CONFIGS.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_are_those_of_the_published_configs(name: str) -> None:
    config = json.loads((ROOT / "tests" / "data" / "configs" / f"{CONFIGS[name]}.json").read_text("utf-8"))
    text = config.get("text_config", config)
    model = known_models()[name]
    assert model.hidden_size == text["hidden_size"]
    assert model.intermediate_size == text["intermediate_size"]
    assert model.layers == text["num_hidden_layers"]
    assert model.heads == text["num_attention_heads"]
    assert model.kv_heads == text["num_key_value_heads"]
    assert model.head_dim == text.get("head_dim", model.hidden_size // model.heads)
    assert model.vocab == text["vocab_size"]
    assert model.context == text["max_position_embeddings"]
    matrices = sum(
        rows * columns * count
        for found in model.matrices(known_recipes()["int8"].layer).values()
        for rows, columns, count in found
    )
    tables = (1 if model.tied else 2) * model.vocab * model.hidden_size
    parameters = next(entry.parameters for key, entry in catalog().items() if key == name or key in model.also)
    # Norms, biases and convolutions are the rest.
    assert 0.999 < (matrices + tables) / parameters < 1


@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        ("qwen2.5-0.5b", "balanced"),
        ("qwen3-0.6b", "small"),
        ("qwen3.5-0.8b", "balanced"),
        ("qwen3.5-0.8b", "int8"),
    ],
)
def test_a_graph_is_read_as_what_the_tables_say(model: str, recipe: str, tmp_path: Path) -> None:
    read, known = read_shape(*built(model, recipe, tmp_path)), shape_of(model, recipe)
    assert counted(read) == counted(known)
    same = ("converted_bytes", "heads", "table", "candidates", "num_layers", "num_heads", "hidden_size", "kv", "state")
    assert [getattr(read, name) for name in same] == [getattr(known, name) for name in same]
    assert read.widest == known.widest
    assert read.attention_flops == known.attention_flops


@pytest.mark.parametrize("recipe", ["balanced", "fast", "small", "nodot", "quality", "int8", "fp32"])
@pytest.mark.parametrize("model", ["qwen2.5-0.5b", "qwen3.5-4b"])
def test_rows_of_a_step_are_those_of_the_export(model: str, recipe: str) -> None:
    exported = RECIPES[recipe].fitted(shape_of(model).hidden_size, is_calibrated=False)
    assert shape_of(model, recipe).row_multiple == exported.row_multiple


def test_a_float_graph_has_float_products(tmp_path: Path) -> None:
    shape = read_shape(*built("qwen2.5-0.5b", "fp32", tmp_path))
    assert counted(shape) == counted(shape_of("qwen2.5-0.5b", "fp32"))


def test_a_damaged_graph_is_an_error_of_the_bundle(bundle: Path, tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    source, manifest, graph = random.Random(seed), read_manifest(bundle), (bundle / GRAPH).read_bytes()
    for _ in range(40):
        damaged = bytearray(graph)
        damaged[source.randrange(len(graph))] ^= 1 << source.randrange(8)
        (tmp_path / GRAPH).write_bytes(damaged[: source.choice([len(graph), source.randrange(len(graph))])])
        try:
            read_shape(tmp_path, manifest)
        except BundleError as error:
            assert "graph" in error.message  # noqa: PT017 - most changes do no harm


PACKED = """
import sys
from pathlib import Path
from edge.engine.heap import trim_heap
from edge.engine.session import Session
from edge.planning.models import shape_of
from edge.planning.probe import sample, write_model

def anonymous():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))

write_model(Path(sys.argv[1]), sample(shape_of("qwen3-0.6b"), int8=True))
before = anonymous()
session = Session(Path(sys.argv[1]), threads=1, spin_us=0)
trim_heap()
print(anonymous() - before)
"""


def test_packed_weights_take_what_is_predicted(tmp_path: Path) -> None:
    if not has_int8_kernels(isa_features()):
        pytest.skip("this processor has no kernels for int8 activations")
    line = [sys.executable, "-c", PACKED, str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    predicted = sum(packed_bytes(product, int8=True) for product in sample(shape_of("qwen3-0.6b"), int8=True))
    assert int(done.stdout) == pytest.approx(predicted, rel=0.06)


def test_the_cache_takes_the_pages_that_are_predicted() -> None:
    for layout in (
        KVLayout(layers=3, kv_heads=2, head_dim=64),
        KVLayout(layers=2, kv_heads=3, head_dim=128, dtype="int8"),
    ):
        pool = KVPool(layout, slots=2, context=1000, rows=2)
        lengths = (1, 15, 16, 17, 300)
        for length in lengths:
            pool.release(0)
            shape = (2 * layout.layers, layout.kv_heads, length, layout.head_dim)
            pool.write(0, np.ones(shape, layout.dtype), length)
            assert os.fstat(pool._fd).st_blocks * 512 == kv_bytes(layout, length, 999)


def test_memory_grows_with_what_is_asked_for() -> None:
    shape = shape_of("qwen3.5-0.8b")
    serving = Serving(context=2048, slots=2, prefix_bytes=64 << 20)
    base = predict_memory(shape, serving).peak
    assert predict_memory(shape, replace(serving, slots=4)).peak > base
    assert predict_memory(shape, replace(serving, context=8192)).peak > base
    assert predict_memory(shape, replace(serving, prefix_bytes=256 << 20)).peak > base
    assert predict_memory(shape, replace(serving, kv_bytes=64 << 20)).peak < base
    assert predict_memory(shape, one_conversation(serving)).peak < base
    parts = {part.name: part.num_bytes for part in predict_memory(shape, serving).work}
    assert parts["keys and values"] == 2 * kv_bytes(shape.kv, 2048, 2048)
    assert shape.state is not None
    assert parts["states"] == 4 * shape.state.bytes_per_slot
    # Upper bits, lower bits and both, of 512 rows of the table for each sequence and each guess.
    assert parts["rows of candidates"] == 3 * 4 * (2 + 8) * 512 * 1024
    alone = predict_memory(shape, replace(serving, draft_tokens=0), fills=[300]).work
    assert {part.name: part.num_bytes for part in alone}["rows of candidates"] == 3 * 4 * 512 * 1024


def test_without_dotprod_8_bit_weights_stay_in_the_file() -> None:
    shape, serving = shape_of("qwen2.5-0.5b", "quality"), Serving(context=512, slots=1, prefix_bytes=0)
    fast, slow = (predict_memory(shape, serving, int8=int8) for int8 in (True, False))
    assert "weights, packed" not in {part.name for part in slow.fixed}
    assert fast.loaded - slow.loaded == sum(product.num_bytes for product in shape.products)
    # A product in 8 bits is taken apart as a whole: the head is 151,936 by 896 floats.
    assert slow.at_work - slow.loaded - (fast.at_work - fast.loaded) == 4 * 151_936 * 896
    plan = make_plan(shape, board_named("raspberry-pi-4"), serving, prompt_tokens=64)
    assert "dequantized at every use" in table(plan)
    assert make_plan(shape, board_named("raspberry-pi-5"), serving, prompt_tokens=64).notes() == []


@pytest.mark.parametrize("row", published.rows(), ids=lambda row: f"{row.device}, {row.model}")
def test_published_figures(row: Row) -> None:
    speed = row.predicted()
    pairs = [(speed.decode_tokens_per_second, row.decode)]
    if row.prefill is not None:
        pairs.append((speed.prefill_tokens_per_second, row.prefill))
    within = all(abs(predicted / measured - 1) <= MOST_DEVIATION for predicted, measured in pairs)
    # What is called no case must not be one: else the row belongs to the others.
    assert within == (not row.why_not)


def test_the_documentation_shows_each_published_row() -> None:
    lines = PLANNING.read_text("utf-8").splitlines()
    missing = [line for line in published.table() if line not in lines]
    assert missing == [], "python -m tests.edge.published prints the table"


def test_speed_follows_bytes_and_products() -> None:
    machine = board_named("raspberry-pi-5")
    small, large = (predict_speed(shape_of(name), machine, prompt_tokens=128) for name in ("qwen3-0.6b", "qwen3-8b"))
    assert small.decode_tokens_per_second > 5 * large.decode_tokens_per_second
    assert small.load_s < large.load_s
    faster = predict_speed(shape_of("qwen3-8b"), replace(machine, read_gbs=2 * machine.read_gbs), prompt_tokens=128)
    assert faster.decode.weights == pytest.approx(large.decode.weights / 2, rel=0.05)
    assert faster.prefill.weights == pytest.approx(large.prefill.weights, rel=0.1)
    watts = replace(machine, power_w=10.0)
    joules = predict_speed(shape_of("qwen3-8b"), watts, prompt_tokens=128).joules_per_token
    assert joules == pytest.approx(10 * large.decode.seconds)


@pytest.mark.parametrize("recipe", ["balanced", "int8", "fp32"])
def test_this_machine_is_measured(recipe: str) -> None:
    machine = measure("here", ("avx2",), 1 << 30, shape_of("qwen2.5-0.5b", recipe), seconds=0.02)
    assert 0.01 < machine.read_gbs < 10_000
    assert 0.01 < machine.gops < 100_000
    assert machine.int8
    assert not replace(machine, features=("asimd",)).int8


def test_a_machine_is_measured_with_the_models_own_products() -> None:
    shape = shape_of("qwen3.5-4b")
    some, whole = sample(shape, int8=True), sum(each.num_bytes for each in shape.layers)
    assert [(each.rows, each.columns, each.form) for each in some] == [
        (each.rows, each.columns, each.form) for each in shape.layers
    ]
    assert 150 << 20 <= sum(each.num_bytes for each in some) < whole
    assert sample(shape_of("qwen2.5-0.5b", "fp32"), int8=True)[0].count >= 1
    # Without int8 kernels what is in 8 bits is counted by what takes it apart.
    assert {each.form.bits for each in sample(shape, int8=False)} == {4}


def proc(folder: Path, *, available_kb: int = 4_000_000, swap_kb: int = 0, group: str | None = None) -> Path:
    """What the kernel would tell."""
    (folder / "self").mkdir(parents=True)
    (folder / "meminfo").write_text(f"MemAvailable: {available_kb} kB\nSwapFree: {swap_kb} kB\nHugePages_Total: 0\n")
    (folder / "self" / "status").write_text("VmRSS:\t  90000 kB\nRssAnon:\t   50000 kB\n")
    lines = "4:memory:/old\n" if group is None else f"4:memory:/old\n0::{group}\n"
    (folder / "self" / "cgroup").write_text(lines)
    return folder


def limited(group: Path, **files: str) -> Path:
    group.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (group / f"memory.{name.replace('_', '.')}").write_text(f"{text}\n")
    return group


def test_what_is_available_on_a_machine_without_limits(tmp_path: Path) -> None:
    found = read_available(proc(tmp_path / "proc", swap_kb=1_000_000), tmp_path / "none")
    assert found == Available(5_000_000 << 10, 4_000_000 << 10, "this machine has", 50_000 << 10)
    assert read_available(tmp_path, tmp_path) is None


def test_the_tightest_group_counts_without_the_files_it_has_read(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    stat = "anon 5\ninactive_file 200000000\nactive_file 50000000\nslab_reclaimable 0"
    limited(root / "a", max="1000000000", current="600000000", stat=stat, high="max", swap_max="0")
    limited(root / "a" / "b", max="max", current="1", high="500000000")
    found = read_available(proc(tmp_path / "proc", swap_kb=9_000_000, group="/a/b"), root)
    assert found is not None
    assert found.hard == 1_000_000_000 - (600_000_000 - 250_000_000)
    assert found.soft == 500_000_000 - 1
    assert "memory.max" in found.limit


def test_swap_counts_as_far_as_the_group_may_use_it(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    limited(root / "a", max="1000", current="400", swap_max="300", swap_current="100")
    found = read_available(proc(tmp_path / "proc", swap_kb=9, group="/a"), root)
    assert found is not None
    assert (found.hard, found.soft) == (1000 - 400 + 200, 600)


def test_a_real_group(tmp_path: Path) -> None:
    """Where this process may make one with a limit, it counts."""
    root = next((path for path in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")) if _can_limit(path)), None)
    if root is None:
        pytest.skip("no control groups of version 2 with memory that can be written to")
    group = root / f"qwedge-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.max").write_text(str(64 << 20))
        found = read_available(proc(tmp_path / "proc", group=f"/{group.name}"), root)
    finally:
        group.rmdir()
    assert found is not None
    assert found.hard <= 64 << 20


def _can_limit(root: Path) -> bool:
    control = root / "cgroup.subtree_control"
    return control.exists() and "memory" in control.read_text().split() and os.access(root, os.W_OK)


SERVING = Serving(context=4096, slots=8, prefix_bytes=64 << 20)


def test_what_suffices_for_one_conversation_is_not_refused(caplog: pytest.LogCaptureFixture) -> None:
    shape = shape_of("qwen2.5-0.5b")
    least = least_memory(shape, SERVING, int8=True)
    most = predict_memory(shape, SERVING).peak
    exactly = Available(hard=least - 1000, soft=least - 1000, limit="this machine has", resident=1000)
    with caplog.at_level(logging.WARNING):
        check_memory(shape, SERVING, replace(PLENTY, hard=most, soft=most), int8=True)
    assert caplog.messages == []
    check_memory(shape, SERVING, exactly, int8=True)
    assert "8 slots full of 4096 tokens" in caplog.text
    with pytest.raises(ConfigError) as refused:
        check_memory(shape, SERVING, replace(exactly, hard=least - 1001), int8=True)
    assert "needs" in refused.value.message
    assert "this machine has" in refused.value.message
    assert refused.value.exit_code == 2


def test_a_refusal_says_what_would_fit() -> None:
    shape = shape_of("qwen2.5-1.5b", "quality")

    def hint(megabytes: int) -> str:
        with pytest.raises(ConfigError) as refused:
            check_memory(shape, replace(SERVING, context=32768), replace(PLENTY, hard=megabytes * 1_000_000), int8=True)
        return refused.value.hint

    found = re.match(r"engine\.context = (\d+) fits", hint(2400))
    assert found is not None
    smaller = one_conversation(replace(SERVING, context=int(found[1])))
    assert (
        predict_memory(shape, smaller).peak
        <= 2_400_000_000
        < predict_memory(shape, replace(smaller, context=2 * smaller.context)).peak
    )
    assert re.match(r"qwen2\.5-1\.5b in the recipe \w+ fits", hint(1500))
    assert re.match(r"qwen\S+-0\.\db in the recipe \w+ fits", hint(600))
    assert hint(100).startswith("no known model fits")
    assert 'engine.memory_check = "off"' in hint(100)


@pytest.mark.parametrize(("megabytes", "advice"), [(1, ""), (60, "engine.context = 2048 with ")])
def test_a_refusal_says_when_guesses_take_what_a_longer_conversation_needs(megabytes: int, advice: str) -> None:
    shape = shape_of("qwen2.5-0.5b")
    limit = least_memory(shape, SERVING, int8=True) - megabytes * 1_000_000
    with pytest.raises(ConfigError) as refused:
        check_memory(shape, SERVING, replace(PLENTY, hard=limit), int8=True)
    assert refused.value.hint.startswith(f"{advice}engine.draft_tokens = 0 fits; or stop other programs")
    context = 2048 if advice else SERVING.context
    check_memory(shape, replace(SERVING, context=context, draft_tokens=0), replace(PLENTY, hard=limit), int8=True)


def test_loading_is_refused_before_it_takes_memory(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge.loader, "read_available", lambda: replace(PLENTY, hard=10_000_000, soft=10_000_000))
    manifest = read_manifest(bundle)
    with pytest.raises(ConfigError, match=r"needs \d+ MB, but this machine has 10 MB"):
        edge.loader.load_bundle(bundle, manifest, load_settings(None, {}, {}))
    loaded = edge.loader.load_bundle(bundle, manifest, load_settings(None, {}, {"engine.memory_check": "off"}))
    loaded.scheduler.start()
    loaded.scheduler.stop()


@pytest.fixture
def qwedge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a command: status, what it prints and what it complains about."""
    monkeypatch.setenv("QWEDGE_MODEL_STORE", str(tmp_path / "store"))

    def run(*args: str) -> tuple[int, str, str]:
        return (edge.cli.run(args), *capsys.readouterr())

    return run


def test_the_command_plans_for_a_board(qwedge: Run) -> None:
    status, out, _ = qwedge("plan", "qwen3-1.7b", "--board", "raspberry-pi-5", "--slots", "2", "--context", "2048")
    assert status == 0
    assert re.search(r"^fits +slots x tokens, all full: 1 x \d+, 2 x \d+", out, re.MULTILINE)
    assert re.search(r"^quality +[\d,]+ MB", out, re.MULTILINE)
    status, out, _ = qwedge("plan", "qwen3-1.7b", "--board", "raspberry-pi-5", "--json")
    plan = json.loads(out)
    assert (status, plan["fits"]) == (0, False)  # a budget of the cache makes it fit
    assert sum(plan["memory"]["parts"].values()) == plan["memory"]["at_work_bytes"]
    assert sum(plan["decode_seconds"].values()) == pytest.approx(1 / plan["decode_tokens_per_second"])


def test_the_budget_of_the_cache_that_is_named_is_the_largest_that_fits(qwedge: Run, tmp_path: Path) -> None:
    board = ("plan", "qwen3.5-2b", "--board", "raspberry-pi-5", "--memory", "4", "--context", "8192")
    status, out, _ = qwedge(*board)
    found = re.search(r"^fits with engine\.kv_cache_mb = (\d+)", out, re.MULTILINE)
    assert found is not None
    assert status == 0
    for budget, fits in ((int(found[1]), True), (int(found[1]) + 1, False)):
        (tmp_path / "edge.toml").write_text(f"[engine]\nkv_cache_mb = {budget}\n")
        _, out, _ = qwedge(*board, "--config", str(tmp_path / "edge.toml"), "--json")
        assert json.loads(out)["fits"] is fits


def test_a_prompt_that_no_context_holds_is_refused(qwedge: Run) -> None:
    status, _, complaint = qwedge("plan", "qwen3-1.7b", "--board", "raspberry-pi-5", "--prompt", "99999")
    assert (status, complaint.splitlines()[0]) == (2, "error: a prompt of 99999 tokens is too long for the model")


def test_what_does_not_fit_is_refused_with_what_does(qwedge: Run) -> None:
    status, out, _ = qwedge("plan", "qwen3-8b", "--board", "raspberry-pi-4", "--slots", "1")
    assert status == 1
    instead = re.search(r"does not fit\. What does: (\S+) --recipe (\S+)", out)
    assert instead is not None
    again = ("--slots", "1", "--context", "4096")
    assert qwedge("plan", instead[1], "--recipe", instead[2], "--board", "raspberry-pi-4", *again)[0] == 0
    status, out, _ = qwedge("plan", "qwen3-4b", "--board", "raspberry-pi-5", "--memory", "8", "--context", "32768")
    fewer = re.search(r"What does: --slots (\d+) --context (\d+)", out)
    assert status == 1
    assert fewer is not None
    sizes = ("--slots", fewer[1], "--context", fewer[2])
    assert qwedge("plan", "qwen3-4b", "--board", "raspberry-pi-5", "--memory", "8", *sizes)[0] == 0


def test_a_bundle_is_planned_by_its_graph(qwedge: Run, bundle: Path) -> None:
    status, out, _ = qwedge("plan", str(bundle), "--board", "rk3588", "--prompt", "128", "--output", "32", "--json")
    plan = json.loads(out)
    assert status == 0
    assert plan["model"] == read_manifest(bundle).name
    # A scale and a sum in float32 for each block, where the file has a scale and half a byte.
    ratio = plan["weight_bytes_per_token"] / read_manifest(bundle).weight_bytes_per_token
    assert 1 <= ratio < 1.5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("nothing", "--board", "rk3588"), "there is no model 'nothing'"),
        (("qwen3-0.6b", "--board", "toaster"), "there is no board 'toaster'"),
        (("qwen3-0.6b",), "which machine?"),
        (("qwen3-0.6b", "--board", "rk3588", "--here"), "which machine?"),
        (("qwen3-0.6b", "--board", "rk3588", "--recipe", "tiny"), "there is no recipe 'tiny'"),
        (("qwen3-0.6b", "--board", "rk3588", "--context", "99999"), "more than the model has"),
    ],
)
def test_a_wrong_command_line(qwedge: Run, args: tuple[str, ...], message: str) -> None:
    status, _, complaint = qwedge("plan", *args)
    assert status == 2
    assert message in complaint
    assert "hint:" in complaint
