"""Prefix reuse: what is shared, with whom, and that answers stay the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.engine.engine import Engine
from edge.engine.prefix_cache import MIN_TOKENS, Prefix, PrefixCache
from edge.metrics import Metrics
from edge.scheduler import Scheduler
from edge.service import Delta, Loaded, Service
from tests.edge.test_scheduler import Client
from tests.export import tiny
from tests.fakes import FakeEngine, make_model, make_service
from tests.tiny_bundles import export_tiny


def prefix(text: str, identity: str = "") -> Prefix:
    ids = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
    return Prefix(identity, ids, np.zeros((1, 1, len(ids), 2), np.float32))


def ids(text: str) -> NDArray[np.int64]:
    return prefix(text).ids


def test_the_longest_common_beginning_is_found() -> None:
    cache = PrefixCache(1 << 20)
    cache.put(prefix("s" * 40 + "one"))
    cache.put(prefix("s" * 40 + "two, and more"))
    found = cache.find("", ids("s" * 40 + "two, and less"))
    assert found is not None
    assert (bytes(found[0].ids.astype(np.uint8)), found[1]) == (b"s" * 40 + b"two, and more", 49)


def test_the_last_prompt_token_is_always_computed() -> None:
    cache = PrefixCache(1 << 20)
    cache.put(prefix("s" * 50))
    found = cache.find("", ids("s" * 50))
    assert found is not None
    assert found[1] == 49


def test_short_or_foreign_beginnings_are_no_hits() -> None:
    cache = PrefixCache(1 << 20)
    cache.put(prefix("s" * 40, "alice"))
    assert cache.find("", ids("s" * 40)) is None
    assert cache.find("bob", ids("s" * 40)) is None
    assert cache.find("alice", ids("s" * (MIN_TOKENS - 1) + "different")) is None
    assert cache.find("alice", ids("s" * 40)) is not None


def test_an_entry_replaces_what_it_extends() -> None:
    cache = PrefixCache(1 << 20)
    cache.put(prefix("s" * 40))
    cache.put(prefix("s" * 60))
    cache.put(prefix("s" * 60, "alice"))
    assert cache.num_bytes == 2 * prefix("s" * 60).num_bytes
    assert cache.has("", ids("s" * 40))
    assert not cache.has("", ids("s" * 61))


def whole(text: str, identity: str = "") -> Prefix:
    """An entry with a state."""
    return replace(prefix(text, identity), state=np.zeros(5, np.float32))


def test_an_entry_with_a_state_stands_for_all_of_its_tokens_or_none() -> None:
    cache = PrefixCache(1 << 20)
    cache.put(whole("s" * 40))
    cache.put(whole("s" * 80))
    for length, reusable in ((40, 0), (41, 0), (42, 40), (81, 40), (82, 80)):
        found = cache.find("", ids("s" * length))
        assert (found[1] if found else 0) == reusable
    assert cache.find("", ids("s" * 39 + "other")) is None
    assert cache.shared_length("", ids("s" * 39 + "other")) == 39
    assert cache.shared_length("alice", ids("s" * 39 + "other")) == 0
    assert cache.num_bytes == whole("s" * 40).num_bytes + whole("s" * 80).num_bytes
    assert cache.has("", ids("s" * 80)), "it is there"
    assert cache.has("", ids("s" * (79 + MIN_TOKENS))), "few more tokens are not worth another state"
    assert not cache.has("", ids("s" * (80 + MIN_TOKENS)))
    assert not cache.has("", ids("s" * 39)), "the state after fewer tokens is not known"


def test_the_least_recently_used_entry_goes_first_and_the_budget_holds() -> None:
    size = prefix("a" * 100).num_bytes
    cache = PrefixCache(3 * size)
    for letter in "abc":
        cache.put(prefix(letter * 100))
    assert cache.find("", ids("a" * 100)) is not None
    cache.put(prefix("d" * 100))
    assert cache.num_bytes == 3 * size
    assert [letter for letter in "abcd" if cache.find("", ids(letter * 100))] == ["a", "c", "d"]
    assert not cache.wants(1000, 3 * size + 1)
    assert not cache.wants(MIN_TOKENS - 1, 1)


@pytest.fixture
def service() -> Iterator[Service]:
    engine = FakeEngine(reply=lambda prompt: f"<{len(prompt)}>", prefill_chunk=8)
    service = make_service(engine, prefix_cache_bytes=1 << 20)
    service.start()
    yield service
    service.stop()


def test_a_growing_conversation_is_prefilled_once(service: Service) -> None:
    first = Client(service, "s" * 100)
    assert first.end().timings.num_cached_tokens == 0
    second = Client(service, "s" * 100 + "<100>" + "next")
    # All but the question: the prompt, and the answer without its last token, which was never fed back.
    assert second.end().timings.num_cached_tokens == 100 + len("<100>")
    assert second.text == "<109>"


def test_another_identity_gets_no_hit(service: Service) -> None:
    Client(service, "s" * 100, identity="alice").end()
    assert Client(service, "s" * 100, identity="bob").end().timings.num_cached_tokens == 0
    assert Client(service, "s" * 100, identity="alice").end().timings.num_cached_tokens == 99


def test_a_cancelled_request_leaves_its_prefix(service: Service) -> None:
    client = Client(service, "s" * 64)
    client.ticket.cancel()
    client.end()
    later = Client(service, "s" * 64)
    later.end()
    assert later.text == "<64>"


@pytest.mark.parametrize("config", [tiny.qwen2_config(), tiny.qwen3_config()], ids=["qwen2", "qwen3"])
def test_answers_are_the_same_with_and_without_reuse(
    config: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("prefix")
    manifest = export_tiny(folder, config)
    conversation = bytes(np.random.default_rng(7).integers(32, 127, 120).tolist()).decode()
    answers: list[list[list[int]]] = []
    for budget in (0, 1 << 20):
        engine = Engine(folder / "bundle", manifest, slots=2, context=160, threads=1, prefill_chunk=16)
        model = replace(make_model(160), manifest=manifest, eos_ids=frozenset())
        service = Service(Loaded(model, Scheduler(engine, max_queue=8, prefixes=PrefixCache(budget))), Metrics())
        service.start()
        clients = []
        for length in (40, 80, 120):
            client = Client(service, conversation[:length], max_tokens=12)
            assert client.end().timings.num_cached_tokens == (0 if budget == 0 or length == 40 else length - 40)
            clients.append(client)
        service.stop()
        answers.append([[event.token_id for event in client.events if isinstance(event, Delta)] for client in clients])
    assert answers[0] == answers[1]
    assert all(len(tokens) == 12 for tokens in answers[0])
