"""Signatures of `qwedge sign --oms`, checked by the tool of those who specified them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from edge.oms import EcKey, write_oms_signature
from tests.edge.bundles import write_bundle
from tests.edge.test_oms import public_pem, write_key


def verify(bundle: Path, public: Path, signature: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "model_signing", "verify", "key", bundle, "--public_key", public]
    return subprocess.run([*line, "--signature", signature], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP521R1()])
def test_a_bundle_verifies_until_a_byte_of_it_changes(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    (bundle / "manifest.sig").write_bytes(b"of somebody")
    key = write_key(tmp_path / "ec.pem", curve)
    public, signature = tmp_path / "public.pem", tmp_path / "model.sig"
    public.write_bytes(public_pem(key))
    write_oms_signature(bundle, EcKey.load(key), signature)
    done = verify(bundle, public, signature)
    assert done.returncode == 0, done.stdout + done.stderr
    (bundle / "extra.txt").write_text("changed")
    assert verify(bundle, public, signature).returncode != 0
