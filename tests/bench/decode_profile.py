"""Where the time of a decode step goes: Python around the session, the kernels, and what memory would allow.

    python tests/bench/decode_profile.py models/qwen2.5-coder-0.5b-instruct-balanced --threads 2

Prints a table and one JSON line. Three measurements, each in a process of its own, since they disturb each other:

- one request through the service, alone: the time between tokens, and how much of it is spent outside the session;
- onnxruntime's profile of the same decode steps, by operator (profiling itself costs some microseconds a node);
- a plain read of as many bytes as a step reads of weights, on as many threads: the speed that decode can approach.

Bytes are those of the packed copies in memory: besides the codes a float32 scale and a float32 sum for each block.
"""

from __future__ import annotations

import argparse
import json
import mmap
import multiprocessing
import queue
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edge.bundle import GRAPH, read_manifest
from edge.config import load_settings
from edge.engine import session as engine_session
from edge.engine.sampler import SamplingParams
from edge.loader import load_service
from edge.service import Event, Failed, Finished, GenerationRequest, Service

PROMPT_TOKENS, OUTPUT_TOKENS = 512, 128
REPEATS = 3
_PER_BLOCK = 8
"""Bytes of a block's scale and sum."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    step = _apart(step_times, options.bundle, options.threads)
    operators = _apart(operator_times, options.bundle, options.threads)
    num_bytes = packed_bytes(options.bundle)
    gigabytes = num_bytes / 1e9
    read = _apart(plain_read, num_bytes, options.threads)
    result = {
        "model": read_manifest(options.bundle).name,
        "threads": options.threads,
        **step,
        "operators_ms": operators,
        "weight_gb_per_token": round(gigabytes, 3),
        "achieved_gb_per_s": round(gigabytes / step["step_ms"] * 1e3, 1),
        "plain_read_gb_per_s": round(read, 1),
    }
    result["bandwidth_share"] = round(result["achieved_gb_per_s"] / result["plain_read_gb_per_s"], 3)
    result["products_share"] = round(gigabytes / operators["MatMulNBits"] * 1e3 / read, 3)
    print(f"decode step  {step['step_ms']:.2f} ms")
    print(f"  outside the session  {step['python_ms']:.2f} ms, {step['python_share']:.1%}")
    print(f"weights      {result['achieved_gb_per_s']} GB/s, {result['bandwidth_share']:.0%} of a plain read")
    print(f"  in the products alone  {result['products_share']:.0%}")
    for name, milliseconds in operators.items():
        print(f"  {name:<26} {milliseconds:6.2f} ms")
    print(json.dumps(result))


def step_times(bundle: Path, threads: int) -> dict[str, float]:
    """Medians of a step's wall time and of its part outside ``run_with_iobinding``, milliseconds."""
    inside: list[float] = []
    run = engine_session.Step.run

    def timed(step: engine_session.Step) -> None:
        began = time.perf_counter()
        run(step)
        inside.append(time.perf_counter() - began)

    engine_session.Step.run = timed  # type: ignore[method-assign, assignment]
    service = _service(bundle, threads)
    walls, outsides = [], []
    for seed in range(REPEATS):
        inside.clear()
        decode_s = _generate(service, seed)
        kernels_s = sum(inside[-(OUTPUT_TOKENS - 1) :])
        walls.append(decode_s / (OUTPUT_TOKENS - 1))
        outsides.append((decode_s - kernels_s) / (OUTPUT_TOKENS - 1))
    service.stop()
    wall, outside = statistics.median(walls), statistics.median(outsides)
    return {
        "step_ms": round(wall * 1e3, 3),
        "python_ms": round(outside * 1e3, 3),
        "python_share": round(outside / wall, 4),
    }


def operator_times(bundle: Path, threads: int) -> dict[str, float]:
    """Milliseconds of a decode step by operator, the costliest first."""
    with tempfile.TemporaryDirectory() as folder:
        make = engine_session._options

        def profiled(threads: int, spin_us: int) -> Any:
            options = make(threads, spin_us)
            options.enable_profiling = True
            options.profile_file_prefix = f"{folder}/profile"
            return options

        engine_session._options = profiled
        sessions = _watch_sessions()
        service = _service(bundle, threads)
        _generate(service, 0)
        sessions[0]._session.end_profiling()
        service.stop()
        events = json.loads(next(Path(folder).iterdir()).read_text())
    runs = [event["ts"] for event in events if event.get("name") == "model_run"]
    first = runs[-OUTPUT_TOKENS // 2]
    spent: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time") and event["ts"] >= first:
            spent[event["args"]["op_name"]] += event["dur"]
    steps = sum(start >= first for start in runs)
    return {name: round(microseconds / steps / 1e3, 3) for name, microseconds in spent.most_common()}


def packed_bytes(bundle: Path) -> int:
    """Bytes that the products of a step read, as onnxruntime's kernels pack them."""
    total = 0
    for node in ir.load(bundle / GRAPH).graph:
        if node.op_type == "MatMulNBits":
            rows, columns, block, bits = (node.attributes[name].as_int() for name in ("N", "K", "block_size", "bits"))
            total += rows * -(-columns // block) * (block * bits // 8 + _PER_BLOCK)
    return total


def plain_read(num_bytes: int, threads: int) -> float:
    """GB/s at which threads read that much memory, on huge pages; the best of several passes."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    words = np.frombuffer(memory, np.int64)
    words[:] = 1
    parts = np.array_split(words, threads)
    best = 0.0
    for _ in range(15):
        workers = [threading.Thread(target=part.sum) for part in parts]
        began = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, num_bytes / (time.perf_counter() - began) / 1e9)
    return best


def _watch_sessions() -> list[engine_session.Session]:
    """The sessions that are made from now on."""
    made: list[engine_session.Session] = []
    init = engine_session.Session.__init__

    def noted(session: engine_session.Session, *args: Any, **options: Any) -> None:
        init(session, *args, **options)
        made.append(session)

    engine_session.Session.__init__ = noted  # type: ignore[method-assign, assignment]
    return made


def _service(bundle: Path, threads: int) -> Service:
    env = {"QWEDGE_ENGINE_THREADS": str(threads), "QWEDGE_ENGINE_DRAFT_TOKENS": "0"}
    service = load_service(bundle, read_manifest(bundle), load_settings(env=env))
    service.start()
    _generate(service, 99)
    return service


def _generate(service: Service, seed: int) -> float:
    """Seconds from the first token to the last."""
    ids = np.random.default_rng(seed).integers(0, service.model.manifest.vocab_size, PROMPT_TOKENS).tolist()
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    request = GenerationRequest(tuple(ids), SamplingParams(), max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    service.submit(request, events.put)
    while not isinstance(event := events.get(timeout=300), Finished | Failed):
        pass
    if isinstance(event, Failed):
        raise event.error
    return event.timings.decode_s


def _apart(work: Callable[..., Any], *args: object) -> Any:
    """Run ``work`` in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, args)


if __name__ == "__main__":
    main()
