"""``qwedge keys`` and ``qwedge sign``: the keys that sign bundles."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from edge.bundle import SIGNATURE, Progress, read_manifest, sign_bundle
from edge.commands import options
from edge.errors import ConfigError
from edge.settings.mqtt import sanitize_device

Folder = Annotated[
    Path | None,
    typer.Option("--folder", metavar="DIR", help="Where the keys are [default: qwedge/keys in the user's settings]."),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="The keys that sign bundles.", no_args_is_help=True)
    group.command("init")(init)
    group.command("list")(show)
    app.add_typer(group, name="keys")
    app.command("sign")(sign)


def init(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Who signs, as devices show it [default: this host's name].")
    ] = None,
    *,
    folder: Folder = None,
) -> None:
    """Make a key: NAME.key, which stays here, and NAME.pub, which goes into the trust folder of every device.

    NAME.key has no passphrase: whoever can read it can sign. Keep a copy where nobody else comes. An existing key is
    never overwritten.
    """
    from edge.signing import PRIVATE_SUFFIX, PUBLIC_SUFFIX, make_keys

    chosen = folder or default_folder()
    key = make_keys(chosen, name or sanitize_device(socket.gethostname()))
    options.note(
        f"private: {chosen / (key.name + PRIVATE_SUFFIX)} (for `qwedge export --sign` and `qwedge sign --key`)"
    )
    options.note(f"public:  {chosen / (key.name + PUBLIC_SUFFIX)} (for model.trust of the devices)")
    print(key.key_id)


def show(*, folder: Folder = None, as_json: options.Json = False) -> None:
    """List the public keys of a folder: one's own, or a trust folder's."""
    from edge.signing import PRIVATE_SUFFIX, Trust

    chosen = folder or default_folder()
    known = Trust(chosen).read_keys() if folder is not None or chosen.exists() else ()
    keys = [
        {"name": key.name, "key_id": key.key_id, "private": (chosen / (key.name + PRIVATE_SUFFIX)).exists()}
        for key in known
    ]
    if as_json:
        options.print_json(keys)
        return
    for key in keys:
        print(f"{key['key_id']}  {key['name']}{'  (can sign here)' if key['private'] else ''}")
    if not keys:
        options.note(f"there are no keys in {chosen}; `qwedge keys init` makes one")


def sign(
    bundle: Annotated[Path, typer.Argument(metavar="DIR", help="The bundle's folder.")],
    *,
    key: Annotated[
        Path, typer.Option("--key", metavar="FILE", help="The private key: NAME.key of `qwedge keys init`.")
    ],
    oms: Annotated[
        Path | None,
        typer.Option(
            "--oms",
            metavar="FILE",
            help="Write an OpenSSF model signature to this file instead, for tools other than qwedge; the key is then"
            " one of the curves P-256, P-384 or P-521, in PEM.",
        ),
    ] = None,
) -> None:
    """Sign a bundle, in place of a signature that it may have; its files are verified first."""
    write, key_id = _signing(bundle, key, oms)
    total = sum(entry.size for entry in read_manifest(bundle).files)
    target = oms or bundle / SIGNATURE
    try:
        with options.byte_progress("verifying", total) as progress:
            write(progress)
    except OSError as error:
        hint = "choose a folder that you may write to"
        raise ConfigError(f"{target} cannot be written: {error.strerror}", hint=hint) from None
    print(f"{target}: key {key_id}")


def _signing(bundle: Path, key: Path, oms: Path | None) -> tuple[Callable[[Progress | None], object], str]:
    """What signs, and the name of its key."""
    from edge.oms import EcKey, write_oms_signature
    from edge.signing import PrivateKey

    if oms is None:
        private = PrivateKey.load(key)
        return lambda progress: sign_bundle(bundle, private, progress=progress), private.key_id
    curve = EcKey.load(key)
    return lambda progress: write_oms_signature(bundle, curve, oms, progress=progress), curve.hint


def default_folder() -> Path:
    """Where the keys of this user are.

    Raises:
        ConfigError: the user has no home.
    """
    if home := os.environ.get("XDG_CONFIG_HOME"):
        return Path(home) / "qwedge" / "keys"
    try:
        return Path.home() / ".config" / "qwedge" / "keys"
    except RuntimeError:
        raise ConfigError("the user has no home to keep keys in", hint="name a folder with --folder") from None
