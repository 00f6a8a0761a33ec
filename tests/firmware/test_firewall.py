"""nftables.conf, loaded into a kernel that has two interfaces."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.firmware.reach import PORTS
from tests.firmware.tools import COMMON, attempt, namespace, need, run

RULES = COMMON / "nftables.conf"


def test_the_rules_are_understood(tmp_path: Path) -> None:
    nft = need("nft", "nftables")
    run(*namespace(), nft, "--check", "--file", RULES)
    broken = tmp_path / "nftables.conf"
    broken.write_text(RULES.read_text().replace("policy drop", "policy refuse"))
    assert attempt(*namespace(), nft, "--check", "--file", broken).returncode != 0


def test_nothing_but_qwedge_and_a_login_is_reached_and_only_on_one_interface() -> None:
    need("nft", "nftables")
    need("ip", "iproute2")
    seen = json.loads(run(*namespace(), sys.executable, Path(__file__).with_name("reach.py"), RULES))
    assert seen["without"] == {"eth0": list(PORTS), "eth1": list(PORTS)}  # the cables work
    assert seen["with"] == {"eth0": [22, 8080, 8883], "eth1": []}
    assert seen["loopback"] == list(PORTS)
