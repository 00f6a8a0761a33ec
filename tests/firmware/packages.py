"""The Debian packages with all their wheels, for both architectures: ``python -m tests.firmware.packages``.

Builds each twice, compares the bytes, has lintian judge them, and looks at what each compiled file is for and needs.
Takes minutes, which is why the tests do with small packages.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Final

from tests.firmware.test_deb import ELF_MACHINES, MACHINES, Package, build
from tests.firmware.tools import ROOT, need, run

SYSTEM_LIBRARIES: Final = re.compile(r"(ld-linux.*|lib(c|dl|m|pthread|rt|gcc_s|stdc\+\+|z))\.so\.\d+")
"""What Depends has: libc6, libgcc-s1, libstdc++6, zlib1g."""


def main() -> None:
    """Report on every package; raises AssertionError for what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        for arch, machine in MACHINES.items():
            wheels = Path(folder, "wheels", arch)
            run(ROOT / ".ci/offline-kit.sh", "wheels", machine, wheels)
            package = build(arch, wheels, Path(folder, arch))
            again = build(arch, wheels, Path(folder, f"{arch}-again"), TZ="Asia/Kathmandu", LC_ALL="C")
            assert package.file.read_bytes() == again.file.read_bytes()
            libraries = judge(package, arch)
            print(f"{package.file.name}: {package.file.stat().st_size >> 20} MiB, {libraries} libraries, reproducible")


def judge(package: Package, arch: str) -> int:
    """Lintian's and our own look at a package; returns how many compiled files it has."""
    run(need("lintian", "lintian"), "--allow-root", "--fail-on", "error,warning", package.file)
    libraries = [path for path in package.root.rglob("*.so*") if path.is_file()]
    bundled = {path.name for path in libraries}
    for path in libraries:
        assert int.from_bytes(path.read_bytes()[18:20], "little") == ELF_MACHINES[arch], path
        for name in re.findall(r"\(NEEDED\).*\[(.+)\]", run(need("readelf", "binutils"), "--dynamic", path)):
            assert name in bundled or SYSTEM_LIBRARIES.fullmatch(name), (path, name)
    return len(libraries)


if __name__ == "__main__":
    os.nice(19)
    main()
