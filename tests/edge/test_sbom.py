"""Bills of materials: what they name, and that they are the same every time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from edge.bundle import read_manifest
from edge.sbom import bundle_sbom, package_sbom
from tests.edge.bundles import write_bundle

ROOT = Path(__file__).parents[2]


def test_the_package_names_what_it_needs_and_nothing_else_that_is_installed() -> None:
    bill = package_sbom()
    names = {component["name"] for component in bill["components"]}
    assert {"onnxruntime", "numpy", "paho-mqtt"} <= names
    assert not names & {"qwedge", "pytest", "ruff", "safetensors", "gguf"}
    assert bill["metadata"]["component"]["name"] == "qwedge"
    assert all(component["purl"].startswith("pkg:pypi/") for component in bill["components"])
    assert sum("licenses" in component for component in bill["components"]) > len(names) / 2


def test_every_package_but_qwedge_is_needed_by_one() -> None:
    bill = package_sbom()
    links = {link["ref"]: link["dependsOn"] for link in bill["dependencies"]}
    refs = {component["bom-ref"] for component in bill["components"]}
    assert set().union(*links.values()) == refs
    assert set(links) == refs | {bill["metadata"]["component"]["bom-ref"]}


def test_a_bundle_names_its_files_and_where_it_comes_from(tmp_path: Path) -> None:
    manifest = read_manifest(write_bundle(tmp_path / "bundle", counter=3))
    manifest = manifest.model_copy(
        update={
            "licence": "Apache-2.0",
            "tools": {"onnxruntime": "1.31.1"},
            "source": manifest.source.model_copy(update={"revision": "abc", "sha256": {"model.safetensors": "0" * 64}}),
        }
    )
    bill = bundle_sbom(manifest)
    root = bill["metadata"]["component"]
    assert {file["name"]: file["hashes"][0]["content"] for file in bill["components"]} == {
        entry.path: entry.sha256 for entry in manifest.files
    }
    assert root["licenses"] == [{"license": {"name": "Apache-2.0"}}]
    assert root["pedigree"]["ancestors"][0]["version"] == "abc"
    assert bill["metadata"]["tools"]["components"] == [
        {"type": "application", "name": "onnxruntime", "version": "1.31.1"}
    ]


def test_it_is_the_same_every_time_and_another_for_another_bundle(tmp_path: Path) -> None:
    first, second = (write_bundle(tmp_path / str(counter), counter=counter) for counter in (1, 2))

    def printed(*args: str) -> str:
        line = [sys.executable, "-m", "edge.cli", "sbom", *args]
        return subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True).stdout

    assert json.loads(printed()) == package_sbom()
    assert json.loads(printed(str(first))) == bundle_sbom(read_manifest(first))
    assert bundle_sbom(read_manifest(first))["serialNumber"] != bundle_sbom(read_manifest(second))["serialNumber"]
