"""What `qwedge doctor` finds, on this machine and on machines that are folders."""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

import edge.cli
from edge.config import load_settings
from edge.doctor.broker import examine_broker
from edge.doctor.check import Check
from edge.doctor.clock import examine_clock
from edge.doctor.disk import direct_read_speed, disk_kind, examine_disk
from edge.doctor.memory import examine_memory, read_speed
from edge.doctor.network import examine_network
from edge.doctor.processor import examine_processor
from edge.doctor.runtime import examine_bundle, examine_starts
from edge.doctor.service_manager import judge
from edge.http.authority import init
from edge.http.keys import Key, add_key, hash_key, new_key
from edge.machine import Host, cpu_quota, isa_features
from edge.mqtt.broker import EmbeddedBroker, Guard
from edge.mqtt.broker_clients import BrokerClient, add_client, hash_password
from edge.mqtt.broker_config import Owner
from edge.starts import StartCounter
from tests.command_line import forget_settings
from tests.edge.bundles import write_bundle

Doctor = Callable[..., tuple[int, dict[str, Check]]]
MakeHost = Callable[..., Host]


@pytest.fixture
def make_host(tmp_path: Path) -> MakeHost:
    """A machine of files: ``make_host("aarch64", {"proc/cpuinfo": ...})``."""

    def make(machine: str = "x86_64", files: dict[str, str] | None = None) -> Host:
        for name, text in (files or {}).items():
            path = tmp_path / "host" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (tmp_path / "host").mkdir(exist_ok=True)
        return Host(tmp_path / "host", machine)

    return make


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Doctor:
    """Runs the command without its measurements of a second; gives the exit status and the checks by name."""
    forget_settings(monkeypatch)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr("edge.doctor.memory.MEASURE_S", 0.01)
    monkeypatch.setattr("edge.doctor.memory.MAX_MEASURED", 64 << 20)

    def run(*args: str, **environment: str) -> tuple[int, dict[str, Check]]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        status = edge.cli.run(["doctor", "--json", *args])
        report = json.loads(capsys.readouterr().out)
        assert report["ok"] is (status == 0)
        return status, {check["name"]: Check(**check) for check in report["checks"]}

    return run


def named(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


def test_every_check_is_there_and_says_what_to_change(doctor: Doctor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        status, checks = doctor(QWEDGE_SERVER_PORT=port)
    assert status == 0
    assert checks["onnxruntime"].status == "ok"
    assert checks["bandwidth"].detail.endswith("each token reads all weights once")
    assert checks["http port"].status == "warn"
    assert port in checks["http port"].detail
    assert all(check.hint for check in checks.values() if check.status != "ok")


def test_only_what_keeps_qwedge_from_serving_is_a_failure(
    doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.doctor.report.examine_software", list)  # it takes a second
    status, checks = doctor(QWEDGE_MODEL_BUNDLE=str(tmp_path))
    assert (status, checks["bundle"].status) == (1, "fail")
    status, checks = doctor(QWEDGE_MODEL_BUNDLE=str(write_bundle(tmp_path / "bundle")))
    assert (status, checks["bundle"].status, "disk speed" in checks) == (0, "ok", True)
    status, checks = doctor(QWEDGE_SERVER_PORT="x")
    assert (status, checks["settings"].status) == (1, "fail")
    assert checks["settings"].detail.startswith("QWEDGE_SERVER_PORT must be")


# --- the processor --------------------------------------------------------------------------------------------------


def test_instruction_sets_are_those_of_every_core(make_host: MakeHost) -> None:
    assert isa_features(make_host("x86_64", {"proc/cpuinfo": "flags\t\t: fpu avx2 avx512_vnni\n"})) == (
        "avx2",
        "avx512_vnni",
    )
    two_kinds = "Features\t: fp asimd asimddp i8mm\n\nFeatures\t: fp asimd asimddp\n"
    assert isa_features(make_host("aarch64", {"proc/cpuinfo": two_kinds})) == ("asimd", "asimddp")
    assert isa_features(make_host("riscv64")) == ()


POSSIBLE = {"sys/devices/system/cpu/possible": "0-3\n"}


def test_a_pi_4_lacks_dotprod_and_a_hidden_sys_is_noticed(make_host: MakeHost) -> None:
    without = {"proc/cpuinfo": "Features\t: fp asimd evtstrm crc32 cpuid\n"}
    hidden = named(examine_processor(make_host("aarch64", without)), "instructions")
    assert (hidden.status, "/sys/devices/system/cpu is hidden" in hidden.detail) == ("warn", True)
    seen = named(examine_processor(make_host("aarch64", without | POSSIBLE)), "instructions")
    assert (seen.status, "without asimddp" in seen.detail, "nodot" in seen.hint) == ("warn", True, True)
    good = {"proc/cpuinfo": "Features\t: fp asimd asimddp\n"} | POSSIBLE
    assert named(examine_processor(make_host("aarch64", good)), "instructions").status == "ok"


def test_fast_and_slow_cores_are_told_apart(make_host: MakeHost) -> None:
    capacities = [414, 414, 414, 414, 992, 992, 1024, 1024]  # of an RK3588
    files = {f"sys/devices/system/cpu/cpu{n}/cpu_capacity": f"{value}\n" for n, value in enumerate(capacities)}
    assert "4 of them fast" in named(examine_processor(make_host("aarch64", files)), "cpu").detail


def test_what_control_groups_allow_is_what_counts(make_host: MakeHost) -> None:
    host = make_host(
        files={
            "proc/self/cgroup": "0::/system.slice/qwedge.service\n",
            "proc/meminfo": "MemTotal: 8000000 kB\nMemAvailable: 6000000 kB\n",
            "sys/fs/cgroup/system.slice/qwedge.service/memory.max": "max\n",
            "sys/fs/cgroup/system.slice/memory.max": f"{1 << 29}\n",
            "sys/fs/cgroup/system.slice/qwedge.service/cpu.max": "50000 100000\n",
        }
    )
    assert cpu_quota(host) == 0.5
    room = named(examine_memory(host, measure=False, need=1 << 30), "memory")
    assert room.status == "warn"
    assert room.detail.startswith("its control group allows (memory.max) 0.5 GiB left, of ")
    assert room.detail.endswith("the bundle needs 1.0 GiB for a conversation")
    cores = named(examine_processor(host), "cpu")
    assert (cores.status, "engine.threads = 1" in cores.hint) == ("warn", True)


@pytest.mark.parametrize(
    ("policy", "name", "status", "hint"),
    [
        ("performance 2400000", "clock speed", "ok", ""),
        ("performance 2400000", "throttling", "ok", ""),
        ("ondemand 2400000", "clock speed", "warn", "qwedge-power"),
        ("performance 1500000", "throttling", "warn", "scaling_max_freq"),
    ],
)
def test_a_slow_clock_is_noticed(make_host: MakeHost, policy: str, name: str, status: str, hint: str) -> None:
    governor, most = policy.split()
    files = {"scaling_governor": governor, "scaling_max_freq": most, "cpuinfo_max_freq": "2400000"}
    host = make_host(files={f"sys/devices/system/cpu/cpufreq/policy0/{file}": text for file, text in files.items()})
    check = named(examine_processor(host), name)
    assert check.status == status
    assert hint in check.hint


@pytest.mark.parametrize(
    ("flags", "status", "detail", "hint"),
    [
        ("0x0", "ok", "none", ""),
        ("0x50005", "warn", "now: too little voltage, throttled", "power supply"),
        ("80000", "warn", "since the start: slowed down for heat", "cool"),
    ],
)
def test_a_pi_says_why_it_is_slow(make_host: MakeHost, flags: str, status: str, detail: str, hint: str) -> None:
    host = make_host("aarch64", {"sys/devices/platform/soc/soc:firmware/get_throttled": f"{flags}\n"})
    check = named(examine_processor(host), "throttling")
    assert (check.status, detail in check.detail, hint in check.hint) == (status, True, True)


def test_heat_is_that_of_the_hottest_zone(make_host: MakeHost) -> None:
    zones = {"0": ("cpu-thermal", "81000"), "1": ("gpu-thermal", "52000")}
    files = {f"sys/class/thermal/thermal_zone{n}/type": name for n, (name, _) in zones.items()}
    files |= {f"sys/class/thermal/thermal_zone{n}/temp": value for n, (_, value) in zones.items()}
    check = named(examine_processor(make_host(files=files)), "heat")
    assert (check.status, check.detail) == ("warn", "81 °C (cpu-thermal)")


# --- memory and disk ------------------------------------------------------------------------------------------------


def test_swap_on_a_disk_is_warned_of_and_zram_is_not(make_host: MakeHost) -> None:
    head = "Filename\tType\tSize\tUsed\tPriority\n"
    zram = head + "/dev/zram0 partition 1048576 0 100\n"
    assert named(examine_memory(make_host(files={"proc/swaps": zram}), measure=False, need=None), "swap").status == "ok"
    both = zram + "/var/swap file 102400 0 -2\n"
    check = named(examine_memory(make_host(files={"proc/swaps": both}), measure=False, need=None), "swap")
    assert (check.status, check.detail) == ("warn", "1.0 GiB zram, 0.1 GiB on a disk")


def test_memory_is_read_at_a_plausible_speed() -> None:
    assert 1e7 < read_speed(2, 0.02, 64 << 20) < 1e13


def test_the_kind_of_a_disk_is_the_one_behind_a_partition(make_host: MakeHost, tmp_path: Path) -> None:
    device = tmp_path.stat().st_dev
    card = "sys/devices/platform/mmc0/block/mmcblk0"
    host = make_host(files={f"{card}/device/type": "SD\n", f"{card}/mmcblk0p2/partition": "2\n"})
    link = host.root / f"sys/dev/block/{os.major(device)}:{os.minor(device)}"
    link.parent.mkdir(parents=True)
    link.symlink_to(host.root / f"{card}/mmcblk0p2")
    assert disk_kind(host, tmp_path) == "SD card"


def test_a_disk_that_cannot_be_measured_is_no_problem(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(1 << 20))
    speed = direct_read_speed(tmp_path / "weights")  # None where the file system knows no direct access
    assert speed is None or speed > 0
    assert direct_read_speed(tmp_path / "missing") is None
    checks = examine_disk(Host(), tmp_path / "not" / "made", tmp_path / "weights")
    assert [check.name for check in checks] == ["disk", "disk speed"]


# --- the bundle and the last start ----------------------------------------------------------------------------------


def test_eight_bits_without_dotprod_are_warned_of(make_host: MakeHost, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    settings = load_settings(flags={"model.bundle": bundle})

    def judged(bits: int, features: str) -> Check:
        head = {"format": "two-stage", "coarse": {"format": "blockwise", "bits": bits}}
        manifest["recipe"] = {"name": "balanced", "layer": {"qkv": {"bits": 4}}, "head": head, "table": {"bits": 8}}
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        host = make_host("aarch64", {"proc/cpuinfo": f"Features\t: {features}\n"})
        return named(examine_bundle(host, settings)[0], "recipe")

    assert judged(8, "asimd asimddp").status == "ok"
    assert judged(4, "asimd").status == "ok"  # the table is looked up, not multiplied
    assert (judged(8, "asimd").status, "nodot" in judged(8, "asimd").hint) == ("warn", True)


def test_a_provider_that_cannot_compute_the_bundle_is_a_failure(make_host: MakeHost, tmp_path: Path) -> None:
    settings = load_settings(flags={"model.bundle": write_bundle(tmp_path / "bundle"), "engine.provider": "cuda"})
    check = named(examine_bundle(make_host(), settings)[0], "provider")
    assert (check.status, "cuda" in check.detail, bool(check.hint)) == ("fail", True, True)


def test_the_last_start_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path))
    settings = load_settings(flags={"mqtt.device": "edge-7"})
    counter = StartCounter(tmp_path / "edge-7", "1")
    assert counter.begin("tiny") == 0
    counter.works(2.5)
    counter.close()
    assert examine_starts(settings) == [Check("last start", "ok", "tiny answered after 2.5 s")]
    for _ in range(4):
        counter.begin("tiny")
        counter.close()
    (check,) = examine_starts(settings)
    assert (check.status, check.detail) == ("warn", "3 in a row ended by themselves: safe mode")


# --- ports, broker, clock, systemd ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "with_key", "expected"),
    [
        ({}, False, "ok: this device's own programs; no TLS, no keys"),
        ({"server.host": "0.0.0.0"}, False, "fail: the network; no TLS, no keys: qwedge serve refuses"),
        ({"server.host": "0.0.0.0", "server.open": "on"}, False, "warn: the network, everybody; no TLS, no keys"),
        ({"server.host": "0.0.0.0"}, True, "warn: the network; no TLS, clients are known: keys can be overheard"),
    ],
)
def test_open_doors_are_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: dict[str, str], with_key: bool, expected: str
) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path))
    keys = tmp_path / "keys.json"
    if with_key:
        add_key(keys, Key(name="panel", sha256=hash_key(new_key()), scopes=frozenset({"generate"})))
    settings = load_settings(flags={"server.port": 0, "server.keys_file": keys, **given})
    check = named(examine_network(settings), "http door")
    assert f"{check.status}: {check.detail}" == expected


def test_a_broker_that_is_away_is_told_and_is_no_failure() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    (check,) = examine_broker(load_settings(flags={"mqtt.broker": f"mqtt://127.0.0.1:{port}"}), connect=True)
    assert (check.status, check.detail) == ("warn", f"127.0.0.1:{port}: Connection refused")


@pytest.mark.broker
@pytest.mark.skipif(shutil.which("mosquitto", path="/usr/sbin:/usr/bin:/usr/local/sbin") is None, reason="no mosquitto")
def test_a_broker_lets_the_device_in_or_refuses_it(tmp_path: Path) -> None:
    clients = tmp_path / "clients"
    add_client(clients, BrokerClient(name="panel", password=hash_password("another")))
    owner = Owner(username="owner", password="canary", device="edge-7", root="qwedge", publish=(), subscribe=())
    password = tmp_path / "password"
    with EmbeddedBroker(0, guard=Guard(owner, clients)) as broker:
        flags = {"mqtt.broker": f"mqtt://127.0.0.1:{broker.address.port}", "mqtt.username": "owner"}
        settings = load_settings(flags=flags | {"mqtt.password_file": password})
        seen = {}
        for word in ("canary", "wrong"):
            password.write_text(word)
            (seen[word],) = examine_broker(settings, connect=True)
    assert (seen["canary"].status, "lets this device in" in seen["canary"].detail) == ("ok", True)
    assert (seen["wrong"].status, "refused by the broker" in seen["wrong"].detail) == ("warn", True)
    assert "mqtt.password_file" in seen["wrong"].hint


def test_a_clock_that_was_not_set_and_certificates_out_of_time(tmp_path: Path) -> None:
    files = init(tmp_path, ["localhost"])
    cert = files.certificate("device")
    settings = load_settings(flags={"server.tls_cert": cert, "server.tls_key": files.key("device")})
    today = dt.datetime.now(dt.UTC)
    for now, clock, certificate in [
        (dt.datetime(1970, 1, 1, tzinfo=dt.UTC), "before this version was made", "not valid yet"),
        (today + dt.timedelta(days=36500), "UTC", "expired"),
    ]:
        checks = examine_clock(settings, now)
        assert clock in named(checks, "clock").detail
        assert certificate in named(checks, "certificate").detail
        assert named(checks, "certificate").status == "warn"
    assert named(examine_clock(settings, today), "certificate").status == "ok"
    cert.write_text("nothing")
    assert named(examine_clock(settings, today), "certificate").status == "fail"


def test_credentials_of_the_service_are_not_held_against_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From a shell, what systemd shows to the service alone is nowhere; that does not keep the service from serving."""
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    files = init(tmp_path, ["localhost"])
    flags = {"server.tls_cert": files.certificate("device").name, "server.tls_key": files.key("device").name}
    flags |= {"mqtt.broker": "mqtts://broker.example", "mqtt.password_file": "password", "server.port": 0}
    settings = load_settings(flags=flags | {"server.keys_file": tmp_path / "keys.json"})

    def looked() -> list[str]:
        checks = [*examine_network(settings), *examine_clock(settings)]
        return [check.status for check in checks if check.name in {"http door", "certificate"}]

    assert looked() == ["warn", "warn"]
    assert named(examine_broker(settings, connect=True), "broker").hint.startswith("run it while the service runs")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert looked() == ["ok", "ok"]


@pytest.mark.parametrize(
    ("state", "status", "detail"),
    [
        ({}, "ok", "there is no unit"),
        ({"ActiveState": "active", "NRestarts": "0", "WatchdogUSec": "3min"}, "ok", "watchdog 3min"),
        ({"ActiveState": "active", "NRestarts": "0", "WatchdogUSec": "infinity"}, "warn", "no watchdog"),
        ({"ActiveState": "active", "NRestarts": "7", "WatchdogUSec": "3min"}, "warn", "7 restarts"),
        ({"ActiveState": "failed", "NRestarts": "0", "Result": "watchdog"}, "warn", "watchdog"),
    ],
)
def test_what_systemd_says_of_the_unit(state: dict[str, str], status: str, detail: str) -> None:
    check = judge({"LoadState": "loaded", "SubState": "running", **state} if state else {})
    assert (check.status, detail in check.detail) == (status, True)
