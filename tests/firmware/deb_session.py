"""The Debian package from its installation to its purge, with the real dpkg, on a machine whose disks are overlays.

Run as ``python deb_session.py DEB BUNDLE SITE SCRATCH`` as root in a mount and network namespace of its own; prints
JSON. SITE has the Python packages that a small DEB leaves out. A script, so that it needs nothing but Python.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

TIMEOUT_S = 300.0
SYSTEMCTL = """#!/bin/sh
case $* in
--root=*) exec /bin/systemctl "$@" ;;
*is-enabled*) echo enabled ;;
*) echo "$*" >>/run/calls ;;
esac
"""
SETTINGS = Path("/etc/qwedge/edge.toml")
BODY = json.dumps({"prompt": "Hi", "max_tokens": 4, "ignore_eos": True}).encode()


def run(*command: str | Path, check: bool = True) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if check and done.returncode != 0:
        sys.exit(f"{command} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def make_machine(scratch: Path) -> None:
    """What is written goes to memory; systemd is asked by name, writes down what it was asked, and does nothing."""
    run("mount", "-t", "tmpfs", "none", scratch)
    for name in ("etc", "usr", "var"):
        layers = [scratch / name / part for part in ("upper", "work")]
        for layer in layers:
            layer.mkdir(parents=True)
        options = f"lowerdir=/{name},upperdir={layers[0]},workdir={layers[1]}"
        if subprocess.run(["mount", "-t", "overlay", "none", "-o", options, f"/{name}"], check=False).returncode:
            sys.exit(99)
    run("mount", "-t", "tmpfs", "none", "/run")
    Path("/run/systemd/system").mkdir(parents=True)
    Path("/run/bin").mkdir()
    Path("/run/bin/systemctl").write_text(SYSTEMCTL)
    Path("/run/bin/systemctl").chmod(0o755)
    Path("/usr/sbin/policy-rc.d").unlink(missing_ok=True)
    run("ip", "link", "set", "lo", "up")
    os.environ["PATH"] = f"/run/bin:/usr/sbin:/usr/bin:{os.environ['PATH']}"
    for name in ("PYTHONPATH", "VIRTUAL_ENV"):
        os.environ.pop(name, None)


def calls() -> list[str]:
    """What systemd was asked since the last time."""
    path = Path("/run/calls")
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [line for line in lines if "qwedge" in line and "is-active" not in line]


def paths() -> set[str]:
    """Everything but what dpkg, the user's database and the man pages' index keep for themselves."""
    own = ("/var/lib/dpkg/", "/var/log/", "/var/cache/", "/etc/passwd", "/etc/group", "/etc/shadow", "/etc/gshadow")
    found = run("find", "/etc", "/usr", "/var", "-path", "/usr/share/doc", "-prune", "-o", "-print", check=False)
    return {line for line in found.splitlines() if not line.startswith(own) and line != "/etc/.pwd.lock"}


def mode(path: str) -> str:
    return run("stat", "-c", "%n %U %a", path).strip()


def as_service(*command: str | Path) -> list[str]:
    return ["setpriv", "--reuid=qwedge", "--regid=qwedge", "--clear-groups", *map(str, command)]


def get(path: str, body: bytes | None = None) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:8080{path}", body, timeout=TIMEOUT_S) as reply:
        return dict(json.load(reply))


def wait_until_ready(service: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while service.poll() is None and time.monotonic() < deadline:
        try:
            get("/health/ready")
        except OSError:
            time.sleep(0.1)
        else:
            return
    service.kill()
    sys.exit(service.communicate()[1])


def answer() -> dict[str, object]:
    """Start what the unit starts, ask it, and end it."""
    unit = Path("/usr/lib/systemd/system/qwedge.service").read_text().splitlines()
    command = next(line.removeprefix("ExecStart=") for line in unit if line.startswith("ExecStart=")).split()
    environment = os.environ | {"STATE_DIRECTORY": "/var/lib/qwedge", "QWEDGE_MQTT_BROKER": "none"}
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(as_service(*command), env=environment, cwd="/", text=True, **quiet) as service:
        wait_until_ready(service)
        tokens = get("/v1/completions", BODY)["usage"]["completion_tokens"]
        service.send_signal(signal.SIGTERM)
        return {"tokens": tokens, "status": service.wait(TIMEOUT_S)}


def boards() -> dict[str, object]:
    """The settings of a board; then somebody changes them, and another board must not take that away."""
    listed = run("qwedge-board")
    run("qwedge-board", "x86-n100")
    taken = SETTINGS.read_text()
    limits = Path("/etc/systemd/system/qwedge.service.d/board.conf").resolve()
    power = Path("/etc/systemd/system/multi-user.target.wants/qwedge-power.service").resolve()
    SETTINGS.write_text(taken + "\n[log]\nlevel = 'debug'\n")
    said = run("qwedge-board", "raspberry-pi-5")
    return {
        "listed": listed,
        "taken": taken,
        "limits": str(limits),
        "power": str(power),
        "kept": said,
        "mine": SETTINGS.read_text() == taken + "\n[log]\nlevel = 'debug'\n",
        "beside": SETTINGS.with_name("edge.toml.new").read_text(),
        "refused": run("qwedge-board", "raspberry-pi-9", check=False),
        "calls": calls(),
    }


def main(deb: str, bundle: str, site: str, scratch: str) -> None:
    make_machine(Path(scratch))
    before = paths()
    seen: dict[str, object] = {"installed": run("dpkg", "--no-triggers", "--install", deb), "calls": calls()}
    seen["enabled"] = Path("/etc/systemd/system/multi-user.target.wants/qwedge.service").is_symlink()
    seen["modes"] = [mode(path) for path in ("/etc/qwedge/credentials", "/var/lib/qwedge", "/var/log/qwedge")]
    seen["compiled"] = bool(list(Path("/usr/lib/qwedge/lib").rglob("cli.cpython-*.pyc")))
    seen["verify"] = run("systemd-analyze", "verify", "qwedge.service", check=False)
    (extra,) = Path("/usr/lib/qwedge/lib").glob("python*/site-packages")
    # Where the service's user can read it, whoever may look into the folder of these tests.
    Path("/run/site").mkdir()
    run("mount", "--bind", site, "/run/site")
    (extra / "others.pth").write_text("/run/site\n")
    os.chdir("/")
    seen["version"] = run("qwedge", "--version")
    seen["doctor"] = run(*as_service("qwedge", "doctor"), check=False)
    seen["no_model"] = run(*as_service("qwedge", "serve", "--port", "0"), check=False)
    run("cp", "-r", bundle, "/run/bundle")
    run("chmod", "-R", "a+rX", "/run/bundle")
    seen["activated"] = run(*as_service("qwedge", "install", "/run/bundle", "--activate"))
    seen["service"] = answer()
    seen["boards"] = boards()
    run("dpkg", "--no-triggers", "--install", deb)
    seen["again"] = {"calls": calls(), "mine": "level = 'debug'" in SETTINGS.read_text()}
    (extra / "others.pth").unlink()
    run("dpkg", "--no-triggers", "--remove", "qwedge")
    seen["removed"] = {"calls": calls(), "left": sorted(paths() - before)}
    said = run("dpkg", "--no-triggers", "--purge", "qwedge")
    seen["purged"] = {"said": said, "left": sorted(paths() - before), "gone": sorted(before - paths())}
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
