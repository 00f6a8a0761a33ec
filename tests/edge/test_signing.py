"""Signatures: what a trusted key signed is taken, whatever else there is is refused before anything is loaded."""

from __future__ import annotations

import base64
import json
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from edge.bundle import MANIFEST, SIGNATURE, read_manifest, sign_bundle, verify_bundle
from edge.errors import BundleError, ConfigError, SignatureError
from edge.signing import PrivateKey, PublicKey, Trust, make_keys
from tests.edge.bundles import write_bundle


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A folder with the keys `alice` and `bob`."""
    for name in ("alice", "bob"):
        make_keys(tmp_path / "keys", name)
    return tmp_path / "keys"


@pytest.fixture
def trust(keys: Path, tmp_path: Path) -> Trust:
    """Trusts alice alone."""
    (tmp_path / "trusted").mkdir()
    shutil.copy(keys / "alice.pub", tmp_path / "trusted")
    return Trust(tmp_path / "trusted")


@pytest.fixture
def bundle(tmp_path: Path, keys: Path) -> Path:
    """Signed by alice."""
    folder = write_bundle(tmp_path / "bundle")
    sign_bundle(folder, PrivateKey.load(keys / "alice.key"))
    return folder


def refusal(bundle: Path, trust: Trust) -> str:
    with pytest.raises(BundleError) as caught:
        verify_bundle(bundle, trust=trust)
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    return caught.value.message


class TestKeys:
    def test_the_private_one_is_for_its_owner_alone(self, keys: Path) -> None:
        assert stat.S_IMODE((keys / "alice.key").stat().st_mode) == 0o600
        assert stat.S_IMODE(keys.stat().st_mode) == 0o700

    def test_both_files_belong_together(self, keys: Path) -> None:
        public = PublicKey.load(keys / "alice.pub")
        assert (public.name, public.key_id) == ("alice", PrivateKey.load(keys / "alice.key").key_id)

    @pytest.mark.parametrize("there", ["alice.key", "alice.pub"])
    def test_existing_ones_stay(self, keys: Path, there: str) -> None:
        before = (keys / there).read_bytes()
        for other in {"alice.key", "alice.pub"} - {there}:
            (keys / other).unlink()
        with pytest.raises(ConfigError, match="holds a key alice already"):
            make_keys(keys, "alice")
        assert [path.name for path in keys.iterdir() if path.name.startswith("alice")] == [there]
        assert (keys / there).read_bytes() == before

    @pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "x" * 65, "a b", "new\nline"])
    def test_names_that_are_none(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ConfigError, match="cannot be the name of a key"):
            make_keys(tmp_path / "keys", name)
        assert not (tmp_path / "keys").exists()

    def test_one_that_others_may_read_does_not_sign(self, keys: Path) -> None:
        (keys / "alice.key").chmod(0o640)
        with pytest.raises(ConfigError, match="others may read it"):
            PrivateKey.load(keys / "alice.key")

    @pytest.mark.parametrize("content", [b"", b"-----BEGIN PRIVATE KEY-----", b"\xff" * 99, b"x" * 5000])
    def test_what_is_no_private_key(self, keys: Path, content: bytes) -> None:
        (keys / "alice.key").write_bytes(content)
        with pytest.raises(ConfigError, match="is no private key"):
            PrivateKey.load(keys / "alice.key")

    def test_a_key_of_another_kind(self, keys: Path) -> None:
        line = ["openssl", "genpkey", "-algorithm", "X25519", "-out", str(keys / "x.key")]
        subprocess.run(line, check=True)
        with pytest.raises(ConfigError, match="is no Ed25519 key"):
            PrivateKey.load(keys / "x.key")

    @pytest.mark.parametrize(
        ("change", "why"),
        [
            ({"key_id": "0" * 16}, "another key's"),
            ({"public_key": base64.b64encode(b"x" * 31).decode()}, "31 bytes instead of 32"),
            ({"public_key": "!"}, ""),
            ({"algorithm": "rsa"}, "algorithm"),
            ({"name": "a\nb"}, "name"),
            ({"more": 1}, "more"),
        ],
    )
    def test_a_malformed_public_key_ends_every_check(
        self, bundle: Path, trust: Trust, change: dict[str, object], why: str
    ) -> None:
        path = trust.folder / "alice.pub"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ConfigError, match="is no public key") as caught:
            verify_bundle(bundle, trust=trust)
        assert why in caught.value.message


class TestTrust:
    def test_what_a_trusted_key_signed(self, bundle: Path, trust: Trust) -> None:
        assert verify_bundle(bundle, trust=trust) == read_manifest(bundle)

    def test_without_trust_signatures_are_not_looked_at(self, bundle: Path) -> None:
        (bundle / SIGNATURE).write_text("nonsense")
        assert verify_bundle(bundle)

    def test_the_signature_is_the_same_every_time(self, bundle: Path, keys: Path) -> None:
        before = (bundle / SIGNATURE).read_bytes()
        sign_bundle(bundle, PrivateKey.load(keys / "alice.key"))
        assert (bundle / SIGNATURE).read_bytes() == before

    def test_openssl_agrees(self, bundle: Path, keys: Path, tmp_path: Path) -> None:
        """Ed25519 as RFC 8032 has it, over the very bytes of the manifest."""
        (tmp_path / "sig").write_bytes(base64.b64decode(json.loads((bundle / SIGNATURE).read_bytes())["signature"]))
        line = ["openssl", "pkeyutl", "-verify", "-rawin", "-inkey", keys / "alice.key", "-sigfile", tmp_path / "sig"]
        subprocess.run([*line, "-in", bundle / MANIFEST], check=True, capture_output=True)

    def test_unsigned(self, bundle: Path, trust: Trust) -> None:
        (bundle / SIGNATURE).unlink()
        assert refusal(bundle, trust) == f"{bundle} is not signed"

    def test_signed_by_somebody_else(self, bundle: Path, keys: Path, trust: Trust) -> None:
        bob = PrivateKey.load(keys / "bob.key")
        sign_bundle(bundle, bob)
        assert refusal(bundle, trust) == f"{bundle} is signed with the key {bob.key_id}, which is not trusted"

    def test_a_key_that_is_taken_out_counts_no_more(self, bundle: Path, keys: Path, trust: Trust) -> None:
        verify_bundle(bundle, trust=trust)
        shutil.copy(keys / "bob.pub", trust.folder)
        (trust.folder / "alice.pub").unlink()
        assert "which is not trusted" in refusal(bundle, trust)

    def test_somebody_elses_signature_under_a_trusted_name(self, bundle: Path, keys: Path, trust: Trust) -> None:
        sign_bundle(bundle, PrivateKey.load(keys / "bob.key"))
        signature = json.loads((bundle / SIGNATURE).read_text())
        signature["key_id"] = PublicKey.load(keys / "alice.pub").key_id
        (bundle / SIGNATURE).write_text(json.dumps(signature))
        assert refusal(bundle, trust) == f"the signature of {bundle} does not fit its manifest"

    def test_changed_bytes_of_the_manifest(self, bundle: Path, trust: Trust) -> None:
        """Whether it is still JSON does not matter: nobody reads it before the signature fits."""
        content = (bundle / MANIFEST).read_bytes()
        for place in range(0, len(content), 7):
            changed = bytearray(content)
            changed[place] ^= 0x20
            (bundle / MANIFEST).write_bytes(changed)
            with pytest.raises(SignatureError, match="does not fit its manifest"):
                read_manifest(bundle, trust=trust)

    def test_every_changed_byte_of_the_signature(self, bundle: Path, trust: Trust) -> None:
        content = (bundle / SIGNATURE).read_bytes()
        for place in range(len(content)):
            changed = bytearray(content)
            changed[place] ^= 1
            (bundle / SIGNATURE).write_bytes(changed)
            with pytest.raises(SignatureError):
                read_manifest(bundle, trust=trust)

    @pytest.mark.parametrize("text", ["", "{}", "null", "[" * 4000, '{"key_id": "x"}', "\xff"])
    def test_a_signature_that_is_none(self, bundle: Path, trust: Trust, text: str) -> None:
        (bundle / SIGNATURE).write_text(text)
        assert refusal(bundle, trust) == f"the signature of {bundle} is malformed"

    def test_one_that_is_too_large(self, bundle: Path, trust: Trust) -> None:
        (bundle / SIGNATURE).write_bytes(b" " * 5000)
        assert "is larger than" in refusal(bundle, trust)

    @pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
    def test_a_signature_elsewhere(
        self, bundle: Path, tmp_path: Path, trust: Trust, link: Callable[[Path, Path], None]
    ) -> None:
        (bundle / SIGNATURE).rename(tmp_path / "sig")
        link(bundle / SIGNATURE, tmp_path / "sig")
        assert str(bundle / SIGNATURE) in refusal(bundle, trust)

    def test_no_keys_is_no_trust(self, bundle: Path, tmp_path: Path) -> None:
        for folder in (tmp_path / "nowhere", tmp_path / "bundle"):
            with pytest.raises(ConfigError):
                verify_bundle(bundle, trust=Trust(folder))


def test_only_a_bundle_that_is_whole_is_signed(bundle: Path, keys: Path) -> None:
    (bundle / SIGNATURE).unlink()
    (bundle / "model.onnx").write_bytes(b"another")
    with pytest.raises(BundleError):
        sign_bundle(bundle, PrivateKey.load(keys / "alice.key"))
    assert not (bundle / SIGNATURE).exists()
