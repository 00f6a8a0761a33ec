"""Signatures of bundles as the OpenSSF Model Signing specification has them (OMS), for tools that verify those.

A device looks at ``manifest.sig`` (:mod:`edge.signing`). An OMS signature is for everybody else on the way there: model
registries, admission controllers, auditors. It is one JSON file beside the bundle, a Sigstore bundle [2] around a DSSE
envelope [3] around an in-toto statement that lists every file with its SHA-256 [1].

[1] https://github.com/ossf/model-signing-spec, predicate https://model_signing/signature/v1.0
[2] https://docs.sigstore.dev/about/bundle/
[3] https://github.com/secure-systems-lab/dsse/blob/v1.0.0/protocol.md
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from edge.bundle import MANIFEST, SIGNATURE, Progress, read_manifest_bytes, read_signature, verify_bundle
from edge.durable import replace_durably
from edge.errors import ConfigError
from edge.signing import load_private_pem

_PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
_BUNDLE_TYPE: Final = "application/vnd.dev.sigstore.bundle.v0.3+json"
_STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE: Final = "https://model_signing/signature/v1.0"
_HASHES: Final[dict[str, hashes.HashAlgorithm]] = {
    "secp256r1": hashes.SHA256(),
    "secp384r1": hashes.SHA384(),
    "secp521r1": hashes.SHA512(),
}
"""What each curve of the specification signs."""


class EcKey:
    """An elliptic curve's private key; made by :meth:`load`."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key

    @classmethod
    def load(cls, path: Path) -> EcKey:
        """Read a key in PEM.

        Raises:
            ConfigError: it cannot be read, others may read it, or it is of no curve of the specification.
        """
        hint = "make one with `openssl ecparam -name prime256v1 -genkey -noout -out FILE`"
        key = load_private_pem(path, hint=hint)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in _HASHES:
            raise ConfigError(f"{path} is no key of the curves P-256, P-384 or P-521", hint=hint)
        return cls(key)

    @property
    def hint(self) -> str:
        """SHA-256 of the public key in PEM, as signatures name their key."""
        public = self._key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return hashlib.sha256(public).hexdigest()

    def sign(self, message: bytes) -> bytes:
        """ECDSA in DER; the same for the same bytes, always (RFC 6979)."""
        algorithm = ec.ECDSA(_HASHES[self._key.curve.name], deterministic_signing=True)
        return self._key.sign(message, algorithm)


def write_oms_signature(folder: Path, key: EcKey, file: Path, *, progress: Progress | None = None) -> None:
    """Verify a bundle and write its OMS signature, in place of one that may be there.

    Args:
        folder: the bundle, its ``manifest.sig`` included where there is one: signing it anew invalidates this.
        key: signs.
        file: the signature's, outside the bundle, which holds nothing that its manifest does not name.
        progress: called with the number of bytes verified.

    Raises:
        BundleError: the bundle is damaged.
        ConfigError: ``file`` lies in the bundle.
        OSError: the disk refused.
    """
    if file.resolve().is_relative_to(folder.resolve()):
        hint = "a bundle holds what its manifest names and nothing else: put it beside the folder"
        raise ConfigError(f"{file} lies in the bundle", hint=hint)
    statement = json.dumps(_statement(folder, progress), indent=2).encode()
    replace_durably(file, json.dumps(_sigstore_bundle(statement, key), indent=2).encode() + b"\n")


def _statement(folder: Path, progress: Progress | None) -> dict[str, Any]:
    """Every file with its digest, sorted by name, and one digest over all of these."""
    digests = {entry.path: entry.sha256 for entry in verify_bundle(folder, progress=progress).files}
    digests[MANIFEST] = hashlib.sha256(read_manifest_bytes(folder)).hexdigest()
    if (signature := read_signature(folder)) is not None:
        digests[SIGNATURE] = hashlib.sha256(signature).hexdigest()
    files = sorted(digests.items())
    root = hashlib.sha256(b"".join(bytes.fromhex(digest) for _, digest in files)).hexdigest()
    serialization = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": []}
    return {
        "_type": _STATEMENT_TYPE,
        "subject": [{"name": folder.resolve().name, "digest": {"sha256": root}}],
        "predicateType": _PREDICATE_TYPE,
        "predicate": {
            "serialization": serialization,
            "resources": [{"name": name, "algorithm": "sha256", "digest": digest} for name, digest in files],
        },
    }


def _sigstore_bundle(statement: bytes, key: EcKey) -> dict[str, Any]:
    # What is signed is the "pre-authentication encoding" of DSSE.
    signed = b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD_TYPE), _PAYLOAD_TYPE.encode(), len(statement), statement)
    signatures = [{"sig": base64.b64encode(key.sign(signed)).decode(), "keyid": ""}]
    return {
        "mediaType": _BUNDLE_TYPE,
        "verificationMaterial": {"publicKey": {"hint": key.hint}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(statement).decode(),
            "payloadType": _PAYLOAD_TYPE,
            "signatures": signatures,
        },
    }
