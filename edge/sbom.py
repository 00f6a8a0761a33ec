"""Bills of materials as CycloneDX 1.6: of the installed package and of a bundle (https://cyclonedx.org/docs/1.6/json).

They hold no time and no random number, so that the same installation, or the same bundle, gives the same bytes.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from typing import Any

from edge import __version__
from edge.bundle import Manifest

PACKAGE = "qwedge"
_REQUIREMENT = re.compile(r"\s*(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)[^;]*(;(?P<marker>.*))?")
_MAX_LICENCE_NAME = 80
"""Characters; longer ones are the licence's text."""

Json = dict[str, Any]


def package_sbom() -> Json:
    """What is installed here because qwedge needs it: the closure of its requirements, without extras."""
    installed: dict[str, Distribution] = {}
    waiting = [PACKAGE]
    while waiting:
        name = waiting.pop()
        if name not in installed and (found := _find(name)) is not None:
            installed[name] = found
            waiting += _required(found)
    components = {name: _component(name, found) for name, found in sorted(installed.items())}
    root = {**components.pop(PACKAGE), "type": "application"}
    links = [
        {
            "ref": _purl(name, found.version),
            "dependsOn": [_purl(other, installed[other].version) for other in _required(found) if other in installed],
        }
        for name, found in sorted(installed.items())
    ]
    return _document(root, list(components.values()), [_tool(PACKAGE, __version__)], {"dependencies": links})


def bundle_sbom(manifest: Manifest) -> Json:
    """What a bundle is made of: its files, the checkpoint it comes from, the tools that made it."""
    source = manifest.source
    ancestor = {
        "type": "machine-learning-model",
        "name": source.location,
        **({"version": source.revision} if source.revision else {}),
        "components": [_file(name, sha256) for name, sha256 in sorted(source.sha256.items())],
    }
    root = {
        "type": "machine-learning-model",
        "bom-ref": f"{manifest.name}@{manifest.version}",
        "name": manifest.name,
        "version": manifest.version,
        **({"licenses": [{"license": {"name": manifest.licence}}]} if manifest.licence else {}),
        "pedigree": {"ancestors": [ancestor]},
        "properties": [
            {"name": "qwedge:recipe", "value": str(manifest.recipe.get("name", "?"))},
            {"name": "qwedge:counter", "value": str(manifest.counter)},
        ],
    }
    files = [_file(entry.path, entry.sha256) for entry in sorted(manifest.files, key=lambda entry: entry.path)]
    tools = [_tool(name, version) for name, version in sorted(manifest.tools.items())]
    return _document(root, files, tools, {})


def _document(root: Json, components: Sequence[Json], tools: Sequence[Json], rest: Mapping[str, Any]) -> Json:
    """The whole, with a serial number that follows from the rest."""
    content = {
        "version": 1,
        "metadata": {**({"tools": {"components": list(tools)}} if tools else {}), "component": root},
        "components": list(components),
        **rest,
    }
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(content, sort_keys=True))
    return {"bomFormat": "CycloneDX", "specVersion": "1.6", "serialNumber": serial.urn, **content}


def _component(name: str, found: Distribution) -> Json:
    return {
        "type": "library",
        "bom-ref": _purl(name, found.version),
        "name": name,
        "version": found.version,
        **_licence(found),
        "purl": _purl(name, found.version),
    }


def _licence(found: Distribution) -> Json:
    """As the package says: an SPDX expression, or names of its own."""
    metadata = found.metadata
    if "License-Expression" in metadata:
        return {"licenses": [{"expression": metadata["License-Expression"]}]}
    classified = [
        text.rpartition(" :: ")[2] for text in metadata.get_all("Classifier", []) if text.startswith("License :: ")
    ]
    given = metadata["License"].strip() if "License" in metadata else ""
    names = classified or ([given] if given and len(given) <= _MAX_LICENCE_NAME and "\n" not in given else [])
    return {"licenses": [{"license": {"name": name}} for name in names]} if names else {}


def _find(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _required(found: Distribution) -> list[str]:
    """Normalized names of what a distribution requires on some machine, its extras left out."""
    names = set()
    for text in found.requires or ():
        match = _REQUIREMENT.match(text)
        if match is not None and "extra" not in (match["marker"] or ""):
            names.add(re.sub(r"[-_.]+", "-", match["name"]).lower())
    return sorted(names)


def _purl(name: str, version: str) -> str:
    return f"pkg:pypi/{name}@{version}"


def _tool(name: str, version: str) -> Json:
    return {"type": "application", "name": name, "version": version}


def _file(name: str, sha256: str) -> Json:
    return {"type": "file", "name": name, "hashes": [{"alg": "SHA-256", "content": sha256}]}
