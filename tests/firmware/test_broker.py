"""The configuration of a broker of the system's own: a real mosquitto with the very files, in a namespace."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from edge.mqtt.broker_config import MAX_PACKET_BYTES, Owner, make_acl
from tests.edge.mqtt.certificates import Authority
from tests.firmware.tools import COMMON, attempt, missing, namespace, need, run

FOLDER = COMMON / "mosquitto"
# As Debian 12 and Ubuntu install it.
MAIN = """pid_file /run/mosquitto/mosquitto.pid
persistence true
persistence_location /var/lib/mosquitto/
log_dest stdout
include_dir /etc/mosquitto/conf.d
"""
MOUNT = """
mount --bind "$1" /etc/mosquitto
mount -t tmpfs none /run && install -d -o mosquitto /run/mosquitto
mount -t tmpfs none /var/lib/mosquitto && chown mosquitto /var/lib/mosquitto
shift && exec "$@"
"""


@pytest.fixture(scope="module")
def etc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What lies in /etc/mosquitto of a device."""
    for tool, package in (("mosquitto", "mosquitto"), ("mosquitto_pub", "mosquitto-clients")):
        need(tool, package)
    folder = tmp_path_factory.mktemp("etc")
    folder.chmod(0o755)
    (folder / "conf.d").mkdir()
    (folder / "mosquitto.conf").write_text(MAIN)
    shutil.copy(FOLDER / "qwedge-2.0.conf", folder / "conf.d/qwedge.conf")
    shutil.copy(FOLDER / "qwedge.acl", folder)
    passwords = need("mosquitto_passwd", "mosquitto")
    for number, (name, word) in enumerate((("qwedge-service", "device"), ("gateway", "secret"), ("hmi", "word"))):
        run(passwords, "-b", *(["-c"] if number == 0 else []), folder / "qwedge.passwords", name, word)
    authority = Authority(tmp_path_factory.mktemp("ca") / "plant")
    pair = authority.issue("edge", "DNS:localhost")
    (folder / "certs").mkdir()
    for source, name in ((pair.cert, "device.pem"), (pair.key, "device.key"), (authority.cert, "ca.pem")):
        shutil.copy(source, folder / "certs" / name)
    return folder


def test_a_broker_with_these_files_lets_in_whom_it_should(etc: Path) -> None:
    version = re.search(r"version (\d+)\.(\d+)", attempt(need("mosquitto", "mosquitto"), "-h").stdout)
    assert version is not None
    if (int(version[1]), int(version[2])) >= (2, 1):
        missing("this test is for mosquitto 2.0")
    if os.geteuid() != 0:
        pytest.skip("only root starts mosquitto as a service does")
    for path in [etc / "qwedge.acl", etc / "qwedge.passwords", *(etc / "certs").iterdir()]:
        shutil.chown(path, "mosquitto", "mosquitto")
        path.chmod(0o600)
    script = Path(__file__).with_name("broker_session.py")
    said = run(*namespace(mounts=True), "bash", "-ec", MOUNT, "mount", etc, sys.executable, script)
    seen = json.loads(said)
    assert seen["device"] == ["qwedge/v1/dev/edge/req/gateway/1 mine", "qwedge/v1/dev/edge/req/hmi/1 last"]
    assert seen["gateway"] == ["qwedge/v1/res/gateway/1/done forty-two"]
    assert [seen["anonymous"], seen["wrong"]] == ["Not authorized", "Not authorized"]
    assert not seen["plain"]  # the network's listener speaks TLS alone
    assert seen["user"]  # it has left root's rights
    assert "Error" not in seen["log"].replace("OpenSSL Error", ""), seen["log"]
    # Each had asked for the other's client id.
    sessions = set(re.findall(r"New client connected from \S+ as (\S+) \(.*u'(gateway|hmi)'", seen["log"]))
    assert sessions == {("gateway", "gateway"), ("hmi", "hmi")}, seen["log"]


def test_21_differs_in_nothing_but_how_passwords_and_rights_are_read() -> None:
    """mosquitto 2.1 deprecates the two options [1]; everything else is as the test above has seen it work.

    [1] https://mosquitto.org/blog/2026/01/version-2-1-0-released
    """
    old, new = (options(FOLDER / f"qwedge-{version}.conf") for version in ("2.0", "2.1"))
    replaced = [line for line in new if line not in old]
    assert [line for line in old if line not in new] == [
        "password_file /etc/mosquitto/qwedge.passwords",
        "acl_file /etc/mosquitto/qwedge.acl",
    ]
    plugins = [line.partition(" ")[::2] for line in replaced]
    assert [option for option, _ in plugins] == [
        "global_plugin",
        "plugin_opt_password_file",
        "global_plugin",
        "plugin_opt_acl_file",
    ]
    assert [Path(value).name for _, value in plugins] == [
        "mosquitto_password_file.so",
        "qwedge.passwords",
        "mosquitto_acl_file.so",
        "qwedge.acl",
    ]


def test_rights_and_limits_are_those_of_the_embedded_broker() -> None:
    owner = Owner(
        username="qwedge-service", password="", device="+", root="qwedge", publish=("homeassistant/device/#",)
    )
    assert options(FOLDER / "qwedge.acl") == make_acl(owner, ()).splitlines()
    assert f"max_packet_size {MAX_PACKET_BYTES}" in options(FOLDER / "qwedge-2.0.conf")


def options(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
