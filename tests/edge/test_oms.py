"""Signatures for others' tools: OpenSSF Model Signing. tests/clients has the specification's own tool check them."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from edge.cli import run
from edge.errors import BundleError, ConfigError
from edge.oms import EcKey, write_oms_signature
from edge.signing import make_keys
from tests.edge.bundles import write_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def write_key(path: Path, curve: ec.EllipticCurve | None = None, mode: int = 0o600) -> Path:
    key = ec.generate_private_key(curve or ec.SECP256R1())
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(mode)
    return path


def statement(signature: Path) -> dict[str, Any]:
    envelope = json.loads(signature.read_text())["dsseEnvelope"]
    return dict(json.loads(base64.b64decode(envelope["payload"])))


@pytest.mark.parametrize(
    ("curve", "algorithm"),
    [
        (ec.SECP256R1(), hashes.SHA256()),
        (ec.SECP384R1(), hashes.SHA384()),
        (ec.SECP521R1(), hashes.SHA512()),
    ],
)
def test_every_file_is_signed(
    bundle: Path, tmp_path: Path, curve: ec.EllipticCurve, algorithm: hashes.HashAlgorithm
) -> None:
    key_file = write_key(tmp_path / "ec.pem", curve)
    (bundle / "manifest.sig").write_bytes(b"of somebody")
    write_oms_signature(bundle, EcKey.load(key_file), tmp_path / "model.sig")
    made = json.loads((tmp_path / "model.sig").read_text())
    payload = base64.b64decode(made["dsseEnvelope"]["payload"])
    public = load_pem_public_key(public_pem(key_file))
    assert isinstance(public, ec.EllipticCurvePublicKey)
    signature = base64.b64decode(made["dsseEnvelope"]["signatures"][0]["sig"])
    message = b"DSSEv1 28 application/vnd.in-toto+json %d " % len(payload)
    public.verify(signature, message + payload, ec.ECDSA(algorithm))
    with pytest.raises(InvalidSignature):
        public.verify(signature, message + payload.replace(b"bundle", b"burgle"), ec.ECDSA(algorithm))
    assert made["verificationMaterial"]["publicKey"]["hint"] == hashlib.sha256(public_pem(key_file)).hexdigest()
    told = {entry["name"]: entry["digest"] for entry in json.loads(payload)["predicate"]["resources"]}
    there = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in bundle.iterdir()}
    assert told == there
    assert list(told) == sorted(told)


def test_the_same_bytes_every_time(bundle: Path, tmp_path: Path) -> None:
    key = EcKey.load(write_key(tmp_path / "ec.pem"))
    for name in ("one", "two"):
        write_oms_signature(bundle, key, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_damaged_bundle_is_not_signed(bundle: Path, tmp_path: Path) -> None:
    (bundle / "extra.txt").write_text("changed")
    with pytest.raises(BundleError):
        write_oms_signature(bundle, EcKey.load(write_key(tmp_path / "ec.pem")), tmp_path / "model.sig")
    assert not (tmp_path / "model.sig").exists()


def test_keys_that_do_not_sign(tmp_path: Path) -> None:
    make_keys(tmp_path, "alice")
    for path, reason in (
        (tmp_path / "missing.pem", "No such file"),
        (write_key(tmp_path / "open.pem", mode=0o644), "others may read it"),
        (write_key(tmp_path / "odd.pem", ec.SECP256K1()), "is no key of the curves"),
        (tmp_path / "alice.key", "is no key of the curves"),
    ):
        with pytest.raises(ConfigError, match=reason) as caught:
            EcKey.load(path)
        assert "openssl ecparam" in caught.value.hint


def test_the_command(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = write_key(tmp_path / "ec.pem")
    line = ["sign", str(bundle), "--key", str(key), "--oms"]
    assert run([*line, str(tmp_path / "model.sig")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'model.sig'}: key {EcKey.load(key).hint}\n"
    assert statement(tmp_path / "model.sig")["subject"][0]["name"] == "bundle"
    for wrong, message in ((bundle, "lies in the bundle"), (tmp_path / "missing", "cannot be written: No such file")):
        assert run([*line, str(wrong / "model.sig")]) != 0
        assert message in capsys.readouterr().err
    assert not (bundle / "model.sig").exists()


def public_pem(key_file: Path) -> bytes:
    public = load_pem_private_key(key_file.read_bytes(), None).public_key()
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
