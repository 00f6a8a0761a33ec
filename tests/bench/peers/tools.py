"""Brings the peers' programs to a folder outside the repository: llama.cpp built here, onnxruntime-genai by pip.

What was set up once is found again, unless its versions or options changed.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge.errors import UnavailableError

LLAMA_CPP = "llama-cpp-python==0.3.36"
"""The package whose source archive holds llama.cpp, server and all."""
LLAMA_CPP_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
GENAI = (
    "onnxruntime-genai==0.18.0",
    "onnxruntime==1.31.1",
    # What its model builder needs.
    "numpy==2.4.6",
    "onnx==1.23.2",
    "onnx-ir==1.1.0",
    "torch==2.13.0",
    "transformers==5.23.0",
)
CMAKE = ("cmake==3.31.6",)
_PROGRAMS = ("llama-server", "llama-bench", "llama-quantize")
_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
)
_FEATURES: Mapping[str, str] = {
    "GGML_AVX2": "avx2",
    "GGML_FMA": "fma",
    "GGML_F16C": "f16c",
    "GGML_BMI2": "bmi2",
    "GGML_AVX_VNNI": "avx_vnni",
    "GGML_AVX512": "avx512vl",
    "GGML_AVX512_VBMI": "avx512vbmi",
    "GGML_AVX512_VNNI": "avx512_vnni",
}
"""Option -> the processor's flag in /proc/cpuinfo that it needs."""
Argument = str | Path
_NETWORK_HINT = "check the network and pip's index settings, then run it again"


@dataclass(frozen=True)
class LlamaCpp:
    """A build of llama.cpp."""

    folder: Path
    options: tuple[str, ...]
    """What cmake was told."""

    def program(self, name: str) -> Path:
        """``llama-server``, ``llama-bench`` or ``llama-quantize``."""
        return self.folder / "bin" / name


def cpu_options(cpuinfo: str, machine: str) -> tuple[str, ...]:
    """Options for this processor.

    On x86 each instruction set is named, as a native build also takes the matrix unit (AMX) where it is announced, and
    that crashes on virtual machines which announce but do not grant it.
    """
    if machine not in {"x86_64", "AMD64"}:
        return ("-DGGML_NATIVE=ON",)
    flags = set(next((line for line in cpuinfo.splitlines() if line.startswith("flags")), "").split())
    return (
        "-DGGML_NATIVE=OFF",
        *(f"-D{option}={'ON' if flag in flags else 'OFF'}" for option, flag in _FEATURES.items()),
    )


def llama_cpp(home: Path) -> LlamaCpp:
    """Fetch and build llama.cpp, unless that was done before.

    Raises:
        UnavailableError: there is no compiler, the package cannot be had, or the build failed.
    """
    folder = home / LLAMA_CPP.replace("llama-cpp-python==", "llama.cpp-")
    source, build, stamp = folder / "source", folder / "build", folder / "options.txt"
    options = (*_OPTIONS, *cpu_options(Path("/proc/cpuinfo").read_text("utf-8"), platform.machine()))
    if not source.is_dir():
        _fetch_llama_cpp(source)
    if not stamp.is_file() or stamp.read_text("utf-8") != "\n".join(options):
        _build_llama_cpp(home, source, build, options)
        stamp.write_text("\n".join(options), "utf-8")
    return LlamaCpp(build, options)


def genai_python(home: Path) -> Path:
    """The interpreter of an environment that has onnxruntime-genai and its builder.

    Raises:
        UnavailableError: pip cannot install it.
    """
    return _environment(home / "genai-venv", GENAI)


def run(command: Sequence[Argument], what: str, hint: str, *, log: Path | None = None) -> None:
    """Run a program to its end, its output to a log file or to stderr.

    Raises:
        UnavailableError: it failed; says what, and where the log is.
    """
    if log is None:
        failed = subprocess.run(command, check=False, stdout=sys.stderr, stdin=subprocess.DEVNULL).returncode
    else:
        with log.open("a") as file:
            failed = subprocess.run(
                command, check=False, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            ).returncode
    if failed:
        raise UnavailableError(f"{what} failed{'' if log is None else f': see {log}'}", hint=hint)


def tell(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def _fetch_llama_cpp(source: Path) -> None:
    source.parent.mkdir(parents=True, exist_ok=True)
    tell(f"fetching llama.cpp in {LLAMA_CPP}")
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=source.parent) as scratch:
        # pip wants the package's build tools just to read its metadata: they come without a pinned hash, and go again.
        options = ["--disable-pip-version-check", "--no-input", "-q", "--no-deps", "--no-binary", "llama-cpp-python"]
        pip: list[Argument] = [sys.executable, "-m", "pip", "download", *options, "-d", scratch]
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text(f"{LLAMA_CPP} --hash=sha256:{LLAMA_CPP_SHA256}\n", "utf-8")
        run([*pip, "--require-hashes", "-r", requirements], f"downloading {LLAMA_CPP}", _NETWORK_HINT)
        unpacked = Path(scratch) / "unpacked"
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            archive.extractall(unpacked, filter="data")
        next(unpacked.glob("*/vendor/llama.cpp")).rename(source)


def _build_llama_cpp(home: Path, source: Path, build: Path, options: Sequence[str]) -> None:
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise UnavailableError("building llama.cpp needs a C++ compiler", hint="sudo apt-get install g++ make")
    cmake = shutil.which("cmake") or _environment(home / "cmake-venv", CMAKE).with_name("cmake")
    log = build.with_name("build.log")
    log.unlink(missing_ok=True)
    jobs = str(os.cpu_count() or 1)
    tell(f"building llama.cpp, which takes 10 to 20 minutes on 2 cores (log: {log})")
    hint = "see the end of the log; removing its folder starts over"
    run([cmake, "-S", source, "-B", build, *options], "configuring llama.cpp", hint, log=log)
    run([cmake, "--build", build, "-j", jobs, "--target", *_PROGRAMS], "building llama.cpp", hint, log=log)


def _environment(folder: Path, requirements: Sequence[str]) -> Path:
    python = folder / "bin" / "python"
    stamp = folder / "requirements.txt"
    wanted = "\n".join(requirements) + "\n"
    if not stamp.is_file() or stamp.read_text("utf-8") != wanted:
        tell(f"installing {', '.join(requirements)} into {folder}")
        venv.create(folder, with_pip=True, clear=True)
        pip: list[Argument] = [
            python,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "--no-input",
            "install",
            "-q",
            *requirements,
        ]
        run(pip, f"installing {requirements[0]}", _NETWORK_HINT)
        stamp.write_text(wanted, "utf-8")
    return python
