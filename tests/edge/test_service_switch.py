"""Another model in the place of the one that is served, over fake engines."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import replace

import pytest

from edge.engine.sampler import SamplingParams
from edge.errors import BundleError, UnavailableError
from edge.metrics import Metrics
from edge.scheduler import Scheduler
from edge.service import Failed, Finished, GenerationRequest, Loaded, Service
from tests.edge.test_scheduler import Client, running
from tests.fakes import FakeEngine, make_model


def load(engine: FakeEngine) -> Loaded:
    return Loaded(make_model(engine.context_length), Scheduler(engine, max_queue=8))


def test_another_model_answers_after_a_switch() -> None:
    with running(FakeEngine(reply=lambda _: "old")) as service:
        old = service.model
        service.switch(lambda: load(FakeEngine(reply=lambda _: "new", context_length=512)))
        client = Client(service)
        client.end()
        assert client.text == "new"
        assert service.model is not old
        assert service.stats().accepting


def test_what_runs_may_finish_and_what_comes_meanwhile_is_refused() -> None:
    engine = FakeEngine(reply=lambda _: "a long answer", step_s=0.01)
    loading, go_on = threading.Event(), threading.Event()

    def load_slowly() -> Loaded:
        loading.set()
        assert go_on.wait(60)
        return load(FakeEngine())

    with running(engine) as service:
        client = Client(service)
        switching = threading.Thread(target=service.switch, args=(load_slowly, 10.0))
        switching.start()
        assert isinstance(client.end(), Finished)
        assert loading.wait(60)
        assert not service.stats().accepting
        assert service.stats().num_running == 0
        with pytest.raises(UnavailableError, match="another model") as refusal:
            Client(service)
        assert refusal.value.retry_after_s
        go_on.set()
        switching.join()
        assert isinstance(Client(service).end(), Finished)


def test_what_takes_too_long_is_ended() -> None:
    engine = FakeEngine(step_s=0.02, reply=lambda _: "x" * 2000)
    with running(engine) as service:
        client = Client(service)
        service.switch(lambda: load(FakeEngine()), drain_s=0.1)
        end = client.end()
        assert isinstance(end, Failed)
        assert end.error.status == 503


def test_the_old_model_leaves_the_memory_before_the_new_one_comes() -> None:
    engine = FakeEngine()
    service = Service(load(engine), Metrics())
    service.start()
    Client(service).end()
    gone = weakref.ref(engine)
    del engine

    def load_next() -> Loaded:
        gc.collect()
        assert gone() is None
        return load(FakeEngine())

    service.switch(load_next)
    service.stop()


def test_a_model_that_does_not_load_leaves_none_until_the_next_switch() -> None:
    def fail() -> Loaded:
        raise BundleError("damaged", hint="copy it again")

    with running(FakeEngine()) as service:
        name = service.model.manifest.name
        with pytest.raises(BundleError, match="damaged"):
            service.switch(fail)
        with pytest.raises(UnavailableError):
            Client(service)
        assert service.model.manifest.name == name
        service.switch(lambda: load(FakeEngine()))
        assert isinstance(Client(service).end(), Finished)


def test_tokens_of_another_vocabulary_are_refused() -> None:
    with running(FakeEngine()) as service:
        request = GenerationRequest((1, 2), SamplingParams(), prepared_for=service.model)
        service.switch(lambda: load(FakeEngine()))
        with pytest.raises(UnavailableError, match="another model is served"):
            service.submit(request, lambda _: None)
        service.submit(replace(request, prepared_for=service.model), lambda _: None)


def test_a_service_that_stops_does_not_begin_with_another_model() -> None:
    loading, go_on = threading.Event(), threading.Event()
    refused: list[UnavailableError] = []

    def load_slowly() -> Loaded:
        loading.set()
        assert go_on.wait(60)
        return load(FakeEngine())

    def switch() -> None:
        try:
            service.switch(load_slowly)
        except UnavailableError as error:
            refused.append(error)

    service = Service(load(FakeEngine()), Metrics())
    service.start()
    switching = threading.Thread(target=switch)
    switching.start()
    assert loading.wait(60)
    stopping = threading.Thread(target=service.stop)
    stopping.start()
    go_on.set()
    switching.join()
    stopping.join()
    assert [error.message for error in refused] == ["the server is shutting down"]
