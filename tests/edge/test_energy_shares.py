"""Who is charged with the energy that a machine uses, over the fake engine."""

from __future__ import annotations

import itertools

import pytest

from edge.energy_shares import EnergyShares
from edge.openai.answer import timing_figures
from edge.service import Failed, Finished
from tests.edge.test_scheduler import Client, running
from tests.fakes import FakeEngine


def energy(client: Client) -> float:
    end = client.end()
    assert isinstance(end, Finished | Failed)
    assert end.timings.energy_j is not None
    return end.timings.energy_j


def test_all_that_is_used_while_sequences_run_is_charged_to_them() -> None:
    used = itertools.count()
    engine = FakeEngine(reply=lambda _: "abc")
    engine.gate.clear()
    with running(engine, energy_j=lambda: float(next(used))) as service:
        clients = [Client(service), Client(service)]
        engine.gate.set()
        charged = sum(energy(client) for client in clients)
        # One joule a look: one look for each step of the engine, and one each time that work begins.
        assert charged == pytest.approx(engine.num_steps)
        first = Client(service)
        assert energy(first) == pytest.approx(4)  # prefill, and a step for each further token and the end


def test_joules_for_each_token_are_told() -> None:
    used = itertools.count()
    with running(FakeEngine(reply=lambda _: "abc"), energy_j=lambda: float(next(used))) as service:
        assert service.metrics.recent().joules_per_token is None
        for _ in range(2):
            Client(service).end()
        assert service.metrics.recent().joules_per_token == pytest.approx(1)  # four steps for three letters and the end
        assert "qwedge_request_energy_joules_total 8.0\n" in service.metrics.render(service.stats()).decode()


def test_a_request_that_never_ran_has_cost_nothing_that_is_known() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    with running(engine, energy_j=lambda: 7.0) as service:
        clients = [Client(service) for _ in range(4)]
        clients[-1].ticket.cancel()
        engine.gate.set()
        end = clients[-1].end()
        assert isinstance(end, Failed)
        assert end.timings.energy_j is None


def test_where_nothing_measures_nothing_is_told() -> None:
    with running(FakeEngine()) as service:
        end = Client(service).end()
        assert isinstance(end, Finished)
        assert end.timings.energy_j is None
        assert "energy_j" not in timing_figures(end.timings)


def test_a_sensor_that_fails_is_charged_when_it_is_back() -> None:
    values = iter([0.0, None, 3.0])
    shares = EnergyShares(lambda: next(values))

    class Charged:
        energy_j: float | None = None

    sequence = Charged()
    shares.charge([sequence])  # type: ignore[list-item]
    assert sequence.energy_j is None
    shares.charge([sequence])  # type: ignore[list-item]
    assert sequence.energy_j == 3.0
