"""Two machines on two cables, in network namespaces: which ports of the one does the other reach?

Run as ``python reach.py NFTABLES`` in a namespace of its own; prints JSON: the ports that let a connection in, by
interface. A script, so that it needs nothing but Python.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

PORTS = (22, 80, 1883, 8080, 8883)
CABLES = {"eth0": "10.77.0", "eth1": "10.77.1"}
CONNECT = """
import socket, sys
opened = []
for port in map(int, sys.argv[2:]):
    try:
        socket.create_connection((sys.argv[1], port), timeout=0.15).close()
    except OSError:
        continue
    opened.append(port)
print(*opened)
"""


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def connect_cables(peer: int) -> None:
    run("ip", "link", "set", "lo", "up")
    for name, network in CABLES.items():
        run("ip", "link", "add", name, "type", "veth", "peer", "name", name, "netns", str(peer))
        for inside, host in (((), 1), (("nsenter", f"--target={peer}", "--net"), 2)):
            run(*inside, "ip", "address", "add", f"{network}.{host}/24", "dev", name)
            run(*inside, "ip", "link", "set", name, "up")


def reached(peer: int) -> dict[str, list[int]]:
    inside = ("nsenter", f"--target={peer}", "--net", sys.executable, "-c", CONNECT)
    return {
        name: [int(port) for port in run(*inside, f"{network}.1", *map(str, PORTS)).split()]
        for name, network in CABLES.items()
    }


def main(rules: str) -> None:
    own = Path("/proc/self/ns/net").readlink()
    with subprocess.Popen(["unshare", "--net", "sleep", "60"]) as peer:
        try:
            while Path(f"/proc/{peer.pid}/ns/net").readlink() == own:
                time.sleep(0.01)
            connect_cables(peer.pid)
            listeners = [socket.create_server(("0.0.0.0", port)) for port in PORTS]
            before = reached(peer.pid)
            run("nft", "-f", rules)
            run("nft", "-f", rules)  # again, as `systemctl reload nftables` does
            after = reached(peer.pid)
            own_ports = run(sys.executable, "-c", CONNECT, "127.0.0.1", *map(str, PORTS)).split()
            for listener in listeners:
                listener.close()
        finally:
            peer.kill()
    print(json.dumps({"without": before, "with": after, "loopback": [int(port) for port in own_ports]}))


if __name__ == "__main__":
    main(sys.argv[1])
