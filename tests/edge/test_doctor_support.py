"""The support bundle, with a canary in every place where something private can be."""

from __future__ import annotations

import errno
import io
import json
import os
import stat
import tarfile
from pathlib import Path
from typing import Any

import httpx
import pytest

import edge.cli
from edge.config import SECTIONS, load_settings
from edge.doctor import support
from edge.doctor.redaction import Redaction
from edge.doctor.report import examine
from edge.doctor.support import collect, pack, write_support_bundle
from edge.errors import ConfigError
from edge.http.authority import init
from edge.http.keys import Key, add_key, hash_key
from edge.machine import Host
from edge.settings.rules import RuleSettings
from edge.settings.section import Private
from edge.settings.server import ServerSettings
from edge.settings.upstream import UpstreamSettings
from tests.edge.bundles import write_bundle
from tests.fakes import FakeEngine
from tests.serving import served

CONFIG = """
[server]
host = "127.0.0.1"
port = {port}
allowed_hosts = ["localhost", "canary-alias.plant.example"]
cors_origins = ["https://canary-hmi.plant.example"]
keys_file = "{folder}/keys.json"

[[server.upstream]]
name = "gateway"
url = "https://canary-gateway.plant.example:8443/v1"
models = ["large"]
key_file = "{folder}/upstream-key"

[model]
bundle = "{folder}/bundle"

[mqtt]
broker = "mqtts://canary-broker.plant.example:8884"
device = "canary-device"
username = "canary-user"
password_file = "{folder}/password"
journal = "{folder}/state/journal"
tls_cert = "{folder}/tls/device.pem"
tls_key = "{folder}/tls/device.key"

[[mqtt.rule]]
name = "meter"
subscribe = "plant/+/meter"
publish = "plant/{{1}}/verdict"
prompt = "canary prompt of a rule about {{{{ payload }}}}"
system = "canary system message"
choices = ["canary choice", "other"]

[[mqtt.rule]]
name = "door"
subscribe = "plant/+/door"
publish = "plant/{{1}}/alarm"
prompt = "another canary prompt"
schema = {{ title = "canary schema" }}
"""
LOG = """\
2026-11-22T10:00:00 started on Canary-Host, device canary-device
2026-11-22T10:00:00 broker canary-broker.plant.example:8884, client 192.168.7.23
2026-11-22T10:00:01 by mistake: canary-password-hunter2 and canary-upstream-key
2026-11-22T10:00:02 bound to 127.0.0.1
"""


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders full of what is nobody's business."""
    for name in [name for name in os.environ if name.startswith("QWEDGE_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home" / "canary-person"
    home.mkdir(parents=True)
    for name, value in {"HOME": home, "XDG_STATE_HOME": tmp_path / "state"}.items():
        monkeypatch.setenv(name, str(value))
    write_bundle(tmp_path / "bundle")
    manifest = json.loads((tmp_path / "bundle/manifest.json").read_text())
    manifest["measured"] = {"self_test": {"prompt": "canary of the exporter"}, "kl": 0.01}
    (tmp_path / "bundle/manifest.json").write_text(json.dumps(manifest))
    init(tmp_path / "tls", ["canary-certificate.plant.example"])
    (tmp_path / "password").write_text("canary-password-hunter2\n")
    (tmp_path / "upstream-key").write_text("canary-upstream-key\n")
    add_key(tmp_path / "keys.json", Key(name="canary-key-name", sha256=hash_key("canary"), scopes=frozenset({"read"})))
    for name in (
        "journal/journal.db",
        "qwedge/evaluations/canary-suite.json",
        "qwedge/canary-device/broker/messages.db",
    ):
        path = tmp_path / "state" / name
        path.parent.mkdir(parents=True)
        path.write_text("canary prompt in a file of the state")
    monkeypatch.setattr(support, "journal_lines", lambda: LOG)
    monkeypatch.setattr("edge.doctor.report.examine_software", list)  # it takes a second
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "canary-host", "6.1", "", "x86_64")))
    return tmp_path


def write_config(device: Path, port: int = 0) -> Path:
    path = device / "canary-config.toml"
    path.write_text(CONFIG.format(folder=device, port=port))
    return path


def unpack(data: bytes) -> dict[str, str]:
    files = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            assert (member.mode, member.uid, member.mtime) == (0o600, 0, 0)
            files[member.name.removeprefix("qwedge-support/")] = file.read().decode()
    return files


def private_lines(device: Path) -> list[str]:
    """Lines of private keys, and digests of keys."""
    pem = [line for path in (device / "tls").glob("*.key") for line in path.read_text().splitlines()]
    return [*(line for line in pem if not line.startswith("-----")), hash_key("canary")]


def test_nothing_private_is_in_it(device: Path) -> None:
    report = examine(write_config(device), measure=False)
    files = unpack(pack(collect(report, Host(), dict(os.environ))))
    everything = "\n".join(f"{name}\n{text}" for name, text in files.items())
    # The path of the settings' file is an operator's argument, and was no canary of a name or secret.
    leaks = [line for line in everything.replace("canary-config.toml", "").splitlines() if "canary" in line.lower()]
    assert leaks == []
    assert [line for line in private_lines(device) if line in everything] == []
    assert "192.168.7.23" not in everything
    assert "BEGIN" not in everything


def test_what_helps_is_in_it(device: Path) -> None:
    report = examine(write_config(device), measure=False)
    files = unpack(pack(collect(report, Host(), dict(os.environ))))
    settings = json.loads(files["settings.json"])["settings"]
    assert settings["mqtt"]["password_file"] == settings["server"]["keys_file"] == "<secret>"
    assert settings["mqtt"]["rule"][0]["prompt"] == settings["mqtt"]["rule"][1]["definition"] == "<prompt>"
    assert settings["mqtt"]["rule"][0]["subscribe"] == "plant/+/meter"
    assert settings["mqtt"]["broker"].startswith("mqtts://<name ")
    assert settings["mqtt"]["broker"].endswith(">:8884")
    assert settings["server"]["host"] == "127.0.0.1"
    broker = settings["mqtt"]["broker"].removeprefix("mqtts://")
    assert f"broker {broker}, client <address>" in files["log.txt"]  # the same name, the same number
    assert "by mistake: <secret> and <secret>" in files["log.txt"]
    assert "bound to 127.0.0.1" in files["log.txt"]
    assert json.loads(files["manifest.json"])["measured"] == {"kl": 0.01}
    assert json.loads(files["versions.json"])["qwedge"]
    assert json.loads(files["state.json"])["folders"]["journal"]["files"] == 1
    assert "== proc/meminfo" in files["proc"]
    assert {check["name"] for check in json.loads(files["report.json"])["checks"]} >= {"cpu", "memory", "bundle"}


def test_the_running_server_is_asked_and_its_words_are_searched_too(device: Path) -> None:
    with served(FakeEngine(lambda _prompt: "ok"), max_queue=4, settings=ServerSettings(port=0)) as server:
        answer = httpx.post(
            f"{server.url}/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "canary prompt of a client"}]},
            timeout=60,
        )
        assert answer.status_code == 200
        report = examine(write_config(device, server.port), measure=False)
        files = unpack(pack(collect(report, Host(), dict(os.environ))))
    assert json.loads(files["running/health"])["status"] == "ok"
    assert "qwedge_" in files["running/metrics"]
    assert json.loads(files["running/v1/device"])["name"].startswith("<name ")
    assert "canary" not in "\n".join(text for name, text in files.items() if name.startswith("running"))


def test_settings_that_cannot_be_used_leave_out_what_they_would_redact(device: Path) -> None:
    path = write_config(device)
    path.write_text(path.read_text() + "\n[nonsense]\n")
    files = unpack(pack(collect(examine(path, measure=False), Host(), dict(os.environ))))
    assert set(files) == {"report.json", "proc"}
    assert "unknown section" in files["report.json"]
    assert "canary" not in "".join(files.values()).replace("canary-config.toml", "")


def test_it_is_for_this_user_alone_and_replaces_nothing(
    device: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.doctor.memory.MEASURE_S", 0.01)
    monkeypatch.setattr("edge.doctor.memory.MAX_MEASURED", 64 << 20)
    target = device / "support.tar.gz"
    assert edge.cli.run(["doctor", "--support-bundle", str(target)]) == 0
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert "report.json" in unpack(target.read_bytes())
    target.write_text("mine")
    capsys.readouterr()
    assert edge.cli.run(["doctor", "--support-bundle", str(target)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert target.read_text() == "mine"
    link = device / "link.tar.gz"
    link.symlink_to(device / "elsewhere")
    with pytest.raises(ConfigError, match="is there already"):
        write_support_bundle(link, examine(None, measure=False))
    assert not (device / "elsewhere").exists()


def test_a_full_disk_leaves_nothing_behind(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    target = device / "out" / "support.tar.gz"
    target.parent.mkdir()
    with pytest.raises(ConfigError, match="No space left"):
        write_support_bundle(target, examine(None, measure=False))
    assert list(target.parent.iterdir()) == []


def test_fields_that_sound_like_secrets_are_marked() -> None:
    """Redaction goes by marks; this keeps a new setting from being forgotten."""
    models = [*SECTIONS.values(), RuleSettings, UpstreamSettings]
    fields = {f"{model.__name__}.{name}": info for model in models for name, info in model.model_fields.items()}
    words = ("password", "secret", "token_", "_key", "keys", "prompt", "user", "host", "url")
    marked = {name for name, info in fields.items() if any(isinstance(mark, Private) for mark in info.metadata)}
    suspects = {name for name in fields if any(word in name.partition(".")[2] for word in words)}
    assert suspects - marked == set()


def test_a_secret_that_was_written_in_place_of_its_file_is_hidden() -> None:
    settings = load_settings(flags={"mqtt.password_file": "canary-in-the-wrong-place"})
    redaction = Redaction(settings, dict(os.environ))
    assert redaction.settings()["mqtt"]["password_file"] == "<secret>"
    assert redaction.text("the password file canary-in-the-wrong-place cannot be read") == (
        "the password file <secret> cannot be read"
    )
