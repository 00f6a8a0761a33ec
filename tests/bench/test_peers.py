"""What the benchmark of the peers makes of its measurements; nothing is built or run here."""

from __future__ import annotations

import json

import pytest

from tests.bench.peers import prompts, report, tools, workloads
from tests.bench.peers.report import BEST, OURS, Round, Turn

DECODE = "decode_tokens_per_second"
CACHED = "cached_s"


def round_of(name: str, others: float = 0.0, **figures: float) -> Round:
    """A round in which each contestant has one figure, and ``others`` disturbed the last one."""
    workload = next(metric.workload for metric in report.METRICS if metric.name == name)
    turns = {who.replace("_", " "): Turn({name: value}, {workload: 0.0}) for who, value in figures.items()}
    list(turns.values())[-1].others[workload] = others
    return turns


def row_of(name: str, *rounds: Round) -> report.Row:
    return next(row for row in report.rows(rounds, most_others=0.1) if row.metric.name == name)


def test_ratio_is_taken_within_a_round_and_then_the_median() -> None:
    # The machine is twice as slow in the second round: the ratio of medians would say 30/40.
    row = row_of(
        DECODE,
        round_of(DECODE, qwedge=60, peer=40),
        round_of(DECODE, qwedge=30, peer=20),
        round_of(DECODE, qwedge=20, peer=40),
    )
    assert row.ratios["peer"] == report.Spread(median=1.5, low=0.5, high=1.5, rounds=3)
    assert row.figures[OURS].median == 30


def test_best_peer_is_the_best_of_each_round() -> None:
    rounds = (round_of(DECODE, qwedge=60, a=40, b=50), round_of(DECODE, qwedge=60, a=60, b=30))
    assert row_of(DECODE, *rounds).ratios[BEST] == report.Spread(1.1, 1.0, 1.2, 2)
    rounds = (round_of(CACHED, qwedge=0.3, a=0.1, b=0.2), round_of(CACHED, qwedge=0.3, a=0.6, b=0.3))
    assert row_of(CACHED, *rounds).ratios[BEST].median == pytest.approx(2.0)


def test_disturbed_rounds_do_not_count_unless_there_is_no_other() -> None:
    quiet, disturbed = round_of(DECODE, qwedge=50, a=50), round_of(DECODE, 0.3, qwedge=50, a=10)
    row = row_of(DECODE, quiet, disturbed)
    assert (row.ratios[BEST].median, row.ratios[BEST].rounds, row.disturbed) == (1, 1, 1)
    alone = row_of(DECODE, disturbed)
    assert (alone.ratios[BEST].median, alone.disturbed) == (5, 1)


def test_disturbance_of_another_workload_does_not_matter() -> None:
    one = round_of(DECODE, qwedge=50, a=50)
    one["a"].others["edit"] = 0.9
    assert row_of(DECODE, one).disturbed == 0


@pytest.mark.parametrize(
    ("name", "ours", "peer", "met"),
    [(DECODE, 60, 50, True), (DECODE, 59, 50, False), (CACHED, 0.1, 0.1, True), (CACHED, 0.2, 0.1, False)],
)
def test_target_is_read_in_the_metrics_direction(name: str, ours: float, peer: float, met: bool) -> None:
    assert row_of(name, round_of(name, qwedge=ours, a=peer)).met is met


def test_absolute_target_needs_no_peer() -> None:
    row = row_of("start_s", round_of("start_s", qwedge=1.4, a=0.2))
    assert row.met is True
    assert row.ratios == {}


def test_a_peer_that_cannot_do_it_has_an_empty_cell_and_no_ratio() -> None:
    rounds = [
        {
            OURS: Turn({"raw_decode": 50.0, DECODE: 50.0}),
            "a": Turn({"raw_decode": 25.0, DECODE: 25.0}),
            "b": Turn({DECODE: 1.0}),
        }
    ]
    found = report.rows(rounds, 0.1)
    assert {row.metric.name: list(row.ratios) for row in found} == {DECODE: ["a", "b", BEST], "raw_decode": ["a", BEST]}
    lines = report.markdown(found).splitlines()
    assert lines[0] == "| | qwedge | a | b | ratio to the best peer | target |"
    assert lines[2].endswith("| 50.0 | 25.0 | 1.0 | 2.00 (2.00 to 2.00) | ≥ 1.2, met |")
    assert lines[3].endswith("| 50.0 | 25.0 |  | 2.00 (2.00 to 2.00) |  |")
    assert {line.count("|") for line in lines} == {7}


def test_nothing_measured_of_us_gives_figures_without_ratios() -> None:
    row = row_of(DECODE, round_of(DECODE, a=25))
    assert (row.ratios, row.met) == ({}, None)


def test_json_has_rows_and_rounds_on_one_line() -> None:
    rounds = [round_of(DECODE, qwedge=60, a=50)]
    text = json.dumps(report.as_json(report.rows(rounds, 0.1), rounds))
    assert "\n" not in text
    found = json.loads(text)
    assert found["rows"][DECODE]["ratios"][BEST] == {"median": 1.2, "low": 1.2, "high": 1.2, "rounds": 1}
    assert found["rows"][DECODE]["met"] is True
    assert found["rounds"][0]["a"]["figures"] == {DECODE: 50}


def test_every_metric_belongs_to_a_workload() -> None:
    assert {metric.workload for metric in report.METRICS} == set(workloads.WORKLOADS)


def test_events_count_when_all_but_the_message_is_right() -> None:
    events = [{**vars(event), "message": "anything"} for event in prompts.EVENTS]
    assert workloads.found_events(json.dumps({"events": events})) == 6
    assert (
        workloads.found_events(json.dumps({"events": [*events[1:], {**vars(prompts.EVENTS[0]), "code": "W-208"}]})) == 5
    )
    assert workloads.found_events('{"events": [') == 0


def test_likeness_of_an_edit_leaves_out_the_fence() -> None:
    assert workloads.likeness(f"```python\n{prompts.EDITED_CODE}```") == 1
    assert 0.9 < workloads.likeness(prompts.CODE) < 1


def test_options_follow_the_processor_and_never_take_amx() -> None:
    info = "processor\t: 0\nflags\t\t: fpu avx2 fma f16c avx512vl avx512_vnni amx_tile amx_int8\n"
    options = tools.cpu_options(info, "x86_64")
    assert "-DGGML_NATIVE=OFF" in options
    assert {"-DGGML_AVX512=ON", "-DGGML_AVX512_VNNI=ON", "-DGGML_AVX512_VBMI=OFF"} <= set(options)
    assert not any("AMX" in option for option in options)
    assert tools.cpu_options("", "aarch64") == ("-DGGML_NATIVE=ON",)


def test_events_of_the_log_are_all_in_it() -> None:
    log = prompts.alarm_log()
    assert all(f"{event.time} {event.device} {event.severity.upper()} {event.code}" in log for event in prompts.EVENTS)


def test_metrics_have_their_own_names() -> None:
    names = [metric.name for metric in report.METRICS]
    assert len(names) == len(set(names))
