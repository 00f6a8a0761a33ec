"""The embedded broker's clients on disk, what is generated from them, and the commands that manage them."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from edge.cli import build_app
from edge.errors import ConfigError
from edge.mqtt import EmbeddedBroker, broker_config
from edge.mqtt.broker_clients import BrokerClient, add_client, hash_password, load_clients, remove_client
from edge.mqtt.broker_config import Files, Network, Owner, make_acl, make_config
from edge.mqtt.broker_setup import make_broker
from edge.settings.mqtt import MqttSettings
from tests.edge.mqtt.client import Client
from tests.edge.mqtt.conftest import accepts, wait_until

OWNER = Owner("device-edge-7", "secret", "edge-7", "plant/llm", publish=("out/#",), subscribe=("in/+",))


def client(name: str, **topics: Any) -> BrokerClient:
    return BrokerClient(name=name, password=hash_password("x", iterations=1), **topics)


@pytest.mark.broker
@pytest.mark.parametrize("password", ["geheim", "s3cret:ü", "x" * 300])
def test_passwords_are_hashed_as_mosquittos_own_tool_does(tmp_path: Path, password: str) -> None:
    tool = shutil.which("mosquitto_passwd")
    if tool is None:
        pytest.skip("needs mosquitto_passwd: apt-get install mosquitto")
    users = tmp_path / "users"
    subprocess.run([tool, "-b", "-c", str(users), "me", password], check=True, capture_output=True, timeout=60)
    theirs = users.read_text().strip().removeprefix("me:")
    _, kind, iterations, salt, _ = theirs.split("$")
    assert kind == "7"

    assert hash_password(password, base64.b64decode(salt), int(iterations)) == theirs


def test_two_hashes_of_one_password_differ() -> None:
    assert hash_password("x") != hash_password("x")


def test_clients_are_added_changed_and_removed_in_a_private_file(tmp_path: Path) -> None:
    folder = tmp_path / "clients"
    assert load_clients(folder) is None
    assert add_client(folder, client("b", subscribe=("x/#",))) is False
    assert add_client(folder, client("a")) is False
    assert add_client(folder, client("b", publish=("y",))) is True
    known = load_clients(folder)
    assert known is not None
    assert [(c.name, c.publish, c.subscribe) for c in known] == [("a", (), ()), ("b", ("y",), ())]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "clients.json").stat().st_mode) == 0o600
    for name in ("a", "b"):
        remove_client(folder, name)
    assert load_clients(folder) == (), "not None: passwords are still asked for"
    with pytest.raises(ConfigError, match="there is no client 'a'"):
        remove_client(folder, "a")


def test_a_file_that_others_could_have_written_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "clients"
    add_client(folder, client("a"))
    file = folder / "clients.json"
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="open to other users"):
        load_clients(folder)
    file.chmod(0o600)
    file.write_text('{"clients": [{"name": "a b", "password": "x"}]}')
    with pytest.raises(ConfigError, match="is damaged"):
        load_clients(folder)
    folder.chmod(0o755)
    with pytest.raises(ConfigError, match="open to other users"):
        load_clients(folder)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "+", "a:b", "x" * 65, "a\nuser admin", "%c"])
def test_names_that_could_mean_something_else_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no name of a client"):
        client(name)


@pytest.mark.parametrize("topic", ["", "a\nuser admin", " a", "a ", "a/#/b", "a+/b", "$SYS/#", "a\0b", "x" * 257])
def test_topics_that_could_mean_something_else_are_refused(topic: str) -> None:
    with pytest.raises(ValueError, match="no topic filter"):
        client("a", publish=(topic,))


def test_the_rights_are_those_of_the_protocol() -> None:
    lines = make_acl(OWNER, [client("plain"), client("plc", publish=("p/1",), subscribe=("s/#",))]).splitlines()
    base = "plant/llm/v1"
    assert [line for line in lines if line.startswith("pattern")] == [
        f"pattern write {base}/dev/+/req/%u/+",
        f"pattern write {base}/dev/+/cancel/%u/+",
        f"pattern write {base}/pool/+/req/%u/+",
        f"pattern read {base}/res/%u/#",
        f"pattern read {base}/dev/+/status",
        f"pattern read {base}/dev/+/info",
        f"pattern read {base}/dev/+/load",
    ]
    assert lines[-3:] == ["user plc", "topic write p/1", "topic read s/#"]
    own = lines[lines.index("user device-edge-7") : lines.index("user plc")]
    assert {"topic write out/#", "topic read in/+", f"topic write {base}/res/#"} <= set(own)
    assert "user plain" not in lines


def test_the_configuration_is_made_for_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(tmp_path)
    old = make_config(1883, None, version=(2, 0, 11), guarded=files).splitlines()
    assert {f"password_file {files.passwords}", f"acl_file {files.acl}", "allow_anonymous false"} <= set(old)
    assert not [line for line in old if "plugin" in line]
    for plugin in ("password_file", "acl_file"):
        (tmp_path / f"mosquitto_{plugin}.so").touch()
    monkeypatch.setattr(broker_config, "_PLUGIN_FOLDERS", (str(tmp_path),))
    new = make_config(1883, None, version=(2, 1, 2), guarded=files).splitlines()
    at = new.index(f"global_plugin {tmp_path}/mosquitto_password_file.so")
    assert new[at : at + 4] == [
        f"global_plugin {tmp_path}/mosquitto_password_file.so",
        f"plugin_opt_password_file {files.passwords}",
        f"global_plugin {tmp_path}/mosquitto_acl_file.so",
        f"plugin_opt_acl_file {files.acl}",
    ]
    assert not [line for line in new if line.startswith(("password_file", "acl_file"))]
    monkeypatch.setattr(broker_config, "_PLUGIN_FOLDERS", ())
    assert make_config(1883, None, version=(2, 1, 2), guarded=files).splitlines() == old, "still understood until 3.0"


def test_certificates_stand_for_passwords_where_there_is_a_ca(tmp_path: Path) -> None:
    network = Network("0.0.0.0", 8883, tmp_path / "cert", tmp_path / "key", None)
    text = make_config(1883, None, guarded=Files(tmp_path), network=network)
    network_lines = text.partition("listener 8883 0.0.0.0\n")[2].splitlines()
    assert "use_username_as_clientid true" in network_lines
    assert "require_certificate true" not in network_lines
    network = Network("0.0.0.0", 8883, tmp_path / "cert", tmp_path / "key", tmp_path / "ca")
    network_lines = make_config(1883, None, network=network).partition("listener 8883 0.0.0.0\n")[2].splitlines()
    assert {"require_certificate true", "use_identity_as_username true", f"cafile {tmp_path}/ca"} <= set(network_lines)


def test_a_network_is_not_listened_to_without_tls(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not listen on 0\.0\.0\.0 without TLS") as caught:
        make_broker(MqttSettings(broker="embedded", listen="0.0.0.0", device="x"), tmp_path)
    assert "tls_cert" in caught.value.hint


@pytest.mark.broker
def test_what_was_confirmed_and_retained_survives_the_end_of_mosquitto(tmp_path: Path) -> None:
    topic = "qwedge/v1/res/keeper/note"
    with EmbeddedBroker(0, state_dir=tmp_path / "state") as own:
        with Client(own.address, "keeper", "none") as keeper:
            for number in range(20):
                keeper.publish(f"{topic}/{number}", b"kept", retain=True)
        time.sleep(0.5)  # mosquitto confirms just before it writes
        pid = own.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: own.restarts == 1 and accepts(own.address.port))
        with Client(own.address, "keeper", "none") as keeper:
            keeper.wait(lambda: len(keeper.received) >= 20)
            assert {message.topic for message in keeper.received} == {f"{topic}/{number}" for number in range(20)}


def qwedge(*arguments: str, folder: Path) -> Result:
    env = {"QWEDGE_MQTT_BROKER_FOLDER": str(folder), "QWEDGE_MQTT_DEVICE": "edge-7"}
    return CliRunner().invoke(build_app(), ["mqtt", *arguments], env=env)


def test_the_commands_manage_the_clients(tmp_path: Path) -> None:
    added = qwedge("add-client", "plc-7", "--publish", "plant/7/alarm", folder=tmp_path)
    password = added.stdout.strip()
    assert re.fullmatch(r"[A-Za-z0-9_-]{24}", password)
    assert password not in added.stderr
    known = load_clients(tmp_path / "clients")
    assert known is not None
    _, _, iterations, salt, _ = known[0].password.split("$")

    assert hash_password(password, base64.b64decode(salt), int(iterations)) == known[0].password
    assert password not in (tmp_path / "clients" / "clients.json").read_text()
    (tmp_path / "password").write_text("open sesame\n")
    changed = qwedge("add-client", "plc-7", "--password-file", str(tmp_path / "password"), folder=tmp_path)
    assert (changed.stdout, "changed plc-7" in changed.stderr) == ("", True)
    listed = json.loads(qwedge("list-clients", "--json", folder=tmp_path).stdout)
    assert listed == [{"name": "plc-7", "publish": [], "subscribe": [], "manage": False}]
    qwedge("remove-client", "plc-7", folder=tmp_path)
    assert qwedge("list-clients", folder=tmp_path).stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("add-client", "qwedge-edge-7"), "the device's own name"),
        (("add-client", "device-edge-7"), "the device's own name"),
        (("add-client", "a/b"), "no name of a client"),
        (("add-client", "a", "--publish", "#/x"), "no topic filter"),
        (("remove-client", "a"), "there is no client 'a'"),
    ],
)
def test_the_commands_refuse_what_would_not_be_safe(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    error = qwedge(*arguments, folder=tmp_path).exception
    assert isinstance(error, ConfigError)
    assert message in error.message
    assert error.hint
    assert load_clients(tmp_path / "clients") is None
