"""The manifests for k3s: the schemas of Kubernetes, kustomize, the runtime's own settings, what a restricted pod is."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from edge.config import Settings, load_settings
from tests.firmware.test_boards import KV_BYTES_PER_TOKEN, PROCESS_MB
from tests.firmware.tools import COMMON, FIRMWARE, ROOT, missing, need, run

MANIFEST = FIRMWARE / "k3s/qwedge.yaml"
VERSIONS = ("1.27", "1.37")
"""The oldest that the manifest is for, and the newest whose schemas are there."""
USER = 65532


def judge(tool: str) -> Path:
    """A program of the environment that `make manifests` makes."""
    path = ROOT / ".venv-manifests/bin" / tool
    if not path.exists():
        missing(f"this test needs {tool}: make manifests")
    return path


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    return {item["kind"]: item for item in yaml.safe_load_all(MANIFEST.read_text())}


@pytest.fixture(scope="module")
def pod(objects: dict[str, Any]) -> Any:
    return objects["DaemonSet"]["spec"]["template"]["spec"]


@pytest.fixture
def settings(objects: dict[str, Any], tmp_path: Path) -> Settings:
    path = tmp_path / "edge.toml"
    path.write_text(objects["ConfigMap"]["data"]["edge.toml"])
    return load_settings(path, env={"QWEDGE_MQTT_DEVICE": "edge-7"})


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_what_kubernetes_takes(objects: dict[str, Any], version: str) -> None:
    said = run(judge("kubernetes-validate"), "--strict", "-k", version, MANIFEST)
    assert said.count(" passed ") == len(objects)


def test_an_unknown_field_would_be_found(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(MANIFEST.read_text().replace("readOnlyRootFilesystem", "readOnlyRootFileSystem"))
    with pytest.raises(AssertionError, match="readOnlyRootFileSystem"):
        run(judge("kubernetes-validate"), "--strict", broken)


def test_kustomize_builds_all_of_it(objects: dict[str, Any]) -> None:
    """kustomization.yaml names the version that `make oci` gives its image."""
    built = list(yaml.safe_load_all(run(need("kubectl", "kubernetes-client"), "kustomize", MANIFEST.parent)))
    assert {item["kind"] for item in built} == set(objects)
    (daemons,) = (item for item in built if item["kind"] == "DaemonSet")
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert daemons["spec"]["template"]["spec"]["containers"][0]["image"] == f"docker.io/library/qwedge:{version[1]}"


def test_the_pod_is_restricted_but_for_the_folder_of_its_node(pod: Any) -> None:
    """The profile `restricted` of https://kubernetes.io/docs/concepts/security/pod-security-standards/, and more."""
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(pod)
    assert pod["automountServiceAccountToken"] is False
    (folder,) = (volume["hostPath"]["path"] for volume in pod["volumes"] if "hostPath" in volume)
    assert folder == "/var/lib/qwedge"


def test_the_user_is_the_images() -> None:
    assert f"qwedge:x:{USER}:{USER}:" in (FIRMWARE / "oci/passwd").read_text()


def test_probes_ask_what_the_server_answers(pod: Any, settings: Settings) -> None:
    (container,) = pod["containers"]
    asked = {name: container[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert asked == {"startupProbe": "/health/live", "livenessProbe": "/health/live", "readinessProbe": "/health/ready"}
    assert container["ports"] == [{"name": "http", "containerPort": settings.server.port}]
    assert pod["terminationGracePeriodSeconds"] >= settings.server.drain_s + 30


def test_the_settings_are_the_runtimes_and_each_has_a_reason(objects: dict[str, Any], settings: Settings) -> None:
    assert settings.mqtt.pool == "on"
    assert settings.mqtt.device == "edge-7"
    assert settings.server.open == "off"
    lines = objects["ConfigMap"]["data"]["edge.toml"].splitlines()
    for before, line in pairwise(lines):
        assert " = " not in line or line.startswith("#") or before.startswith("# "), line


def test_secrets_are_named_and_not_there(objects: dict[str, Any], pod: Any, settings: Settings) -> None:
    """Relative names are files of the folder of credentials, where the secret is mounted."""
    assert "Secret" not in objects
    (container,) = pod["containers"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    env = {item["name"]: item.get("value") for item in container["env"]}
    assert env["CREDENTIALS_DIRECTORY"] == mounted["secrets"]
    assert {str(settings.server.keys_file), str(settings.mqtt.password_file), str(settings.mqtt.tls_ca)} == {
        "http-keys.json",
        "mqtt-password",
        "broker-ca.pem",
    }


def test_a_model_its_caches_and_its_self_test_fit_below_the_limit(pod: Any, settings: Settings) -> None:
    limit = pod["containers"][0]["resources"]["limits"]["memory"]
    engine = settings.engine
    assert engine.kv_cache_mb is not None
    assert engine.prefix_cache_mb is not None
    assert 2 * PROCESS_MB + engine.kv_cache_mb + engine.prefix_cache_mb <= int(limit.removesuffix("Gi")) * 1024
    assert engine.kv_cache_mb << 20 >= 4096 * KV_BYTES_PER_TOKEN


def test_the_broker_and_nothing_else_is_reached(objects: dict[str, Any], settings: Settings) -> None:
    policy = objects["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    ports = {port["port"] for rule in policy["egress"] for port in rule["ports"]}
    assert ports == {53, int(settings.mqtt.broker.rpartition(":")[2])}
    assert policy["podSelector"] == objects["PodDisruptionBudget"]["spec"]["selector"]
    assert policy["podSelector"] == objects["DaemonSet"]["spec"]["selector"]


def test_the_user_at_the_broker_may_use_the_pool(settings: Settings) -> None:
    rules = (COMMON / "mosquitto/qwedge.acl").read_text()
    assert f"user {settings.mqtt.username}\n" in rules
    assert f"$share/qwedge/{settings.mqtt.root}/v1/pool/+/req/+/+" in rules
