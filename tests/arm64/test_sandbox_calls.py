"""The evaluation's filter of system calls beside the kernel's headers: emulation has no seccomp to try it with."""

from __future__ import annotations

import os
import re
from pathlib import Path

from edge.evaluation import sandbox_child

HEADERS = Path(os.environ["ARM64_HEADERS"])
FIRST_OF_ALL = 424
"""From this number on every architecture has the same."""
ONLY_ON_X86 = {
    *("fork", "vfork", "creat", "rename", "mkdir", "rmdir", "link", "unlink", "symlink", "chmod", "chown", "lchown"),
    *("utime", "mknod", "utimes", "futimesat", "uselib", "ustat", "modify_ldt", "iopl", "ioperm", "_sysctl", "open"),
    *("arch_prctl", "create_module", "get_kernel_syms", "query_module", "renameat"),
}
"""Older calls that ARM64 never had, or has a newer one of instead."""
ONLY_REFUSED_ON_ARM = {"recvmsg", "recvmmsg", "copy_file_range", "name_to_handle_at", "shmdt", "semtimedop"}
"""Of no use to a program that can have neither a socket, nor a file to write, nor shared memory."""


def numbers(architecture: str) -> dict[str, int]:
    text = (HEADERS / architecture / "asm" / "unistd_64.h").read_text()
    return {name: int(number) for name, number in re.findall(r"#define __NR_(\w+)\s+(\d+)", text)}


X86, ARM = numbers("x86"), numbers("arm64")


def refused_on_arm(refused_on_x86: tuple[int, ...]) -> set[int]:
    """The same calls under ARM64's numbers; those that are newer than the headers have the same number everywhere."""
    names = {number: name for name, number in X86.items()}
    newest = max(X86.values())
    assert set(refused_on_x86) <= set(names) | set(range(newest + 1, newest + 100))
    known = {names[number] for number in refused_on_x86 if number in names}
    assert known - set(ARM) <= ONLY_ON_X86
    return {ARM[name] for name in known & set(ARM)} | {number for number in refused_on_x86 if number > newest}


def test_the_same_calls_are_refused_as_on_x86() -> None:
    _, refused, absent, _, _ = sandbox_child._AARCH64
    expected = refused_on_arm(sandbox_child._X86_64[1])
    names = {number: name for name, number in ARM.items()}
    assert {names.get(number, number) for number in expected - set(refused)} == set()
    assert {names[number] for number in set(refused) - expected} == ONLY_REFUSED_ON_ARM
    assert len(set(refused)) == len(refused)
    assert absent == sandbox_child._X86_64[2]
    assert min(absent) >= FIRST_OF_ALL


def test_calls_that_are_watched_are_the_right_ones() -> None:
    _, _, _, opens, clone = sandbox_child._AARCH64
    assert [number for number, _, _ in opens] == [ARM["openat"], ARM["fcntl"]]
    assert clone == ARM["clone"]
    _, _, _, opens, clone = sandbox_child._X86_64
    assert [number for number, _, _ in opens] == [X86["open"], X86["openat"], X86["fcntl"]]
    assert clone == X86["clone"]
