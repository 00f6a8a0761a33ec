"""Bundles that somebody changed: every change is refused before anything could open the model.

    python -m tests.faults.tamper --changes 4000

A signed bundle is changed in one of a dozen ways, by somebody who can write its files but has no trusted key, and
verified; then it is put back.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from edge.bundle import GRAPH, MANIFEST, SIGNATURE, WEIGHTS, hash_file, sign_bundle, verify_bundle
from edge.errors import BundleError
from edge.signing import PrivateKey, Trust, make_keys
from tests.edge.bundles import FILES, write_bundle

Change = Callable[[Path, random.Random], None]


def main() -> None:
    """Run the campaign and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    print(json.dumps(campaign(options.changes, options.seed)))


def campaign(changes: int, seed: int) -> dict[str, int]:
    """Change a bundle so often; gives how many changes of each kind were refused, and how many were not."""
    print(f"seed {seed}", flush=True)
    chance = random.Random(seed)
    figures = Counter({"seed": seed, "accepted": 0})
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name in ("trusted", "stranger"):
            make_keys(folder / name, name)
        files = {**FILES, WEIGHTS: chance.randbytes(200_000)}
        original = write_bundle(folder / "original" / "bundle", files, counter=2)
        older = write_bundle(folder / "older" / "bundle", {**files, GRAPH: b"older"}, counter=1)
        for bundle in (original, older):
            sign_bundle(bundle, PrivateKey.load(folder / "trusted" / "trusted.key"))
        trust = Trust(folder / "trusted")
        for _ in range(changes):
            bundle = folder / "changed" / "bundle"
            shutil.copytree(original, bundle)
            change = chance.choice(CHANGES)
            change(bundle, chance)
            if is_refused(bundle, trust):
                figures[change.__name__] += 1
            else:
                figures["accepted"] += 1
                print(f"accepted: {change.__name__}", flush=True)
            shutil.rmtree(bundle.parent)
    return dict(figures)


def is_refused(bundle: Path, trust: Trust) -> bool:
    """Whether verification finds it."""
    try:
        verify_bundle(bundle, trust=trust)
    except BundleError:
        return True
    return False


def flip(path: Path, chance: random.Random) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def weights(bundle: Path, chance: random.Random) -> None:
    """One bit of the weights."""
    flip(bundle / WEIGHTS, chance)


def manifest(bundle: Path, chance: random.Random) -> None:
    """One bit of the manifest."""
    flip(bundle / MANIFEST, chance)


def signature(bundle: Path, chance: random.Random) -> None:
    """One bit of the signature itself."""
    made = json.loads((bundle / SIGNATURE).read_text())
    text = made["signature"]
    place = chance.randrange(85)  # the 86th digit holds bits that do not count
    other = chance.choice(sorted(set("ABCDEFGHabcdefgh0123+/") - {text[place]}))
    made["signature"] = text[:place] + other + text[place + 1 :]
    (bundle / SIGNATURE).write_text(json.dumps(made))


def addition(bundle: Path, chance: random.Random) -> None:
    """A further file or folder."""
    path = bundle / f"{chance.choice(['.', '', 'model.onnx.'])}{chance.randrange(99)}"
    chance.choice([path.touch, path.mkdir, lambda: os.mkfifo(path)])()


def removal(bundle: Path, chance: random.Random) -> None:
    """A file less."""
    chance.choice(sorted(bundle.iterdir())).unlink()


def truncation(bundle: Path, chance: random.Random) -> None:
    """A file cut off."""
    path = chance.choice([path for path in sorted(bundle.iterdir()) if path.stat().st_size])
    # The end of the line behind the signature says nothing; all else that is cut off does.
    counts = path.read_bytes().removesuffix(b"\n") if path.name == SIGNATURE else path.read_bytes()
    os.truncate(path, chance.randrange(len(counts)))


def extension(bundle: Path, chance: random.Random) -> None:
    """A file with more behind it."""
    path = chance.choice([path for path in sorted(bundle.iterdir()) if path.name != SIGNATURE])
    with path.open("ab") as file:
        file.write(chance.randbytes(chance.randrange(1, 999)))


def link(bundle: Path, chance: random.Random) -> None:
    """A link to the right bytes elsewhere, where somebody can change them after the check."""
    path = chance.choice(sorted(bundle.iterdir()))
    elsewhere = path.rename(bundle.parent / "elsewhere")
    chance.choice([path.symlink_to, path.hardlink_to])(elsewhere)


def exchange(bundle: Path, chance: random.Random) -> None:
    """Two files under each other's names."""
    one, other = chance.sample(sorted(bundle.iterdir()), 2)
    (bundle / "third").write_bytes(one.read_bytes())
    one.write_bytes(other.read_bytes())
    (bundle / "third").rename(other)


def older_file(bundle: Path, _: random.Random) -> None:
    """A file of an older bundle that was signed too."""
    shutil.copy(bundle.parents[1] / "older" / "bundle" / GRAPH, bundle)


def older_signature(bundle: Path, chance: random.Random) -> None:
    """Manifest or signature of an older bundle that was signed too."""
    shutil.copy(bundle.parents[1] / "older" / "bundle" / chance.choice([MANIFEST, SIGNATURE]), bundle)


def rewrite(bundle: Path, chance: random.Random) -> None:
    """Another file with a manifest that fits it, signed by a stranger or under the trusted key's old signature."""
    flip(bundle / WEIGHTS, chance)
    written = json.loads((bundle / MANIFEST).read_text())
    for entry in written["files"]:
        entry["sha256"] = hash_file(bundle / entry["path"]).sha256
    (bundle / MANIFEST).write_text(json.dumps(written))
    if chance.random() < 0.5:
        sign_bundle(bundle, PrivateKey.load(bundle.parents[1] / "stranger" / "stranger.key"))


CHANGES: tuple[Change, ...] = (
    *(weights,) * 8,
    *(manifest,) * 4,
    *(signature, addition, removal, truncation, extension, link, exchange, older_file, older_signature, rewrite),
)
"""How often each is made, in a row of 22."""


if __name__ == "__main__":
    main()
